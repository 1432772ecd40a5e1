"""A training run from its config to a checkpoint, or an exit adapter, that vLLM loads.

`layerskip-vllm train` calls it. Run again after a stop, it goes on from its last checkpoint.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from layerskip_vllm.checkpoint.entry import CONFIG_KEY
from layerskip_vllm.checkpoint.exit_adapter import WEIGHTS_FILE
from layerskip_vllm.checkpoint.validation import Settings
from layerskip_vllm.training.data import collate, load_rows
from layerskip_vllm.training.exit_adapter import ExitAdapterSettings, ExitAdapterTrainer
from layerskip_vllm.training.run_config import ModelConfig, RunConfig
from layerskip_vllm.training.trainer import LayerSkipTrainer, ResumableTrainer, check_arguments

RUN_FILE = "layerskip_run.json"
STATE_FILE = "trainer_state.json"  # the Trainer writes it last into a checkpoint's folder


def prepare(config: RunConfig) -> ResumableTrainer:
    """Load all that a run needs into a trainer, ready for `train`.

    `ValueError` if something does not go together, or `output_dir` holds a run of another config.
    """
    args = config.make_arguments()
    check_arguments(args, {})
    check_whole_checkpoint(args)
    check_same_run(Path(str(args.output_dir)), config)
    set_seed(args.seed)
    data_seed = args.seed if args.data_seed is None else args.data_seed
    tokenizer = AutoTokenizer.from_pretrained(config.model.tokenizer or config.model.path)
    model = load_model(config.model, tokenizer)
    with args.main_process_first(desc="reading the data"):
        train_rows, eval_rows = (
            load_rows(sources, config.data, tokenizer, data_seed) if sources else None
            for sources in (config.data.train, config.data.evaluation)
        )
    settings = config.settings
    others: dict[str, Any] = {
        "train_dataset": train_rows,
        "eval_dataset": eval_rows,
        "processing_class": tokenizer,
        "data_collator": functools.partial(collate, filler_id=tokenizer.eos_token_id),
    }
    if isinstance(settings, ExitAdapterSettings):
        return ExitAdapterTrainer(model, args, settings, **others)
    return LayerSkipTrainer(model, args, settings, **others)


def train(trainer: ResumableTrainer, config: RunConfig) -> None:
    """Train, from the last checkpoint in `output_dir` if there is any, and save it there."""
    output_dir = Path(str(trainer.args.output_dir))
    if trainer.is_world_process_zero():
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / RUN_FILE).write_text(json.dumps(identify(config), indent=2) + "\n")
    last_checkpoint = find_last_checkpoint(output_dir)
    trainer.train(resume_from_checkpoint=None if last_checkpoint is None else str(last_checkpoint))
    trainer.save_model()
    trainer.save_state()


def load_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the checkpoint to start from, or make a model of random weights, in `config.dtype`.

    `ValueError` if it has fewer tokens than the tokenizer.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.config is None:
        model = AutoModelForCausalLM.from_pretrained(str(config.path), **options)
    else:
        from_config: Any = AutoModelForCausalLM.from_config
        model = from_config(AutoConfig.for_model(**config.config), **options)
    # Not its weight's size, which is 0 where DeepSpeed has spread the weight over the ranks.
    num_embeddings = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > num_embeddings:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {num_embeddings}; the model "
            "must have as many or more."
        )
    return model


def check_whole_checkpoint(args: TrainingArguments) -> None:
    """Refuse a DeepSpeed config that spreads the weights and does not gather them to be saved."""
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    key = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if deepspeed is not None and deepspeed.is_zero3() and not deepspeed.is_true(key):
        raise ValueError(
            f"training.deepspeed has stage 3 and {key} is not true; set it to true, for the result "
            "to be a checkpoint that transformers and vLLM load."
        )


def identify(config: RunConfig) -> dict[str, Any]:
    """Return what makes a run this run; resuming with another would be neither run."""
    name = "layerskip" if config.exit_adapter is None else "exit_adapter"
    parts: dict[str, Settings] = {"model": config.model, "data": config.data, name: config.settings}
    return {name: part.model_dump(mode="json") for name, part in parts.items()}


def check_same_run(output_dir: Path, config: RunConfig) -> None:
    """Refuse a folder with checkpoints of another run."""
    if not (output_dir / RUN_FILE).is_file() or find_last_checkpoint(output_dir) is None:
        return
    before = json.loads((output_dir / RUN_FILE).read_text())
    for section, values in identify(config).items():
        for name, value in values.items():
            if before.get(section, {}).get(name) != value:
                raise ValueError(
                    f"training.output_dir is {str(output_dir)!r}, whose run has {section}.{name} "
                    f"{before.get(section, {}).get(name)!r}, not {value!r}; choose another folder, "
                    "or remove that run's checkpoints."
                )


def find_last_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest checkpoint's folder that was written to its end, None without any."""
    folders = [path.parent for path in output_dir.glob(f"checkpoint-*/{STATE_FILE}")]
    return max(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def describe_result(trainer: ResumableTrainer, config: RunConfig) -> str:
    """Return what to tell the user at the end."""
    folder = os.path.normpath(str(trainer.args.output_dir))
    if isinstance(trainer, ExitAdapterTrainer):
        num_bytes = (Path(folder) / WEIGHTS_FILE).stat().st_size
        speculative = json.dumps({"method": "layerskip", "exit_adapter": folder})
        return (
            f"Saved {folder}, the adapter of exit_layer {trainer.adapter.config.exit_layer}, "
            f"{num_bytes / 1e6:.1f} MB. Serve it with: "
            f"vllm serve {config.model.path} --speculative-config '{speculative}'"
        )
    assert isinstance(trainer, LayerSkipTrainer)
    entry = getattr(trainer.layer_skip.model.config, CONFIG_KEY)
    settings = ", ".join(f"{key} {value}" for key, value in entry.items())
    return (
        f"Saved {folder}, which drafts with {settings}. Serve it with: "
        f"vllm serve {folder} --speculative-model=layerskip"
    )
