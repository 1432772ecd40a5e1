"""Where commands and benchmarks write: the terminal and JSON files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def make_console() -> Console:
    """Return a console for stdout; a file gets lines that are long enough for every table."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def make_progress(console: Console) -> Progress:
    """Return bars with the steps done and the time that the rest will take."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description:>13}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def describe_duration(seconds: float) -> str:
    """Say a time as people do: "40 seconds", "3 minutes"."""
    if seconds < 90:
        return f"{round(seconds)} seconds"
    return f"{round(seconds / 60)} minutes"


def write_json(path: Path, content: Any) -> None:
    """Write an object as JSON that people can read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
