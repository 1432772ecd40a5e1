"""The tokenizer and the model of the checkpoint that the repository carries: made, grown, saved.

`pretrain` trains it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from checkpoints.stdlib.pretrain_config import PretrainConfig
from layerskip_vllm.tools.stdlib_corpus import SourceFile

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; it encodes any text and adds no token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def encode_files(tokenizer: PreTrainedTokenizerFast, files: Iterable[SourceFile]) -> torch.Tensor:
    """Return the files' tokens, an end-of-text token after each file, `[num_tokens] int64`."""
    token_ids: list[int] = []
    for file in files:
        token_ids += [*tokenizer.encode(file.text), tokenizer.eos_token_id]
    return torch.tensor(token_ids)


def build_model(config: PretrainConfig, eos_token_id: int) -> LlamaForCausalLM:
    """Return a Llama with random weights; matrices that end a residual branch start smaller."""
    torch.manual_seed(config.seed)
    make, make_config = cast(Any, LlamaForCausalLM), cast(Any, LlamaConfig)
    model: LlamaForCausalLM = make(
        make_config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=1,
            head_dim=config.hidden_size // config.num_heads,
            max_position_embeddings=config.long_seq_len,
            initializer_range=0.5 * config.hidden_size**-0.5,
            tie_word_embeddings=False,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
            attn_implementation="eager",
            layerskip=config.make_settings().draft_entry(config.num_layers),
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            scale_contribution(layer, (2 * config.num_first_layers) ** -0.5)
    return model


@torch.no_grad()
def scale_contribution(layer: LlamaDecoderLayer, scale: float) -> None:
    """Scale what a layer adds to the residual stream, in place."""
    layer.self_attn.o_proj.weight.mul_(scale)
    layer.mlp.down_proj.weight.mul_(scale)


def grow(model: LlamaForCausalLM, config: PretrainConfig) -> None:
    """Make every layer after the first ones a copy of one of them, in turn, and let all run."""
    layers = model.model.layers
    for layer_idx in range(config.num_first_layers, config.num_layers):
        layers[layer_idx].load_state_dict(layers[layer_idx % config.num_first_layers].state_dict())
        scale_contribution(layers[layer_idx], config.growth_scale)
    model.config.num_hidden_layers = config.num_layers


def save_checkpoint(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    report: dict[str, Any],
) -> None:
    """Write the checkpoint in Hugging Face's layout, and `training.json` beside it."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    tokenizer_config = out / "tokenizer_config.json"
    settings = json.loads(tokenizer_config.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer_config.write_text(json.dumps(settings, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
