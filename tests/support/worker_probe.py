"""Looks into an engine's workers, on all ranks: a `worker_extension_cls` of vLLM's.

Nothing here imports vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Served:
    """What an engine gave and how its workers drafted.

    Attributes:
        token_ids: Of each request.
        counts: Drafts, draft tokens, accepted tokens, accepted tokens by position.
        workers: `WorkerProbe.probe_settings` of each rank; none without speculation.
        drafts: What each rank drafted: for each step, for each request, its tokens.
    """

    token_ids: list[list[int]]
    counts: tuple[int, int, int, tuple[int, ...]] | None = None
    workers: list[Mapping[str, Any]] = field(default_factory=list)
    drafts: list[list[list[list[int]]]] = field(default_factory=list, repr=False)


class WorkerProbe:
    """Methods that vLLM's `collective_rpc` calls by name in each worker."""

    rank: int
    model_runner: Any
    vllm_config: Any

    def probe_settings(self) -> dict[str, Any]:
        """Where this worker is, and what drafts in it with which settings."""
        drafter = _drafter(self.model_runner)
        return {
            "rank": self.rank,
            "pid": os.getpid(),
            "drafter": type(drafter).__name__,
            "exit_layer": drafter.speculative_config.exit_layer,
            "num_speculative_tokens": drafter.speculative_config.num_speculative_tokens,
            "num_attn_layers": len(drafter.model.attn_layer_names),
            "runs_part_of_the_experts": _runs_part_of_the_experts(),
            "num_local_argmax": self.probe_num_local_argmax,
            "num_reused": drafter.verifier.num_steps if drafter.verifier is not None else 0,
            "variables": {k: v for k, v in os.environ.items() if k.startswith("VLLM_LAYERSKIP_")},
            "ray_node": _ray_node(),
        }

    def probe_shared_memory(self) -> list[str]:
        """The files that vLLM's ranks on a CPU talk through, and never remove."""
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sorted({"/" + line.partition(" /")[2] for line in lines if "cpushm" in line})

    def probe_record_drafts(self) -> None:
        """Keep what is drafted from now on."""
        drafter = _drafter(self.model_runner)
        propose, drafts = drafter.propose, []

        def propose_and_record(*args: Any, **kwargs: Any) -> Any:
            result = propose(*args, **kwargs)
            drafts.append(result.tolist())
            return result

        drafter.propose = propose_and_record
        self.probe_drafts = drafts
        self._count_local_argmax(drafter.model)

    def _count_local_argmax(self, model: Any) -> None:
        self.probe_num_local_argmax = 0
        get_top_tokens = getattr(model, "get_top_tokens", None)

        def count(hidden_states: Any) -> Any:
            self.probe_num_local_argmax += 1
            return get_top_tokens(hidden_states)

        if get_top_tokens is not None:
            model.get_top_tokens = count

    def probe_take_drafts(self) -> list[list[list[int]]]:
        """What was drafted: for each step, for each request, its tokens."""
        return self.probe_drafts

    def probe_count_dummy_drafts(self) -> None:
        """Count the drafts of batches without requests from now on.

        V1 has a method for them, V2 tells `propose`.
        """
        drafter = _drafter(self.model_runner)
        name = "dummy_run" if hasattr(drafter, "dummy_run") else "propose"
        run = getattr(drafter, name)
        self.probe_num_dummy_drafts = 0

        def run_and_count(*args: Any, **kwargs: Any) -> Any:
            self.probe_num_dummy_drafts += name == "dummy_run" or kwargs.get("dummy_run", False)
            return run(*args, **kwargs)

        setattr(drafter, name, run_and_count)

    def probe_dummy_drafts(self) -> dict[str, int]:
        """How many such drafts there were."""
        return {"rank": self.rank, "num_dummy_drafts": self.probe_num_dummy_drafts}

    def probe_add_expert_parallelism(self) -> None:
        """Give the CPU expert parallelism; see `cpu_experts`."""
        from tests.support.cpu_experts import add_expert_parallelism

        add_expert_parallelism()


def _drafter(runner: Any) -> Any:
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)


def _runs_part_of_the_experts() -> bool:
    from tests.support import cpu_experts

    return cpu_experts.has_run_a_part


def _ray_node() -> str | None:
    try:
        import ray
    except ImportError:
        return None
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
