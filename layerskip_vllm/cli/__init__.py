"""The command `layerskip-vllm`: one subcommand a module, and the flags that `vllm serve` gains.

The hook on vLLM's parser imports `flags` from here, so this module imports nothing heavy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from layerskip_vllm import __version__
from layerskip_vllm.cli import doctor, exits, soak, train, verify, watch

COMMANDS = (doctor, exits, soak, train, verify, watch)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: The subcommand and its arguments; by default the command line's.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="layerskip-vllm", description="LayerSkip self-speculative decoding for vLLM."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    return args.run(args)
