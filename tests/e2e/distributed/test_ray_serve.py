"""`examples/ray_serve.py`: OpenAI requests to Ray Serve LLM, two ranks on logical GPUs."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from layerskip_vllm.tools.server.process import find_free_port
from tests.e2e.distributed.ray_example import EXIT_LAYER, IS_ON, Example, K, engine_flag
from tests.support.engine_process import RunnerProcess
from tests.support.ray_cluster import RayCluster
from tests.support.scenarios import Request, Scenario, layerskip, tokens

PROMPT = tokens(17)
NUM_TOKENS = 24


@dataclass(frozen=True)
class Application:
    """The example, and where it answers."""

    port: int
    example: Example

    def complete(self, **parameters: Any) -> dict[str, Any]:
        """POST to `/v1/completions`: the response."""
        body = {"model": "layerskip", "prompt": list(PROMPT), "temperature": 0, **parameters}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as response:
            return json.load(response)


@pytest.fixture(scope="module")
def application(
    cluster: RayCluster, checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Application]:
    port = find_free_port()
    flags = (
        f"--port={port}",
        engine_flag(tensor_parallel_size=2, per_request_spec_decode_metrics="detailed"),
    )
    folder = tmp_path_factory.mktemp("serve")
    with Example(cluster, folder, "ray_serve", checkpoint(), *flags) as example:
        example.wait("serving")
        yield Application(port, example)


@pytest.mark.feature("Ray", "Ray Serve LLM", runners=("v1",))
def test_response_equals_plain_vllm_when_ray_serve_answers(
    application: Application, driver: RunnerProcess, checkpoint: Callable[..., Path]
) -> None:
    requests = (Request(PROMPT, {"max_tokens": NUM_TOKENS}),)
    speculative = layerskip(EXIT_LAYER, K)
    scenario = Scenario(str(checkpoint()), requests, speculative)
    plain, drafted = (
        driver.run("tests.support.distributed_job:serve", one)
        for one in (scenario.plain(), scenario)
    )
    response = application.complete(max_tokens=NUM_TOKENS, ignore_eos=True, return_token_ids=True)
    assert response["choices"][0]["token_ids"] == plain.token_ids[0]
    drafting = response["metrics"]["speculative_decoding"]
    found = [
        drafting[key] for key in ("num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens")
    ]
    assert found == list(drafted.counts[:3])
    assert drafting["num_spec_tokens"] == K
    assert 0 < found[2] < found[1]


def test_worker_drafts_as_the_configuration_says_when_ray_serve_answers(
    application: Application,
) -> None:
    logged = [line for line in application.example.output.splitlines() if "layerskip is on" in line]
    assert logged
    assert all("(RayWorkerProc" in line and IS_ON in line for line in logged)
