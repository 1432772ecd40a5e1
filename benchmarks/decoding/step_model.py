"""What steps of decoding take, on paper: bytes read, operations, launches and all-reduces.

Plain Python; nothing is run. `benchmarks.decoding.scale_on_paper` holds it against what was
measured, and asks it about what was not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.decoding.weight_counts import WeightCounts, count_weights

# Of a device's memory, what weights and KV cache may take: vLLM's default.
MEMORY_SHARE = 0.92
BYTES_PER_VALUE = 2  # weights, keys and values: bfloat16


@dataclass(frozen=True)
class Device:
    """What steps run on. Rates are those that are reached, not the maker's.

    Attributes:
        name: Its name.
        bytes_per_s: Memory bandwidth.
        flops_per_s: Operations of matrix products; a product and a sum are two.
        memory_bytes: Of one device; infinite where it is of no interest.
        layer_s: What a layer costs besides its weights: the kernels between the products, and
            launches where these are not hidden.
        step_s: What a step of the target costs besides: the host's work that the device waits for,
            sampling.
        draft_step_s: What a draft step costs besides: slots, metadata, the choice of a token.
        all_reduce_s: An all-reduce of next to nothing among the devices of a tensor-parallel group.
        link_bytes_per_s: What a device sends to the others while it receives as much.
        overlap_power: How reading and computing go together. 1 is one after the other, a very large
            one the roofline, where the longer hides the shorter; between them the knee is round.
    """

    name: str
    bytes_per_s: float
    flops_per_s: float
    memory_bytes: float = float("inf")
    layer_s: float = 0.0
    step_s: float = 0.0
    draft_step_s: float = 0.0
    all_reduce_s: float = 0.0
    link_bytes_per_s: float = float("inf")
    overlap_power: float = 1.0

    def seconds(self, num_bytes: float, num_flops: float) -> float:
        """Return what it takes to read so much and to compute so much with it."""
        reading, computing = num_bytes / self.bytes_per_s, num_flops / self.flops_per_s
        power = self.overlap_power
        return float((reading**power + computing**power) ** (1 / power))


@dataclass(frozen=True)
class Drafting:
    """How drafts are made.

    Attributes:
        exit_layer: E, the number of layers that draft.
        head_share: Share of the head's rows that drafts choose among (`draft_vocab`).
        reuses_exit_states: Whether a verification runs the first E layers for each request's last
            draft alone (`reuse_exit_states`).
        has_own_cache: Whether the layers that draft are a model of their own, as vLLM's
            `draft_model` is: its first step runs the last verification's tokens again.
    """

    exit_layer: int
    head_share: float = 1.0
    reuses_exit_states: bool = False
    has_own_cache: bool = False


@dataclass(frozen=True)
class StepModel:
    """The steps of a Llama-architecture model on one device, or divided over several.

    Attributes:
        config: The model's `config.json`.
        device: What each rank runs on.
        num_ranks: Tensor-parallel size.
    """

    config: Mapping[str, Any]
    device: Device
    num_ranks: int = 1

    @property
    def counts(self) -> WeightCounts:
        """The model's weights, counted."""
        return count_weights(self.config)

    @property
    def _num_heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def _head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self._num_heads)

    @property
    def _num_kv_values(self) -> float:
        """Keys and values of one token in one layer, on one rank, which has one head at least."""
        num_kv_heads = self.config.get("num_key_value_heads") or self._num_heads
        return float(2 * max(1, num_kv_heads / self.num_ranks) * self._head_dim)

    def fits(self, batch_size: int, context: int) -> bool:
        """Return whether weights and KV cache fit into the devices' memory."""
        values = self.counts.total / self.num_ranks
        values += batch_size * context * self.counts.num_layers * self._num_kv_values
        return values * BYTES_PER_VALUE <= MEMORY_SHARE * self.device.memory_bytes

    def layers_s(self, num_layers: int, batch_size: int, context: int, rows: float) -> float:
        """Return what layers take.

        Args:
            num_layers: How many.
            batch_size: Requests.
            context: Tokens of each, whose keys and values are read once a request.
            rows: Tokens that run of each.

        Returns:
            Seconds.
        """
        weights = self.counts.layer / self.num_ranks
        products = self.device.seconds(BYTES_PER_VALUE * weights, 2 * weights * batch_size * rows)
        num_keys = batch_size * context
        # Each token's products with all keys, and then with all values.
        num_products = 2 * num_keys * rows * self._num_heads * self._head_dim / self.num_ranks
        attention = self.device.seconds(
            BYTES_PER_VALUE * num_keys * self._num_kv_values, 2 * num_products
        )
        reduced = 2 * self._all_reduce_s(batch_size * rows)  # after attention and after the MLP
        return num_layers * (products + attention + reduced + self.device.layer_s)

    def head_s(self, rows: float, share: float = 1.0) -> float:
        """Return what the head, or a share of it, takes for so many tokens in all."""
        weights = share * self.counts.head / self.num_ranks
        # Its logits are gathered, and the embedding's rows were added up.
        gathered = 2 * self._all_reduce_s(rows)
        return self.device.seconds(BYTES_PER_VALUE * weights, 2 * weights * rows) + gathered

    def _all_reduce_s(self, rows: float) -> float:
        if self.num_ranks == 1:
            return 0.0
        sent = (
            2 * (1 - 1 / self.num_ranks) * rows * int(self.config["hidden_size"]) * BYTES_PER_VALUE
        )
        return self.device.all_reduce_s + sent / self.device.link_bytes_per_s

    def target_s(self, batch_size: int, context: int, num_drafts: float = 0.0) -> float:
        """Return what a step of the target takes: a plain one, or one that verifies drafts."""
        rows = num_drafts + 1
        layers = self.layers_s(self.counts.num_layers, batch_size, context, rows)
        return self.device.step_s + layers + self.head_s(batch_size * rows)

    def round_s(
        self, batch_size: int, context: int, drafting: Drafting, num_drafts: float
    ) -> float:
        """Return what drafts and their verification take; without drafts, a plain step.

        Args:
            batch_size: Requests.
            context: Tokens of each.
            drafting: How drafts are made.
            num_drafts: K; the mean where it differs.

        Returns:
            Seconds.
        """
        if num_drafts == 0:
            return self.target_s(batch_size, context)
        first, size = drafting.exit_layer, (batch_size, context)
        draft = self.device.draft_step_s + self.layers_s(first, *size, 1)
        draft += self.head_s(batch_size, drafting.head_share)
        seconds = num_drafts * draft + self.target_s(*size, num_drafts)
        if drafting.has_own_cache:
            # The K + 1 tokens that were verified and the one that was sampled, in the place of one.
            again = self.layers_s(first, *size, num_drafts + 2)
            seconds += again - self.layers_s(first, *size, 1)
        if drafting.reuses_exit_states:
            saved = self.layers_s(first, *size, num_drafts + 1)
            seconds -= saved - self.layers_s(first, *size, 1)
        return seconds

    def speed(
        self,
        batch_size: int,
        context: int,
        drafting: Drafting,
        num_drafts: int,
        acceptance: float,
    ) -> float:
        """Return tokens a second of the batch, each draft accepted at the same rate.

        Args:
            batch_size: Requests.
            context: Tokens of each.
            drafting: How drafts are made.
            num_drafts: K, or 0 for plain decoding.
            acceptance: The chance of a draft, where all before it were accepted.

        Returns:
            Tokens a second.
        """
        tokens = batch_size * expected_tokens(acceptance, num_drafts)
        return tokens / self.round_s(batch_size, context, drafting, num_drafts)


def expected_tokens(acceptance: float, num_drafts: int) -> float:
    """Return what a verification yields: 1 + a + a^2 .. + a^K, as `DraftLengths` counts."""
    return sum(acceptance**position for position in range(num_drafts + 1))
