"""`layerskip-vllm verify MODEL`: does speculation lose anything here?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field
from typing_extensions import override

from layerskip_vllm.tools.command_line import Command, Option
from layerskip_vllm.tools.engine_options import EngineOptions
from layerskip_vllm.tools.output import make_console, write_json
from layerskip_vllm.tools.prompts import choose_prompts


class VerifyConfig(EngineOptions):
    """The engines to compare and what to ask of them."""

    model: Annotated[str, Option(metavar="MODEL", is_positional=True)] = Field(
        description="a checkpoint's folder or name"
    )
    num_prompts: int = Field(
        default=16,
        ge=1,
        description="prompts to complete greedily, the first four of which are sampled from too",
    )
    num_prompt_tokens: int = Field(default=64, ge=1, description="most tokens of a prompt")
    max_tokens: int = Field(default=64, ge=1, description="tokens of a greedy completion")
    num_samples: int = Field(
        default=400,
        ge=100,  # fewer say nothing of a distribution
        description="samples of each prompt that is sampled from",
    )


class VerifyCommand(Command, VerifyConfig):
    """Check that speculation loses nothing on a model and this machine.

    Run plain vLLM twice, layerskip, and layerskip with verification taken out, one after the other,
    and compare greedy tokens and sampled distributions. The exit status is 0 if layerskip differs
    from plain vLLM by no more than plain vLLM from itself, 1 if not or if the check would not have
    seen it, 2 on an error.
    """

    summary: ClassVar = "check that speculation loses nothing on a model and this machine"
    extra: ClassVar = "verify"

    data: Annotated[tuple[str, ...], Option(metavar="FILE_OR_FOLDER")] = Field(
        default=(),
        description="texts to cut prompts from, in the place of the built-in ones: text files, "
        ".jsonl files whose objects have a 'text', or folders of them",
    )
    output_dir: Path = Field(
        default=Path("verify-output"), description="where verify.json and each run's log go"
    )

    @override
    def run(self) -> int:
        from layerskip_vllm.tools.text import read_documents
        from layerskip_vllm.tools.verify import runs
        from layerskip_vllm.tools.verify.comparison import conclude
        from layerskip_vllm.tools.verify.verdict_report import build_verdict_table, verdict_to_json

        config = self.model_copy(update={"speculative": self.join_speculative_settings()})
        documents = read_documents(self.data) if self.data else None
        prompts = choose_prompts(documents, config.num_prompts, config.num_prompt_tokens)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        console = make_console()
        with console.status("starting") as status:

            def track(name: str) -> None:
                words = f"run {runs.RUNS.index(name) + 1} of {len(runs.RUNS)}: {name}"
                status.update(words)
                console.print(words)

            results = runs.run_all(config, prompts, self.output_dir, track)
        verdict = conclude(results)
        drafted = results[runs.DRAFTED]
        write_json(self.output_dir / "verify.json", verdict_to_json(config, drafted, verdict))
        console.print(build_verdict_table(config, drafted, verdict))
        for problem in verdict.problems:
            console.print(f"[bold red]{problem}.[/]", soft_wrap=True)
        if not verdict.problems:
            console.print("[bold green]layerskip loses nothing here.[/]", soft_wrap=True)
        console.print(f"Written: {self.output_dir}/verify.json", soft_wrap=True)
        return 1 if verdict.problems else 0
