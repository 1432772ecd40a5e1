"""Tiny random checkpoints of the architectures that the tests run on."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

NUM_LAYERS = 8
VOCAB_SIZE = 256
SLIDING_WINDOW = 32
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

# Some implementations derive the size of a head, whatever the configuration says.
_WIDE_SHAPE = {k: v for k, v in _SHAPE.items() if k != "head_dim"} | {"hidden_size": 128}

CONFIGS: Mapping[str, Callable[..., transformers.PretrainedConfig]] = {
    "llama": lambda **kw: transformers.LlamaConfig(**_SHAPE | kw),
    "llama-tied": lambda **kw: transformers.LlamaConfig(
        **_SHAPE | {"tie_word_embeddings": True} | kw
    ),
    "qwen2": lambda **kw: transformers.Qwen2Config(**_WIDE_SHAPE | kw),
    "qwen3": lambda **kw: transformers.Qwen3Config(**_SHAPE | kw),
    "mistral": lambda **kw: transformers.MistralConfig(
        **_SHAPE | {"sliding_window": SLIDING_WINDOW} | kw
    ),
    # Every other layer has a sliding window; embedding and head are always one.
    "gemma2": lambda **kw: transformers.Gemma2Config(
        **_SHAPE
        | {
            "sliding_window": SLIDING_WINDOW,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        }
        | kw
    ),
    "phi3": lambda **kw: transformers.Phi3Config(**_WIDE_SHAPE | kw),
    "olmo2": lambda **kw: transformers.Olmo2Config(**_WIDE_SHAPE | kw),
    "mixtral": lambda **kw: transformers.MixtralConfig(
        **_SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None} | kw
    ),
    "qwen3-moe": lambda **kw: transformers.Qwen3MoeConfig(
        **_SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64} | kw
    ),
}

# How much each layer adds to the residual stream: little enough in the later ones that drafts from
# layer 2 and from layer 4 are accepted about half and two thirds of the time, and refused the rest.
_LAYER_SCALES = (1.0, 1.0, 0.2, 0.2, 0.12, 0.12, 0.12, 0.12)
# Large enough that greedy outputs do not fall into short loops.
_WEIGHT_STD = 0.2

_NORMS_AFTER_A_SUBLAYER = (
    "post_attention_layernorm.weight",
    "post_feedforward_layernorm.weight",
)
_LAST_IN_A_SUBLAYER = ("o_proj.weight", "down_proj.weight", "down_proj")


def make_checkpoint(
    path: Path,
    architecture: str = "llama",
    seed: int = 0,
    layerskip: dict[str, int] | None = None,
    logit_scale: float = 1.0,
    **config: Any,
) -> Path:
    """Write a random float32 checkpoint and a tokenizer of short ASCII strings, once.

    Args:
        path: The folder; returned as it is if it is already there.
        architecture: A key of `CONFIGS`.
        seed: Seed of the weights.
        layerskip: The `layerskip` entry for `config.json`.
        logit_scale: What an untied head's weights are multiplied by.
        config: Fields of the model's configuration to change, such as `vocab_size`.

    Returns:
        `path`.
    """
    if (path / "tokenizer.json").exists():
        return path
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](**config)).float()
    is_gemma = architecture.startswith("gemma")
    # Gemma's norms multiply by one more than their weight, its embedding by the root of its width.
    norm_offset = 1.0 if is_gemma else 0.0
    embedding_scale = model.config.hidden_size**-0.5 if is_gemma else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0 - norm_offset)
            else:
                parameter.normal_(0, _WEIGHT_STD)
        model.get_input_embeddings().weight.mul_(embedding_scale)
        model.get_output_embeddings().weight.mul_(logit_scale)
        layers = model.model.layers
        for index, layer in enumerate(layers):
            _scale_layer(layer, _LAYER_SCALES[index * NUM_LAYERS // len(layers)], norm_offset)
    if layerskip is not None:
        model.config.layerskip = layerskip
    special = {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id")}
    model.generation_config = transformers.GenerationConfig(**special)
    model.save_pretrained(path)
    _save_tokenizer(path, model.config.vocab_size, **special)
    return path


def _scale_layer(layer: torch.nn.Module, scale: float, norm_offset: float) -> None:
    """Scale what a layer adds: by the norms after its sublayers (OLMo 2, Gemma 2) or weights."""
    parameters = dict(layer.named_parameters())
    norms = [p for name, p in parameters.items() if name in _NORMS_AFTER_A_SUBLAYER]
    if len(norms) == len(_NORMS_AFTER_A_SUBLAYER):
        for parameter in norms:
            parameter.fill_(scale - norm_offset)
        return
    for name, parameter in parameters.items():
        if name.endswith(_LAST_IN_A_SUBLAYER):
            parameter.mul_(scale)


def _save_tokenizer(path: Path, vocab_size: int, bos_token_id: int, eos_token_id: int) -> None:
    """All printable ASCII characters are tokens, and pairs of letters fill up the vocabulary.

    So every token is valid text by itself, and any ASCII text can be encoded.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters = [
        character
        for byte in [10, *range(32, 127)]
        for character, _ in byte_level.pre_tokenize_str(chr(byte))
    ]
    pairs = itertools.product(string.ascii_lowercase, repeat=2)
    strings = ["<eos>", "<bos>", *characters, *("".join(pair) for pair in pairs)][:vocab_size]
    vocab = {token: index for index, token in enumerate(strings)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=strings[bos_token_id],
        eos_token=strings[eos_token_id],
        pad_token=strings[0],
    ).save_pretrained(path)
