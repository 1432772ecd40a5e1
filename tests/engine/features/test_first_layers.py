"""Early-exit inference: a checkpoint's first layers served by vLLM as a model of their own."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import NUM_LAYERS
from tests.support.scenarios import Request, Scenario, tokens

EXIT_LAYER = 3
MAX_TOKENS = 8


def complete_with_first_layers(folder, prompts):
    """Greedy completions of transformers' own truncated model, without its cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=EXIT_LAYER).eval()
    completions = []
    for prompt in prompts:
        token_ids = list(prompt)
        for _ in range(MAX_TOKENS):
            with torch.inference_mode():
                logits = model(torch.tensor([token_ids]), use_cache=False).logits
            token_ids.append(int(logits[0, -1].argmax()))
        completions.append(tuple(token_ids[len(prompt) :]))
    return completions


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "mixtral"])
def test_first_layers_give_the_truncated_models_tokens_when_served_alone(
    engines, checkpoint, architecture
):
    folder = checkpoint(architecture)
    prompts = [tokens(9), tokens(20)]
    requests = tuple(Request(prompt, {"max_tokens": MAX_TOKENS}) for prompt in prompts)
    overrides = {"num_hidden_layers": EXIT_LAYER}
    if architecture in ("qwen3", "gemma2"):
        layer_types = AutoModelForCausalLM.from_pretrained(folder).config.layer_types
        overrides["layer_types"] = layer_types[:EXIT_LAYER]
    scenario = Scenario(
        str(folder), requests, engine={"hf_overrides": overrides, "load_format": "first_layers"}
    )

    (report,) = engines.serve("v1", scenario)

    expected = complete_with_first_layers(folder, prompts)
    assert [token_ids for (token_ids,) in report.token_ids] == expected


def test_whole_model_is_read_when_no_layer_is_left_out(engines, checkpoint):
    scenario = Scenario(str(checkpoint()), (Request(tokens(9)),))
    first = Scenario(
        str(checkpoint()),
        (Request(tokens(9)),),
        engine={"load_format": "first_layers", "hf_overrides": {"num_hidden_layers": NUM_LAYERS}},
    )
    whole, plain = engines.serve("v1", first, scenario)
    assert whole.token_ids == plain.token_ids
