"""The reader of event streams against made-up lines."""

import asyncio

import pytest

from layerskip_vllm.tools.server.event_stream import StreamError, read_events

DONE = b"data: [DONE]\n"


def read(*lines):
    async def stream():
        for line in lines:
            yield line

    async def collect():
        return [event async for event in read_events(stream())]

    return asyncio.run(collect())


def test_events_are_the_objects_of_data_lines_up_to_the_end():
    lines = [b'data: {"choices": []}\n', b"\n", b'data:{"usage": 1}', DONE, b"data: {broken\n"]
    assert read(*lines) == [{"choices": []}, {"usage": 1}]


@pytest.mark.parametrize("line", [b"", b"\n", b": ping\n"])
def test_lines_between_events_are_none_when_they_are_empty_or_comments(line):
    assert read(line, DONE) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"event: x\n", "'data:' line"),
        (b"data: {broken\n", "expected JSON"),
        (b"data: 3\n", "JSON object"),
        (b'data: {"error": {"message": "too long"}}\n', "too long"),
        (b'data: {"choices": []}\n', "the stream broke off without an error"),
    ],
)
def test_stream_is_refused_when_it_is_wrong(line, message):
    with pytest.raises(StreamError, match=message):
        read(line)
