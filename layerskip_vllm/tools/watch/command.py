"""`layerskip-vllm watch URL`: what a running server drafts and accepts, live."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from layerskip_vllm.tools.server.metrics import Sample


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of `layerskip-vllm`."""
    parser = subparsers.add_parser(
        "watch",
        help="show what a running server drafts and accepts, live",
        description="Show a vLLM server's tokens a second, acceptance by position and load, from "
        "its /metrics, until interrupted. The exit status is 2 on an error.",
    )
    add = parser.add_argument
    add("url", metavar="URL", help="the server's address, such as http://127.0.0.1:8000")
    add("--interval", type=float, default=2.0, metavar="S", help="seconds between looks (2)")
    add("--once", action="store_true", help="look at one interval, print it and stop")
    add("--model", help="the served checkpoint's folder, to tell the bound on the speed-up")
    add("--exit-layer", type=int, metavar="E", help="default: as the checkpoint says")
    parser.set_defaults(run=run, extra="watch")


def run(args: argparse.Namespace) -> int:
    """Watch, and return the exit status."""
    from rich.console import Console

    if not args.interval > 0:
        raise ValueError(f"--interval is {args.interval}; it must be above 0 seconds.")
    draft_share = _read_draft_share(args.model, args.exit_layer)
    with contextlib.suppress(KeyboardInterrupt):
        _watch(args, draft_share, Console())
    return 0


def _watch(args: argparse.Namespace, draft_share: float | None, console: Console) -> None:
    from rich.live import Live

    from layerskip_vllm.tools.server.metrics import is_restarted, measure_interval, read_sample
    from layerskip_vllm.tools.watch.view import draw

    first = before = read_sample(args.url)
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            time.sleep(args.interval)
            now = _read_again(args, live)
            if is_restarted(before, now):
                first = before = now
                continue
            since_start = None if before is first else measure_interval(first, now)
            live.update(
                draw(args.url, measure_interval(before, now), since_start, draft_share),
                refresh=True,
            )
            before = now
            if args.once:
                return


def _read_again(args: argparse.Namespace, live: Any) -> Sample:
    """Read a sample; where the server is away for a while, say so and wait for it."""
    from layerskip_vllm.tools.server.metrics import read_sample

    while True:
        try:
            return read_sample(args.url)
        except OSError as error:
            if args.once:
                raise
            live.update(f"{error}; waiting for it", refresh=True)
            time.sleep(args.interval)


def _read_draft_share(model: str | None, exit_layer: int | None) -> float | None:
    """The share of the model's bytes that a draft step reads, from the checkpoint's headers."""
    if model is None:
        if exit_layer is not None:
            raise ValueError("--exit-layer is for --model, which is not given; give both.")
        return None
    from transformers import AutoConfig

    from layerskip_vllm.checkpoint.entry import default_settings
    from layerskip_vllm.checkpoint.weight_shares import read_shares

    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"--model is {model!r}, which is no folder with a config.json in it.")
    config = AutoConfig.from_pretrained(model)
    num_layers = config.get_text_config().num_hidden_layers
    if exit_layer is None:
        exit_layer = default_settings(model, config, num_layers).exit_layer.value
    if not 1 <= exit_layer <= num_layers:
        raise ValueError(f"--exit-layer is {exit_layer}; it must be from 1 to {num_layers}.")
    shares = read_shares(Path(model), num_layers, exit_layer)
    if shares is None:
        raise ValueError(f"--model is {model!r}, which has not all weights in safetensors files.")
    return shares.total
