"""Asks servers in turn, round by round, under a progress bar that says what is being done.

All servers are up at the same time, so a machine that gets slower or faster meanwhile does so for
each of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.serving.client import Round, complete_round, ignore_tokens
from benchmarks.serving.comparison import describe_load
from benchmarks.serving.vllm_command import SERVED_MODEL_NAME
from layerskip_vllm.tools.server.event_stream import StreamError
from layerskip_vllm.tools.server.process import Server

# A server's worker looks for work in a busy loop for a second after its last step.
_REST_S = 1.2


class ProgressBar:
    """One bar for the whole run: it moves by tokens, and its words say what is being done."""

    def __init__(self, console: Console) -> None:
        """Prepare the bar; it shows in a `with` block of its `progress`.

        Args:
            console: Where it is shown.
        """
        self.progress = Progress(
            BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console
        )
        self._task = self.progress.add_task("", total=None)

    def say(self, what: str) -> None:
        """Say what is being done."""
        self.progress.update(self._task, description=what)

    def expect(self, num_tokens: int) -> None:
        """Set how many tokens there are to come at most."""
        self.progress.update(self._task, total=num_tokens)

    def advance(self, num_tokens: int) -> None:
        """Count tokens that came, or that will not come."""
        self.progress.advance(self._task, num_tokens)


def ask(
    server: Server,
    prompts: Sequence[str],
    max_tokens: int,
    concurrency: int,
    on_tokens: Callable[[int], None] = ignore_tokens,
) -> Round:
    """Send one round of prompts to one server.

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
    bar: ProgressBar,
) -> dict[str, list[Round]]:
    """Send every round to every server; raises what `ask` raises.

    Args:
        servers: The servers by name; each round starts with the next one of them.
        prompts_by_round: The rounds' prompts.
        max_tokens: Most tokens to generate a prompt.
        concurrency: How many requests are open at once.
        bar: Where progress is shown.

    Returns:
        The rounds by the server's name, in order.
    """
    names = list(servers)
    rounds: dict[str, list[Round]] = {name: [] for name in names}
    for index, prompts in enumerate(prompts_by_round):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            load = describe_load(concurrency)
            bar.say(f"{load}: round {index + 1} of {len(prompts_by_round)}, {name}")
            time.sleep(_REST_S)
            round_ = ask(servers[name], prompts, max_tokens, concurrency, bar.advance)
            rounds[name].append(round_)
            bar.advance(max_tokens * len(prompts) - round_.num_tokens)  # ended at the EOS token
    return rounds
