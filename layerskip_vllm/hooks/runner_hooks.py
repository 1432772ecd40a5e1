"""The hooks of the method in the model runners: their drafter, and what it needs of them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from layerskip_vllm.config.flags import is_layerskip_config
from layerskip_vllm.hooks import install

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

RUNNER_HOOKS: list[install.Hook] = []

_hook = functools.partial(install.hook, RUNNER_HOOKS)

_V1_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V1_DRAFT = "vllm.v1.spec_decode.draft_model:DraftModelProposer"
_LORA_MIXIN = "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"


@_hook(
    target=f"{_V1_DRAFT}.__new__",
    is_new=True,
    relies_on=(
        f"{_V1_DRAFT}.__init__",
        f"{_V1_RUNNER}.propose_draft_token_ids",
        f"{_V1_RUNNER}._input_fits_in_drafter",
    ),
    why="Model Runner V1 drafts with a `LayerSkipProposer`",
    reason="The runner picks its drafter from a fixed list, and asks `isinstance(drafter, "
    "DraftModelProposer)` later on.",
    process=install.V1_WORKER,
    upstream="[vllm#37399](https://github.com/vllm-project/vllm/pull/37399), closed: V1 is "
    "deprecated",
    remove_when="vLLM drops Model Runner V1, or with `proposer_cls` of the registry in the diff",
)
def _new_proposer(original: None) -> Any:
    """Add the method: with a `LayerSkipConfig`, `DraftModelProposer(...)` makes the subclass.

    In all other cases it makes what it would have made.
    """

    def __new__(cls: type, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.spec_decode.draft_model import DraftModelProposer

        if cls is DraftModelProposer and is_layerskip_config(vllm_config.speculative_config):
            from layerskip_vllm.drafting.proposer import LayerSkipProposer

            cls = LayerSkipProposer
        return object.__new__(cls)

    return staticmethod(__new__)


@_hook(
    target="vllm.v1.worker.gpu.model_runner:init_speculator",
    defined_in="vllm.v1.worker.gpu.spec_decode",
    relies_on=(f"{_V2_RUNNER}.initialize_kv_cache",),
    why="Model Runner V2 drafts with a `LayerSkipSpeculator`",
    reason="Its drafters are a fixed list too. `GPUModelRunner.initialize_kv_cache` keeps draft "
    "layers out of the target's checks.",
    process=install.V2_WORKER,
    upstream="[vllm#36219](https://github.com/vllm-project/vllm/issues/36219), open",
    remove_when="V2 takes drafters from a registry; `speculator_cls` of the one in the diff",
)
def _init_speculator(original: Any) -> Any:
    """Wrap the name that the runner's module imported, which is the one it calls.

    Any other configuration goes to the original unchanged.
    """

    @functools.wraps(original)
    def init_speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> Any:
        if is_layerskip_config(vllm_config.speculative_config):
            from layerskip_vllm.drafting.speculator import LayerSkipSpeculator

            return LayerSkipSpeculator(vllm_config, device, req_states)
        return original(vllm_config, device, req_states)

    return init_speculator


@_hook(
    target=f"{_V2_RUNNER}.initialize_kv_cache",
    relies_on=(
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates",
        "vllm.v1.worker.gpu.attn_utils:get_varlen_cudagraph_unsupported_backend",
        f"{_V2_RUNNER}.execute_model",
    ),
    why="on Model Runner V2, steps in which requests draft less than K stay in full CUDA graphs",
    reason="vLLM captures them for K + 1 tokens a request. Graphs for any mix of tokens it "
    "captures for adaptive verification alone.",
    process=install.V2_WORKER,
    upstream="not reported yet",
    remove_when="vLLM captures them wherever the attention backend can; without this such steps "
    "run in piecewise graphs; `BaseSpeculator.prepare_target_graphs` in the diff",
)
def _initialize_kv_cache(original: Any) -> Any:
    """Wrap it: with a `LayerSkipConfig`, choose the target's graphs anew after the original.

    They are captured later on.
    """

    @functools.wraps(original)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if is_layerskip_config(self.speculative_config):
            self.speculator.prepare_target_graphs(self)

    return initialize_kv_cache


@_hook(
    target=f"{_V2_RUNNER}.sample",
    relies_on=(
        "vllm.v1.worker.gpu.lora_utils:LoraState",
        "vllm.lora.model_manager:LoRAModelManager.set_adapter_mapping",
    ),
    why="on Model Runner V2, an adapter of the head is in all rows that are verified",
    reason="vLLM maps one row of logits a request to its LoRA adapter, but verifies K + 1 rows a "
    "request. An adapter of the head is then missing in the other rows, or another request's is in "
    "them; on a CPU the shapes do not fit and the engine ends. Every speculative method on V2 has "
    "this; the hook serves layerskip alone, whose drafter takes the requests' adapters from here.",
    process=install.V2_WORKER,
    upstream="not reported yet",
    remove_when="V2 maps as many rows as it verifies, as V1 does, and gives drafters its LoRA "
    "state; `BaseSpeculator.prepare_sampling` in the diff",
)
def _sample(original: Any) -> Any:
    """Wrap it: map each row that is about to be verified, then call the original.

    `LoRAModelManager.set_adapter_mapping` leaves out a mapping that it was given last. Other
    configurations go to the original unchanged.
    """

    @functools.wraps(original)
    def sample(self: Any, hidden_states: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if is_layerskip_config(self.speculative_config):
            self.speculator.prepare_sampling(self.lora_state, input_batch)
        return original(self, hidden_states, input_batch, *args, **kwargs)

    return sample


@_hook(
    target=f"{_LORA_MIXIN}.reset_lora_state",
    relies_on=(
        f"{_V1_RUNNER}.reload_weights",
        f"{_V2_RUNNER}.reload_weights",
        "vllm.v1.worker.gpu_worker:Worker.finish_weight_update",
    ),
    why="a draft head of few rows follows the target's weights",
    reason="Its rows are copies. This is what both runners call whenever base weights were "
    "replaced, however they came: reloaded, transferred, or written in place.",
    process="each worker",
    upstream="none; vLLM tells its adapters alone",
    remove_when="vLLM tells drafters that weights have changed; `after_weights_change` of the "
    "registry in the diff",
)
def _reset_lora_state(original: Any) -> Any:
    """Wrap it: the original, then the drafter is told."""

    @functools.wraps(original)
    def reset_lora_state(self: Any) -> None:
        original(self)
        if is_layerskip_config(self.speculative_config):
            after_weights_change(self)

    return reset_lora_state


def after_weights_change(runner: Any) -> None:
    """Tell a runner's drafter that its target's weights are others now."""
    runner.get_draft_model().expect_weights()
