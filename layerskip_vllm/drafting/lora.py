"""LoRA in draft steps: each request drafts with its own adapter; used by both runners' drafters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin


class DraftLoRA(LoRAModelRunnerMixin):
    """Maps the rows of draft steps to the adapters that the target's step has made active.

    The exit's layers are the target's, so its adapters are in them already. What differs is which
    row is which request's: a draft step has one token a request. The mapping goes through vLLM's
    manager, which leaves out what it was given last, so that the target's next step sets its own.
    """

    lora_manager: LoRAModelManager  # type: ignore[assignment]  # its user, not a worker's

    def __init__(self, vllm_config: VllmConfig, target: Any):
        """Take the adapters of a loaded model.

        Args:
            vllm_config: The engine's, whose `lora_config` is not None.
            target: The whole model, with vLLM's LoRA layers in it.
        """
        self.lora_config = vllm_config.lora_config
        self.lora_manager = target.lora_manager

    def map_requests(self, lora_ids: Iterable[int], num_tokens: int) -> None:
        """Set the adapter of each row of the draft steps to come.

        Args:
            lora_ids: The adapter of each request of the batch, 0 for none.
            num_tokens: Rows of a draft step. Those past the requests get the last one's adapter: a
                graph that was captured for so many adapters must not meet one more.
        """
        requests = tuple(int(lora_id) for lora_id in lora_ids)
        rows = requests + requests[-1:] * (num_tokens - len(requests))
        self._set_active_loras(requests, rows, set())

    def map_logits(self, lora_ids: np.ndarray, num_logits: np.ndarray) -> None:
        """Set the adapter of each row of logits that the target is about to verify or sample.

        Args:
            lora_ids: `[num_reqs]`, the adapter of each request, 0 for none.
            num_logits: `[num_reqs]`, how many rows it has.
        """
        rows = tuple(lora_ids.repeat(num_logits).tolist())
        self._set_active_loras(rows, rows, set())

    @override
    def _set_active_loras(
        self,
        prompt_lora_mapping: tuple[int, ...],
        token_lora_mapping: tuple[int, ...],
        lora_requests: set[LoRARequest],
        mapping_type: LoRAMappingType = LoRAMappingType.LANGUAGE,
    ) -> None:
        mapping = LoRAMapping(
            token_lora_mapping, prompt_lora_mapping, is_prefill=True, type=mapping_type
        )
        self.lora_manager.set_adapter_mapping(mapping)


def make_draft_lora(vllm_config: VllmConfig, target: Any) -> DraftLoRA | None:
    """Make a `DraftLoRA` where the engine serves adapters."""
    return None if vllm_config.lora_config is None else DraftLoRA(vllm_config, target)
