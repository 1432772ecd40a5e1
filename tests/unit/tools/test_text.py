"""Held-out text: what is read from files, and sequences and prompts counted by hand."""

import re
from types import SimpleNamespace

import pytest
import torch

from layerskip_vllm.tools.stdlib_corpus import held_out_files
from layerskip_vllm.tools.text import HeldOutText, encode_documents, read_documents

BOS = 99


def test_documents_are_files_and_lines_when_they_are_of_several_kinds(tmp_path):
    # U+2028 ends a line for Python, but not for JSON.
    (tmp_path / "b.jsonl").write_text('{"text": "one\u2028two", "id": 1}\n\n{"text": " "}\n')
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "code.py").write_text("print('é')\n", encoding="utf-8")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    last = tmp_path / "a" / "last.txt"
    last.write_text("last")

    documents = read_documents([str(tmp_path), str(last)])

    assert documents == ["print('é')\n", "last", "one\u2028two", "last"]


def test_documents_are_the_held_out_files_when_the_name_is_stdlib():
    assert read_documents(["stdlib"]) == [file.text for file in held_out_files()]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"data is '.*missing\.txt', which is not there.*or 'stdlib'"),
        ("empty.txt", b" \n", r"data is '.*empty\.txt', which has no text in it"),
        ("empty.jsonl", b"", r"data is '.*empty\.jsonl', which has no text in it"),
        ("image.png", b"\x89PNG", r"data has '.*image\.png', which is not text in UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"', r"line 2 of '.*bad\.jsonl' is not JSON"),
        ("list.jsonl", b'["a"]', r"line 1 of '.*list\.jsonl' must be an object whose 'text' is a"),
        ("other.jsonl", b'\n{"texts": "a"}', r"line 2 of '.*other\.jsonl' must be an object whose"),
        ("none.jsonl", b'{"text": null}', r"line 1 of '.*none\.jsonl' must be an object whose"),
    ],
)
def test_documents_are_refused_when_they_are_no_text(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents([str(tmp_path / name)])


def test_files_of_a_folder_are_left_out_aloud_when_they_are_no_text(tmp_path, capsys):
    for index in range(7):
        (tmp_path / f"{index}.png").write_bytes(b"\x89PNG")
    (tmp_path / "8.txt").write_text("text")
    assert read_documents([str(tmp_path)]) == ["text"]
    said = capsys.readouterr().err
    assert f"{str(tmp_path)!r} without 7 files that are not text in UTF-8: 0.png, 1.png, " in said
    assert said.endswith("4.png, ...\n")
    (tmp_path / "9.jsonl").write_text("text")
    with pytest.raises(ValueError, match=r"line 1 of '.*9\.jsonl' is not JSON"):
        read_documents([str(tmp_path)])


def test_folder_is_refused_when_it_is_empty(tmp_path):
    with pytest.raises(ValueError, match=re.escape(repr(str(tmp_path))) + ".*no text in it"):
        read_documents([str(tmp_path)])


def test_sequences_predict_every_token_once_when_cut_by_hand():
    text = HeldOutText(torch.arange(17), prefix=[])
    expected = [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10], [10, 11, 12, 13, 14, 15]]
    assert text.cut_sequences(seq_len=5, max_tokens=100).tolist() == expected


def test_sequences_begin_with_the_prefix_when_the_tokenizer_has_one():
    text = HeldOutText(torch.arange(11), prefix=[BOS])
    expected = [[BOS, 0, 1, 2, 3, 4], [BOS, 5, 6, 7, 8, 9]]
    assert text.cut_sequences(seq_len=5, max_tokens=100).tolist() == expected


def test_sequences_are_spread_over_the_text_when_there_are_more_than_wanted():
    text = HeldOutText(torch.arange(21), prefix=[])
    starts = [row[0] for row in text.cut_sequences(seq_len=5, max_tokens=14).tolist()]
    assert starts == [0, 10]


@pytest.mark.parametrize(("prefix", "longest"), [([], 4), ([BOS], 5)])
def test_sequences_are_refused_when_the_text_is_too_short(prefix, longest):
    text = HeldOutText(torch.arange(5), prefix)
    assert text.cut_sequences(longest, 100).shape == (1, longest + 1)
    with pytest.raises(ValueError, match=f"data has 5 tokens.*seq_len of at most {longest}"):
        text.cut_sequences(longest + 1, 100)


@pytest.mark.parametrize(
    ("prefix", "expected"), [([], [[0, 1, 2], [6, 7, 8]]), ([BOS], [[BOS, 0, 1], [BOS, 4, 5]])]
)
def test_prompts_are_spread_over_the_text_when_cut_by_hand(prefix, expected):
    text = HeldOutText(torch.arange(13 if not prefix else 9), prefix)
    assert text.cut_prompts(num_prompts=2, num_prompt_tokens=3) == expected


def test_prompts_are_refused_when_the_text_has_too_few():
    text = HeldOutText(torch.arange(8), prefix=[])
    with pytest.raises(
        ValueError, match="num_prompts is 3, but data has tokens for 2 prompts of 3"
    ):
        text.cut_prompts(num_prompts=3, num_prompt_tokens=3)


class Tokenizer(SimpleNamespace):
    """One token a letter, and the beginning of a text where it is told to."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        begin = [self.bos_token_id] if add_special_tokens and self.adds_bos else []
        return {"input_ids": begin + [ord(letter) for letter in text]}


@pytest.mark.parametrize(
    ("bos", "eos", "adds_bos", "token_ids", "prefix"),
    [
        (1, 2, True, [97, 98, 2, 99, 2], [1]),
        (1, 2, False, [97, 98, 2, 99, 2], []),
        (None, None, False, [97, 98, 99], []),
    ],
)
def test_texts_are_joined_by_their_end_when_encoded(bos, eos, adds_bos, token_ids, prefix):
    tokenizer = Tokenizer(bos_token_id=bos, eos_token_id=eos, adds_bos=adds_bos)
    text = encode_documents(tokenizer, ["ab", "c"])
    assert text.token_ids.tolist() == token_ids
    assert text.prefix == prefix
