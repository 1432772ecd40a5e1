"""The one place that reads what the user asks for: `LayerSkipConfig` and its checks.

Built in the API server (or by `LLM`) from `EngineArgs`, then pickled to every other process.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import config
from vllm.logger import init_logger

from layerskip_vllm.checkpoints import check_positive_int, default_settings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.layerskip")

METHOD = "layerskip"

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
KNOWN_KEYS = SHARED_SETTINGS | {"method", "model", "exit_layer"}


@config
class LayerSkipConfig(SpeculativeConfig):
    """Speculative decoding whose draft model is the target's first layers.

    To the rest of vLLM it is a `draft_model` configuration whose draft model is the target itself,
    so that scheduling, lookahead slots, metrics and the rejection sampler are vLLM's own.
    """

    exit_layer: int = 0
    """E, the number of layers that draft: layers [0, E)."""

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
        """Hash what shapes the compiled graphs: the target's factors and where drafting exits."""
        return f"{super().compute_hash()}-exit{self.exit_layer}"

    def __repr__(self) -> str:
        return (
            f"LayerSkipConfig(exit_layer={self.exit_layer}, "
            f"num_speculative_tokens={self.num_speculative_tokens})"
        )


def is_layerskip(args: EngineArgs) -> bool:
    """Return whether `args` ask for layerskip, by method or by model, in any of vLLM's ways."""
    given = args.speculative_config or {}
    return METHOD in (args.spec_method, args.spec_model, given.get("method"), given.get("model"))


def create_layerskip_config(
    args: EngineArgs, model_config: ModelConfig, parallel_config: ParallelConfig
) -> LayerSkipConfig:
    """Build the configuration from everything that `args` say, or refuse it.

    Raises:
        ValueError: If a setting is unknown, of the wrong type or out of range, or if the model or
            another engine setting cannot work with layerskip. The message names the field, its
            value and what would be right.
    """
    settings = _merge_settings(args)
    _check_settings(settings)
    check_model(model_config)
    _check_engine(args, parallel_config)

    num_layers = model_config.get_total_num_hidden_layers()
    defaults = default_settings(model_config.model, model_config.hf_config, num_layers)
    is_default = not {"exit_layer", "num_speculative_tokens"} <= settings.keys()
    settings.setdefault("exit_layer", defaults.exit_layer)
    settings.setdefault("num_speculative_tokens", defaults.num_speculative_tokens)
    if settings["exit_layer"] > num_layers:
        raise ValueError(
            f"exit_layer is {settings['exit_layer']}, but {model_config.model} has {num_layers} "
            f"layers; it must be between 1 and {num_layers}, and drafts pay when it is small "
            "(a quarter of the layers or less)."
        )
    _check_num_speculative_tokens(settings["num_speculative_tokens"], model_config)
    layerskip_config = LayerSkipConfig(
        target_model_config=model_config, target_parallel_config=parallel_config, **settings
    )
    if is_default:
        logger.info(
            "layerskip: exit_layer=%d, num_speculative_tokens=%d (from %s where not given)",
            layerskip_config.exit_layer,
            layerskip_config.num_speculative_tokens,
            defaults.source,
        )
    return layerskip_config


def _merge_settings(args: EngineArgs) -> dict[str, Any]:
    """The user's settings under vLLM's names, without `method` and `model`."""
    settings = {
        key.replace("-", "_"): value for key, value in (args.speculative_config or {}).items()
    }
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
    return settings


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
        if settings.get(key) is None:
            settings.pop(key, None)
        else:
            check_positive_int(key, settings[key])


def _check_num_speculative_tokens(value: int, model_config: ModelConfig) -> None:
    if value >= model_config.max_model_len:
        raise ValueError(
            f"num_speculative_tokens is {value}, but max_model_len is "
            f"{model_config.max_model_len}; it must be smaller, and is usually between 2 and 8."
        )


def check_model(model_config: ModelConfig) -> None:
    """Refuse a model whose first layers cannot be run alone over the shared KV cache.

    Raises:
        ValueError: With the model's name and the reason.
    """
    name = f"model is {model_config.model!r} ({', '.join(model_config.architectures)})"
    hf_config, text_config = model_config.hf_config, model_config.hf_text_config
    num_shared = getattr(text_config, "num_kv_shared_layers", 0) or 0
    model_type = str(getattr(hf_config, "model_type", ""))
    reasons = (
        (model_config.runner_type != "generate", "it does not generate text"),
        (
            model_type in ("eagle", "medusa", "mlp_speculator") or model_type.endswith("_mtp"),
            f"it is a draft model itself (model_type {model_type!r})",
        ),
        (model_config.is_encoder_decoder, "it is an encoder-decoder"),
        (
            model_config.is_multimodal_model,
            "it takes multimodal inputs, which draft steps do not carry yet",
        ),
        (model_config.uses_mrope, "it uses M-RoPE positions, which draft steps do not carry"),
        (
            model_config.is_hybrid or model_config.is_attention_free,
            "it has Mamba or other recurrent layers, whose state a rejected draft would spoil",
        ),
        (
            num_shared > 0,
            f"its last {num_shared} layers read the KV cache of earlier ones "
            "(num_kv_shared_layers), across the exit",
        ),
        (
            model_config.using_transformers_backend(),
            "vLLM runs it through transformers, whose layers cannot be sliced",
        ),
        (
            not model_config.registry.is_pp_supported_model(
                model_config.architectures, model_config
            ),
            "its vLLM implementation cannot run a slice of its layers (no pipeline parallelism)",
        ),
    )
    for is_refused, reason in reasons:
        if is_refused:
            raise ValueError(
                f"{name}, which layerskip cannot draft with: {reason}. Use a decoder-only text "
                "model with attention layers, or another speculative method."
            )


def _check_engine(args: EngineArgs, parallel_config: ParallelConfig) -> None:
    """Refuse engine settings that the draft steps do not support."""
    for name, value, right in (
        ("pipeline_parallel_size", parallel_config.pipeline_parallel_size, 1),
        ("decode_context_parallel_size", parallel_config.decode_context_parallel_size, 1),
        ("prefill_context_parallel_size", parallel_config.prefill_context_parallel_size, 1),
        ("enable_eplb", parallel_config.enable_eplb, False),
        ("use_ubatching", parallel_config.use_ubatching, False),
        ("enable_lora", bool(args.enable_lora), False),
        ("kv_sharing_fast_prefill", bool(args.kv_sharing_fast_prefill), False),
    ):
        if value != right:
            raise ValueError(
                f"{name} is {value!r}, which layerskip does not support; it must be {right!r}."
            )
