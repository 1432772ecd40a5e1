"""What `layerskip-vllm verify` prints and writes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from layerskip_vllm.tools.verify.command import VerifyConfig
from layerskip_vllm.tools.verify.comparison import FALSE_ALARM, EngineComparison, Verdict
from layerskip_vllm.tools.verify.engine_run import EngineOutput
from layerskip_vllm.tools.verify.runs import DRAFTED, FLOOR, UNVERIFIED

_LABELS = {
    FLOOR: "plain vLLM again (the floor)",
    DRAFTED: "layerskip",
    UNVERIFIED: "drafts without verification (must differ)",
}


def build_verdict_table(config: VerifyConfig, drafted: EngineOutput, verdict: Verdict) -> Table:
    """Lay the comparisons with plain vLLM out, one a line, over what was run and on what."""
    caption = (
        f"{config.model}, {drafted.dtype}, {drafted.speculation}, Model Runner {drafted.runner} "
        f"on {drafted.device or 'CPU'}; {config.num_prompts} prompts of {config.max_tokens} greedy "
        f"tokens, {config.num_samples} samples a prompt that is sampled from"
    )
    table = Table(title="Against plain vLLM", caption=caption, caption_justify="left")
    table.add_column("run")
    headings = ("greedy: diverge", "not ties", "largest gap", "sampled: p", "distance", "accepted")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, comparison in verdict.comparisons.items():
        table.add_row(_LABELS[name], *_describe(comparison, verdict.tolerance))
    return table


def _describe(comparison: EngineComparison, tolerance: float) -> tuple[str, ...]:
    gaps = [divergence.gap for divergence in comparison.divergences]
    return (
        str(len(gaps)),
        str(len(comparison.lost(tolerance))),
        f"{max(gaps):.2g}" if gaps else "-",
        "-" if comparison.p_value is None else f"{comparison.p_value:.2g}",
        "-" if comparison.distance is None else f"{comparison.distance:.3f}",
        "-" if comparison.acceptance is None else f"{comparison.acceptance:.0%}",
    )


def verdict_to_json(
    config: VerifyConfig, drafted: EngineOutput, verdict: Verdict
) -> dict[str, Any]:
    """Return all that was asked for and found as a JSON object."""
    return {
        "is_lossless": not verdict.problems,
        "problems": verdict.problems,
        "tolerance_nats": verdict.tolerance,
        "false_alarm": FALSE_ALARM,
        "comparisons": {name: asdict(c) for name, c in verdict.comparisons.items()},
        "setting": {
            **config.model_dump(include=set(VerifyConfig.model_fields)),
            "runner": drafted.runner,
            "device": drafted.device,
            "dtype": drafted.dtype,
            "speculation": drafted.speculation,
        },
    }
