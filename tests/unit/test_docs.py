"""What the documentation names is there: files, links, modules, make targets, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from layerskip_vllm.config.setting_refusals import KNOWN_KEYS
from layerskip_vllm.tools.commands import main
from scripts.commands_page import write_page

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "patches/*.md", "examples/*", "checkpoints/*/*.md")
    for path in ROOT.glob(pattern)
    if path.is_file() and path.name != "CHANGELOG.md"  # which names what was
)
BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
TOP_LEVEL = "benchmarks|checkpoints|dashboards|docs|examples|layerskip_vllm|patches|scripts|tests"


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_of(page: str) -> str:
    """Return a page's code: its blocks and what stands between backticks, or all of a script."""
    text = text_of(page)
    if not page.endswith(".md"):
        return text
    return "\n".join([*BLOCK.findall(text), *re.findall(r"`[^`]+`", BLOCK.sub("", text))])


def module_file(name: str) -> Path | None:
    base = ROOT / name.replace(".", "/")
    files = (base.with_suffix(".py"), base / "__init__.py", base)
    return next((path for path in files if path.exists()), None)


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", BLOCK.sub("", text_of(page)))
    relative = [link for link in links if "://" not in link]
    missing = [link for link in relative if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    paths = re.findall(rf"(?<![\w/.-])(?:\./)?((?:{TOP_LEVEL})/[\w./*-]+)", code_of(page))
    missing = [path for path in paths if not list(ROOT.glob(path.rstrip("/.")))]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_what_they_define_exist(page: str) -> None:
    names = re.findall(rf"(?<![\w/.-])((?:{TOP_LEVEL})(?:\.\w+)+)", code_of(page))
    for name in names:
        if Path(name).suffix in {".md", ".py", ".json"}:
            continue
        module, attribute = name, ""
        while module_file(module) is None:
            module, _, attribute = module.rpartition(".")
        assert not attribute or attribute in (module_file(module) or Path()).read_text(), name


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    named = re.findall(r"(?:^|`)make((?: [a-z-]+)+)", code_of(page), re.MULTILINE)
    assert {target for names in named for target in names.split()} <= targets


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those between backticks; `test_printed_code.py` parses the blocks."""
    for command, rest in re.findall(r"`layerskip-vllm ([a-z][a-z-]+)([^\n`]*)`", code_of(page)):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0, command
        options = re.findall(r"--[a-z-]+", rest)
        assert set(options) <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out)), rest


def test_commands_page_is_what_the_commands_say() -> None:
    assert write_page() == text_of("docs/commands.md")


def test_structure_names_the_files_of_the_package() -> None:
    package = ROOT / "layerskip_vllm"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    rooms = "|".join(sorted({file.partition("/")[0] for file in files if "/" in file}))
    named = set(re.findall(rf"`((?:(?:{rooms})/[\w/]+|plugin)\.py)`", text_of("docs/structure.md")))
    assert named == {file for file in files if not file.endswith("__init__.py")}


def test_settings_page_has_a_row_for_every_setting() -> None:
    rows = re.findall(r"^\| (`.+?`) \|", text_of("docs/settings.md"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert KNOWN_KEYS - {"method", "model"} <= named


def test_structure_names_functions_that_exist() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "layerskip_vllm").rglob("*.py"))
    code = re.findall(r"`([A-Za-z_][\w.]+)`", text_of("docs/structure.md"))
    missing = [name for name in code if not re.search(rf"\b{name.rpartition('.')[2]}\b", source)]
    assert [name for name in missing if "." not in name or not (ROOT / name).exists()] == []
