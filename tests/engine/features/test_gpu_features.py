"""What a GPU has alone: CUDA graphs, attention in bfloat16, host syncs, sleep, offloading.

`make check-gpu` runs all of this there, with the tests of `core` and others that are marked `gpu`.
On a CPU the same tests run small, where they show that they run, and what vLLM refuses there.
"""

import pytest

from layerskip_vllm.tools.engine_process import JobError
from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import assert_same_outputs, assert_some_accepted_some_refused
from tests.support.engine_process import IS_ON_GPU, TESTED_RUNNERS, RunnerProcess
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = pytest.mark.gpu

REQUESTS = (
    Request(tokens(3), {"max_tokens": 12}),
    Request(tokens(40), {"max_tokens": 9}, joins_at=1),
    Request(tokens(32), {"max_tokens": 12}, joins_at=2),
    Request(tokens(9), {"max_tokens": 10}, joins_at=4),
)
# Tokens before the first draft of a request, in turn; and requests at once.
CONTEXTS, BATCH_SIZES = (8, 3000, 200, 900, 31), (1, 3, 5, 17)
if not IS_ON_GPU:
    CONTEXTS, BATCH_SIZES = (8, 200, 31), (3,)
MAX_TOKENS = 200 if IS_ON_GPU else 12


@pytest.mark.parametrize("num_speculative_tokens", [4, 8])
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_every_position_is_accepted_when_all_layers_draft_in_bfloat16(
    runner, checkpoint, batch_size, num_speculative_tokens
):
    """A length, a slot or metadata left over from the step before shows from position 2 on.

    A draft that is refused all the same has met a near tie, which rounding decides: one may, and
    two in a hundred.
    """
    num_phases = -(-len(CONTEXTS) // batch_size)
    requests = tuple(
        Request(
            tokens(CONTEXTS[index % len(CONTEXTS)], index),
            {"max_tokens": MAX_TOKENS},
            phase=index // batch_size,
        )
        for index in range(num_phases * batch_size)
    )
    length = max(CONTEXTS) + MAX_TOKENS
    engine = {
        "dtype": "bfloat16",
        "max_num_seqs": max(BATCH_SIZES),
        "max_model_len": length,
        "kv_cache_memory_bytes": 1 << (27 if IS_ON_GPU else 24),
    }
    model = str(checkpoint(max_position_embeddings=length))
    speculative = layerskip(NUM_LAYERS, num_speculative_tokens)
    (drafted,) = runner.serve(Scenario(model, requests, speculative, engine))
    num_before = drafted.num_drafts
    for position, num_accepted in enumerate(drafted.num_accepted_per_pos, start=1):
        assert num_accepted >= 0.98 * num_before - 1, f"position {position} of {drafted.counts}"
        num_before = num_accepted


def test_tokens_and_drafts_are_the_same_when_drafts_have_no_graphs(runner, checkpoint):
    """And the target has; both are float32."""
    engine, model = {"max_num_seqs": 3}, str(checkpoint())
    with_graphs = Scenario(model, REQUESTS, layerskip(2, 3), engine)
    without = Scenario(model, REQUESTS, layerskip(2, 3, enforce_eager=True), engine)
    plain, graphs, eager = runner.serve(with_graphs.plain(), with_graphs, without)
    assert_same_outputs(plain, graphs)
    assert_some_accepted_some_refused(graphs)
    assert eager.token_ids == graphs.token_ids
    assert eager.counts == graphs.counts


def test_tokens_equal_plain_when_layers_are_compiled(runner, checkpoint):
    """On a GPU with vLLM's own settings; on a CPU `test_compile` does it."""
    engine = {"compilation_config": {}} if IS_ON_GPU else {}
    scenario = Scenario(str(checkpoint()), REQUESTS, layerskip(2, 3), engine)
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert_some_accepted_some_refused(drafted)


@pytest.mark.parametrize(
    ("environment", "engine", "settings"),
    [
        # vLLM ends a step in which the host waits for the device.
        ({"VLLM_GPU_SYNC_CHECK": "error"}, {}, {}),
        ({"VLLM_GPU_SYNC_CHECK": "error"}, {}, {"reuse_exit_states": "on"}),
        # No kernel's result depends on the batch's shape, so that bfloat16 is exact too.
        (
            {"VLLM_BATCH_INVARIANT": "1"},
            {"dtype": "bfloat16", "attention_backend": "TRITON_ATTN"},
            {},
        ),
    ],
    ids=["no-host-sync", "no-host-sync-reused", "batch-invariant"],
)
def test_tokens_equal_plain_when_process_has(checkpoint, tmp_path, environment, engine, settings):
    """On a CPU neither means anything, and its attention is its own: the first runs there."""
    if not IS_ON_GPU and engine:
        pytest.skip("vLLM has no batch-invariant kernels for a CPU")
    scenario = Scenario(str(checkpoint()), REQUESTS, layerskip(2, 3, **settings), engine)
    process = RunnerProcess("v2", tmp_path, environment)
    try:
        plain = process.run("tests.support.jobs:serve", scenario.plain())
        drafted = process.run("tests.support.jobs:serve", scenario)
    finally:
        process.stop()
    assert_same_outputs(plain, drafted)
    assert_some_accepted_some_refused(drafted)


@pytest.mark.parametrize("runner_name", TESTED_RUNNERS)
@pytest.mark.parametrize(
    ("feature", "engine", "settings", "job", "message"),
    [
        (
            "sleep mode",
            {"enable_sleep_mode": True},
            {},
            "sleep_job:serve_around_sleep",
            "Sleep mode is not supported on current",
        ),
        (
            "sleep mode with `reuse_exit_states`",
            {"enable_sleep_mode": True},
            {"reuse_exit_states": "on"},
            "sleep_job:serve_around_sleep",
            "Sleep mode is not supported on current",
        ),
        (
            "`OffloadingConnector`",
            {"kv_offloading_size": 0.05},
            {},
            "jobs:serve_alone",
            "CPU Offloading is currently only supported on CUDA-alike and XPU GPUs",
        ),
    ],
)
@pytest.mark.feature("Engine", "{feature} on a CPU", is_refused=True)
def test_engine_feature_works_on_a_gpu_and_is_refused_on_a_cpu_by_name(
    checkpoint, tmp_path, runner_name, feature, engine, settings, job, message
):
    scenario = Scenario(str(checkpoint()), REQUESTS, layerskip(2, 3, **settings), engine)
    process = RunnerProcess(runner_name, tmp_path)
    try:
        if not IS_ON_GPU:
            with pytest.raises(JobError, match=message):
                process.run(f"tests.support.{job}", scenario)
            return
        plain = process.run(f"tests.support.{job}", scenario.plain())
        assert_same_outputs(plain, process.run(f"tests.support.{job}", scenario))
    finally:
        process.stop()
