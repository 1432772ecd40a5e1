"""The entry point `vllm.general_plugins`.

vLLM calls `register` in the API server, the engine core and every worker (Ray actors too).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import wrapt

from layerskip_vllm.hooks import method
from layerskip_vllm.hooks.install import check_version, install
from layerskip_vllm.hooks.method_hooks import HOOKS, MENDS

SKIP_VERSION_CHECK = "VLLM_LAYERSKIP_SKIP_VERSION_CHECK"
REGISTRY = "vllm.v1.spec_decode.registry"
LOADERS = "vllm.model_executor.model_loader"


def register() -> None:
    """Make `layerskip` a speculative method of vLLM in this process; repeating it does nothing.

    A vLLM with `patches/vllm-*.diff` has a registry of speculative methods, and only `MENDS` are
    hooked there.

    Raises:
        HookError: If this vLLM is not one that the hooks were written for.
    """
    import vllm

    check_version(vllm.__version__, is_check_skipped=os.environ.get(SKIP_VERSION_CHECK) == "1")
    if importlib.util.find_spec(REGISTRY) is None:
        install(HOOKS)
    else:
        install(MENDS)
        _register_method()
    wrapt.when_imported(LOADERS)(_register_load_format)


def _register_load_format(loaders: ModuleType) -> None:
    """Add `first_layers` to vLLM's load formats, which are open to plugins."""
    from layerskip_vllm.checkpoint.first_layers import LOAD_FORMAT, FirstLayersLoader

    if LOAD_FORMAT not in loaders._LOAD_FORMAT_TO_MODEL_LOADER:
        loaders.register_model_loader(LOAD_FORMAT)(FirstLayersLoader)


def _register_method() -> None:
    registry = importlib.import_module(REGISTRY)
    registry.register_speculative_method(
        registry.RegisteredSpeculativeMethod(
            name="layerskip",
            create_config=method.create_config,
            is_config=method.is_layerskip_config,
            create_proposer=method.create_proposer,
            create_speculator=method.create_speculator,
            add_cli_args=method.add_cli_args,
            fold_cli_args=method.fold_cli_args,
            check_request=method.check_request,
            before_schedule=method.before_schedule,
            after_schedule=method.after_schedule,
        )
    )
