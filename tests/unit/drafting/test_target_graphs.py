"""Which targets have full CUDA graphs for any mix of drafts; the graphs themselves need a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport

from layerskip_vllm.drafting import target_graphs


def make_runner(**changes: Any) -> Any:
    """A runner whose graphs have been chosen for K + 1 tokens in each request."""
    manager = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        varlen_decode=False,
        dp_size=1,
        _candidates={"size": "uniform"},
        _capture_descs={"mode": "uniform"},
    )

    def choose() -> None:
        manager._candidates["size"] = "any mix" if manager.varlen_decode else "uniform"

    manager._init_candidates = choose
    support = changes.pop("support", AttentionCGSupport.ALWAYS)
    ubatch_runner = changes.pop("ubatch_runner", None)
    vars(manager).update(changes)
    return SimpleNamespace(
        cudagraph_manager=manager,
        ubatch_runner=ubatch_runner,
        model_state=SimpleNamespace(get_additional_cg_support=lambda: (support, None)),
        attn_groups=[],
        vllm_config=None,
        decode_query_len=4,
    )


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What vLLM's own check says of the attention backends."""
    said: dict[str, str | None] = {"unsupported": None}
    monkeypatch.setattr(
        target_graphs,
        "get_varlen_cudagraph_unsupported_backend",
        lambda *_: said["unsupported"],
    )
    return said


def test_graphs_take_any_mix_when_the_backend_does() -> None:
    runner = make_runner()
    target_graphs.take_any_mix(runner)
    assert runner.cudagraph_manager.varlen_decode
    assert runner.cudagraph_manager._candidates == {"size": "any mix"}
    assert runner.cudagraph_manager._capture_descs == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"cudagraph_mode": CUDAGraphMode.PIECEWISE},
        {"dp_size": 2},
        {"ubatch_runner": object()},
        {"support": AttentionCGSupport.UNIFORM_BATCH},
    ],
    ids=["piecewise", "data parallelism", "microbatches", "model"],
)
def test_graphs_stay_when_they_cannot_take_any_mix(changes: dict[str, Any]) -> None:
    assert_unchanged(make_runner(**changes))


def test_graphs_stay_when_an_attention_backend_cannot(backend: dict[str, str | None]) -> None:
    backend["unsupported"] = "FLASHINFER"
    assert_unchanged(make_runner())


def assert_unchanged(runner: Any) -> None:
    target_graphs.take_any_mix(runner)
    assert not runner.cudagraph_manager.varlen_decode
    assert runner.cudagraph_manager._candidates == {"size": "uniform"}
    assert runner.cudagraph_manager._capture_descs == {"mode": "uniform"}
