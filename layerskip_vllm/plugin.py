"""The entry point `vllm.general_plugins`: what this plugin changes in vLLM, and why.

vLLM calls `register` in the API server, the engine core and every worker (Ray actors too).
The replacements import their code when they are first used, never when they are installed.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

from layerskip_vllm.hooks import Hook, check_version, install

if TYPE_CHECKING:
    import argparse

    import torch
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig

SKIP_VERSION_CHECK = "VLLM_LAYERSKIP_SKIP_VERSION_CHECK"


def register() -> None:
    """Install the hooks in this process; calling it again does nothing.

    Raises:
        HookError: If this vLLM is not one that the hooks were written for.
    """
    import vllm

    check_version(vllm.__version__, is_check_skipped=os.environ.get(SKIP_VERSION_CHECK) == "1")
    install(HOOKS)


def _create_speculative_config(original: Any) -> Any:
    @functools.wraps(original)
    def create_speculative_config(
        self: Any, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
    ) -> SpeculativeConfig | None:
        from layerskip_vllm.config import create_layerskip_config, is_layerskip

        if not is_layerskip(self):
            return original(self, target_model_config, target_parallel_config)
        return create_layerskip_config(self, target_model_config, target_parallel_config)

    return create_speculative_config


def _add_cli_args(original: Any) -> Any:
    function = original.__func__

    @functools.wraps(function)
    def add_cli_args(parser: Any) -> Any:
        from layerskip_vllm.cli.flags import add_speculative_flags

        return add_speculative_flags(function(parser))

    return staticmethod(add_cli_args)


def _from_cli_args(original: Any) -> Any:
    function = original.__func__

    @functools.wraps(function)
    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        from layerskip_vllm.cli.flags import fold_exit_layer

        return function(cls, fold_exit_layer(args))

    return classmethod(from_cli_args)


def _new_proposer(original: Any) -> Any:
    def __new__(
        cls: type, vllm_config: VllmConfig, device: torch.device, runner: Any = None
    ) -> Any:
        from vllm.v1.spec_decode.draft_model import DraftModelProposer

        from layerskip_vllm.config import LayerSkipConfig

        if cls is DraftModelProposer and isinstance(
            vllm_config.speculative_config, LayerSkipConfig
        ):
            from layerskip_vllm.drafting.proposer import LayerSkipProposer

            cls = LayerSkipProposer
        return object.__new__(cls)

    return staticmethod(__new__)


def _init_speculator(original: Any) -> Any:
    @functools.wraps(original)
    def init_speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> Any:
        from layerskip_vllm.config import LayerSkipConfig

        if isinstance(vllm_config.speculative_config, LayerSkipConfig):
            from layerskip_vllm.drafting.speculator import LayerSkipSpeculator

            return LayerSkipSpeculator(vllm_config, device)
        return original(vllm_config, device, req_states)

    return init_speculator


_ARGS = "vllm.engine.arg_utils:EngineArgs"
_V1_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V1_BASE = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_V1_DRAFT = "vllm.v1.spec_decode.draft_model:DraftModelProposer"
_V2_HOME = "vllm.v1.worker.gpu.spec_decode"
_V2_BASE = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
_V2_GRAPHS = (
    "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils:SpeculatorCudaGraphManager"
)

HOOKS = (
    Hook(
        target=f"{_ARGS}.create_speculative_config",
        replace=_create_speculative_config,
        relies_on={
            f"{_ARGS}.create_speculative_config": "cf054431c1ee0bd9",
            "vllm.config.speculative:SpeculativeConfig": "fd6f269356f3f002",
        },
        why='{"method": "layerskip"} and {"model": "layerskip"} make a LayerSkipConfig',
    ),
    Hook(
        target=f"{_ARGS}.add_cli_args",
        replace=_add_cli_args,
        relies_on={f"{_ARGS}.add_cli_args": "09113390a2bf55a6"},
        why="--speculative-model, --num-speculative-tokens, --spec-exit-layer, --spec-method layerskip",
    ),
    Hook(
        target=f"{_ARGS}.from_cli_args",
        replace=_from_cli_args,
        relies_on={f"{_ARGS}.from_cli_args": "f408efc21dab6743"},
        why="--spec-exit-layer reaches the speculative config",
    ),
    Hook(
        target=f"{_V1_DRAFT}.__new__",
        replace=_new_proposer,
        is_new=True,
        relies_on={
            f"{_V1_DRAFT}.__init__": "2fdd7f7a957faebb",
            f"{_V1_BASE}.__init__": "9c6719cb796432ad",
            f"{_V1_BASE}.propose": "d7b38713f30f8a8b",
            f"{_V1_BASE}.load_model": "4b6e67fc560b83c6",
            f"{_V1_BASE}.dummy_run": "ab2bf5165893e967",
            f"{_V1_BASE}.initialize_attn_backend": "ce4777d9a120b5f8",
            f"{_V1_BASE}._sample_draft_tokens": "cd7d5c7e884e717c",
            f"{_V1_RUNNER}.propose_draft_token_ids": "599829a38a150104",
            f"{_V1_RUNNER}._input_fits_in_drafter": "607cecf71f6a9410",
        },
        why="Model Runner V1 drafts with a LayerSkipProposer",
    ),
    Hook(
        target="vllm.v1.worker.gpu.model_runner:init_speculator",
        replace=_init_speculator,
        relies_on={
            f"{_V2_HOME}:init_speculator": "1250963c8442ddc7",
            _V2_BASE: "9299999e1b2f93dc",
            _V2_GRAPHS: "78e8094e7a593de0",
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner.initialize_kv_cache": "a5a3180a103a8e5b",
        },
        why="Model Runner V2 drafts with a LayerSkipSpeculator",
    ),
)
