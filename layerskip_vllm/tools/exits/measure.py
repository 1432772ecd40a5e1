"""Loads a model and measures all of its exits; called by `layerskip-vllm exits`, no vLLM in it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerskip_vllm.tools.exits.command import ExitsConfig
from layerskip_vllm.tools.exits.exit_report import Draft, Exit, ExitReport
from layerskip_vllm.tools.speedup_bound import bound_speedup
from layerskip_vllm.tools.text import HeldOutText
from layerskip_vllm.training.decoder import find_decoder_parts
from layerskip_vllm.training.exit_evaluation import (
    exit_matches,
    measure_held_out,
    simulate_acceptance,
)
from layerskip_vllm.training.exit_head import ExitHead

_NUM_TIMED_TOKENS = 256


def load_decoder(model: str, device: str | None, dtype: str) -> tuple[Any, Any]:
    """Load a Hugging Face model, in eval mode, and its tokenizer.

    By default to a GPU if there is one; `dtype` may be `auto`, the checkpoint's own. A ValueError
    says that there is no such device, or that transformers cannot load the two from there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # how torch refuses unknown and missing ones
        raise ValueError(
            f"device is {device!r}, which this machine or its torch does not have: {error}"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"MODEL is {model!r}, from which transformers cannot load a causal language model and "
            f"a tokenizer: {error}"
        ) from error
    return loaded.to(device).eval(), tokenizer


def measure_exits(
    model: Any,
    text: HeldOutText,
    eos_token_ids: Collection[int],
    config: ExitsConfig,
    setting: Mapping[str, Any],
    track: Callable[[str, int], Callable[[int], None]] = lambda _what, _total: lambda _num: None,
) -> ExitReport:
    """Measure all exits of a Hugging Face causal language model on `text`, which it has not seen.

    The report says `setting` of the run. `track` is called with the name of a piece of work and the
    number of its steps, and gives a function to call with the number of steps whenever some are
    done. A ValueError says that the model or the text does not fit.
    """
    draft_shares = read_draft_shares(model)
    num_layers = len(draft_shares) - 1
    if num_layers < 2:
        raise ValueError("model has 1 layer; it must have at least 2 to exit before the last.")
    config.check_context(getattr(model.config, "max_position_embeddings", None))
    sequences = text.cut_sequences(config.seq_len, config.max_held_out_tokens)
    prompts = text.cut_prompts(config.num_prompts, config.num_prompt_tokens)
    on_sequences = track("held-out text", len(sequences))
    on_prompts = track("completions", len(prompts))
    held_out = measure_held_out(model, sequences, config.batch_size, on_sequences)
    matches = exit_matches(
        model, prompts, config.max_tokens, eos_token_ids, config.batch_size, on_prompts
    )
    if all(rows.shape[1] < 2 for rows in matches):
        raise ValueError("data has prompts that the model ends at once, all of them; give others.")
    drafts = [
        play_drafts(
            exit_layer,
            [rows[exit_layer - 1] for rows in matches],
            draft_shares[exit_layer],
            config.max_num_speculative_tokens,
        )
        for exit_layer in range(1, num_layers)
    ]
    exits = zip(
        range(1, num_layers + 1),
        held_out.losses,
        held_out.agreements,
        draft_shares[1:],
        [*drafts, ()],  # the last layer is the model
        strict=True,
    )
    return ExitReport(
        model=model.name_or_path,
        setting=setting,
        num_held_out_tokens=held_out.num_tokens,
        num_completion_tokens=sum(rows.shape[1] for rows in matches),
        head_share=draft_shares[0],
        exits=tuple(Exit(*fields) for fields in exits),
    )


@torch.inference_mode()
def estimate_seconds(model: Any, config: ExitsConfig) -> float:
    """Time a sequence through all layers and one exit, and a step of decoding, for `measure_exits`.

    Returns about what all of it will take, less what the first runs of a program take more.
    """
    head = ExitHead(model)  # it runs the model once
    rows = torch.zeros(1, min(config.seq_len, _NUM_TIMED_TOKENS), dtype=torch.int64)
    rows = rows.to(model.device)
    num_layers = len(head.parts.layers)
    start_s = time.perf_counter()
    hidden_states = head.run_layers(rows)[num_layers - 1].flatten(0, 1)
    layers_s = _stop(hidden_states) - start_s
    choices = [logits.max(-1).values for logits in head.iter_logits(hidden_states)]
    exit_s = _stop(choices[-1]) - start_s - layers_s
    start_s = time.perf_counter()
    step = rows.new_zeros(min(config.batch_size, config.num_prompts), 1)
    step_s = _stop(model(input_ids=step, use_cache=True).logits) - start_s
    num_steps = -(-config.num_prompts // config.batch_size) * config.max_tokens
    num_completed = config.num_prompts * config.max_tokens
    num_read = config.max_held_out_tokens + num_completed
    num_run = num_read + config.num_prompts * config.num_prompt_tokens
    timed = rows.shape[1]
    return (num_run * layers_s + num_layers * num_read * exit_s) / timed + num_steps * step_s


def _stop(output: torch.Tensor) -> float:
    """Return the time at which an output is there: a GPU works behind the host."""
    output.flatten()[0].item()
    return time.perf_counter()


def play_drafts(
    exit_layer: int,
    matches: Sequence[torch.Tensor],
    draft_share: float,
    max_num_speculative_tokens: int,
) -> tuple[Draft, ...]:
    """Play self-speculative decoding from one exit for every K, from 1 up.

    `matches` is for each prompt `[num_new_tokens] bool`, whether the exit would have drafted the
    token; `draft_share` what a draft step reads, as a share of a step of the target.
    """
    drafts = []
    for num in range(1, max_num_speculative_tokens + 1):
        acceptance = simulate_acceptance(matches, num)
        accepted = min(num * acceptance.rate, num)  # rounding may leave it a little above K
        bound = bound_speedup(draft_share, num, accepted)
        drafts.append(Draft(exit_layer, num, acceptance, bound))
    return tuple(drafts)


def read_draft_shares(model: nn.Module) -> list[float]:
    """Return which share of a whole step a draft step reads, for E from 0, the head alone, to L.

    Of an embedding a step reads single rows, and of the final norm next to nothing: neither counts,
    but an embedding that is the head does. All experts of a mixture count.
    """
    parts = find_decoder_parts(model)
    reads = [_num_bytes(parts.head)]
    for layer in parts.layers:
        reads.append(reads[-1] + _num_bytes(layer))
    return [read / reads[-1] for read in reads]


def _num_bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def find_eos_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """Find the tokens that end a text, by the model's generation config and by the tokenizer."""
    given = model.generation_config.eos_token_id
    eos_token_ids = {*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id}
    return eos_token_ids - {None}


def describe_setting(model: Any, data: Sequence[str], config: ExitsConfig) -> dict[str, Any]:
    """Return what a report says of a run."""
    packages = ("layerskip-vllm", "torch", "transformers")
    return {
        "data": list(data),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else str(model.device),
        **config.model_dump(include=set(ExitsConfig.model_fields)),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
    }
