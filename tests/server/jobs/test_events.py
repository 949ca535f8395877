"""Of what the quantizer prints, only whole and well-typed events count."""

import pytest

from server.jobs.events import DoneEvent, FailedEvent, ProgressEvent, parse_event


def test_progress_without_an_estimate() -> None:
    line = b'{"event":"progress","phase":"blocks","done":3,"total":30,"seconds_left":null,"new_field":1}\n'
    assert parse_event(line) == ProgressEvent("blocks", 3, 30, None)


def test_a_report_is_kept_byte_for_byte() -> None:
    event = parse_event(b'{"event":"done","output":"/models/x","report":{"loss": 1.50, "layers": []}}\n')
    assert isinstance(event, DoneEvent)
    assert bytes(event.report) == b'{"loss": 1.50, "layers": []}'


def test_a_failure_has_its_sentence() -> None:
    assert parse_event(b'{"event":"failed","message":"the disk is full"}\n') == FailedEvent("the disk is full")


@pytest.mark.parametrize(
    "line",
    [
        b"Loading checkpoint shards: 100%\n",
        b"\xff\xfe\n",
        b"\n",
        b"[1, 2]\n",
        b'"progress"\n',
        b'{"event":"dance"}\n',
        b'{"event":"progress","phase":"blocks","done":"3","total":30}\n',
        b'{"event":"progress","phase":"blocks"}\n',
        b'{"event":"failed","message":7}\n',
        b'{"event":"notice"}\n',
        b'{"event":"block","block":"a","plain":1,"chosen":0,"kept":"plain","layers":[{"name":"q_proj"}]}\n',
        b'{"event":"done","output":"/models/x","report":' + b"[" * 100_000 + b"\n",
    ],
)
def test_anything_else_is_no_event(line: bytes) -> None:
    assert parse_event(line) is None
