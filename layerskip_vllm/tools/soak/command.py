"""`layerskip-vllm soak URL`: does a server hold under mixed, broken and hostile traffic?"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip_vllm.tools.output import make_console, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from layerskip_vllm.tools.server.service import Service
    from layerskip_vllm.tools.soak.questions import Question
    from layerskip_vllm.tools.soak.run import Soak, SoakConfig

_MAX_FAULTS_SHOWN = 10


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of `layerskip-vllm`."""
    parser = subparsers.add_parser(
        "soak",
        help="check that a server holds under mixed, broken and hostile traffic",
        description="Send short, long, streamed, sampled, cancelled, malformed and over-long "
        "requests to a running server that nobody else uses; account for each, compare greedy "
        "tokens with plain vLLM's, and check that nothing is left behind. The exit status is 0 if "
        "nothing is wrong, 1 if something is, 2 on an error.",
    )
    add = parser.add_argument
    add("url", metavar="URL", help="the server's address, such as http://127.0.0.1:8000")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--plain", metavar="URL", help="a server without speculation, asked for the right answers"
    )
    source.add_argument(
        "--reference", type=Path, metavar="FILE", help="the right answers, from --record"
    )
    source.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="URL is a server without speculation: write its answers to FILE and stop",
    )
    add("--minutes", type=float, default=30, metavar="M", help="how long to send requests (30)")
    add("--requests", type=int, metavar="N", help="stop after N requests (none)")
    add("--kinds", nargs="+", default=(), metavar="KIND", help="send these kinds alone (all)")
    add("--concurrency", type=int, default=16, metavar="N", help="requests open at once (16)")
    add("--questions", type=int, default=200, metavar="N", help="different greedy ones (200)")
    add("--seed", type=int, default=0, help="of questions and traffic (0)")
    add("--timeout", type=float, default=300, metavar="S", help="seconds for a request (300)")
    add("--max-faults", type=int, default=100, metavar="N", help="stop after N faults (100)")
    add("--pid", type=int, help="the server's process, if it is here, to watch its memory")
    add(
        "--max-growth-mib",
        type=float,
        default=64,
        metavar="MIB",
        help="how much its memory may grow once warm (64)",
    )
    add("--output", type=Path, metavar="FILE", help="write a report in JSON")
    parser.set_defaults(run=run, extra="soak")


def run(args: argparse.Namespace) -> int:
    """Soak or record, and return the exit status."""
    import aiohttp
    import psutil  # noqa: F401  # before an hour of traffic, not after

    console = make_console()
    try:
        return asyncio.run(_soak(args, console))
    except aiohttp.ClientError as error:
        raise OSError(str(error)) from error


async def _soak(args: argparse.Namespace, console: Console) -> int:
    from layerskip_vllm.tools.server.service import inspect
    from layerskip_vllm.tools.soak.reference import write_reference
    from layerskip_vllm.tools.soak.report import (
        build_table,
        describe_checks,
        describe_fault,
        to_json,
    )

    config = _read_config(args)
    for option, path in (("--output", args.output), ("--record", args.record)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{option} is {str(path)!r}, whose folder does not exist; make it.")
    service = await inspect(args.url)
    questions = await _find_questions(args, config, service, console)
    if args.record is not None:
        write_reference(args.record, service, questions)
        console.print(f"Written: {args.record}, {len(questions)} answers", soft_wrap=True)
        return 0
    if service.num_speculative_tokens is None:
        raise ValueError(
            f"the server at {args.url} does not draft with layerskip; start it with "
            "--speculative-model=layerskip, or --record its answers."
        )
    soak = await _send(config, service, questions, console)
    console.print(build_table(soak))
    for fault in soak.tally.faults[:_MAX_FAULTS_SHOWN]:
        console.print(describe_fault(fault), markup=False, soft_wrap=True, style="red")
    for line in describe_checks(soak):
        console.print(line, soft_wrap=True)
    if args.output is not None:
        write_json(args.output, to_json(soak))
        console.print(f"Written: {args.output}", soft_wrap=True)
    return 0 if soak.is_passed else 1


def _read_config(args: argparse.Namespace) -> SoakConfig:
    from layerskip_vllm.tools.soak.run import SoakConfig

    return SoakConfig(
        minutes=args.minutes,
        num_requests=args.requests,
        kinds=tuple(args.kinds),
        concurrency=args.concurrency,
        num_questions=args.questions,
        seed=args.seed,
        timeout_s=args.timeout,
        max_faults=args.max_faults,
        pid=args.pid,
        max_growth_mib=args.max_growth_mib,
    )


async def _find_questions(
    args: argparse.Namespace, config: SoakConfig, service: Service, console: Console
) -> list[Question]:
    """The questions, with plain vLLM's answers where the user says where those are."""
    from layerskip_vllm.tools.server.service import inspect
    from layerskip_vllm.tools.soak.questions import make_questions
    from layerskip_vllm.tools.soak.reference import ask_plain, check_context, read_reference

    if args.reference is not None:
        return read_reference(args.reference, service)
    questions = make_questions(service, config.num_questions, config.seed)
    if args.plain is None and args.record is None:
        return questions
    plain = service if args.plain is None else await inspect(args.plain)
    check_context(plain.url, plain.max_model_len, service)
    num_answers = 0
    with console.status("asking plain vLLM") as status:

        def count() -> None:
            nonlocal num_answers
            num_answers += 1
            status.update(f"asking plain vLLM: {num_answers} of {len(questions)} answers")

        return await ask_plain(plain, questions, config.concurrency, count)


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
            num_sent = sum(row.num_sent for row in soak.tally.rows.values())
            words = f"{num_sent:,} requests, {len(soak.tally.faults)} faults"
            progress.update(bar, completed=soak.seconds, description=words)

        return await run_soak(config, service, questions, show)
