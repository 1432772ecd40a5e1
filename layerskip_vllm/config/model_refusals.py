"""Every model that cannot draft, and what does not fit the one that shall, known at config time.

Called where a `LayerSkipConfig` is made: in the API server, or by `LLM`. Each check raises a
`ValueError` that names the field, its value and what would be right.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from layerskip_vllm.checkpoint.draft_vocab import DraftVocab
    from layerskip_vllm.checkpoint.entry import DraftSettings
    from layerskip_vllm.checkpoint.exit_adapter import ExitAdapterConfig

# What the rejection sampler of Model Runner V1 takes (MAX_SPEC_LEN).
MAX_NUM_SPECULATIVE_TOKENS = 128


def check_model(model_config: ModelConfig) -> None:
    """Refuse a model whose first layers cannot be run alone over the shared KV cache."""
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


def check_exit_adapter(
    folder: Path,
    adapter: ExitAdapterConfig,
    exit_layer: int | None,
    model_config: ModelConfig,
) -> None:
    """Refuse an exit adapter of another model, or of another exit than the user's."""
    for name, value in (
        ("hidden_size", model_config.get_hidden_size()),
        ("num_hidden_layers", model_config.get_total_num_hidden_layers()),
    ):
        if getattr(adapter, name) != value:
            raise ValueError(
                f"exit_adapter is {str(folder)!r}, which was trained for a model whose {name} is "
                f"{getattr(adapter, name)}, but {model_config.model} has {value}; it must be the "
                "model's own."
            )
    if exit_layer not in (None, adapter.exit_layer):
        raise ValueError(
            f"exit_layer is {exit_layer}, but exit_adapter {str(folder)!r} was trained for "
            f"exit_layer {adapter.exit_layer}; leave exit_layer out, or leave exit_adapter out."
        )


def check_draft_vocab(file: Path, draft_vocab: DraftVocab, model_config: ModelConfig) -> None:
    """Refuse a draft vocabulary of another model."""
    vocab_size = model_config.get_vocab_size()
    if draft_vocab.vocab_size != vocab_size:
        raise ValueError(
            f"draft_vocab is {str(file)!r}, which was made for a model whose vocab_size is "
            f"{draft_vocab.vocab_size}, but {model_config.model} has {vocab_size}; it must be the "
            "model's own."
        )


def check_draft(draft: DraftSettings, model_config: ModelConfig) -> None:
    """Refuse an E or a K that the model, its context or vLLM is too small for."""
    exit_layer, num_speculative_tokens = draft.exit_layer, draft.num_speculative_tokens
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
