"""Runs in a child of `engine_process`: Model Runner V1 with a verification that refuses nothing."""

from __future__ import annotations

from unittest import mock

from layerskip_vllm.tools.verify.engine_run import accept_all
from tests.support.jobs import serve_alone
from tests.support.scenarios import Report, Scenario


def serve_unverified(scenario: Scenario) -> Report:
    """Serve a scenario with a new engine that accepts every draft."""
    with mock.patch("vllm.v1.sample.rejection_sampler.rejection_sample", accept_all):
        return serve_alone(scenario)
