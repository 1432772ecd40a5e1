"""The user's words: `vllm serve`'s flags and the speculative config, read into one mapping.

Called in the process that parses the command line, and in each that makes a config of engine
arguments. Plain Python: this is read for every engine, also one that does not draft.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs

METHOD = "layerskip"
AUTO = "auto"  # the value of K that leaves it to the engine; "auto:N" at most N

# Layerskip's own settings, and the flags that they have beside vLLM's `--speculative-config`.
FLAG_OF_SETTING = {
    "exit_layer": "--spec-exit-layer",
    "exit_adapter": "--spec-exit-adapter",
    "draft_vocab": "--spec-draft-vocab",
    "reuse_exit_states": "--spec-reuse-exit-states",
    "lookup": "--spec-lookup",
}

# Whether drafts are copied from a request's own text where it repeats.
LOOKUPS = ("off", "auto")


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
        metavar="K",
        type=_read_length,
        default=argparse.SUPPRESS,
        help="The same as --spec-tokens: K, the tokens drafted for each verification; or `auto`, "
        "or `auto:N` with the most: at each step as many as pay.",
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
    group.add_argument(
        "--spec-draft-vocab",
        metavar="FILE",
        default=None,
        help="The tokens that drafts choose among, for a smaller head. Default: all.",
    )
    group.add_argument(
        "--spec-reuse-exit-states",
        metavar="{auto,on,off}",
        default=None,
        help="Whether verification begins at the exit, with what drafting has left there (on a "
        "CPU). Default: off.",
    )
    group.add_argument(
        "--spec-lookup",
        choices=LOOKUPS,
        default=None,
        help="`auto`: drafts are copied where a request's text repeats itself. Default: off.",
    )
    return parser


def _read_length(text: str) -> int | str:
    """Read K from the command line; "auto" is checked with the other settings."""
    if is_auto(text):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of tokens; it must be an integer, '{AUTO}' or '{AUTO}:8'."
        ) from None


def is_auto(num_speculative_tokens: Any) -> bool:
    """Return whether K is left to the engine, in a right form or a wrong one."""
    return isinstance(num_speculative_tokens, str) and num_speculative_tokens.startswith(AUTO)


def check_length(num_speculative_tokens: Any) -> None:
    """Refuse a K that is neither a number nor "auto", with the most that it may be or without."""
    number = num_speculative_tokens
    if isinstance(number, str):
        auto, _, most = number.partition(":")
        if number != AUTO and not (auto == AUTO and most.isdecimal() and int(most) > 0):
            raise ValueError(
                f"num_speculative_tokens is {number!r}; it must be an integer of at least 1, "
                f"'{AUTO}', or '{AUTO}:8', whose 8 is the most that a step drafts."
            )
    else:
        from layerskip_vllm.checkpoint.entry import check_positive_int

        check_positive_int("num_speculative_tokens", number)


def fold_settings(args: argparse.Namespace) -> argparse.Namespace:
    """Move layerskip's own settings from their flags into the speculative config, in place.

    `vllm serve` sends the command line on to its API servers, if there are several, which make
    engine arguments of it before any plugin is loaded. `ValueError` if a flag is given without
    layerskip, or against the speculative config.
    """
    for key, flag in FLAG_OF_SETTING.items():
        name = flag.removeprefix("--").replace("-", "_")
        value = getattr(args, name, None)
        if value is None:
            continue
        config = dict(getattr(args, "speculative_config", None) or {})
        if METHOD not in _names_of_method(args, config):
            raise ValueError(
                f"{flag} is {value}, but the speculative method is not layerskip; "
                "add --speculative-model=layerskip or leave the flag out."
            )
        if key in _with_underscores(config):
            raise ValueError(
                f"{flag} and --speculative-config[{key!r}] are mutually exclusive; leave one out."
            )
        args.speculative_config = {**config, key: value}
        setattr(args, name, None)
    return args


def is_layerskip(args: EngineArgs) -> bool:
    """Return whether layerskip is asked for, by method or by model, in any of vLLM's ways.

    `ValueError` if it is in a form that vLLM would misread.
    """
    given = args.speculative_config
    if isinstance(given, str) and given.casefold() == METHOD:
        raise ValueError(
            f"speculative_config is {given!r}; it must be a dict such as {{'method': '{METHOD}'}}."
        )
    if not isinstance(given, Mapping):
        given = {}
    names = _names_of_method(args, given)
    for name in names:
        if isinstance(name, str) and name != METHOD and name.casefold() == METHOD:
            raise ValueError(f"the speculative method or model is {name!r}; write it {METHOD!r}.")
    if METHOD in names:
        return True
    for key in FLAG_OF_SETTING:
        if key in _with_underscores(given):
            raise ValueError(
                f"{key} is a setting of layerskip alone; add 'method': '{METHOD}' to the "
                f"speculative config {dict(given)!r}, or leave {key} out."
            )
    for value in (args.spec_tokens, _with_underscores(given).get("num_speculative_tokens")):
        if is_auto(value):
            raise ValueError(
                f"num_speculative_tokens is {value!r}, which layerskip alone takes; it must be an "
                f"integer, or the speculative method {METHOD!r}."
            )
    return False


def is_layerskip_config(config: SpeculativeConfig | None) -> bool:
    """Return whether an engine's speculative config is layerskip's."""
    from layerskip_vllm.config.speculative import LayerSkipConfig

    return isinstance(config, LayerSkipConfig)


def read_settings(args: EngineArgs) -> dict[str, Any]:
    """Merge the flags and the speculative config of an engine that asks for layerskip.

    The settings have vLLM's names, without `method` and `model`, which say layerskip. `ValueError`
    if one is given twice, or a method or model besides layerskip.
    """
    settings: dict[str, Any] = {}
    for given, value in (args.speculative_config or {}).items():
        key = str(given).replace("-", "_")
        if key in settings:
            raise ValueError(f"{key} is given twice in the speculative config; give it once.")
        settings[key] = value
    for flag, key, value in (
        ("--spec-method", "method", args.spec_method),
        ("--spec-model", "model", args.spec_model),
        ("--spec-tokens", "num_speculative_tokens", args.spec_tokens),
    ):
        if value is None:
            continue
        if key in settings:
            raise ValueError(f"{flag} and --speculative-config['{key}'] are mutually exclusive")
        settings[key] = value
    method, model = settings.pop("method", None), settings.pop("model", None)
    if method not in (None, METHOD):
        raise ValueError(
            f"method is {method!r} and model is {METHOD!r}; give one of them as {METHOD!r} and "
            "leave the other out."
        )
    if model not in (None, METHOD, args.model):
        raise ValueError(
            f"model is {model!r} in the speculative config, but layerskip drafts with the target "
            f"model itself and loads no other; leave 'model' out or set it to {METHOD!r}."
        )
    # What vLLM writes into the dict when a configuration is built twice from the same arguments.
    settings.pop("target_model_config", None)
    settings.pop("target_parallel_config", None)
    return {key: value for key, value in settings.items() if value is not None}


def _names_of_method(
    args: EngineArgs | argparse.Namespace, config: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Return what may name the method: vLLM takes either flag and either key."""
    flags = (getattr(args, "spec_method", None), getattr(args, "spec_model", None))
    return (*flags, config.get("method"), config.get("model"))


def _with_underscores(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a speculative config whose keys are as vLLM's names are written."""
    return {str(key).replace("-", "_"): value for key, value in config.items()}
