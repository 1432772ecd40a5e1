"""`layerskip-vllm soak` on a real server: each kind of traffic leaves it as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerskip_vllm.tools.commands import main
from tests.e2e.serving.server import ModelServer

pytestmark = pytest.mark.timeout(1800)

MINUTES = 3


def soak(server: ModelServer, folder: Path, *options: str) -> dict[str, Any]:
    """Run the command, which must find nothing: its report."""
    file = folder / "report.json"
    status = main(["soak", server.url, f"--output={file}", *options])
    report = json.loads(file.read_text())
    assert report["faults"] == []
    assert [check for check in report["checks"] if not check["is_passed"]] == []
    assert status == 0
    return report


def num_preempted(report: dict[str, Any]) -> float:
    looks = report["looks"]
    return looks[-1]["num_preemptions"] - looks[0]["num_preemptions"]


def test_server_answers_alike_when_its_kv_cache_is_full(
    server: ModelServer, reference: Path, tmp_path: Path
) -> None:
    report = soak(
        server,
        tmp_path,
        f"--reference={reference}",
        "--kinds=question",
        "--concurrency=64",
        "--requests=300",
    )
    assert report["total"]["answered"] == report["total"]["sent"]
    assert num_preempted(report) > 0  # which vLLM does when there is no block left


def test_server_frees_everything_when_all_clients_leave(
    server: ModelServer, reference: Path, tmp_path: Path
) -> None:
    kinds = ["--kinds", "cancelled stream", "cancelled", "cancelled samples"]
    report = soak(
        server, tmp_path, f"--reference={reference}", *kinds, "--concurrency=48", "--requests=400"
    )
    assert report["total"]["cancelled"] > 300


def test_server_refuses_each_when_10_000_requests_are_malformed(
    server: ModelServer, reference: Path, tmp_path: Path
) -> None:
    report = soak(server, tmp_path, "--kinds=malformed", "--requests=10000", "--minutes=10")
    assert report["total"]["refused"] == report["total"]["sent"] >= 10_000
    after = soak(server, tmp_path, f"--reference={reference}", "--kinds=question", "--requests=50")
    assert after["total"]["answered"] == after["total"]["sent"]


# The last, on a server that is warm: its memory must be flat.
def test_server_holds_when_traffic_is_mixed_for_minutes(
    server: ModelServer, reference: Path, tmp_path: Path
) -> None:
    report = soak(
        server,
        tmp_path,
        f"--reference={reference}",
        f"--minutes={MINUTES}",
        f"--pid={server.pid}",
    )
    total = report["total"]
    assert min(total[end] for end in ("answered", "refused", "cancelled")) > 0
    assert total["tokens_compared"] > 1000
    assert report["requests"].keys() >= {"short", "long prompt", "sampled", "malformed", "chat"}
