"""Which models and engine settings layerskip works with; called by `config` at engine start."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs


def check_model(model_config: ModelConfig) -> None:
    """Refuse a model whose first layers cannot be run alone over the shared KV cache.

    Args:
        model_config: The target model's configuration.

    Raises:
        ValueError: With the model's name and the reason.
    """
    name = f"model is {model_config.model!r} ({', '.join(model_config.architectures)})"
    hf_config, text_config = model_config.hf_config, model_config.hf_text_config
    num_shared = getattr(text_config, "num_kv_shared_layers", 0) or 0
    model_type = str(getattr(hf_config, "model_type", ""))
    reasons = (
        (model_config.runner_type != "generate", "it does not generate text"),
        (
            model_type in ("eagle", "medusa", "mlp_speculator") or model_type.endswith("_mtp"),
            f"it is a draft model itself (model_type {model_type!r})",
        ),
        (model_config.is_encoder_decoder, "it is an encoder-decoder"),
        (
            model_config.is_multimodal_model,
            "it takes multimodal inputs, which draft steps do not carry yet",
        ),
        (model_config.uses_mrope, "it uses M-RoPE positions, which draft steps do not carry"),
        (
            model_config.is_hybrid or model_config.is_attention_free,
            "it has Mamba or other recurrent layers, whose state a rejected draft would spoil",
        ),
        (
            num_shared > 0,
            f"its last {num_shared} layers read the KV cache of earlier ones "
            "(num_kv_shared_layers), across the exit",
        ),
        (
            not model_config.registry.is_pp_supported_model(
                model_config.architectures, model_config
            ),
            "its vLLM implementation cannot run a slice of its layers (no pipeline parallelism)",
        ),
    )
    for is_refused, reason in reasons:
        if is_refused:
            raise ValueError(
                f"{name}, which layerskip cannot draft with: {reason}. Use a decoder-only text "
                "model with attention layers, or another speculative method."
            )


def check_engine(args: EngineArgs, parallel_config: ParallelConfig) -> None:
    """Refuse engine settings that the draft steps do not support.

    Args:
        args: The engine's arguments.
        parallel_config: The parallelism that vLLM has made of them.

    Raises:
        ValueError: With the setting's name, its value and what it must be.
    """
    for name, value, right in (
        ("pipeline_parallel_size", parallel_config.pipeline_parallel_size, 1),
        ("decode_context_parallel_size", parallel_config.decode_context_parallel_size, 1),
        ("prefill_context_parallel_size", parallel_config.prefill_context_parallel_size, 1),
        ("enable_eplb", parallel_config.enable_eplb, False),
        ("use_ubatching", parallel_config.use_ubatching, False),
        ("kv_sharing_fast_prefill", bool(args.kv_sharing_fast_prefill), False),
    ):
        if value != right:
            raise ValueError(
                f"{name} is {value!r}, which layerskip does not support; it must be {right!r}."
            )
    backend = args.offload_backend
    if backend == "prefetch" or (backend == "auto" and args.offload_group_size > 0):
        raise ValueError(
            f"offload_backend is {backend!r} with an offload_group_size of "
            f"{args.offload_group_size}, which layerskip does not support: prefetching expects "
            "every step to run all layers in turn, and draft steps stop at the exit. Leave it out, "
            "or offload with cpu_offload_gb."
        )
    if args.scheduler_cls is not None:
        _check_scheduler(args.scheduler_cls)


def _check_scheduler(given: str | type) -> None:
    """Refuse a scheduler that would not keep requests to the drafts that they ask for."""
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.core.sched.scheduler import Scheduler

    scheduler = resolve_obj_by_qualname(given) if isinstance(given, str) else given
    if not (isinstance(scheduler, type) and issubclass(scheduler, Scheduler)):
        raise ValueError(
            f"scheduler_cls is {given!r}, which layerskip does not support; it must extend vLLM's "
            "Scheduler or AsyncScheduler, which hold each request to its number of drafts."
        )
