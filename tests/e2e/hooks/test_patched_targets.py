"""Each hook refusing a target that another plugin has patched before, in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest

from layerskip_vllm.hooks.install import Hook
from layerskip_vllm.hooks.method_hooks import METHOD_HOOKS
from layerskip_vllm.hooks.vllm_fixes import FIXES
from tests.support.scripts import see

HOOKS = (*METHOD_HOOKS, *FIXES)

SCRIPT = """
import functools, importlib, json
from layerskip_vllm.hooks import install as hooks
from layerskip_vllm.plugin import LEDGER, register

HOOKS = [entry for entry in LEDGER if isinstance(entry, hooks.Hook)]

def patch(*args, **kwargs):
    pass

def try_to_register():
    try:
        register()
    except hooks.HookError as error:
        return str(error), sorted({hooks.hook_state(hook) for hook in HOOKS})
    return "", []

seen = {}
for hook in HOOKS:
    owner = importlib.import_module(hook.module)
    *path, attribute = hook.target.partition(":")[2].split(".")
    for name in path:
        owner = getattr(owner, name)
    original = vars(owner).get(attribute)
    wrapper = functools.wraps(getattr(original, "__func__", original) or patch)(patch)
    seen[hook.target] = []
    for patched in (lambda *args: None, wrapper):
        setattr(owner, attribute, patched)
        seen[hook.target] += [try_to_register() for _ in range(2)]
    if original is None:
        delattr(owner, attribute)
    else:
        setattr(owner, attribute, original)
register()
seen["unpatched"] = sorted({hooks.hook_state(hook) for hook in HOOKS})
print("seen:" + json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What registration says with each target patched in turn, twice in each of two ways."""
    return see(SCRIPT)


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target.split(".")[-1])
def test_registration_is_refused_each_time_when_a_target_was_patched_before(
    seen: dict[str, Any], hook: Hook
) -> None:
    assert len(seen[hook.target]) == 4
    for message, states in seen[hook.target]:
        assert f"{hook.target} is already patched, by __main__." in message
        assert "cannot hook into this vLLM" in message
        assert states == ["refused"]


def test_registration_hooks_everything_when_nothing_is_patched_any_more(
    seen: dict[str, Any],
) -> None:
    assert seen["unpatched"] == ["applied"]
