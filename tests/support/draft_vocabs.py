"""Draft vocabularies for the checkpoints of the tests."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from layerskip_vllm.checkpoint.draft_vocab import DraftVocab, save_draft_vocab
from tests.support.checkpoints import VOCAB_SIZE


def make_draft_vocab(file: Path, token_ids: Iterable[int], vocab_size: int = VOCAB_SIZE) -> str:
    """Write some tokens in a random order, so that none has its own place; returns the path."""
    shuffled = sorted(token_ids)
    random.Random(0).shuffle(shuffled)
    save_draft_vocab(file, DraftVocab(vocab_size=vocab_size, token_ids=tuple(shuffled)))
    return str(file)
