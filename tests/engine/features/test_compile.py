"""Stages under torch.compile with inductor, compiled and cached apart from the target."""

from dataclasses import replace

import pytest

from tests.support.checks import assert_same_outputs, assert_some_accepted_some_refused
from tests.support.engine_process import RunnerProcess
from tests.support.scenarios import Request, Scenario, layerskip, tokens

REQUESTS = (
    Request(tokens(20), {"max_tokens": 14}),
    Request(tokens(5), {"max_tokens": 8}),
    Request(tokens(40), {"max_tokens": 6}, joins_at=1),
)


@pytest.mark.feature("Models and weights", "torch.compile", runners=("v1",))
def test_stage_has_graphs_of_its_own_when_compiled(engines, checkpoint, tmp_path):
    """Four layers, E = 2 and E = 1, three starts over one cache on disk.

    A stage that ran the target's graph, from memory or from disk, would have all its drafts
    accepted; one that ran the graph of another E would not have the counts of the eager engine.
    """
    model = str(checkpoint(num_hidden_layers=4))
    eager = {
        exit_layer: Scenario(model, REQUESTS, layerskip(exit_layer, 3)) for exit_layer in (2, 1)
    }
    plain, *expected = engines.serve("v1", eager[2].plain(), eager[2], eager[1])
    expected = dict(zip(eager, expected, strict=True))
    assert expected[1].counts != expected[2].counts

    found = []
    for exit_layer in (2, 2, 1):
        scenario = replace(eager[exit_layer], engine={"enforce_eager": False})
        process = RunnerProcess("v1", tmp_path)
        try:
            compiled = process.run("tests.support.compile_job:serve_compiled", scenario)
        finally:
            process.stop()
        assert_same_outputs(plain, compiled.report)
        assert_some_accepted_some_refused(compiled.report)
        assert compiled.report.counts == expected[exit_layer].counts
        assert compiled.is_compiled == (True, True)
        assert not compiled.is_shared
        found.append(compiled)

    first, again, other = found
    assert first.is_from_disk == (False, False)
    # The stage is loaded where the target is; vLLM on the CPU may fail to load either.
    assert again.is_from_disk[0] == again.is_from_disk[1]
    assert not other.is_from_disk[1]
    assert len({first.paths[0], first.paths[1], other.paths[1]}) == 3
