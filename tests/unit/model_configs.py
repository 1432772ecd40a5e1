"""Tiny `config.json` files of real architectures; no weights belong to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NUM_LAYERS = 8
MAX_MODEL_LEN = 512

_TEXT: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_MODEL_LEN,
    "dtype": "float32",
}

_GEMMA_3N = _TEXT | {
    "architectures": ["Gemma3nForCausalLM"],
    "model_type": "gemma3n_text",
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "sliding_window": 32,
    "activation_sparsity_pattern": [0.0] * NUM_LAYERS,
}

MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _TEXT | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "gemma2": _TEXT
    | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "sliding_window": 32},
    "qwen2-audio": {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "text_config": _TEXT | {"model_type": "qwen2"},
        "audio_config": {"model_type": "qwen2_audio_encoder", "d_model": 32},
    },
    "qwen2-mrope": _TEXT
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]},
    },
    "jamba": _TEXT
    | {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
    },
    "mamba2": {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_heads": 4,
        "head_dim": 32,
        "state_size": 16,
        "n_groups": 1,
        "expand": 2,
        "dtype": "float32",
    },
    "gemma3n": _GEMMA_3N | {"num_kv_shared_layers": 4},
    "gemma3n-unshared": _GEMMA_3N | {"num_kv_shared_layers": 0},
    "t5": {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": 256,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dtype": "float32",
    },
    "whisper": {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": 256,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_target_positions": 448,
        "dtype": "float32",
    },
    "bert": {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": MAX_MODEL_LEN,
        "dtype": "float32",
    },
    "eagle": _TEXT
    | {
        "architectures": ["EagleLlamaForCausalLM"],
        "model_type": "eagle",
        "num_hidden_layers": 1,
        "model": _TEXT | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    },
    "helium": _TEXT | {"architectures": ["HeliumForCausalLM"], "model_type": "helium"},
}


def write_config(root: Path, name: str = "llama", **entries: Any) -> Path:
    """Write the `config.json` of `name`, with other `entries`, into a folder of its own."""
    config = MODEL_CONFIGS[name] | entries
    folder = root / "-".join([name, *(f"{key}={value}" for key, value in entries.items())])[:200]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
