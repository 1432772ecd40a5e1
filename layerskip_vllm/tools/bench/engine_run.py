"""One engine of `layerskip-vllm bench`, in a process of its own: it completes prompts greedily."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerskip_vllm.tools.server.metrics import SpecDecodeCounters

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.config import VllmConfig

_llm: LLM  # the process's own


@dataclass(frozen=True)
class EngineFacts:
    """What an engine is."""

    runner: str  # V1 or V2
    device: str
    dtype: str  # such as float32
    max_model_len: int  # tokens of its context
    exit_layer: int | None  # E; None for plain vLLM
    num_speculative_tokens: int  # K, or the most where it is "auto"; 0 for plain vLLM
    length: str  # K in words, such as "auto, up to 8"


@dataclass(frozen=True)
class TaskRound:
    """What one engine did with the prompts of one round."""

    seconds: float  # from the prompts to the last token
    texts: tuple[str, ...]  # by prompt, the completion
    token_ids: tuple[tuple[int, ...], ...]
    counters: SpecDecodeCounters

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions."""
        return sum(map(len, self.token_ids))


def start_engine(engine: Mapping[str, Any]) -> EngineFacts:
    """Start the engine, and keep it for the rounds."""
    global _llm
    from vllm import LLM

    _llm = LLM(**engine, disable_log_stats=False)
    return find_facts(_llm.llm_engine.vllm_config)


def find_facts(config: VllmConfig) -> EngineFacts:
    """Say what an engine of this configuration is."""
    from vllm.platforms import current_platform

    from layerskip_vllm.config.speculative import LayerSkipConfig

    speculative = config.speculative_config
    draft = speculative if isinstance(speculative, LayerSkipConfig) else None
    return EngineFacts(
        runner="V2" if config.use_v2_model_runner else "V1",
        device=current_platform.get_device_name(),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        max_model_len=config.model_config.max_model_len,
        exit_layer=draft.exit_layer if draft else None,
        num_speculative_tokens=config.num_speculative_tokens,
        length=draft.describe_length() if draft else "0",
    )


def count_prompt_tokens(prompts: Sequence[str]) -> list[int]:
    """Count each prompt's tokens."""
    tokenizer = _llm.get_tokenizer()
    return [len(tokenizer.encode(prompt)) for prompt in prompts]


def complete_prompts(prompts: Sequence[str], max_tokens: int) -> TaskRound:
    """Complete prompts greedily, up to the model's end of text or `max_tokens`."""
    from vllm import SamplingParams

    before, start_s = SpecDecodeCounters.read_own(), time.perf_counter()
    outputs = _llm.generate(
        list(prompts), SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False
    )
    seconds = time.perf_counter() - start_s
    return TaskRound(
        seconds=seconds,
        texts=tuple(output.outputs[0].text for output in outputs),
        token_ids=tuple(tuple(output.outputs[0].token_ids) for output in outputs),
        counters=SpecDecodeCounters.read_own() - before,
    )
