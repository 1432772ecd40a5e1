"""What a step drafts where it does not draft all that the engine allows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.dp_utils import DPSyncState

from layerskip_vllm.config.speculative import LayerSkipConfig
from layerskip_vllm.drafting import speculator
from layerskip_vllm.drafting.request_limits import limit_step
from layerskip_vllm.drafting.speculator import LayerSkipSpeculator
from scripts.ledger import version_here

K = 3


def scheduled(num_ranks: int, *limits: int, num_prompt_tokens: int = 5) -> SchedulerOutput:
    """A step that runs the fifth token of requests with such limits, on a data-parallel rank."""
    requests = {
        str(i): SimpleNamespace(
            num_computed_tokens=4,
            num_tokens=num_prompt_tokens,
            num_output_placeholders=0,
            sampling_params=SamplingParams(extra_args={"layerskip": {"num_speculative_tokens": n}}),
        )
        for i, n in enumerate(limits)
    }
    config = object.__new__(LayerSkipConfig)
    config.num_speculative_tokens = K
    scheduler: Any = SimpleNamespace(
        requests=requests,
        num_spec_tokens=K,
        vllm_config=SimpleNamespace(speculative_config=config),
        parallel_config=SimpleNamespace(data_parallel_size=num_ranks),
    )
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = dict.fromkeys(requests, 1)
    output.num_spec_tokens_to_schedule = K
    limit_step(scheduler, output)
    return output


@pytest.mark.parametrize(
    ("num_ranks", "limits", "num_drafts", "is_skipped"),
    [
        (1, (0, 0), 0, True),
        (1, (0, 2), 2, False),
        # Ranks must draft alike: only that there is nothing to draft can be agreed on.
        (2, (0, 0), K, True),
        (2, (0, 2), K, False),
    ],
)
def test_step_drafts_what_its_requests_ask_for_when_ranks_can_agree_on_it(
    num_ranks: int, limits: tuple[int, ...], num_drafts: int, is_skipped: bool
) -> None:
    output = scheduled(num_ranks, *limits)
    assert output.num_spec_tokens_to_schedule == num_drafts
    if version_here() == "0.32.0":  # whose ranks agree on nothing
        assert not hasattr(output, "skip_drafts")
    else:
        assert output.skip_drafts == is_skipped


@pytest.mark.parametrize(("num_prompt_tokens", "num_drafts"), [(5, K), (6, 0)])
def test_step_drafts_nothing_when_its_requests_are_all_in_their_prompts(
    num_prompt_tokens: int, num_drafts: int
) -> None:
    output = scheduled(1, K, K, num_prompt_tokens=num_prompt_tokens)
    assert output.num_spec_tokens_to_schedule == num_drafts


def test_idle_rank_drafts_for_no_more_requests_than_the_busiest_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its dummy batch is as large as the graph that the ranks agreed on, here of 8."""
    num_reqs: dict[str, int] = {}

    def record(name: str, value: int) -> None:
        num_reqs[name] = value

    monkeypatch.setattr(speculator, "prepare_draft", lambda *a: record("prepared", a[3]))
    sync = DPSyncState(
        num_tokens_across_dp=torch.tensor([8, 8]), uniform_token_count=1, eager=False, num_reqs=2
    )
    drafter: Any = SimpleNamespace(
        num_speculative_steps=K,
        model=SimpleNamespace(follow_weights=lambda: None),
        max_model_len=64,
        input_buffers=None,
        draft_steps=None,
        idx_mapping=None,
        lora=None,
        lora_ids=(),
        lookup=None,
        verifier=None,
        draft_tokens=torch.zeros(8, K),
        graphs=None,
        dp_size=2,
        dp_rank=0,
        max_num_tokens=64,
        _copy_request_inputs=lambda n, *a, **k: record("copied", n),
        _draft_one=None,
        run_steps=lambda _, graphs, n, desc, across, *a: num_reqs.update(
            drafted=n, across=int(across.max())
        ),
    )
    for name in ("_dispatch", "_build_uniform_batch_dp_sync"):
        setattr(drafter, name, getattr(LayerSkipSpeculator, name).__get__(drafter))
    monkeypatch.setattr(
        speculator,
        "dispatch_cg_and_sync_dp",
        lambda *a, dp_sync_state, **k: (
            BatchExecutionDescriptor(CUDAGraphMode.NONE, a[2], a[1]),
            dp_sync_state,
        ),
    )
    batch: Any = SimpleNamespace(
        num_reqs=8,
        idx_mapping=torch.arange(8),
        seq_lens=torch.ones(8),
        seq_lens_cpu_upper_bound=torch.ones(8, dtype=torch.int32),
    )
    drafts = LayerSkipSpeculator.propose(
        drafter, batch, *[None] * 10, dp_sync_state=sync, dummy_run=True
    )
    assert num_reqs == {"copied": 2, "prepared": 2, "drafted": 2, "across": 2}
    assert len(drafts) == 2
