"""`layerskip-vllm soak URL`: does a server hold under mixed, broken and hostile traffic?"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field, model_validator
from typing_extensions import override

from layerskip_vllm.checkpoint.validation import Settings
from layerskip_vllm.tools.command_line import Command, Option
from layerskip_vllm.tools.output import make_console, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from layerskip_vllm.tools.server.service import Service
    from layerskip_vllm.tools.soak.questions import Question
    from layerskip_vllm.tools.soak.run import Soak


class SoakConfig(Settings):
    """How much traffic of which kinds is sent, and what counts as wrong."""

    minutes: Annotated[float, Option(metavar="M")] = Field(
        default=30.0, gt=0, description="how long to send requests"
    )
    num_requests: Annotated[int | None, Option(flag="--requests")] = Field(
        default=None, ge=1, description="stop after so many requests"
    )
    kinds: Annotated[tuple[str, ...], Option(metavar="KIND")] = Field(
        default=(), description="send these kinds alone; all when not given"
    )
    concurrency: int = Field(default=16, ge=1, description="requests open at once")
    num_questions: Annotated[int, Option(flag="--questions")] = Field(
        default=200, ge=10, description="different greedy ones"
    )
    seed: int = Field(default=0, description="of questions and traffic")
    timeout_s: Annotated[float, Option(flag="--timeout", metavar="S")] = Field(
        default=300.0, gt=0, description="seconds for a request"
    )
    max_faults: int = Field(default=100, ge=1, description="stop after so many faults")
    pid: Annotated[int | None, Option(metavar="PID")] = Field(
        default=None, description="the server's process, if it is here, to watch its memory"
    )
    max_growth_mib: Annotated[float, Option(metavar="MIB")] = Field(
        default=64.0, gt=0, description="how much its memory may grow once warm"
    )
    interval_s: Annotated[float, Option(flag="--interval", metavar="S")] = Field(
        default=5.0, gt=0, description="seconds between looks at the server"
    )

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        if not self.kinds:
            return self
        from layerskip_vllm.tools.soak.traffic import KINDS

        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"kinds has {kind!r}; it can have {', '.join(KINDS)}.")
        return self


class SoakCommand(Command, SoakConfig):
    """Send mixed, broken and hostile traffic to a running server that nobody else uses.

    Short, long, streamed, sampled, cancelled, malformed and over-long requests: account for each,
    compare greedy tokens with plain vLLM's, and check that nothing is left behind. The exit status
    is 0 if nothing is wrong, 1 if something is, 2 on an error.
    """

    summary: ClassVar = "check that a server holds under mixed, broken and hostile traffic"
    extra: ClassVar = "soak"

    url: Annotated[str, Option(metavar="URL", is_positional=True)] = Field(
        description="the server's address, such as http://127.0.0.1:8000"
    )
    plain: Annotated[str | None, Option(metavar="URL", excludes="answers")] = Field(
        default=None, description="a server without speculation, asked for the right answers"
    )
    reference: Annotated[Path | None, Option(metavar="FILE", excludes="answers")] = Field(
        default=None, description="the right answers, from --record"
    )
    record: Annotated[Path | None, Option(metavar="FILE", excludes="answers")] = Field(
        default=None,
        description="URL is a server without speculation: write its answers to FILE and stop",
    )
    output: Annotated[Path | None, Option(metavar="FILE")] = Field(
        default=None, description="write a report in JSON"
    )

    @override
    def run(self) -> int:
        import aiohttp
        import psutil  # noqa: F401  # before an hour of traffic, not after

        for option, path in (("--output", self.output), ("--record", self.record)):
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(
                    f"{option} is {str(path)!r}, whose folder does not exist; make it."
                )
        try:
            return asyncio.run(self._soak(make_console()))
        except aiohttp.ClientError as error:
            raise OSError(str(error)) from error

    async def _soak(self, console: Console) -> int:
        from layerskip_vllm.tools.server.service import inspect
        from layerskip_vllm.tools.soak.reference import write_reference
        from layerskip_vllm.tools.soak.soak_report import print_soak, soak_to_json

        service = await inspect(self.url)
        questions = await self._find_questions(service, console)
        if self.record is not None:
            write_reference(self.record, service, questions)
            console.print(f"Written: {self.record}, {len(questions)} answers", soft_wrap=True)
            return 0
        if service.num_speculative_tokens is None:
            raise ValueError(
                f"the server at {self.url} does not draft with layerskip; start it with "
                "--speculative-model=layerskip, or --record its answers."
            )
        soak = await _send(self, service, questions, console)
        print_soak(soak, console)
        if self.output is not None:
            write_json(self.output, soak_to_json(soak))
            console.print(f"Written: {self.output}", soft_wrap=True)
        return 0 if soak.is_passed else 1

    async def _find_questions(self, service: Service, console: Console) -> list[Question]:
        """Make or read questions, with plain vLLM's answers where the user says where those are."""
        from layerskip_vllm.tools.server.service import inspect
        from layerskip_vllm.tools.soak.questions import make_questions
        from layerskip_vllm.tools.soak.reference import ask_plain, check_context, read_reference

        if self.reference is not None:
            return read_reference(self.reference, service)
        questions = make_questions(service, self.num_questions, self.seed)
        if self.plain is None and self.record is None:
            return questions
        plain = service if self.plain is None else await inspect(self.plain)
        check_context(plain.url, plain.max_model_len, service)
        num_answers = 0
        with console.status("asking plain vLLM") as status:

            def count() -> None:
                nonlocal num_answers
                num_answers += 1
                status.update(f"asking plain vLLM: {num_answers} of {len(questions)} answers")

            return await ask_plain(plain, questions, self.concurrency, count)


async def _send(
    config: SoakConfig, service: Service, questions: list[Question], console: Console
) -> Soak:
    """Send the traffic with a bar that shows how far it is."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from layerskip_vllm.tools.soak.run import run_soak

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("soak", total=60 * config.minutes)

        def show(soak: Soak) -> None:
            words = f"{soak.tally.total.num_sent:,} requests, {len(soak.tally.faults)} faults"
            progress.update(bar, completed=soak.seconds, description=words)

        return await run_soak(config, service, questions, show)
