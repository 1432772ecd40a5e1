"""What the user may say about layerskip, and every refusal of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from scripts.ledger import version_here
from tests.unit.model_configs import MAX_MODEL_LEN, NUM_LAYERS

NOT_POSITIVE_INTS = [0, -1, True, "2", 2.0, float("nan"), [2], {}]

Speculate = Callable[..., Any]


def refusal(speculate: Speculate, **engine_args: Any) -> str:
    """What the user reads."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the callers look at the message)
        speculate(**engine_args)
    return str(error.value)


def refusal_of(speculate: Speculate, **settings: Any) -> str:
    return refusal(speculate, speculative_config={"method": "layerskip", **settings})


@pytest.mark.parametrize("field", ["exit_layer", "num_speculative_tokens"])
@pytest.mark.parametrize("value", NOT_POSITIVE_INTS, ids=repr)
def test_setting_is_refused_when_it_is_not_a_positive_integer(
    speculate: Speculate, field: str, value: Any
) -> None:
    message = refusal_of(speculate, **{field: value})
    assert f"{field} is {value!r}" in message
    assert "must be an integer of at least 1" in message


@pytest.mark.parametrize("exit_layer", [NUM_LAYERS + 1, 10**30])
def test_exit_layer_is_refused_when_the_model_has_fewer_layers(
    speculate: Speculate, exit_layer: int
) -> None:
    message = refusal_of(speculate, exit_layer=exit_layer)
    assert f"exit_layer is {exit_layer}" in message
    assert f"has {NUM_LAYERS} layers" in message
    assert f"between 1 and {NUM_LAYERS}" in message


@pytest.mark.parametrize("num_tokens", [129, MAX_MODEL_LEN, 1000])
def test_num_speculative_tokens_is_refused_when_vllm_cannot_verify_them(
    speculate: Speculate, num_tokens: int
) -> None:
    message = refusal_of(speculate, num_speculative_tokens=num_tokens)
    assert f"num_speculative_tokens is {num_tokens} (from the user)" in message
    assert "must be at most 128" in message


def test_defaults_are_refused_when_a_context_cannot_hold_them(
    configure: Callable[..., Any],
) -> None:
    with pytest.raises(ValueError, match=r"tokens is 4 \(from the default\); it must be at most 3"):
        configure(max_model_len=4, speculative_config={"method": "layerskip"})


@pytest.mark.parametrize("key", ["exit_leyer", "EXIT_LAYER", "num_layers", "exit layer"])
def test_key_is_refused_when_it_is_unknown(speculate: Speculate, key: str) -> None:
    message = refusal_of(speculate, **{key: 3})
    assert repr(key) in message
    assert "known are" in message
    assert "exit_layer, lookup, method, model, num_speculative_tokens" in message


def test_every_other_setting_of_vllm_is_refused_when_it_does_not_apply(
    speculate: Speculate,
) -> None:
    from vllm.config import SpeculativeConfig

    from layerskip_vllm.config.setting_refusals import KNOWN_KEYS

    # vLLM itself writes these two into the user's dict.
    filled_in = {"target_model_config", "target_parallel_config"}
    others = SpeculativeConfig.__dataclass_fields__.keys() - KNOWN_KEYS - filled_in
    assert {"quantization", "moe_backend", "parallel_drafting", "prompt_lookup_max"} <= others
    assert {"max_model_len", "draft_tensor_parallel_size", "kv_cache_dtype"} <= others
    since_0_33 = {"draft_lm_head_quantization", "disable_lookahead_block_hashes"}
    since_0_33 |= {"xpress_topc", "fly_window_size", "fly_entropy_threshold", "fly_entropy_top_k"}
    assert since_0_33 & others == (set() if version_here() == "0.32.0" else since_0_33)
    for key in sorted(others):
        message = refusal_of(speculate, **{key: "3"})
        assert f"{key} is '3'" in message
        assert "does not apply to layerskip" in message
        assert "leave it out" in message


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("draft_sample_method", "typical", "'greedy' or 'probabilistic'"),
        ("draft_sample_method", 1, "'greedy' or 'probabilistic'"),
        ("use_local_argmax_reduction", "perhaps", "a valid boolean"),
        ("enable_adaptive_verification", "perhaps", "a valid boolean"),
        ("enforce_eager", "perhaps", "a valid boolean"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_shared_setting_is_refused_when_its_value_is_not_one_of_vllm(
    speculate: Speculate, key: str, value: Any, right: str
) -> None:
    message = refusal_of(speculate, **{key: value})
    assert key in message
    assert f"input_value={value!r}" in message
    assert right in message


@pytest.mark.parametrize("method", ["fly", "lenient", 1, ["block"]], ids=repr)
def test_rejection_method_is_refused_when_it_may_change_the_output(
    speculate: Speculate, method: Any
) -> None:
    message = refusal_of(speculate, rejection_sample_method=method)
    assert f"rejection_sample_method is {method!r}" in message
    assert "must be 'standard' or 'block', which keep" in message


@pytest.mark.parametrize(
    "schedule",
    [
        "4",
        {"1": 4},
        [],
        [4],
        [[1, 4]],
        [[1, 4, -2]],
        [[4, 1, 2]],
        [[0, 4, 2]],
        [[2, 4, 2]],
        [[1, 4, 4], [3, 9, 2]],
        [[1, 4, 8]],
        [[1, 4, 0]],
        [[1, 4, "x"]],
        [[1, 4, None]],
    ],
    ids=str,
)
def test_schedule_of_tokens_is_refused_when_it_is_malformed(
    speculate: Speculate, schedule: Any
) -> None:
    message = refusal_of(speculate, num_speculative_tokens_per_batch_size=schedule)
    assert f"num_speculative_tokens_per_batch_size is {schedule!r}" in message
    assert "must be" in message


def test_local_argmax_is_refused_when_the_head_may_have_adapters(speculate: Speculate) -> None:
    settings = {"method": "layerskip", "use_local_argmax_reduction": True}
    message = refusal(speculate, speculative_config=settings, enable_lora=True)
    assert "use_local_argmax_reduction is true and enable_lora is true" in message
    assert "leave one of them out" in message


def test_local_argmax_is_refused_when_drafts_are_sampled(speculate: Speculate) -> None:
    message = refusal_of(
        speculate, use_local_argmax_reduction=True, draft_sample_method="probabilistic"
    )
    assert "use_local_argmax_reduction is true" in message
    assert "draft_sample_method is 'probabilistic'" in message
    assert "use 'greedy' drafts or leave" in message


@pytest.mark.parametrize(
    ("settings", "engine", "other"),
    [
        ({"use_local_argmax_reduction": True}, {}, "use_local_argmax_reduction is True"),
        ({}, {"enable_lora": True}, "enable_lora is True"),
        ({}, {"data_parallel_size": 2}, "data_parallel_size is 2"),
    ],
)
def test_adaptive_verification_is_refused_when_another_setting_cannot_stand_beside(
    speculate: Speculate, settings: dict[str, Any], engine: dict[str, Any], other: str
) -> None:
    adaptive = {"method": "layerskip", "enable_adaptive_verification": True}
    assert speculate(speculative_config=adaptive).enable_adaptive_verification
    message = refusal(speculate, speculative_config={**adaptive, **settings}, **engine)
    assert "enable_adaptive_verification is True" in message
    assert f"{other}; leave one of them out" in message


@pytest.mark.parametrize(
    ("version", "message"),
    [("0", "V1 does not support: adaptive draft"), ("1", "requires full CUDA graphs")],
)
def test_adaptive_verification_is_refused_by_vllm_when_the_engine_cannot_have_it(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, version: str, message: str
) -> None:
    """As on a CPU, where V2 is for tests alone."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", version)
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    config = {"method": "layerskip", "enable_adaptive_verification": True}
    with pytest.raises(ValueError, match=message):
        configure(speculative_config=config, enforce_eager=True)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"rejection_sample_method": "synthetic"},
            ["rejection_sample_method='synthetic'", "requires exactly one of"],
        ),
        (
            {"synthetic_acceptance_rates": [0.5] * 4},
            ["synthetic_acceptance_rates", "only valid with rejection_sample_method='synthetic'"],
        ),
        (
            {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.5] * 3},
            ["must have length 4", "[0.5, 0.5, 0.5]"],
        ),
    ],
    ids=["no rates", "no method", "too few rates"],
)
def test_synthetic_acceptance_is_refused_when_it_is_incomplete(
    speculate: Speculate, settings: dict[str, Any], parts: list[str]
) -> None:
    message = refusal_of(speculate, **settings)
    assert all(part in message for part in parts)


@pytest.mark.parametrize("model", ["other/model", 5])
def test_model_is_refused_when_it_is_not_the_target(speculate: Speculate, model: Any) -> None:
    message = refusal_of(speculate, model=model)
    assert f"model is {model!r}" in message
    assert "leave 'model' out or set it to 'layerskip'" in message


@pytest.mark.parametrize(
    "engine_args",
    [
        {"speculative_config": {"method": "draft_model", "model": "layerskip"}},
        {"spec_method": "draft_model", "spec_model": "layerskip"},
    ],
    ids=["dict", "flags"],
)
def test_method_is_refused_when_only_the_model_is_layerskip(
    speculate: Speculate, engine_args: dict[str, Any]
) -> None:
    message = refusal(speculate, **engine_args)
    assert "method is 'draft_model' and model is 'layerskip'" in message
    assert "give one of them as 'layerskip' and leave the other out" in message


@pytest.mark.parametrize(
    ("engine_args", "parts"),
    [
        ({"speculative_config": "layerskip"}, ["is 'layerskip'", "a dict such as"]),
        ({"speculative_config": {"method": "LayerSkip"}}, ["'LayerSkip'", "write it 'layerskip'"]),
        ({"spec_model": "LAYERSKIP"}, ["'LAYERSKIP'", "write it 'layerskip'"]),
        ({"speculative_config": {"exit_layer": 3}}, ["exit_layer", "add 'method': 'layerskip'"]),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 3,
                    "exit-layer": 3,
                }
            },
            ["exit_layer", "'ngram'", "or leave exit_layer out"],
        ),
        (
            {"speculative_config": {"method": "layerskip", "exit-layer": 3, "exit_layer": 4}},
            ["exit_layer is given twice", "give it once"],
        ),
        ({"speculative_config": {"method": "layerskip", 1: 2}}, ["'1' is not a setting"]),
    ],
    ids=str,
)
def test_speculative_config_is_refused_when_vllm_would_misread_it(
    speculate: Speculate, engine_args: dict[str, Any], parts: list[str]
) -> None:
    message = refusal(speculate, **engine_args)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("flag", "key", "engine_args"),
    [
        ("--spec-method", "method", {"spec_method": "layerskip"}),
        ("--spec-model", "model", {"spec_model": "layerskip"}),
        ("--spec-tokens", "num_speculative_tokens", {"spec_tokens": 3}),
    ],
)
def test_flag_is_refused_when_the_speculative_config_says_the_same(
    speculate: Speculate, flag: str, key: str, engine_args: dict[str, Any]
) -> None:
    config = {"method": "layerskip", "model": "layerskip", "num_speculative_tokens": 3}
    message = refusal(speculate, speculative_config=config, **engine_args)
    assert f"{flag} and --speculative-config[{key!r}] are mutually exclusive" in message


@pytest.mark.parametrize(
    ("engine_args", "expected"),
    [
        ({"speculative_config": {"method": "layerskip"}}, (2, 4)),
        ({"speculative_config": {"model": "layerskip"}}, (2, 4)),
        ({"speculative_config": {"method": "layerskip", "model": "layerskip"}}, (2, 4)),
        ({"speculative_config": {"method": "layerskip", "exit_layer": NUM_LAYERS}}, (8, 4)),
        ({"speculative_config": {"method": "layerskip", "exit-layer": 3}}, (3, 4)),
        ({"speculative_config": {"method": "layerskip", "exit_layer": None}}, (2, 4)),
        (
            {
                "speculative_config": {
                    "method": "layerskip",
                    "exit_layer": 4,
                    "num_speculative_tokens": 6,
                }
            },
            (4, 6),
        ),
        ({"spec_method": "layerskip", "spec_tokens": 3}, (2, 3)),
        ({"spec_model": "layerskip", "speculative_config": {"exit_layer": 3}}, (3, 4)),
    ],
    ids=str,
)
def test_layerskip_is_configured_when_asked_for_in_any_of_vllms_ways(
    speculate: Speculate, engine_args: dict[str, Any], expected: tuple[int, int]
) -> None:
    from layerskip_vllm.config.speculative import LayerSkipConfig

    config = speculate(**engine_args)
    assert isinstance(config, LayerSkipConfig)
    assert (config.exit_layer, config.num_speculative_tokens) == expected


def test_config_is_the_same_when_made_twice_from_the_same_arguments(
    write_model: Callable[..., str],
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    given = {"method": "layerskip", "exit_layer": 3}
    args = EngineArgs(model=write_model(), skip_tokenizer_init=True, speculative_config=given)
    configs = [args.create_engine_config().speculative_config for _ in range(2)]
    assert [config.exit_layer for config in configs] == [3, 3]
    assert [config.exit_layer_source for config in configs] == ["the user", "the user"]
    assert configs[0].num_speculative_tokens_source == "the default"
    assert given == {"method": "layerskip", "exit_layer": 3}


def test_config_reserves_slots_for_drafts_when_an_engine_is_configured(
    configure: Callable[..., Any],
) -> None:
    settings = {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 5}
    vllm_config = configure(speculative_config=settings)
    assert vllm_config.num_lookahead_tokens == 5
    # One token a request a draft step needs no more room in a batch than the target takes.
    assert vllm_config.speculative_config.max_num_new_slots_for_drafting == 0


def test_config_keeps_its_exit_layer_when_sent_to_another_process(speculate: Speculate) -> None:
    config = speculate(speculative_config={"method": "layerskip", "exit_layer": 3})
    received = pickle.loads(pickle.dumps(config))
    assert type(received) is type(config)
    assert (received.exit_layer, received.num_speculative_tokens) == (3, 4)
    assert received.exit_layer_source == "the user"
    assert received.num_speculative_tokens_source == "the default"


def test_configs_are_equal_when_the_same_numbers_come_from_elsewhere(speculate: Speculate) -> None:
    given = speculate(speculative_config={"method": "layerskip", "exit_layer": 2})
    default = speculate(speculative_config={"method": "layerskip"})
    assert (given.exit_layer, given.exit_layer_source) == (2, "the user")
    assert (default.exit_layer, default.exit_layer_source) == (2, "a quarter of the layers")
    assert given == default
    assert given.compute_hash() == default.compute_hash()


@pytest.mark.parametrize("key", ["exit_layer_source", "num_speculative_tokens_source"])
def test_source_is_refused_when_the_user_gives_it(speculate: Speculate, key: str) -> None:
    assert f"{key!r} is not a setting of layerskip" in refusal_of(speculate, **{key: "me"})


def test_compiled_graphs_are_kept_apart_when_exit_layers_differ(speculate: Speculate) -> None:
    hashes = {
        speculate(
            speculative_config={"method": "layerskip", "exit_layer": exit_layer}
        ).compute_hash()
        for exit_layer in (2, 3, 3)
    }
    assert len(hashes) == 2
