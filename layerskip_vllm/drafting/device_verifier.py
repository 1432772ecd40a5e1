"""Verification that begins at the exit, on Model Runner V2; called in the target's place.

In the worker, made by `speculator` where `reuse_exit_states` is not off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.sequence import IntermediateTensors
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch

from layerskip_vllm.drafting.cuda_graphs import RemainingLayersCudaGraphs
from layerskip_vllm.drafting.exit_states import ExitStates
from layerskip_vllm.drafting.kernels import keep_rows, prepare_last_tokens

if TYPE_CHECKING:
    from layerskip_vllm.drafting.speculator import LayerSkipSpeculator

# Drafts that a step must verify for "auto" to use their states. Below, a GPU reads a step's weights
# for longer than it multiplies by them, and they are read either way: about so many rows are as
# many operations as bytes on an A100, H100, H200 or B200 in bfloat16 (docs/speed.md). An estimate.
MIN_NUM_KEPT = 256


class DeviceVerifier:
    """Runs the target's steps that verify drafts alone, without the first E layers where it can.

    The host decides by what it knows: each draft of the step was drafted the step before. Where a
    request's draft begins, after how many accepted tokens, the device alone knows, and need not
    tell: a verification begins where the draft did. The first layers run for each request's last
    token, whose slot only this step has; all else is in the cache and in the exit states. A step
    with a prompt in it goes through all layers.

    Attributes:
        min_num_reqs: The smallest batch whose drafts keep their exit states.
        num_steps: The target's steps that states were used in.
    """

    min_num_reqs: int
    num_steps: int

    def __init__(self, speculator: LayerSkipSpeculator, exit_states: ExitStates):
        """Take the place of the target in the runner's steps."""
        self.num_steps = 0
        is_on = speculator.speculative_config.reuse_exit_states == "on"
        num_steps = speculator.num_speculative_steps
        self._min_num_kept = 1 if is_on else MIN_NUM_KEPT
        self.min_num_reqs = -(-self._min_num_kept // num_steps)
        self._speculator = speculator
        self._model = speculator.model
        self._states = exit_states
        # For each token of a step, its row of the exit states.
        self._rows = torch.zeros(
            exit_states.max_num_reqs * (num_steps + 1),
            dtype=torch.int64,
            device=speculator.device,
        )
        self._is_reusing = False
        target = self._model.target
        self._run_target = target.forward
        vars(target)["forward"] = self.run

    @property
    def _remaining_graphs(self) -> RemainingLayersCudaGraphs:
        graphs = self._speculator.remaining_graphs
        assert graphs is not None
        return graphs

    def keeps(self, num_rows: int) -> bool:
        """Say whether draft steps of so many rows, with padding, keep their exit states."""
        return num_rows >= self.min_num_reqs

    def keep(self, num_reqs: int, states: IntermediateTensors) -> None:
        """Copy what a step has made of each request: `[num_tokens, ...]` each, padded."""
        speculator = self._speculator
        for name, kept in self._states.tensors.tensors.items():
            rows = states[name][:num_reqs]
            keep_rows(
                kept.flatten(1), rows.flatten(1), speculator.draft_steps, speculator.idx_mapping
            )

    def expect(self, input_batch: InputBatch, num_rows: int, num_steps: int) -> None:
        """Say whose states the next step may use.

        Args:
            input_batch: The batch that has drafted; requests in the middle of their prompts have
                not.
            num_rows: Rows of a draft step, with padding.
            num_steps: How many steps the draft has.
        """
        if not self.keeps(num_rows):
            self.forget()
            return
        num_run = input_batch.num_computed_prefill_tokens_np + input_batch.num_scheduled_tokens
        is_drafting = num_run >= input_batch.prefill_len_np
        rows = zip(
            input_batch.req_ids, input_batch.idx_mapping_np.tolist(), is_drafting, strict=True
        )
        self._states.expect({req_id: row for req_id, row, drafts in rows if drafts}, num_steps)

    def forget(self) -> None:
        """Have the next step use no states: nothing was drafted for it."""
        self._states.forget()

    def attach(self, runner: Any) -> None:
        """See each batch of a runner before it is run, and run some of its graphs' in their place.

        Called when the target's graphs have been chosen, and before they are captured.

        Args:
            runner: The model runner.

        Raises:
            ValueError: If decode steps are not to run in full graphs, as those after layer E do.
        """
        manager = runner.cudagraph_manager
        if manager.cudagraph_mode.decode_mode() == CUDAGraphMode.PIECEWISE:
            reuse = self._speculator.speculative_config.reuse_exit_states
            raise ValueError(
                f"reuse_exit_states is {reuse!r} and cudagraph_mode is "
                f"{manager.cudagraph_mode.name!r}, as it is set or as attention allows, "
                "but a verification that begins at the exit has full CUDA graphs alone; leave "
                "reuse_exit_states out, or use a cudagraph_mode and an attention backend with full "
                "graphs of decode steps."
            )
        if "prepare_inputs" not in vars(runner):
            self._prepare_inputs = runner.prepare_inputs
            runner.prepare_inputs = self.prepare_inputs
        self._run_target_graph = manager.run_fullgraph
        manager.run_fullgraph = self.run_fullgraph
        self._speculator.remaining_graphs = RemainingLayersCudaGraphs(
            manager, self._min_num_kept + 1
        )

    def capture(self) -> None:
        """Capture the CUDA graphs of both parts of a verification."""
        speculator = self._speculator
        assert speculator.last_token_graphs is not None
        speculator.last_token_graphs.capture(
            self._run_last_tokens,
            speculator.model_state,
            speculator.input_buffers,
            speculator.block_tables,
            speculator.attn_groups,
            speculator.kv_cache_config,
            progress_bar_desc="Capturing CUDA graphs of the first layers",
        )
        self._remaining_graphs.capture(
            self._run_remaining,  # type: ignore[arg-type]  # it is called, and nothing else
            speculator.model_state,
            speculator.target_input_buffers,
            None,
            speculator.block_tables,
            speculator.target_attn_groups,
            speculator.kv_cache_config,
            progress_bar_desc="Capturing CUDA graphs of the remaining layers",
        )

    def compile(self) -> None:
        """Run both parts of a step without requests, and the exit model: that compiles them."""
        speculator = self._speculator
        buffers = speculator.input_buffers
        num_tokens = min(len(self._rows), buffers.max_num_tokens)
        positions = buffers.positions[:num_tokens]
        with set_forward_context(None, speculator.vllm_config, num_tokens=num_tokens):
            if self.keeps(speculator.max_num_reqs):
                states = self._model.run_first_layers(buffers.input_ids[:num_tokens], positions)
                self._model.run_remaining_layers(states, positions)
            if not self.keeps(1):  # small batches draft without
                self._model(buffers.input_ids[:num_tokens], positions)

    def prepare_inputs(
        self, scheduler_output: Any, batch_state: Any, batch_desc: Any, *args: Any
    ) -> InputBatch:
        """Prepare a batch as the runner does, and its exit states if it is to begin with them.

        The runner gathers the batch's block tables and slots afterwards.
        """
        batch: InputBatch = self._prepare_inputs(scheduler_output, batch_state, batch_desc, *args)
        self._is_reusing = self._can_reuse(batch, batch_desc)
        if self._is_reusing:
            self.num_steps += 1
            self._make_last_states(batch)
            torch.add(
                batch.expanded_idx_mapping,
                batch.expanded_local_pos,
                alpha=self._states.max_num_reqs,
                out=self._rows[: batch.num_tokens],
            )
            self._rows[batch.num_tokens :].zero_()
        return batch

    def _can_reuse(self, batch: InputBatch, batch_desc: BatchExecutionDescriptor) -> bool:
        """Say whether a step can begin at the exit, and is large enough."""
        num_drafts = batch.num_draft_tokens_per_req
        return (
            num_drafts is not None
            and batch.num_draft_tokens >= self._min_num_kept
            and not batch.has_prefill
            and (
                batch_desc.cg_mode == CUDAGraphMode.NONE
                or batch_desc in self._remaining_graphs.graphs
            )
            and self._states.holds_all(
                batch.req_ids, batch.idx_mapping_np, batch.num_scheduled_tokens, num_drafts
            )
        )

    def _make_last_states(self, batch: InputBatch) -> None:
        """Run the first layers on each request's last token, whose exit state is not there."""
        speculator, num_reqs = self._speculator, batch.num_reqs
        assert speculator.last_token_graphs is not None
        desc = speculator.last_token_graphs.dispatch(num_reqs, num_reqs, 1, 0)
        prepare_last_tokens(
            speculator.input_buffers, speculator.draft_steps, speculator.idx_mapping, batch
        )
        speculator.block_tables.gather_block_tables(batch.idx_mapping, desc.num_tokens)
        seq_lens = batch.seq_lens_cpu_upper_bound
        speculator.draft_max_seq_len = int(seq_lens.max())
        speculator.run_steps(
            self._run_last_tokens, speculator.last_token_graphs, num_reqs, desc, None, seq_lens, 1
        )

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step of the target without a full graph: what its `forward` takes and gives."""
        if not self._is_reusing:
            return self._run_target(*args, **kwargs)
        self._is_reusing = False
        return self._run_remaining(**kwargs)

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> Any:
        """Replay a full graph of the target's, or of its remaining layers."""
        if not self._is_reusing:
            return self._run_target_graph(desc)
        self._is_reusing = False
        return self._remaining_graphs.run_fullgraph(desc)

    def _run_last_tokens(
        self, num_reqs: int, num_tokens_padded: int, *args: Any, **kwargs: Any
    ) -> None:
        """Run the first layers on each request's last token, and keep its exit states."""
        with self._speculator.step_context(num_reqs, num_tokens_padded, *args) as (ids, positions):
            states = self._model.run_first_layers(ids, positions)
        self.keep(num_reqs, states)

    def _run_remaining(self, positions: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Run the remaining layers on the exit states of the step's tokens."""
        rows = self._rows[: len(positions)]
        states = {name: kept[rows] for name, kept in self._states.tensors.tensors.items()}
        return self._model.run_remaining_layers(IntermediateTensors(states), positions)
