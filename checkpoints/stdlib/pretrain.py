"""Trains a small model from scratch with LayerSkip's recipe, on the standard library's source.

It makes the checkpoint that the repository carries, on a CPU, the same on every run of one machine:
`python -m checkpoints.stdlib.pretrain --out checkpoints/stdlib-24l`
"""

import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from checkpoints.stdlib.pretrain_config import PretrainConfig, parse_args
from checkpoints.stdlib.small_model import (
    build_model,
    encode_files,
    grow,
    save_checkpoint,
    train_tokenizer,
)
from layerskip_vllm.tools import stdlib_corpus
from layerskip_vllm.tools.prompts import held_out_prompts
from layerskip_vllm.training.decoder import DecoderParts
from layerskip_vllm.training.early_exit_loss import EarlyExitLoss
from layerskip_vllm.training.exit_evaluation import (
    exit_matches,
    measure_held_out,
    simulate_acceptance,
)
from layerskip_vllm.training.layer_skip import LayerSkip


def iter_batches(
    token_ids: torch.Tensor, seq_len: int, tokens_per_step: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield batches `[tokens_per_step / seq_len, seq_len + 1] int64` without end.

    Each epoch is shuffled anew.
    """
    batch_size = tokens_per_step // seq_len
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(seq_len, (), generator=generator))
        sequences = token_ids[offset:].unfold(0, seq_len + 1, seq_len)
        order = torch.randperm(len(sequences), generator=generator)
        for rows in torch.split(order, batch_size):
            if len(rows) == batch_size:
                yield sequences[rows]


def learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """Return the share of the peak learning rate at `step`: up, level, and down to 0.

    It rises once more when the other layers join.
    """
    stage_start = config.num_growth_steps if step >= config.num_growth_steps else 0
    rise = (step - stage_start + 1) / max(config.num_warmup_steps, 1)
    fall = (config.num_steps - step) / max(config.num_decay_steps, 1)
    return min(rise, 1.0, fall)


def make_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices alone."""
    weights = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights if weight.dim() >= 2]},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )


def make_distill_loss(parts: DecoderParts, config: PretrainConfig) -> EarlyExitLoss:
    """Return the loss of the last steps: of E = `exit_layer` and of the last layer."""
    return EarlyExitLoss(
        parts,
        [config.distill_scale] * (config.num_layers - 1) + [1.0],
        exit_layers=[config.exit_layer - 1],
        target="last_layer",
    )


def train_in_place(
    model: LlamaForCausalLM, token_ids: torch.Tensor, config: PretrainConfig
) -> None:
    """Train the model in place."""
    settings = config.make_settings()
    optimizer = make_optimizer(model, config)
    batches = iter_batches(token_ids, config.seq_len, config.tokens_per_step, config.seed)
    model.train()
    progress = tqdm(range(config.num_steps), desc="recipe" if config.recipe else "plain")
    with LayerSkip(model, settings) as layer_skip:
        model.config.num_hidden_layers = config.num_first_layers
        layer_skip.exit_loss = settings.make_exit_loss(layer_skip.parts, config.num_first_layers)
        for step in progress:
            if step == config.num_growth_steps:
                grow(model, config)
                layer_skip.exit_loss = settings.make_exit_loss(layer_skip.parts)
            if config.recipe and step == config.num_steps - config.num_distill_steps:
                layer_skip.exit_loss = make_distill_loss(layer_skip.parts, config)
            if step == config.num_steps - config.num_long_steps:
                batches = iter_batches(
                    token_ids, config.long_seq_len, config.tokens_per_step, config.seed + 1
                )
            batch = next(batches)
            inputs, labels = batch[:, :-1], batch[:, 1:]
            layer_skip.set_step(step, config.num_steps)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * learning_rate_factor(step, config)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=inputs, labels=labels, shift_labels=labels).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                progress.set_postfix(
                    {f"exit {e}": f"{loss:.3f}" for e, loss in layer_skip.exit_losses.items()}
                )
    model.train(False)


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out_ids: torch.Tensor,
    config: PretrainConfig,
    num_prompts: int = 32,
    num_new_tokens: int = 128,
) -> dict[str, Any]:
    """Return every exit's held-out loss and, by E, the acceptance of its greedy drafts."""
    losses = measure_held_out(model, held_out_ids.unfold(0, 513, 512)).losses
    prompts = held_out_prompts(num_prompts)
    matches = exit_matches(
        model,
        [tokenizer.encode(prompt) for prompt in prompts],
        num_new_tokens,
        tokenizer.eos_token_id,
    )
    acceptance = {
        str(exit_layer): asdict(
            simulate_acceptance(
                [prompt_matches[exit_layer - 1] for prompt_matches in matches],
                config.num_speculative_tokens,
            )
        )
        for exit_layer in (2, 3, 4, 5, 6, 8, 12)
        if exit_layer <= config.num_layers
    }
    return {
        "held_out_loss": losses[-1],
        "held_out_loss_by_exit_layer": {str(i + 1): loss for i, loss in enumerate(losses)},
        "acceptance": {
            "num_speculative_tokens": config.num_speculative_tokens,
            "num_prompts": num_prompts,
            "num_new_tokens": num_new_tokens,
            "by_exit_layer": acceptance,
        },
    }


def pretrain(out: Path, config: PretrainConfig) -> dict[str, Any]:
    """Train, evaluate and save; return what `training.json` says."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train_files, held_out_files = stdlib_corpus.train_files(), stdlib_corpus.held_out_files()
    tokenizer = train_tokenizer(
        (file.text for file in train_files), config.vocab_size, config.long_seq_len
    )
    token_ids = encode_files(tokenizer, train_files)
    held_out_ids = encode_files(tokenizer, held_out_files)
    model = build_model(config, tokenizer.eos_token_id)
    start, cpu_start = time.perf_counter(), time.process_time()
    train_in_place(model, token_ids, config)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    num_tokens = config.num_steps * config.tokens_per_step
    report = {
        "config": config.model_dump(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "train_sha256": stdlib_corpus.corpus_sha256(train_files),
        "held_out_sha256": stdlib_corpus.corpus_sha256(held_out_files),
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "num_corpus_tokens": len(token_ids),
        "num_held_out_tokens": len(held_out_ids),
        "num_training_tokens": num_tokens,
        "training_seconds": round(seconds),
        "training_cpu_seconds": round(cpu_seconds),
        "tokens_per_cpu_second": round(num_tokens / cpu_seconds),
        **evaluate(model, tokenizer, held_out_ids, config),
    }
    save_checkpoint(out, model, tokenizer, report)
    return report


def main() -> None:
    """Run the command line."""
    report = pretrain(*parse_args())
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
