"""Verification that begins at the exit, on Model Runner V1; called in the target's place.

In the worker, made by `proposer` where `reuse_exit_states` is not off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.forward_context import get_forward_context
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from layerskip_vllm.drafting.exit_states import ExitStates

if TYPE_CHECKING:
    from layerskip_vllm.drafting.proposer import DraftBatch, LayerSkipProposer

# Tokens whose states a step must find for "auto" to use them: below, a step's weights take longer
# to read than to multiply, and they are read either way (docs/speed.md).
MIN_NUM_KEPT = 24


class Verifier:
    """Runs the target's steps, without the first E layers for tokens that have exit states.

    Their keys and values of those layers are in the cache already, where drafting has put them. The
    first layers run for all other tokens: the last draft of each request, and every token of those
    that have joined.

    Attributes:
        exit_states: What drafting has left.
        num_steps: The target's steps that some states were used in.
    """

    exit_states: ExitStates
    num_steps: int

    def __init__(self, proposer: LayerSkipProposer, exit_states: ExitStates):
        """Take the place of the target in the runner's steps."""
        self.exit_states = exit_states
        self.num_steps = 0
        is_on = proposer.speculative_config.reuse_exit_states == "on"
        self._min_num_kept = 1 if is_on else MIN_NUM_KEPT
        self._proposer = proposer
        self._runner = proposer.runner
        self._run_target = self._runner._model_forward
        vars(self._runner)["_model_forward"] = self.run

    def begin_draft(self, num_steps: int) -> None:
        """Have a draft of the runner's batch keep its exit states, if they may be used."""
        rows = dict(self._runner.input_batch.req_id_to_index)
        if len(rows) * num_steps >= self._min_num_kept:
            self.exit_states.expect(rows, num_steps)

    def dummy_run(self, batch: DraftBatch) -> None:
        """Run both parts of a step without requests: that compiles them."""
        proposer = self._proposer
        positions = proposer.positions[: batch.num_tokens]
        with proposer.set_context(batch, None, {}):
            states = proposer.model.run_first_layers(
                proposer.input_ids[: batch.num_tokens], positions
            )
            proposer.model.run_remaining_layers(states, positions)

    def run(self, input_ids: torch.Tensor, positions: torch.Tensor, **kwargs: Any) -> Any:
        """Run a step of the target.

        Args:
            input_ids: `[num_tokens] int32`.
            positions: `[num_tokens] int64`.
            **kwargs: What else vLLM gives the target, all None.

        Returns:
            `[num_tokens, hidden_size]`.
        """
        batch = self._runner.input_batch
        num_reqs = batch.num_reqs
        num_tokens = np.diff(self._runner.query_start_loc.np[: num_reqs + 1])
        num_drafts = [len(token_ids) for token_ids in batch.spec_token_ids[:num_reqs]]
        kept = self.exit_states.take(batch.req_ids, num_tokens, num_drafts)
        if len(kept.tokens) < self._min_num_kept:
            return self._run_target(input_ids=input_ids, positions=positions, **kwargs)
        self.num_steps += 1
        is_made = np.ones(len(positions), dtype=np.bool_)
        is_made[kept.tokens] = False
        others = torch.from_numpy(np.flatnonzero(is_made))
        starts = np.concatenate(([0], np.cumsum(num_tokens)))
        num_others = np.add.reduceat(is_made, starts[:-1], dtype=np.int32)
        made = self._run_first_layers(input_ids, positions, others, num_others)
        states = self.exit_states.merge(kept, made, others)
        return self._proposer.model.run_remaining_layers(states, positions)

    def _run_first_layers(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        tokens: torch.Tensor,
        num_tokens: npt.NDArray[np.int32],
    ) -> IntermediateTensors:
        """Run the first layers for some tokens of the step, the last ones of each request."""
        proposer, runner = self._proposer, self._runner
        num_reqs = len(num_tokens)
        batch = proposer.pad(len(tokens))
        starts = torch.zeros(num_reqs + 1, dtype=torch.int32)
        torch.cumsum(torch.from_numpy(num_tokens), 0, out=starts[1:])
        proposer.input_ids[: len(tokens)] = input_ids[tokens]
        proposer.positions[: len(tokens)] = positions[tokens]
        step_slots: Any = get_forward_context().slot_mapping
        block_tables = runner.input_batch.block_table
        slots = {}
        for group in proposer.attention.groups:
            slot_mapping = torch.full((batch.num_tokens,), PAD_SLOT_ID)
            slot_mapping[: len(tokens)] = step_slots[group.layer_names[0]][tokens]
            slots[group.kv_cache_group_id] = slot_mapping
        seq_lens = runner.optimistic_seq_lens_cpu[:num_reqs]
        metadata = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=runner.seq_lens[:num_reqs],
            num_reqs=num_reqs,
            num_actual_tokens=len(tokens),
            max_query_len=int(num_tokens.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=block_tables[0].get_device_tensor(num_reqs),
            slot_mapping=slots[proposer.attention.groups[0].kv_cache_group_id],
            positions=proposer.positions[: len(tokens)],
            seq_lens_cpu_upper_bound=seq_lens,
        )
        with proposer.set_context(batch, *proposer.attention.build(metadata, slots)):
            states: IntermediateTensors = proposer.model.run_first_layers(
                proposer.input_ids[: batch.num_tokens], proposer.positions[: batch.num_tokens]
            )
        return states
