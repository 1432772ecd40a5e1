"""`examples/ray_data.py`: batch inference by Ray Data LLM, on a logical GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.e2e.distributed.ray_example import IS_ON, Example, engine_flag
from tests.support.engine_process import RunnerProcess
from tests.support.ray_cluster import RayCluster
from tests.support.scenarios import Request, Scenario

NUM_TOKENS = 48  # as in the example


@pytest.fixture(scope="module")
def output(
    cluster: RayCluster, checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """What the example and its actors write."""
    folder, flag = tmp_path_factory.mktemp("data"), engine_flag(distributed_executor_backend="ray")
    with Example(cluster, folder, "ray_data", checkpoint(), flag) as example:
        return example.wait()


@pytest.mark.feature("Ray", "Ray Data LLM", runners=("v1",))
def test_rows_equal_plain_vllm_when_ray_data_generates(
    output: str, driver: RunnerProcess, checkpoint: Callable[..., Path]
) -> None:
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"prompt"')]
    assert len(rows) == 4
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    params = {"max_tokens": NUM_TOKENS, "ignore_eos": False}
    requests = tuple(Request(tuple(tokenizer(row["prompt"]).input_ids), params) for row in rows)
    plain = driver.run("tests.support.distributed_job:serve", Scenario(str(checkpoint()), requests))
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in plain.token_ids]
    assert [row["text"] for row in rows] == texts


def test_actor_drafts_as_the_configuration_says_when_ray_data_generates(output: str) -> None:
    assert IS_ON in output
    counts = re.findall(r"Accepted: (\d+) tokens, Drafted: (\d+) tokens", output)
    assert any(0 < int(accepted) < int(drafted) for accepted, drafted in counts)
