"""`layerskip-vllm exits MODEL --data ...`: what each layer can do, and where drafts should exit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import override

from layerskip_vllm.checkpoint.entry import CONFIG_KEY, write_entry
from layerskip_vllm.checkpoint.validation import Settings
from layerskip_vllm.tools.command_line import Command, Option
from layerskip_vllm.tools.output import (
    describe_duration,
    make_console,
    make_progress,
    write_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from layerskip_vllm.tools.exits.exit_report import ExitReport


class ExitsConfig(Settings):
    """How much is measured."""

    seq_len: int = Field(default=512, ge=1, description="tokens of a held-out sequence")
    max_held_out_tokens: int = Field(
        default=2_048, ge=1, description="most tokens to measure losses over"
    )
    num_prompts: int = Field(default=16, ge=1, description="prompts to complete")
    num_prompt_tokens: int = Field(default=128, ge=1, description="tokens of each")
    max_tokens: int = Field(default=128, ge=1, description="most tokens of a completion")
    max_num_speculative_tokens: int = Field(
        default=8, ge=1, description="K goes from 1 to this, which is below --max-tokens"
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        description="sequences, or prompts, of a forward pass, of which fewer take less memory",
    )

    @model_validator(mode="after")
    def _check_drafts(self) -> Self:
        if self.max_num_speculative_tokens >= self.max_tokens:
            raise ValueError(
                f"max_num_speculative_tokens is {self.max_num_speculative_tokens}; it must be "
                f"below max_tokens, which is {self.max_tokens}, for a draft to fit in."
            )
        return self

    def check_context(self, max_position_embeddings: int | None) -> None:
        """Check that all texts fit into a model's context, if it names its length."""
        if max_position_embeddings is None:
            return
        if self.seq_len > max_position_embeddings:
            raise ValueError(
                f"seq_len is {self.seq_len}; it must be at most {max_position_embeddings}, the "
                "length of the model's context."
            )
        if self.num_prompt_tokens + self.max_tokens > max_position_embeddings:
            raise ValueError(
                f"num_prompt_tokens and max_tokens are {self.num_prompt_tokens} and "
                f"{self.max_tokens}; together they must be at most {max_position_embeddings}, the "
                "length of the model's context."
            )


class ExitsCommand(Command, ExitsConfig):
    """Measure every layer of a Hugging Face decoder on held-out text.

    Its loss, how often it agrees with the last layer, and what drafts from it would gain at best.
    Prints two tables and writes exits.json and exits.png. The exit status is 2 on an error, and 1
    if --write-config finds nothing worth writing.
    """

    summary: ClassVar = (
        "measure every layer of a checkpoint on held-out text, and say where to exit"
    )
    extra: ClassVar = "exits"

    model: Annotated[str, Option(metavar="MODEL", is_positional=True)] = Field(
        description="a checkpoint's folder or name"
    )
    data: Annotated[tuple[str, ...], Option(metavar="FILE_OR_FOLDER")] = Field(
        description="text that the model has not seen: text files, .jsonl files whose objects have "
        "a 'text', or folders of them; 'stdlib' for held-out files of Python's standard library"
    )
    output_dir: Path = Field(
        default=Path("exits-output"), description="where exits.json and exits.png go"
    )
    device: str | None = Field(
        default=None, description="such as cpu or cuda:1; a GPU, if there is one, when not given"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto is the checkpoint's own"
    )
    write_config: bool = Field(
        default=False,
        description="put the best E and K into the checkpoint's config.json, as its "
        f"{CONFIG_KEY!r} entry",
    )

    @override
    def run(self) -> int:
        from layerskip_vllm.tools.exits.picture import draw_exits
        from layerskip_vllm.tools.exits.tables import build_exit_table, build_speedup_table

        console = make_console()
        report = self._measure(console)
        folder = self.output_dir
        write_json(folder / "exits.json", report.to_json())
        draw_exits(folder / "exits.png", report)
        console.print(build_speedup_table(report))
        console.print(build_exit_table(report))
        console.print(f"{report.describe()}.", style="bold", soft_wrap=True)
        console.print(f"Written: {folder}/exits.png and {folder}/exits.json", soft_wrap=True)
        return _write_config(report, Path(self.model), console) if self.write_config else 0

    def _measure(self, console: Console) -> ExitReport:
        from layerskip_vllm.tools.exits import measure
        from layerskip_vllm.tools.text import encode_documents, read_documents

        if self.write_config and not (Path(self.model) / "config.json").is_file():
            raise ValueError(
                f"MODEL is {self.model!r}, which is no folder with a config.json in it; "
                "--write-config needs one."
            )
        documents = read_documents(self.data)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        model, tokenizer = measure.load_decoder(self.model, self.device, self.dtype)
        text = encode_documents(tokenizer, documents)
        eos_token_ids = measure.find_eos_token_ids(model, tokenizer)
        setting = measure.describe_setting(model, self.data, self)
        seconds = measure.estimate_seconds(model, self)
        console.print(f"This takes about {describe_duration(seconds)}.")
        with make_progress(console) as progress:

            def track(what: str, total: int) -> Callable[[int], None]:
                task = progress.add_task(what, total=total)
                return lambda num: progress.advance(task, num)

            return measure.measure_exits(model, text, eos_token_ids, self, setting, track)


def _write_config(report: ExitReport, folder: Path, console: Console) -> int:
    if report.entry is None:
        console.print(f"{folder}/config.json is left as it is.")
        return 1
    write_entry(folder, report.entry)
    console.print(f"{folder}/config.json has {CONFIG_KEY!r}: {report.entry}.", soft_wrap=True)
    return 0
