"""A random Llama whose first layers name the next token clearly; what a synthetic checkpoint holds.

It runs in Transformers, before any engine starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from benchmarks.decoding.synthetic_spec import SyntheticSpec

if TYPE_CHECKING:
    import torch

MAX_POSITIONS = 32768
# How far, in standard deviations of the logits, the token that a head favours stands above what
# is the largest of all others on average, after the first E layers: they nearly always name it.
DRAFT_MARGIN = 3.0


def build_synthetic_model(spec: SyntheticSpec) -> Any:
    """Return a random model in bfloat16, on the GPU if there is one.

    Every projection keeps the size of what it gets, as far as it can: a block adds about 0.6 to
    the residual stream, whose tokens start at 1. Queries and keys are larger, so that attention
    picks tokens out instead of averaging over all.
    """
    import torch
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = make_config(spec)
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


def make_config(spec: SyntheticSpec, num_layers: int | None = None) -> Any:
    """Return the model's config, or that of its first layers."""
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


def lean_head(model: Any, spec: SyntheticSpec) -> None:
    """Mix into the head's row of each token's successor as much of the token as needed."""
    import torch

    with scaled_late_layers(model, spec.exit_layer, 0.0):
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
    prompts = spec.calibration_prompts()
    import torch

    ids = torch.tensor(prompts, device=model.device)
    states = model.model(ids, output_hidden_states=True).hidden_states
    return states[0][:, -1].float(), states[spec.exit_layer][:, -1].float()


@contextmanager
def scaled_late_layers(model: Any, exit_layer: int, scale: float) -> Iterator[None]:
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
