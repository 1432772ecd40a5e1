"""Runs in a child of `engine_process`: the target's weights change while its engine runs."""

from __future__ import annotations

import copy

import torch

from tests.support.child_engines import engine
from tests.support.jobs import Server
from tests.support.scenarios import Report, Scenario


def serve_with_new_weights(scenario: Scenario, change: str) -> Report:
    """Serve a scenario whose second phase begins with changed weights.

    Args:
        scenario: Its second phase starts after the change.
        change: "weights" to change parameters where they are, "module" to put a changed copy of a
            layer in the place of the old, as adapters do.
    """
    with engine(scenario) as llm:
        server = Server(llm, scenario)
        runner = server.core.model_executor.driver_worker.worker.model_runner
        server.run_phase(0)
        _change(runner.model.model.layers, change)
        server.run_phase(1)
        return server.report()


def serve_with_reload(scenario: Scenario, path: str) -> tuple[Report, Report]:
    """Serve a scenario and load another checkpoint's weights in place after its first phase.

    Args:
        scenario: Its second phase starts after the reload.
        path: The other checkpoint.

    Returns:
        What there was to report before the reload, and at the end.
    """
    with engine(scenario) as llm:
        server = Server(llm, scenario)
        server.run_phase(0)
        before = server.report()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        server.run_phase(1)
        return before, server.report()


def serve_with_new_head(scenario: Scenario, way: str) -> Report:
    """Serve a scenario whose second phase begins with another head, given in one of vLLM's ways.

    Args:
        scenario: Its second phase starts after the change.
        way: "in place", by names and shapes of the model's own, or "load_weights", as trainers
            that share the engine's process do.
    """
    with engine(scenario) as llm:
        server = Server(llm, scenario)
        runner = server.core.model_executor.driver_worker.worker.model_runner
        server.run_phase(0)
        generator = torch.Generator().manual_seed(7)
        head = 0.2 * torch.randn(runner.model.lm_head.weight.shape, generator=generator)
        weights = [("lm_head.weight", head)]
        if way == "in place":
            settings = {"weights_iterator": weights, "is_checkpoint_format": False}
            llm.collective_rpc("reload_weights", kwargs=settings)
        else:
            runner.model.load_weights(weights)
        lm_head = runner.model.lm_head
        lm_head.quant_method.process_weights_after_loading(lm_head)  # its packed copy on CPUs
        server.run_phase(1)
        return server.report()


@torch.inference_mode()
def _change(layers: torch.nn.ModuleList, change: str) -> None:
    generator = torch.Generator().manual_seed(7)
    for index in (0, 3):
        layer = layers[index]
        if change == "module":
            norm = copy.deepcopy(layer.input_layernorm)
            layer.input_layernorm = norm
        noise = torch.rand(layer.input_layernorm.weight.shape, generator=generator)
        layer.input_layernorm.weight.copy_(2 * noise)
