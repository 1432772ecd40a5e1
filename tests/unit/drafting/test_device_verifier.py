"""Which steps of Model Runner V2 begin at the exit, and by which CUDA graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from layerskip_vllm.drafting import device_verifier
from layerskip_vllm.drafting.cuda_graphs import RemainingLayersCudaGraphs
from layerskip_vllm.drafting.device_verifier import MIN_NUM_KEPT, DeviceVerifier

K, MAX_NUM_REQS = 4, 128
EAGER = BatchExecutionDescriptor(CUDAGraphMode.NONE, 1, 1)


def full(num_tokens: int) -> BatchExecutionDescriptor:
    """The descriptor of a full graph."""
    return BatchExecutionDescriptor(CUDAGraphMode.FULL, num_tokens, num_tokens)


@pytest.fixture
def make(configure: Any) -> Any:
    """Make a verifier with a target that says "target", and a graph of 10 tokens."""
    from vllm.sequence import IntermediateTensors

    from layerskip_vllm.drafting.exit_states import ExitStates

    def make(reuse: str = "on") -> tuple[DeviceVerifier, Any]:
        config = configure(
            max_num_seqs=MAX_NUM_REQS,
            max_num_batched_tokens=512,
            speculative_config={"method": "layerskip", "num_speculative_tokens": K},
        )
        target = SimpleNamespace(
            forward=lambda **_: "target",
            make_empty_intermediate_tensors=lambda n, *_: IntermediateTensors(
                {"hidden_states": torch.zeros(n, 1)}
            ),
        )
        model = SimpleNamespace(
            target=target, run_remaining_layers=lambda states, _: states["hidden_states"]
        )
        speculator: Any = SimpleNamespace(
            speculative_config=SimpleNamespace(reuse_exit_states=reuse),
            num_speculative_steps=K,
            device=torch.device("cpu"),
            model=model,
            remaining_graphs=SimpleNamespace(graphs={full(10): None}),
        )
        states = ExitStates(target, config)
        states.tensors["hidden_states"][:, 0] = torch.arange((K + 1) * MAX_NUM_REQS)
        verifier = DeviceVerifier(speculator, states)
        verifier._make_last_states = lambda batch: None  # type: ignore[method-assign]
        return verifier, target

    return make


def batch_of(
    num_drafts: list[int], states: list[int] | None = None, **changes: Any
) -> SimpleNamespace:
    """A batch of decodes with so many drafts, in such request states."""
    num_reqs = len(num_drafts)
    states = states or list(range(num_reqs))
    drafts = np.array(num_drafts, dtype=np.int32)
    pairs = [(s, i) for s, n in zip(states, num_drafts, strict=True) for i in range(n + 1)]
    batch = SimpleNamespace(
        req_ids=[str(index) for index in range(num_reqs)],
        idx_mapping_np=np.array(states),
        num_scheduled_tokens=drafts + 1,
        num_draft_tokens_per_req=drafts,
        num_draft_tokens=int(drafts.sum()),
        num_tokens=int(drafts.sum()) + num_reqs,
        has_prefill=False,
        num_computed_prefill_tokens_np=np.full(num_reqs, 9),
        prefill_len_np=np.full(num_reqs, 9),
        expanded_idx_mapping=torch.tensor([state for state, _ in pairs]),
        expanded_local_pos=torch.tensor([i for _, i in pairs], dtype=torch.int32),
    )
    vars(batch).update(changes)
    return batch


def begins_at_exit(
    verifier: DeviceVerifier, batch: Any, desc: BatchExecutionDescriptor = EAGER
) -> bool:
    """Prepare a step, and say whether the target's `forward` would begin at the exit."""
    verifier._prepare_inputs = lambda *args: batch
    verifier.prepare_inputs(None, None, desc, 0)
    return verifier._is_reusing


def draft(verifier: DeviceVerifier, batch: Any, num_steps: int = K) -> None:
    verifier.expect(batch, batch.num_draft_tokens, num_steps)


def test_step_gathers_each_tokens_state_when_all_drafts_are_of_the_step_before(make: Any) -> None:
    verifier, target = make()
    draft(verifier, batch_of([K, K, K], [5, 0, 3]))
    verifier._rows.fill_(7)  # as a larger step has left them
    # Another order, fewer drafts, one request without; by state, not by row.
    batch = batch_of([2, 0, K], [3, 9, 5], req_ids=["2", "9", "0"])
    assert begins_at_exit(verifier, batch)
    positions = torch.zeros(batch.num_tokens + 2)  # padded
    rows = target.forward(positions=positions).flatten().tolist()
    n = MAX_NUM_REQS
    assert rows[:9] == [3, n + 3, 2 * n + 3, 9, 5, n + 5, 2 * n + 5, 3 * n + 5, 4 * n + 5]
    assert rows[9:] == [0, 0]
    assert target.forward(positions=positions) == "target"


@pytest.mark.parametrize(
    "batch",
    [
        batch_of([K, K], req_ids=["0", "joined"]),
        batch_of([K, K], [0, 7]),
        batch_of([K, K], has_prefill=True),
        batch_of([K, K], num_scheduled_tokens=np.array([K + 1, K + 2])),
        batch_of([0, 0], num_draft_tokens_per_req=None),
        batch_of([0, 0]),
    ],
    ids=["not drafted", "another state", "prompt", "more tokens", "no drafts", "none drafts"],
)
def test_step_runs_all_layers_when(make: Any, batch: Any) -> None:
    verifier, target = make()
    draft(verifier, batch_of([K, K]))
    assert not begins_at_exit(verifier, batch)
    assert target.forward(positions=torch.zeros(4)) == "target"


def test_step_runs_all_layers_when_more_is_verified_than_was_drafted(make: Any) -> None:
    for num_steps, expected in ((K - 1, False), (K, True)):
        verifier, _ = make()
        draft(verifier, batch_of([K, K]), num_steps)
        assert begins_at_exit(verifier, batch_of([K, K])) == expected


def test_step_runs_all_layers_when_a_step_before_has_used_the_states(make: Any) -> None:
    verifier, _ = make()
    draft(verifier, batch_of([K, K]))
    assert begins_at_exit(verifier, batch_of([K, K]))
    assert not begins_at_exit(verifier, batch_of([K, K]))


def test_step_runs_all_layers_when_a_request_was_in_its_prompt(make: Any) -> None:
    verifier, _ = make()
    in_prompt = {
        "num_computed_prefill_tokens_np": np.array([9, 2]),
        "num_scheduled_tokens": np.array([K + 1, 6]),
    }
    draft(verifier, batch_of([K, 0], **in_prompt))
    assert not begins_at_exit(verifier, batch_of([K, K]))


def test_step_runs_all_layers_when_weights_have_changed(make: Any) -> None:
    from layerskip_vllm.drafting.exit_model import ExitModel

    verifier, _ = make()
    draft(verifier, batch_of([K, K]))
    model = SimpleNamespace(exit_states=verifier._states, draft_head=None)
    ExitModel.expect_weights(model)  # type: ignore[arg-type]
    assert not begins_at_exit(verifier, batch_of([K, K]))


@pytest.mark.parametrize(
    ("desc", "expected"),
    [
        (full(10), True),
        (full(12), False),
        (BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, 10, None), False),
    ],
    ids=["captured", "not captured", "piecewise"],
)
def test_step_begins_at_the_exit_when_it_has_a_graph(
    make: Any, desc: BatchExecutionDescriptor, expected: bool
) -> None:
    verifier, _ = make()
    draft(verifier, batch_of([K, K]))
    assert begins_at_exit(verifier, batch_of([K, K]), desc) == expected


@pytest.mark.parametrize(("num_reqs", "expected"), [(63, False), (64, True)])
def test_states_are_used_in_large_steps_alone_when_reuse_is_auto(
    make: Any, num_reqs: int, expected: bool
) -> None:
    assert MIN_NUM_KEPT == 64 * K
    verifier, _ = make("auto")
    batch = batch_of([K] * num_reqs)
    assert verifier.keeps(num_reqs) == expected
    verifier.expect(batch, num_reqs, K)
    assert begins_at_exit(verifier, batch) == expected


def test_small_step_runs_all_layers_when_its_padded_draft_kept_states(make: Any) -> None:
    verifier, _ = make("auto")
    batch = batch_of([K] * 60)
    verifier.expect(batch, 64, K)
    assert not begins_at_exit(verifier, batch)


def test_verifier_is_refused_when_decodes_run_in_piecewise_graphs(make: Any) -> None:
    verifier, _ = make()
    manager = SimpleNamespace(cudagraph_mode=CUDAGraphMode.PIECEWISE)
    with pytest.raises(ValueError, match="reuse_exit_states is 'on' and cudagraph_mode is 'PIECE"):
        verifier.attach(SimpleNamespace(cudagraph_manager=manager))


def test_graphs_replayed_are_the_remaining_layers_when_a_step_begins_at_the_exit(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier, _ = make()
    graphs = SimpleNamespace(graphs={full(10): None}, run_fullgraph=lambda desc: "remaining")
    monkeypatch.setattr(device_verifier, "RemainingLayersCudaGraphs", lambda *_: graphs)
    manager = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY, run_fullgraph=lambda desc: "target"
    )
    batch = batch_of([K, K])
    runner = type(
        "Runner", (), {"prepare_inputs": lambda *_: batch, "cudagraph_manager": manager}
    )()
    verifier.attach(runner)
    draft(verifier, batch)
    runner.prepare_inputs(None, None, full(10), 0)
    # The second is no step of requests.
    assert [manager.run_fullgraph(full(10)) for _ in range(2)] == ["remaining", "target"]


def test_remaining_layers_have_graphs_of_the_targets_when_these_are_full_and_large(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(max_num_seqs=8, max_num_batched_tokens=512)
    target: Any = SimpleNamespace(
        vllm_config=config,
        device=torch.device("cpu"),
        max_num_reqs=8,
        decode_query_len=K + 1,
        _capture_descs={
            CUDAGraphMode.FULL: [full(n) for n in (48, 40, 16, 8)],
            CUDAGraphMode.PIECEWISE: [
                BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, 48, None),
            ],
        },
    )
    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(current_platform, "graph_pool_handle", object, raising=False)
    monkeypatch.setattr("vllm.v1.worker.gpu.cudagraph_utils.get_pp_group", lambda: rank)
    # No step that verifies has more than 40 tokens; one of 16 has at most 12 drafts.
    graphs = RemainingLayersCudaGraphs(target, 16)
    assert graphs._capture_descs == {CUDAGraphMode.FULL: [full(40), full(16)]}
