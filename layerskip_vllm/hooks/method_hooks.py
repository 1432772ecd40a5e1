"""The hooks: what they put in the place of vLLM's functions, and what they rely on.

`plugin` installs them; `patches/README.md` is their ledger.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from layerskip_vllm.hooks import method
from layerskip_vllm.hooks.install import Hook

if TYPE_CHECKING:
    import argparse

    import torch
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler


def _hook_create_speculative_config(original: Any) -> Any:
    @functools.wraps(original)
    def create_speculative_config(
        self: EngineArgs, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
    ) -> SpeculativeConfig | None:
        from layerskip_vllm.config.flags import is_layerskip

        create = method.create_config if is_layerskip(self) else original
        return create(self, target_model_config, target_parallel_config)

    return create_speculative_config


def _hook_add_cli_args(original: Any) -> Any:
    function = original.__func__

    @functools.wraps(function)
    def add_all_cli_args(parser: Any) -> Any:
        return method.add_cli_args(function(parser))

    return staticmethod(add_all_cli_args)


def _hook_from_cli_args(original: Any) -> Any:
    function = original.__func__

    @functools.wraps(function)
    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        return function(cls, method.fold_cli_args(args))

    return classmethod(from_cli_args)


def _hook_verify(original: Any) -> Any:
    @functools.wraps(original)
    def verify(
        self: SamplingParams,
        model_config: ModelConfig,
        speculative_config: SpeculativeConfig | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(self, model_config, speculative_config, *args, **kwargs)
        method.check_request(self, speculative_config)

    return verify


def _hook_schedule(original: Any) -> Any:
    @functools.wraps(original)
    def schedule(self: Scheduler, *args: Any, **kwargs: Any) -> SchedulerOutput:
        method.before_schedule(self)
        return original(self, *args, **kwargs)

    return schedule


def _hook_update_after_schedule(original: Any) -> Any:
    @functools.wraps(original)
    def _update_after_schedule(self: Scheduler, scheduler_output: SchedulerOutput) -> None:
        method.after_schedule(self, scheduler_output)
        original(self, scheduler_output)

    return _update_after_schedule


def _hook_new_proposer(original: Any) -> Any:
    def __new__(cls: type, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.spec_decode.draft_model import DraftModelProposer

        if cls is DraftModelProposer and method.is_layerskip_config(vllm_config.speculative_config):
            from layerskip_vllm.drafting.proposer import LayerSkipProposer

            cls = LayerSkipProposer
        return object.__new__(cls)

    return staticmethod(__new__)


def _hook_init_speculator(original: Any) -> Any:
    @functools.wraps(original)
    def init_speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> Any:
        if method.is_layerskip_config(vllm_config.speculative_config):
            return method.create_speculator(vllm_config, device)
        return original(vllm_config, device, req_states)

    return init_speculator


def _hook_expand(original: Any) -> Any:
    def _expand_kernel_impl(
        output: torch.Tensor,
        input_val: torch.Tensor,
        cu_num_tokens: torch.Tensor,
        replace_from: int,
        replace_to: int,
        MAX_NUM_TOKENS: int | None = None,
    ) -> None:
        num_tokens = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        values = input_val.masked_fill(input_val == replace_from, replace_to)
        output.copy_(values.repeat_interleave(num_tokens))

    return _expand_kernel_impl


def _hook_reject(original: Any) -> Any:
    @functools.wraps(original)
    def _rejection_random_sample_kernel_impl(
        output_token_ids: torch.Tensor,
        cu_num_draft_tokens: torch.Tensor,
        draft_token_ids: torch.Tensor,
        draft_probs: torch.Tensor | None,
        target_probs: torch.Tensor,
        bonus_token_ids: torch.Tensor,
        recovered_token_ids: torch.Tensor,
        uniform_probs: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(
            output_token_ids,
            cu_num_draft_tokens,
            draft_token_ids.clamp(min=0),
            draft_probs,
            target_probs,
            bonus_token_ids,
            recovered_token_ids,
            uniform_probs.masked_fill(draft_token_ids < 0, float("inf")),
            *args,
            **kwargs,
        )

    return _rejection_random_sample_kernel_impl


def _hook_top_k(original: Any) -> Any:
    @functools.wraps(original)
    def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return original(logits, k) if logits.shape[0] else logits

    return apply_top_k_only


def _hook_sample(original: Any) -> Any:
    @functools.wraps(original)
    def sample(self: Any, hidden_states: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if method.is_layerskip_config(self.speculative_config):
            self.speculator.prepare_sampling(self.lora_state, input_batch)
        return original(self, hidden_states, input_batch, *args, **kwargs)

    return sample


_ARGS = "vllm.engine.arg_utils:EngineArgs"
_PARAMS = "vllm.sampling_params:SamplingParams"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_ASYNC_SCHEDULER = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"
_V1_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V1_BASE = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_V1_DRAFT = "vllm.v1.spec_decode.draft_model:DraftModelProposer"
_V2_HOME = "vllm.v1.worker.gpu.spec_decode"
_V2_BASE = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_V2_GRAPHS = (
    "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils:SpeculatorCudaGraphManager"
)

METHOD_HOOKS = (
    Hook(
        target=f"{_ARGS}.create_speculative_config",
        replace=_hook_create_speculative_config,
        relies_on={
            f"{_ARGS}.create_speculative_config": "cf054431c1ee0bd9",
            "vllm.config.speculative:SpeculativeConfig": "fd6f269356f3f002",
        },
        why='{"method": "layerskip"} and {"model": "layerskip"} make a LayerSkipConfig',
    ),
    Hook(
        target=f"{_ARGS}.add_cli_args",
        replace=_hook_add_cli_args,
        relies_on={f"{_ARGS}.add_cli_args": "09113390a2bf55a6"},
        why="the flags --speculative-model, --num-speculative-tokens and layerskip's own",
    ),
    Hook(
        target=f"{_ARGS}.from_cli_args",
        replace=_hook_from_cli_args,
        relies_on={f"{_ARGS}.from_cli_args": "f408efc21dab6743"},
        why="--spec-exit-layer and --spec-exit-adapter reach the speculative config",
    ),
    Hook(
        target=f"{_PARAMS}.verify",
        replace=_hook_verify,
        relies_on={f"{_PARAMS}.verify": "0e073adfc689a086"},
        why="a request's layerskip arguments are checked where it enters",
    ),
    Hook(
        target=f"{_SCHEDULER}.schedule",
        replace=_hook_schedule,
        relies_on={
            f"{_SCHEDULER}.schedule": "9ba0a4e5e57745c0",
            f"{_SCHEDULER}.update_draft_token_ids": "7def7154cb6ca9e3",
            f"{_SCHEDULER}.update_draft_token_ids_in_output": "415a6b89624cdd05",
        },
        why="a request has no more drafts verified than it asks for",
    ),
    Hook(
        target=f"{_SCHEDULER}._update_after_schedule",
        replace=_hook_update_after_schedule,
        relies_on={
            f"{_SCHEDULER}._update_after_schedule": "42d45acb0beec8b5",
            f"{_ASYNC_SCHEDULER}._update_after_schedule": "5b71aff1e8c9363b",
        },
        why="a step drafts no more tokens than its requests ask for",
    ),
    Hook(
        target=f"{_V1_DRAFT}.__new__",
        replace=_hook_new_proposer,
        is_new=True,
        relies_on={
            f"{_V1_DRAFT}.__init__": "2fdd7f7a957faebb",
            f"{_V1_BASE}.__init__": "9c6719cb796432ad",
            f"{_V1_BASE}.propose": "d7b38713f30f8a8b",
            f"{_V1_BASE}.load_model": "4b6e67fc560b83c6",
            f"{_V1_BASE}.dummy_run": "ab2bf5165893e967",
            f"{_V1_BASE}.initialize_attn_backend": "ce4777d9a120b5f8",
            f"{_V1_BASE}._sample_draft_tokens": "cd7d5c7e884e717c",
            f"{_V1_BASE}._sample_from_logits": "d425052f3d151455",
            f"{_V1_RUNNER}.propose_draft_token_ids": "599829a38a150104",
            f"{_V1_RUNNER}._input_fits_in_drafter": "607cecf71f6a9410",
        },
        why="Model Runner V1 drafts with a LayerSkipProposer",
    ),
    Hook(
        target="vllm.v1.worker.gpu.model_runner:init_speculator",
        replace=_hook_init_speculator,
        relies_on={
            f"{_V2_HOME}:init_speculator": "1250963c8442ddc7",
            _V2_BASE: "9299999e1b2f93dc",
            _V2_GRAPHS: "78e8094e7a593de0",
            f"{_V2_RUNNER}.initialize_kv_cache": "a5a3180a103a8e5b",
        },
        why="Model Runner V2 drafts with a LayerSkipSpeculator",
    ),
)

# What is wrong in vLLM itself and would make drafts wrong, or end the engine.
MENDS = (
    Hook(
        target="vllm.utils.cpu_triton_utils:_expand_kernel_impl",
        replace=_hook_expand,
        relies_on={"vllm.utils.cpu_triton_utils:_expand_kernel_impl": "cb72d4d389c5be6d"},
        why="on the CPU, sampling with drafts reads each request's temperature, not stray memory",
    ),
    Hook(
        target="vllm.utils.cpu_triton_utils:_rejection_random_sample_kernel_impl",
        replace=_hook_reject,
        relies_on={
            "vllm.utils.cpu_triton_utils:_rejection_random_sample_kernel_impl": "07b8705b119dc62b",
        },
        why="on the CPU, sampling refuses the placeholder drafts of a prompt that is cached",
    ),
    Hook(
        target="vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_only",
        replace=_hook_top_k,
        relies_on={"vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_only": "2d58824a27f72f0a"},
        why="on the CPU, top_k in a step without any draft does not end the engine",
    ),
    Hook(
        target=f"{_V2_RUNNER}.sample",
        replace=_hook_sample,
        relies_on={
            f"{_V2_RUNNER}.sample": "20088238536e4758",
            "vllm.v1.worker.gpu.lora_utils:LoraState": "353a5755dc005d7b",
            "vllm.lora.model_manager:LoRAModelManager.set_adapter_mapping": "4a9c357495bdf8b6",
        },
        why="on Model Runner V2, an adapter of the head is in all rows that are verified",
    ),
)

HOOKS = METHOD_HOOKS + MENDS
