"""Servers under `vllm bench serve`, vLLM's own client: plain, and each way of drafting, in turns.

`benchmarks.bench` calls it. The client asks for completions of held-out code, and of its random
tokens.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.vllm_command import (
    LAYERSKIP,
    PLAIN,
    SERVED_MODEL_NAME,
    build_commands,
    build_env,
    resolve_vllm,
)
from layerskip_vllm.tools.float32 import float32_env
from layerskip_vllm.tools.hardware import list_gpu_names
from layerskip_vllm.tools.prompts import held_out_prompts
from layerskip_vllm.tools.server.process import Server

MAX_TOKENS = 96
NUM_RANDOM_TOKENS = 64
# What is kept of a result: vLLM's names.
FIELDS = (
    *("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms"),
    *("spec_decode_acceptance_rate", "spec_decode_acceptance_length"),
)


@dataclass(frozen=True)
class Served:
    """What one server did for so many clients.

    Attributes:
        system: The server.
        dataset: What it was asked, `vllm bench serve`'s name.
        num_clients: Requests at once.
        result: vLLM's figures.
    """

    system: str
    dataset: str
    num_clients: int
    result: Mapping[str, Any]


def bench_servers(
    model: str, dtype: str, systems: Mapping[str, Sequence[str]], clients: Sequence[int], out: Path
) -> list[Served]:
    """Start all servers, ask them in turn, and stop them.

    Args:
        model: A checkpoint's folder.
        dtype: Of all servers.
        systems: More flags of each server, by name; of `PLAIN` none are taken.
        clients: How many requests at once, one after the other.
        out: Folder of logs and of what the client writes.

    Returns:
        What came out.
    """
    out.mkdir(parents=True, exist_ok=True)
    prompts = out / "prompts.jsonl"
    num_prompts = max(_count_prompts(num) for num in clients)
    lines = (json.dumps({"prompt": text}) for text in held_out_prompts(num_prompts))
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    datasets = {
        "custom": [
            *("--dataset-path", str(prompts), "--custom-output-len", str(MAX_TOKENS)),
            "--skip-chat-template",
        ],
        "random": [
            *("--random-input-len", str(NUM_RANDOM_TOKENS)),
            *("--random-output-len", str(MAX_TOKENS)),
        ],
    }
    with ExitStack() as stack:
        servers = {name: _make_server(name, model, dtype, systems[name], out) for name in systems}
        for server in servers.values():
            stack.callback(server.stop)
            server.start()
        for server in servers.values():
            server.wait_until_up()
        results = []
        for dataset, words in datasets.items():
            for num_clients in clients:
                for name, server in servers.items():
                    result = _ask(server, model, dataset, words, num_clients, out)
                    results.append(Served(name, dataset, num_clients, result))
    return results


def _count_prompts(num_clients: int) -> int:
    return max(16, 2 * num_clients)


def _make_server(name: str, model: str, dtype: str, flags: Sequence[str], out: Path) -> Server:
    kind = PLAIN if name == PLAIN else LAYERSKIP
    # So that no prompt is cached from a run with fewer clients.
    flags = ["--no-enable-prefix-caching", *(flags if kind == LAYERSKIP else ())]
    command = build_commands(model, dtype, vllm_args=flags)[kind]
    env = build_env(kind, model, is_gpu=bool(list_gpu_names())) | float32_env(dtype)
    return Server(name, resolve_vllm(command), out / f"{name}.log", env)


def _ask(
    server: Server, model: str, dataset: str, words: Sequence[str], num_clients: int, out: Path
) -> dict[str, Any]:
    file = out / f"{server.name}-{dataset}-{num_clients}.json"
    command = ["vllm", "bench", "serve", "--base-url", server.url, "--model", SERVED_MODEL_NAME]
    command += ["--tokenizer", model, "--dataset-name", dataset, *words, "--ignore-eos"]
    num_prompts = _count_prompts(num_clients)
    command += ["--max-concurrency", str(num_clients), "--num-prompts", str(num_prompts)]
    command += ["--seed", str(num_clients), "--temperature", "0", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(out), "--result-filename", file.name]
    with (out / "client.log").open("a") as log:
        subprocess.run(resolve_vllm(command), check=True, stdout=log, stderr=log)
    result = json.loads(file.read_text())
    if result["failed"] or result["completed"] != num_prompts:
        raise RuntimeError(
            f"{server.name}: of {num_prompts} requests of {dataset} {result['completed']} were "
            f"answered; see {out}/client.log and {server.log_path}."
        )
    return {name: result.get(name) for name in FIELDS}
