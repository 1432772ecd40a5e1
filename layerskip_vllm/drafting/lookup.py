"""Drafts copied from a request's own text where it repeats itself, on Model Runner V1.

What a text's last tokens were followed by, where they stood before, is likely to follow again.
`proposer` calls this in the worker; `device_lookup` follows the same rule on Model Runner V2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_input_batch import InputBatch

TokenIds = npt.NDArray[np.int32]

# How many of a text's last tokens must have stood before for a copy to take the drafts' place: as
# many as vLLM's own lookup asks for. Copies after fewer were accepted less often than the embedded
# checkpoint's drafts (docs/speed.md), and after more no request loses by them.
MIN_MATCH = 5
# How many are compared.
MAX_MATCH = 8


def find_copy(token_ids: TokenIds, num_tokens: int) -> TokenIds | None:
    """Continue a text as it went on where its last tokens stood before.

    Of earlier places the one counts at which most tokens agree, up to `MAX_MATCH`, and of several
    such the last. A copy that reaches the text's end goes on with itself.

    Args:
        token_ids: The text, `[length]`.
        num_tokens: How many tokens to copy.

    Returns:
        The copy, `[num_tokens]`; None where fewer than `MIN_MATCH` tokens agree.
    """
    last = len(token_ids) - 1
    ends = np.flatnonzero(token_ids[:-1] == token_ids[-1])
    for num_matched in range(1, MAX_MATCH):
        longer = ends[ends >= num_matched]
        longer = longer[token_ids[longer - num_matched] == token_ids[last - num_matched]]
        if len(longer) == 0:
            if num_matched < MIN_MATCH:
                return None
            break
        ends = longer
    start = ends[-1] + 1
    copy: TokenIds = token_ids[start + np.arange(num_tokens) % (len(token_ids) - start)]
    return copy


def find_copies(
    input_batch: InputBatch, sampled_token_ids: torch.Tensor, num_sampled: torch.Tensor, k: int
) -> torch.Tensor:
    """Copy drafts for the requests of a batch that the target has just run.

    Args:
        input_batch: The runner's, whose tokens end before those that were just sampled.
        sampled_token_ids: `[num_reqs, max K + 1]`, those that were just sampled.
        num_sampled: `[num_reqs] int32`, how many; 0 in the middle of a prompt.
        k: How many tokens to copy.

    Returns:
        `[num_reqs, k] int64`, -1 in rows without a copy.
    """
    copies = np.full((len(num_sampled), k), -1, dtype=np.int64)
    texts = _texts(input_batch, sampled_token_ids.numpy(), num_sampled.tolist())
    for row, text in texts:
        copy = find_copy(text, k)
        if copy is not None:
            copies[row] = copy
    return torch.from_numpy(copies)


def needs_drafts(
    copies: torch.Tensor, num_sampled: torch.Tensor, limits: Sequence[int | None], num_ranks: int
) -> bool:
    """Tell whether draft steps must run: some request has no copy in the place of its drafts.

    Args:
        copies: What `find_copies` gives.
        num_sampled: `[num_reqs] int32`; one in the middle of its prompt, which has 0, needs none.
        limits: How many tokens each request drafts at most, None if all; one with 0 needs none.
        num_ranks: Data-parallel ones, which must draft alike: of several each drafts.

    Returns:
        Whether any does.
    """
    takes_some = torch.tensor([limit != 0 for limit in limits])
    has_none = (copies[:, 0] < 0) & (num_sampled > 0) & takes_some
    return num_ranks > 1 or bool(has_none.any())


def _texts(
    input_batch: InputBatch, sampled_token_ids: TokenIds, num_sampled: list[int]
) -> Iterator[tuple[int, TokenIds]]:
    """Yield the rows that have sampled, each with all its tokens."""
    for row, num_new in enumerate(num_sampled):
        if num_new == 0:
            continue
        num_tokens = int(input_batch.num_tokens_no_spec[row])
        is_token = input_batch.is_token_ids[row, :num_tokens]
        # What a prompt of embeddings leaves in the table are another request's tokens.
        start = 0 if is_token.all() else num_tokens - int(is_token[::-1].argmin())
        known = input_batch.token_ids_cpu[row, start:num_tokens]
        yield row, np.concatenate([known, sampled_token_ids[row, :num_new].astype(known.dtype)])
