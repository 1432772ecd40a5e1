"""Every engine setting that layerskip, or a setting of it, cannot work with, known at config time.

Called where a `LayerSkipConfig` is made: in the API server, or by `LLM`. Each check raises a
`ValueError` that names the setting, its value and what would be right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

REUSES = ("auto", "on", "off")
# What the tokens of all requests may take of the device's memory, for lookup.
MAX_TABLE_BYTES = 1 << 30


def check_engine(args: EngineArgs, parallel_config: ParallelConfig) -> None:
    """Refuse engine settings that the draft steps do not support."""
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


def check_adaptive_verification(settings: Mapping[str, Any], args: EngineArgs) -> None:
    """Refuse what cannot stand beside vLLM's adaptive verification.

    What it asks of the engine, full CUDA graphs and Model Runner V2, vLLM sees to itself.
    """
    name = "enable_adaptive_verification"
    if not settings.get(name):
        return
    is_local = settings.get("use_local_argmax_reduction")
    num_ranks = args.data_parallel_size
    for other, value, is_set, reason in (
        ("use_local_argmax_reduction", is_local, is_local, "needs all logits of a draft"),
        ("enable_lora", True, args.enable_lora, "trims rows after they were mapped to adapters"),
        ("data_parallel_size", num_ranks, num_ranks > 1, "would trim each rank's drafts alone"),
    ):
        if is_set:
            raise ValueError(
                f"{name} is {settings[name]!r}, which {reason}, and {other} is {value!r}; leave "
                "one of them out."
            )


def check_auto_length(
    settings: Mapping[str, Any], parallel_config: ParallelConfig, model_config: ModelConfig
) -> None:
    """Refuse what K "auto" cannot go together with."""
    length = settings["num_speculative_tokens"]
    for other, reason in (
        ("num_speculative_tokens_per_batch_size", "both say how many tokens a batch drafts"),
        ("enable_adaptive_verification", "a draft that is not verified would count as refused"),
    ):
        if settings.get(other):
            raise ValueError(
                f"num_speculative_tokens is {length!r} and {other} is {settings[other]!r}, but "
                f"{reason}; leave one of them out."
            )
    backend = parallel_config.distributed_executor_backend
    if backend == "external_launcher" and parallel_config.world_size > 1:
        raise ValueError(
            f"num_speculative_tokens is {length!r} and distributed_executor_backend is "
            f"{backend!r}, but each rank has a scheduler of its own there, and would choose by its "
            "own clock; give a number."
        )
    if model_config.is_moe and parallel_config.data_parallel_size > 1:
        raise ValueError(
            f"num_speculative_tokens is {length!r} and data_parallel_size is "
            f"{parallel_config.data_parallel_size}, but the ranks of a mixture of experts must "
            "draft alike, and each would choose for itself; give a number."
        )


def check_reuse(
    settings: Mapping[str, Any],
    args: EngineArgs,
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
) -> None:
    """Refuse what exit states cannot be reused with."""
    reuse = settings.get("reuse_exit_states", "off")
    if reuse not in REUSES:
        raise ValueError(
            f"reuse_exit_states is {reuse!r}; it must be 'auto', 'on' or 'off'. 'auto' reuses them "
            "in steps that are large enough for it to pay."
        )
    if reuse == "off":
        return
    dp_size = parallel_config.data_parallel_size
    has_embeds = model_config.enable_prompt_embeds
    is_adaptive = bool(settings.get("enable_adaptive_verification"))
    for name, value, is_refused, reason in (
        ("enable_lora", True, bool(args.enable_lora), "adapters are not mapped to its rows"),
        ("enable_prompt_embeds", True, has_embeds, "it begins with token ids"),
        ("enable_adaptive_verification", True, is_adaptive, "the device alone knows its tokens"),
        ("data_parallel_size", dp_size, dp_size > 1, "ranks do not agree on it"),
        (
            "kv_transfer_config",
            args.kv_transfer_config,
            args.kv_transfer_config is not None,
            "a KV connector follows a verification through all layers",
        ),
        (
            "model_impl",
            model_config.model_impl,
            model_config.using_transformers_backend(),
            "vLLM cannot begin in the middle of the layers of a model that it runs through "
            "transformers",
        ),
    ):
        if is_refused:
            raise ValueError(
                f"reuse_exit_states is {reuse!r} and {name} is {value!r}, but {reason}; leave one "
                "of them out."
            )


def check_lookup_memory(
    settings: Mapping[str, Any], args: EngineArgs, model_config: ModelConfig
) -> None:
    """Refuse a lookup whose tokens would take much of a device's memory; a CPU keeps none there."""
    is_on = settings.get("lookup", "off") != "off"
    if is_on and args.max_num_seqs is not None and not current_platform.is_cpu():
        check_lookup_table(args.max_num_seqs, model_config.max_model_len)


def check_lookup_table(max_num_seqs: int, max_model_len: int) -> None:
    """Refuse a table of all requests' tokens, of 4 bytes each, that is too large."""
    num_bytes = 4 * max_num_seqs * max_model_len
    if num_bytes > MAX_TABLE_BYTES:
        raise ValueError(
            f"lookup is 'auto', for which max_num_seqs {max_num_seqs} times max_model_len "
            f"{max_model_len} tokens would take {num_bytes / 2**30:.1f} GiB of the device's "
            f"memory; it must be at most {MAX_TABLE_BYTES >> 30} GiB: lower one of the two, or set "
            "lookup to 'off'."
        )
