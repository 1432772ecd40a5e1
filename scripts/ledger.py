"""Writes what is made from the hooks: patches/README.md, and the digests of each supported vLLM.

`python -m scripts.ledger` writes both, after a hook or what the plugin uses of vLLM has changed;
`python -m scripts.ledger VERSION` makes VERSION a supported one, or writes only its digests anew.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from layerskip_vllm.hooks.install import Entry, Use
from layerskip_vllm.hooks.vllm_source import (
    ANY,
    SUPPORTED_VLLM_VERSIONS,
    TABLES,
    read_digests,
    source_digest,
)
from layerskip_vllm.plugin import LEDGER
from scripts.ledger_page import PAGE, write_page
from scripts.vllm_python import overlay_python
from scripts.vllm_uses import find_uses

ROOT = Path(__file__).parents[1]


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
