"""`num_speculative_tokens: "auto"`: how it is asked for, said again, and refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Speculate = Callable[..., Any]


def layerskip(length: Any, **settings: Any) -> dict[str, Any]:
    return {"method": "layerskip", "num_speculative_tokens": length, **settings}


@pytest.mark.parametrize(("length", "most"), [("auto", 8), ("auto:3", 3), ("auto:20", 20)])
def test_length_is_left_to_the_engine_when_it_is_auto(
    speculate: Speculate, length: str, most: int
) -> None:
    config = speculate(speculative_config=layerskip(length))
    assert config.is_length_auto
    assert config.num_speculative_tokens == most
    assert config.num_speculative_tokens_source == "the user"
    assert f"num_speculative_tokens=auto, up to {most}" in repr(config)


def test_length_is_a_number_when_it_is_not_auto(speculate: Speculate) -> None:
    config = speculate(speculative_config=layerskip(5))
    assert not config.is_length_auto
    assert "num_speculative_tokens=5)" in repr(config)


@pytest.mark.parametrize(("own", "most"), [(3, 8), (12, 12)])
def test_most_is_the_checkpoints_own_when_that_is_more(
    configure: Callable[..., Any], own: int, most: int
) -> None:
    entries = {"layerskip": {"exit_layer": 2, "num_speculative_tokens": own}}
    config = configure(entries=entries, speculative_config=layerskip("auto")).speculative_config
    assert config.num_speculative_tokens == most


def test_most_fits_the_context_when_that_is_short(configure: Callable[..., Any]) -> None:
    config = configure(max_model_len=5, speculative_config=layerskip("auto")).speculative_config
    assert config.num_speculative_tokens == 4


@pytest.mark.parametrize("length", ["auto:", "auto:0", "auto:-1", "auto:x", "automatic", "AUTO"])
def test_length_is_refused_when_it_is_no_right_auto(speculate: Speculate, length: str) -> None:
    with pytest.raises(ValueError, match=rf"num_speculative_tokens is '{length}'; .*'auto:8'"):
        speculate(speculative_config=layerskip(length))


def test_most_is_refused_when_vllm_cannot_verify_it(speculate: Speculate) -> None:
    with pytest.raises(ValueError, match=r"num_speculative_tokens is 129 .* at most 128"):
        speculate(speculative_config=layerskip("auto:129"))


@pytest.mark.parametrize(
    ("other", "value"),
    [
        ("num_speculative_tokens_per_batch_size", [[1, 8, 2]]),
        ("enable_adaptive_verification", True),
    ],
)
def test_auto_is_refused_when_something_else_says_how_much_is_drafted(
    speculate: Speculate, other: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"'auto' and {other} is .*; leave one of them out"):
        speculate(speculative_config=layerskip("auto", **{other: value}))


@pytest.mark.parametrize("settings", [{"method": "ngram"}, {}])
def test_auto_is_refused_when_another_method_drafts(
    speculate: Speculate, settings: dict[str, Any]
) -> None:
    settings = {**settings, "num_speculative_tokens": "auto"}
    with pytest.raises(ValueError, match="num_speculative_tokens is 'auto', which layerskip alone"):
        speculate(speculative_config=settings)
    with pytest.raises(ValueError, match="num_speculative_tokens is 'auto', which layerskip alone"):
        speculate(spec_method="ngram", spec_tokens="auto")


def test_auto_is_refused_when_ranks_must_draft_alike() -> None:
    """Data-parallel ranks of experts run each draft step together."""
    from types import SimpleNamespace

    from layerskip_vllm.config.engine_refusals import check_auto_length

    parallel: Any = SimpleNamespace(data_parallel_size=2, distributed_executor_backend="mp")
    dense: Any = SimpleNamespace(is_moe=False)
    experts: Any = SimpleNamespace(is_moe=True)
    settings = {"num_speculative_tokens": "auto:4"}
    check_auto_length(settings, parallel, dense)
    single: Any = SimpleNamespace(data_parallel_size=1, distributed_executor_backend="mp")
    check_auto_length(settings, single, experts)
    with pytest.raises(ValueError, match=r"'auto:4' and data_parallel_size is 2, .* give a number"):
        check_auto_length(settings, parallel, experts)


def test_auto_is_refused_when_each_rank_has_a_scheduler_of_its_own() -> None:
    from types import SimpleNamespace

    from layerskip_vllm.config.engine_refusals import check_auto_length

    model: Any = SimpleNamespace(is_moe=False)
    settings = {"num_speculative_tokens": "auto"}
    for world_size in (1, 2):
        parallel: Any = SimpleNamespace(
            data_parallel_size=1,
            distributed_executor_backend="external_launcher",
            world_size=world_size,
        )
        if world_size == 1:
            check_auto_length(settings, parallel, model)
            continue
        with pytest.raises(ValueError, match=r"executor_backend is 'external_launcher'.* a number"):
            check_auto_length(settings, parallel, model)
