"""LoRA: every request drafts with its own adapter, in batches of several."""

import pytest

from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import (
    assert_all_accepted,
    assert_same_outputs,
    assert_some_accepted_some_refused,
)
from tests.support.lora_adapters import TARGETS, make_lora_adapter
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.feature("Models and weights", "LoRA, several adapters in one batch"),
]

# One slot more than adapters: on the CPU, vLLM gives requests without an adapter that of the last.
LORA = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def adapters(checkpoint, tmp_path_factory) -> tuple[str, str]:
    """Two adapters of the layers, of which the second changes the head too."""
    root, model = tmp_path_factory.mktemp("adapters"), checkpoint()
    layers = make_lora_adapter(root / "layers", model, 0)
    layers_and_head = make_lora_adapter(root / "head", model, 1, (*TARGETS, "lm_head"))
    return str(layers), str(layers_and_head)


@pytest.mark.parametrize("exit_layer", [2, NUM_LAYERS], ids=["E=2", "all-accepted"])
def test_each_request_drafts_with_its_adapter_when_they_share_a_batch(
    runner, checkpoint, adapters, exit_layer
):
    """With E = L a draft is refused as soon as one row has another request's adapter."""
    first, second = adapters
    prompt = tokens(20)
    requests = (
        Request(prompt, {"max_tokens": 12}),
        Request(prompt, {"max_tokens": 16}, adapter=first),
        Request(prompt, {"max_tokens": 12}, adapter=second),
        Request(tokens(50, 1), {"max_tokens": 10}, adapter=first, joins_at=1),
        Request(tokens(7, 2), {"max_tokens": 9}, joins_at=3),
    )
    engine = {**LORA, "max_num_batched_tokens": 64}
    scenario = Scenario(str(checkpoint()), requests, layerskip(exit_layer, 4), engine)
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert len({plain.outputs[index].token_ids[:12] for index in range(3)}) == 3
    if exit_layer == NUM_LAYERS:
        assert_all_accepted(drafted)
    else:
        assert_some_accepted_some_refused(drafted)


def test_drafts_have_no_adapter_when_no_request_has(runner, checkpoint):
    requests = (Request(tokens(20)), Request(tokens(9, 1), {"max_tokens": 15}))
    scenario = Scenario(str(checkpoint()), requests, layerskip(NUM_LAYERS, 4), LORA)
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert_all_accepted(drafted)
