"""Held-out text for `exits`: read from files, tokenized, and cut into sequences and prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerskip_vllm.tools.prompts import spread_evenly
from layerskip_vllm.tools.stdlib_corpus import held_out_files

STDLIB = "stdlib"
NUM_NAMED = 5  # files that are left out of a folder


def read_documents(data: Sequence[str]) -> list[str]:
    """Read the texts of files and folders, in the order given; those that are empty are left out.

    A `.jsonl` file holds an object with a `text` a line, any other is one text in UTF-8. Of a
    folder all files count but hidden ones, by their paths, and those that are not text, of which
    stderr is told. `stdlib` is the part of Python's standard library that the embedded checkpoint
    was not trained on. A ValueError says that something is not there, holds no text or, where it is
    a file's name, is none.
    """
    documents = []
    for name in data:
        texts = [text for text in _read_name(name) if text.strip()]
        if not texts:
            raise ValueError(f"data is {name!r}, which has no text in it; name a file that has.")
        documents += texts
    return documents


def _read_name(name: str) -> Iterator[str]:
    path = Path(name)
    if name == STDLIB:
        yield from (file.text for file in held_out_files())
    elif path.is_dir():
        yield from _read_folder(path)
    elif path.is_file():
        try:
            yield from _read_file(path)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data has {name!r}, which is not text in UTF-8 ({error}); name text files, or a "
                "folder, of which others are left out."
            ) from error
    else:
        raise ValueError(
            f"data is {name!r}, which is not there (seen from {Path.cwd()}); it must be a file, a "
            f"folder or {STDLIB!r}."
        )


def _read_folder(folder: Path) -> Iterator[str]:
    left_out = []
    for file in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not file.is_file() or is_hidden:
            continue
        try:
            yield from _read_file(file)
        except UnicodeDecodeError:
            left_out.append(str(file.relative_to(folder)))
    if left_out:
        names = ", ".join(left_out[:NUM_NAMED] + ["..."] * (len(left_out) > NUM_NAMED))
        count = f"{len(left_out)} files that are not text in UTF-8"
        print(f"data: {str(folder)!r} without {count}: {names}", file=sys.stderr)


def _read_file(path: Path) -> Iterator[str]:
    """Read the texts of a file; `UnicodeDecodeError` if it is not text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        yield text
        return
    # Not `splitlines`: a JSON string may hold the other line breaks that it knows.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _read_line(f"line {number} of {str(path)!r}", line)


def _read_line(where: str, line: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError(f"{where} must be an object whose 'text' is a string.")
    return str(entry["text"])


@dataclass(frozen=True)
class HeldOutText:
    """Texts as one row of tokens.

    Every sequence and prompt that is cut from the middle of a text begins with `prefix` too.
    """

    token_ids: torch.Tensor  # [num_tokens] int64; an end-of-text token after each text, if any
    prefix: list[int]  # the token that the tokenizer begins a text with, or nothing

    def cut_sequences(self, seq_len: int, max_tokens: int) -> torch.Tensor:
        """Cut sequences of `seq_len` tokens to predict, spread evenly, up to `max_tokens` in all.

        They do not overlap: `[num_sequences, seq_len + 1] int64`, at least one; a ValueError says
        that the text is too short for it.
        """
        length = seq_len + 1 - len(self.prefix)
        if len(self.token_ids) < length:
            raise ValueError(
                f"data has {len(self.token_ids)} tokens, but seq_len is {seq_len}; give more text "
                f"or a seq_len of at most {len(self.token_ids) - 1 + len(self.prefix)}."
            )
        sequences = self.token_ids.unfold(0, length, seq_len)
        return self._spread(sequences, max(1, max_tokens // seq_len))

    def cut_prompts(self, num_prompts: int, num_prompt_tokens: int) -> list[list[int]]:
        """Cut prompts that do not overlap, spread evenly; a ValueError if the text is too short."""
        length = max(1, num_prompt_tokens - len(self.prefix))
        if (num_available := len(self.token_ids) // length) < num_prompts:
            raise ValueError(
                f"num_prompts is {num_prompts}, but data has tokens for {num_available} prompts of "
                f"{num_prompt_tokens}; give more text, or fewer or shorter prompts."
            )
        return self._spread(self.token_ids.unfold(0, length, length), num_prompts).tolist()

    def _spread(self, rows: torch.Tensor, max_rows: int) -> torch.Tensor:
        num_rows = min(len(rows), max_rows)
        chosen = rows[spread_evenly(len(rows), num_rows)]
        prefix = torch.tensor(self.prefix, dtype=torch.int64).expand(num_rows, -1)
        return torch.cat([prefix, chosen], dim=1)


def encode_documents(tokenizer: Any, documents: Iterable[str]) -> HeldOutText:
    """Tokenize texts with a Hugging Face tokenizer."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    token_ids: list[int] = []
    for text in documents:
        # A whole text is longer than the model's context, of which the tokenizer would warn.
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)
        token_ids += [*encoded["input_ids"], *end]
    bos = tokenizer.bos_token_id
    has_prefix = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return HeldOutText(torch.tensor(token_ids), [bos] if has_prefix else [])
