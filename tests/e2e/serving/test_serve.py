"""`vllm serve` with layerskip's flags, over HTTP."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from layerskip_vllm.checkpoint.weight_shares import read_shares
from layerskip_vllm.tools.server.metrics import SpecDecodeCounters
from tests.e2e.serving.server import FLAGS, ModelServer, command, environment

NUM_SPECULATIVE_TOKENS = 3


@pytest.fixture(scope="module")
def server(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelServer]:
    """A server whose drafts are made by all layers, so that none is refused when greedy."""
    with ModelServer(
        tmp_path_factory.mktemp("server"),
        str(checkpoint("llama")),
        "--speculative-model=layerskip",
        f"--num-speculative-tokens={NUM_SPECULATIVE_TOKENS}",
        "--spec-exit-layer=8",
        "--per-request-spec-decode-metrics=detailed",
    ) as server:
        yield server


@pytest.mark.gpu
def test_server_accepts_every_draft_when_all_layers_draft(server: ModelServer) -> None:
    before = server.counters()
    # Each step verifies three drafts and adds a token; the first token comes without drafts.
    response = server.complete("hello", max_tokens=13, ignore_eos=True)
    assert response["usage"]["completion_tokens"] == 13
    assert response["metrics"]["speculative_decoding"] == {
        "mean_acceptance_length": 4.0,
        "draft_acceptance_rate": 1.0,
        "acceptance_histogram": [0, 0, 0, 3],
        "num_spec_steps": 3,
        "num_accepted_draft_tokens": 9,
        "num_draft_tokens": 9,
        "num_spec_tokens": NUM_SPECULATIVE_TOKENS,
        "per_step_accepted": [3, 3, 3],
        "per_step_drafted": [3, 3, 3],
    }
    assert server.counters() - before == SpecDecodeCounters(3, 9, 9, (3, 3, 3))


def test_dashboard_names_only_metrics_that_a_server_has_when_scraped(server: ModelServer) -> None:
    server.complete("hello", max_tokens=13, ignore_eos=True)
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.fetch("/metrics")):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(Path("dashboards/layerskip.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    found = [
        (name, label)
        for query in queries
        for name, selector in re.findall(r"(vllm:\w+)\{([^}]*)\}", query)
        for label in re.findall(r"(\w+)=~", selector)
    ]
    assert len({name for name, _ in found}) > 10
    assert all(label in labels[name] for name, label in found)
    assert "".join(queries).count("vllm:") == len(found)  # each is of the chosen model alone
    assert all(query.count("(") == query.count(")") for query in queries)
    (by_position,) = (query for query in queries if "by (" in query)
    assert by_position.startswith("sum by (position) (rate(vllm:spec_decode_num_accepted_tokens_p")
    assert "position" in labels["vllm:spec_decode_num_accepted_tokens_per_pos_total"]


def test_watch_shows_what_a_server_accepts_when_it_drafts(server: ModelServer) -> None:
    watching = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "layerskip_vllm.tools",
            "watch",
            server.url,
            "--once",
            "--interval=5",
        ],
        env=environment(COLUMNS="100"),
        stdout=subprocess.PIPE,
        text=True,
    )
    while watching.poll() is None:
        server.complete("hello", max_tokens=13, ignore_eos=True)
    assert watching.stdout is not None
    shown = watching.stdout.read()
    assert watching.returncode == 0
    assert re.search(r"accepted of drafted +100%", shown)
    assert re.search(r"mean acceptance length +4\.00", shown)


def test_server_refuses_some_drafts_when_sampling(server: ModelServer) -> None:
    before = server.counters()
    response = server.complete("hello", max_tokens=40, ignore_eos=True, temperature=1.0, seed=1)
    drafting = response["metrics"]["speculative_decoding"]
    counted = server.counters() - before
    assert 0 < drafting["num_accepted_draft_tokens"] < drafting["num_draft_tokens"]
    assert counted.num_drafts == drafting["num_spec_steps"]
    assert counted.num_draft_tokens == drafting["num_draft_tokens"]
    assert counted.num_accepted_tokens == drafting["num_accepted_draft_tokens"]


def test_server_gives_the_same_text_when_asked_again(server: ModelServer) -> None:
    texts = {
        server.complete("the same prompt", max_tokens=24, ignore_eos=True)["choices"][0]["text"]
        for _ in range(2)
    }
    assert len(texts) == 1


def ask(server: ModelServer, entry: Any, **parameters: Any) -> dict[str, Any]:
    """Complete a prompt with a value of `vllm_xargs`; the response, or the error's."""
    xargs = {} if entry is None else {"vllm_xargs": {"layerskip": entry}}
    parameters = {"max_tokens": 13, "ignore_eos": True, **parameters}
    try:
        return server.complete("hello", **parameters, **xargs)
    except urllib.error.HTTPError as error:
        return {"status": error.code, **json.loads(error.read())}


def drafted(response: dict[str, Any]) -> list[int]:
    """How many drafts were verified in each step of a response that had some."""
    return response["metrics"]["speculative_decoding"].get("per_step_drafted") or []


def test_request_drafts_its_number_when_it_says_so_over_http(server: ModelServer) -> None:
    entries = [None, '{"num_speculative_tokens": 0}', '{"num_speculative_tokens": 1}', "{}"]
    with ThreadPoolExecutor() as pool:
        responses = list(pool.map(lambda entry: ask(server, entry), entries))
    assert len({response["choices"][0]["text"] for response in responses}) == 1
    assert [drafted(response) for response in responses] == [[3] * 3, [], [1] * 6, [3] * 3]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{"num_speculative_tokens": 4}', "is 4; it must be an integer from 0"),
        ('{"num_speculative_tokens": -1}', "is -1; it must be an integer from 0"),
        ('{"num_speculative_tokens": true}', "is True; it must be an integer from 0"),
        ('{"num_speculative_tokens": 1.0}', "is 1.0; it must be an integer from 0"),
        ('{"exit_layer": 1}', "has 'exit_layer'; 'num_speculative_tokens' is all that it can have"),
        ("off", "is 'off'; it must be a dict such as {'num_speculative_tokens': 2}, or a string"),
        (2, "is 2; it must be a dict such as {'num_speculative_tokens': 2}, or a string"),
        ({"num_speculative_tokens": 1}, "Input should be a valid string"),  # vLLM's own refusal
    ],
)
def test_request_is_refused_alone_when_its_number_is_wrong_over_http(
    server: ModelServer, entry: Any, message: str
) -> None:
    with ThreadPoolExecutor() as pool:
        other = pool.submit(ask, server, None)
        response = ask(server, entry)
        assert response["status"] == response["error"]["code"] == 400
        assert message in response["error"]["message"]
        assert drafted(other.result()) == [3] * 3


def test_server_says_what_drafts_when_its_metrics_are_read(server: ModelServer) -> None:
    (family,) = (
        family
        for family in text_string_to_metric_families(server.fetch("/metrics"))
        if family.name == "vllm:layerskip_info"
    )
    (sample,) = family.samples
    assert sample.value == 1
    assert sample.labels == {
        "exit_layer": "8",
        "exit_layer_source": "the user",
        "num_speculative_tokens": str(NUM_SPECULATIVE_TOKENS),
        "num_speculative_tokens_source": "the user",
        "num_layers": "8",
        "exit_adapter": "",
        "draft_vocab_size": "256",
        "is_length_auto": "false",
        "lookup": "off",
        "reuse_exit_states": "off",
        "engine": "0",
    }


def test_every_api_server_knows_what_drafts_when_there_are_two(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    flags = ["--api-server-count=2", "--speculative-model=layerskip", "--spec-exit-layer=3"]
    with ModelServer(tmp_path, str(checkpoint("llama")), *flags) as server:
        metrics = [server.fetch("/metrics") for _ in range(4)]  # of either server
        names = set(re.findall(r"\((\w+) pid=\d+\) INFO .* layerskip: exit_layer=3 ", server.log))
        assert "exit_layer=2" not in server.log
    assert {"ApiServer_0", "ApiServer_1"} <= names
    for text in metrics:
        (line,) = (row for row in text.splitlines() if row.startswith("vllm:layerskip_info{"))
        assert 'exit_layer="3",exit_layer_source="the user"' in line


def test_worker_logs_that_layerskip_is_on_when_it_drafts(
    server: ModelServer, checkpoint: Callable[..., Path]
) -> None:
    (line,) = re.findall(r"\((\w+) pid=\d+\) INFO .*\] (layerskip is on: .*)", server.log)
    process, text = line
    assert process != "APIServer"
    assert "layers [0, 8) of 8 draft 3 tokens a step" in text
    logged = re.search(r"\(layers ([\d.]+) %, head ([\d.]+) %\)", text)
    shares = read_shares(checkpoint("llama"), num_layers=8, exit_layer=8)
    # What the doctor reads from the files is what the worker finds in the loaded model.
    assert [float(part) for part in logged.groups()] == pytest.approx(
        [100 * shares.layers, 100 * shares.head], abs=0.1
    )


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            ["--speculative-model=layerskip", "--spec-exit-layer=9"],
            ["ValueError: exit_layer is 9", "it must be between 1 and 8"],
        ),
        (
            ["--spec-exit-layer=4"],
            ["ValueError: --spec-exit-layer is 4", "add --speculative-model=layerskip"],
        ),
    ],
    ids=["E > L", "no layerskip"],
)
def test_server_exits_with_a_clear_message_when_a_flag_is_wrong(
    checkpoint: Callable[..., Path], tmp_path: Path, flags: list[str], parts: list[str]
) -> None:
    done = subprocess.run(
        command(str(checkpoint("llama")), *flags, *FLAGS),
        env=environment(VLLM_CACHE_ROOT=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode != 0
    last_line = (done.stdout + done.stderr).strip().splitlines()[-1]
    assert all(part in last_line for part in parts), last_line
