"""`layerskip-vllm tune MODEL --data ...`: the settings that pay on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator
from typing_extensions import override

from layerskip_vllm.checkpoint.entry import CONFIG_KEY, write_entry
from layerskip_vllm.tools.command_line import Command, Option
from layerskip_vllm.tools.engine_options import EngineSettings
from layerskip_vllm.tools.output import make_console, make_progress, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from layerskip_vllm.tools.tune.tune_report import TuneReport

_CHOSEN = {
    "exit_layer": "tune chooses it",
    "num_speculative_tokens": "tune chooses it",
    "num_speculative_tokens_per_batch_size": "tune chooses it",
    "exit_adapter": "tune weighs the plain exits, and an adapter brings its own",
}


class TuneConfig(EngineSettings):
    """What to tune, on which texts, and how engines run."""

    model: Annotated[str, Option(metavar="MODEL", is_positional=True)] = Field(
        description="a checkpoint's folder or name"
    )
    data: Annotated[tuple[str, ...], Option(metavar="FILE_OR_FOLDER")] = Field(
        description="text like what will be served: text files, .jsonl files whose objects have a "
        "'text', or folders of them; 'stdlib' for held-out files of Python's standard library"
    )
    batch_sizes: Annotated[tuple[int, ...], Option(metavar="N")] = Field(
        default=(1, 4, 16), description="requests at once, each of which counts as much as another"
    )
    output_dir: Path = Field(
        default=Path("tune-output"), description="where all files and the engines' logs go"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.batch_sizes) < 1 or len(set(self.batch_sizes)) < len(self.batch_sizes):
            raise ValueError(
                f"batch_sizes is {self.batch_sizes}; it must be different integers of at least 1."
            )
        for key, value in self.given_settings.items():
            if reason := _CHOSEN.get(key):
                raise ValueError(
                    f"speculative_config has {key} {value!r}, but {reason}; leave it out."
                )
        most = self.engine.get("max_num_seqs")
        if most is not None and most < max(self.batch_sizes):
            raise ValueError(
                f"engine_args has max_num_seqs {most!r}, but batch_sizes has "
                f"{max(self.batch_sizes)}; it must be at least that."
            )
        return self

    @property
    def given_settings(self) -> dict[str, Any]:
        """The speculative settings that all designs have, as vLLM's names are written."""
        return {key.replace("-", "_"): value for key, value in self.speculative.items()}


class TuneCommand(Command, TuneConfig):
    """Find the settings with which a model drafts fastest on this machine.

    Read all exits over greedy completions of the data, time steps of plain vLLM and of layerskip,
    predict from both every exit layer E, K by batch size, reuse of exit states, draft vocabulary
    and lookup, and let the best few take turns with plain vLLM. Prints what was tried, and writes
    tune.json, tune.png and speculative_config.json, which --speculative-config takes. The exit
    status is 1 if nothing was faster than plain vLLM, 2 on an error.
    """

    summary: ClassVar = "find the settings with which a model drafts fastest on this machine"
    extra: ClassVar = "exits"

    minutes: float = Field(
        default=10.0,
        gt=0,
        description="how long it may take; what is measured before the first trial is always done",
    )
    write_config: bool = Field(
        default=False,
        description="put the best E and K into the checkpoint's config.json, as its "
        f"{CONFIG_KEY!r} entry",
    )

    @override
    def run(self) -> int:
        from layerskip_vllm.tools.tune.picture import draw_tuning
        from layerskip_vllm.tools.tune.preparation import prepare_tuner
        from layerskip_vllm.tools.tune.tune_report import TuneReport

        start_s = time.monotonic()
        if self.write_config and not (Path(self.model) / "config.json").is_file():
            raise ValueError(
                f"MODEL is {self.model!r}, which is no folder with a config.json in it; "
                "--write-config needs one."
            )
        console = make_console()
        with make_progress(console) as progress:

            def track(what: str, total: int) -> Callable[[int], None]:
                task = progress.add_task(what, total=total)
                return lambda num: progress.advance(task, num)

            def say(words: str) -> None:
                console.print(words, soft_wrap=True)

            tuner = prepare_tuner(self, start_s + 60 * self.minutes, track, say)
            tuning = tuner.run()
        seconds = time.monotonic() - start_s
        report = TuneReport(self.model, self.data, tuner.engine, tuner.record, tuning, seconds)
        write_json(self.output_dir / "tune.json", report.to_json())
        draw_tuning(self.output_dir / "tune.png", report)
        console.print(report.build_table())
        console.print(f"{report.describe()}.", style="bold", soft_wrap=True)
        return self._finish(report, console)

    def _finish(self, report: TuneReport, console: Console) -> int:
        """Write what is to be served with."""
        folder = self.output_dir
        file = folder / "speculative_config.json"
        if not report.tuning.outcome.pays:
            file.unlink(missing_ok=True)  # an earlier run's
            console.print(f"Written: {folder}/tune.json, {folder}/tune.png", soft_wrap=True)
            return 1
        write_json(file, report.tuning.settings)
        console.print(f"Written: {folder}/tune.json, {folder}/tune.png and {file}", soft_wrap=True)
        dtype = "" if self.dtype == "auto" else f" --dtype {self.dtype}"
        console.print(
            f'vllm serve {self.model}{dtype} --speculative-config "$(cat {file})"', soft_wrap=True
        )
        if self.write_config:
            write_entry(Path(self.model), report.entry)
            where = f"{self.model}/config.json"
            console.print(f"{where} has {CONFIG_KEY!r}: {report.entry}.", soft_wrap=True)
        return 0
