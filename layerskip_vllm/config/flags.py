"""The flags that `vllm serve` gains: spellings of vLLM's speculative options, and layerskip's own.

Called in the process that parses the command line.
"""

from __future__ import annotations

import argparse

from layerskip_vllm.config.speculative import METHOD

# Layerskip's own flags and what they are called in the speculative config.
SETTING_OF_FLAG = {"--spec-exit-layer": "exit_layer", "--spec-exit-adapter": "exit_adapter"}


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
        "--spec-exit-layer",
        type=int,
        default=None,
        help="E, the number of layers that draft. Default: the checkpoint's own setting.",
    )
    group.add_argument(
        "--spec-exit-adapter",
        metavar="FOLDER",
        default=None,
        help="An adapter that makes the exit draft better; it brings E and K. Default: none.",
    )
    return parser


def fold_settings(args: argparse.Namespace) -> argparse.Namespace:
    """Move layerskip's own settings from their flags into the speculative config.

    Args:
        args: The parsed command line; left as it is.

    Returns:
        `args`, or a copy of them with the settings moved.

    Raises:
        ValueError: If a flag is given without layerskip, or against the speculative config.
    """
    for flag, setting in SETTING_OF_FLAG.items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"), None)
        if value is not None:
            args = _fold(args, flag, setting, value)
    return args


def _fold(args: argparse.Namespace, flag: str, setting: str, value: object) -> argparse.Namespace:
    config = dict(getattr(args, "speculative_config", None) or {})
    given = (
        getattr(args, "spec_method", None),
        getattr(args, "spec_model", None),
        config.get("method"),
        config.get("model"),
    )
    if METHOD not in given:
        raise ValueError(
            f"{flag} is {value}, but the speculative method is not layerskip; "
            "add --speculative-model=layerskip or leave the flag out."
        )
    if setting in config or setting.replace("_", "-") in config:
        raise ValueError(
            f"{flag} and --speculative-config[{setting!r}] are mutually exclusive; leave one out."
        )
    return argparse.Namespace(**{**vars(args), "speculative_config": {**config, setting: value}})
