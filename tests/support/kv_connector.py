"""A KV connector as strict as those that follow a step's layers one by one."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector


class OnceALayerConnector(ExampleConnector):
    """vLLM's example, which keeps a prompt's cache in files; it takes each layer once a step."""

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Begin a step."""
        self._seen: set[tuple[str, str]] = set()
        super().bind_connector_metadata(connector_metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for a layer, once."""
        self._take("loaded", layer_name)
        super().wait_for_layer_load(layer_name)

    def save_kv_layer(self, layer_name: str, *args: Any, **kwargs: Any) -> None:
        """Save a layer, once."""
        self._take("saved", layer_name)
        super().save_kv_layer(layer_name, *args, **kwargs)

    def _take(self, what: str, layer_name: str) -> None:
        assert (what, layer_name) not in self._seen, f"{layer_name} is {what} twice in a step"
        self._seen.add((what, layer_name))
