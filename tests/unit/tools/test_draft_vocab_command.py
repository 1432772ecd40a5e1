"""`layerskip-vllm draft-vocab`: tokens counted, ranked, and judged by text that was held out."""

from __future__ import annotations

import http.server
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layerskip_vllm.checkpoint.draft_vocab import read_draft_vocab
from layerskip_vllm.tools import commands
from layerskip_vllm.tools.draft_vocab.coverage import (
    BLOCK_TOKENS,
    count_tokens,
    find_coverage,
    parse_size,
    rank_tokens,
)


def test_one_block_of_ten_is_held_out_when_tokens_are_counted() -> None:
    counts = count_tokens([i // BLOCK_TOKENS for i in range(BLOCK_TOKENS * 20 + 5)])
    assert counts.held_out == {9: BLOCK_TOKENS, 19: BLOCK_TOKENS}
    assert counts.counted == {i: BLOCK_TOKENS for i in range(20) if i not in (9, 19)} | {20: 5}


def test_text_is_refused_when_nothing_of_it_would_be_held_out() -> None:
    least = 9 * BLOCK_TOKENS + 1
    assert count_tokens([0] * least).held_out.total() == 1
    with pytest.raises(ValueError, match=f"has {least - 1} tokens of a kind; .* at least {least} "):
        count_tokens([0] * (least - 1))


def test_tokens_are_ranked_by_count_and_then_by_id() -> None:
    assert rank_tokens(Counter({3: 5, 1: 2, 4: 2}), vocab_size=6) == [3, 1, 4, 0, 2, 5]


def test_coverage_is_the_share_of_the_text_that_the_tokens_are() -> None:
    assert find_coverage([3, 0], Counter({3: 5, 1: 2, 4: 3})) == 0.5


@pytest.mark.parametrize(("size", "expected"), [("1", 1), ("200", 200), ("12.5%", 25), ("1%", 2)])
def test_size_is_a_number_or_a_share(size: str, expected: int) -> None:
    assert parse_size(size, 200) == expected


@pytest.mark.parametrize(
    "size", ["0", "201", "0.1%", "101%", "nan%", "inf%", "-1", "half", "", "%"]
)
def test_size_is_refused_when_the_vocabulary_has_not_so_many(size: str) -> None:
    with pytest.raises(
        ValueError, match=r"size is .*; it must be a number of tokens from 1 to 200"
    ):
        parse_size(size, 200)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Text of the letters a to e, and text of the digits 1 to 5, a token a character."""
    files = {"words": tmp_path / "words.txt", "digits": tmp_path / "digits.txt"}
    files["words"].write_text("A B C D E " * 300)
    files["digits"].write_text("1 2 3 4 5 " * 200)
    return {name: str(file) for name, file in files.items()}


def test_most_frequent_tokens_are_written_when_text_is_counted(
    checkpoint: Callable[..., Path],
    data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "ids.json"
    arguments = ["draft-vocab", str(checkpoint()), "--data", data["words"], data["digits"]]
    assert commands.main([*arguments, "--size", "6", "--output", str(output)]) == 0
    draft_vocab = read_draft_vocab(output)
    assert draft_vocab.vocab_size == 256
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(checkpoint()).convert_ids_to_tokens(
        list(draft_vocab.token_ids)
    )
    assert sorted(tokens) == sorted(["Ġ", *"ABCDE"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    (line,) = [line for line in lines if " 6 " in line]
    shares = [float(cell.split()[0]) for cell in line.strip("│ ").split("│")[1:]]
    assert shares == pytest.approx([2.3, 100, 50], abs=1.0)


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Answers every completion with the same tokens; its address, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "served"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            status = 200 if body["max_tokens"] > 1 else 400
            self.answer(status, {"choices": [{"token_ids": [7, 8, 7, 9]}]})

        def answer(self, status: int, content: Any) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", asked
    httpd.shutdown()
    httpd.server_close()


def test_tokens_are_those_of_the_answers_when_a_server_is_named(
    checkpoint: Callable[..., Path],
    server: tuple[str, list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    url, asked = server
    (tmp_path / "words.txt").write_text("A B C D E " * 30_000)
    arguments = ["draft-vocab", str(checkpoint()), "--data", str(tmp_path / "words.txt")]
    arguments += ["--url", url, "--num-prompts", "300", "--output", str(tmp_path / "ids.json")]
    assert commands.main([*arguments, "--size", "3", "--max-tokens", "4"]) == 0
    assert read_draft_vocab(tmp_path / "ids.json").token_ids == (7, 8, 9)
    assert len(asked) == 300
    assert {(body["model"], body["max_tokens"]) for body in asked} == {("served", 4)}
    assert commands.main([*arguments, "--max-tokens", "1"]) == 2
