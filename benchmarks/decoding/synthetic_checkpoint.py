"""Makes a random Llama checkpoint that a layer-skip drafter can draft for, in a minute or so.

It has a trained model's costs and, for drafts of K tokens, a wished acceptance, and says nothing
sensible. `benchmarks.decoding.speedup` runs this file in a process of its own, before any engine
starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DEFAULT_FOLDER = Path("benchmark-output/checkpoints")
REPORT_NAME = "synthetic.json"
# Checkpoints of another recipe are not reused: raise it when what is written changes.
RECIPE = 2
MAX_POSITIONS = 32768

NUM_CALIBRATION_PROMPTS = 16
NUM_PROMPT_TOKENS = 16
NUM_CALIBRATION_TOKENS = 48
MAX_CALIBRATION_ROUNDS = 10
ACCEPTANCE_TOLERANCE = 0.02
# How far, in standard deviations of the logits, the token that a head favours stands above what
# is the largest of all others on average, after the first E layers: they nearly always name it.
DRAFT_MARGIN = 3.0


@dataclass(frozen=True)
class SyntheticSpec:
    """What a synthetic checkpoint shall be.

    Attributes:
        num_layers: L, all layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward network.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab_size: Tokens; the LM head is not tied to the embedding.
        exit_layer: E, the number of layers that draft.
        num_speculative_tokens: K, the tokens in a draft.
        acceptance: Accepted drafts by drafted tokens to reach under greedy decoding. The paper's
            summaries and code have 55 to 78 %.
        seed: Of the weights.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    exit_layer: int
    num_speculative_tokens: int = 4
    acceptance: float = 0.72
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if not 1 <= self.exit_layer < self.num_layers:
            raise ValueError(
                f"exit_layer is {self.exit_layer} of {self.num_layers} layers; it must be between "
                f"1 and {self.num_layers - 1}, so that some layers are left to disagree."
            )
        if not 0 < self.acceptance < 1:
            raise ValueError(
                f"acceptance is {self.acceptance}; it must be between 0 and 1, such as 0.72."
            )
        if self.num_speculative_tokens < 1:
            raise ValueError(
                f"num_speculative_tokens is {self.num_speculative_tokens}; it must be at least 1."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, "
                f"{self.num_kv_heads}."
            )

    def name(self) -> str:
        """Return the folder's name: the shape in words and a digest of all of it."""
        told = json.dumps([RECIPE, dataclasses.asdict(self)], sort_keys=True)
        digest = hashlib.sha256(told.encode()).hexdigest()[:8]
        return f"llama-{self.num_layers}x{self.hidden_size}-exit{self.exit_layer}-{digest}"


PRESETS = {
    "tiny": SyntheticSpec(4, 256, 512, 4, 2, 64, 1024, exit_layer=1),
    # Its head is 0.47 layers, a share of the whole like that of Llama 2 7B.
    "cpu-0.6b": SyntheticSpec(16, 2048, 4096, 16, 4, 128, 8192, exit_layer=4),
    # The shapes of Llama 3.2 1B (there the head is tied, which a step's reading does not show)
    # and Llama 3 8B.
    "gpu-1b": SyntheticSpec(16, 2048, 8192, 32, 8, 64, 128256, exit_layer=4),
    "gpu-8b": SyntheticSpec(32, 4096, 14336, 32, 8, 128, 128256, exit_layer=8),
}


@dataclass(frozen=True)
class SyntheticCheckpoint:
    """A made checkpoint and what it does under greedy decoding in Transformers.

    One without weights does nothing there: all but its folders is None.

    Attributes:
        folder: Where the checkpoint lies.
        draft_folder: The first E layers as a checkpoint of their own, with links to the same files.
        late_scale: What the residual contributions of the layers from E on were multiplied by.
        acceptance: Accepted drafts by drafted tokens.
        distinct_ngrams: Share of different 4-grams among those of a text; 1 if none comes twice.
        near_ties: Share of tokens whose two largest logits are within 0.02 standard deviations,
            so that bfloat16 may well choose the other one.
    """

    folder: Path
    draft_folder: Path
    late_scale: float | None = None
    acceptance: float | None = None
    distinct_ngrams: float | None = None
    near_ties: float | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return config


def make_checkpoint(spec: SyntheticSpec, root: Path = DEFAULT_FOLDER) -> SyntheticCheckpoint:
    """Make the checkpoint, or find the one that was made before.

    The layers are plain random ones. The LM head leans towards one random order of all tokens: its
    row of a token's successor holds some of the token's embedding, so that the first layers name
    the successor clearly and later layers sometimes overrule them. A head without it gives logits
    so close to one another that rounding decides every tenth token, in no trained model's way; and
    as the order is one cycle over the vocabulary, greedy texts do not run into loops.

    Args:
        spec: What to make; it fixes every weight.
        root: Where checkpoints are kept.

    Returns:
        The checkpoint and its measured acceptance.
    """
    folder = root / spec.name()
    if not (folder / REPORT_NAME).exists():
        import torch

        with torch.inference_mode():
            model = _build_model(spec)
            _lean_head(model, spec)
            report = _calibrate(model, spec)
            unfinished = folder.with_suffix(f".unfinished-{os.getpid()}")
            _save(model, spec, report["late_scale"], unfinished)
        (unfinished / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    return read_checkpoint(folder)


def make_shape(spec: SyntheticSpec, root: Path = DEFAULT_FOLDER) -> SyntheticCheckpoint:
    """Write the configs alone, for engines that draw their weights themselves."""
    checkpoint = SyntheticCheckpoint(root / f"{spec.name()}-shape", root / f"{spec.name()}-draft")
    _make_config(spec).save_pretrained(checkpoint.folder)
    _make_config(spec, num_layers=spec.exit_layer).save_pretrained(checkpoint.draft_folder)
    return checkpoint


def read_checkpoint(folder: Path) -> SyntheticCheckpoint:
    """Return the finished checkpoint in a folder."""
    report = json.loads((folder / REPORT_NAME).read_text())
    draft_folder = folder / f"exit-{report.pop('exit_layer')}"
    return SyntheticCheckpoint(folder=folder, draft_folder=draft_folder, **report)


def _build_model(spec: SyntheticSpec) -> Any:
    """Return a random model in bfloat16, on the GPU if there is one.

    Every projection keeps the size of what it gets, as far as it can: a block adds about 0.6 to
    the residual stream, whose tokens start at 1. Queries and keys are larger, so that attention
    picks tokens out instead of averaging over all.
    """
    import torch
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = _make_config(spec)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.to_empty(device=device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    generator = torch.Generator().manual_seed(spec.seed)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
            continue
        gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
        spread = 1.0 if "embed_tokens" in name else gain / math.sqrt(weight.shape[1])
        weight.copy_(torch.empty(weight.shape).normal_(0.0, spread, generator=generator))
    return model.eval()


def _make_config(spec: SyntheticSpec, num_layers: int | None = None) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=num_layers or spec.num_layers,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )


def _lean_head(model: Any, spec: SyntheticSpec) -> None:
    """Mix into the head's row of each token's successor as much of the token as needed."""
    import torch

    with _scaled_late_layers(model, spec.exit_layer, 0.0):
        embeddings, states = _exit_states(model, spec)
    alignment = torch.nn.functional.cosine_similarity(embeddings, states, dim=-1).mean().item()
    margin = _largest_of(spec.vocab_size) + DRAFT_MARGIN
    weight = min(margin / (math.sqrt(spec.hidden_size) * alignment), 0.95)
    order = torch.randperm(spec.vocab_size, generator=torch.Generator().manual_seed(spec.seed + 1))
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    head.mul_(math.sqrt(1 - weight**2))
    head[order.roll(-1)] += embedding[order] * (weight / math.sqrt(spec.hidden_size))


def _largest_of(num_samples: int) -> float:
    """Return the mean largest of so many standard normal numbers (asymptotically)."""
    root = math.sqrt(2 * math.log(num_samples))
    return root - (math.log(math.log(num_samples)) + math.log(4 * math.pi)) / (2 * root)


def _exit_states(model: Any, spec: SyntheticSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last prompt tokens' embeddings and states at the exit, [prompts, hidden]."""
    prompts = make_prompts(spec.vocab_size, NUM_CALIBRATION_PROMPTS, NUM_PROMPT_TOKENS, spec.seed)
    import torch

    ids = torch.tensor(prompts, device=model.device)
    states = model.model(ids, output_hidden_states=True).hidden_states
    return states[0][:, -1].float(), states[spec.exit_layer][:, -1].float()


def make_prompts(vocab_size: int, num_prompts: int, num_tokens: int, seed: int) -> list[list[int]]:
    """Return prompts of random token ids, the same for the same arguments."""
    import random

    source = random.Random(seed)
    return [
        [source.randrange(2, vocab_size) for _ in range(num_tokens)] for _ in range(num_prompts)
    ]


@contextmanager
def _scaled_late_layers(model: Any, exit_layer: int, scale: float) -> Iterator[None]:
    """Multiply what layers from E on add to the residual stream."""
    handles = [
        projection.register_forward_hook(lambda module, inputs, output: output * scale)
        for layer in model.model.layers[exit_layer:]
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _calibrate(model: Any, spec: SyntheticSpec) -> dict[str, Any]:
    """Find the scale of late layers by bisection: the larger, the less they agree with drafts."""
    low, high = 0.0, 2.0
    best: dict[str, Any] = {}
    for _ in range(MAX_CALIBRATION_ROUNDS):
        scale = round((low + high) / 2, 4)
        report = _measure(model, spec, scale)
        print(
            f"late layers scaled by {scale}: acceptance {report['acceptance']:.3f}", file=sys.stderr
        )
        error = report["acceptance"] - spec.acceptance
        if not best or abs(error) < abs(best["acceptance"] - spec.acceptance):
            best = report
        if abs(error) <= ACCEPTANCE_TOLERANCE:
            break
        low, high = (scale, high) if error > 0 else (low, scale)
    return best


def _measure(model: Any, spec: SyntheticSpec, scale: float) -> dict[str, Any]:
    """Decode greedily with late layers scaled and compare each token with its draft.

    A draft follows accepted drafts only, which are the text itself, so what the first E layers say
    after every true prefix is all that is needed to know what would be accepted.
    """
    import torch
    from transformers import DynamicCache

    from layerskip_vllm.training.exit_evaluation import simulate_acceptance

    prompts = make_prompts(spec.vocab_size, NUM_CALIBRATION_PROMPTS, NUM_PROMPT_TOKENS, spec.seed)
    ids = torch.tensor(prompts, device=model.device)
    cache, tokens, agreements, gaps = DynamicCache(config=model.config), [], [], []
    with _scaled_late_layers(model, spec.exit_layer, scale):
        for _ in range(NUM_CALIBRATION_TOKENS):
            output = model.model(ids, past_key_values=cache, output_hidden_states=True)
            exit_state = model.model.norm(output.hidden_states[spec.exit_layer][:, -1])
            drafts = model.lm_head(exit_state).argmax(dim=-1)
            logits = model.lm_head(output.last_hidden_state[:, -1]).float()  # [prompts, vocab]
            top = logits.topk(2).values
            gaps.append((top[:, 0] - top[:, 1]) / logits.std(dim=-1))
            ids = logits.argmax(dim=-1, keepdim=True)
            tokens.append(ids[:, 0])
            agreements.append(ids[:, 0] == drafts)
    played = simulate_acceptance(list(torch.stack(agreements, dim=1)), spec.num_speculative_tokens)
    return {
        "exit_layer": spec.exit_layer,
        "late_scale": scale,
        "acceptance": played.rate,
        "distinct_ngrams": share_of_distinct_ngrams(torch.stack(tokens, dim=1).tolist()),
        "near_ties": (torch.stack(gaps) < 0.02).float().mean().item(),
    }


def share_of_distinct_ngrams(texts: Sequence[Sequence[int]], num_tokens: int = 4) -> float:
    """Return how many of the texts' n-grams are the first of their kind in their text, 0 to 1."""
    found = distinct = 0
    for text in texts:
        ngrams = [tuple(text[i : i + num_tokens]) for i in range(len(text) - num_tokens + 1)]
        found += len(ngrams)
        distinct += len(set(ngrams))
    return distinct / found if found else 1.0


def _save(model: Any, spec: SyntheticSpec, late_scale: float, folder: Path) -> None:
    """Write the checkpoint, a file a layer, and the draft model as links to the first of them."""
    from safetensors.torch import save_file

    draft_folder = folder / f"exit-{spec.exit_layer}"
    draft_folder.mkdir(parents=True)
    _make_config(spec).save_pretrained(folder)
    _make_config(spec, num_layers=spec.exit_layer).save_pretrained(draft_folder)
    late_layers = range(spec.exit_layer, spec.num_layers)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in model.state_dict().items():
        index = int(name.split(".")[2]) if ".layers." in name else None
        if index in late_layers and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight = weight * late_scale
        file_name = "ends" if index is None else f"layer-{index:03d}"
        files.setdefault(f"model-{file_name}.safetensors", {})[name] = weight.cpu().contiguous()
    for file_name, weights in files.items():
        save_file(weights, folder / file_name, metadata={"format": "pt"})
    _write_index(files, folder)
    late_files = {f"model-layer-{index:03d}.safetensors" for index in late_layers}
    kept = {name: weights for name, weights in files.items() if name not in late_files}
    _write_index(kept, draft_folder)
    for file_name in kept:
        (draft_folder / file_name).symlink_to(Path("..") / file_name)


def _write_index(files: Mapping[str, Mapping[str, torch.Tensor]], folder: Path) -> None:
    """Tells loaders which file holds which weight."""
    num_bytes = sum(weight.nbytes for weights in files.values() for weight in weights.values())
    places = {name: file_name for file_name, weights in files.items() for name in weights}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    """Make a preset's checkpoint and print what it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu-0.6b")
    parser.add_argument("--exit-layer", type=int, help="E (default: a quarter of the layers)")
    parser.add_argument("--num-speculative-tokens", type=int, default=4, help="K")
    parser.add_argument("--acceptance", type=float, default=0.72, help="to reach, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    options = vars(parser.parse_args())
    spec, folder = PRESETS[options.pop("preset")], options.pop("folder")
    if options["exit_layer"] is None:
        options["exit_layer"] = spec.exit_layer
    checkpoint = make_checkpoint(dataclasses.replace(spec, **options), folder)
    print(json.dumps(dataclasses.asdict(checkpoint), indent=2, default=str))


if __name__ == "__main__":
    main()
