"""`layerskip-vllm watch` against a server of made-up Prometheus pages, and its arithmetic."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerskip_vllm.tools.commands import main
from layerskip_vllm.tools.server.metrics import (
    is_restarted,
    measure_interval,
    parse_sample,
    read_sample,
)

PAGE = """\
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{{engine="0"}} {tokens}
vllm:generation_tokens_total{{engine="1"}} {tokens}
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0"}} 3.0
vllm:num_requests_running{{engine="1"}} 2.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0"}} 0.5
vllm:kv_cache_usage_perc{{engine="1"}} 0.1
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{le="+Inf"}} {requests}
vllm:time_to_first_token_seconds_count {requests}
vllm:time_to_first_token_seconds_sum {first_s}
# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total {drafts}
# TYPE vllm:spec_decode_num_draft_tokens counter
vllm:spec_decode_num_draft_tokens_total {drafted}
# TYPE vllm:spec_decode_num_accepted_tokens counter
vllm:spec_decode_num_accepted_tokens_total {accepted}
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="0"}} {at_0}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="1"}} {at_1}
"""
FIRST = PAGE.format(
    tokens=100, requests=2, first_s=1.0, drafts=10, drafted=20, accepted=10, at_0=6, at_1=4
)
SECOND = PAGE.format(
    tokens=150, requests=6, first_s=1.4, drafts=30, drafted=60, accepted=40, at_0=22, at_1=18
)

INFO = (
    'vllm:layerskip_info{engine="0",exit_layer="12",exit_layer_source="the user",'
    'num_speculative_tokens="2",num_speculative_tokens_source="the checkpoint\'s config.json",'
    'num_layers="24",exit_adapter="",draft_vocab_size="2048",lookup="auto",'
    'reuse_exit_states="off"} 1.0\n'
)

STARTING = ""  # A proxy's answer while the server behind it starts.


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Its address and the pages that it has still to give; the last one stays."""
    pages = [FIRST, SECOND]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.pop(0) if len(pages) > 1 else pages[0]
            status = 404 if self.path != "/metrics" else 503 if page == STARTING else 200
            self.send_response(status)
            self.end_headers()
            if status == 200:
                self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", pages
        httpd.shutdown()


def test_interval_is_the_difference_of_two_samples_when_engines_are_summed() -> None:
    interval = measure_interval(parse_sample(FIRST, 10.0), parse_sample(SECOND, 14.0))
    assert interval.seconds == 4.0
    assert interval.tokens_per_s == 2 * 50 / 4
    assert interval.end.num_running == 5
    assert interval.end.kv_cache_usage == pytest.approx(0.3)
    assert interval.time_to_first_token_s == pytest.approx(0.1)
    assert interval.inter_token_latency_s is None
    assert interval.drafting is not None
    assert interval.drafting.acceptance_by_position == (0.8, 0.7)


def test_interval_has_no_drafts_when_nothing_was_drafted() -> None:
    assert measure_interval(parse_sample(FIRST, 0.0), parse_sample(FIRST, 1.0)).drafting is None


def test_restart_is_seen_when_counters_go_back() -> None:
    assert is_restarted(parse_sample(SECOND, 0.0), parse_sample(FIRST, 1.0))
    assert not is_restarted(parse_sample(FIRST, 0.0), parse_sample(SECOND, 1.0))


def test_restart_is_seen_when_the_server_comes_back_with_another_k() -> None:
    shorter = "".join(line for line in FIRST.splitlines(True) if 'position="1"' not in line)
    assert is_restarted(parse_sample(FIRST, 0.0), parse_sample(shorter, 1.0))


def test_server_counts_as_away_when_a_proxy_answers_for_it(server: tuple[str, list[str]]) -> None:
    url, pages = server
    pages.insert(0, STARTING)
    with pytest.raises(OSError, match="answers 503"):
        read_sample(url)
    assert read_sample(url).drafting.num_drafts == 10


def test_watch_prints_the_interval_when_told_to_look_once(
    server: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = server
    model = "checkpoints/stdlib-24l"
    assert main(["watch", url, "--once", "--interval", "0.01", "--model", model]) == 0
    printed = capsys.readouterr().out
    assert "75%" in printed  # 30 of 40 drafted tokens
    assert "2.50" in printed  # 1.5 accepted and one more
    assert "80%" in printed
    assert "70%" in printed
    # (1.5 + 1) / (2 * 0.29 + 1): a draft step reads 29 % of the embedded checkpoint's bytes.
    assert "1.58" in printed


def test_watch_says_what_drafts_and_bounds_it_when_the_server_says_so(
    server: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, pages = server
    model = "checkpoints/stdlib-24l"
    look = ["watch", url, "--once", "--interval", "0.01", "--model", model]
    pages[:] = [FIRST + INFO, SECOND + INFO]
    assert main(look) == 0
    printed = capsys.readouterr().out
    assert "layers [0, 12) of 24 draft 2 tokens of 2,048, copied where" in printed
    assert "E is from the user, K from the checkpoint's config.json" in printed
    # (1.5 + 1) / (2 * 0.53 + 1): twice the layers that the checkpoint itself would have draft.
    assert "1.22" in printed
    pages[:] = [FIRST + INFO, SECOND + INFO]
    assert main([*look, "--exit-layer", "6"]) == 0
    assert "1.58" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["127.0.0.1:8000"], "URL is '127.0.0.1:8000'; it must be an address such as http://"),
        (["http://127.0.0.1:9"], "http://127.0.0.1:9/metrics does not answer (<urlopen error"),
        (["http://127.0.0.1:abc"], "URL is 'http://127.0.0.1:abc'; nonnumeric port: 'abc'."),
        (["{url}", "--model", "{pointer}"], "is no safetensors file; if it is a pointer of Git"),
        (
            ["{url}", "--model", "checkpoints/stdlib-24l", "--exit-layer", "0"],
            "--exit-layer is 0; it must be from 1 to 24.",
        ),
        (["{url}/v1"], "answers 404; it must be a vLLM server's address"),
        (["{url}", "--interval", "0"], "interval is 0.0; it must be a number above 0."),
        (["{url}", "--exit-layer", "4"], "--exit-layer is for --model, which is not given"),
        (["{url}", "--model", "nowhere"], "--model is 'nowhere', which is no folder"),
        (
            ["{url}", "--model", "checkpoints/stdlib-24l", "--exit-layer", "25"],
            "--exit-layer is 25; it must be from 1 to 24.",
        ),
    ],
)
def test_watch_prints_one_error_when_something_is_wrong(
    server: tuple[str, list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    url, _ = server
    config = Path("checkpoints/stdlib-24l/config.json")
    (tmp_path / "config.json").write_text(config.read_text())
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    filled = [argument.format(url=url, pointer=tmp_path) for argument in arguments]
    assert main(["watch", *filled]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_error_shows_where_it_comes_from_when_asked_to_debug() -> None:
    with pytest.raises(ValueError, match="it must be an address"):
        main(["--debug", "watch", "nowhere"])
