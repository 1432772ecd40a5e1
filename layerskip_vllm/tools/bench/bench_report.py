"""What `layerskip-vllm bench` prints and writes: this run's line over the paper's."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from layerskip_vllm.tools.bench.samples import TaskSample
from layerskip_vllm.tools.bench.scoring import Scores, mean_scores
from layerskip_vllm.tools.bench.tasks import TASKS, PaperResult
from layerskip_vllm.tools.bench.turns import LAYERSKIP, PLAIN, RUNS, TaskRun
from layerskip_vllm.tools.hardware import describe_hardware


@dataclass(frozen=True)
class BenchReport:
    """All that a run of a task gave."""

    task: str
    model: str
    setting: Mapping[str, int]
    num_read: int  # samples, before those were left out that do not fit
    samples: Sequence[TaskSample]
    runs: Mapping[str, TaskRun]
    scores: Mapping[str, Scores]

    @property
    def speedup(self) -> float:
        """The ratio of the mean times per token, the paper's measure."""
        return self.runs[PLAIN].seconds_per_token / self.runs[LAYERSKIP].seconds_per_token

    @property
    def num_same_tokens(self) -> int:
        """Samples whose tokens are the same with and without drafts."""
        pairs = zip(self.runs[PLAIN].token_ids, self.runs[LAYERSKIP].token_ids, strict=True)
        return sum(plain == drafted for plain, drafted in pairs)

    @property
    def num_same_scores(self) -> int:
        """Samples whose scores are, all of them."""
        plain, drafted = (
            list(zip(*self.scores[run].values(), strict=True)) for run in (PLAIN, LAYERSKIP)
        )
        return sum(here == there for here, there in zip(plain, drafted, strict=True))

    def build_table(self) -> Table:
        """Lay this run out over the paper's lines for the task, in its columns."""
        task = TASKS[self.task]
        names = list(self.scores[PLAIN])
        table = Table(
            title=f"{task.title}: plain vLLM and layerskip, over the paper's tables",
            caption=self._describe_setting(),
            caption_justify="left",
        )
        table.add_column("model")
        headings = ("E", "K", *names, "tokens/s", "speed-up", "accepted")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        means = {run: mean_scores(self.scores[run]) for run in RUNS}
        facts = self.runs[LAYERSKIP].facts
        acceptance = self.runs[LAYERSKIP].acceptance
        table.add_row(
            Path(self.model).name,
            str(facts.exit_layer),
            facts.length,
            *(_arrow((means[PLAIN][name], means[LAYERSKIP][name]), 3) for name in names),
            _arrow((self.runs[PLAIN].tokens_per_s, self.runs[LAYERSKIP].tokens_per_s), 1),
            f"{self.speedup:.2f}",
            "-" if acceptance is None else f"{acceptance:.1%}",
            style="bold",
            end_section=True,
        )
        for line in task.paper:
            table.add_row(*_list_paper_cells(line, names, task.paper_score))
        return table

    def describe(self) -> str:
        """Say in how many samples the two agree."""
        num = len(self.samples)
        return (
            f"The tokens are the same in {self.num_same_tokens} of {num} samples, the scores in "
            f"{self.num_same_scores}"
        )

    def _describe_setting(self) -> str:
        facts = self.runs[LAYERSKIP].facts
        left_out = self.num_read - len(self.samples)
        words = f", {left_out} more did not fit into the context" if left_out else ""
        at_once = self.setting["batch_size"]
        requests = "one request" if at_once == 1 else f"{at_once} requests"
        return (
            f"{len(self.samples)} samples of at most {self.setting['max_tokens']} tokens{words}; "
            f"{requests} at once (the paper: one), greedy, prefill included; {facts.dtype}, Model "
            f"Runner {facts.runner}, {describe_hardware()}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON object, every completion with its scores too."""
        runs = {
            name: {
                "scores": mean_scores(self.scores[name]),
                "tokens_per_s": run.tokens_per_s,
                "seconds_per_token": run.seconds_per_token,
                "acceptance": run.acceptance,
                "runner": run.facts.runner,
                "exit_layer": run.facts.exit_layer,
                "num_speculative_tokens": run.facts.num_speculative_tokens,
                "length": run.facts.length,
            }
            for name, run in self.runs.items()
        }
        samples = [
            {
                "name": sample.name,
                **{
                    name: {
                        "completion": run.texts[at],
                        "num_tokens": len(run.token_ids[at]),
                        "scores": {key: values[at] for key, values in self.scores[name].items()},
                    }
                    for name, run in self.runs.items()
                },
            }
            for at, sample in enumerate(self.samples)
        ]
        packages = ("layerskip-vllm", "vllm", "torch", "transformers")
        return {
            "task": self.task,
            "model": self.model,
            "setting": {**self.setting, "dtype": self.runs[PLAIN].facts.dtype},
            "hardware": describe_hardware(),
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in packages},
            "speedup": self.speedup,
            "num_samples": len(self.samples),
            "num_left_out": self.num_read - len(self.samples),
            "num_same_tokens": self.num_same_tokens,
            "num_same_scores": self.num_same_scores,
            "runs": runs,
            "samples": samples,
        }


def _list_paper_cells(line: PaperResult, names: Sequence[str], paper_score: str) -> list[str]:
    scores = [
        _arrow(line.scores, 3) if line.scores and name == paper_score else "-" for name in names
    ]
    return [
        f"paper, Table {line.table}: {line.model}, {line.device}",
        str(line.exit_layer),
        "-" if line.num_speculative_tokens is None else str(line.num_speculative_tokens),
        *scores,
        _arrow(line.tokens_per_s, 1),
        f"{line.speedup:.2f}",
        f"{line.acceptance:.1%}",
    ]


def _arrow(values: tuple[float, float], decimals: int) -> str:
    plain, drafted = values
    return f"{plain:.{decimals}f} → {drafted:.{decimals}f}"
