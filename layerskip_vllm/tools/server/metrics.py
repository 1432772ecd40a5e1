"""What a server's `/metrics` or an engine's registry says of vLLM, and between two looks."""

from __future__ import annotations

import http.client
import itertools
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Self

from prometheus_client import REGISTRY, Metric
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

TIMEOUT_S = 5.0
_SPEC_DECODE = "vllm:spec_decode_"
_KV_CACHE_USAGE = "vllm:kv_cache_usage_perc"


@dataclass(frozen=True)
class SpecDecodeCounters:
    """How much was drafted and accepted, summed over engines; vLLM's names, without its prefix."""

    num_drafts: int = 0  # how often a request was given a draft
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: tuple[int, ...] = ()  # the first position at 0

    @classmethod
    def read(cls, metrics: Iterable[Metric], engine: int | None = None) -> Self:
        """Read what all engines or one counted since their start; 0 where nothing drafts."""
        counts: dict[str, int] = {}
        by_position: dict[int, int] = {}
        for sample in (sample for metric in metrics for sample in metric.samples):
            name = sample.name.removeprefix(_SPEC_DECODE).removesuffix("_total")
            if sample.name != f"{_SPEC_DECODE}{name}_total":
                continue
            if engine is not None and sample.labels["engine"] != str(engine):
                continue
            if "position" in sample.labels:
                position = int(sample.labels["position"])
                by_position[position] = by_position.get(position, 0) + int(sample.value)
            else:
                counts[name] = counts.get(name, 0) + int(sample.value)
        positions = tuple(by_position[position] for position in sorted(by_position))
        return cls(**counts, num_accepted_tokens_per_pos=positions)

    @classmethod
    def read_own(cls) -> Self:
        """Read the counters of the engines that this process has made with statistics on."""
        return cls.read(REGISTRY.collect())

    def __sub__(self, earlier: SpecDecodeCounters) -> SpecDecodeCounters:
        """Return what was counted since `earlier`."""
        by_position = itertools.zip_longest(
            self.num_accepted_tokens_per_pos, earlier.num_accepted_tokens_per_pos, fillvalue=0
        )
        return SpecDecodeCounters(
            self.num_drafts - earlier.num_drafts,
            self.num_draft_tokens - earlier.num_draft_tokens,
            self.num_accepted_tokens - earlier.num_accepted_tokens,
            tuple(now - before for now, before in by_position),
        )

    @property
    def acceptance_rate(self) -> float:
        """The share of drafted tokens that was accepted, 0 to 1; 0 where nothing was drafted.

        vLLM takes drafts that a grammar does not allow off the count of drafts, which may leave
        none, and without the plugin's fix fewer than were accepted.
        """
        return self.num_accepted_tokens / max(1, self.num_draft_tokens, self.num_accepted_tokens)

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """The share of drafts accepted up to and including each position, 0 to 1."""
        num_drafts = max(1, self.num_drafts)
        return tuple(accepted / num_drafts for accepted in self.num_accepted_tokens_per_pos)

    @property
    def mean_acceptance_length(self) -> float:
        """Mean tokens that a verification yields: the accepted ones and the target's own."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)


class LayerSkipInfo(BaseModel, frozen=True):
    """What a server drafts with, the labels of its gauge `vllm:layerskip_info`."""

    exit_layer: int  # E
    exit_layer_source: str
    num_speculative_tokens: int  # K
    num_speculative_tokens_source: str
    is_length_auto: bool = False  # whether a step drafts as many as pay, K at most
    num_layers: int  # all of the target's
    exit_adapter: str  # its folder; empty without one
    draft_vocab_size: int  # how many tokens drafts choose among
    lookup: str  # "auto" where drafts are copied from text that repeats, else "off"
    reuse_exit_states: str  # "off", or where verification may begin at the exit, "auto" or "on"

    @classmethod
    def read(cls, metrics: Iterable[Metric]) -> Self | None:
        """Read it from a server's `/metrics`; None where nothing drafts with layerskip."""
        samples = (sample for metric in metrics for sample in metric.samples)
        labels = (sample.labels for sample in samples if sample.name == "vllm:layerskip_info")
        return next(map(cls.model_validate, labels), None)


@dataclass(frozen=True)
class Sample:
    """A server's metrics at one time, summed over its engines."""

    time_s: float  # when they were read, by a monotonic clock
    values: Mapping[str, float]  # by name without labels; of a histogram sum and count
    drafting: SpecDecodeCounters
    info: LayerSkipInfo | None = None  # what it drafts with, where it says so

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return int(self.values.get("vllm:num_requests_running", 0))

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return int(self.values.get("vllm:num_requests_waiting", 0))

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache in use, the mean over engines."""
        return self.values[_KV_CACHE_USAGE]


@dataclass(frozen=True)
class Interval:
    """What a server did between two samples."""

    seconds: float
    tokens_per_s: float  # output tokens of all requests
    time_to_first_token_s: float | None  # the mean; None if no request's first token came in it
    inter_token_latency_s: float | None  # the mean; None if there were no outputs
    drafting: SpecDecodeCounters | None  # None if nothing was drafted
    end: Sample


def read_sample(url: str) -> Sample:
    """Read the metrics of the server at an address such as `http://127.0.0.1:8000`.

    A ValueError says that this is no HTTP address, or that the server does no speculative decoding;
    an OSError that it does not answer, or is not ready.
    """
    check_url(url)
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


def check_url(url: str) -> None:
    """Raise a ValueError if a server's address is no HTTP address."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"URL is {url!r}; it must be an address such as http://127.0.0.1:8000.")


def parse_sample(text: str, time_s: float) -> Sample:
    """Read the text of `/metrics`; see `read_sample`."""
    metrics = list(text_string_to_metric_families(text))
    values: dict[str, float] = {}
    num_engines = 0
    for sample in (sample for metric in metrics for sample in metric.samples):
        if sample.name.startswith("vllm:") and not sample.name.endswith(("_bucket", "_created")):
            values[sample.name] = values.get(sample.name, 0) + sample.value
            num_engines += sample.name == _KV_CACHE_USAGE
    if f"{_SPEC_DECODE}num_drafts_total" not in values:
        raise ValueError(
            f"/metrics has no {_SPEC_DECODE}num_drafts_total: this server does no speculative "
            "decoding. Was it started with --speculative-model=layerskip, and the plugin loaded?"
        )
    values[_KV_CACHE_USAGE] = values.get(_KV_CACHE_USAGE, 0) / max(1, num_engines)
    return Sample(time_s, values, SpecDecodeCounters.read(metrics), LayerSkipInfo.read(metrics))


def is_restarted(earlier: Sample, later: Sample) -> bool:
    """Tell whether the server has started anew: its counters went back, or K is another."""
    name = "vllm:generation_tokens_total"
    before, after = earlier.drafting, later.drafting
    return (
        later.values.get(name, 0) < earlier.values.get(name, 0)
        or after.num_drafts < before.num_drafts
        or len(after.num_accepted_tokens_per_pos) != len(before.num_accepted_tokens_per_pos)
    )


def measure_interval(earlier: Sample, later: Sample) -> Interval:
    """Return what happened between two samples of one server that did not start anew."""

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
        time_to_first_token_s=mean("vllm:time_to_first_token_seconds"),
        inter_token_latency_s=mean("vllm:inter_token_latency_seconds"),
        drafting=drafting if drafting.num_drafts else None,
        end=later,
    )
