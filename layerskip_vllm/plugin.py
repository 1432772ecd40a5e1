"""The entry point `vllm.general_plugins`.

vLLM calls `register` in the API server, the engine core and every worker (Ray actors too).
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import wrapt

from layerskip_vllm.hooks import method_hooks
from layerskip_vllm.hooks.install import Entry, check_version, install
from layerskip_vllm.hooks.uses import USES
from layerskip_vllm.hooks.vllm_fixes import FIXES
from layerskip_vllm.hooks.vllm_source import read_digests, source_digest

SKIP_VERSION_CHECK = "VLLM_LAYERSKIP_SKIP_VERSION_CHECK"
LOADERS = "vllm.model_executor.model_loader"

LEDGER: tuple[Entry, ...] = (*method_hooks.METHOD_HOOKS, *FIXES, *USES)


def register() -> None:
    """Make `layerskip` a speculative method of vLLM in this process; repeating it does nothing.

    Raises:
        HookError: If this vLLM is not one that the hooks were written for.
    """
    import vllm

    check_version(vllm.__version__, is_check_skipped=os.environ.get(SKIP_VERSION_CHECK) == "1")
    install(entries_here(), read_digests(vllm.__version__))
    if has_registry():
        method_hooks.register_method()
    wrapt.when_imported(LOADERS)(_register_load_format)


def has_registry() -> bool:
    """Tell whether this vLLM has the registry of speculative methods of `patches/vllm-*.diff`."""
    return source_digest(method_hooks.NEEDED_OF_REGISTRY) is not None


def entries_here() -> tuple[Entry, ...]:
    """Return the entries of the ledger that apply here: no method hooks beside a registry."""
    return (*FIXES, *USES) if has_registry() else LEDGER


@functools.cache
def _register_load_format(loaders: ModuleType) -> None:
    """Add `first_layers` to vLLM's load formats, which are open to plugins."""
    from layerskip_vllm.checkpoint.first_layers import LOAD_FORMAT, FirstLayersLoader

    loaders.register_model_loader(LOAD_FORMAT)(FirstLayersLoader)
