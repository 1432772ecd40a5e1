"""The file of a draft vocabulary: read as it was written, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerskip_vllm.checkpoint.draft_vocab import DraftVocab, read_draft_vocab, save_draft_vocab


def test_draft_vocab_is_read_as_it_was_written(tmp_path: Path) -> None:
    draft_vocab = DraftVocab(vocab_size=9, token_ids=(8, 0, 3))
    save_draft_vocab(tmp_path / "new" / "ids.json", draft_vocab)
    assert read_draft_vocab(tmp_path / "new" / "ids.json") == draft_vocab


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 9, "token_ids": [0, 9]}, "token_ids has 9, but vocab_size is 9; all must"),
        ({"vocab_size": 9, "token_ids": [4, 0, 4]}, "token_ids has 4 twice; each must be there"),
        ({"vocab_size": 9, "token_ids": [-1]}, "token_ids has -1, but vocab_size is 9; all must"),
        ({"vocab_size": 9, "token_ids": [1.5]}, r"token_ids\[0\] is 1.5; it must be an integer"),
        ({"vocab_size": 9, "token_ids": []}, r"token_ids is \[\]; it must be a list of at least 1"),
        ({"vocab_size": 0, "token_ids": [0]}, "vocab_size is 0; it must be an integer of at least"),
        ({"token_ids": [0]}, "has no 'vocab_size', which it must have"),
        ([1, 2], r"The config is \[1, 2\]; it must be a mapping"),
    ],
)
def test_file_is_refused_when_it_is_no_draft_vocab(
    tmp_path: Path, values: Any, message: str
) -> None:
    file = tmp_path / "ids.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"{file}: .*{message}"):
        read_draft_vocab(file)


@pytest.mark.parametrize("content", [b"0, 1", b"\xff"])
def test_file_is_refused_when_it_is_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ids.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"ids\.json is not JSON: "):
        read_draft_vocab(tmp_path / "ids.json")


def test_file_is_refused_when_it_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json', which cannot be read \(No such file"):
        read_draft_vocab(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"which cannot be read \(Is a directory"):
        read_draft_vocab(tmp_path)
