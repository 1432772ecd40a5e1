"""`vllm:layerskip_info`: a running server says in /metrics what drafts, and who said so.

Called once by each API server, and by an `LLM` that keeps statistics, when its engines are up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerskip_vllm.config.speculative import LayerSkipConfig

if TYPE_CHECKING:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

NAME = "vllm:layerskip_info"


def publish_info(stat_logger: PrometheusStatLogger) -> None:
    """Add a gauge that is 1, whose labels are E, K, L, and where E and K come from.

    Like vLLM's own `cache_config_info` it has one series an engine, the same from all API servers.
    """
    config = stat_logger.vllm_config.speculative_config
    assert isinstance(config, LayerSkipConfig)
    labels = {
        "exit_layer": str(config.exit_layer),
        "exit_layer_source": config.exit_layer_source,
        "num_speculative_tokens": str(config.num_speculative_tokens),
        "num_speculative_tokens_source": config.num_speculative_tokens_source,
        "is_length_auto": str(config.is_length_auto).lower(),
        "num_layers": str(config.target_model_config.get_total_num_hidden_layers()),
        "exit_adapter": config.exit_adapter or "",
        "draft_vocab_size": str(config.draft_vocab_size),
        "lookup": config.lookup,
        "reuse_exit_states": config.reuse_exit_states,
    }
    gauge = stat_logger._gauge_cls(
        name=NAME,
        documentation="What layerskip drafts with, and where each number comes from.",
        labelnames=[*labels, "engine"],
        multiprocess_mode="mostrecent",
    )
    for engine_index in stat_logger.engine_indexes:
        gauge.labels(**labels, engine=str(engine_index)).set(1)
