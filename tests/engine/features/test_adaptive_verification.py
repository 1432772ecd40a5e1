"""vLLM's adaptive verification: of the drafts of a step, those are verified that promise most."""

import pytest

from tests.support.checkpoints import VOCAB_SIZE
from tests.support.checks import assert_same_outputs
from tests.support.draft_vocabs import make_draft_vocab
from tests.support.scenarios import Request, Scenario, layerskip, tokens

K = 4
OWN_K = {"layerskip": {"num_speculative_tokens": 2}}
REQUESTS = (
    Request(tokens(9), {"max_tokens": 24}),
    Request(tokens(12), {"max_tokens": 24, "extra_args": OWN_K}),
    Request(tokens(40), {"max_tokens": 16}, joins_at=2),
    Request(tokens(7), {"max_tokens": 20}, joins_at=3),
)


@pytest.mark.parametrize(
    "beside",
    [
        {},
        {"draft_vocab": range(0, VOCAB_SIZE, 2)},
        {
            "draft_sample_method": "probabilistic",
            "num_speculative_tokens_per_batch_size": [[1, 2, 4], [3, 4, 2]],
        },
    ],
    ids=["alone", "draft-vocab", "probabilistic-and-K-by-batch-size"],
)
@pytest.mark.feature(
    "Speculative settings", "`enable_adaptive_verification`, without a GPU", runners=("v2",)
)
def test_tokens_equal_plain_when_drafts_are_trimmed(engines, checkpoint, tmp_path, beside):
    """One has a K of its own, one is in parts, and a row's confidence is its request's."""
    settings = dict(beside)
    if "draft_vocab" in settings:
        settings["draft_vocab"] = make_draft_vocab(tmp_path / "ids.json", settings["draft_vocab"])
    scenario = Scenario(
        str(checkpoint()),
        REQUESTS,
        layerskip(4, K, enable_adaptive_verification=True, **settings),
        {"max_num_batched_tokens": 32, "max_num_seqs": 4},
    )
    drafted, budgets, difference = engines.run(
        "v2", "tests.support.adaptive_job:serve_adaptively", scenario
    )
    (plain,) = engines.serve("v2", scenario.plain())
    assert_same_outputs(plain, drafted)
    assert drafted.num_accepted > 0
    num_trimmed = sum(0 < verified < scheduled for scheduled, verified in budgets)
    assert num_trimmed > len(budgets) / 2, budgets
    assert difference == 0
