"""The few places where this plugin changes vLLM, checked before any is touched.

`plugin.register` calls `install` in the API server, the engine core and every worker. A hook is
checked against vLLM's source without importing it, armed, and applied when its module is imported,
so that a process imports only what it needs itself.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import wrapt

SUPPORTED_VLLM_VERSIONS = ("0.32.0",)

HookState = Literal["not installed", "armed", "applied", "refused"]


class HookError(RuntimeError):
    """vLLM is not the one that the hooks were written for."""


@dataclass(frozen=True)
class Hook:
    """One attribute of vLLM that is replaced.

    Attributes:
        target: What is replaced, as `module:qualified.name`.
        replace: Takes the original and returns what stands in its place; the original is None
            where the attribute is new.
        relies_on: Digests (`source_digest`) of the vLLM functions whose behaviour the replacement
            depends on, by `module:qualified.name`. The target's own definition is among them
            unless it is new.
        why: One line for the ledger in `patches/README.md` and for `layerskip-vllm doctor`.
        is_new: Whether vLLM itself must not define the target.
    """

    target: str
    replace: Callable[[Any], Any]
    relies_on: Mapping[str, str]
    why: str
    is_new: bool = False

    @property
    def module(self) -> str:
        """The module that the target lives in."""
        return self.target.partition(":")[0]


_states: dict[str, HookState] = {}


def hook_state(hook: Hook) -> HookState:
    """Return how far `hook` has got in this process."""
    return _states.get(hook.target, "not installed")


def check_version(version: str, is_check_skipped: bool = False) -> None:
    """Refuse a vLLM that the hooks were not written for.

    Args:
        version: vLLM's version, such as `0.32.0+cpu`.
        is_check_skipped: Whether the user has switched this check off.

    Raises:
        HookError: If `version` is not a supported release and the check is not skipped.
    """
    if is_check_skipped or version.partition("+")[0] in SUPPORTED_VLLM_VERSIONS:
        return
    raise HookError(
        f"vLLM {version} is not supported by this version of layerskip-vllm. Install "
        f"vllm=={' or vllm=='.join(SUPPORTED_VLLM_VERSIONS)}, or a layerskip-vllm made for vLLM "
        f"{version}; VLLM_LAYERSKIP_SKIP_VERSION_CHECK=1 skips this check (and no other)."
    )


def install(hooks: Sequence[Hook]) -> None:
    """Check all of `hooks`, then arm them; a second call does nothing.

    A hook whose module is imported already is applied at once, the others on import.

    Args:
        hooks: All that the plugin needs.

    Raises:
        HookError: If a target or something it relies on is missing, changed or already patched;
            nothing is hooked then. A target that is found patched only when its module is imported
            makes that import, and every later one, fail in the same way.
    """
    pending = [hook for hook in hooks if hook_state(hook) in ("not installed", "refused")]
    problems = [problem for hook in pending for problem in check(hook)]
    if problems:
        for hook in pending:
            _states[hook.target] = "refused"
        raise HookError(_explain(problems))
    for module in dict.fromkeys(hook.module for hook in pending):
        _arm(module, [hook for hook in pending if hook.module == module])


def _arm(module: str, hooks: Sequence[Hook]) -> None:
    for hook in hooks:
        _states[hook.target] = "armed"
    wrapt.when_imported(module)(lambda imported: _apply(hooks, imported))


def check(hook: Hook) -> list[str]:
    """Return what is wrong with vLLM for `hook`, without importing anything; [] if nothing.

    The source on disk is checked, and the target itself where its module is imported already.
    """
    problems = []
    for name, digest in hook.relies_on.items():
        found = source_digest(name)
        if found is None:
            problems.append(f"{name} is missing (needed by the hook on {hook.target})")
        elif found != digest:
            problems.append(f"{name} has changed: source digest {found}, expected {digest}")
    if hook.is_new and source_digest(hook.target) is not None:
        problems.append(f"{hook.target} exists, but this version of the plugin expects it not to")
    module = sys.modules.get(hook.module)
    if module is not None and not problems and hook_state(hook) != "applied":
        problems += _check_live(hook, module)
    return problems


def source_digest(name: str) -> str | None:
    """Digest the source of a function or class as it stands on disk.

    Args:
        name: `module:qualified.name`.

    Returns:
        The first 16 hex digits of the SHA-256 of its source lines, None if it does not exist.
    """
    module, _, qualname = name.partition(":")
    nodes = _definitions(module)
    return None if nodes is None else nodes.get(qualname)


@cache
def _definitions(module: str) -> dict[str, str] | None:
    """Digests of all functions and classes of `module` by qualified name; None without source."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines = source.splitlines()
    digests = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = "\n".join(lines[child.lineno - 1 : child.end_lineno])
                digests[prefix + child.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(source), "")
    return digests


def _apply(hooks: Sequence[Hook], module: ModuleType) -> None:
    """Apply the hooks on a module that has just been imported: all of them or none."""
    hooks = [hook for hook in hooks if hook_state(hook) != "applied"]
    problems = [problem for hook in hooks for problem in _check_live(hook, module)]
    if problems:
        # The import fails; without the module in place, arming waits for the next one.
        sys.modules.pop(module.__name__, None)
        _arm(module.__name__, hooks)
        for hook in hooks:
            _states[hook.target] = "refused"
        raise HookError(_explain(problems))
    for hook in hooks:
        owner, attribute = _owner_of(hook, module)
        setattr(owner, attribute, hook.replace(vars(owner).get(attribute)))
        _states[hook.target] = "applied"


def _owner_of(hook: Hook, module: ModuleType) -> tuple[Any, str]:
    """What holds the target, the module or a class in it, and the target's name there."""
    *path, attribute = hook.target.partition(":")[2].split(".")
    owner: Any = module
    for name in path:
        owner = getattr(owner, name)
    return owner, attribute


def _check_live(hook: Hook, module: ModuleType) -> list[str]:
    """Say whether something has replaced the target since its source was written."""
    owner, attribute = _owner_of(hook, module)
    original = vars(owner).get(attribute)
    if hook.is_new:
        is_untouched = original is None
    elif original is None:
        return [f"{hook.target} is missing"]
    else:
        function = _plain(original)
        code = getattr(function, "__code__", None)
        is_wrapped = hasattr(function, "__wrapped__")
        is_untouched = code is not None and not is_wrapped and code.co_filename == _home(hook)
    return [] if is_untouched else [f"{hook.target} is already patched, by {_describe(original)}"]


def _home(hook: Hook) -> str | None:
    """The file that defines the target; a target may be another module's name for it."""
    qualname = hook.target.partition(":")[2]
    definition = next(name for name in hook.relies_on if name.endswith(f":{qualname}"))
    spec = importlib.util.find_spec(definition.partition(":")[0])
    return spec.origin if spec else None


def _plain(attribute: Any) -> Any:
    """The function inside a staticmethod or classmethod."""
    return getattr(attribute, "__func__", attribute)


def _describe(attribute: Any) -> str:
    """Say where an attribute was defined, whatever `functools.wraps` made it call itself."""
    function = _plain(attribute)
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(function)
    return f"{function.__globals__.get('__name__')}.{code.co_name}"


def _explain(problems: Sequence[str]) -> str:
    return (
        "layerskip-vllm cannot hook into this vLLM:\n  - "
        + "\n  - ".join(problems)
        + f"\nInstall vllm=={SUPPORTED_VLLM_VERSIONS[-1]} unmodified, or a layerskip-vllm made for "
        "this vLLM; to run without layerskip, uninstall layerskip-vllm or leave it out of "
        "VLLM_PLUGINS."
    )
