"""What a new vLLM changes for the plugin, in seconds, without installing, importing or running it.

`python -m scripts.compare_vllm VERSION`, or a wheel, or a folder that holds `vllm/`, prints which
entries of the ledger still fit, upstream's diff of what does not, the imports that are gone, names
of the plugin's that upstream now has too, and whether the diffs apply. Exit status 0: all fits.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from layerskip_vllm.hooks.install import check, find_needed
from layerskip_vllm.hooks.vllm_source import (
    ANY,
    SUPPORTED_VLLM_VERSIONS,
    DigestTable,
    definitions,
    find_mismatches,
    read_digests,
)
from layerskip_vllm.plugin import LEDGER
from scripts.vllm_names import (
    find_bases,
    find_elsewhere,
    find_home,
    find_imports,
    find_members,
    read_definition,
)
from scripts.vllm_python import CACHE, ROOT, fetch_python, unpack_python

PACKAGE = "layerskip_vllm"
FOLDERS = (PACKAGE, "benchmarks", "examples", "scripts", "tests")  # whose imports are looked up
PATCHES = ROOT / "patches"


def main(arguments: list[str] | None = None) -> int:
    """Compare, print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m scripts.compare_vllm")
    parser.add_argument("vllm", help="a version, a wheel, or a folder that holds vllm/")
    parser.add_argument(
        "--against",
        choices=SUPPORTED_VLLM_VERSIONS,
        help="the version to compare with (default: the same if it is supported, else the newest)",
    )
    args = parser.parse_args(arguments)
    new = find_root(args.vllm)
    version = read_version(new) or args.vllm
    is_supported = version in SUPPORTED_VLLM_VERSIONS
    against = args.against or (version if is_supported else SUPPORTED_VLLM_VERSIONS[-1])
    print(f"vLLM {version} against what the plugin relies on in {against}")
    digests, old = read_digests(against), find_old_root(against)
    fits = [
        report_entries(digests, new),
        report_imports(new),
        report_clashes(old, new),
        report_diffs(new),
    ]
    print_changes(digests, old, new)
    return 0 if all(fits) else 1


def find_root(given: str) -> Path:
    """Return the folder that holds `vllm/` of a version, a wheel or a folder."""
    path = Path(given)
    if path.suffix == ".whl" and path.is_file():
        folder = CACHE / path.stem
        if not folder.is_dir():
            unpack_python(path, folder)
        return folder
    for folder in (path, path.parent):
        if path.is_dir() and (folder / "vllm/__init__.py").is_file():
            return folder.resolve()
    if not re.fullmatch(r"\d[\w.+]*", given):
        raise SystemExit(f"{given!r} is no version, no wheel and no folder that holds vllm/.")
    return _fetch(given)


def find_old_root(version: str) -> Path | None:
    """Return the folder with a supported version's source; None stands for the installed one."""
    return None if read_version(None) == version else _fetch(version)


def _fetch(version: str) -> Path:
    try:
        return fetch_python(version)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"pip cannot download vLLM {version}, as it says above; give a release that has a "
            "wheel, or a wheel or folder that is here."
        ) from error


def read_version(root: Path | None) -> str | None:
    """Read the release that a vLLM says it is; None if it does not say."""
    text = definitions("vllm._version", root).get("__version__", "")
    found = re.search(r"""= *['"]([^'"+]+)""", text)
    return found and found[1]


def report_entries(digests: DigestTable, root: Path) -> bool:
    """Print which entries of the ledger still fit."""
    needed = find_needed(LEDGER, digests)
    problems = {entry.name: check(entry, digests, root) for entry in needed}
    print(f"\nHooks and uses: {list(problems.values()).count([])} of {len(needed)} fit")
    for name, found in problems.items():
        print(f"  {'no  ' if found else 'fits'}  {name}")
        for problem in found:
            print(f"          {problem.partition(': source digest')[0]}")
    return not any(problems.values())


def report_imports(root: Path) -> bool:
    """Print the imports that are gone, and where the names are now."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    users = defaultdict(list)
    for file in files:
        for name in find_imports(file):
            users[name].append(str(file.relative_to(ROOT)))
    gone = {name: used_by for name, used_by in users.items() if not find_home(*name, root)}
    print(f"\nImports: {len(users) - len(gone)} of {len(users)} are there")
    for (module, name), used_by in sorted(gone.items()):
        where = _say_where(find_elsewhere(f"{module}:{name}", root) if name else [])
        print(f"  {f'{module}:{name}' if name else module} {where} (in {', '.join(used_by)})")
    return not gone


def report_clashes(old: Path | None, new: Path) -> bool:
    """Print what a class of the plugin defines that upstream's classes have had no name for yet."""
    clashes = []
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for cls in (name for name in definitions(module, ROOT) if "." not in name):
            own = find_members(f"{module}:{cls}", ROOT)
            bases = {root: _members_of_bases(f"{module}:{cls}", root) for root in (old, new)}
            for name in sorted(own & (bases[new].keys() - bases[old].keys())):
                clashes.append(f"{module}:{cls}.{name} is now in {bases[new][name]} too")
    print(f"\nNames of the plugin's classes that upstream has taken: {len(clashes)}")
    print("".join(f"  {clash}\n" for clash in clashes), end="")
    return not clashes


def _members_of_bases(home: str, root: Path | None) -> dict[str, str]:
    """Find what the classes of vLLM define that a class of the plugin extends, and which does."""
    members: dict[str, str] = {}
    for base in find_bases(home, root, ROOT):
        members |= dict.fromkeys(find_members(base, root) - members.keys(), base)
    return members


def report_diffs(root: Path) -> bool:
    """Print whether each of the registry's diffs applies, hunk by hunk; one that does is enough."""
    print("\nDiffs of patches/")
    applies = []
    for diff in sorted(PATCHES.glob("*.diff")):
        num_hunks, rejected = try_diff(diff, root)
        print(f"  {diff.name}: {num_hunks - len(rejected)} of {num_hunks} hunks apply")
        print("".join(f"    not {hunk}\n" for hunk in rejected), end="")
        applies.append(not rejected)
    return any(applies)


def try_diff(diff: Path, root: Path) -> tuple[int, list[str]]:
    """Apply a diff to copies of the files that it changes.

    Returns:
        How many hunks it has, and those that do not apply.
    """
    num_hunks, rejected = 0, []
    for part in re.split(r"^(?=--- a/)", diff.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        file = part.split(maxsplit=2)[1].removeprefix("a/")
        headers = re.findall(r"^@@.*?@@", part, re.MULTILINE)
        num_hunks += len(headers)
        applies, said = _apply(part, file, root)
        numbers = [int(n) for n in re.findall(r"^Rejected hunk #(\d+)", said, re.MULTILINE)]
        for number, header in enumerate(headers, start=1):
            # Where git names no hunk, the file is not there.
            if not applies and (number in numbers or not numbers):
                rejected.append(f"{file} {header} ({number} of {len(headers)})")
    return num_hunks, rejected


def _apply(part: str, file: str, root: Path) -> tuple[bool, str]:
    """Apply the part of a diff for one file to a copy: whether it applies, and what git says."""
    with tempfile.TemporaryDirectory() as copy:
        if (root / file).is_file():
            Path(copy, file).parent.mkdir(parents=True)
            shutil.copy(root / file, Path(copy, file))
        done = subprocess.run(
            ["git", "apply", "--reject", "--verbose", "-"],
            input=part,
            cwd=copy,
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            text=True,
        )
        return done.returncode == 0, done.stderr


def print_changes(digests: DigestTable, old: Path | None, new: Path) -> None:
    """Print upstream's diff of all that is relied on and is not as it was."""
    pairs = [pair for entry in digests.values() for pair in (entry or {}).items()]
    # What one entry needs as it is and another only needs to be there is to be as it is.
    expected = dict(sorted(pairs, key=lambda pair: pair[1] != ANY))
    for name, found in sorted(find_mismatches(expected, new).items()):
        homes = [name] if found else find_elsewhere(name, new)
        print(f"\n{name} {'has changed' if found else _say_where(homes)}")
        texts = [read_definition(name, old), read_definition(homes[0], new) if homes else None]
        before, after = ((text or "").splitlines() for text in texts)
        diff = list(difflib.unified_diff(before, after, lineterm="", n=3))[2:]
        print("\n".join(diff) if homes else "")


def _say_where(homes: list[str]) -> str:
    return f"is now {' or '.join(homes)}" if homes else "is nowhere"


if __name__ == "__main__":
    sys.exit(main())
