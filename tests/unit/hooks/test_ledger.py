"""That the ledger and the digests are what the code says, and that nothing of vLLM is left out."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest
import vllm

from layerskip_vllm.drafting.proposer import LayerSkipProposer
from layerskip_vllm.hooks.uses import USES
from layerskip_vllm.hooks.vllm_source import (
    SUPPORTED_VLLM_VERSIONS,
    definitions,
    find_mismatches,
    read_digests,
)
from layerskip_vllm.plugin import LEDGER
from scripts import ledger, vllm_python, vllm_uses
from scripts.ledger_page import PAGE, write_page

VERSION = vllm.__version__.partition("+")[0]
MODULES = [use.module for use in USES]


def test_digests_are_those_of_what_is_relied_on_when_made_again() -> None:
    assert read_digests(VERSION) == ledger.make_digests(), "run python -m scripts.ledger"


@pytest.mark.parametrize("version", SUPPORTED_VLLM_VERSIONS)
def test_source_is_as_its_digests_say_when_a_version_is_at_hand(version: str) -> None:
    folder = vllm_python.CACHE / version
    if version != VERSION and not folder.is_dir():
        pytest.skip(f"no Python of vLLM {version}: python -m scripts.vllm_python {version}")
    root = None if version == VERSION else folder
    for expected in read_digests(version).values():
        assert find_mismatches(expected or {}, root) == {}, "run python -m scripts.ledger"


def test_page_is_that_of_the_entries_when_made_again() -> None:
    assert PAGE.read_text() == write_page(), "run python -m scripts.ledger"


def test_page_has_every_field_of_every_entry_when_read() -> None:
    text = PAGE.read_text()
    assert all(f"\n### `{entry.name}`\n" in text for entry in LEDGER)
    for field in ("Why", "Process", "How", "Relies on", "Upstream", "Remove when"):
        assert text.count(f"\n- **{field}**: ") == len(LEDGER)


@pytest.mark.parametrize("version", SUPPORTED_VLLM_VERSIONS)
def test_every_entry_has_digests_or_is_said_to_need_none_when_a_version_is_supported(
    version: str,
) -> None:
    digests = read_digests(version)
    assert list(digests) == [entry.name for entry in LEDGER]
    assert all(entry is None or len(entry) > 0 for entry in digests.values())


def test_every_version_has_a_diff_when_supported() -> None:
    diffs = {file.stem for file in PAGE.parent.glob("*.diff")}
    assert diffs == {f"vllm-{version}" for version in SUPPORTED_VLLM_VERSIONS}


def test_every_module_that_uses_vllm_has_an_entry() -> None:
    assert sorted(MODULES) == vllm_uses.modules_with_uses()


@pytest.mark.parametrize("module", vllm_uses.modules())
def test_private_names_are_in_what_is_relied_on_when_a_module_has_them(module: str) -> None:
    digests = read_digests(VERSION)
    # What a hook calls has no entry of its own.
    entries = [module] if module in MODULES else [entry.name for entry in LEDGER]
    names = (name.partition(":") for entry in entries for name in digests[entry] or ())
    relied_on = "\n".join(definitions(home)[qualname] for home, _, qualname in names)
    assert {name for name in private_names(module) if name not in relied_on} <= OF_OTHERS


# Of torch's modules and of Python's argparse, which have had them since their first versions.
OF_OTHERS = {"_modules", "_actions"}


def private_names(module: str) -> set[str]:
    """The names with an underscore that a module reads, sets or passes, but for its own."""
    tree = ast.parse(vllm_uses.source_of(module))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value, name) if not vllm_uses.is_self(value):
                found.add(name)
            case ast.keyword(str(name)) | ast.alias(name):
                found.add(name)
    return {name for name in found - own if name.startswith("_") and not name.startswith("__")}


CLASS = """
    class Drafter(LayerSkipProposer):
        def __init__(self):
            super().__init__()
            self._greedy_sample(self.max_batch_size)

        def model_returns_tuple(self):
            return self.made_here

        made_here = 1
"""


@pytest.fixture
def drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """A drafter that overrides, calls and reads what `LayerSkipProposer` does not."""
    file = tmp_path / "drafter.py"
    file.write_text(
        f"from {LayerSkipProposer.__module__} import LayerSkipProposer\n{textwrap.dedent(CLASS)}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import drafter

    return drafter.Drafter


def test_what_a_class_overrides_calls_and_reads_is_found_when_it_extends_one_of_vllms(
    drafter: type,
) -> None:
    base = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
    assert vllm_uses.find_inherited(drafter) == {
        "vllm.v1.spec_decode.draft_model:DraftModelProposer.__init__",
        f"{base}._greedy_sample",
        f"{base}.max_batch_size",
        f"{base}.model_returns_tuple",
    }


def test_a_new_override_is_missing_in_the_digests_when_they_are_not_written_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LayerSkipProposer, "model_returns_tuple", lambda self: False, raising=False)
    made = ledger.make_digests()
    known = read_digests(VERSION)
    new = made[LayerSkipProposer.__module__].keys() - known[LayerSkipProposer.__module__].keys()
    assert [name.rpartition(".")[2] for name in new] == ["model_returns_tuple"]
