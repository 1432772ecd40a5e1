"""What a process imports for the plugin's sake, and how far the hooks are then."""

from __future__ import annotations

from typing import Any

import pytest

from layerskip_vllm.plugin import LEDGER
from tests.e2e.serving.server import environment
from tests.support.scripts import see

ARGS_HOOKS = {entry.name for entry in LEDGER if ":EngineArgs." in entry.name}
V1_HOOK = "vllm.v1.spec_decode.draft_model:DraftModelProposer.__new__"

# What registering needs: the hooks, and the flags, which both forms of the plugin hand to vLLM.
HOOKS = {
    "layerskip_vllm",
    "layerskip_vllm.config",
    "layerskip_vllm.config.flags",
    "layerskip_vllm.hooks",
    "layerskip_vllm.hooks.frontend_hooks",
    "layerskip_vllm.hooks.install",
    "layerskip_vllm.hooks.logits_fixes",
    "layerskip_vllm.hooks.logprob_fixes",
    "layerskip_vllm.hooks.lora_fixes",
    "layerskip_vllm.hooks.method_hooks",
    "layerskip_vllm.hooks.runner_hooks",
    "layerskip_vllm.hooks.scheduler_hooks",
    "layerskip_vllm.hooks.uses",
    "layerskip_vllm.hooks.vllm_fixes",
    "layerskip_vllm.hooks.vllm_source",
    "layerskip_vllm.plugin",
}
# vLLM's command imports its loaders, and the plugin adds one to them.
LOADER = {
    "layerskip_vllm.checkpoint",
    "layerskip_vllm.checkpoint.first_layers",
    "layerskip_vllm.checkpoint.weight_shares",
}

PACKAGE = """
import json, sys
before = set(sys.modules)
import layerskip_vllm, layerskip_vllm.plugin, layerskip_vllm.tools.commands
print("seen:" + json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""

REGISTER = """
import json, sys
from layerskip_vllm.plugin import LEDGER, register
from layerskip_vllm.hooks.install import Hook, hook_state

def states():
    return {entry.name: hook_state(entry) for entry in LEDGER if isinstance(entry, Hook)}

def ours():
    return [name for name in sys.modules if name.split(".")[0] == "layerskip_vllm"]

register()
seen = {"registering": ours()}
import torch
heavy = ("vllm.v1.worker.", "vllm.v1.spec_decode.", "vllm.model_executor.models.")
seen["workers"] = [
    name for name, module in sys.modules.items()
    if name.startswith(heavy) and not hasattr(module, "__path__")
]
seen["cuda"] = torch.cuda.is_initialized()
seen["registered"] = states()
register()
seen["again"] = states()

from vllm.engine.arg_utils import EngineArgs
seen["arguments"] = states()
register()
def num_wrappers(function):
    function = getattr(function, "__func__", function)
    return 1 + num_wrappers(function.__wrapped__) if hasattr(function, "__wrapped__") else 0
seen["wrappers"] = [
    num_wrappers(vars(EngineArgs)[name])
    for name in ("create_speculative_config", "add_cli_args", "from_cli_args")
]

import contextlib, io
sys.argv = ["vllm", "serve", "--help=LayerSkip"]
from vllm.entrypoints.cli.main import main
with contextlib.redirect_stdout(io.StringIO()) as help, contextlib.suppress(SystemExit):
    main()
seen["help"] = help.getvalue()
seen["helping"] = ours()
print("seen:" + json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What is imported, and how far the hooks are, in a process that registers the plugin."""
    return see(REGISTER, env=environment())


def test_package_imports_neither_vllm_nor_torch_when_imported() -> None:
    packages = see(PACKAGE, env=environment())
    assert "layerskip_vllm" in packages
    assert {"vllm", "torch", "transformers", "triton", "numpy"}.isdisjoint(packages)


def test_registration_imports_the_hooks_and_the_flags_alone_when_called(
    seen: dict[str, Any],
) -> None:
    assert set(seen["registering"]) == HOOKS


def test_serve_imports_no_command_and_nothing_of_training_when_asked_for_help(
    seen: dict[str, Any],
) -> None:
    assert "--spec-exit-layer" in seen["help"]
    assert set(seen["helping"]) == HOOKS | LOADER


def test_registration_imports_no_worker_and_touches_no_gpu_when_called(
    seen: dict[str, Any],
) -> None:
    assert seen["workers"] == []
    assert seen["cuda"] is False
    assert set(seen["registered"].values()) == {"armed"}


def test_registration_changes_nothing_when_repeated(seen: dict[str, Any]) -> None:
    assert seen["again"] == seen["registered"]
    assert seen["wrappers"] == [1, 1, 1]


def test_hooks_on_the_arguments_alone_are_applied_when_only_they_are_imported(
    seen: dict[str, Any],
) -> None:
    states = seen["arguments"]
    assert {target for target, state in states.items() if state == "applied"} >= ARGS_HOOKS
    assert states[V1_HOOK] == "armed"
