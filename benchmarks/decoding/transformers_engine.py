"""Transformers as a system of `benchmarks.decoding.speedup`: plain, and with its own early exit.

In an engine's process it takes the place of `engines.load` and `engines.run_round`.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.decoding.engines import Facts, Measurement, peak_resident_bytes
from layerskip_vllm.tools.server.metrics import SpecDecodeCounters

_model: Any  # the process's own
_early_exit: int | None


def load(engine_args: dict[str, Any]) -> Facts:
    """Load the model, and keep it for the rounds.

    Args:
        engine_args: `model`, `dtype` and `assistant_early_exit`, the layer to draft from or None.

    Returns:
        What it takes; it has no KV cache of a size of its own.
    """
    global _model, _early_exit
    from transformers import AutoModelForCausalLM

    start_s = time.perf_counter()
    dtype = getattr(torch, engine_args["dtype"])
    _model = AutoModelForCausalLM.from_pretrained(engine_args["model"], dtype=dtype)
    _model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    _model.generation_config.eos_token_id = None  # texts have their full length
    _early_exit = engine_args["assistant_early_exit"]
    return _gather_facts(time.perf_counter() - start_s)


def run_round(
    prompts: list[list[int]], max_tokens: int, temperature: float
) -> tuple[Measurement, Facts]:
    """Decode a batch of prompts of one length to its full length.

    Transformers drafts for one request at a time: of a batch it drafts for none.
    """
    stamps: list[tuple[float, int]] = []  # when there was how much of a text

    def stamp(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        stamps.append((time.perf_counter(), input_ids.shape[1]))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    ids = torch.tensor(prompts, device=_model.device)
    drafts = {"assistant_early_exit": _early_exit} if _early_exit and len(prompts) == 1 else {}
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    start_s, cpu_s = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        output = _model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            stopping_criteria=[stamp],
            pad_token_id=0,
            **drafts,
            **sampling,
        )
    cpu_s = time.process_time() - cpu_s
    (first_s, num_first), (last_s, num_last) = stamps[0], stamps[-1]
    tpot_s = (last_s - first_s) / (num_last - num_first)
    measurement = Measurement(
        tokens_per_s=len(prompts) / tpot_s,
        prefill_s=first_s - start_s,
        cpu_s=cpu_s,
        counters=SpecDecodeCounters(),  # it keeps none
        tokens=output[:, ids.shape[1] :].tolist(),
        tpot_s=(tpot_s,) * len(prompts),
    )
    return measurement, _gather_facts(0.0)


def _gather_facts(start_s: float) -> Facts:
    is_on_gpu = torch.cuda.is_available()
    return Facts(
        peak_memory_bytes=torch.cuda.max_memory_allocated() if is_on_gpu else peak_resident_bytes(),
        num_kv_tokens=0,
        device="cuda" if is_on_gpu else "cpu",
        mode="eager",
        num_threads=torch.get_num_threads(),
        start_s=start_s,
    )
