"""Reads a model's exits and lists all that may be weighed, before `layerskip-vllm tune` starts."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from layerskip_vllm.checkpoint.draft_vocab import DraftVocab, read_draft_vocab, save_draft_vocab
from layerskip_vllm.tools.draft_vocab.coverage import rank_tokens
from layerskip_vllm.tools.exits.measure import find_eos_token_ids, load_decoder
from layerskip_vllm.tools.prompts import spread_evenly
from layerskip_vllm.tools.text import HeldOutText, encode_documents, read_documents
from layerskip_vllm.tools.tune.command import TuneConfig
from layerskip_vllm.tools.tune.designs import ALL_TOKENS, Design, DraftTokens, list_designs
from layerskip_vllm.tools.tune.drafts import measure_drafts
from layerskip_vllm.tools.tune.trials import MAX_TOKENS
from layerskip_vllm.tools.tune.tuning import LONGEST_DRAFT, Track, Tuner

NUM_PROMPTS = 16
NUM_PROMPT_TOKENS = 128
_MAX_MODEL_LEN = 2048  # what engines keep room for, if the model takes as much
_SHARES_OF_TOKENS = (0.25, 0.125)
_DTYPES = {"half": "float16", "float": "float32"}  # vLLM's other words


def prepare_tuner(
    config: TuneConfig, ends_at: float, track: Track, say: Callable[[str], None]
) -> Tuner:
    """Read the exits, write draft vocabularies, and list what may be weighed.

    A ValueError says that the model or the texts do not fit.
    """
    documents = read_documents(config.data)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_decoder(config.model, None, _DTYPES.get(config.dtype, config.dtype))
    text_config = model.config.get_text_config()
    context = _check_model(text_config)
    text = encode_documents(tokenizer, documents)
    prompts = cut_trial_prompts(text, max(NUM_PROMPTS, *config.batch_sizes))
    vocabs = _list_draft_tokens(config, text, prompts, text_config.vocab_size)
    record = measure_drafts(
        model,
        [prompts[index] for index in spread_evenly(len(prompts), NUM_PROMPTS)],
        MAX_TOKENS,
        find_eos_token_ids(model, tokenizer),
        [ids for _, ids in vocabs if ids],
        LONGEST_DRAFT,
        track("exits", text_config.num_hidden_layers),
    )
    del model
    gc.collect()
    torch.cuda.empty_cache()
    engine = {
        "enable_prefix_caching": False,  # turns ask the same prompts
        "max_num_seqs": max(config.batch_sizes),
        "max_model_len": min(context, _MAX_MODEL_LEN),
        **config.engine,
        "model": config.model,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
    }
    return Tuner(
        engine=engine,
        speculative=config.given_settings,
        record=record,
        designs=_list_designs(config, record.num_layers, [tokens for tokens, _ in vocabs]),
        prompts=prompts,
        batch_sizes=sorted(config.batch_sizes),
        folder=config.output_dir,
        ends_at=ends_at,
        track=track,
        say=say,
    )


def cut_trial_prompts(text: HeldOutText, num_prompts: int) -> list[list[int]]:
    """Cut prompts of one length; a ValueError says that the text is too short."""
    num_tokens, least = len(text.token_ids), num_prompts * NUM_PROMPT_TOKENS
    if num_tokens < least:
        raise ValueError(
            f"data has {num_tokens} tokens; it must have at least {least}, for prompts of "
            f"{NUM_PROMPT_TOKENS} tokens for the largest of batch_sizes and no fewer than "
            f"{NUM_PROMPTS}."
        )
    return text.cut_prompts(num_prompts, NUM_PROMPT_TOKENS)


def _check_model(text_config: Any) -> int:
    """Return the model's context, if the model can be tuned."""
    if text_config.num_hidden_layers < 2:
        raise ValueError("model has 1 layer; it must have at least 2 to exit before the last.")
    context: int = getattr(text_config, "max_position_embeddings", _MAX_MODEL_LEN)
    least = NUM_PROMPT_TOKENS + MAX_TOKENS
    if context < least:
        raise ValueError(f"model has a context of {context} tokens; it must have {least} at least.")
    return context


def _list_draft_tokens(
    config: TuneConfig, text: HeldOutText, prompts: Sequence[list[int]], vocab_size: int
) -> list[tuple[DraftTokens, Sequence[int]]]:
    """List what drafts may choose among: the user's file, or all tokens and the most frequent.

    Tokens are counted in the texts beside the prompts, and written to files.
    """
    given = config.given_settings
    if "draft_vocab" in given:
        ids = read_draft_vocab(Path(given["draft_vocab"]).expanduser()).token_ids
        return [(DraftTokens(1, len(ids) / vocab_size, given["draft_vocab"]), ids)]
    listed: list[tuple[DraftTokens, Sequence[int]]] = [(ALL_TOKENS, ())]
    if config.engine.get("enable_lora") or given.get("use_local_argmax_reduction"):
        return listed  # which a draft vocabulary cannot stand beside
    counts = Counter(text.token_ids.tolist())
    counts.subtract(token_id for prompt in prompts for token_id in prompt)
    ranked = rank_tokens(counts, vocab_size)
    for number, share in enumerate(_SHARES_OF_TOKENS, start=1):
        ids = tuple(ranked[: max(1, round(share * vocab_size))])
        file = config.output_dir.resolve() / f"draft-vocab-{len(ids)}.json"
        save_draft_vocab(file, DraftVocab(vocab_size=vocab_size, token_ids=ids))
        listed.append((DraftTokens(number, share, str(file)), ids))
    return listed


def _list_designs(
    config: TuneConfig, num_layers: int, vocabs: Sequence[DraftTokens]
) -> list[Design]:
    """List all designs that the user's settings leave open."""
    given = config.given_settings
    lookups, reuses = [False, True], [False, True]
    if given.get("draft_sample_method") == "probabilistic":
        lookups = [False]
    if config.engine.get("enable_lora"):
        reuses = [False]
    if given.get("enable_adaptive_verification"):
        lookups = reuses = [False]
    if "lookup" in given:
        lookups = [given["lookup"] != "off"]
    if "reuse_exit_states" in given:
        reuses = [given["reuse_exit_states"] != "off"]
    designs = list_designs(num_layers, vocabs, lookups, reuses)
    if not designs:
        raise ValueError(
            f"speculative_config has lookup {given['lookup']!r} and reuse_exit_states "
            f"{given['reuse_exit_states']!r}, of which layerskip takes one alone; leave one out."
        )
    return designs
