"""What a request may ask for, checked in the process that it enters by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from layerskip_vllm.config.request import check_request, max_num_drafts

K = 4


@pytest.fixture(scope="module")
def check(speculate: Callable[..., Any]) -> Callable[..., int | None]:
    """Check a request with an entry for layerskip; returns how many tokens it drafts at most."""
    from vllm.sampling_params import SamplingParams

    config = speculate(speculative_config={"method": "layerskip", "num_speculative_tokens": K})

    def check(**extra_args: Any) -> int | None:
        params = SamplingParams(extra_args=extra_args or None)
        check_request(params, config)
        return max_num_drafts(params)

    return check


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        *(({"num_speculative_tokens": number}, number) for number in range(K + 1)),
        *((f'{{"num_speculative_tokens": {number}}}', number) for number in (0, K)),
        ({}, None),
        ("{}", None),
    ],
)
def test_request_has_a_limit_when_it_gives_one(check, entry, expected):
    assert check(layerskip=entry) == expected


def test_request_has_no_limit_when_its_arguments_are_for_others(check):
    assert check() is None
    assert check(num_speculative_tokens=9, other={"layerskip": 9}) is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        *(
            (
                {"num_speculative_tokens": value},
                rf"\['num_speculative_tokens'\] is {value!r}; it must be an integer from 0, which "
                "turns drafting off, to 4, the engine's num_speculative_tokens",
            )
            for value in (-1, K + 1, 2**63, 2.0, True, False, "2", None)
        ),
        ({"num_speculative_tokens": 1, "k": 1}, "has 'k'; 'num_speculative_tokens' is all"),
        ({1: 2}, "has 1; 'num_speculative_tokens' is all"),
        *((value, r"is .*; it must be a dict such as") for value in (2, None, True, "2", "", "x")),
        ("[" * 100_000, "it must be a dict such as"),
        ('{"num_speculative_tokens": true}', "is True; it must be an integer from 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_request_is_refused_when_its_entry_is_wrong(check, entry, message):
    with pytest.raises(ValueError, match=message) as error:
        check(layerskip=entry)
    assert str(error.value).startswith("extra_args['layerskip']")


@pytest.mark.parametrize(
    "entry",
    [
        *("off", -1, 2.5, None, True, b"2", [2], "[" * 100_000),
        *({"num_speculative_tokens": value} for value in ("2", -1, 2.5, None, True, [2], {})),
        '{"num_speculative_tokens": 1e3}',
    ],
    ids=lambda value: str(value)[:30],
)
def test_request_has_no_limit_when_its_entry_is_wrong_and_unchecked(entry):
    """In the engine core, where an error would end all requests."""
    from vllm.sampling_params import SamplingParams

    assert max_num_drafts(SamplingParams(extra_args={"layerskip": entry})) is None


def test_request_is_refused_when_the_engine_drafts_otherwise(speculate):
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(extra_args={"layerskip": {"num_speculative_tokens": 1}})
    ngram = speculate(speculative_config={"method": "ngram", "num_speculative_tokens": 2})
    for config in (None, ngram):
        with pytest.raises(ValueError, match="this engine does not draft with layerskip; leave it"):
            check_request(params, config)
