"""What the package uses of what vLLM keeps to itself, found in its code.

For `scripts/ledger.py`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerskip_vllm.hooks.vllm_source import find_file, source_digest

ROOT = Path(__file__).parents[1]
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
    tree = _without_type_checking(ast.parse(source_of(module)))
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
        if isinstance(node, ast.Attribute) and is_self(node.value)
    }
    return {name for attribute in own | touched if (name := _first(cls.__mro__[1:], attribute))}


def source_of(module: str) -> str:
    """Read the source text of a module."""
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


def is_self(node: ast.expr) -> bool:
    """Tell whether an expression is `self` or `super()`."""
    name = node.func if isinstance(node, ast.Call) else node
    return isinstance(name, ast.Name) and name.id in ("self", "super")
