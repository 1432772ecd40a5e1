"""The reader of event streams against made-up lines."""

import pytest

from layerskip_vllm.tools.server.event_stream import StreamError, parse_sse_line


def test_parse_sse_line_returns_the_object_when_it_is_data():
    assert parse_sse_line(b'data: {"choices": []}\n') == {"choices": []}


@pytest.mark.parametrize("line", [b"", b"\n", b": ping\n", b"data: [DONE]\n"])
def test_parse_sse_line_returns_none_when_there_is_nothing(line):
    assert parse_sse_line(line) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"event: x\n", "'data:' line"),
        (b"data: {broken\n", "expected JSON"),
        (b"data: 3\n", "JSON object"),
        (b'data: {"error": {"message": "too long"}}\n', "too long"),
    ],
)
def test_parse_sse_line_raises_when_the_stream_is_wrong(line, message):
    with pytest.raises(StreamError, match=message):
        parse_sse_line(line)
