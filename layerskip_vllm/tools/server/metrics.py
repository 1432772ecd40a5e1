"""One look at a server's `/metrics`, and what has happened between two of them."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from prometheus_client.parser import text_string_to_metric_families

from layerskip_vllm.tools.server.counters import SpecDecodeCounters, parse_spec_decode_counters

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Sample:
    """A server's metrics at one time, summed over its engines.

    Attributes:
        time_s: When they were read, by a monotonic clock.
        values: Each metric by its name without labels; of a histogram its sum and its count.
        drafting: The counters of speculative decoding.
    """

    time_s: float
    values: Mapping[str, float]
    drafting: SpecDecodeCounters


@dataclass(frozen=True)
class Interval:
    """What a server did between two samples.

    Attributes:
        seconds: How long it lasted.
        tokens_per_s: Output tokens of all requests a second.
        num_running: Requests in the batch at its end.
        num_waiting: Requests in the queue at its end.
        kv_cache_usage: Share of the KV cache in use at its end, the mean over engines.
        time_to_first_token_s: Mean of the requests whose first token came in it; None if none did.
        inter_token_latency_s: Mean time between a request's outputs; None if there were none.
        drafting: What was drafted and accepted in it; None if nothing was drafted.
    """

    seconds: float
    tokens_per_s: float
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    time_to_first_token_s: float | None
    inter_token_latency_s: float | None
    drafting: SpecDecodeCounters | None


def read_sample(url: str) -> Sample:
    """Reads a server's metrics.

    Args:
        url: The server's address, such as `http://127.0.0.1:8000`.

    Returns:
        The sample.

    Raises:
        ValueError: The address is no HTTP address, or the server does no speculative decoding.
        OSError: The server does not answer, or is not ready.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"URL is {url!r}; it must be an address such as http://127.0.0.1:8000.")
    page = url.rstrip("/").removesuffix("/metrics") + "/metrics"
    try:
        with urllib.request.urlopen(page, timeout=TIMEOUT_S) as response:
            text = response.read().decode()
    except (http.client.InvalidURL, UnicodeError) as error:
        raise ValueError(f"URL is {url!r}; {error}.") from error
    except urllib.error.HTTPError as error:
        if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:  # a proxy's, while the server starts
            raise OSError(f"{page} answers {error.code}") from error
        raise ValueError(
            f"URL is {url!r}, but {page} answers {error.code}; it must be a vLLM server's address."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{page} does not answer ({str(error) or repr(error)})") from error
    return parse_sample(text, time.monotonic())


def parse_sample(text: str, time_s: float) -> Sample:
    """Reads the text of `/metrics`; see `read_sample`."""
    values: dict[str, float] = {}
    num_engines = 0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("vllm:") and not sample.name.endswith(
                ("_bucket", "_created")
            ):
                values[sample.name] = values.get(sample.name, 0) + sample.value
                num_engines += sample.name == "vllm:kv_cache_usage_perc"
    values["vllm:kv_cache_usage_perc"] = values.get("vllm:kv_cache_usage_perc", 0) / max(
        1, num_engines
    )
    return Sample(time_s, values, parse_spec_decode_counters(text))


def is_restarted(earlier: Sample, later: Sample) -> bool:
    """Tells whether the server has started anew: its counters went back, or K is another."""
    name = "vllm:generation_tokens_total"
    before, after = earlier.drafting, later.drafting
    return (
        later.values.get(name, 0) < earlier.values.get(name, 0)
        or after.num_drafts < before.num_drafts
        or len(after.num_accepted_tokens_per_pos) != len(before.num_accepted_tokens_per_pos)
    )


def compare(earlier: Sample, later: Sample) -> Interval:
    """Returns what happened between two samples of one server that did not start anew."""

    def grown(name: str) -> float:
        return later.values.get(name, 0) - earlier.values.get(name, 0)

    def mean(name: str) -> float | None:
        count = grown(f"{name}_count")
        return grown(f"{name}_sum") / count if count else None

    seconds = later.time_s - earlier.time_s
    drafting = later.drafting - earlier.drafting
    return Interval(
        seconds=seconds,
        tokens_per_s=grown("vllm:generation_tokens_total") / seconds,
        num_running=int(later.values.get("vllm:num_requests_running", 0)),
        num_waiting=int(later.values.get("vllm:num_requests_waiting", 0)),
        kv_cache_usage=later.values["vllm:kv_cache_usage_perc"],
        time_to_first_token_s=mean("vllm:time_to_first_token_seconds"),
        inter_token_latency_s=mean("vllm:inter_token_latency_seconds"),
        drafting=drafting if drafting.num_drafts else None,
    )
