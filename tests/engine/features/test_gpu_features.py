"""What vLLM has on GPUs alone: on a CPU it says so, with drafts as without."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layerskip_vllm.tools.engine_process import JobError
from tests.support.engine_process import RunnerProcess
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM has both on a GPU"),
]


@pytest.mark.parametrize("runner_name", ["v1", "v2"])
@pytest.mark.parametrize(
    ("feature", "engine", "message"),
    [
        ("sleep mode", {"enable_sleep_mode": True}, "Sleep mode is not supported on current"),
        (
            "`OffloadingConnector`",
            {"kv_offloading_size": 0.05},
            "CPU Offloading is currently only supported on CUDA-alike and XPU GPUs",
        ),
    ],
)
@pytest.mark.feature("Engine", "{feature} on a CPU", is_refused=True)
def test_engine_is_refused_on_a_cpu_by_name(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    runner_name: str,
    feature: str,
    engine: dict[str, object],
    message: str,
) -> None:
    requests = (Request(tokens(5), {"max_tokens": 4}),)
    scenario = Scenario(str(checkpoint()), requests, layerskip(2, 3), engine)
    process = RunnerProcess(runner_name, tmp_path)
    try:
        with pytest.raises(JobError, match=message):
            process.run("tests.support.jobs:serve", scenario)
    finally:
        process.stop()
