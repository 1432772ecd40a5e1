"""`make demo`: one set of prompts to `vllm serve`, plain and with layerskip; table, PNG and JSON.

Exits with 1 when a token differs, with 2 on an error.
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

from benchmarks.serving.comparison import Comparison, compare
from benchmarks.serving.picture import draw_comparison
from benchmarks.serving.report import RunSetting, build_table, write_json
from benchmarks.serving.rounds import ask, measure_in_turns
from benchmarks.serving.vllm_command import (
    LAYERSKIP,
    PLAIN,
    build_commands,
    build_env,
    resolve_vllm,
)
from layerskip_vllm.checkpoint.entry import default_settings
from layerskip_vllm.tools.hardware import describe_hardware, list_gpu_names
from layerskip_vllm.tools.prompts import held_out_prompts
from layerskip_vllm.tools.server.event_stream import StreamError
from layerskip_vllm.tools.server.metrics import SpecDecodeCounters
from layerskip_vllm.tools.server.process import Server, ServerError

_DEFAULT_MODEL = "checkpoints/stdlib-24l"
_DEFAULT_OUTPUT_DIR = Path("demo-output")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Args:
        argv: Command line without the program's name; the process's own when None.

    Returns:
        The exit status.
    """
    args = parse_args(argv)
    console = Console()
    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signal_number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(signal_number, _exit_on_signal)
    try:
        comparison, setting = run(args, console)
    except KeyboardInterrupt:
        console.print("Interrupted; the servers are stopped.")
        return 128 + signal.SIGINT
    except (ServerError, StreamError, aiohttp.ClientError, OSError, ValueError) as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error) or repr(error), markup=False, highlight=False, soft_wrap=True)
        return 2
    console.print(build_table(comparison, setting))
    write_json(args.output_dir / "demo.json", comparison, setting)
    draw_comparison(args.output_dir / "demo.png", comparison, setting)
    console.print(f"Written: {args.output_dir}/demo.png and {args.output_dir}/demo.json")
    return 0 if comparison.is_every_token_same else 1


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the process with a message if it is wrong."""
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
    add("--concurrency", type=_positive_int, default=3, help="requests at once")
    add("--num-prompts", type=_positive_int, default=36, help="prompts a round")
    add("--max-tokens", type=_positive_int, default=192, help="most tokens a completion")
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


def run(args: argparse.Namespace, console: Console) -> tuple[Comparison, RunSetting]:
    """Starts both servers, sends the rounds and stops the servers.

    Args:
        args: The command line, parsed.
        console: Where progress is shown.

    Returns:
        What came out, and of what.

    Raises:
        ServerError: If a server does not start or ends early.
        StreamError: If a request fails.
        ValueError: If the model or the number of prompts does not fit, or nothing was drafted.
    """
    num_prompts = args.num_prompts * args.rounds
    # Every round has prompts of its own, so that none is in the prefix cache.
    prompts = held_out_prompts(num_prompts + args.concurrency)
    measured, warm_up = prompts[:num_prompts], prompts[num_prompts:]
    prompts_by_round = [measured[index :: args.rounds] for index in range(args.rounds)]
    commands = build_commands(
        args.model, args.dtype, args.exit_layer, args.num_speculative_tokens, args.vllm_args
    )
    setting = build_setting(args, commands)
    with ExitStack() as stack:
        servers = {}
        for name, command in commands.items():
            server = _prepare_server(args, name, command)
            with console.status(f"Starting the {name} server, log in {server.log_path}"):
                servers[name] = stack.enter_context(server)
                ask(server, warm_up, args.max_tokens, args.concurrency)
        before = _read_counters(servers[LAYERSKIP])
        rounds = measure_in_turns(
            servers, prompts_by_round, args.max_tokens, args.concurrency, console
        )
        counters = _read_counters(servers[LAYERSKIP]) - before
        with console.status("Stopping the servers"):
            stack.close()
    return compare(rounds[PLAIN], rounds[LAYERSKIP], counters), setting


def build_setting(args: argparse.Namespace, commands: Mapping[str, Sequence[str]]) -> RunSetting:
    """Describes the run for the table, the picture and the JSON.

    Args:
        args: The command line, parsed.
        commands: Each server's command.

    Returns:
        The description, with the checkpoint's own settings where the command line has none.

    Raises:
        ValueError: If there is no such model.
    """
    from transformers import AutoConfig

    try:
        hf_config = AutoConfig.from_pretrained(args.model)
    except OSError as error:
        raise ValueError(
            f"--model is {args.model!r}, which is neither a folder with a checkpoint (seen from "
            f"{Path.cwd()}) nor a model that Hugging Face gives out here: {error}"
        ) from error
    num_layers = hf_config.get_text_config().num_hidden_layers
    drafting = default_settings(args.model, hf_config, num_layers)
    return RunSetting(
        model=args.model,
        exit_layer=args.exit_layer or drafting.exit_layer.value,
        num_layers=num_layers,
        num_speculative_tokens=(
            args.num_speculative_tokens or drafting.num_speculative_tokens.value
        ),
        dtype=args.dtype,
        num_prompts=args.num_prompts,
        num_rounds=args.rounds,
        max_tokens=args.max_tokens,
        concurrency=args.concurrency,
        hardware=describe_hardware(),
        versions={
            "vLLM": importlib.metadata.version("vllm"),
            "layerskip-vllm": importlib.metadata.version("layerskip-vllm"),
        },
        commands={name: shlex.join(command) for name, command in commands.items()},
    )


def _prepare_server(args: argparse.Namespace, name: str, command: Sequence[str]) -> Server:
    env = build_env(name, args.model, is_gpu=bool(list_gpu_names()))
    return Server(name, resolve_vllm(command), args.output_dir / f"{name}.log", env)


def _read_counters(server: Server) -> SpecDecodeCounters:
    return SpecDecodeCounters.read(text_string_to_metric_families(server.fetch("/metrics")))


if __name__ == "__main__":
    sys.exit(main())
