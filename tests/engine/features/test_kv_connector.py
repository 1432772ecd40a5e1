"""KV connectors: what one engine has computed for a prompt, another drafts on.

The connector fails where a step loads or saves a layer twice, as a draft step would.
"""

from dataclasses import replace

import pytest

from tests.support.checks import assert_same_outputs, assert_some_accepted_some_refused
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = [
    pytest.mark.feature("KV cache", "KV connectors (ExampleConnector)"),
]


def test_outputs_equal_plain_when_the_prompts_cache_comes_from_a_connector(
    runner, checkpoint, tmp_path
):
    connector = {
        "kv_connector": "OnceALayerConnector",
        "kv_connector_module_path": "tests.support.kv_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    requests = tuple(Request(tokens(70, seed), {"max_tokens": 14}) for seed in range(2))
    alone = Scenario(str(checkpoint()), requests, layerskip(2, 4))
    plain, _ = runner.pair(alone)
    shared = replace(alone, engine={"kv_transfer_config": connector})
    # All engines of a process have the one connector: each of these is alone in it.
    saving = runner.run("tests.support.jobs:serve_alone", shared)
    assert any(tmp_path.rglob("*.safetensors"))
    loading = runner.run("tests.support.jobs:serve_alone", shared)
    for report in (saving, loading):
        assert_same_outputs(plain, report)
        assert_some_accepted_some_refused(report)
    assert [output.num_cached_tokens for output in saving.outputs] == [0, 0]
    assert [output.num_cached_tokens for output in loading.outputs] == [64, 64]
