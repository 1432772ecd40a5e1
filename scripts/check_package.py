"""Checks a built wheel and sdist, in the venv that the wheel was installed into.

`scripts/check_package.sh` runs it.
"""

import importlib
import pkgutil
import re
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points, metadata
from pathlib import Path

import layerskip_vllm

REPOSITORY = Path(__file__).parents[1]


def check_wheel(wheel: Path) -> None:
    """Compare the wheel's files with the package's in the repository."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "layerskip_vllm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected, f"wheel and repository differ in {sorted(names ^ expected)}"
    assert "layerskip_vllm/py.typed" in names
    assert any(name.endswith(".yaml") for name in names), "the recipes are missing"


def check_sdist(sdist: Path) -> None:
    """Find in the sdist what describes the package, and nothing that only the repository needs."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"}
    assert expected <= names, f"the sdist lacks {sorted(expected - names)}"
    heavy = {"tests", "benchmarks", "checkpoints", "examples"} & {n.split("/")[0] for n in names}
    assert not heavy, f"the sdist has {sorted(heavy)}"


def check_installed() -> None:
    """Find the wheel's package, version and entry points, and import each of its modules."""
    package = Path(layerskip_vllm.__file__).parent
    assert package.is_relative_to(sys.prefix), f"{package} is not the wheel's"
    assert metadata("layerskip-vllm")["Version"] == layerskip_vllm.__version__
    changelog = (REPOSITORY / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[?(\d[\w.]*)", changelog, re.MULTILINE)
    assert versions[0] == layerskip_vllm.__version__, f"CHANGELOG.md's newest is {versions[0]}"
    (plugin,) = entry_points(group="vllm.general_plugins", name="layerskip")
    assert callable(plugin.load())
    (command,) = entry_points(group="console_scripts", name="layerskip-vllm")
    assert callable(command.load())
    for module in pkgutil.walk_packages([str(package)], "layerskip_vllm."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


if __name__ == "__main__":
    (wheel,) = Path(sys.argv[1]).glob("*.whl")
    (sdist,) = Path(sys.argv[1]).glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    check_installed()
    print(f"{wheel.name} and {sdist.name} hold what they must")
