"""Speculation costs no KV cache blocks, and no weight is held a second time."""

import pytest

from tests.support.checks import DRAFTERS
from tests.support.scenarios import Scenario, layerskip


@pytest.mark.parametrize(
    ("architecture", "part"),
    # The smallest part of the model that drafts read: nothing of that size is new.
    [("llama", "head_bytes"), ("llama-tied", "head_bytes"), ("mixtral", "layer_bytes")],
)
def test_engine_holds_no_more_when_it_drafts(runner, checkpoint, architecture, part):
    model = str(checkpoint(architecture))
    job = "tests.support.memory_job:holdings"
    # Few tokens a step: vLLM's buffers of token states are then smaller than a layer.
    engine = {"max_num_batched_tokens": 32, "max_num_seqs": 2, "max_model_len": 64}
    plain = runner.run(job, Scenario(model, (), None, engine))
    drafted = runner.run(job, Scenario(model, (), layerskip(4, 3), engine))

    assert drafted.num_blocks == plain.num_blocks
    assert drafted.kv_cache_bytes == plain.kv_cache_bytes

    assert len(set(drafted.names)) == len(drafted.names)
    assert drafted.names == plain.names
    # Of all parameters in the process, none but the target's, and as many as without drafts.
    assert drafted.all_storages == drafted.storages
    assert len(drafted.storages) == len(plain.storages)
    assert drafted.num_parameters == plain.num_parameters
    assert (plain.drafter, drafted.drafter) == (None, DRAFTERS[runner.name])
    assert drafted.drafter_names == ()
    assert drafted.tensor_bytes - plain.tensor_bytes < getattr(drafted, part)
