"""`layerskip-vllm train [CONFIG]`: train a model, or an adapter of it, for early exit.

What it does is in `layerskip_vllm.training`, which needs the `train` extra.
"""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of `layerskip-vllm`."""
    parser = subparsers.add_parser(
        "train",
        help="train a model for early exit, by a YAML config or a ready recipe",
        description="Train a model for early exit. Run again after it was stopped, it goes on from "
        "its last checkpoint. Without CONFIG it lists the ready recipes. The exit status is 2 on "
        "an error.",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file or a recipe")
    parser.add_argument(
        "assignments",
        nargs="*",
        metavar="KEY=VALUE",
        help="a value to set over the config's, such as training.output_dir=out",
    )
    parser.add_argument("--print", action="store_true", help="print the config's text, to edit it")
    parser.set_defaults(run=run, extra="train")


def run(args: argparse.Namespace) -> int:
    """List, print or train, and return the exit status."""
    from layerskip_vllm.training import run as training_run
    from layerskip_vllm.training import run_config

    if args.config is None:
        for name, title in run_config.list_recipes().items():
            print(f"{name:24} {title}")
        return 0
    if args.print:
        if args.assignments:
            raise ValueError(
                f"--print shows a config as it is written; leave out {' '.join(args.assignments)}."
            )
        print(run_config.read_config_text(args.config), end="")
        return 0
    config = run_config.load_config(args.config, args.assignments)
    trainer = training_run.prepare(config)
    training_run.train(trainer, config)
    if trainer.is_world_process_zero():
        print(training_run.describe_result(trainer, config))
    return 0
