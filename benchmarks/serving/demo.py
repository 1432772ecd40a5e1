"""`make demo`: what layerskip gains one request and many, beside plain `vllm serve`.

Prints a headline and a table, writes a PNG and JSON. Exits with 1 when a token differs, with 2 on
an error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks.serving.comparison import Comparison, compare_rounds
from benchmarks.serving.picture import make_demo_figure
from benchmarks.serving.report import (
    RunSetting,
    build_table,
    comparisons_to_json,
    describe_gains,
    is_every_token_same,
)
from benchmarks.serving.rounds import ProgressBar, ask, measure_in_turns
from benchmarks.serving.vllm_command import (
    LAYERSKIP,
    PLAIN,
    build_commands,
    build_env,
    resolve_vllm,
)
from layerskip_vllm.tools.float32 import float32_env
from layerskip_vllm.tools.hardware import describe_hardware, list_gpu_names
from layerskip_vllm.tools.output import make_console, write_json
from layerskip_vllm.tools.prompts import held_out_prompts
from layerskip_vllm.tools.server.event_stream import StreamError
from layerskip_vllm.tools.server.metrics import LayerSkipInfo, SpecDecodeCounters
from layerskip_vllm.tools.server.process import Server, ServerError

_DEFAULT_MODEL = "checkpoints/stdlib-24l"
_DEFAULT_OUTPUT_DIR = Path("demo-output")
_NUM_WARM_UP_TOKENS = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: Command line without the program's name; the process's own when None.

    Returns:
        The exit status.
    """
    args = parse_args(argv)
    console = make_console()
    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signal_number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(signal_number, _exit_on_signal)
    try:
        comparisons, setting = run(args, console)
    except KeyboardInterrupt:
        console.print("Interrupted; the servers are stopped.")
        return 128 + signal.SIGINT
    except (ServerError, StreamError, aiohttp.ClientError, OSError, ValueError) as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error) or repr(error), markup=False, soft_wrap=True)
        return 2
    is_same = is_every_token_same(comparisons)
    console.print(
        describe_gains(comparisons), style="bold green" if is_same else "bold red", soft_wrap=True
    )
    console.print(build_table(comparisons, setting))
    write_json(args.output_dir / "demo.json", comparisons_to_json(comparisons, setting))
    make_demo_figure(comparisons, setting).savefig(args.output_dir / "demo.png")
    console.print(f"Written: {args.output_dir}/demo.png and {args.output_dir}/demo.json")
    return 0 if is_same else 1


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; end the process with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.demo",
        description="Compares `vllm serve` with and without layerskip on held-out prompts.",
        epilog="Arguments after -- go to both servers, such as: -- --enforce-eager",
    )
    add = parser.add_argument
    add("--model", default=_DEFAULT_MODEL, help="path or Hugging Face name")
    add("--exit-layer", type=_positive_int, help="default: the checkpoint's own")
    add("--num-speculative-tokens", type=_positive_int, help="default: the checkpoint's own")
    add("--dtype", default="float32", help="only float32 (default) is exact enough for same tokens")
    add(
        "--concurrency",
        type=_positive_int,
        nargs="+",
        default=[1, 8],
        help="requests at once; several numbers are measured one after another (default: 1 8)",
    )
    add("--num-prompts", type=_positive_int, default=16, help="prompts a round")
    add("--max-tokens", type=_positive_int, default=96, help="most tokens a completion")
    add("--rounds", type=_positive_int, default=3, help="rounds on each server")
    add("--output-dir", type=Path, default=_DEFAULT_OUTPUT_DIR)
    add("vllm_args", nargs="*", metavar="-- VLLM_ARGS")
    return parser.parse_args(argv)


def _positive_int(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be an integer of at least 1.")
    return int(text)


def _exit_on_signal(signal_number: int, frame: FrameType | None) -> None:
    sys.exit(128 + signal_number)  # unwinds the `with` blocks, which stop the servers


def run(args: argparse.Namespace, console: Console) -> tuple[list[Comparison], RunSetting]:
    """Start both servers, send the rounds and stop the servers.

    Args:
        args: The command line, parsed.
        console: Where progress is shown.

    Returns:
        What came out for each number of requests, and of what.

    Raises:
        ServerError: If a server does not start or ends early.
        StreamError: If a request fails.
        ValueError: If the model or the number of prompts does not fit, or nothing was drafted.
    """
    if args.model.startswith((".", "/")) and not Path(args.model).is_dir():
        raise ValueError(
            f"--model is {args.model!r}, which is no folder (seen from {Path.cwd()}); it must be "
            "a folder with a checkpoint or a Hugging Face name."
        )
    most = max(args.concurrency)
    num_prompts = args.num_prompts * args.rounds * len(args.concurrency)
    # Every round has prompts of its own, so that none is in the prefix cache.
    prompts = held_out_prompts(num_prompts + most)
    commands = build_commands(
        args.model, args.dtype, args.exit_layer, args.num_speculative_tokens, args.vllm_args
    )
    bar = ProgressBar(console)
    with bar.progress, ExitStack() as stack:
        stack.callback(bar.say, "done")
        servers = {name: _make_server(args, name, command) for name, command in commands.items()}
        stack.callback(_stop, servers, bar)
        _start(servers, bar)
        drafting = _read_info(servers[LAYERSKIP])
        bar.expect(2 * (num_prompts * args.max_tokens + most * _NUM_WARM_UP_TOKENS))
        for name, server in servers.items():
            bar.say(f"warming up the {name} server")
            ask(server, prompts[num_prompts:], _NUM_WARM_UP_TOKENS, most, bar.advance)
        comparisons = []
        for index, concurrency in enumerate(args.concurrency):
            own = prompts[index : num_prompts : len(args.concurrency)]
            by_round = [own[round_ :: args.rounds] for round_ in range(args.rounds)]
            comparisons.append(_measure(servers, by_round, args.max_tokens, concurrency, bar))
    return comparisons, _describe_run(args, drafting, commands)


def _make_server(args: argparse.Namespace, name: str, command: Sequence[str]) -> Server:
    env = build_env(name, args.model, is_gpu=bool(list_gpu_names()))
    env |= float32_env(args.dtype)
    return Server(name, resolve_vllm(command), args.output_dir / f"{name}.log", env)


def _start(servers: Mapping[str, Server], bar: ProgressBar) -> None:
    """Start all servers at the same time: most of a start is one thread's work."""
    logs = ", ".join(str(server.log_path) for server in servers.values())
    bar.say(f"starting both servers; their logs: {logs}")
    for server in servers.values():
        server.start()
    for server in servers.values():
        server.wait_until_up()


def _stop(servers: Mapping[str, Server], bar: ProgressBar) -> None:
    bar.say("stopping the servers")
    with ExitStack() as stack:
        for server in servers.values():
            stack.callback(server.stop)


def _read_info(server: Server) -> LayerSkipInfo:
    info = LayerSkipInfo.read(text_string_to_metric_families(server.fetch("/metrics")))
    if info is None:
        raise ValueError("the layerskip server drafts with nothing: see the end of its log.")
    return info


def _read_counters(server: Server) -> SpecDecodeCounters:
    return SpecDecodeCounters.read(text_string_to_metric_families(server.fetch("/metrics")))


def _measure(
    servers: Mapping[str, Server],
    prompts_by_round: Sequence[Sequence[str]],
    max_tokens: int,
    concurrency: int,
    bar: ProgressBar,
) -> Comparison:
    before = _read_counters(servers[LAYERSKIP])
    rounds = measure_in_turns(servers, prompts_by_round, max_tokens, concurrency, bar)
    counters = _read_counters(servers[LAYERSKIP]) - before
    return compare_rounds(concurrency, rounds[PLAIN], rounds[LAYERSKIP], counters)


def _describe_run(
    args: argparse.Namespace, drafting: LayerSkipInfo, commands: Mapping[str, Sequence[str]]
) -> RunSetting:
    return RunSetting(
        model=args.model,
        drafting=drafting,
        dtype=args.dtype,
        num_prompts=args.num_prompts,
        num_rounds=args.rounds,
        max_tokens=args.max_tokens,
        hardware=describe_hardware(),
        versions={name: importlib.metadata.version(name) for name in ("vllm", "layerskip-vllm")},
        commands={name: shlex.join(command) for name, command in commands.items()},
    )


if __name__ == "__main__":
    sys.exit(main())
