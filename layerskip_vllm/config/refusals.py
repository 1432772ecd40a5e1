"""Every setting, model, engine and combination of them that cannot work, known at config time.

Called where a `LayerSkipConfig` is made: in the API server, or by `LLM`. Each check raises a
`ValueError` that names the setting, its value and what would be right.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config.speculative import SpeculativeConfig
from vllm.platforms import current_platform
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from layerskip_vllm.checkpoint.entry import check_positive_int
from layerskip_vllm.config.flags import AUTO, FLAG_OF_SETTING, LOOKUPS

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

    from layerskip_vllm.checkpoint.draft_vocab import DraftVocab
    from layerskip_vllm.checkpoint.entry import DraftSettings
    from layerskip_vllm.checkpoint.exit_adapter import ExitAdapterConfig

# What the rejection sampler of Model Runner V1 takes (MAX_SPEC_LEN).
MAX_NUM_SPECULATIVE_TOKENS = 128

# vLLM's speculative settings that mean the same here.
SHARED_SETTINGS = frozenset(
    {
        "num_speculative_tokens",
        "num_speculative_tokens_per_batch_size",
        "draft_sample_method",
        "rejection_sample_method",
        "synthetic_acceptance_rates",
        "synthetic_acceptance_length",
        "use_local_argmax_reduction",
        "enable_adaptive_verification",
        "enforce_eager",
    }
)
# Those of vLLM's that are known: another may be lossy, as "fly" of 0.33 is.
REJECTION_SAMPLE_METHODS = ("standard", "block", "synthetic")
# What the tokens of all requests may take of the device's memory, for lookup.
MAX_TABLE_BYTES = 1 << 30
REUSES = ("auto", "on", "off")
KNOWN_KEYS = SHARED_SETTINGS | {"method", "model", *FLAG_OF_SETTING}


def check_settings(settings: Mapping[str, Any], has_lora: bool) -> None:
    """Refuse settings that layerskip does not have, or that exclude one another."""
    for key, value in settings.items():
        if key in KNOWN_KEYS:
            continue
        if key in SpeculativeConfig.__dataclass_fields__:
            raise ValueError(
                f"{key} is {value!r}, but it does not apply to layerskip, which drafts with the "
                f"target's own layers and KV cache; leave it out."
            )
        raise ValueError(
            f"{key!r} is not a setting of layerskip; known are {', '.join(sorted(KNOWN_KEYS))}."
        )
    if "exit_layer" in settings:
        check_positive_int("exit_layer", settings["exit_layer"])
    if "num_speculative_tokens" in settings:
        check_length(settings["num_speculative_tokens"])
    for key, what in (("exit_adapter", "folder"), ("draft_vocab", "file")):
        if key in settings and not isinstance(settings[key], str):
            raise ValueError(f"{key} is {settings[key]!r}; it must be the path of a {what}.")
    if "draft_vocab" in settings:
        _check_head(settings, has_lora)
    _check_sampling(settings, has_lora)
    _check_lookup(settings)


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


def check_length(num_speculative_tokens: Any) -> None:
    """Refuse a K that is neither a number nor "auto", with the most that it may be or without."""
    number = num_speculative_tokens
    if isinstance(number, str):
        auto, _, most = number.partition(":")
        if number != AUTO and not (auto == AUTO and most.isdecimal() and int(most) > 0):
            raise ValueError(
                f"num_speculative_tokens is {number!r}; it must be an integer of at least 1, "
                f"'{AUTO}', or '{AUTO}:8', whose 8 is the most that a step drafts."
            )
    else:
        check_positive_int("num_speculative_tokens", number)


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


def _check_sampling(settings: Mapping[str, Any], has_lora: bool) -> None:
    """Refuse a way to verify drafts that may change the output, and ways to draft that clash."""
    method = settings.get("rejection_sample_method", "standard")
    if method not in REJECTION_SAMPLE_METHODS:
        raise ValueError(
            f"rejection_sample_method is {method!r}; with layerskip it must be 'standard' or "
            "'block', which keep the target's distribution, or 'synthetic', which accepts drafts "
            "at rates of your own to measure with."
        )
    if not settings.get("use_local_argmax_reduction"):
        return
    if settings.get("draft_sample_method") == "probabilistic":
        raise ValueError(
            "use_local_argmax_reduction is true and draft_sample_method is 'probabilistic', which "
            "needs all logits; use 'greedy' drafts or leave use_local_argmax_reduction out."
        )
    if has_lora:
        raise ValueError(
            "use_local_argmax_reduction is true and enable_lora is true, but vLLM's head with "
            "adapters gives whole logits alone; leave one of them out."
        )


def _check_head(settings: Mapping[str, Any], has_lora: bool) -> None:
    """Refuse what needs the target's whole head in the draft steps."""
    for name, is_set, reason in (
        (
            "use_local_argmax_reduction",
            settings.get("use_local_argmax_reduction"),
            "it is for whole heads, whose logits are many",
        ),
        ("enable_lora", has_lora, "an adapter changes logits that a draft vocabulary leaves out"),
    ):
        if is_set:
            raise ValueError(
                f"draft_vocab is {settings['draft_vocab']!r} and {name} is true, but {reason}; "
                "leave one of them out."
            )


def _check_lookup(settings: Mapping[str, Any]) -> None:
    """Refuse a way to look drafts up that is unknown, and what copied drafts do not have."""
    lookup = settings.get("lookup", "off")
    if lookup not in LOOKUPS:
        raise ValueError(f"lookup is {lookup!r}; it must be 'off' or 'auto'.")
    if lookup == "off":
        return
    for name, value, reason in (
        (
            "draft_sample_method",
            "probabilistic",
            "verifies drafts by the probabilities that they were sampled with",
        ),
        ("enable_adaptive_verification", True, "ranks drafts by the exit's confidence in them"),
        ("reuse_exit_states", "auto", "begins verification with what drafts left at the exit"),
        ("reuse_exit_states", "on", "begins verification with what drafts left at the exit"),
    ):
        if settings.get(name) == value:
            raise ValueError(
                f"lookup is {lookup!r} and {name} is {value!r}, which {reason}, and copied ones "
                "have none; leave one of them out."
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


def check_draft_vocab(file: Path, draft_vocab: DraftVocab, model_config: ModelConfig) -> None:
    """Refuse a draft vocabulary of another model."""
    vocab_size = model_config.get_vocab_size()
    if draft_vocab.vocab_size != vocab_size:
        raise ValueError(
            f"draft_vocab is {str(file)!r}, which was made for a model whose vocab_size is "
            f"{draft_vocab.vocab_size}, but {model_config.model} has {vocab_size}; it must be the "
            "model's own."
        )


def check_model(model_config: ModelConfig) -> None:
    """Refuse a model whose first layers cannot be run alone over the shared KV cache."""
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


def check_exit_adapter(
    folder: Path,
    adapter: ExitAdapterConfig,
    exit_layer: int | None,
    model_config: ModelConfig,
) -> None:
    """Refuse an exit adapter of another model, or of another exit than the user's."""
    for name, value in (
        ("hidden_size", model_config.get_hidden_size()),
        ("num_hidden_layers", model_config.get_total_num_hidden_layers()),
    ):
        if getattr(adapter, name) != value:
            raise ValueError(
                f"exit_adapter is {str(folder)!r}, which was trained for a model whose {name} is "
                f"{getattr(adapter, name)}, but {model_config.model} has {value}; it must be the "
                "model's own."
            )
    if exit_layer not in (None, adapter.exit_layer):
        raise ValueError(
            f"exit_layer is {exit_layer}, but exit_adapter {str(folder)!r} was trained for "
            f"exit_layer {adapter.exit_layer}; leave exit_layer out, or leave exit_adapter out."
        )


def check_draft(draft: DraftSettings, model_config: ModelConfig) -> None:
    """Refuse an E or a K that the model, its context or vLLM is too small for."""
    exit_layer, num_speculative_tokens = draft.exit_layer, draft.num_speculative_tokens
    num_layers = model_config.get_total_num_hidden_layers()
    if exit_layer.value > num_layers:
        raise ValueError(
            f"exit_layer is {exit_layer.value} (from {exit_layer.source}), but "
            f"{model_config.model} has {num_layers} layers; it must be between 1 and {num_layers}, "
            "and drafts pay when it is small (a quarter of the layers or less)."
        )
    limit = min(MAX_NUM_SPECULATIVE_TOKENS, model_config.max_model_len - 1)
    if num_speculative_tokens.value > limit:
        raise ValueError(
            f"num_speculative_tokens is {num_speculative_tokens.value} (from "
            f"{num_speculative_tokens.source}); it must be at most {limit} here (vLLM verifies at "
            f"most {MAX_NUM_SPECULATIVE_TOKENS}, and max_model_len is "
            f"{model_config.max_model_len}), and is usually between 2 and 8."
        )


def check_schedule(settings: Mapping[str, Any], num_speculative_tokens: int) -> None:
    """Refuse a K by batch size with which vLLM itself would fail in the engine core."""
    name = "num_speculative_tokens_per_batch_size"
    if name not in settings:
        return
    try:
        schedule = validate_and_normalize_dynamic_sd_schedule(settings[name])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} is {settings[name]!r}: {error} It must be a list of [first batch size, last "
            "batch size, K] such as [[1, 4, 4], [5, 64, 2]]."
        ) from error
    largest = max(k for *_, k in schedule)
    if not 1 <= largest <= num_speculative_tokens:
        raise ValueError(
            f"{name} is {settings[name]!r}, whose largest K is {largest}; it must be between 1 and "
            f"num_speculative_tokens, which is {num_speculative_tokens}."
        )
