"""A draft vocabulary: the tokens that drafts choose among, a file beside a model.

`layerskip-vllm draft-vocab` writes it, `config` checks it, the workers read it; no torch, no vLLM.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field, model_validator

from layerskip_vllm.checkpoint.validation import Settings, parse


class DraftVocab(Settings):
    """The tokens that drafts choose among; the target still chooses among all of its own."""

    vocab_size: int = Field(ge=1)
    """All tokens of the model that it is for."""

    token_ids: tuple[int, ...] = Field(min_length=1)
    """Some of them, the most useful first."""

    @model_validator(mode="after")
    def _check_token_ids(self) -> DraftVocab:
        seen = set()
        for token_id in self.token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"token_ids has {token_id}, but vocab_size is {self.vocab_size}; all must be "
                    f"from 0 to {self.vocab_size - 1}."
                )
            if token_id in seen:
                raise ValueError(f"token_ids has {token_id} twice; each must be there once.")
            seen.add(token_id)
        return self


def read_draft_vocab(file: Path) -> DraftVocab:
    """Read a draft vocabulary.

    `ValueError` if it cannot be read, or is not what `layerskip-vllm draft-vocab` writes.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"draft_vocab is {str(file)!r}, which cannot be read ({error.strerror}); it must be a "
            "file that `layerskip-vllm draft-vocab` wrote."
        ) from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    try:
        return parse(DraftVocab, values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def save_draft_vocab(file: Path, draft_vocab: DraftVocab) -> None:
    """Write a draft vocabulary."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(draft_vocab.model_dump_json() + "\n", encoding="utf-8")
