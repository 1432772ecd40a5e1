"""The tasks' prompts, from local files and from what stands in for the hub."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from layerskip_vllm.tools.bench.samples import read_samples
from layerskip_vllm.tools.bench.tasks import TASKS

ARTICLES = [
    {"article": f"Article {n} with {{braces}}.", "highlights": f"First {n} .\nSecond {n} ."}
    for n in range(5)
]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("\n\n".join(map(json.dumps, records)) + "\n")
    return path


def test_cnn_dm_prompt_has_one_solved_example_when_asked_as_in_the_paper(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "cnn.jsonl", ARTICLES)
    samples = read_samples(TASKS["cnn_dm"], data, num_samples=2, num_shots=1)
    assert [sample.prompt for sample in samples] == [
        "Article: Article 0 with {braces}.\nSummary: First 0 .Second 0 .\n\n"
        f"Article: Article {n} with {{braces}}.\nSummary:"
        for n in (1, 3)  # spread evenly over the four that are left
    ]
    assert samples[0].record == ARTICLES[1]


def test_xsum_prompt_is_the_document_alone(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "x.jsonl", [{"document": "Rain.", "summary": "Wet.", "id": 7}])
    (sample,) = read_samples(TASKS["xsum"], data, num_samples=1000, num_shots=0)
    assert sample.prompt == "Article: Rain.\nSummary:"


def test_topv2_is_read_with_its_quotes_when_in_its_own_tsv(tmp_path: Path) -> None:
    data = tmp_path / "alarm_test.tsv"
    parse = '[IN:CREATE_ALARM [SL:ALARM_NAME "wake up ] ]'
    data.write_text(f'domain\tutterance\tsemantic_parse\nalarm\t"wake up" at 7\t{parse}\n')
    (sample,) = read_samples(TASKS["topv2"], data, num_samples=10, num_shots=0)
    assert sample.prompt == '"wake up" at 7\n'
    assert sample.record["semantic_parse"] == parse


def test_humaneval_comes_from_its_package_when_there_is_no_data() -> None:
    samples = read_samples(TASKS["humaneval"], None, num_samples=164, num_shots=0)
    assert [sample.name for sample in samples] == [f"HumanEval/{n}" for n in range(164)]
    assert samples[0].prompt.endswith('    True\n    """\n')


def test_humaneval_has_solved_examples_when_asked() -> None:
    samples = read_samples(TASKS["humaneval"], None, num_samples=164, num_shots=1)
    assert [sample.name for sample in samples] == [f"HumanEval/{n}" for n in range(1, 164)]
    (first,) = read_samples(TASKS["humaneval"], None, num_samples=1, num_shots=0)
    assert all(sample.prompt.startswith(first.prompt) for sample in samples)


def test_compressed_file_is_read(tmp_path: Path) -> None:
    data = tmp_path / "x.jsonl.gz"
    data.write_bytes(gzip.compress(json.dumps({"document": "a", "summary": "b"}).encode()))
    assert len(read_samples(TASKS["xsum"], data, num_samples=5, num_shots=0)) == 1


def test_hub_is_asked_for_test_split_and_shuffled_training_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def load(path: str, config_name: str | None, split: str) -> datasets.Dataset:
        asked.append((path, config_name, split))
        return datasets.Dataset.from_list(ARTICLES)

    monkeypatch.setattr(datasets, "load_dataset", load)
    samples = read_samples(TASKS["cnn_dm"], None, num_samples=1000, num_shots=1)
    assert {ask[2] for ask in asked} == {"test", "train"}
    assert {ask[:2] for ask in asked} == {("abisee/cnn_dailymail", "3.0.0")}
    shot = datasets.Dataset.from_list(ARTICLES).shuffle(seed=42)[0]
    assert samples[0].prompt.startswith(f"Article: {shot['article']}\nSummary: First ")
    assert len(samples) == len(ARTICLES)


def test_error_names_num_shots_when_the_hub_has_fewer_solved_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = datasets.Dataset.from_list(ARTICLES)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    with pytest.raises(ValueError, match="num_shots is 6, with which the data has 5 records as so"):
        read_samples(TASKS["cnn_dm"], None, num_samples=1, num_shots=6)


def test_error_names_local_files_when_the_hub_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match="xsum cannot be read: no route; give a local file with"):
        read_samples(TASKS["xsum"], None, num_samples=1, num_shots=0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"document": "a", "summary": "b"}\n\n{"document": "c"}', r"line 3 of '.*a.js.*"
         r" has no text as 'summary'; it must have document, summary\."),
        ("a.jsonl", '{"document": 1, "summary": "b"}', "line 1 of .* has no text as 'document'"),
        ("a.jsonl", '{"document": ', "line 1 of .* is not JSON"),
        ("a.jsonl", "[]", "line 1 of .* must be a JSON object"),
        ("a.tsv", "document\tsummary\na\tb\nc\n", "line 3 of .* has no text as 'summary'"),
        ("a.tsv", "document\ttitle\na\tb\n", "line 2 of .* has no text as 'summary'"),
        ("a.jsonl", "", "num_shots is 0, with which the data has 0 records as solved examples and"),
        ("a.tsv", f"document\tsummary\n{'a' * 140000}\tb\n", "cannot be read: field larger than"),
        ("a.csv", "document,summary\n", r"a.csv'; it must be a file \(.jsonl, .jsonl.gz"),
        ("a.jsonl.gz", "{}", "a.jsonl.gz', which cannot be read"),
    ],
)  # fmt: skip
def test_data_is_refused_when_something_is_wrong_with_it(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_samples(TASKS["xsum"], tmp_path / name, num_samples=1, num_shots=0)


def test_data_is_refused_when_nothing_is_left_beside_the_solved_example(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "cnn.jsonl", ARTICLES[:1])
    with pytest.raises(
        ValueError, match="num_shots is 1, with which the data has 1 records as solved examples and"
    ):
        read_samples(TASKS["cnn_dm"], data, num_samples=1, num_shots=1)


@pytest.mark.parametrize("is_cut", [True, False])
def test_data_is_refused_when_its_compressed_file_is_cut_or_damaged(
    tmp_path: Path, is_cut: bool
) -> None:
    content = gzip.compress(json.dumps({"document": "a", "summary": "b"}).encode())
    data = tmp_path / "x.jsonl.gz"
    # After a header of ten bytes; 0xff begins a block of a type that there is not.
    data.write_bytes(content[:-12] if is_cut else content[:10] + b"\xff" * 20)
    with pytest.raises(ValueError, match=r"x.jsonl.gz', which cannot be read"):
        read_samples(TASKS["xsum"], data, num_samples=1, num_shots=0)


def test_data_is_refused_when_two_problems_have_one_task_id(tmp_path: Path) -> None:
    record = dict.fromkeys(TASKS["humaneval"].fields, "x")
    data = write_jsonl(tmp_path / "problems.jsonl", [record, record | {"task_id": "y"}, record])
    with pytest.raises(ValueError, match=r"line 5 of '.*' has the task_id 'x', which a line befor"):
        read_samples(TASKS["humaneval"], data, num_samples=3, num_shots=0)
