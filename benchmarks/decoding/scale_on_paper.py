"""What drafting gains where nobody has measured it: larger models, GPUs, batches, long prompts.

    python -m benchmarks.decoding.scale_on_paper

From `step_model`: first beside what was measured, then what it says of Llama models on NVIDIA GPUs.
Prints Markdown, and draws a picture; seconds, no engine. docs/scale.md has what it prints.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.decoding.devices_and_models import (
    A100,
    H100,
    H200,
    L4,
    LLAMA_3_1_8B,
    LLAMA_3_1_70B,
    LLAMA_3_2_1B,
)
from benchmarks.decoding.measured_speeds import (
    SpeedComparison,
    compare_batches,
    compare_paper,
    compare_plain,
    compare_study,
)
from benchmarks.decoding.step_model import Drafting, StepModel

MEASURED = Path("benchmarks/results/scale.json")
PICTURE = Path("benchmark-output/scale-on-paper.png")
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (1000, 14000)
NUM_DRAFTS = 4
MAX_NUM_DRAFTS = 8  # of "auto"
# The chance of a draft where all before it were accepted: 68 % of four then are, and the paper's
# tasks had 45 to 78 % of their drafts.
ACCEPTANCE = 0.85
ACCEPTANCES = (0.6, 0.7, 0.8, 0.9)
DRAFT_VOCAB = 0.25  # of the head's rows, accepted as often
CLEAR_GAIN = 1.1  # less is within the model's error


@dataclass(frozen=True)
class Case:
    """A model on its devices, with an exit after a quarter of its layers.

    Attributes:
        name: In words.
        model: Its steps.
    """

    name: str
    model: StepModel

    @property
    def drafting(self) -> Drafting:
        """How it drafts, with the whole head."""
        return Drafting(self.model.counts.num_layers // 4)

    def gain(
        self,
        batch_size: int,
        context: int,
        num_drafts: int,
        acceptance: float = ACCEPTANCE,
        head_share: float = 1.0,
    ) -> float:
        """Return tokens a second, in times plain decoding's."""
        drafting = replace(self.drafting, head_share=head_share)
        size = (batch_size, context)
        plain = self.model.speed(*size, drafting, 0, acceptance)
        return self.model.speed(*size, drafting, num_drafts, acceptance) / plain

    def best_gain(
        self,
        batch_size: int,
        context: int,
        acceptance: float = ACCEPTANCE,
        head_share: float = 1.0,
    ) -> tuple[float, int]:
        """Return the gain of the best K, which may be 0, and that K."""
        return max(
            (self.gain(batch_size, context, k, acceptance, head_share), k)
            for k in range(MAX_NUM_DRAFTS + 1)
        )


CASES = (
    Case("Llama 3.2 1B on an H100", StepModel(LLAMA_3_2_1B, H100)),
    Case("Llama 3.1 8B on an H100", StepModel(LLAMA_3_1_8B, H100)),
    Case("Llama 3.1 70B on eight H100", StepModel(LLAMA_3_1_70B, H100, num_ranks=8)),
)
# With how many of them share the model.
DEVICES = ((H100, 1), (H100, 2), (H100, 8), (H200, 1), (A100, 1), (L4, 1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables and draw the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decoding.scale_on_paper", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--measured", type=Path, default=MEASURED, help="a shape's study of `make bench`"
    )
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the PNG to write")
    options = parser.parse_args(arguments)
    study = json.loads(options.measured.read_text(encoding="utf-8"))
    here = f"{study['hardware']}, revision {study['revision']}, {study['date']}"
    comparisons = {
        f"Measured here: {here}": compare_study(study),
        "Published: plain decoding on GPUs": [*compare_plain()],
        "Published: a drafter by batch": [*compare_batches()],
        "Published: the paper's tasks": [*compare_paper()],
    }
    print("\n".join([*write_comparisons(comparisons), *write_predictions()]))
    from benchmarks.decoding.scale_picture import make_scale_figure  # matplotlib takes a second

    options.picture.parent.mkdir(parents=True, exist_ok=True)
    make_scale_figure(comparisons, CASES, CONTEXTS).savefig(options.picture)


def write_comparisons(comparisons: Mapping[str, Sequence[SpeedComparison]]) -> Iterator[str]:
    """Yield what was measured beside what the model says, as Markdown."""
    headings = ("", "tokens/s", "predicted", "error", "times plain", "predicted")
    for title, rows in comparisons.items():
        yield from (f"### {title}", "")
        yield from _tabulate(
            headings,
            (
                (
                    each.what,
                    f"{each.measured:,.1f}",
                    f"{each.predicted:,.1f}",
                    f"{each.error:+.0%}" + (" (fitted)" if each.is_fitted else ""),
                    "" if each.gain is None else f"{each.gain:.2f}",
                    "" if each.predicted_gain is None else f"{each.predicted_gain:.2f}",
                )
                for each in rows
            ),
        )
        errors = [abs(each.error) for each in rows if not each.is_fitted]
        if errors:
            yield (
                f"Not fitted: {len(errors)}, with an error of {statistics.mean(errors):.0%} on "
                f"average and {max(errors):.0%} at most."
            )
            yield ""


def write_predictions() -> Iterator[str]:
    """Yield what the model says of GPUs, as Markdown."""
    for case in CASES:
        yield from (f"### {case.name}, E = {case.drafting.exit_layer}", "")
        yield from _tabulate_case(case)
    yield from ("### Up to which batch it gains 1.1, and anything", "", *_tabulate_limits())
    title = "### Llama 3.1 8B by GPU and tensor-parallel size"
    yield from (title, "", *_tabulate_devices())


def _tabulate_case(case: Case) -> Iterator[str]:
    headings = ["batch"]
    for context in CONTEXTS:
        headings += [f"plain, {context:,} tokens", f"K = {NUM_DRAFTS}", "quarter of the head"]
        headings += ["best K"]
    rows = []
    for batch_size in BATCH_SIZES:
        cells = [str(batch_size)]
        for context in CONTEXTS:
            cells += _gain_cells(case, batch_size, context)
        rows.append(cells)
    yield from _tabulate(headings, rows)


def _gain_cells(case: Case, batch_size: int, context: int) -> list[str]:
    if not case.model.fits(batch_size, context):
        return ["does not fit", "", "", ""]
    plain = batch_size / case.model.target_s(batch_size, context)
    whole = case.gain(batch_size, context, NUM_DRAFTS)
    quarter = case.gain(batch_size, context, NUM_DRAFTS, head_share=DRAFT_VOCAB)
    best, num_drafts = case.best_gain(batch_size, context, head_share=DRAFT_VOCAB)
    best_words = f"{best:.2f} (K = {num_drafts})" if num_drafts else "1.00 (none)"
    return [f"{plain:,.0f}", f"{whole:.2f}", f"{quarter:.2f}", best_words]


def _tabulate_limits() -> Iterator[str]:
    headings = ["", "context", "K", *(f"a = {a}" for a in ACCEPTANCES)]
    rows = []
    for case in CASES:
        for context in CONTEXTS:
            for k, words in ((NUM_DRAFTS, str(NUM_DRAFTS)), (None, "best")):
                cells = [tell_limits(case, context, a, k) for a in ACCEPTANCES]
                rows.append([case.name, f"{context:,}", words, *cells])
    yield from _tabulate(headings, rows)


def tell_limits(case: Case, context: int, acceptance: float, num_drafts: int | None) -> str:
    """Return up to which batch drafting gains as much as the model can tell, and anything.

    Args:
        case: The model, with the whole head.
        context: Tokens of each request.
        acceptance: The chance of a draft.
        num_drafts: K, or None for the best one of each batch size.

    Returns:
        Two batch sizes, the first for `CLEAR_GAIN`. One that is the largest that fits into the
        memory or into the table has a plus.
    """
    limits = [0, 0]
    for batch_size in range(1, BATCH_SIZES[-1] + 1):
        if not case.model.fits(batch_size, context):
            break
        if num_drafts is None:
            gain = case.best_gain(batch_size, context, acceptance)[0]
        else:
            gain = case.gain(batch_size, context, num_drafts, acceptance)
        for index, least in enumerate((CLEAR_GAIN, 1 + 1e-9)):
            if gain >= least and limits[index] == batch_size - 1:
                limits[index] = batch_size
        largest = batch_size
    return ", ".join(f"{limit}+" if limit == largest else str(limit) for limit in limits)


def _tabulate_devices() -> Iterator[str]:
    headings = ["", "context", "plain, batch 1", "K = 4, batch 1", "16", "64"]
    headings += ["gains up to", "with the best K"]
    rows = []
    for device, num_ranks in DEVICES:
        name = device.name if num_ranks == 1 else f"{num_ranks} times {device.name}"
        case = Case(name, StepModel(LLAMA_3_1_8B, device, num_ranks))
        for context in CONTEXTS:
            cells = [name, f"{context:,}", f"{1 / case.model.target_s(1, context):,.0f}"]
            for batch_size in (1, 16, 64):
                fits = case.model.fits(batch_size, context)
                gain = case.gain(batch_size, context, NUM_DRAFTS)
                cells.append(f"{gain:.2f}" if fits else "does not fit")
            cells += [tell_limits(case, context, ACCEPTANCE, k) for k in (NUM_DRAFTS, None)]
            rows.append(cells)
    yield from _tabulate(headings, rows)


def _tabulate(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (headings, ["---"] * len(headings), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""


if __name__ == "__main__":
    main()
