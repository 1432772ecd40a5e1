"""What a loaded model's head must be for some of its rows to be a head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


def make_target(calls: int, method: Any = None, weight: torch.Tensor | None = None) -> Any:
    """A model that computes its logits by so many calls of a logits processor."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    class Processor(LogitsProcessor):
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def forward(self, head: nn.Module, states: torch.Tensor) -> torch.Tensor:
            return states

    class Target(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits_processor, self.lm_head = Processor(), nn.Linear(2, 2)
            self.lm_head.quant_method = method

        def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
            for _ in range(calls):
                states = self.logits_processor(self.lm_head, states)
            return states

    return Target()


@pytest.mark.parametrize("calls", [0, 2])
def test_model_is_refused_when_not_one_logits_processor_computes_its_logits(calls: int) -> None:
    from layerskip_vllm.drafting.draft_head import _compute_watched

    with pytest.raises(ValueError, match=rf"Target computes its logits by {calls} calls of vLLM's"):
        _compute_watched(make_target(calls), torch.zeros(1, 2))


def test_model_is_refused_when_its_head_is_quantized() -> None:
    from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod

    from layerskip_vllm.drafting.draft_head import _compute_watched

    method = object.__new__(Fp8LinearMethod)
    with pytest.raises(ValueError, match=r"a quantized or repacked head \(Fp8LinearMethod\), of"):
        _compute_watched(make_target(1, method), torch.zeros(1, 2))


@pytest.mark.parametrize("bends", [False, True])
def test_model_is_refused_when_it_bends_its_logits_after_the_head(bends: bool) -> None:
    from layerskip_vllm.drafting.draft_head import DraftHead

    class Headed(nn.Module):
        def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
            logits = states[:, [4, 1]]
            return logits - logits.mean(dim=-1, keepdim=True) if bends else logits

    head = object.__new__(DraftHead)
    nn.Module.__init__(head)
    head.token_ids = torch.tensor([4, 1])
    head.__dict__["headed_target"] = Headed()
    states = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    if not bends:
        head._check(states, states)
        return
    with pytest.raises(ValueError, match="Headed does more to its logits than its head and scale"):
        head._check(states, states)


def test_values_are_laid_out_over_the_vocabulary_when_widened() -> None:
    from layerskip_vllm.drafting.draft_head import DraftHead

    head = object.__new__(DraftHead)
    nn.Module.__init__(head)
    head.token_ids, head.vocab_size = torch.tensor([4, 1]), 6
    assert head.widen(torch.tensor([[0.75, 0.25]]), fill=0.0).tolist() == [[0, 0.25, 0, 0, 0.75, 0]]
