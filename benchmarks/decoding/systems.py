"""The systems of `benchmarks.decoding.speedup`: by their names, what each one's `LLM` gets."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

from benchmarks.decoding.speedup_report import BYTES_PER_WEIGHT
from benchmarks.decoding.speedup_summary import Load
from benchmarks.decoding.synthetic_checkpoint import SyntheticCheckpoint
from layerskip_vllm.checkpoint.draft_vocab import DraftVocab, save_draft_vocab

# The last two are Transformers', without vLLM.
SYSTEMS = (
    *("plain", "layerskip", "draft_model", "ngram", "suffix"),
    *("transformers", "transformers_early_exit"),
)
DEFAULT_SYSTEMS = SYSTEMS[:4]
# What may follow `layerskip`, a plus before each, as in `layerskip+E6+auto`: E and K other than the
# other systems', and speed settings.
_SETTING = re.compile(r"E[1-9]\d*|K[1-9]\d*|auto|draft_vocab|lookup|reuse")
# Of the vocabulary, where nobody says which tokens drafts choose among and any will do.
SHARE_OF_DRAFT_VOCAB = 0.25
MARGIN_TOKENS = 64  # room for drafts past the end of a text
_BLOCK_TOKENS = 128  # of the KV cache, the most that a platform takes by default


def parse_system(name: str) -> str:
    """Read a system's name.

    Args:
        name: One of `SYSTEMS`, layerskip with any settings after it.

    Returns:
        The name.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    system, *settings = name.split("+")
    is_known = system in SYSTEMS and (system == "layerskip" or not settings)
    if not is_known or not all(_SETTING.fullmatch(setting) for setting in settings):
        raise argparse.ArgumentTypeError(
            f"{name!r} is no system; it must be one of {', '.join(SYSTEMS)}, and layerskip may "
            "have +E6, +K4, +auto, +draft_vocab, +lookup and +reuse after it."
        )
    return name


def find_loads(options: argparse.Namespace) -> list[Load]:
    """Return what is measured: every batch size, and a long prompt if there is to be one."""
    loads = [Load(batch_size, options.num_prompt_tokens) for batch_size in options.batch_sizes]
    if options.num_long_prompt_tokens:
        loads.append(Load(1, options.num_long_prompt_tokens))
    return loads


def make_engine_args(
    system: str, options: argparse.Namespace, checkpoint: SyntheticCheckpoint
) -> dict[str, Any]:
    """Return what `LLM` gets: the same for all systems but for the speculative configuration."""
    model = str(checkpoint.folder.resolve())
    if system.startswith("transformers"):
        early_exit = options.exit_layer if system == "transformers_early_exit" else None
        return {"model": model, "dtype": options.dtype, "assistant_early_exit": early_exit}
    return {
        "model": model,
        "load_format": "dummy" if options.dummy_weights else "auto",
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "max_model_len": max(count_text_tokens(options, load) for load in find_loads(options)),
        "max_num_seqs": max(options.batch_sizes),
        "kv_cache_memory_bytes": count_kv_bytes(options, checkpoint.config),
        # With the bytes given, no more than what a GPU must have free when the engine starts, which
        # is little beside what the others have taken by then.
        "gpu_memory_utilization": 0.05,
        "enforce_eager": options.enforce_eager,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "speculative_config": _make_speculative_config(system, options, checkpoint),
    }


def _make_speculative_config(
    system: str, options: argparse.Namespace, checkpoint: SyntheticCheckpoint
) -> dict[str, Any] | None:
    num_tokens = options.num_speculative_tokens
    drafts: dict[str, Any] = {"num_speculative_tokens": num_tokens}
    if system == "plain":
        return None
    if system == "ngram":
        return {"method": "ngram", "prompt_lookup_max": 4, **drafts}
    if system == "suffix":
        return {"method": "suffix", **drafts}
    if options.is_acceptance_given:
        drafts["rejection_sample_method"] = "synthetic"
        drafts["synthetic_acceptance_length"] = 1 + num_tokens * options.acceptance
    if system == "draft_model":
        return {"method": "draft_model", "model": str(checkpoint.draft_folder.resolve()), **drafts}
    exit_layer = options.exit_layer
    for setting in system.split("+")[1:]:
        if setting[0] == "E":
            exit_layer = int(setting[1:])
        elif setting[0] == "K":
            drafts["num_speculative_tokens"] = int(setting[1:])
        elif setting == "auto":
            drafts["num_speculative_tokens"] = f"auto:{num_tokens}"
        elif setting == "lookup":
            drafts["lookup"] = "auto"
        elif setting == "reuse":
            drafts["reuse_exit_states"] = "auto"
        else:
            drafts["draft_vocab"] = str(
                options.draft_vocab or _write_draft_vocab(options, checkpoint)
            )
    return {"method": "layerskip", "exit_layer": exit_layer, **drafts}


def _write_draft_vocab(options: argparse.Namespace, checkpoint: SyntheticCheckpoint) -> str:
    """Write a draft vocabulary of the first tokens, for acceptance that does not hang on them."""
    vocab_size = checkpoint.config["vocab_size"]
    file = (checkpoint.folder / "draft-vocab.json").resolve()
    token_ids = tuple(range(round(SHARE_OF_DRAFT_VOCAB * vocab_size)))
    save_draft_vocab(file, DraftVocab(vocab_size=vocab_size, token_ids=token_ids))
    return str(file)


def count_kv_bytes(options: argparse.Namespace, config: Mapping[str, Any]) -> int:
    """Return the KV cache that each engine gets: what the texts need, with a draft model's.

    Args:
        options: What is measured.
        config: The model's `config.json`, of the Llama architecture.

    Returns:
        Bytes.
    """
    if options.kv_cache_gib is not None:
        return int(options.kv_cache_gib * 2**30)
    num_layers = config["num_hidden_layers"] + options.exit_layer
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    layer_bytes = 2 * num_kv_heads * head_dim * BYTES_PER_WEIGHT[options.dtype]
    num_blocks = max(
        load.batch_size * -(-count_text_tokens(options, load) // _BLOCK_TOKENS)
        for load in find_loads(options)
    )
    # vLLM keeps a block for itself.
    return int((num_blocks + 1) * _BLOCK_TOKENS * num_layers * layer_bytes)


def count_text_tokens(options: argparse.Namespace, load: Load) -> int:
    """Return the context that a text of a load needs, drafts past its end included."""
    return int(load.num_prompt_tokens + options.max_tokens + MARGIN_TOKENS)
