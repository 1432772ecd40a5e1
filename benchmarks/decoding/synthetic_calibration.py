"""Scales a synthetic model's late layers until its drafts are accepted as often as wished."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.decoding.synthetic_model import scaled_late_layers
from benchmarks.decoding.synthetic_spec import SyntheticSpec

NUM_CALIBRATION_TOKENS = 48
MAX_CALIBRATION_ROUNDS = 10
ACCEPTANCE_TOLERANCE = 0.02


def calibrate(model: Any, spec: SyntheticSpec) -> dict[str, Any]:
    """Find the scale of late layers by bisection: the larger, the less they agree with drafts."""
    low, high = 0.0, 2.0
    best: dict[str, Any] = {}
    for _ in range(MAX_CALIBRATION_ROUNDS):
        scale = round((low + high) / 2, 4)
        report = _measure(model, spec, scale)
        print(
            f"late layers scaled by {scale}: acceptance {report['acceptance']:.3f}", file=sys.stderr
        )
        error = report["acceptance"] - spec.acceptance
        if not best or abs(error) < abs(best["acceptance"] - spec.acceptance):
            best = report
        if abs(error) <= ACCEPTANCE_TOLERANCE:
            break
        low, high = (scale, high) if error > 0 else (low, scale)
    return best


def _measure(model: Any, spec: SyntheticSpec, scale: float) -> dict[str, Any]:
    """Decode greedily with late layers scaled and compare each token with its draft.

    A draft follows accepted drafts only, which are the text itself, so what the first E layers say
    after every true prefix is all that is needed to know what would be accepted.
    """
    import torch
    from transformers import DynamicCache

    from layerskip_vllm.training.exit_evaluation import simulate_acceptance

    prompts = spec.calibration_prompts()
    ids = torch.tensor(prompts, device=model.device)
    cache, tokens, agreements, gaps = DynamicCache(config=model.config), [], [], []
    with scaled_late_layers(model, spec.exit_layer, scale):
        for _ in range(NUM_CALIBRATION_TOKENS):
            output = model.model(ids, past_key_values=cache, output_hidden_states=True)
            exit_state = model.model.norm(output.hidden_states[spec.exit_layer][:, -1])
            drafts = model.lm_head(exit_state).argmax(dim=-1)
            logits = model.lm_head(output.last_hidden_state[:, -1]).float()  # [prompts, vocab]
            top = logits.topk(2).values
            gaps.append((top[:, 0] - top[:, 1]) / logits.std(dim=-1))
            ids = logits.argmax(dim=-1, keepdim=True)
            tokens.append(ids[:, 0])
            agreements.append(ids[:, 0] == drafts)
    played = simulate_acceptance(list(torch.stack(agreements, dim=1)), spec.num_speculative_tokens)
    return {
        "exit_layer": spec.exit_layer,
        "late_scale": scale,
        "acceptance": played.rate,
        "distinct_ngrams": share_of_distinct_ngrams(torch.stack(tokens, dim=1).tolist()),
        "near_ties": (torch.stack(gaps) < 0.02).float().mean().item(),
    }


def share_of_distinct_ngrams(texts: Sequence[Sequence[int]], num_tokens: int = 4) -> float:
    """Return how many of the texts' n-grams are the first of their kind in their text, 0 to 1."""
    found = distinct = 0
    for text in texts:
        ngrams = [tuple(text[i : i + num_tokens]) for i in range(len(text) - num_tokens + 1)]
        found += len(ngrams)
        distinct += len(set(ngrams))
    return distinct / found if found else 1.0
