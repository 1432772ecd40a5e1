"""Writes what is made from the hooks: patches/README.md, and the digests of each supported vLLM.

`python -m scripts.ledger` writes both, after a hook or what the plugin uses of vLLM has changed;
`python -m scripts.ledger VERSION` makes VERSION a supported one, or writes only its digests anew.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip_vllm.hooks.install import Entry, Use
from layerskip_vllm.hooks.method_hooks import METHOD_HOOKS, REGISTRY
from layerskip_vllm.hooks.uses import USES
from layerskip_vllm.hooks.vllm_fixes import FIXES
from layerskip_vllm.hooks.vllm_source import (
    ANY,
    SUPPORTED_VLLM_VERSIONS,
    TABLES,
    find_file,
    read_digests,
    source_digest,
)
from layerskip_vllm.plugin import LEDGER
from scripts.vllm_python import overlay_python

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "patches/README.md"
WINGS = ("checkpoint", "config", "drafting")  # whose code runs in vLLM, beside the hooks

# What vLLM means to be imported, by its users and by models out of its tree.
API = (
    "vllm.config",
    "vllm.engine.arg_utils",
    "vllm.exceptions",
    "vllm.logger",
    "vllm.model_executor.layers",
    "vllm.sampling_params",
    "vllm.triton_utils",
)


def make_digests() -> dict[str, dict[str, str] | None]:
    """Digest what each entry of the ledger relies on in the vLLM that this process imports.

    An entry that its version's file says is not needed there stays so.
    """
    version = version_here()
    known = read_digests(version) if version in SUPPORTED_VLLM_VERSIONS else {}
    return {
        entry.name: None if known.get(entry.name, {}) is None else _digests_of(entry)
        for entry in LEDGER
    }


def _digests_of(entry: Entry) -> dict[str, str]:
    names = find_uses(entry.module) if isinstance(entry, Use) else {}
    names |= dict.fromkeys(entry.names, True)
    # A name that is not there is an error for whoever writes the file, and for the test.
    return {
        name: source_digest(name) or "missing" if is_whole else ANY
        for name, is_whole in sorted(names.items())
        if name.rpartition(".")[0] not in entry.relies_on
    }


def version_here() -> str:
    """Return the release of the vLLM that this process imports."""
    version: str = importlib.import_module("vllm").__version__
    return version.partition("+")[0]


def modules() -> list[str]:
    """List the modules of this package that run in vLLM, beside the hooks."""
    files = [file for wing in WINGS for file in (ROOT / "layerskip_vllm" / wing).glob("*.py")]
    return sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)


def modules_with_uses() -> list[str]:
    """List those that use what vLLM keeps to itself: each needs an entry in `USES`."""
    return [module for module in modules() if find_uses(module)]


def find_uses(module: str) -> dict[str, bool]:
    """Find what a module of this package uses of what vLLM keeps to itself.

    That is what it imports and what it reads of an imported module or class (but for annotations),
    and of the classes that it extends what it overrides, calls, reads and sets.

    Args:
        module: The module.

    Returns:
        By name, whether the definition must be as it is, or only be there: the classes that are
        neither called nor extended.
    """
    tree = _without_type_checking(ast.parse(_source_of(module)))
    imported = _imports(tree)
    used = {_definition(name): not _is_class(name) for name in imported.values()}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(name)) if name in imported:
                used[_definition(imported[name])] = True
            case ast.Attribute(value=ast.Name(name)) if name in imported:
                used[_member(imported[name], node.attr)] = True
    for cls in vars(importlib.import_module(module)).values():
        if inspect.isclass(cls) and cls.__module__ == module:
            used |= dict.fromkeys(find_inherited(cls), True)
    used.pop("", None)
    return used


def find_inherited(cls: type) -> set[str]:
    """Find what a class overrides, calls, reads and sets of the vLLM classes that it extends."""
    own = vars(cls).keys() - {"__annotations__", "__doc__", "__module__", "__qualname__"}
    touched = {
        node.attr
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))
        if isinstance(node, ast.Attribute) and _is_self(node.value)
    }
    return {name for attribute in own | touched if (name := _first(cls.__mro__[1:], attribute))}


def _source_of(module: str) -> str:
    file = find_file(module)
    assert file is not None, module
    return file.read_text(encoding="utf-8")


def _without_type_checking(tree: ast.Module) -> ast.Module:
    body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.Module(body, tree.type_ignores)


def _imports(tree: ast.Module) -> dict[str, str]:
    """Read what a module imports of what vLLM keeps to itself, as `module:name`."""
    return {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm.")
        if not (node.module or "").startswith(API)
        for alias in node.names
    }


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _is_class(name: str) -> bool:
    return inspect.isclass(_load(name))


def _definition(name: str) -> str:
    """Find where an imported name is defined; "" for a module."""
    value = _load(name)
    if inspect.ismodule(value):
        return ""
    home = f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', None)}"
    return home if home.startswith("vllm.") and source_digest(home) is not None else name


def _member(name: str, attribute: str) -> str:
    """Name an attribute of an imported module or class; "" if it defines none of that name."""
    value = _load(name)
    if inspect.ismodule(value):
        return f"{value.__name__}:{attribute}"
    return _first(value.__mro__, attribute) if inspect.isclass(value) else ""


def _first(classes: Iterable[type], attribute: str) -> str:
    """Name an attribute by the first of vLLM's classes that defines it or sets it on `self`."""
    owners = [f"{cls.__module__}:{cls.__qualname__}" for cls in classes]
    names = [f"{owner}.{attribute}" for owner in owners if owner.startswith("vllm.")]
    return next((name for name in names if source_digest(name) is not None), "")


def _is_self(node: ast.expr) -> bool:
    """Tell whether an expression is `self` or `super()`."""
    name = node.func if isinstance(node, ast.Call) else node
    return isinstance(name, ast.Name) and name.id in ("self", "super")


_INTRODUCTION = """# What this plugin changes in vLLM, and what it uses that vLLM keeps to itself

Made by `python -m scripts.ledger` from `layerskip_vllm/hooks/`; a test compares the two. For vLLM
{versions}, in two forms:

- **Hooks** on an unmodified vLLM, in each process that vLLM loads the plugin in.
- **A diff**, `vllm-VERSION.diff`: a small registry of speculative methods for vLLM itself, in a
  form to send upstream. Where vLLM has it (`{registry}`), the plugin gives it
  what the hooks of the method call; the fixes of vLLM itself stay hooks.

```bash
vllm=$(python -c "from importlib.util import find_spec; print(find_spec('vllm').origin)")
patch -p1 -d "$(dirname "$vllm")/.." < patches/vllm-{newest}.diff
```

All that stands under *Relies on* is checked before any hook is applied. `register()` raises, so
that vLLM does not start, if

- the version of vLLM is not one that the hooks were written for
  (`VLLM_LAYERSKIP_SKIP_VERSION_CHECK=1` skips this check and no other),
- the source of a target, or of anything else relied on, is missing or has changed,
- something else has patched a target.

A hook is applied when its target's module is imported, so a process imports nothing for the
plugin's sake. `layerskip-vllm doctor` prints the state of each entry.

How another vLLM is supported, and one given up, is in
[CONTRIBUTING.md](../CONTRIBUTING.md#add-a-vllm-version).

## Why hooks

vLLM {newest} has no interface for a drafter from outside that can use the model.
`method="custom_class"` ([vllm#39487](https://github.com/vllm-project/vllm/pull/39487)) hands over
token lists on the host, neither the model nor its KV cache, turns asynchronous scheduling off, and
exists in Model Runner V1 alone. A common interface for drafters was asked for in
[vllm#36219](https://github.com/vllm-project/vllm/issues/36219); the attempt for Model Runner V1
([vllm#37399](https://github.com/vllm-project/vllm/pull/37399)) was closed in favour of V2, whose
`init_speculator` is a fixed list. SGLang has such a registry
([sglang#23991](https://github.com/sgl-project/sglang/pull/23991)), and the diff gives vLLM a like
one.

## The registry in the diff, and the one in review

EAGLE-4's plugin (eagle-harness 0.1.3) is written for a registry that is in review for vLLM, in a
file of the same name. The diff's has its names and call shapes as far as that plugin shows them,
so that either can become the other by adding fields:

- **The same**: `register_speculative_method(name, SpeculativeMethodSpec(...))` with all by keyword;
  `speculator_cls`, Model Runner V2's drafter as "module:Class", made from `(vllm_config, device)`;
  and that hooks into a step are methods of `BaseSpeculator` (`prepare_sampling`, and
  `prepare_target_graphs` before graphs are captured).
- **Another way to a configuration**: there, `configure(config)` completes a `SpeculativeConfig`,
  whose `method_config` is an opaque dict. Here, `create_config(args, ...)` makes a subclass: what
  layerskip refuses depends on the engine's arguments, such as a scheduler class, and its settings
  are checked fields that `compute_hash` knows. The subclass presents itself as a `draft_model`, so
  that it needs no `num_lookahead_tokens`, and the diff leaves `SpeculativeConfig`, whose methods
  are a closed list, as it is.
- **Another way to fewer drafts**: there, `suspend_drafting` and `verify_budget` of the drafter, for
  a step. Here, `before_schedule` and `after_schedule` in the engine core: a request's own K must be
  known before tokens and blocks are reserved for its drafts.
- **Not here**: `uses_target_hidden_states`, `uses_aux_hidden_states` and
  `linear_attn_verify_extension`. Layerskip drafts from tokens, over the target's own KV cache.
- **Only here**: `proposer_cls`, the drafter of Model Runner V1, which is what runs on CPUs; and
  `add_cli_args`, `fold_cli_args`, `check_request`, `publish_info` and `after_weights_change` for
  flags, for what a request may ask for, for metrics, and for what is copied of weights.

Where vLLM has a registry without `create_config`, the plugin stays with its hooks.
"""

_SECTIONS = (
    ("Hooks that make layerskip a method", METHOD_HOOKS),
    ("Hooks that fix vLLM", FIXES),
    ("What is used without a hook", USES),
)


def write_page() -> str:
    """Write the ledger as Markdown: an entry for each hook, then for each module that uses vLLM."""
    versions, newest = " and ".join(SUPPORTED_VLLM_VERSIONS), SUPPORTED_VLLM_VERSIONS[-1]
    # Of what the newest does not need, those of the version before it.
    digests = {
        name: relied_on
        for version in SUPPORTED_VLLM_VERSIONS
        for name, relied_on in read_digests(version).items()
        if relied_on is not None
    }
    parts = [_INTRODUCTION.format(versions=versions, registry=REGISTRY, newest=newest)]
    for title, entries in _SECTIONS:
        parts.append(f"\n## {title}\n")
        parts += [_write_entry(entry, digests.get(entry.name, {})) for entry in entries]
    return "".join(parts)


def _write_entry(entry: Entry, digests: Mapping[str, str]) -> str:
    whole = [name for name, digest in digests.items() if digest != ANY]
    there = [name for name, digest in digests.items() if digest == ANY]
    parts = (_list_names(whole), f"that there is, {_list_names(there)}" if there else "")
    fields = {
        "Why": f"{entry.why}. {entry.reason}",
        "Process": f"{entry.process}.",
        "How": entry.how,
        "Relies on": "; ".join(filter(None, parts)) + ".",
        "Upstream": f"{entry.upstream}.",
        "Remove when": f"{entry.remove_when}.",
    }
    lines = (
        textwrap.fill(
            f"- **{field}**: {' '.join(text.split())}",
            width=100,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for field, text in fields.items()
    )
    return f"\n### `{entry.name}`\n\n" + "\n".join(lines) + "\n"


def _list_names(names: Iterable[str]) -> str:
    by_module: dict[str, list[str]] = {}
    for name in names:
        module, _, qualname = name.partition(":")
        by_module.setdefault(module, []).append(f"`{qualname}`")
    return "; ".join(f"in `{module}` {', '.join(by_module[module])}" for module in by_module)


def write_digests(version: str) -> None:
    """Write a version's file, in a process that imports that version where this one does not."""
    if version == version_here():
        text = json.dumps(make_digests(), indent=2) + "\n"
        (TABLES / f"{version}.json").write_text(text, encoding="utf-8")
        return
    path = os.pathsep.join(filter(None, (str(overlay_python(version)), os.getenv("PYTHONPATH"))))
    command = [sys.executable, "-m", "scripts.ledger", version]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=True)


def main(versions: Sequence[str]) -> int:
    """Write the digests of `versions`, of all supported ones if none is given, and the page.

    Returns:
        The exit status: 1 if a version's Python is not here and cannot be fetched.
    """
    failed = []
    for version in versions or SUPPORTED_VLLM_VERSIONS:
        try:
            write_digests(version)
        except subprocess.CalledProcessError as error:
            failed.append(version)
            print(f"the digests of vLLM {version} are not written: {error}", file=sys.stderr)
    if not versions:
        PAGE.write_text(write_page(), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
