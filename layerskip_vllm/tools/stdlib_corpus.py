"""A corpus that every machine has: the source of Python's standard library.

`pretrain` trains on it; the demo and the benchmark cut their prompts from its held-out part.
Which files are held out depends on their paths alone, so every Python version has the same split.
"""

import hashlib
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 16

# Tests and fixtures, other people's packages, and tables of data that merely end in `.py`.
_EXCLUDED_DIRS = re.compile(
    r"__pycache__|_bundled|dist-packages|encodings|idle_test|lib-dynload|pydoc_data|site-packages"
    r"|tests?"
)
# Files generated for one machine, and more tables.
_EXCLUDED_FILES = re.compile(
    r"config-[^/]*/|_sysconfigdata|_sysconfig_vars|html/entities\.py$|__phello__|this\.py$"
)


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus."""

    path: str  # relative to the standard library's folder, with `/` on every platform
    text: str  # with Unix line ends


def stdlib_root() -> Path:
    """Return the folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_corpus_path(path: str) -> bool:
    """Return whether the file at `path`, relative to the root, belongs to the corpus."""
    *folders, name = path.split("/")
    if not name.endswith(".py") or any(map(_EXCLUDED_DIRS.fullmatch, folders)):
        return False
    return _EXCLUDED_FILES.search(path) is None


def is_held_out(path: str) -> bool:
    """Return whether the file at `path`, relative to the root, is kept apart from training."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def corpus_paths(root: Path | None = None) -> list[str]:
    """Return the corpus's paths, sorted, relative to `root`, with `/` on every platform."""
    root = stdlib_root() if root is None else root
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _EXCLUDED_DIRS.fullmatch(name)]
        relative = Path(folder).relative_to(root)
        paths += [(relative / name).as_posix() for name in names]
    return sorted(path for path in paths if is_corpus_path(path))


def read_files(paths: Iterable[str], root: Path | None = None) -> list[SourceFile]:
    """Read files of the corpus; those that are empty or do not decode are left out."""
    root = stdlib_root() if root is None else root
    files = []
    for path in paths:
        try:
            with tokenize.open(root / path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            files.append(SourceFile(path, text))
    return files


def train_files(root: Path | None = None) -> list[SourceFile]:
    """Return the files to train on, about 95 % of the corpus, in the order of their paths."""
    return read_files([path for path in corpus_paths(root) if not is_held_out(path)], root)


def held_out_files(root: Path | None = None) -> list[SourceFile]:
    """Return the files kept apart, about 5 % of the corpus, in the order of their paths."""
    return read_files([path for path in corpus_paths(root) if is_held_out(path)], root)


def corpus_sha256(files: Iterable[SourceFile]) -> str:
    """Return one hex digest over the files' paths and texts, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        for part in (file.path, file.text):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
