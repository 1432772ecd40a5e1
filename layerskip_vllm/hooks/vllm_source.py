"""vLLM's source as it stands on disk, and what each supported version's is expected to be.

Called wherever hooks are checked, before anything of vLLM is imported for their sake. Names are
`module:qualified.name`: of a function, a class, a variable of a module or class, or an attribute
that a class's methods set on `self`. A `root` is a folder to look for packages in, not sys.path.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

# One file a version, `python -m scripts.ledger` writes it: for each entry of the ledger the digests
# of what it relies on, by name. A name with the digest ANY must exist and may change; an entry that
# is null is not needed in that version.
TABLES = Path(__file__).with_name("digests")
ANY = "any"

DigestTable = Mapping[str, Mapping[str, str] | None]
SUPPORTED_VLLM_VERSIONS = tuple(
    sorted((file.stem for file in TABLES.glob("*.json")), key=lambda v: [*map(int, v.split("."))])
)

RIGHT_VLLM = " or ".join(f"vllm=={version}" for version in SUPPORTED_VLLM_VERSIONS)  # for messages


def read_digests(version: str) -> DigestTable:
    """Read what a version's source must be: digests by name, by entry; None for one not needed.

    The newest version stands for one that is not supported, whose user has switched the check of
    the version off. It may have a local part, such as `0.32.0+cpu`.
    """
    release = version.partition("+")[0]
    if release not in SUPPORTED_VLLM_VERSIONS:
        release = SUPPORTED_VLLM_VERSIONS[-1]
    table: DigestTable = json.loads((TABLES / f"{release}.json").read_text(encoding="utf-8"))
    return table


def find_mismatches(expected: Mapping[str, str], root: Path | None = None) -> dict[str, str | None]:
    """Return the names whose source is not as expected, each with its digest; None if missing."""
    found = {name: source_digest(name, root) for name in expected}
    return {
        name: digest
        for name, digest in found.items()
        if digest is None or expected[name] not in (digest, ANY)
    }


def source_digest(name: str, root: Path | None = None) -> str | None:
    """Digest the source lines of a definition as they stand on disk; None if it does not exist."""
    module, _, qualname = name.partition(":")
    text = definitions(module, root).get(qualname)
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]


def find_file(module: str, root: Path | None = None) -> Path | None:
    """Find a module's source without importing it or the packages that it lies in."""
    top, *path = module.split(".")
    if root is None:
        spec = importlib.util.find_spec(top)
        if spec is None or spec.origin is None:
            return None
        if not path:
            return Path(spec.origin)
        base = Path(spec.origin).parent.joinpath(*path)
    else:
        base = root.joinpath(top, *path)
    files = (base.with_name(f"{base.name}.py"), base / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@cache
def definitions(module: str, root: Path | None = None) -> dict[str, str]:
    """Read the source lines of all that a module defines, by qualified name; {} without source."""
    file = find_file(module, root)
    if file is None:
        return {}
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    found: dict[str, str] = {}
    for name, node in _find_definitions(ast.parse(source), "", None):
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        # What is assigned in several places is all of them.
        found[name] = f"{found[name]}\n{text}" if name in found else text
    return found


def _find_definitions(
    node: ast.AST, prefix: str, class_prefix: str | None
) -> Iterator[tuple[str, ast.stmt]]:
    """Walk the definitions below `node`; `class_prefix` is of the class whose method it is in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield prefix + child.name, child
            yield from _find_definitions(child, f"{prefix}{child.name}.", None)
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
            owner = prefix if isinstance(node, ast.ClassDef) else class_prefix or ""
            yield from _find_definitions(child, f"{prefix}{child.name}.", owner)
            continue
        if isinstance(child, ast.Assign | ast.AnnAssign):
            for target in child.targets if isinstance(child, ast.Assign) else [child.target]:
                for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                    match part:
                        case ast.Name(name) if class_prefix is None:
                            yield prefix + name, child
                        case ast.Attribute(ast.Name("self"), attribute) if class_prefix:
                            yield class_prefix + attribute, child
        yield from _find_definitions(child, prefix, class_prefix)
