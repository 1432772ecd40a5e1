"""How vLLM is changed: everything that the plugin relies on is checked before anything is touched.

`plugin.register` calls `install` in the API server, the engine core and every worker. A hook is
checked against vLLM's source without importing it, armed, and applied when its module is imported,
so that a process imports only what it needs itself.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import wrapt

from layerskip_vllm.hooks.vllm_source import (
    RIGHT_VLLM,
    SUPPORTED_VLLM_VERSIONS,
    DigestTable,
    find_file,
    find_mismatches,
    source_digest,
)

HookState = Literal["not installed", "armed", "applied", "refused"]
Replace = Callable[[Any], Any]


class HookError(RuntimeError):
    """vLLM is not the one that the hooks were written for."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the plugin does with something in vLLM that is not promised to stay: the ledger's entry.

    The ledger in `patches/README.md` and the digests are made from it by `scripts/ledger.py`.
    """

    why: str  # a line, also for `doctor`
    reason: str = ""  # what more there is to say of that, for the ledger
    process: str  # the processes that it happens in
    how: str  # what is done
    relies_on: tuple[str, ...] = ()  # in vLLM's source, by `module:qualified.name`
    upstream: str = "none"  # where vLLM's developers discuss it
    remove_when: str  # what would make it superfluous

    @property
    def name(self) -> str:
        """What the ledger and the digests know it by."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """All that its own text says it relies on."""
        return self.relies_on


# What `Entry.process` says of a worker's.
V1_WORKER = "each worker with Model Runner V1"
V2_WORKER = "each worker with Model Runner V2"


@dataclass(frozen=True, kw_only=True)
class Hook(Entry):
    """One attribute of vLLM that is replaced."""

    target: str  # what is replaced, as `module:qualified.name`
    replace: Replace  # the original (None if new) -> what stands in its place
    defined_in: str = ""  # the module that defines the target, where its own only imports it
    is_new: bool = False  # vLLM itself must not define the target

    @property
    def name(self) -> str:
        """The target."""
        return self.target

    @property
    def module(self) -> str:
        """The module that the target is replaced in."""
        return self.target.partition(":")[0]

    @property
    def definition(self) -> str:
        """The target by the module that defines it."""
        module, _, qualname = self.target.partition(":")
        return f"{self.defined_in or module}:{qualname}"

    @property
    def names(self) -> tuple[str, ...]:
        """The target as it is, unless it is new, and what else is relied on."""
        return self.relies_on if self.is_new else (self.definition, *self.relies_on)


@dataclass(frozen=True, kw_only=True)
class Use(Entry):
    """A module of this package that extends, calls or sets what vLLM keeps to itself.

    What it imports from vLLM, and what its classes override and call of vLLM's, is under a digest
    too: `scripts/ledger.py` reads it from the code.
    """

    module: str

    @property
    def name(self) -> str:
        """The module."""
        return self.module


def hook(table: list[Hook], **fields: Any) -> Callable[[Replace], Replace]:
    """Put a hook in `table`; the decorated function makes its replacement and says its `how`."""

    def add(replace: Replace) -> Replace:
        table.append(Hook(replace=replace, how=inspect.getdoc(replace) or "", **fields))
        return replace

    return add


_states: dict[str, HookState] = {}


def hook_state(hook: Hook) -> HookState:
    """Return how far `hook` has got in this process."""
    return _states.get(hook.target, "not installed")


def check_version(version: str, is_check_skipped: bool = False) -> None:
    """Raise a HookError if a vLLM is no supported release, unless the check is skipped."""
    if is_check_skipped or version.partition("+")[0] in SUPPORTED_VLLM_VERSIONS:
        return
    raise HookError(
        f"vLLM {version} is not supported by this version of layerskip-vllm. Install "
        f"{RIGHT_VLLM}, or a layerskip-vllm made for vLLM "
        f"{version}; VLLM_LAYERSKIP_SKIP_VERSION_CHECK=1 skips this check (and no other)."
    )


def find_needed(entries: Sequence[Entry], digests: DigestTable) -> list[Entry]:
    """Leave out the entries whose digests are null: that version does not need them."""
    return [entry for entry in entries if digests.get(entry.name, {}) is not None]


def install(entries: Sequence[Entry], digests: DigestTable) -> None:
    """Check all of `entries`, then arm the hooks among them; a second call does nothing.

    A hook whose module is imported already is applied at once, the others on import. A HookError
    says what is missing, changed or already patched; nothing is hooked then. A target that is found
    patched only when its module is imported makes that import, and every later one, fail in the
    same way.
    """
    needed = find_needed(entries, digests)
    hooks = [entry for entry in needed if isinstance(entry, Hook)]
    pending = [hook for hook in hooks if hook_state(hook) in ("not installed", "refused")]
    if hooks and not pending:
        return
    found = (problem for entry in needed for problem in check(entry, digests))
    problems = list(dict.fromkeys(found))  # several rely on the same
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


def check(entry: Entry, digests: DigestTable, root: Path | None = None) -> list[str]:
    """Check vLLM for an entry, without importing anything.

    The source on disk is checked, and a hook's target itself where its module is imported already.

    Args:
        entry: An entry of the ledger.
        digests: What is relied on, by entry.
        root: The folder with another vLLM's source, for which no target is imported here.

    Returns:
        What is wrong, a sentence each.
    """
    expected = digests.get(entry.name)
    if expected is None:
        return [f"there are no digests of what {entry.name} relies on"]
    problems = []
    for name, found in find_mismatches(expected, root).items():
        if found is None:
            needed_by = f"the hook on {entry.name}" if isinstance(entry, Hook) else entry.name
            problems.append(f"{name} is missing (needed by {needed_by})")
        else:
            problems.append(f"{name} has changed: source digest {found}, expected {expected[name]}")
    if not isinstance(entry, Hook):
        return problems
    if entry.is_new and source_digest(entry.target, root) is not None:
        problems.append(f"{entry.target} exists, but this version of the plugin expects it not to")
    module = sys.modules.get(entry.module) if root is None else None
    if module is None or problems or hook_state(entry) == "applied":
        return problems
    return _check_live(entry, module)


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
    """Return what holds the target, the module or a class in it, and the target's name there."""
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
        home = str(find_file(hook.definition.partition(":")[0]))
        is_untouched = code is not None and not is_wrapped and code.co_filename == home
    return [] if is_untouched else [f"{hook.target} is already patched, by {_describe(original)}"]


def _plain(attribute: Any) -> Any:
    """Return the function inside a staticmethod or classmethod."""
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
        + f"\nInstall {RIGHT_VLLM} unmodified, or a layerskip-vllm made for "
        "this vLLM; to run without layerskip, uninstall layerskip-vllm or leave it out of "
        "VLLM_PLUGINS."
    )
