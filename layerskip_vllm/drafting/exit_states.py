"""Exit states that drafting leaves behind, with which verification begins at the exit.

The exit query cache of the paper. In the worker, filled by the drafter and read by `verifier`, on
Model Runner V2 by `device_verifier`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.sequence import IntermediateTensors

from layerskip_vllm.config.speculative import get_layerskip_config


@dataclass(frozen=True)
class KeptStates:
    """The tokens of a target step whose exit states are there.

    Attributes:
        tokens: `[num_kept] int64`, each token's row in the step.
        rows: `[num_kept] int64`, its state's row in `ExitStates.tensors`.
    """

    tokens: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


class ExitStates:
    """What the first E layers made of each token that the last draft ran, before the final norm.

    A draft's step i has run a request's last token (i = 0) or its i-th draft. Its K-th draft is run
    by no step: that one's state is made with the verification, and kept here on Model Runner V2.

    Source: arXiv 2404.16710, section 4.3.3: the exit query cache.

    Attributes:
        tensors: What a pipeline would send on from layer E, `[(K + 1) * max_num_reqs, ...]` each:
            step i has the rows from `i * max_num_reqs` on, by the request's row in the batch, on
            Model Runner V2 by its request state.
        max_num_reqs: Rows of a step.
    """

    tensors: IntermediateTensors
    max_num_reqs: int

    def __init__(self, target: Any, vllm_config: VllmConfig):
        """Allocate room for the drafts of a whole batch, of what the target's layers hand on."""
        config = get_layerskip_config(vllm_config)
        self.max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.tensors = target.make_empty_intermediate_tensors(
            (config.num_speculative_tokens + 1) * self.max_num_reqs,
            vllm_config.model_config.dtype,
            vllm_config.device_config.device,
        )
        self.forget()

    def keep(self, step: int, states: IntermediateTensors) -> None:
        """Copy what a draft step has made: `[num_tokens, ...]` each, with padding after it."""
        start = step * self.max_num_reqs
        for name, tensor in self.tensors.tensors.items():
            rows = states[name][: self.max_num_reqs]
            tensor[start : start + len(rows)] = rows

    def expect(self, rows: Mapping[str, int], num_steps: int) -> None:
        """Say whose states the next target step may use.

        Args:
            rows: The row of each request that drafts.
            num_steps: How many steps the draft has.
        """
        self._drafted_rows, self._num_steps = rows, num_steps

    @property
    def is_expected(self) -> bool:
        """Whether the next target step may use states."""
        return self._num_steps > 0

    def forget(self) -> None:
        """Have the next target step use none: other weights, or another draft, made them."""
        self.expect({}, 0)

    def take(
        self, req_ids: Sequence[str], num_tokens: npt.NDArray[np.int32], num_drafts: Sequence[int]
    ) -> KeptStates:
        """Find the states that a target step can use, which no later step can.

        They are those of a request's last token and of all its drafts but the last, if the step has
        no other token of it. vLLM's scheduler gives a request drafts in the step after its draft;
        one that joins or resumes has none, and neither has one that is still in its prompt.

        Args:
            req_ids: The requests of the step, by row.
            num_tokens: `[num_reqs]`, how many tokens of each it runs.
            num_drafts: `[num_reqs]`, how many of these are drafts.

        Returns:
            The states.
        """
        tokens: list[int] = []
        rows: list[int] = []
        start = 0
        for req_id, length, num in zip(req_ids, num_tokens.tolist(), num_drafts, strict=True):
            row = self._drafted_rows.get(req_id)
            if row is not None and num + 1 == length and num <= self._num_steps:
                tokens += range(start, start + num)
                rows += (step * self.max_num_reqs + row for step in range(num))
            start += length
        self.forget()
        return KeptStates(np.array(tokens, dtype=np.int64), np.array(rows, dtype=np.int64))

    def holds_all(
        self,
        req_ids: Sequence[str],
        rows: npt.NDArray[np.integer[Any]],
        num_tokens: npt.NDArray[np.int32],
        num_drafts: npt.NDArray[np.int32],
    ) -> bool:
        """Say whether a target step can use states for all its tokens but each request's last.

        No later step can. A request without drafts is in the step with that last token alone.

        Args:
            req_ids: The requests of the step.
            rows: `[num_reqs]`, their rows now.
            num_tokens: `[num_reqs]`, how many tokens of each it runs.
            num_drafts: `[num_reqs]`, how many of these are drafts.

        Returns:
            Whether all drafts are those that a request's last draft has run, and those alone.
        """
        holds = (
            bool((num_tokens == num_drafts + 1).all())
            and int(num_drafts.max()) <= self._num_steps
            and all(
                num == 0 or self._drafted_rows.get(req_id) == row
                for req_id, row, num in zip(
                    req_ids, rows.tolist(), num_drafts.tolist(), strict=True
                )
            )
        )
        self.forget()
        return holds

    def merge(
        self, kept: KeptStates, made: IntermediateTensors, tokens: torch.Tensor
    ) -> IntermediateTensors:
        """Lay out the states of a target step: those kept, and those made for the other tokens.

        Args:
            kept: Some tokens' states here.
            made: The others', `[num_made, ...]`, and padding.
            tokens: `[num_made] int64`, the other tokens' rows in the step.

        Returns:
            `[num_kept + num_made, ...]` each.
        """
        device = tokens.device
        kept_tokens, rows = (torch.from_numpy(a).to(device) for a in (kept.tokens, kept.rows))
        num_made, num_tokens = len(tokens), len(kept_tokens) + len(tokens)
        merged = {}
        for name, tensor in self.tensors.tensors.items():
            states = tensor.new_empty((num_tokens, *tensor.shape[1:]))
            states[kept_tokens] = tensor[rows]
            states[tokens] = made[name][:num_made]
            merged[name] = states
        return IntermediateTensors(merged)
