"""The command `layerskip-vllm`: one subcommand a module, and the flags that `vllm serve` gains.

The hook on vLLM's parser imports `flags` from here, so this module imports nothing heavy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from layerskip_vllm import __version__
from layerskip_vllm.tools.doctor import command as doctor
from layerskip_vllm.tools.exits import command as exits
from layerskip_vllm.tools.soak import command as soak
from layerskip_vllm.tools.verify import command as verify
from layerskip_vllm.tools.watch import command as watch
from layerskip_vllm.training import command as train

COMMANDS = (doctor, exits, soak, train, verify, watch)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: The subcommand and its arguments; by default the command line's.

    Returns:
        The exit status: the subcommand's, or 2 on an error, 130 when interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="layerskip-vllm", description="LayerSkip self-speculative decoding for vLLM."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except (ImportError, ValueError, OSError) as error:
        extra = getattr(args, "extra", None)
        if args.debug or (isinstance(error, ImportError) and extra is None):
            raise
        message = str(error) or repr(error)
        if isinstance(error, ImportError):
            message += f"; install what this command needs: pip install 'layerskip-vllm[{extra}]'"
    print(f"error: {message}", file=sys.stderr)
    return 2
