"""The few places where this plugin changes vLLM, checked before any is touched.

`plugin.register` calls `install` in the API server, the engine core and every worker. A hook is
checked against vLLM's source without importing it, armed, and applied when its module is imported,
so that a process imports only what it needs itself.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import wrapt
from packaging.version import Version

SUPPORTED_VLLM_VERSIONS = ("0.32.0",)

HookState = Literal["not installed", "armed", "applied"]

_MARK = "__layerskip_hook__"


class HookError(RuntimeError):
    """vLLM is not the one that the hooks were written for; nothing was changed."""


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

    Raises:
        HookError: If `version` is not a supported release and the check is not skipped.
    """
    if Version(version).base_version in SUPPORTED_VLLM_VERSIONS or is_check_skipped:
        return
    raise HookError(
        f"vLLM {version} is not supported by this version of layerskip-vllm. Install "
        f"vllm=={' or vllm=='.join(SUPPORTED_VLLM_VERSIONS)}, or a layerskip-vllm made for vLLM "
        f"{version}; VLLM_LAYERSKIP_SKIP_VERSION_CHECK=1 skips this check (and no other)."
    )


def install(hooks: Sequence[Hook]) -> None:
    """Check all of `hooks`, then arm them; a second call does nothing.

    Raises:
        HookError: If a target or something it relies on is missing or changed (nothing is armed
            then), or, on the import of its module, if the target was already patched by others.
    """
    new_hooks = [hook for hook in hooks if hook_state(hook) == "not installed"]
    problems = [problem for hook in new_hooks for problem in check(hook)]
    if problems:
        raise HookError(_explain(problems))
    for hook in new_hooks:
        _states[hook.target] = "armed"
        wrapt.when_imported(hook.module)(lambda module, hook=hook: _apply(hook, module))


def check(hook: Hook) -> list[str]:
    """Return what is wrong with vLLM's source for `hook`, without importing it; [] if nothing."""
    problems = []
    for name, digest in hook.relies_on.items():
        found = source_digest(name)
        if found is None:
            problems.append(f"{name} is missing (needed by the hook on {hook.target})")
        elif found != digest:
            problems.append(f"{name} has changed: source digest {found}, expected {digest}")
    if hook.is_new and source_digest(hook.target) is not None:
        problems.append(f"{hook.target} exists, but this version of the plugin expects it not to")
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


def _apply(hook: Hook, module: ModuleType) -> None:
    *path, attribute = hook.target.partition(":")[2].split(".")
    owner: Any = module
    for name in path:
        owner = getattr(owner, name)
    original = vars(owner).get(attribute)
    _check_live(hook, original)
    replacement = hook.replace(original)
    setattr(_plain(replacement), _MARK, hook.target)
    setattr(owner, attribute, replacement)
    _states[hook.target] = "applied"


def _check_live(hook: Hook, original: Any) -> None:
    """Refuse an attribute that something else has replaced since it was read from disk."""
    if hook.is_new:
        if original is None:
            return
    elif original is None:
        raise HookError(_explain([f"{hook.target} is missing"]))
    else:
        function = _plain(original)
        code = getattr(function, "__code__", None)
        is_wrapped = hasattr(function, "__wrapped__")
        if code is not None and not is_wrapped and code.co_filename == _home(hook):
            return
    raise HookError(_explain([f"{hook.target} is already patched, by {_describe(original)}"]))


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
    function = _plain(attribute)
    module = getattr(function, "__module__", None)
    return f"{module}.{getattr(function, '__qualname__', repr(function))}"


def _explain(problems: Sequence[str]) -> str:
    return (
        "layerskip-vllm cannot hook into this vLLM, and has changed nothing:\n  - "
        + "\n  - ".join(problems)
        + f"\nInstall vllm=={SUPPORTED_VLLM_VERSIONS[-1]} unmodified, or a layerskip-vllm made for "
        "this vLLM; to run without layerskip, uninstall layerskip-vllm or leave it out of "
        "VLLM_PLUGINS."
    )
