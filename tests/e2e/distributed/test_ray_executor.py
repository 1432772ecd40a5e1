"""Ray's executor, with the workers as actors on one node and on two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.distributed.conftest import DRIVERS_OWN
from tests.support.checks import DRAFTERS
from tests.support.engine_process import RUNNERS, RunnerProcess
from tests.support.scenarios import Request, Scenario, layerskip, tokens
from tests.support.worker_probe import Served

EXIT_LAYER, K = 4, 3
REQUESTS = tuple(Request(tokens(length)) for length in (3, 17, 40, 32, 55, 9))
SERVE = "tests.support.distributed_job:serve"


def scenario(model: Path, **engine: object) -> Scenario:
    return Scenario(str(model), REQUESTS, layerskip(EXIT_LAYER, K), {"max_num_seqs": 3, **engine})


@pytest.fixture(scope="module", params=RUNNERS)
def driver(request: pytest.FixtureRequest, drivers: dict[str, RunnerProcess]) -> RunnerProcess:
    return drivers[request.param]


@pytest.fixture(scope="module")
def plain(driver: RunnerProcess, checkpoint: Callable[..., Path]) -> Served:
    """Without layerskip and without Ray."""
    return driver.run(SERVE, scenario(checkpoint()).plain())


@pytest.fixture(
    scope="module",
    params=[(1, SERVE), (2, f"{SERVE}_on_two_nodes")],
    ids=["one rank", "two ranks"],
)
def served(
    request: pytest.FixtureRequest, driver: RunnerProcess, checkpoint: Callable[..., Path]
) -> Served:
    num_ranks, job = request.param
    on_ray = {"distributed_executor_backend": "ray", "tensor_parallel_size": num_ranks}
    return driver.run(job, scenario(checkpoint(), **on_ray))


@pytest.mark.feature("Ray", "Ray executor")
def test_tokens_equal_plain_when_workers_are_ray_actors(plain: Served, served: Served) -> None:
    assert served.token_ids == plain.token_ids


def test_some_drafts_are_accepted_when_workers_are_ray_actors(served: Served) -> None:
    num_drafts, num_draft_tokens, num_accepted, _ = served.counts
    assert num_draft_tokens == num_drafts * K
    assert 0.05 < num_accepted / num_draft_tokens < 0.95


def test_all_ranks_draft_the_same_when_workers_are_ray_actors(served: Served) -> None:
    assert len(served.drafts[0]) > 10
    assert all(drafts == served.drafts[0] for drafts in served.drafts)


def test_settings_reach_each_actor_when_the_driver_alone_has_them(
    driver: RunnerProcess, served: Served
) -> None:
    for worker in served.workers:
        assert worker["drafter"] == DRAFTERS[driver.runner]
        assert (worker["exit_layer"], worker["num_speculative_tokens"]) == (EXIT_LAYER, K)
        assert worker["num_attn_layers"] == EXIT_LAYER
        assert DRIVERS_OWN.items() <= worker["variables"].items()


def test_ranks_are_on_different_nodes_when_no_node_has_room_for_both(served: Served) -> None:
    nodes = [worker["ray_node"] for worker in served.workers]
    assert None not in nodes
    assert len(set(nodes)) == len(nodes)
