"""Data sets of the recipes' formats, written small, and the rows that are made of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

from layerskip_vllm.checkpoint.validation import parse
from layerskip_vllm.training.data import DataConfig, collate, load_rows
from layerskip_vllm.training.data_sources import DataSource
from tests.support.checkpoints import EOS_TOKEN_ID, make_checkpoint

TOPV2 = [
    ("alarm", 'Wake me at "7', '[IN:CREATE_ALARM Wake me [SL:DATE_TIME at "7 ] ]'),
    ("weather", "rain ?", "[IN:GET_WEATHER [SL:WEATHER_ATTRIBUTE rain ] ? ]"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("data") / "model", num_hidden_layers=1)
    return transformers.AutoTokenizer.from_pretrained(path)


def load(
    tokenizer: Any, *sources: DataSource, seq_len: int = 8, **settings: Any
) -> list[dict[str, list[int]]]:
    config = DataConfig(train=sources, seq_len=seq_len, **settings)
    return list(load_rows(config.train, config, tokenizer, seed=0))


def decode(tokenizer: Any, rows: list[dict[str, list[int]]]) -> str:
    """The rows' text, without what they are filled up with."""
    token_ids = [
        token
        for row in rows
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
        if label != -100
    ]
    return tokenizer.decode(token_ids, skip_special_tokens=False)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_share_rows_of_one_length_when_packed(tmp_path, tokenizer, streaming):
    texts = ["first text", "two", "third\ntext, longer"]
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    source = DataSource(path=write(tmp_path / "a.jsonl", lines))

    rows = load(tokenizer, source, streaming=streaming)

    assert {len(row[name]) for row in rows for name in ("input_ids", "labels")} == {8}
    assert set(rows[0]) == {"input_ids", "labels"}
    rows.sort(key=lambda row: row["labels"].count(-100))  # a stream's rows are shuffled
    whole = "".join(text + "<eos>" for text in texts)
    assert sorted(decode(tokenizer, rows)) == sorted(whole)
    assert streaming or decode(tokenizer, rows) == whole
    assert rows[-1]["labels"][2:] == [-100] * 6
    assert rows[-1]["input_ids"][2:] == [EOS_TOKEN_ID] * 6


def test_every_file_is_one_text_when_files_have_no_columns(tmp_path, tokenizer):
    write(tmp_path / "src/b.py", "def f():\n\n    return 1\n")
    write(tmp_path / "src/deep/a.py", "x = 2\n")

    rows = load(tokenizer, DataSource(path=str(tmp_path / "src/**/*.py")))

    assert decode(tokenizer, rows) == "def f():\n\n    return 1\n<eos>x = 2\n<eos>"


def test_code_is_read_from_its_column_when_compressed(tmp_path, tokenizer):
    """The shape of StarCoderData and of The Stack: `content`, beside columns about the file."""
    path = tmp_path / "data/python-0001.jsonl.gz"
    path.parent.mkdir()
    rows = [
        {"max_stars_count": 3, "content": "print(1)\n"},
        {"max_stars_count": None, "content": ""},
    ]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

    assert decode(tokenizer, load(tokenizer, DataSource(path=str(path), text="content"))) == (
        "print(1)\n<eos>"
    )


@pytest.mark.parametrize("suffix", [".tsv", ".parquet", ".csv"])
def test_topv2_learns_the_parse_alone_when_read_in_its_formats(tmp_path, tokenizer, suffix):
    """TOPv2 is distributed as TSV, quotes and all; on the hub its columns have the same names."""
    columns = ("domain", "utterance", "semantic_parse")
    path = tmp_path / f"alarm_train{suffix}"
    table = datasets.Dataset.from_list([dict(zip(columns, row, strict=True)) for row in TOPV2])
    if suffix == ".tsv":
        write(path, "\n".join("\t".join(row) for row in [columns, *TOPV2]) + "\n")
    elif suffix == ".csv":
        table.to_csv(path)
    else:
        table.to_parquet(path)
    source = DataSource(
        path=str(path), split="eval", prompt="{utterance}\n", completion="{semantic_parse}"
    )

    rows = load(tokenizer, source, seq_len=100, packing=False)

    for row, (_, utterance, answer) in zip(rows, TOPV2, strict=True):
        assert tokenizer.decode(row["input_ids"]) == f"{utterance}\n{answer}<eos>"
        assert row["labels"].count(-100) == len(utterance) + 1
        assert decode(tokenizer, [row]) == f"{answer}<eos>"


def test_template_takes_a_part_of_a_column_when_it_is_nested(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", '{"q": "why", "answers": {"text": ["so"]}}\n')
    source = DataSource(path=path, prompt="{q}?", completion="{answers[text][0]}")

    assert decode(tokenizer, load(tokenizer, source)) == "so<eos>"


def test_rows_are_cut_and_dropped_when_longer_than_the_limit(tmp_path, tokenizer):
    rows = [{"q": "12", "a": "345678"}, {"q": "123456", "a": "7"}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(path=path, prompt="{q}", completion="{a}")

    rows = load(tokenizer, source, seq_len=5, packing=False)

    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["12345"]


def test_special_tokens_are_there_once_when_the_tokenizer_adds_its_own(tmp_path, tokenizer):
    class Wrapping:
        """Adds a token at the start and the end, as some tokenizers do."""

        eos_token_id = EOS_TOKEN_ID

        def __call__(self, texts, add_special_tokens=True, verbose=True):
            ids = tokenizer(texts)["input_ids"]
            return {"input_ids": [[1, *i, EOS_TOKEN_ID] if add_special_tokens else i for i in ids]}

    path = write(tmp_path / "a.jsonl", json.dumps({"text": "ab", "q": "c", "a": "d"}) + "\n")
    a, b, c, d = (tokenizer(letter)["input_ids"][0] for letter in "abcd")

    (text,) = load(Wrapping(), DataSource(path=path), seq_len=4)
    (pair,) = load(Wrapping(), DataSource(path=path, prompt="{q}", completion="{a}"), seq_len=4)

    assert text["input_ids"] == [1, a, b, EOS_TOKEN_ID]
    assert pair["input_ids"] == [1, c, d, EOS_TOKEN_ID]
    assert pair["labels"] == [-100, -100, d, EOS_TOKEN_ID]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_come_from_sources_by_weight_when_weights_are_given(tmp_path, tokenizer, streaming):
    sources = [
        DataSource(path=write(tmp_path / f"{letter}.txt", letter * 8 * 300), weight=weight)
        for letter, weight in (("a", 3.0), ("b", 1.0))
    ]
    rows = load(tokenizer, *sources, streaming=streaming)

    firsts = [tokenizer.decode(row["input_ids"])[0] for row in rows][:300]
    assert 0.65 < firsts.count("a") / len(firsts) < 0.85


def test_sources_follow_one_another_when_there_are_no_weights(tmp_path, tokenizer):
    sources = [DataSource(path=write(tmp_path / f"{letter}.txt", letter * 7)) for letter in "ba"]

    assert decode(tokenizer, load(tokenizer, *sources)) == "bbbbbbb<eos>aaaaaaa<eos>"


def test_changed_file_is_read_anew_when_its_path_is_the_same(tmp_path, tokenizer):
    source = DataSource(path=write(tmp_path / "a.txt", "one"))
    load(tokenizer, source)
    write(tmp_path / "a.txt", "another")

    assert decode(tokenizer, load(tokenizer, source)) == "another<eos>"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "/nowhere/*.txt"}, "path is '/nowhere/.*.txt', and there is no such file"),
        ({"path": "missing.jsonl"}, "path is 'missing.jsonl', and there is no such file"),
        ({"path": "mixed/*"}, "files are of several kinds \\(text, json\\); give a source to each"),
        ({"text": "body"}, "text is 'body'; it must be one of .* columns, text, n"),
        ({"prompt": "{x}", "completion": "{n}"}, "prompt is '{x}'; it must name columns"),
        ({"prompt": "{n}", "completion": "{"}, "completion is '{'; its braces do not match"),
        ({"prompt": "{n}", "completion": "{}"}, "completion is '{}'; it must name columns"),
        ({"path": "broken.jsonl"}, "path is 'broken.jsonl', which cannot be read: "),
    ],
)
def test_load_names_what_is_wrong_when_files_or_columns_are_missing(
    tmp_path, tokenizer, source, message, monkeypatch
):
    path = write(tmp_path / "a.jsonl", '{"text": "x", "n": 1}\n')
    write(tmp_path / "mixed/a.py", "x")
    write(tmp_path / "mixed/b.jsonl", "{}")
    write(tmp_path / "broken.jsonl", '{"text": "x"}\n{"text": \n')
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match=message):
        load(tokenizer, DataSource(**{"path": path, **source}))


def test_load_refuses_a_tokenizer_without_an_end_of_text_token(tmp_path, tokenizer):
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)

    with pytest.raises(ValueError, match="no eos_token"):
        load(bare, DataSource(path=write(tmp_path / "a.txt", "x")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": []}, r"train is \[\]; it must be a list of at least 1"),
        ({"seq_len": 0}, "seq_len is 0; it must be an integer of at least 2"),
        ({"seq_len": 1}, "seq_len is 1; it must be an integer of at least 2"),
        ({"num_processes": 0}, "num_processes is 0"),
        ({"train": [{"path": "a", "weight": 1.0}, {"path": "b"}]}, r"weights \[1.0, None\]"),
        ({"train": [{"path": "a"}, {"path": "b"}], "streaming": True}, "weights"),
    ],
)
def test_data_config_names_the_field_when_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        parse(DataConfig, {"train": [{"path": "a"}], "seq_len": 8, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "{a}"}, "prompt is '{a}' and completion is None"),
        ({"weight": 0.0}, "weight is 0.0; it must be a number above 0"),
    ],
)
def test_data_source_names_the_field_when_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        parse(DataSource, {"path": "a", **settings})


def test_collate_fills_up_on_the_right_when_lengths_differ():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]

    batch = collate(rows, filler_id=9)

    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_collate_makes_no_mask_when_lengths_are_the_same():
    rows = [{"input_ids": [5], "labels": [5]}] * 2

    assert set(collate(rows, filler_id=9)) == {"input_ids", "labels"}
