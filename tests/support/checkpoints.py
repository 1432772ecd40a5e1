"""Tiny random checkpoints of the architectures that the tests run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

NUM_LAYERS = 8
VOCAB_SIZE = 256
EOS_TOKEN_ID = 0

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": EOS_TOKEN_ID,
    "tie_word_embeddings": False,
}

_PHI3_SHAPE = {
    key: value for key, value in _SHAPE.items() if key not in ("head_dim", "hidden_size")
} | {"hidden_size": 128}

CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_SHAPE),
    "llama-tied": lambda: transformers.LlamaConfig(**_SHAPE | {"tie_word_embeddings": True}),
    "qwen2": lambda: transformers.Qwen2Config(**_SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**_SHAPE),
    "mistral": lambda: transformers.MistralConfig(**_SHAPE, sliding_window=None),
    "gemma2": lambda: transformers.Gemma2Config(
        **_SHAPE, sliding_window=32, query_pre_attn_scalar=32
    ),
    "phi3": lambda: transformers.Phi3Config(**_PHI3_SHAPE),
    "olmo2": lambda: transformers.Olmo2Config(**_SHAPE),
    "mixtral": lambda: transformers.MixtralConfig(
        **_SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **_SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
}


def make_checkpoint(
    path: Path,
    architecture: str = "llama",
    seed: int = 0,
    late_scale: float = 0.3,
    layerskip: dict[str, int] | None = None,
) -> Path:
    """Write a random float32 checkpoint with a byte-level tokenizer, once.

    Args:
        path: The folder; returned as it is if it is already there.
        architecture: A key of `CONFIGS`.
        seed: Seed of the weights.
        late_scale: Factor on what the second half of the layers adds to the residual stream, so
            that the first half drafts well enough for accepted and refused drafts to occur.
        layerskip: The `layerskip` entry for `config.json`.

    Returns:
        `path`.
    """
    if (path / "model.safetensors").exists():
        return path
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter.fill_(0.0 if architecture.startswith("gemma") else 1.0)
            elif parameter.ndim >= 2:
                parameter.normal_(0, 0.1)
        for index, layer in enumerate(model.model.layers):
            if index < NUM_LAYERS // 2:
                continue
            for name, parameter in layer.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight", "down_proj")):
                    parameter.mul_(late_scale)
                elif name.endswith(("post_attention_layernorm.weight", "feedforward_layernorm.weight")):
                    if architecture.startswith("olmo"):  # its norms come last in a layer
                        parameter.fill_(late_scale)
    if layerskip is not None:
        model.config.layerskip = layerskip
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=EOS_TOKEN_ID, pad_token_id=EOS_TOKEN_ID
    )
    model.save_pretrained(path)
    _save_tokenizer(path)
    return path


def _save_tokenizer(path: Path) -> None:
    """One token a byte; the byte 0 and 1 are the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0, "<bos>": 1} | {
        character: index + 2 for index, character in enumerate(alphabet[: VOCAB_SIZE - 2])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(path)
