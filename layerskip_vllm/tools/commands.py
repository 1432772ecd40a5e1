"""The command `layerskip-vllm`: what an operator runs, each of its subcommands a pydantic model.

This imports all of them to know their options, but nothing heavy: that is for them to do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from layerskip_vllm import __version__
from layerskip_vllm.tools.bench.command import BenchCommand
from layerskip_vllm.tools.command_line import Command
from layerskip_vllm.tools.doctor.command import DoctorCommand
from layerskip_vllm.tools.draft_vocab.command import DraftVocabCommand
from layerskip_vllm.tools.exits.command import ExitsCommand
from layerskip_vllm.tools.soak.command import SoakCommand
from layerskip_vllm.tools.train import TrainCommand
from layerskip_vllm.tools.tune.command import TuneCommand
from layerskip_vllm.tools.verify.command import VerifyCommand
from layerskip_vllm.tools.watch.command import WatchCommand

COMMANDS: Mapping[str, type[Command]] = {
    "bench": BenchCommand,
    "doctor": DoctorCommand,
    "draft-vocab": DraftVocabCommand,
    "exits": ExitsCommand,
    "soak": SoakCommand,
    "train": TrainCommand,
    "tune": TuneCommand,
    "verify": VerifyCommand,
    "watch": WatchCommand,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand: return its exit status, or 2 on an error, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="layerskip-vllm", description="LayerSkip self-speculative decoding for vLLM."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        command.add_parser(subparsers, name)
    args = parser.parse_args(argv)
    chosen: type[Command] = args.command
    try:
        return chosen.parse(args).run()
    except KeyboardInterrupt:
        return 130
    except (ImportError, ValueError, OSError) as error:
        if args.debug or (isinstance(error, ImportError) and chosen.extra is None):
            raise
        message = str(error) or repr(error)
        if isinstance(error, ImportError):
            extra = f"pip install 'layerskip-vllm[{chosen.extra}]'"
            message += f"; install what this command needs: {extra}"
    print(f"error: {message}", file=sys.stderr)
    return 2
