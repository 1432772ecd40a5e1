"""`scripts/compare_vllm.py` on small trees in vLLM's place, and on the vLLM that is installed."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from layerskip_vllm.hooks.install import Hook, Use
from layerskip_vllm.hooks.vllm_source import ANY, source_digest
from scripts import compare_vllm, vllm_python
from scripts.vllm_names import find_elsewhere, find_home

OLD = {
    "__init__.py": "",
    "_version.py": "__version__ = version = '1.0.0+cpu'\n",
    "base.py": "class Base:\n    def run(self):\n        return 1\n",
    "drafter.py": "from vllm.base import Base\n\nclass Drafter(Base):\n    def draft(self):\n"
    "        return 2\n",
    "flags.py": "FLAG = 3\n",
    "sizes.py": "LIMIT = 3\n",
}
PLUGIN = """
from vllm.drafter import Drafter
from vllm.sizes import LIMIT

class OurDrafter(Drafter):
    def draft(self):
        return self._step() + LIMIT

    def _step(self):
        return 1
"""
DIFF = """--- a/vllm/flags.py
+++ b/vllm/flags.py
@@ -1,1 +1,2 @@
 FLAG = 3
+MORE = 1
--- a/vllm/registry.py
+++ b/vllm/registry.py
@@ -0,0 +1,1 @@
+METHODS = {}
"""
TEXTS = {"why": "a test", "process": "this one", "how": "so", "remove_when": "never"}
LEDGER = (
    Hook(target="vllm.base:Base.run", replace=lambda original: original, **TEXTS),
    Hook(
        target="vllm.drafter:Drafter.__new__",
        replace=lambda original: original,
        is_new=True,
        relies_on=("vllm.drafter:Drafter.draft",),
        **TEXTS,
    ),
    Use(module="plugin.ours", relies_on=("vllm.drafter:Drafter.draft",), **TEXTS),
)

Make = Callable[..., Path]


@pytest.fixture
def make_vllm(tmp_path: Path) -> Make:
    """Write a vLLM: OLD, but for the files that are given, or taken away as None."""
    numbers = itertools.count()

    def make(**changes: str | None) -> Path:
        root = tmp_path / f"vllm{next(numbers)}"
        files = OLD | {f"{module}.py": text for module, text in changes.items()}
        for file, text in files.items():
            if text is not None:
                path = root / "vllm" / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        return root

    return make


@pytest.fixture
def compare(
    make_vllm: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str]]:
    """Compare a new vLLM with OLD for a small plugin: the exit status, and what is printed."""
    old = make_vllm()
    digests = {
        entry.name: {name: source_digest(name, old) for name in entry.names} for entry in LEDGER
    }
    digests["plugin.ours"]["vllm.base:Base"] = ANY
    project = tmp_path / "project"
    (project / "plugin").mkdir(parents=True)
    (project / "plugin/ours.py").write_text(PLUGIN)
    (project / "patches").mkdir()
    (project / "patches/vllm-1.0.0.diff").write_text(DIFF)
    monkeypatch.setattr(compare_vllm, "ROOT", project)
    monkeypatch.setattr(compare_vllm, "PATCHES", project / "patches")
    monkeypatch.setattr(compare_vllm, "FOLDERS", ("plugin",))
    monkeypatch.setattr(compare_vllm, "LEDGER", LEDGER)
    monkeypatch.setattr(compare_vllm, "SUPPORTED_VLLM_VERSIONS", ("1.0.0",))
    monkeypatch.setattr(compare_vllm, "PACKAGE", "plugin")
    monkeypatch.setattr(compare_vllm, "read_digests", lambda version: digests)
    monkeypatch.setattr(compare_vllm, "find_old_root", lambda version: old)

    def compare(**changes: str | None) -> tuple[int, str]:
        status = compare_vllm.main([str(make_vllm(**changes))])
        return status, capsys.readouterr().out

    return compare


def test_everything_fits_when_what_is_relied_on_is_the_same(
    compare: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is imported here is another vLLM.
    monkeypatch.setitem(sys.modules, "vllm.base", ModuleType("vllm.base"))
    status, text = compare(base=f"STEP = 1\n{OLD['base.py']}", _version="__version__ = '2.0.0'\n")
    assert status == 0
    assert "vLLM 2.0.0 against what the plugin relies on in 1.0.0" in text
    assert "Hooks and uses: 3 of 3 fit" in text
    assert "Imports: 2 of 2 are there" in text
    assert "upstream has taken: 0" in text
    assert "vllm-1.0.0.diff: 2 of 2 hunks apply" in text
    assert "@@" not in text


def test_a_changed_definition_is_shown_as_upstreams_diff(
    compare: Callable[..., tuple[int, str]],
) -> None:
    status, text = compare(base=OLD["base.py"].replace("return 1", "return 0"))
    assert status == 1
    assert "Hooks and uses: 2 of 3 fit" in text
    assert "\nvllm.base:Base.run has changed\n" in text
    assert "-        return 1\n+        return 0" in text


def test_a_new_attribute_is_told_when_upstream_has_it(
    compare: Callable[..., tuple[int, str]],
) -> None:
    status, text = compare(drafter=f"{OLD['drafter.py']}\n    def __new__(cls): ...\n")
    assert status == 1
    assert "no    vllm.drafter:Drafter.__new__\n" in text
    assert "vllm.drafter:Drafter.__new__ exists, but" in text


def test_a_definition_is_found_where_it_is_now_when_it_has_moved(
    compare: Callable[..., tuple[int, str]],
) -> None:
    status, text = compare(
        drafter="from vllm.base import Base\nfrom vllm.moved import Drafter\n",
        moved=OLD["drafter.py"],
    )
    assert status == 1
    assert "\nvllm.drafter:Drafter.draft is now vllm.moved:Drafter.draft\n" in text
    assert "Imports: 2 of 2 are there" in text  # the old module still has the name


def test_an_import_is_named_with_its_users_when_it_is_gone(
    compare: Callable[..., tuple[int, str]],
) -> None:
    status, text = compare(sizes="", limits="LIMIT = 3\n")
    assert status == 1
    assert "Imports: 1 of 2 are there" in text
    assert "vllm.sizes:LIMIT is now vllm.limits:LIMIT (in plugin/ours.py)" in text
    assert "vllm.sizes:LIMIT is nowhere (in plugin/ours.py)" in compare(sizes="", limits=None)[1]


def test_a_name_is_told_when_upstream_has_taken_it(
    compare: Callable[..., tuple[int, str]],
) -> None:
    status, text = compare(base=f"{OLD['base.py']}\n    def _step(self): ...\n")
    assert "upstream has taken: 1" in text
    assert "plugin.ours:OurDrafter._step is now in vllm.base:Base too" in text
    assert status == 1


@pytest.mark.parametrize(
    ("changes", "rejected"),
    [
        ({"flags": "FLAG = 4\n"}, "vllm/flags.py @@ -1,1 +1,2 @@ (1 of 1)"),
        ({"flags": None}, "vllm/flags.py @@ -1,1 +1,2 @@ (1 of 1)"),
        ({"registry": "METHODS = []\n"}, "vllm/registry.py @@ -0,0 +1,1 @@ (1 of 1)"),
    ],
    ids=["another text", "no such file", "a file of that name"],
)
def test_a_hunk_is_named_when_it_does_not_apply(
    compare: Callable[..., tuple[int, str]], changes: dict[str, str | None], rejected: str
) -> None:
    status, text = compare(**changes)
    assert status == 1
    assert "vllm-1.0.0.diff: 1 of 2 hunks apply" in text
    assert f"not {rejected}\n" in text


def test_installed_vllm_fits_with_its_diff(capsys: pytest.CaptureFixture[str]) -> None:
    site = Path(importlib.util.find_spec("vllm").origin).parents[1]
    status = compare_vllm.main([str(site)])
    assert status == 0, capsys.readouterr().out


def test_a_wheel_is_unpacked_without_what_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "vllm-2.0.0-py3-none-any.whl"
    kept = {"vllm/__init__.py": "", "vllm/_version.py": "__version__ = '2.0.0'\n"}
    left_out = {
        "vllm/_C.abi3.so": "",
        "vllm/large.py": "#" * (4 << 20),
        "vllm.dist-info/METADATA": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in (kept | left_out).items():
            archive.writestr(name, text)
    monkeypatch.setattr(compare_vllm, "CACHE", tmp_path / "cache")
    root = compare_vllm.find_root(str(wheel))
    assert {str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()} == kept.keys()
    assert compare_vllm.read_version(root) == "2.0.0"
    assert [f.name for f in root.parent.iterdir()] == [wheel.stem]


def test_a_release_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def download(command: list[str], check: bool) -> None:
        commands.append(command)
        folder = next(part for part in command if part.startswith("--dest=")).partition("=")[2]
        with zipfile.ZipFile(Path(folder, "vllm-2.0.0.whl"), "w") as archive:
            archive.writestr("vllm/__init__.py", "")

    monkeypatch.setattr(vllm_python, "CACHE", tmp_path)
    monkeypatch.setattr(subprocess, "run", download)
    roots = [compare_vllm.find_root("2.0.0") for _ in range(2)]
    assert roots == [tmp_path / "2.0.0"] * 2
    assert [command[-1] for command in commands] == ["vllm==2.0.0"]


def test_a_release_is_asked_for_when_there_is_none_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], check: bool) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(vllm_python, "CACHE", tmp_path)
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SystemExit, match=r"cannot download vLLM 9\.9\.9"):
        compare_vllm.find_root("9.9.9")
    assert list(tmp_path.iterdir()) == []


def test_an_argument_is_refused_when_it_is_no_vllm(tmp_path: Path) -> None:
    for given in (str(tmp_path), "latest"):
        with pytest.raises(SystemExit, match="is no version, no wheel and no folder"):
            compare_vllm.find_root(given)


@pytest.mark.parametrize(
    ("module", "name", "home"),
    [
        ("vllm.sizes", "LIMIT", "vllm.sizes:LIMIT"),
        ("vllm.drafter", "Base", "vllm.base:Base"),
        ("vllm", "sizes", "vllm.sizes:"),
        ("vllm.sizes", "", "vllm.sizes:"),
        ("vllm.absent", "", None),
        ("vllm.all", "LIMIT", "vllm.sizes:LIMIT"),
        ("vllm.all", "Tensor", "torch:Tensor"),
        ("vllm.all", "itself", None),
        ("vllm.all", "absent", None),
        ("vllm.absent", "LIMIT", None),
    ],
)
def test_a_name_is_found_where_it_is_defined_when_it_is_imported_on(
    make_vllm: Make, module: str, name: str, home: str | None
) -> None:
    root = make_vllm(
        all="from torch import Tensor\nfrom .sizes import *\nfrom .all import itself\n"
    )
    assert find_home(module, name, root) == home


def test_a_method_is_found_in_the_base_class_when_it_has_moved_there(make_vllm: Make) -> None:
    assert find_elsewhere("vllm.drafter:Drafter.run", make_vllm()) == ["vllm.base:Base.run"]
