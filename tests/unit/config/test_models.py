"""Models and engine settings that layerskip refuses, before anything is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

LAYERSKIP = {"method": "layerskip"}
REMEDY = "Use a decoder-only text model with attention layers, or another speculative method."


def refusal(configure: Callable[..., Any], *model: Any, **engine_args: Any) -> str:
    """What the user reads when an engine with layerskip is configured."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the callers look at the message)
        configure(*model, speculative_config=LAYERSKIP, **engine_args)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "architecture", "reason"),
    [
        ("qwen2-mrope", "Qwen2ForCausalLM", "it uses M-RoPE positions"),
        ("qwen2-audio", "Qwen2AudioForConditionalGeneration", "it takes multimodal inputs"),
        ("jamba", "JambaForCausalLM", "it has Mamba or other recurrent layers"),
        ("mamba2", "Mamba2ForCausalLM", "it has Mamba or other recurrent layers"),
        ("gemma3n", "Gemma3nForCausalLM", "its last 4 layers read the KV cache of earlier ones"),
        ("gemma3n-unshared", "Gemma3nForCausalLM", "cannot run a slice of its layers"),
        ("t5", "T5ForConditionalGeneration", "it is an encoder-decoder"),
        ("whisper", "WhisperForConditionalGeneration", "it is an encoder-decoder"),
        ("bert", "BertModel", "it does not generate text"),
        ("eagle", "EagleLlamaForCausalLM", "it is a draft model itself (model_type 'eagle')"),
    ],
)
@pytest.mark.feature(
    "Architectures", "{architecture} ({reason})", runners=("v1", "v2"), is_refused=True
)
def test_model_is_refused_when_its_first_layers_cannot_draft(
    configure: Callable[..., Any],
    write_model: Callable[..., str],
    name: str,
    architecture: str,
    reason: str,
) -> None:
    message = refusal(configure, name)
    assert f"model is '{write_model(name)}' ({architecture})" in message
    assert reason in message
    assert REMEDY in message


def test_model_is_refused_when_the_engine_pools_with_it(configure: Callable[..., Any]) -> None:
    message = refusal(configure, runner="pooling", convert="embed")
    assert "(LlamaForCausalLM)" in message
    assert "it does not generate text" in message
    assert REMEDY in message


@pytest.mark.parametrize(
    ("name", "model_impl"),
    [("llama", "auto"), ("llama", "transformers"), ("gemma2", "auto"), ("helium", "auto")],
)
def test_model_is_accepted_when_it_is_a_decoder_of_text(
    configure: Callable[..., Any], name: str, model_impl: str
) -> None:
    vllm_config = configure(name, speculative_config=LAYERSKIP, model_impl=model_impl)
    assert vllm_config.speculative_config.exit_layer == 2


@pytest.mark.parametrize(
    ("engine_args", "field", "value", "right"),
    [
        (
            {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
            "pipeline_parallel_size",
            2,
            1,
        ),
        (
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            "decode_context_parallel_size",
            2,
            1,
        ),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size", 2, 1),
        ({"enable_dbo": True}, "use_ubatching", True, False),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill", True, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.feature("Engine", "`{field}` = {value}", runners=("v1", "v2"), is_refused=True)
def test_engine_setting_is_refused_when_drafting_does_not_support_it(
    configure: Callable[..., Any],
    engine_args: dict[str, Any],
    field: str,
    value: Any,
    right: Any,
) -> None:
    message = refusal(configure, **engine_args)
    assert f"{field} is {value!r}" in message
    assert "layerskip does not support" in message
    assert f"must be {right!r}" in message


@pytest.mark.parametrize("backend", ["auto", "prefetch"])
@pytest.mark.feature(
    "Models and weights",
    "weights offloaded by prefetching (`offload_group_size`)",
    runners=("v1", "v2"),
    is_refused=True,
)
def test_prefetched_weights_are_refused_because_drafts_do_not_run_all_layers(
    configure: Callable[..., Any], backend: str
) -> None:
    message = refusal(configure, offload_backend=backend, offload_group_size=2)
    assert f"offload_backend is {backend!r} with an offload_group_size of 2" in message
    assert "offload with cpu_offload_gb" in message


def test_weights_may_be_offloaded_when_they_are_not_prefetched(
    configure: Callable[..., Any],
) -> None:
    offloaded = {"offload_backend": "uva", "cpu_offload_gb": 1, "offload_group_size": 2}
    with pytest.warns(UserWarning, match="Prefetch settings will be ignored"):
        vllm_config = configure(speculative_config=LAYERSKIP, **offloaded)
    assert vllm_config.speculative_config.exit_layer == 2


class FirstComeScheduler:
    """A scheduler that is not vLLM's."""


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.feature(
    "Engine", "`scheduler_cls` that is not vLLM's", runners=("v1", "v2"), is_refused=True
)
def test_scheduler_is_refused_when_it_does_not_extend_vllms(
    configure: Callable[..., Any], is_named: bool
) -> None:
    name = f"{__name__}.{FirstComeScheduler.__name__}"
    given = name if is_named else FirstComeScheduler
    message = refusal(configure, scheduler_cls=given)
    assert f"scheduler_cls is {given!r}" in message
    assert "must extend vLLM's Scheduler or AsyncScheduler" in message


def test_scheduler_is_accepted_when_it_is_vllms(configure: Callable[..., Any]) -> None:
    name = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
    vllm_config = configure(speculative_config=LAYERSKIP, scheduler_cls=name)
    assert vllm_config.scheduler_config.scheduler_cls == name


@pytest.mark.feature("Engine", "`enable_eplb` = True", runners=("v1", "v2"), is_refused=True)
def test_expert_load_balancing_is_refused_when_it_is_on(write_model: Callable[..., str]) -> None:
    from vllm.config import ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model=write_model(), skip_tokenizer_init=True, speculative_config=dict(LAYERSKIP)
    )
    parallel_config = copy.copy(ParallelConfig())
    # vLLM's own check lets nobody switch it on without a GPU.
    object.__setattr__(parallel_config, "enable_eplb", True)
    with pytest.raises(ValueError, match=r"enable_eplb is True.*it must be False"):
        args.create_speculative_config(args.create_model_config(), parallel_config)


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        (3, ["is 3", "must be an object such as"]),
        ([8, 6], ["is [8, 6]", "must be an object such as"]),
        ({"exit_layers": 3}, ["unknown key 'exit_layers'", "known are exit_layer"]),
        ({"exit_layer": "3"}, ["exit_layer of 'layerskip'", "is '3'", "an integer of at least 1"]),
        ({"num_speculative_tokens": 0}, ["num_speculative_tokens of", "is 0", "at least 1"]),
        (
            {"exit_layer": 99},
            ["exit_layer is 99 (from the checkpoint's config.json)", "between 1 and 8"],
        ),
    ],
    ids=str,
)
def test_checkpoint_is_refused_when_its_layerskip_entry_is_wrong(
    configure: Callable[..., Any], entry: Any, parts: list[str]
) -> None:
    message = refusal(configure, "llama", {"layerskip": entry})
    assert all(part in message for part in parts), message


def test_checkpoint_decides_when_the_user_gives_no_settings(configure: Callable[..., Any]) -> None:
    entry = {"exit_layer": 5, "num_speculative_tokens": 7}
    config = configure("llama", {"layerskip": entry}, speculative_config=LAYERSKIP)
    chosen = config.speculative_config
    assert (chosen.exit_layer, chosen.num_speculative_tokens) == (5, 7)


def test_user_decides_when_the_checkpoint_says_something_else(
    configure: Callable[..., Any],
) -> None:
    entry = {"exit_layer": 5, "num_speculative_tokens": 7}
    config = configure(
        "llama", {"layerskip": entry}, speculative_config=LAYERSKIP | {"exit_layer": 1}
    )
    chosen = config.speculative_config
    assert (chosen.exit_layer, chosen.num_speculative_tokens) == (1, 7)
