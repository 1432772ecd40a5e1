"""Where E and K come from when the user names none; nothing here imports vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from layerskip_vllm.checkpoint.entry import (
    PUBLISHED_SETTINGS,
    check_positive_int,
    default_settings,
    write_entry,
)


def settings_of(model: str, num_layers: int = 32, **config: Any) -> tuple[int, int]:
    settings = default_settings(model, SimpleNamespace(**config), num_layers)
    return settings.exit_layer.value, settings.num_speculative_tokens.value


def test_table_covers_all_published_checkpoints_when_read() -> None:
    assert len(PUBLISHED_SETTINGS) == 7
    assert all(exit_layer > 0 < num for exit_layer, num in PUBLISHED_SETTINGS.values())


@pytest.mark.parametrize(
    "model",
    [
        "facebook/layerskip-llama2-7B",
        "models/layerskip-llama2-7B/",
        r"C:\models\layerskip-llama2-7b",
        "layerskip-llama2-7b",
    ],
)
def test_settings_come_from_the_table_when_the_checkpoint_is_published(model: str) -> None:
    assert settings_of(model) == (8, 6)


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(1, (1, 4)), (3, (1, 4)), (8, (2, 4)), (32, (8, 4)), (80, (20, 4))]
)
def test_settings_are_a_quarter_of_the_layers_when_nothing_is_known(
    num_layers: int, expected: tuple[int, int]
) -> None:
    assert settings_of("someone/llama", num_layers) == expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"exit_layer": 5, "num_speculative_tokens": 2}, (5, 2)),
        ({"exit_layer": 5}, (5, 6)),
        ({"num_speculative_tokens": 2}, (8, 2)),
        (None, (8, 6)),
    ],
    ids=str,
)
def test_settings_come_from_the_checkpoint_when_it_has_an_entry(
    entry: dict[str, int] | None, expected: tuple[int, int]
) -> None:
    assert settings_of("facebook/layerskip-llama2-7B", layerskip=entry) == expected


def test_settings_name_their_sources_when_they_come_from_several() -> None:
    config = SimpleNamespace(layerskip={"exit_layer": 5})
    for model, source in (
        ("someone/llama", "the default"),
        ("layerskip-llama2-7B", "the table of published checkpoints"),
    ):
        settings = default_settings(model, config, 32)
        assert settings.exit_layer.source == "the checkpoint's config.json"
        assert settings.num_speculative_tokens.source == source


@pytest.mark.parametrize("entry", [True, 8, "8", [8, 6], {"exit_layer": 0}, {"exit_layer": None}])
def test_entry_is_refused_when_it_is_not_of_the_right_form(entry: Any) -> None:
    with pytest.raises(ValueError, match=r"'layerskip' in the checkpoint's config\.json is .*must"):
        settings_of("someone/llama", layerskip=entry)


def test_entry_is_refused_when_it_has_an_unknown_key() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'exit'; known are exit_layer, num_spec"):
        settings_of("someone/llama", layerskip={"exit": 3})


@pytest.mark.parametrize("value", [0, -3, True, False, 1.0, "1", None])
def test_integer_is_refused_when_it_is_anything_else(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^num is .*; it must be an integer of at least 1\.$"):
        check_positive_int("num", value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            '{\n  "a": 1e-06,\n  "z": "é"\n}\n',
            '{\n  "a": 1e-06,\n  "z": "é",\n  "layerskip": {\n    "exit_layer": 3\n  }\n}\n',
        ),
        (
            '{\n    "layerskip": {\n        "exit_layer": 9\n    },\n    "z": "\\u00e9"\n}',
            '{\n    "layerskip": {\n        "exit_layer": 3\n    },\n    "z": "\\u00e9"\n}',
        ),
        ('{"a": [1, 2]}', '{"a": [1, 2], "layerskip": {"exit_layer": 3}}'),
    ],
    ids=["new", "replaced", "compact"],
)
def test_entry_is_all_that_changes_when_written(tmp_path: Path, before: str, after: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(before, encoding="utf-8")
    file.chmod(0o640)
    write_entry(tmp_path, {"exit_layer": 3})
    assert file.read_text(encoding="utf-8") == after
    assert file.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [file]


def test_entry_replaces_the_link_when_config_is_one(tmp_path: Path) -> None:
    (tmp_path / "shared.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "shared.json")
    write_entry(tmp_path / "model", {"exit_layer": 3})
    assert (tmp_path / "shared.json").read_text() == "{}"
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == {
        "layerskip": {"exit_layer": 3}
    }


@pytest.mark.parametrize(
    ("config", "entry", "message"),
    [
        ("{", {"exit_layer": 3}, r"config\.json is not JSON"),
        ("[1]", {"exit_layer": 3}, r"config\.json holds '\[1\]'; it must be a JSON object"),
        ("{}", {"exit_layer": 0}, r"exit_layer of 'layerskip'.* is 0; it must be an integer"),
    ],
)
def test_entry_is_not_written_when_it_or_config_is_wrong(
    tmp_path: Path, config: str, entry: dict[str, int], message: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        write_entry(tmp_path, entry)
    assert (tmp_path / "config.json").read_text() == config
