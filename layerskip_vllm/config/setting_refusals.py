"""Every setting that layerskip does not have, or that excludes another, known at config time.

Called where a `LayerSkipConfig` is made: in the API server, or by `LLM`. Each check raises a
`ValueError` that names the setting, its value and what would be right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config.speculative import SpeculativeConfig
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from layerskip_vllm.checkpoint.entry import check_positive_int
from layerskip_vllm.config.flags import FLAG_OF_SETTING, LOOKUPS, check_length

# vLLM's speculative settings that mean the same here.
SHARED_SETTINGS = frozenset(
    {
        "num_speculative_tokens",
        "num_speculative_tokens_per_batch_size",
        "draft_sample_method",
        "rejection_sample_method",
        "synthetic_acceptance_rates",
        "synthetic_acceptance_length",
        "use_local_argmax_reduction",
        "enable_adaptive_verification",
        "enforce_eager",
    }
)
# Those of vLLM's that are known: another may be lossy, as "fly" of 0.33 is.
REJECTION_SAMPLE_METHODS = ("standard", "block", "synthetic")
KNOWN_KEYS = SHARED_SETTINGS | {"method", "model", *FLAG_OF_SETTING}


def check_settings(settings: Mapping[str, Any], has_lora: bool) -> None:
    """Refuse settings that layerskip does not have, or that exclude one another."""
    for key, value in settings.items():
        if key in KNOWN_KEYS:
            continue
        if key in SpeculativeConfig.__dataclass_fields__:
            raise ValueError(
                f"{key} is {value!r}, but it does not apply to layerskip, which drafts with the "
                f"target's own layers and KV cache; leave it out."
            )
        raise ValueError(
            f"{key!r} is not a setting of layerskip; known are {', '.join(sorted(KNOWN_KEYS))}."
        )
    if "exit_layer" in settings:
        check_positive_int("exit_layer", settings["exit_layer"])
    if "num_speculative_tokens" in settings:
        check_length(settings["num_speculative_tokens"])
    for key, what in (("exit_adapter", "folder"), ("draft_vocab", "file")):
        if key in settings and not isinstance(settings[key], str):
            raise ValueError(f"{key} is {settings[key]!r}; it must be the path of a {what}.")
    if "draft_vocab" in settings:
        _check_head(settings, has_lora)
    _check_sampling(settings, has_lora)
    _check_lookup(settings)


def _check_sampling(settings: Mapping[str, Any], has_lora: bool) -> None:
    """Refuse a way to verify drafts that may change the output, and ways to draft that clash."""
    method = settings.get("rejection_sample_method", "standard")
    if method not in REJECTION_SAMPLE_METHODS:
        raise ValueError(
            f"rejection_sample_method is {method!r}; with layerskip it must be 'standard' or "
            "'block', which keep the target's distribution, or 'synthetic', which accepts drafts "
            "at rates of your own to measure with."
        )
    if not settings.get("use_local_argmax_reduction"):
        return
    if settings.get("draft_sample_method") == "probabilistic":
        raise ValueError(
            "use_local_argmax_reduction is true and draft_sample_method is 'probabilistic', which "
            "needs all logits; use 'greedy' drafts or leave use_local_argmax_reduction out."
        )
    if has_lora:
        raise ValueError(
            "use_local_argmax_reduction is true and enable_lora is true, but vLLM's head with "
            "adapters gives whole logits alone; leave one of them out."
        )


def _check_head(settings: Mapping[str, Any], has_lora: bool) -> None:
    """Refuse what needs the target's whole head in the draft steps."""
    for name, is_set, reason in (
        (
            "use_local_argmax_reduction",
            settings.get("use_local_argmax_reduction"),
            "it is for whole heads, whose logits are many",
        ),
        ("enable_lora", has_lora, "an adapter changes logits that a draft vocabulary leaves out"),
    ):
        if is_set:
            raise ValueError(
                f"draft_vocab is {settings['draft_vocab']!r} and {name} is true, but {reason}; "
                "leave one of them out."
            )


def _check_lookup(settings: Mapping[str, Any]) -> None:
    """Refuse a way to look drafts up that is unknown, and what copied drafts do not have."""
    lookup = settings.get("lookup", "off")
    if lookup not in LOOKUPS:
        raise ValueError(f"lookup is {lookup!r}; it must be 'off' or 'auto'.")
    if lookup == "off":
        return
    for name, value, reason in (
        (
            "draft_sample_method",
            "probabilistic",
            "verifies drafts by the probabilities that they were sampled with",
        ),
        ("enable_adaptive_verification", True, "ranks drafts by the exit's confidence in them"),
        ("reuse_exit_states", "auto", "begins verification with what drafts left at the exit"),
        ("reuse_exit_states", "on", "begins verification with what drafts left at the exit"),
    ):
        if settings.get(name) == value:
            raise ValueError(
                f"lookup is {lookup!r} and {name} is {value!r}, which {reason}, and copied ones "
                "have none; leave one of them out."
            )


def check_schedule(settings: Mapping[str, Any], num_speculative_tokens: int) -> None:
    """Refuse a K by batch size with which vLLM itself would fail in the engine core."""
    name = "num_speculative_tokens_per_batch_size"
    if name not in settings:
        return
    try:
        schedule = validate_and_normalize_dynamic_sd_schedule(settings[name])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} is {settings[name]!r}: {error} It must be a list of [first batch size, last "
            "batch size, K] such as [[1, 4, 4], [5, 64, 2]]."
        ) from error
    largest = max(k for *_, k in schedule)
    if not 1 <= largest <= num_speculative_tokens:
        raise ValueError(
            f"{name} is {settings[name]!r}, whose largest K is {largest}; it must be between 1 and "
            f"num_speculative_tokens, which is {num_speculative_tokens}."
        )
