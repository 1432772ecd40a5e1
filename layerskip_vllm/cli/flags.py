"""The flags that `vllm serve` gains: spellings of vLLM's speculative options, and the exit layer.

Called in the process that parses the command line.
"""

from __future__ import annotations

import argparse

from layerskip_vllm.config import METHOD

EXIT_LAYER_FLAG = "--spec-exit-layer"


def add_speculative_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add layerskip's flags to a parser that has vLLM's engine arguments."""
    for action in parser._actions:
        choices = action.choices
        if "--spec-method" in action.option_strings and choices is not None:
            action.choices = [*choices, *({METHOD} - set(choices))]
    group = parser.add_argument_group(
        "LayerSkip", "Self-speculative decoding: the model's first layers draft, all verify."
    )
    group.add_argument(
        "--speculative-model",
        dest="spec_model",
        default=argparse.SUPPRESS,
        help="The same as --spec-model; `layerskip` drafts with the model's own first layers.",
    )
    group.add_argument(
        "--num-speculative-tokens",
        dest="spec_tokens",
        type=int,
        default=argparse.SUPPRESS,
        help="The same as --spec-tokens: K, the tokens drafted for each verification.",
    )
    group.add_argument(
        EXIT_LAYER_FLAG,
        type=int,
        default=None,
        help="E, the number of layers that draft. Default: the checkpoint's own setting.",
    )
    return parser


def fold_exit_layer(args: argparse.Namespace) -> argparse.Namespace:
    """Move the exit layer from its flag into the speculative config, which vLLM carries on.

    Args:
        args: The parsed command line; left as it is.

    Returns:
        `args`, or a copy of them with the exit layer moved.

    Raises:
        ValueError: If the flag is given without layerskip, or against the speculative config.
    """
    exit_layer = getattr(args, "spec_exit_layer", None)
    if exit_layer is None:
        return args
    config = dict(getattr(args, "speculative_config", None) or {})
    given = (
        getattr(args, "spec_method", None),
        getattr(args, "spec_model", None),
        config.get("method"),
        config.get("model"),
    )
    if METHOD not in given:
        raise ValueError(
            f"{EXIT_LAYER_FLAG} is {exit_layer}, but the speculative method is not layerskip; "
            "add --speculative-model=layerskip or leave the flag out."
        )
    if "exit_layer" in config or "exit-layer" in config:
        raise ValueError(
            f"{EXIT_LAYER_FLAG} and --speculative-config['exit_layer'] are mutually exclusive"
        )
    return argparse.Namespace(
        **{**vars(args), "speculative_config": {**config, "exit_layer": exit_layer}}
    )
