"""`layerskip-vllm soak` against a made-up server: its answers, its errors, its exit status."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from layerskip_vllm.tools.commands import main
from layerskip_vllm.tools.server.service import inspect
from tests.unit.tools.soak import fake_server
from tests.unit.tools.soak.fake_server import FakeServer


@contextmanager
def serving(server: FakeServer) -> Iterator[str]:
    """Serve in a thread, for a command that has a loop of its own."""
    loop = asyncio.new_event_loop()
    context = server.serve()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        url = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(10)
        yield url
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def server() -> Iterator[tuple[FakeServer, str]]:
    fake = FakeServer()
    with serving(fake) as url:
        yield fake, url


@pytest.fixture
def plain() -> Iterator[str]:
    with serving(FakeServer(drafts=False)) as url:
        yield url


def test_command_compares_with_what_it_recorded_when_given_a_reference(
    server: tuple[FakeServer, str], plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = server
    reference, report = tmp_path / "plain.json", tmp_path / "report.json"
    assert main(["soak", plain, "--record", str(reference), "--questions=12"]) == 0
    answers = json.loads(reference.read_text())
    assert len(answers["questions"]) == 12
    options = ["--reference", str(reference), "--requests=100", "--output", str(report)]
    assert main(["soak", url, *options]) == 0
    assert "ok    no request and no KV block is left: 0 running" in capsys.readouterr().out
    written = json.loads(report.read_text())
    assert written["is_passed"] is True
    assert written["total"]["sent"] == 100
    assert written["total"]["tokens_compared"] > 100
    # One answer that is wrong in the file is found, whatever it is.
    for question in answers["questions"]:
        question["token_ids"][0] += 1
    reference.write_text(json.dumps(answers))
    assert main(["soak", url, *options, "--kinds", "question", "--max-faults=1"]) == 1
    written = json.loads(report.read_text())
    assert written["is_passed"] is False
    fault = written["faults"][0]
    assert "token 0 differs from plain vLLM's" in fault["reason"]
    assert json.loads(fault["payload"])["temperature"] == 0


def test_server_is_asked_what_it_drafts_with_when_it_is_inspected(
    server: tuple[FakeServer, str], plain: str
) -> None:
    assert asyncio.run(inspect(server[1])).num_speculative_tokens == fake_server.K
    assert asyncio.run(inspect(plain)).num_speculative_tokens is None


def test_command_asks_the_plain_server_when_there_is_one(
    server: tuple[FakeServer, str], plain: str
) -> None:
    options = ["--requests=60", "--kinds", "question", "--questions=10"]
    assert main(["soak", server[1], "--plain", plain, *options]) == 0


def test_command_watches_memory_when_given_a_process(
    server: tuple[FakeServer, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["soak", server[1], "--requests=20", f"--pid={os.getpid()}"]) == 1
    # Two looks, before and after, are too few to tell.
    assert "memory is flat: " in capsys.readouterr().out


def test_command_reports_what_it_has_when_interrupted(
    server: tuple[FakeServer, str], capsys: pytest.CaptureFixture[str]
) -> None:
    fake, url = server

    def interrupt() -> None:
        while fake.num_asked < 30:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert main(["soak", url, "--minutes=5"]) == 0
    out = capsys.readouterr().out
    assert "interrupted" in out
    assert "each request ended as it must" in out


def test_command_reports_what_it_has_when_interrupted_between_faults(
    server: tuple[FakeServer, str], capsys: pytest.CaptureFixture[str]
) -> None:
    fake, url = server
    fake.misbehave = lambda index, body: "status 500" if index > 3 else ""

    def interrupt() -> None:
        while fake.num_asked < 10:
            time.sleep(0.01)
        time.sleep(0.5)  # all are in the pause after a fault
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert main(["soak", url, "--minutes=5", "--kinds=question", "--concurrency=8"]) == 1
    assert "status 500 for a request that is right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes=0"], "minutes is 0.0; it must be a number above 0"),
        (["--requests=0"], "num_requests is 0; it must be an integer of at least 1"),
        (["--concurrency=0"], "concurrency is 0; it must be an integer of at least 1"),
        (["--questions=3"], "num_questions is 3; it must be an integer of at least 10"),
        (["--kinds", "greedy"], "kinds has 'greedy'; it can have question, one candidate"),
        (["--reference", "missing.json"], "missing.json"),
        (["--pid", "999999999"], "there is no process 999999999"),
        (["--output", "no/such/report.json"], "--output is 'no/such/report.json', whose folder"),
    ],
)
def test_command_says_what_is_wrong_when_an_option_is(
    server: tuple[FakeServer, str],
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["soak", server[1], *options]) == 2
    assert message in capsys.readouterr().err


def test_command_refuses_a_server_that_is_not_the_right_one(
    server: tuple[FakeServer, str], plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = ["--record", str(tmp_path / "plain.json")]
    for arguments, message in (
        ([plain], "does not draft with layerskip; start it with --speculative-model=layerskip"),
        ([server[1], *record], "drafts with layerskip; the right answers must come from one"),
        ([server[1], "--plain", server[1]], "drafts with layerskip; the right answers must come"),
        (["localhost:8000"], "URL is 'localhost:8000'; it must be an address such as"),
        (["http://127.0.0.1:9"], "127.0.0.1:9"),
        ([server[1] + "/metrics"], "/v1/models there answers 404"),
    ):
        assert main(["soak", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_command_refuses_a_reference_when_it_is_of_another_server(
    server: tuple[FakeServer, str],
    plain: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = tmp_path / "plain.json"
    assert main(["soak", plain, "--record", str(reference), "--questions=10"]) == 0
    monkeypatch.setattr(fake_server, "MAX_MODEL_LEN", 512)
    assert main(["soak", server[1], "--reference", str(reference)]) == 2
    assert "max_model_len is 256, but that of" in capsys.readouterr().err
    reference.write_text('{"questions": []}')
    assert main(["soak", server[1], "--reference", str(reference)]) == 2
    assert "which is no file of --record's" in capsys.readouterr().err
    monkeypatch.setattr(fake_server, "MAX_MODEL_LEN", 128)
    assert main(["soak", server[1]]) == 2
    assert "is 128; it must be at least 256" in capsys.readouterr().err
