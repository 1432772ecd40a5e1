"""Drafting through an exit adapter: other drafts, the same tokens."""

import dataclasses

import pytest
import torch

from layerskip_vllm.exit_adapter import load_exit_adapter
from layerskip_vllm.training.exit_adapter import ExitAdapterSettings, ExitAdapterTrainer
from tests.support.checkpoints import NUM_LAYERS, VOCAB_SIZE
from tests.support.checks import assert_same_outputs, assert_some_accepted_some_refused
from tests.support.exit_adapters import make_exit_adapter
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = pytest.mark.engine

EXIT_LAYER = 2
REQUESTS = (
    Request(tokens(20), {"max_tokens": 14}),
    Request(tokens(5), {"max_tokens": 8}),
    Request(tokens(40), {"max_tokens": 10}, joins_at=1),
)


@pytest.fixture(scope="module")
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
    assert held.weights.keys() == {f"exit_adapter.{name}" for name in saved}
    assert all(torch.equal(held.weights[f"exit_adapter.{name}"], saved[name]) for name in saved)
    assert held.dtypes == {"torch.float32"}
    assert held.parameters == ()
    assert not any("adapter" in name for name in held.target_names)
    # Equal layers of 2 * 64 * 32 * (4 + 2) and 3 * 64 * 128 weights and two norms; the head.
    layer = 2 * 64 * 32 * 6 + 3 * 64 * 128 + 2 * 64
    whole = NUM_LAYERS * layer + 64 * VOCAB_SIZE
    assert held.shares == pytest.approx(
        (EXIT_LAYER * layer / whole, 64 * VOCAB_SIZE / whole, (64 + 2 * 16 * 64) / whole)
    )


def test_drafts_are_accepted_more_often_when_the_adapter_was_trained(
    runner, checkpoint, tmp_path_factory
):
    """From the command's trainer to the engine, on text that the model wrote itself."""
    model = str(checkpoint())
    scenario = Scenario(model, REQUESTS, layerskip(EXIT_LAYER, 3))
    folder = train_adapter(model, tmp_path_factory)
    plain_exit, trained = runner.serve(scenario, with_adapter(scenario, folder))
    assert trained.token_ids == plain_exit.token_ids
    assert trained.acceptance > plain_exit.acceptance + 0.05


_TRAINED = {}


def train_adapter(model: str, tmp_path_factory):
    """Train an adapter once a session."""
    if model not in _TRAINED:
        import transformers

        folder = tmp_path_factory.mktemp("trained")
        args = transformers.TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            max_steps=150,
            per_device_train_batch_size=16,
            learning_rate=0.02,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(2, VOCAB_SIZE, (256, 32), generator=generator)
        trainer = ExitAdapterTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(model),
            args,
            ExitAdapterSettings(rank=64, exit_layer=EXIT_LAYER),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        )
        trainer.train()
        trainer.save_model()
        _TRAINED[model] = folder
    return _TRAINED[model]
