"""The Python of a vLLM that need not be installed: fetched once, then kept in build/.

What `scripts/` and the tests read of other vLLM versions, or run of them, comes from here:
`export PYTHONPATH=$(python -m scripts.vllm_python VERSION)` runs that version's Python over the
compiled operators of the vLLM that is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from layerskip_vllm.hooks.vllm_source import find_file

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build/vllm"  # git ignores it
MAX_BYTES = 4 << 20  # of a file that is kept; larger ones are compiled, or tables for kernels


def overlay_python(version: str, copy: str | None = None) -> Path:
    """Return the folder of a release's Python, with links to what the installed vLLM compiled.

    Args:
        version: The release.
        copy: A folder for a copy of it, over a vLLM other than that of .venv.
    """
    folder = fetch_python(version)
    if copy is not None:
        if not Path(copy).is_dir():
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.so"))
        folder = Path(copy).resolve()
    package = find_file("vllm")
    assert package is not None, "vLLM is not installed"
    installed = package.parent
    for operators in () if folder in package.parents else installed.rglob("*.so"):
        link = folder / "vllm" / operators.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            Path(temporary, link.name).symlink_to(operators)
            Path(temporary, link.name).replace(link)
    return folder


def fetch_python(version: str) -> Path:
    """Return the folder that holds `vllm/` of a release; its wheel is downloaded if need be.

    Raises:
        subprocess.CalledProcessError: If pip finds no wheel of that release; it says why.
    """
    folder = CACHE / version
    if not folder.is_dir():
        print(f"downloading the wheel of vLLM {version} for its Python", file=sys.stderr)
        with tempfile.TemporaryDirectory() as downloads:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            pip += ["--disable-pip-version-check", "--only-binary=:all:", f"--dest={downloads}"]
            subprocess.run([*pip, f"vllm=={version}"], check=True)
            (wheel,) = Path(downloads).glob("*.whl")
            unpack_python(wheel, folder)
    return folder


def unpack_python(wheel: Path, folder: Path) -> None:
    """Unpack a wheel's `vllm/` into `folder`, without what is compiled: all of it, or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as temporary,
        zipfile.ZipFile(wheel) as archive,
    ):
        unpacked = Path(temporary, "python")
        for member in archive.infolist():
            name, is_small = member.filename, member.file_size < MAX_BYTES
            if name.startswith("vllm/") and is_small and not name.endswith(".so"):
                archive.extract(member, unpacked)
        if not folder.is_dir():  # another process may have been faster
            unpacked.rename(folder)


if __name__ == "__main__":
    print(overlay_python(*sys.argv[1:]))
