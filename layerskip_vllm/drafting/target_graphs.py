"""The target's CUDA graphs on Model Runner V2, where requests draft less than K; called by a hook.

In the worker, between the choice of the graphs' sizes and their capture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.attn_utils import get_varlen_cudagraph_unsupported_backend

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner


def take_any_mix(runner: GPUModelRunner) -> None:
    """Have the target's full graphs of decode steps take any mix of 1 to K + 1 tokens a request.

    vLLM captures them for K + 1 tokens in each request, so that a step in which one drafts less, or
    none drafts, would leave them. It captures the others for its adaptive verification, a graph a
    number of tokens whatever K is; these are they. Where the attention backend allows no such graph
    (FlashInfer on Hopper), with data parallelism, whose ranks take the size of their drafts from
    the target's, and with microbatches, which need uniform steps, vLLM's stay.

    Args:
        runner: The runner, whose graphs are not captured yet.
    """
    manager = runner.cudagraph_manager
    assert manager is not None
    if (
        manager.cudagraph_mode.decode_mode() != CUDAGraphMode.FULL
        or manager.varlen_decode
        or manager.dp_size > 1
        or runner.ubatch_runner is not None
        or runner.model_state.get_additional_cg_support()[0] != AttentionCGSupport.ALWAYS
        or get_varlen_cudagraph_unsupported_backend(
            runner.attn_groups, runner.vllm_config, runner.decode_query_len
        )
    ):
        return
    manager.varlen_decode = True
    manager._candidates.clear()
    manager._capture_descs.clear()
    manager._init_candidates()
