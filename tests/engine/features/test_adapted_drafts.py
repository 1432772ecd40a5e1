"""Drafting through an exit adapter: other drafts, the same tokens."""

import dataclasses

import pytest
import torch
import transformers

from layerskip_vllm.checkpoint.exit_adapter import load_exit_adapter
from layerskip_vllm.training.decoder import capture_layer_outputs, find_decoder_parts
from layerskip_vllm.training.exit_evaluation import complete_greedily, simulate_acceptance
from tests.engine.features.test_architectures import REQUESTS  # whose plain engines are served once
from tests.support.checkpoints import NUM_LAYERS, VOCAB_SIZE
from tests.support.checks import assert_same_outputs, assert_some_accepted_some_refused
from tests.support.exit_adapters import make_exit_adapter
from tests.support.scenarios import Request, Scenario, layerskip

EXIT_LAYER = 2


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Adapters of each size, made once."""
    root = tmp_path_factory.mktemp("adapters")

    def make(std: float, **config):
        return make_exit_adapter(root / f"{std} {config}", std, **config)

    return make


def with_adapter(scenario: Scenario, folder) -> Scenario:
    return dataclasses.replace(
        scenario,
        speculative={
            "method": "layerskip",
            "num_speculative_tokens": 3,
            "exit_adapter": str(folder),
        },
    )


def test_drafts_are_the_plain_exits_when_the_adapter_is_untrained(runner, checkpoint, folders):
    plain_exit = Scenario(str(checkpoint()), REQUESTS, layerskip(EXIT_LAYER, 3))
    expected, found = runner.serve(plain_exit, with_adapter(plain_exit, folders(0.0)))
    assert found.token_ids == expected.token_ids
    assert found.counts == expected.counts
    assert_some_accepted_some_refused(found)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "olmo2"])
@pytest.mark.feature("Models and weights", "exit adapter")
def test_tokens_equal_plain_when_an_adapter_changes_the_drafts(
    runner, checkpoint, folders, architecture
):
    """OLMo 2 runs through transformers; Gemma 2's norm multiplies by one more than its weight."""
    plain_exit = Scenario(str(checkpoint(architecture)), REQUESTS, layerskip(EXIT_LAYER, 3))
    hidden_size = 128 if architecture == "olmo2" else 64
    adapted = with_adapter(plain_exit, folders(0.2, hidden_size=hidden_size))
    without, drafted = runner.serve(plain_exit, adapted)
    plain, _ = runner.pair(plain_exit)
    assert_same_outputs(plain, drafted)
    assert drafted.counts != without.counts


def test_engine_holds_the_saved_weights_as_buffers_of_the_drafter(runner, checkpoint, folders):
    """vLLM saves a drafter's buffers before it sleeps, and loads a checkpoint into parameters."""
    folder = folders(0.2, rank=16)
    scenario = with_adapter(Scenario(str(checkpoint()), ()), folder)
    held = runner.run("tests.support.exit_adapter_job:hold", scenario)
    saved = load_exit_adapter(folder).state_dict()
    assert held.weights == {f"exit_adapter.{name}": saved[name].tolist() for name in saved}
    assert held.dtypes == {"torch.float32"}
    assert held.parameters == ()
    assert not any("adapter" in name for name in held.target_names)
    # Equal layers of 2 * 64 * 32 * (4 + 2) and 3 * 64 * 128 weights and two norms; the head.
    layer = 2 * 64 * 32 * 6 + 3 * 64 * 128 + 2 * 64
    whole = NUM_LAYERS * layer + 64 * VOCAB_SIZE
    assert dataclasses.astuple(held.shares) == pytest.approx(
        (EXIT_LAYER * layer / whole, 64 * VOCAB_SIZE / whole, (64 + 2 * 16 * 64) / whole)
    )


def test_drafts_are_what_transformers_makes_of_the_adapter(runner, checkpoint, folders):
    """Every count follows from the exit's choices along the model's own completions."""
    folder, num_tokens = folders(0.2), 3
    scenario = with_adapter(Scenario(str(checkpoint()), REQUESTS), folder)
    (drafted,) = runner.serve(scenario)
    expected = simulate_acceptance(
        [adapted_matches(scenario.model, folder, request, num_tokens) for request in REQUESTS],
        num_tokens,
    )
    assert drafted.num_drafts == expected.num_rounds
    assert [
        n / drafted.num_drafts for n in drafted.num_accepted_per_pos
    ] == expected.rate_by_position
    assert_some_accepted_some_refused(drafted)


def adapted_matches(model: str, folder, request: Request, num_tokens: int) -> torch.Tensor:
    """Where the adapted exit chooses as the model does, as far as the request's last draft goes."""
    target = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    num_new_tokens = request.params["max_tokens"] - 1 + num_tokens
    completion = complete_greedily(target, request.prompt, num_new_tokens, eos_token_id=-1)
    parts, adapter = find_decoder_parts(target), load_exit_adapter(folder)
    with torch.no_grad(), capture_layer_outputs(parts.layers, [EXIT_LAYER - 1]) as outputs:
        target(input_ids=torch.tensor([[*request.prompt, *completion]]))
        logits = target.lm_head(adapter(parts.norm(outputs[EXIT_LAYER - 1])))
    return logits[0, len(request.prompt) - 1 : -1].argmax(-1) == torch.tensor(completion)
