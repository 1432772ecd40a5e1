"""A training that was stopped and resumed equals one that was not, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from layerskip_vllm.checkpoint.exit_adapter import load_exit_adapter
from layerskip_vllm.training.exit_adapter import ExitAdapterSettings
from layerskip_vllm.training.settings import LayerSkipSettings
from tests.support.training import Steps, make_trainer, step_logs, weights_equal

ARGUMENTS = {"save_strategy": "steps", "save_steps": 5, "max_steps": 14}


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


def train_twice(folder: Path, settings: Any) -> list[transformers.Trainer]:
    """Train in one go, and with a stop in an epoch and between two checkpoints."""
    whole = make_trainer(folder / "whole", settings, **ARGUMENTS)
    whole.train()
    killed = make_trainer(folder / "resumed", settings, **ARGUMENTS)
    killed.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make_trainer(folder / "resumed", settings, **ARGUMENTS)
    resumed.add_callback(steps := Steps())
    resumed.train(resume_from_checkpoint=True)
    assert steps.begun == list(range(5, 14))
    assert step_logs(resumed) == step_logs(whole)
    assert len(step_logs(whole)) == 14
    return [resumed, whole]


@pytest.mark.parametrize("curriculum", ["rotational", "gradual"])
def test_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, curriculum):
    """The stop is also in a turn of the curriculum."""
    settings = LayerSkipSettings(
        max_drop_prob=0.5,
        time_schedule="exponential",
        e_scale=1.0,
        rotation=3,
        curriculum=curriculum,
    )
    resumed, whole = train_twice(tmp_path, settings)

    assert weights_equal(resumed.model, whole.model)


def test_resumed_adapter_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    settings = ExitAdapterSettings(rank=8, exit_layer=2)
    resumed, whole = train_twice(tmp_path, settings)

    assert weights_equal(resumed.adapter, whole.adapter)
    assert load_exit_adapter(tmp_path / "whole" / "checkpoint-10").config.exit_layer == 2
    assert not list(tmp_path.glob("*/checkpoint-*/model.safetensors"))
    again = make_trainer(tmp_path / "whole", settings, **ARGUMENTS)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-14"))
    assert weights_equal(again.adapter, whole.adapter)
