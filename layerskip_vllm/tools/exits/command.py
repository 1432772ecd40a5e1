"""`layerskip-vllm exits MODEL --data ...`: what each layer can do, and where drafts should exit."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip_vllm.checkpoint.entry import CONFIG_KEY, write_entry
from layerskip_vllm.tools.exits.config import ExitsConfig
from layerskip_vllm.tools.output import make_console, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from layerskip_vllm.tools.exits.report import ExitReport

_HELP = {
    "seq_len": "tokens of a held-out sequence",
    "max_held_out_tokens": "most tokens to measure losses over",
    "num_prompts": "prompts to complete",
    "num_prompt_tokens": "tokens of each",
    "max_tokens": "most tokens of a completion",
    "max_num_speculative_tokens": "K goes from 1 to this",
    "batch_size": "sequences, or prompts, of a forward pass",
}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of `layerskip-vllm`."""
    parser = subparsers.add_parser(
        "exits",
        help="measure every layer of a checkpoint on held-out text, and say where to exit",
        description="Measure every layer of a Hugging Face decoder on held-out text: its loss, "
        "how often it agrees with the last layer, and what drafts from it would gain at best. "
        "Prints two tables and writes exits.json and exits.png. The exit status is 2 on an error, "
        "and 1 if --write-config finds nothing worth writing.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint's folder or name")
    add(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE_OR_FOLDER",
        help="text that the model has not seen: text files, .jsonl files whose objects have a "
        "'text', or folders of them; 'stdlib' for held-out files of Python's standard library",
    )
    add("--output-dir", type=Path, default=Path("exits-output"), help="(exits-output)")
    add("--device", help="such as cpu or cuda:1; default: a GPU if there is one")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="default: auto, the checkpoint's own",
    )
    for field in fields(ExitsConfig):
        option = "--" + field.name.replace("_", "-")
        words = f"{_HELP[field.name]} ({field.default})"
        add(option, type=int, default=field.default, metavar="N", help=words)
    add(
        "--write-config",
        action="store_true",
        help=f"put the best E and K into the checkpoint's config.json, as its {CONFIG_KEY!r} entry",
    )
    parser.set_defaults(run=run, extra="exits")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write, and return the exit status."""
    console = make_console()
    report = _measure(args, console)
    _show(report, args.output_dir, console)
    return _write_config(report, Path(args.model), console) if args.write_config else 0


def _measure(args: argparse.Namespace, console: Console) -> ExitReport:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from layerskip_vllm.tools.exits.measure import (
        describe_setting,
        find_eos_token_ids,
        load_model,
        measure_exits,
    )
    from layerskip_vllm.tools.text import encode_documents, read_documents

    config = ExitsConfig(**{name: getattr(args, name) for name in _HELP})
    if args.write_config and not (Path(args.model) / "config.json").is_file():
        raise ValueError(
            f"MODEL is {args.model!r}, which is no folder with a config.json in it; "
            "--write-config needs one."
        )
    documents = read_documents(args.data)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    text = encode_documents(tokenizer, documents)
    eos_token_ids = find_eos_token_ids(model, tokenizer)
    setting = describe_setting(model, args.data, config)
    with Progress(
        TextColumn("{task.description:>13}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    ) as progress:

        def track(what: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(what, total=total)
            return lambda num: progress.advance(task, num)

        return measure_exits(model, text, eos_token_ids, config, setting, track)


def _show(report: ExitReport, output_dir: Path, console: Console) -> None:
    from layerskip_vllm.tools.exits.picture import draw_exits
    from layerskip_vllm.tools.exits.tables import build_exit_table, build_speedup_table

    write_json(output_dir / "exits.json", report.to_json())
    draw_exits(output_dir / "exits.png", report)
    console.print(build_speedup_table(report))
    console.print(build_exit_table(report))
    console.print(f"{report.describe()}.", style="bold", soft_wrap=True)
    console.print(f"Written: {output_dir}/exits.png and {output_dir}/exits.json", soft_wrap=True)


def _write_config(report: ExitReport, folder: Path, console: Console) -> int:
    if report.entry is None:
        console.print(f"{folder}/config.json is left as it is.")
        return 1
    write_entry(folder, report.entry)
    console.print(f"{folder}/config.json has {CONFIG_KEY!r}: {report.entry}.", soft_wrap=True)
    return 0
