"""What the tests of reliability share: servers of the embedded checkpoint with a small KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from layerskip_vllm.tools.commands import main
from tests.e2e.serving.server import ModelServer

MODEL = "checkpoints/stdlib-24l"
# 85 blocks of 32 tokens: less than 16 requests need, so that some are preempted.
FLAGS = [
    "--dtype=float32",
    "--enforce-eager",
    "--max-num-seqs=16",
    "--block-size=32",
    "--kv-cache-memory-bytes=33554432",
    "--disable-uvicorn-access-log",
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain vLLM's answers."""
    folder = tmp_path_factory.mktemp("plain")
    with ModelServer(folder, MODEL, flags=FLAGS) as plain:
        assert main(["soak", plain.url, "--record", str(folder / "answers.json")]) == 0
    return folder / "answers.json"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """A server that drafts."""
    folder = tmp_path_factory.mktemp("server")
    with ModelServer(folder, MODEL, "--speculative-model=layerskip", flags=FLAGS) as server:
        yield server
