"""The table of `make check-gpu`, small and on whatever there is: that its command runs."""

import json

import pytest

from benchmarks.decoding import speedup

pytestmark = pytest.mark.gpu


def test_table_has_all_loads_when_no_checkpoint_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(speedup, "LOG_FOLDER", tmp_path / "logs")
    output = tmp_path / "speedup.json"
    arguments = ["--preset", "tiny", "--dummy-weights", "--enforce-eager", "--repeats", "1"]
    arguments += ["--batch-sizes", "1", "2", "--num-long-prompt-tokens", "130", "--max-tokens", "8"]
    arguments += ["--systems", "plain", "layerskip", "--output", str(output)]
    assert speedup.main([*arguments, "--checkpoints", str(tmp_path)]) == 0
    content = json.loads(output.read_text())
    loads = [(1, 16), (2, 16), (1, 130)]
    assert [tuple(line["load"].values()) for line in content["summary"][::2]] == loads
    assert all(line["tokens_per_s"] > 0 for line in content["summary"])
    drafted = [line for line in content["summary"] if line["system"] == "layerskip"]
    assert all(line["accepted"] is not None for line in drafted)
    assert {facts["peak_memory_bytes"] > 0 for facts in content["engines"].values()} == {True}
