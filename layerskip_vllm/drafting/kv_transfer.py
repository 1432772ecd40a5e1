"""Draft steps, hidden from vLLM's KV connectors; used by the model that both drafters run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.distributed.kv_transfer import kv_transfer_state


@contextmanager
def without_kv_connector() -> Iterator[None]:
    """Run layers whose keys and values a connector must neither load nor save.

    A connector follows the target's layers through a step, each once. Draft steps run the same
    layers by the same names, on slots that the target has loaded or will write itself.
    """
    connector = kv_transfer_state._KV_CONNECTOR_AGENT
    kv_transfer_state._KV_CONNECTOR_AGENT = None
    try:
        yield
    finally:
        kv_transfer_state._KV_CONNECTOR_AGENT = connector
