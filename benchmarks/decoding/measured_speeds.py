"""What `step_model` says beside what was measured, by this project and by others."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.decoding.devices_and_models import (
    A100,
    H100,
    H200,
    LLAMA_2_7B,
    LLAMA_2_13B,
    LLAMA_2_70B,
    LLAMA_3_1_8B,
    QWEN3_8B,
)
from benchmarks.decoding.step_model import BYTES_PER_VALUE, Device, Drafting, StepModel
from benchmarks.decoding.synthetic_spec import PRESETS
from benchmarks.decoding.weight_counts import count_weights

# With `reuse_exit_states` on "auto", the tokens with exit states that a step must have
# (`drafting/verifier.py`, MIN_NUM_KEPT).
MIN_NUM_REUSED = 24


@dataclass(frozen=True)
class SpeedComparison:
    """One speed, measured and predicted.

    Attributes:
        what: Of what.
        measured: Tokens a second, of all requests.
        predicted: The same on paper.
        is_fitted: Whether the device's rates or costs were chosen to give this speed.
        gain: Tokens a second in times plain decoding's, as measured; None for plain decoding.
        predicted_gain: The same on paper.
    """

    what: str
    measured: float
    predicted: float
    is_fitted: bool = False
    gain: float | None = None
    predicted_gain: float | None = None

    @property
    def error(self) -> float:
        """How much more was predicted, as a share of what was measured."""
        return self.predicted / self.measured - 1


def fit_cpu(study: Mapping[str, Any]) -> tuple[Device, Mapping[str, Any]]:
    """Read a CPU's rates from plain vLLM's steps.

    A step takes what reading the weights does and so much a row, one after the other, as two cores
    do it.

    Args:
        study: A file of `benchmarks.bench` of a shape (`--preset`), with several batch sizes.

    Returns:
        The device, and the config of the shape that was measured.

    Raises:
        ValueError: If larger batches did not take longer.
    """
    spec = PRESETS[_find_option(study, "--preset")]
    config = {
        "num_hidden_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
    }
    steps = {
        line["load"]["batch_size"]: line["load"]["batch_size"] / line["tokens_per_s"]
        for line in study["summary"]
        if line["system"] == "plain"
    }
    per_row, reading = statistics.linear_regression(list(steps), list(steps.values()))
    if min(per_row, reading) <= 0:
        raise ValueError(
            f"Plain steps of {', '.join(map(str, steps))} requests do not take longer the more "
            "there are; measure again on a quiet machine, with batch sizes as 1 4 16 32."
        )
    whole = count_weights(config).whole
    device = Device(
        study["hardware"],
        bytes_per_s=BYTES_PER_VALUE * whole / reading,
        flops_per_s=2 * whole / per_row,
    )
    return device, config


def compare_study(study: Mapping[str, Any]) -> list[SpeedComparison]:
    """Predict each line of a study from its plain lines, and from how much was drafted.

    Args:
        study: As for `fit_cpu`.

    Returns:
        A comparison a line, of those systems that the model knows.
    """
    device, config = fit_cpu(study)
    model = StepModel(config, device)
    exit_layer = PRESETS[_find_option(study, "--preset")].exit_layer
    num_tokens = int(_find_option(study, "--max-tokens"))
    comparisons = []
    for line in study["summary"]:
        load, system = line["load"], line["system"]
        drafting = _read_drafting(system, exit_layer)
        if drafting is None:
            continue
        counters = [
            each["counters"]
            for each in study["rounds"]
            if each["load"] == load and each["system"] == system
        ]
        context = load["num_prompt_tokens"] + num_tokens // 2
        # The first token is prefill's.
        decoded = len(counters) * load["batch_size"] * (num_tokens - 1)
        seconds = _play_rounds(model, drafting, load["batch_size"], context, counters, decoded)
        plain_s = decoded / load["batch_size"] * model.target_s(load["batch_size"], context)
        is_plain = system == "plain"
        comparisons.append(
            SpeedComparison(
                f"{system}, batch {load['batch_size']}",
                line["tokens_per_s"],
                decoded / seconds,
                is_fitted=is_plain,
                gain=None if is_plain else line["speedup"],
                predicted_gain=None if is_plain else plain_s / seconds,
            )
        )
    return comparisons


def _play_rounds(
    model: StepModel,
    drafting: Drafting,
    batch_size: int,
    context: int,
    counters: Sequence[Mapping[str, Any]],
    decoded: int,
) -> float:
    """Return the seconds of all rounds: as many verifications and plain steps as there were."""
    num_drafts: int = sum(each["num_drafts"] for each in counters)  # a request's, not a batch's
    num_drafted: int = sum(each["num_draft_tokens"] for each in counters)
    num_accepted: int = sum(each["num_accepted_tokens"] for each in counters)
    num_plain = max(0, decoded - num_drafts - num_accepted)
    seconds = num_plain / batch_size * model.target_s(batch_size, context)
    if num_drafts:
        mean = num_drafted / num_drafts
        if drafting.reuses_exit_states and batch_size * mean < MIN_NUM_REUSED:
            drafting = replace(drafting, reuses_exit_states=False)
        seconds += num_drafts / batch_size * model.round_s(batch_size, context, drafting, mean)
    return seconds


def _read_drafting(system: str, exit_layer: int) -> Drafting | None:
    name, *settings = system.split("+")
    if name not in ("plain", "layerskip", "draft_model") or not set(settings) <= {"auto", "reuse"}:
        return None
    return Drafting(
        exit_layer,
        reuses_exit_states="reuse" in settings,
        has_own_cache=name == "draft_model",
    )


def _find_option(study: Mapping[str, Any], name: str) -> str:
    words = shlex.split(study["command"])
    if name not in words:
        raise ValueError(f"The study's command has no {name}: {study['command']}")
    return words[words.index(name) + 1]


# Plain decoding, one request where no batch is named. Sources: vLLM's pull requests 20780 and
# 16937; the EAGLE-3 paper (SGLang); SafeAILab/EAGLE's pull requests 173 and 211; Uno's report;
# gpt-fast's README, whose A100s were held to 330 W. (what, config, device, ranks, batch, context,
# tokens a second, whether the assumptions were chosen on it)
_PLAIN = (
    ("Llama 3.1 8B, H100, vLLM (#20780)", LLAMA_3_1_8B, H100, 1, 1, 300, 1000 / 7.07, True),
    ("Llama 3.1 8B, H100, vLLM (#16937)", LLAMA_3_1_8B, H100, 1, 1, 300, 133.0, True),
    ("Llama 3.1 8B, H100, SGLang", LLAMA_3_1_8B, H100, 1, 1, 300, 158.0, True),
    ("Llama 2 7B, H100", LLAMA_2_7B, H100, 1, 1, 300, 156.0, False),
    ("Qwen3 8B, H200, SGLang", QWEN3_8B, H200, 1, 1, 300, 186.0, False),
    ("Qwen3 8B, H100, SGLang", QWEN3_8B, H100, 1, 1, 300, 190.0, False),
    ("Qwen3 8B, H100, SGLang, 64 clients", QWEN3_8B, H100, 1, 64, 500, 6095.0, False),
    ("Llama 2 7B, A100, gpt-fast", LLAMA_2_7B, A100, 1, 1, 100, 104.9, False),
    ("Llama 2 7B, 2 A100, gpt-fast", LLAMA_2_7B, A100, 2, 1, 100, 168.84, True),
    ("Llama 2 7B, 4 A100, gpt-fast", LLAMA_2_7B, A100, 4, 1, 100, 254.02, True),
    ("Llama 2 7B, 8 A100, gpt-fast", LLAMA_2_7B, A100, 8, 1, 100, 328.43, True),
    ("Llama 2 70B, 2 A100, gpt-fast", LLAMA_2_70B, A100, 2, 1, 100, 21.32, False),
    ("Llama 2 70B, 4 A100, gpt-fast", LLAMA_2_70B, A100, 4, 1, 100, 38.01, False),
    ("Llama 2 70B, 8 A100, gpt-fast", LLAMA_2_70B, A100, 8, 1, 100, 62.50, False),
)
# The LayerSkip paper, Tables 3 and 5: self-speculation over Transformers, one request. (task,
# config, device, E, tokens a draft, accepted of them, plain and self-speculative tokens a second)
_PAPER = (
    ("CNN/DM, Llama 2 7B", LLAMA_2_7B, H100, 8, 12, 0.689, 62.7, 127.9),
    ("CNN/DM, Llama 2 13B", LLAMA_2_13B, H100, 15, 12, 0.745, 37.2, 70.2),
    ("XSUM, Llama 2 7B", LLAMA_2_7B, H100, 8, 12, 0.546, 63.4, 104.7),
    ("XSUM, Llama 2 13B", LLAMA_2_13B, H100, 15, 4, 0.677, 43.8, 60.5),
    ("HumanEval, Llama 2 7B", LLAMA_2_7B, H100, 8, 6, 0.671, 62.9, 122.8),
    ("HumanEval, Llama 2 13B", LLAMA_2_13B, H100, 7, 4, 0.57, 48.9, 84.2),
    ("HumanEval, Llama 1 7B", LLAMA_2_7B, A100, 6, 12, 0.45, 34.0, 62.0),
)
# EAGLE-1 for Llama 3 8B on an H200, vLLM's pull request 38399: milliseconds a token by clients. How
# many tokens it drafts is not said; three are usual.
_EAGLE_TPOT_MS = {1: 3.36, 2: 3.37, 4: 3.32, 8: 3.32, 16: 3.53, 32: 4.11, 64: 6.04}
_EAGLE_NUM_DRAFTS = 3


def compare_plain() -> Iterator[SpeedComparison]:
    """Predict published speeds of plain decoding on GPUs."""
    for what, config, device, num_ranks, batch_size, context, measured, is_fitted in _PLAIN:
        step_s = StepModel(config, device, num_ranks).target_s(batch_size, context)
        yield SpeedComparison(what, measured, batch_size / step_s, is_fitted)


def compare_paper() -> Iterator[SpeedComparison]:
    """Predict the paper's self-speculation from its plain decoding.

    Its loop launches each kernel from Python, so that a layer's launches cost more than its
    weights; what they cost is what plain decoding leaves after the bytes.
    """
    for task, config, device, exit_layer, num_drafts, accepted, plain, measured in _PAPER:
        bare = replace(device, layer_s=0.0, step_s=0.0, draft_step_s=0.0)
        left = 1 / plain - StepModel(config, bare).target_s(1, 500)
        eager = replace(bare, layer_s=left / config["num_hidden_layers"])
        # A verification runs the first layers for the last draft alone.
        drafting = Drafting(exit_layer, reuses_exit_states=True)
        round_s = StepModel(config, eager).round_s(1, 500, drafting, num_drafts)
        what = f"{task}, E = {exit_layer}, K = {num_drafts}"
        predicted = (accepted * num_drafts + 1) / round_s
        yield SpeedComparison(
            what, measured, predicted, gain=measured / plain, predicted_gain=predicted / plain
        )


def compare_batches() -> Iterator[SpeedComparison]:
    """Predict a published drafter's speed by batch from its speed with one request.

    What is accepted is the same then, so that it is a round's growth alone that is predicted. The
    drafter is a layer of the target's size, and the target's head.
    """
    model, drafting = StepModel(LLAMA_3_1_8B, H200), Drafting(1, has_own_cache=True)
    alone = model.round_s(1, 150, drafting, _EAGLE_NUM_DRAFTS)
    for batch_size, tpot_ms in _EAGLE_TPOT_MS.items():
        growth = model.round_s(batch_size, 150, drafting, _EAGLE_NUM_DRAFTS) / alone
        yield SpeedComparison(
            f"Llama 3 8B with EAGLE-1, H200, batch {batch_size}",
            1000 * batch_size / tpot_ms,
            1000 * batch_size / (_EAGLE_TPOT_MS[1] * growth),
            is_fitted=True,
        )
