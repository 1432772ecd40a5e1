"""The one place that reads what the user asks for: `LayerSkipConfig` and its checks.

Built in the API server (or by `LLM`) from `EngineArgs`, then pickled to every other process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from layerskip_vllm.checkpoint.checks import check_positive_int
from layerskip_vllm.checkpoint.entry import DraftSettings, Setting, default_settings
from layerskip_vllm.checkpoint.exit_adapter import read_exit_adapter_config
from layerskip_vllm.config.refusals import check_engine, check_model

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.layerskip")

METHOD = "layerskip"

# What the rejection sampler of Model Runner V1 takes (MAX_SPEC_LEN).
MAX_NUM_SPECULATIVE_TOKENS = 128

# vLLM's speculative settings that mean the same here.
SHARED_SETTINGS = frozenset(
    {
        "num_speculative_tokens",
        "num_speculative_tokens_per_batch_size",
        "draft_sample_method",
        "rejection_sample_method",
        "synthetic_acceptance_rates",
        "synthetic_acceptance_length",
        "use_local_argmax_reduction",
        "enforce_eager",
    }
)
OWN_SETTINGS = ("exit_layer", "exit_adapter")
KNOWN_KEYS = SHARED_SETTINGS | {"method", "model", *OWN_SETTINGS}


@config
class LayerSkipConfig(SpeculativeConfig):
    """Speculative decoding whose draft model is the target's first layers.

    To the rest of vLLM it is a `draft_model` configuration whose draft model is the target itself,
    so that scheduling, lookahead slots, metrics and the rejection sampler are vLLM's own.
    """

    exit_layer: int = 0
    """E, the number of layers that draft: layers [0, E)."""

    exit_adapter: str | None = None
    """The folder of the adapter between the exit and the head, None for the plain exit."""

    def __post_init__(self) -> None:
        """Take the place of vLLM's search for a draft checkpoint: there is none."""
        self.method = "draft_model"
        self.model = self.target_model_config.model
        self.prompt_lookup_min = self.prompt_lookup_max = 0
        # A copy, so that vLLM never takes the target's configuration for a draft's.
        self.draft_model_config = copy.copy(self.target_model_config)
        self.draft_parallel_config = self.target_parallel_config
        self.draft_tensor_parallel_size = self.target_parallel_config.tensor_parallel_size

    @property
    def max_num_new_slots_for_drafting(self) -> int:
        """Draft steps take one token a request, so a batch needs no more room than the target's."""
        return 0

    def compute_hash(self) -> str:
        """Hash what shapes the compiled graphs: the target's factors and where drafting exits.

        An exit adapter comes after the compiled stage, whose graph is the same with it and without.
        """
        return f"{super().compute_hash()}-exit{self.exit_layer}"

    def __repr__(self) -> str:
        adapter = f", exit_adapter={self.exit_adapter!r}" if self.exit_adapter else ""
        return (
            f"LayerSkipConfig(exit_layer={self.exit_layer}, "
            f"num_speculative_tokens={self.num_speculative_tokens}{adapter})"
        )


def is_layerskip(args: EngineArgs) -> bool:
    """Tell whether layerskip is asked for, by method or by model, in any of vLLM's ways.

    Args:
        args: The engine's arguments.

    Returns:
        Whether they ask for it.

    Raises:
        ValueError: If they ask for it in a form that vLLM would misread.
    """
    given = args.speculative_config
    if isinstance(given, str) and given.casefold() == METHOD:
        raise ValueError(
            f"speculative_config is {given!r}; it must be a dict such as {{'method': '{METHOD}'}}."
        )
    if not isinstance(given, Mapping):
        given = {}
    names = (args.spec_method, args.spec_model, given.get("method"), given.get("model"))
    for name in names:
        if isinstance(name, str) and name != METHOD and name.casefold() == METHOD:
            raise ValueError(f"the speculative method or model is {name!r}; write it {METHOD!r}.")
    if METHOD in names:
        return True
    for key in OWN_SETTINGS:
        if key in given or key.replace("_", "-") in given:
            raise ValueError(
                f"{key} is a setting of layerskip alone; add 'method': '{METHOD}' to the "
                f"speculative config {dict(given)!r}, or leave {key} out."
            )
    return False


def create_layerskip_config(
    args: EngineArgs, model_config: ModelConfig, parallel_config: ParallelConfig
) -> LayerSkipConfig:
    """Build the configuration from everything that the user says, or refuse it.

    Args:
        args: The engine's arguments.
        model_config: The target model's configuration.
        parallel_config: The target's parallelism.

    Returns:
        The configuration, with E and K filled in.

    Raises:
        ValueError: If a setting is unknown, of the wrong type or out of range, or if the model or
            another engine setting cannot work with layerskip. The message names the field, its
            value and what would be right.
    """
    settings = _merge_settings(args)
    _check_settings(settings)
    _check_local_argmax(settings, bool(args.enable_lora))
    check_model(model_config)
    check_engine(args, parallel_config)
    defaults = default_settings(
        model_config.model, model_config.hf_config, model_config.get_total_num_hidden_layers()
    )
    if "exit_adapter" in settings:
        settings["exit_adapter"], defaults = _read_exit_adapter(settings, model_config)
    exit_layer, num_speculative_tokens = (
        Setting(settings[key], "the user") if key in settings else getattr(defaults, key)
        for key in ("exit_layer", "num_speculative_tokens")
    )
    _check_range(exit_layer, num_speculative_tokens, model_config)
    settings["exit_layer"] = exit_layer.value
    settings["num_speculative_tokens"] = num_speculative_tokens.value
    _check_schedule(settings)
    logger.info(
        "layerskip: exit_layer=%d (from %s), num_speculative_tokens=%d (from %s)",
        exit_layer.value,
        exit_layer.source,
        num_speculative_tokens.value,
        num_speculative_tokens.source,
    )
    return LayerSkipConfig(
        target_model_config=model_config, target_parallel_config=parallel_config, **settings
    )


def _merge_settings(args: EngineArgs) -> dict[str, Any]:
    """The user's settings under vLLM's names, without `method` and `model`."""
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


def _check_settings(settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if key in KNOWN_KEYS:
            continue
        if key in SpeculativeConfig.__dataclass_fields__:
            raise ValueError(
                f"{key} is {value!r}, but it does not apply to layerskip, which drafts with the "
                f"target's own layers and KV cache; leave it out."
            )
        raise ValueError(
            f"{key!r} is not a setting of layerskip; known are {', '.join(sorted(KNOWN_KEYS))}."
        )
    for key in ("exit_layer", "num_speculative_tokens"):
        if key in settings:
            check_positive_int(key, settings[key])


def _check_local_argmax(settings: Mapping[str, Any], has_lora: bool) -> None:
    if not settings.get("use_local_argmax_reduction"):
        return
    if settings.get("draft_sample_method") == "probabilistic":
        raise ValueError(
            "use_local_argmax_reduction is true and draft_sample_method is 'probabilistic', which "
            "needs all logits; use 'greedy' drafts or leave use_local_argmax_reduction out."
        )
    if has_lora:
        raise ValueError(
            "use_local_argmax_reduction is true and enable_lora is true, but vLLM's head with "
            "adapters gives whole logits alone; leave one of them out."
        )


def _read_exit_adapter(
    settings: Mapping[str, Any], model_config: ModelConfig
) -> tuple[str, DraftSettings]:
    """Check an exit adapter; its folder for all processes, and the E and K that come from it."""
    given = settings["exit_adapter"]
    if not isinstance(given, str):
        raise ValueError(f"exit_adapter is {given!r}; it must be the path of a folder.")
    folder = Path(given).expanduser().resolve()
    adapter = read_exit_adapter_config(folder)
    for name, value in (
        ("hidden_size", model_config.get_hidden_size()),
        ("num_hidden_layers", model_config.get_total_num_hidden_layers()),
    ):
        if getattr(adapter, name) != value:
            raise ValueError(
                f"exit_adapter is {given!r}, which was trained for a model whose {name} is "
                f"{getattr(adapter, name)}, but {model_config.model} has {value}; it must be the "
                "model's own."
            )
    if settings.get("exit_layer", adapter.exit_layer) != adapter.exit_layer:
        raise ValueError(
            f"exit_layer is {settings['exit_layer']}, but exit_adapter {given!r} was trained for "
            f"exit_layer {adapter.exit_layer}; leave exit_layer out, or leave exit_adapter out."
        )
    return str(folder), DraftSettings(
        *(
            Setting(value, "the exit adapter")
            for value in (adapter.exit_layer, adapter.num_speculative_tokens)
        )
    )


def _check_range(
    exit_layer: Setting, num_speculative_tokens: Setting, model_config: ModelConfig
) -> None:
    num_layers = model_config.get_total_num_hidden_layers()
    if exit_layer.value > num_layers:
        raise ValueError(
            f"exit_layer is {exit_layer.value} (from {exit_layer.source}), but "
            f"{model_config.model} has {num_layers} layers; it must be between 1 and {num_layers}, "
            "and drafts pay when it is small (a quarter of the layers or less)."
        )
    limit = min(MAX_NUM_SPECULATIVE_TOKENS, model_config.max_model_len - 1)
    if num_speculative_tokens.value > limit:
        raise ValueError(
            f"num_speculative_tokens is {num_speculative_tokens.value} (from "
            f"{num_speculative_tokens.source}); it must be at most {limit} here (vLLM verifies at "
            f"most {MAX_NUM_SPECULATIVE_TOKENS}, and max_model_len is "
            f"{model_config.max_model_len}), and is usually between 2 and 8."
        )


def _check_schedule(settings: dict[str, Any]) -> None:
    """Check K by batch size here, where vLLM itself would fail in the engine core."""
    name = "num_speculative_tokens_per_batch_size"
    if name not in settings:
        return
    try:
        schedule = validate_and_normalize_dynamic_sd_schedule(settings[name])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} is {settings[name]!r}: {error} It must be a list of [first batch size, last "
            "batch size, K] such as [[1, 4, 4], [5, 64, 2]]."
        ) from error
    largest = max(k for *_, k in schedule)
    limit = settings["num_speculative_tokens"]
    if not 1 <= largest <= limit:
        raise ValueError(
            f"{name} is {settings[name]!r}, whose largest K is {largest}; it must be between 1 and "
            f"num_speculative_tokens, which is {limit}."
        )
