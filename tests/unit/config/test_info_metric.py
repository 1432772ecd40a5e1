"""What an engine says of itself among vLLM's metrics: E, K, L and where E and K come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.exit_adapters import make_exit_adapter

Publish = Callable[..., list[dict[str, str]]]


@pytest.fixture
def publish(configure: Callable[..., Any]) -> Iterator[Publish]:
    """Start vLLM's metrics, as an engine does, for these settings: the labels of ours."""
    from prometheus_client import REGISTRY
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    def publish(settings: Any, engine_indexes: list[int] | None = None) -> list[dict[str, str]]:
        vllm_config = configure(speculative_config=settings)
        PrometheusStatLogger(vllm_config, engine_indexes).log_engine_initialized()
        samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
        assert "vllm:cache_config_info" in {sample.name for sample in samples}
        found = [sample for sample in samples if sample.name == "vllm:layerskip_info"]
        assert all(sample.value == 1 for sample in found)
        return [sample.labels for sample in found]

    yield publish
    unregister_vllm_metrics()


def test_engine_says_what_drafts_when_its_metrics_start(publish: Publish) -> None:
    assert publish({"method": "layerskip", "exit_layer": 3}) == [
        {
            "exit_layer": "3",
            "exit_layer_source": "the user",
            "num_speculative_tokens": "4",
            "num_speculative_tokens_source": "the default",
            "is_length_auto": "false",
            "num_layers": "8",
            "exit_adapter": "",
            "draft_vocab_size": "256",
            "lookup": "off",
            "reuse_exit_states": "off",
            "engine": "0",
        }
    ]


def test_engine_says_the_most_when_the_length_is_auto(publish: Publish) -> None:
    (labels,) = publish({"method": "layerskip", "num_speculative_tokens": "auto:6"})
    assert (labels["num_speculative_tokens"], labels["is_length_auto"]) == ("6", "true")


def test_engines_say_it_each_when_there_are_several(publish: Publish, tmp_path: Path) -> None:
    folder = str(make_exit_adapter(tmp_path, exit_layer=2, num_speculative_tokens=5))
    found = publish({"method": "layerskip", "exit_adapter": folder}, [0, 1])
    assert [labels["engine"] for labels in found] == ["0", "1"]
    for labels in found:
        assert labels["exit_adapter"] == folder
        assert labels["exit_layer_source"] == "the exit adapter"
        assert (labels["exit_layer"], labels["num_speculative_tokens"]) == ("2", "5")


@pytest.mark.parametrize("settings", [None, {"method": "ngram", "num_speculative_tokens": 3}])
def test_engine_says_nothing_of_layerskip_when_it_drafts_otherwise(
    publish: Publish, settings: Any
) -> None:
    assert publish(settings) == []
