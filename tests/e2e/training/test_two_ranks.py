"""Two ranks train as one does when the batch is the same, with DDP and with FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from layerskip_vllm.training.exit_adapter import ExitAdapterSettings
from layerskip_vllm.training.layer_dropout import LayerDropout
from layerskip_vllm.training.settings import LayerSkipSettings
from tests.support.training import Steps, make_trainer, step_logs

EXITS_ALONE = LayerSkipSettings(max_drop_prob=0.0, e_scale=1.0, rotation=3)


ADAPTER = ExitAdapterSettings(rank=8, exit_layer=2)


FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "activation_checkpointing": True,
    },
}


def train_on_two_ranks(path: Path) -> None:
    """What each rank of the test below runs."""
    half = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    often = LayerSkipSettings(max_drop_prob=0.8, depth_schedule="constant", e_scale=1.0, rotation=3)
    saved = {"save_strategy": "steps", "save_steps": 4}
    trainers = {
        "ddp": make_trainer(path / "ddp", EXITS_ALONE, **half),
        # One row a rank, so that layers go without any sample.
        "ddp dropping": make_trainer(path, often, **single, gradient_checkpointing=True),
        "ddp adapter": make_trainer(path, ADAPTER, **half),
        "fsdp": make_trainer(path / "fsdp", EXITS_ALONE, **half, **FSDP, **saved),
        "fsdp dropping": make_trainer(path, often, **single, **FSDP),
    }
    kept_by_step, kept_samples = {}, LayerDropout.kept_samples

    def record(self, layer_idx, batch_size):
        kept = kept_samples(self, layer_idx, batch_size)
        kept_by_step[f"{self._step} {layer_idx}"] = kept.tolist()
        return kept

    for name, trainer in trainers.items():
        LayerDropout.kept_samples = record if name == "ddp dropping" else kept_samples
        trainer.train()
    rank = trainers["ddp"].args.process_index
    (path / f"kept-{rank}.json").write_text(json.dumps(kept_by_step))
    trainers["fsdp"].save_model(str(path / "fsdp" / "saved"))
    resumed = make_trainer(path / "fsdp", EXITS_ALONE, **half, **FSDP, **saved)
    resumed.add_callback(steps := Steps())
    resumed.train(resume_from_checkpoint=str(path / "fsdp" / "checkpoint-4"))
    trainers["fsdp resumed"] = resumed
    if resumed.is_world_process_zero():
        logs = {name: step_logs(trainer) for name, trainer in trainers.items()}
        logs["resumed steps"] = steps.begun
        (path / "logs.json").write_text(json.dumps(logs))


def test_two_ranks_train_as_one_does_when_the_batch_is_the_same(tmp_path):
    """With DDP and FSDP; and a layer that all of a rank's samples skip does not stop them."""
    code = f"""if True:
        from pathlib import Path
        from tests.e2e.training.test_two_ranks import train_on_two_ranks
        train_on_two_ranks(Path({str(tmp_path)!r}))
    """
    (tmp_path / "job.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(tmp_path / "job.py")], cwd=root, env=environment, check=True, timeout=300
    )
    trainer = make_trainer(tmp_path, EXITS_ALONE, gradient_accumulation_steps=2)
    adapter = make_trainer(tmp_path, ADAPTER, gradient_accumulation_steps=2)
    trainer.train()
    adapter.train()

    logs = json.loads((tmp_path / "logs.json").read_text())
    for whole, shared in zip(step_logs(adapter), logs["ddp adapter"], strict=True):
        assert shared == pytest.approx(whole, rel=1e-4)
    for name in ("ddp", "fsdp", "fsdp resumed"):
        for whole, shared in zip(step_logs(trainer), logs[name], strict=True):
            assert shared == pytest.approx(whole, rel=1e-4)
    assert logs["resumed steps"] == [4, 5]
    kept, other = (json.loads((tmp_path / f"kept-{rank}.json").read_text()) for rank in (0, 1))
    assert kept == other
    assert len(kept) == 6 * 4  # steps and layers
    assert [] in kept.values()
    assert [0] in kept.values()
    assert logs["ddp dropping"][0] == pytest.approx(logs["fsdp dropping"][0], rel=1e-4)
    assert len(logs["ddp dropping"]) == len(logs["fsdp dropping"]) == 6
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fsdp/saved")
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], weight, rtol=1e-3, atol=1e-4)
