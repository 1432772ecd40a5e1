"""Asks servers in turn, round by round, under a progress bar.

All servers are up at the same time, so a machine that gets slower or faster meanwhile does so for
each of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from benchmarks.serving.client import Round, complete_round, ignore_tokens
from benchmarks.serving.vllm_command import SERVED_MODEL_NAME
from layerskip_vllm.tools.server.event_stream import StreamError
from layerskip_vllm.tools.server.process import Server


def ask(
    server: Server,
    prompts: Sequence[str],
    max_tokens: int,
    concurrency: int,
    on_tokens: Callable[[int], None] = ignore_tokens,
) -> Round:
    """Sends one round of prompts to one server.

    Args:
        server: The server.
        prompts: The round's prompts.
        max_tokens: Most tokens to generate a prompt.
        concurrency: How many requests are open at once.
        on_tokens: Called with the number of new tokens whenever some arrive.

    Returns:
        The round, answered.

    Raises:
        ServerError: If the server has ended; the message has the end of its log.
        StreamError: If a request fails.
        aiohttp.ClientError: If a connection fails though the server runs.
    """
    try:
        return asyncio.run(
            complete_round(
                server.url, SERVED_MODEL_NAME, prompts, max_tokens, concurrency, on_tokens
            )
        )
    except (StreamError, aiohttp.ClientError):
        server.check_alive()
        raise


def measure_in_turns(
    servers: Mapping[str, Server],
    prompts_by_round: Sequence[Sequence[str]],
    max_tokens: int,
    concurrency: int,
    console: Console,
) -> dict[str, list[Round]]:
    """Sends every round to every server.

    Args:
        servers: The servers by name; each round starts with the next one of them.
        prompts_by_round: The rounds' prompts.
        max_tokens: Most tokens to generate a prompt.
        concurrency: How many requests are open at once.
        console: Where the progress bar is shown.

    Returns:
        The rounds by the server's name, in order.

    Raises:
        ServerError: If a server has ended; the message has the end of its log.
        StreamError: If a request fails.
        aiohttp.ClientError: If a connection fails though the server runs.
    """
    names = list(servers)
    rounds: dict[str, list[Round]] = {name: [] for name in names}
    num_tokens_by_round = [max_tokens * len(prompts) for prompts in prompts_by_round]
    with _make_progress(console) as progress:
        tasks = {
            name: progress.add_task(name, total=sum(num_tokens_by_round), speed="")
            for name in names
        }
        for index, prompts in enumerate(prompts_by_round):
            first = index % len(names)
            for name in names[first:] + names[:first]:

                def advance(num_tokens: int, name: str = name) -> None:
                    progress.advance(tasks[name], num_tokens)

                round_ = ask(servers[name], prompts, max_tokens, concurrency, advance)
                rounds[name].append(round_)
                # Completions that ended at the EOS token leave a gap up to the round's most tokens.
                progress.update(
                    tasks[name],
                    completed=sum(num_tokens_by_round[: index + 1]),
                    speed=f"{round_.tokens_per_s:.0f} tokens/s",
                )
    return rounds


def _make_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>9}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[speed]}"),
        console=console,
    )
