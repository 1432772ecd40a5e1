"""Runs in a child of `engine_process`: engines with several workers, and what each of them did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vllm import LLM, SamplingParams

from tests.support.child_engines import engine
from tests.support.jobs import lora_requests
from tests.support.scenarios import GREEDY, Scenario
from tests.support.worker_probe import Served


def serve(scenario: Scenario) -> Served:
    """Serve a scenario's requests with a new engine, all at once."""
    probe = {"worker_extension_cls": "tests.support.worker_probe.WorkerProbe"}
    with engine(replace(scenario, engine={**probe, **scenario.engine})) as llm:
        shared_memory = llm.collective_rpc("probe_shared_memory")
        served = _serve(llm, scenario)
    for file in {file for files in shared_memory for file in files}:
        Path(file).unlink(missing_ok=True)
    return served


def _serve(llm: LLM, scenario: Scenario) -> Served:
    if scenario.engine.get("enable_expert_parallel"):
        llm.collective_rpc("probe_add_expert_parallelism")
    if not scenario.speculative:
        return Served(_generate(llm, scenario))
    llm.collective_rpc("probe_record_drafts")
    return Served(
        _generate(llm, scenario),
        _count_drafts(llm),
        llm.collective_rpc("probe_settings"),
        llm.collective_rpc("probe_take_drafts"),
    )


def serve_on_two_nodes(scenario: Scenario) -> Served:
    """Serve a scenario on a Ray cluster of which no node has two GPUs left."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(log_to_driver=False)
    (node_id,) = (node["NodeID"] for node in ray.nodes() if node["Resources"]["GPU"] == 2)
    holder = ray.remote(object).options(
        num_gpus=1, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    )
    actor = holder.remote()
    ray.get(actor.__ray_ready__.remote())
    try:
        return serve(scenario)
    finally:
        ray.kill(actor)
        ray.shutdown()


def _generate(llm: LLM, scenario: Scenario) -> list[list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": list(request.prompt)} for request in scenario.requests],
        [SamplingParams(**{**GREEDY, **request.params}) for request in scenario.requests],
        use_tqdm=False,
        lora_request=lora_requests(scenario.requests),
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def _count_drafts(llm: LLM) -> tuple[int, int, int, tuple[int, ...]]:
    found = {
        metric.name.removeprefix("vllm:spec_decode_num_"): metric
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode_num_")
    }
    return (
        found["drafts"].value,
        found["draft_tokens"].value,
        found["accepted_tokens"].value,
        tuple(found["accepted_tokens_per_pos"].values),
    )


def find_current_platform() -> tuple[str, str]:
    """The class of vLLM's platform in this process, and what Ray's workers are placed on."""
    from vllm.platforms import current_platform

    return type(current_platform).__name__, current_platform.ray_device_key
