"""Trains a small model from scratch with LayerSkip's recipe, on the standard library's source.

It makes the checkpoint that the repository carries, on a CPU, the same on every run of one machine:
`python -m layerskip_vllm.training.pretrain --out checkpoints/stdlib-24l`
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from layerskip_vllm.training import stdlib_corpus
from layerskip_vllm.training.decoder import (
    DecoderParts,
    capture_layer_outputs,
    find_decoder_parts,
)
from layerskip_vllm.training.early_exit_loss import (
    EarlyExitLoss,
    RotationalCurriculum,
    exit_scales,
)
from layerskip_vllm.training.exit_evaluation import (
    exit_matches,
    held_out_exit_losses,
    simulate_acceptance,
)
from layerskip_vllm.training.layer_dropout import LayerDropout, LayerDropoutConfig

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides what a run makes; the command line sets each field by its name.

    Attributes:
        recipe: Whether to train with layer dropout and early exit loss, or plainly.
        seed: Seed of the weights, the batches and the layer dropout.
        num_steps: Optimizer steps.
        num_growth_steps: Steps, the first ones, in which only the first `num_first_layers` layers
            run. A deep narrow model learns slowly at first, and a shallow one costs less a step.
            Then the others join, as copies of the first ones.
        growth_scale: What the copies' contributions to the residual stream are scaled by.
        num_first_layers: Layers that run from the start.
        tokens_per_step: Tokens of a batch.
        seq_len: Tokens of a sequence.
        long_seq_len: Tokens of a sequence towards the end, and the model's context length.
        num_long_steps: Steps, the last ones, that use `long_seq_len`.
        learning_rate: Its peak.
        num_warmup_steps: Steps in which it rises linearly, at the start and when layers join.
        num_decay_steps: Steps, the last ones, in which it falls linearly to 0.
        weight_decay: AdamW's, for matrices.
        vocab_size: Tokens of the tokenizer.
        num_layers: L.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLPs.
        num_heads: Query heads, all sharing one key-value head.
        max_drop_prob: Layer dropout's largest probability.
        e_scale: Weight of an exit's loss, where the last layer's is 1.
        rotation: R, the steps until an exit's loss is on again.
        min_exit_layer: The smallest E that has a loss. From there to `exit_layer` each has one.
        exit_interval: Beyond `exit_layer`, E has a loss if it is a multiple of this.
        num_distill_steps: Steps, the last ones, in which E = `exit_layer` alone has a loss besides
            the last layer, at every step, and learns what the last layer predicts.
        distill_scale: Weight of that loss, where the last layer's is 1.
        exit_layer: E that the checkpoint is to be drafted with.
        num_speculative_tokens: K that it is to be drafted with.
    """

    recipe: bool = True
    seed: int = 0
    num_steps: int = 2000
    num_growth_steps: int = 500
    growth_scale: float = 0.3
    num_first_layers: int = 6
    tokens_per_step: int = 2048
    seq_len: int = 256
    long_seq_len: int = 1024
    num_long_steps: int = 40
    learning_rate: float = 3e-3
    num_warmup_steps: int = 60
    num_decay_steps: int = 800
    weight_decay: float = 0.1
    vocab_size: int = 2048
    num_layers: int = 24
    hidden_size: int = 128
    intermediate_size: int = 384
    num_heads: int = 2
    max_drop_prob: float = 0.1
    e_scale: float = 1.0
    rotation: int = 4
    min_exit_layer: int = 3
    exit_interval: int = 3
    num_distill_steps: int = 700
    distill_scale: float = 2.0
    exit_layer: int = 6
    num_speculative_tokens: int = 4


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer; it encodes any text and adds no token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode_files(
    tokenizer: PreTrainedTokenizerFast, files: Iterable[stdlib_corpus.SourceFile]
) -> torch.Tensor:
    """Returns the files' tokens, an end-of-text token after each file, `[num_tokens] int64`."""
    token_ids: list[int] = []
    for file in files:
        token_ids += [*tokenizer.encode(file.text), tokenizer.eos_token_id]
    return torch.tensor(token_ids)


def build_model(config: PretrainConfig, eos_token_id: int) -> LlamaForCausalLM:
    """Returns a Llama with random weights; matrices that end a residual branch start smaller."""
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=1,
            head_dim=config.hidden_size // config.num_heads,
            max_position_embeddings=config.long_seq_len,
            initializer_range=0.5 * config.hidden_size**-0.5,
            tie_word_embeddings=False,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
            attn_implementation="eager",
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            scale_contribution(layer, (2 * config.num_first_layers) ** -0.5)
    return model


@torch.no_grad()
def scale_contribution(layer: LlamaDecoderLayer, scale: float) -> None:
    """Scales what a layer adds to the residual stream, in place."""
    layer.self_attn.o_proj.weight.mul_(scale)
    layer.mlp.down_proj.weight.mul_(scale)


def grow(model: LlamaForCausalLM, config: PretrainConfig) -> None:
    """Makes every layer after the first ones a copy of one of them, in turn, and lets all run."""
    layers = model.model.layers
    for layer_idx in range(config.num_first_layers, config.num_layers):
        layers[layer_idx].load_state_dict(layers[layer_idx % config.num_first_layers].state_dict())
        scale_contribution(layers[layer_idx], config.growth_scale)
    model.config.num_hidden_layers = config.num_layers


def iter_batches(
    token_ids: torch.Tensor, seq_len: int, tokens_per_step: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yields batches `[tokens_per_step / seq_len, seq_len + 1] int64` without end.

    Each epoch is shuffled anew.
    """
    batch_size = tokens_per_step // seq_len
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(seq_len, (), generator=generator))
        sequences = token_ids[offset:].unfold(0, seq_len + 1, seq_len)
        order = torch.randperm(len(sequences), generator=generator)
        for rows in order.split(batch_size):
            if len(rows) == batch_size:
                yield sequences[rows]


def learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """Returns the share of the peak learning rate at `step`: up, level, and down to 0.

    It rises once more when the other layers join.
    """
    stage_start = config.num_growth_steps if step >= config.num_growth_steps else 0
    rise = (step - stage_start + 1) / max(config.num_warmup_steps, 1)
    fall = (config.num_steps - step) / max(config.num_decay_steps, 1)
    return min(rise, 1.0, fall)


def make_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """Returns AdamW with weight decay on matrices alone."""
    weights = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [weight for weight in weights if weight.dim() >= 2]},
            {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )


def make_early_exit_loss(
    parts: DecoderParts, num_layers: int, config: PretrainConfig
) -> EarlyExitLoss:
    """Returns the loss for a model of which the first `num_layers` layers run.

    Without the recipe it is the last layer's loss alone, through the same code.
    """
    exits = [
        exit_layer
        for exit_layer in range(config.min_exit_layer, num_layers)
        if exit_layer <= config.exit_layer or exit_layer % config.exit_interval == 0
    ]
    return EarlyExitLoss(
        parts,
        exit_scales(num_layers, config.e_scale if config.recipe else 0.0, "flat"),
        RotationalCurriculum(num_layers, config.rotation),
        exit_layers=[exit_layer - 1 for exit_layer in exits],
    )


def make_distill_loss(parts: DecoderParts, config: PretrainConfig) -> EarlyExitLoss:
    """Returns the loss of the last steps: of E = `exit_layer` and of the last layer."""
    return EarlyExitLoss(
        parts,
        [config.distill_scale] * (config.num_layers - 1) + [1.0],
        RotationalCurriculum(config.num_layers, 1),
        exit_layers=[config.exit_layer - 1],
        target="last_layer",
    )


def train(model: LlamaForCausalLM, token_ids: torch.Tensor, config: PretrainConfig) -> None:
    """Trains the model in place."""
    parts = find_decoder_parts(model)
    dropout_config = LayerDropoutConfig(
        max_prob=config.max_drop_prob if config.recipe else 0.0,
        time_schedule="exponential",
        seed=config.seed,
    )
    dropout = LayerDropout(parts.layers, dropout_config, config.num_steps).attach()
    early_exit_loss = make_early_exit_loss(parts, config.num_first_layers, config)
    model.config.num_hidden_layers = config.num_first_layers
    optimizer = make_optimizer(model, config)
    batches = iter_batches(token_ids, config.seq_len, config.tokens_per_step, config.seed)
    model.train()
    progress = tqdm(range(config.num_steps), desc="recipe" if config.recipe else "plain")
    for step in progress:
        if step == config.num_growth_steps:
            grow(model, config)
            early_exit_loss = make_early_exit_loss(parts, config.num_layers, config)
        if config.recipe and step == config.num_steps - config.num_distill_steps:
            early_exit_loss = make_distill_loss(parts, config)
        if step == config.num_steps - config.num_long_steps:
            batches = iter_batches(
                token_ids, config.long_seq_len, config.tokens_per_step, config.seed + 1
            )
        batch = next(batches)
        dropout.set_step(step)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config)
        with (
            torch.autocast("cpu", torch.bfloat16),
            capture_layer_outputs(parts.layers, early_exit_loss.active_layers(step)) as outputs,
        ):
            model.model(input_ids=batch[:, :-1], use_cache=False)
            loss, exit_losses = early_exit_loss.compute(outputs, batch[:, 1:], step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            shown = {f"exit {i + 1}": f"{exit_loss:.3f}" for i, exit_loss in exit_losses.items()}
            progress.set_postfix(shown)
    dropout.detach()
    model.eval()


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out_ids: torch.Tensor,
    config: PretrainConfig,
    num_prompts: int = 32,
    num_new_tokens: int = 128,
) -> dict[str, Any]:
    """Returns every exit's held-out loss and, by E, the acceptance of its greedy drafts."""
    losses = held_out_exit_losses(model, held_out_ids, seq_len=512)
    prompts = stdlib_corpus.held_out_prompts(num_prompts)
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


def save(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: PretrainConfig,
    report: dict[str, Any],
) -> None:
    """Writes the checkpoint in Hugging Face's layout, and `training.json` beside it."""
    model.config.layerskip = {
        "exit_layer": config.exit_layer,
        "num_speculative_tokens": config.num_speculative_tokens,
    }
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    tokenizer_config = out / "tokenizer_config.json"
    settings = json.loads(tokenizer_config.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer_config.write_text(json.dumps(settings, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")


def pretrain(out: Path, config: PretrainConfig) -> dict[str, Any]:
    """Trains, evaluates and saves; returns what `training.json` says."""
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
    train(model, token_ids, config)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    num_tokens = config.num_steps * config.tokens_per_step
    report = {
        "config": asdict(config),
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
    save(out, model, tokenizer, config, report)
    return report


def parse_args(args: list[str] | None = None) -> tuple[Path, PretrainConfig]:
    """Returns the output folder and the run's config from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    for field in fields(PretrainConfig):
        option = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(
                option, action=argparse.BooleanOptionalAction, default=field.default
            )
        else:
            parser.add_argument(option, type=field.type, default=field.default)
    values = vars(parser.parse_args(args))
    return values.pop("out"), PretrainConfig(**values)


def main() -> None:
    """Runs the command line."""
    report = pretrain(*parse_args())
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
