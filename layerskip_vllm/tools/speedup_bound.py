"""What self-speculative decoding gains at best when reading the weights is all that costs."""

from __future__ import annotations


def cost_of_round(draft_share: float, num_speculative_tokens: float) -> float:
    """Return what one draft and its verification read, in steps of the target.

    That is K draft steps and one step of the target, K * draft_share + 1; a plain step costs 1.
    `draft_share` is what a draft step reads, layers [0, E) and the head, as a share of what a step
    of the target reads, all layers and the head. K is the mean where drafts differ.
    """
    if not 0 < draft_share <= 1:
        raise ValueError(f"draft_share is {draft_share}; it must be above 0 and at most 1.")
    if num_speculative_tokens < 1:
        raise ValueError(
            f"num_speculative_tokens is {num_speculative_tokens}; it must be at least 1."
        )
    return num_speculative_tokens * draft_share + 1


def bound_speedup(draft_share: float, num_speculative_tokens: float, accepted: float) -> float:
    """Return how many times faster than plain decoding the weights read allow.

    A verification yields the accepted tokens, on average `accepted` of a draft's K, and one of the
    target's own, so the bound is (accepted + 1) / (K * draft_share + 1), with draft_share and K as
    for `cost_of_round`. It holds where reading weights is what a step costs: batch 1, nearly. In
    larger batches a plain step shares one reading between its requests too, so the bound stays what
    it is, and compute, which verifying multiplies by K + 1, comes on top.
    """
    cost = cost_of_round(draft_share, num_speculative_tokens)
    if not 0 <= accepted <= num_speculative_tokens:
        raise ValueError(
            f"accepted is {accepted}; a round of {num_speculative_tokens} drafts accepts "
            f"between 0 and {num_speculative_tokens}."
        )
    return (accepted + 1) / cost
