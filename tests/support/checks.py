"""What the engine tests ask of two reports."""

from __future__ import annotations

import math

from tests.support.scenarios import Completion, Report

DRAFTERS = {"v1": "LayerSkipProposer", "v2": "LayerSkipSpeculator"}


def assert_same_outputs(plain: Report, drafted: Report) -> None:
    """Same tokens, text and end for every request, and speculation was really on."""
    assert plain.drafter is None
    assert drafted.drafter == DRAFTERS[drafted.runner]
    assert drafted.num_drafts > 0
    assert drafted.token_ids == plain.token_ids
    for expected, found in zip(completions(plain), completions(drafted), strict=True):
        assert found.text == expected.text
        assert found.finish_reason == expected.finish_reason
        assert found.stop_reason == expected.stop_reason


def assert_some_accepted_some_refused(drafted: Report) -> None:
    """A comparison in which all or none of the drafts were accepted proves little."""
    assert 0.05 < drafted.acceptance < 0.95, drafted.counts


def assert_all_accepted(drafted: Report) -> None:
    """Every draft token that was verified was accepted."""
    assert drafted.num_draft_tokens > 0
    assert drafted.num_accepted == drafted.num_draft_tokens


def assert_close_logprobs(expected: Completion, found: Completion, tolerance: float = 1e-4) -> None:
    """The same tokens with the same log probabilities at every position."""
    assert expected.logprobs is not None
    assert found.logprobs is not None
    assert len(found.logprobs) == len(expected.logprobs) == len(found.token_ids)
    for here, there in zip(expected.logprobs, found.logprobs, strict=True):
        assert here.keys() == there.keys()
        assert all(math.isclose(here[t], there[t], abs_tol=tolerance) for t in here)


def completions(report: Report) -> list[Completion]:
    """All completions of all requests that finished."""
    return [c for output in report.outputs if output is not None for c in output.completions]
