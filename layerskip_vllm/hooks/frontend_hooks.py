"""The hooks of the method where users are met: arguments, requests and metrics, one place each."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from layerskip_vllm.config.flags import (
    add_speculative_flags,
    fold_settings,
    is_layerskip,
    is_layerskip_config,
)
from layerskip_vllm.hooks import install

if TYPE_CHECKING:
    import argparse

    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.metrics.loggers import PrometheusStatLogger

FRONTEND_HOOKS: list[install.Hook] = []

_hook = functools.partial(install.hook, FRONTEND_HOOKS)

_ARGS = "vllm.engine.arg_utils:EngineArgs"
_PARAMS = "vllm.sampling_params:SamplingParams"
_METRICS = "vllm.v1.metrics.loggers:PrometheusStatLogger"


@_hook(
    target=f"{_ARGS}.create_speculative_config",
    why='`{"method": "layerskip"}` and `{"model": "layerskip"}` make a `LayerSkipConfig`',
    reason="vLLM's `SpeculativeConfig` takes its methods from a closed list and looks for a draft "
    "checkpoint.",
    process="whichever reads the engine arguments: the API server, the one that makes an `LLM`, a "
    "Ray actor",
    upstream="[vllm#36219](https://github.com/vllm-project/vllm/issues/36219), open",
    remove_when="speculative methods can be registered; `create_config` of the registry in the "
    "diff",
)
def _create_speculative_config(original: Any) -> Any:
    """Wrap it: arguments that do not name layerskip go to the original unchanged."""

    @functools.wraps(original)
    def create_speculative_config(
        self: EngineArgs, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
    ) -> SpeculativeConfig | None:
        create = original
        if is_layerskip(self):
            from layerskip_vllm.config.speculative import create_layerskip_config

            create = create_layerskip_config
        config: SpeculativeConfig | None = create(self, target_model_config, target_parallel_config)
        return config

    return create_speculative_config


@_hook(
    target=f"{_ARGS}.add_cli_args",
    why="the flags `--speculative-model`, `--num-speculative-tokens` and layerskip's own",
    reason="Those are `--spec-exit-layer`, `--spec-exit-adapter`, `--spec-draft-vocab` and "
    "`--spec-lookup`; and `layerskip` is among the choices of `--spec-method`.",
    process="the one that parses the command line",
    upstream="none; vLLM lets plugins extend its parser only by platform",
    remove_when="a registered method can bring flags; `add_cli_args` of the registry in the diff",
)
def _add_cli_args(original: Any) -> Any:
    """Wrap it: the original fills the parser, then the flags are added."""
    function = original.__func__

    @functools.wraps(function)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_speculative_flags(function(parser))

    return staticmethod(add_cli_args)


@_hook(
    target=f"{_ARGS}.from_cli_args",
    why="layerskip's own flags reach the speculative config",
    reason="`EngineArgs` has no fields for them.",
    process="the one that parses the command line",
    remove_when="a registered method can bring flags; `fold_cli_args` of the registry in the diff",
)
def _from_cli_args(original: Any) -> Any:
    """Wrap it: move the flags' values into `speculative_config`, then call the original."""
    function = original.__func__

    @functools.wraps(function)
    def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> Any:
        return function(cls, fold_settings(args))

    return classmethod(from_cli_args)


@_hook(
    target=f"{_PARAMS}.verify",
    why="a request's layerskip arguments are checked where it enters",
    reason='A request may say how many tokens it drafts, `extra_args={"layerskip": '
    '{"num_speculative_tokens": ...}}`; a wrong value is refused before the engine sees it.',
    process="the API server's, or that of `LLM`",
    upstream="none; vLLM lets logits processors check `extra_args`, nobody else",
    remove_when="a registered method can check requests; `check_request` of the registry in the "
    "diff",
)
def _verify(original: Any) -> Any:
    """Wrap it: the original's checks, then those of requests with such an argument."""

    @functools.wraps(original)
    def verify(
        self: SamplingParams,
        model_config: ModelConfig,
        speculative_config: SpeculativeConfig | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        from layerskip_vllm.config.request import check_request

        original(self, model_config, speculative_config, *args, **kwargs)
        check_request(self, speculative_config)

    return verify


@_hook(
    target=f"{_METRICS}.log_engine_initialized",
    relies_on=(f"{_METRICS}._gauge_cls", f"{_METRICS}.engine_indexes"),
    why="`vllm:layerskip_info` says E, K and where each comes from in a server's metrics",
    reason="The entry points of `vllm.stat_logger_plugins` would do, but one that is installed "
    "turns statistics on for every server, also with `--disable-log-stats`, and costs a call a "
    "step.",
    process="each API server, and that of an `LLM` that keeps statistics",
    upstream="none; vLLM publishes the settings of its KV cache alone",
    remove_when="a registered method can publish metrics; `publish_info` of the registry in the "
    "diff",
)
def _log_engine_initialized(original: Any) -> Any:
    """Wrap it: where layerskip drafts, one more gauge after the original's."""

    @functools.wraps(original)
    def log_engine_initialized(self: PrometheusStatLogger) -> None:
        original(self)
        if is_layerskip_config(self.vllm_config.speculative_config):
            from layerskip_vllm.config.info_metric import publish_info

            publish_info(self)

    return log_engine_initialized
