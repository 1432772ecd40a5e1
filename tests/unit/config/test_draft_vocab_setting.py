"""`draft_vocab` in the speculative config: the file is checked with the settings beside it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.draft_vocabs import make_draft_vocab

Speculate = Callable[..., Any]


@pytest.fixture
def file(tmp_path: Path) -> str:
    return make_draft_vocab(tmp_path / "ids.json", range(0, 256, 8))


def narrow(speculate: Speculate, file: Any, engine: dict[str, Any] | None = None, **more: Any):
    config = {"method": "layerskip", "exit_layer": 2, "draft_vocab": file, **more}
    return speculate(speculative_config=config, **(engine or {}))


def test_config_names_the_file_and_its_size_when_it_is_given(
    speculate: Speculate, file: str
) -> None:
    config = pickle.loads(pickle.dumps(narrow(speculate, file)))
    assert (config.draft_vocab, config.draft_vocab_size) == (file, 32)
    assert repr(file) in repr(config)


def test_drafts_choose_among_all_tokens_when_no_file_is_given(speculate: Speculate) -> None:
    config = narrow(speculate, None)
    assert (config.draft_vocab, config.draft_vocab_size) == (None, 256)
    assert "draft_vocab" not in repr(config)


def test_file_is_found_by_every_process_when_it_is_relative(
    speculate: Speculate, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(file).parent)
    assert narrow(speculate, "ids.json").draft_vocab == file


@pytest.mark.parametrize("value", [7, True, ["ids.json"], {}], ids=repr)
def test_setting_is_refused_when_it_is_no_path(speculate: Speculate, value: Any) -> None:
    with pytest.raises(ValueError, match=r"draft_vocab is .*; it must be the path of a file"):
        narrow(speculate, value)


def test_file_is_refused_when_it_is_of_another_model(speculate: Speculate, tmp_path: Path) -> None:
    file = make_draft_vocab(tmp_path / "ids.json", [0, 299], vocab_size=300)
    with pytest.raises(ValueError, match=r"whose vocab_size is 300, but .* has 256; it must be"):
        narrow(speculate, file)


@pytest.mark.parametrize(
    ("settings", "engine", "name"),
    [
        ({"use_local_argmax_reduction": True}, {}, "use_local_argmax_reduction"),
        ({}, {"enable_lora": True}, "enable_lora"),
    ],
)
def test_setting_is_refused_when_another_needs_the_whole_head(
    speculate: Speculate, file: str, settings: Any, engine: Any, name: str
) -> None:
    with pytest.raises(ValueError, match=rf"draft_vocab is .* and {name} is true, but .*leave one"):
        narrow(speculate, file, engine, **settings)
