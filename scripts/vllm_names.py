"""Names of vLLM found in its source text alone: where one is defined, and what a class extends.

For `scripts/compare_vllm.py`; a `root` is the folder that holds the package.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from layerskip_vllm.hooks.vllm_source import definitions, find_file

EVERYTHING = "*"


def find_home(
    module: str, name: str, root: Path | None, seen: frozenset[str] = frozenset()
) -> str | None:
    """Find what defines a name that a module has, as `module:name`; None if nothing does.

    No name is the module itself, which a submodule's home is too. What comes from another package
    is taken on trust.
    """
    here = f"{module}:{name}"
    if here in seen:
        return None
    if name in definitions(module, root) or (not name and find_file(module, root)):
        return here
    if name and find_file(f"{module}.{name}", root):
        return f"{module}.{name}:"
    imported = _imported_names(module, root)
    for source, original in imported.get(name, []):
        if not is_vllm(source):
            return f"{source}:{original}"
        if home := find_home(source, original, root, seen | {here}):
            return home
    homes = (find_home(m, name, root, seen | {here}) for m, _ in imported.get(EVERYTHING, []))
    return next(filter(None, homes), None)


def find_elsewhere(name: str, root: Path) -> list[str]:
    """Find where a definition that is gone may be now: in a base class, else in any module."""
    module, _, qualname = name.partition(":")
    cls, _, attribute = qualname.rpartition(".")
    inherited = [f"{base}.{attribute}" for base in find_bases(f"{module}:{cls}", root)]
    outer = re.escape(qualname.partition(".")[0])
    is_here = re.compile(rf"^(?:class|def|async def) {outer}\b|^{outer}\b *[:=]", re.MULTILINE)
    files = [f for f in root.glob("vllm/**/*.py") if is_here.search(f.read_text(encoding="utf-8"))]
    parts = (".".join(file.relative_to(root).with_suffix("").parts) for file in sorted(files))
    anywhere = [f"{part.removesuffix('.__init__')}:{qualname}" for part in parts]
    return [home for home in inherited + anywhere if read_definition(home, root) is not None]


def read_definition(name: str, root: Path | None) -> str | None:
    """Read the source lines of a definition; None if there is none."""
    module, _, qualname = name.partition(":")
    return definitions(module, root).get(qualname)


def find_bases(home: str, root: Path | None, home_root: Path | None = None) -> Iterator[str]:
    """Find the classes of vLLM that a class extends, and that those extend.

    Args:
        home: The class.
        root: The root of vLLM.
        home_root: That of the class, where it is no class of vLLM's.
    """
    module, _, name = home.partition(":")
    for node in ast.walk(_tree(module, home_root or root)):
        if not isinstance(node, ast.ClassDef) or node.name != name:
            continue
        for base in (base.id for base in node.bases if isinstance(base, ast.Name)):
            sources = _imported_names(module, home_root).get(base, []) if home_root else []
            for source, original in sources or [(module, base)]:
                found = find_home(source, original, root)
                if found and is_vllm(found):
                    yield found
                    yield from find_bases(found, root)


def find_members(home: str, root: Path | None) -> set[str]:
    """Find the names that a class itself defines, or its methods set on `self`."""
    module, _, cls = home.partition(":")
    names = (name.partition(f"{cls}.") for name in definitions(module, root))
    return {name for before, found, name in names if found and not before and "." not in name}


def find_imports(file: Path) -> set[tuple[str, str]]:
    """Find what a file imports of vLLM, as modules and names; a module as such has the name ""."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names):
                found |= {(alias.name, "") for alias in names if is_vllm(alias.name)}
            case ast.ImportFrom(str(module), names, 0) if is_vllm(module):
                found |= {(module, alias.name) for alias in names}
    return found


def is_vllm(name: str) -> bool:
    """Tell whether a module, or what it has, is vLLM's."""
    return re.match(r"vllm[.:]|vllm$", name) is not None


@cache
def _tree(module: str, root: Path | None) -> ast.Module:
    file = find_file(module, root)
    return ast.parse(file.read_text(encoding="utf-8") if file else "")


@cache
def _imported_names(module: str, root: Path | None) -> dict[str, list[tuple[str, str]]]:
    """Read what a module imports from where: the module and the name there, by its own name."""
    names: dict[str, list[tuple[str, str]]] = defaultdict(list)
    file = find_file(module, root)
    package = module if file and file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(_tree(module, root)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]].append((alias.name, ""))
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join(filter(None, [*(base if node.level else []), node.module]))
            for alias in node.names:
                names[alias.asname or alias.name].append((source, alias.name))
    return names
