"""What the quantizer says on its standard output: one JSON object a line. Parses, and decides nothing."""

import msgspec


class ProgressEvent(msgspec.Struct, frozen=True, tag_field="event", tag="progress"):
    """`done` of `total` units of `phase`; seconds_left null while there is no estimate."""

    phase: str
    done: int
    total: int
    seconds_left: float | None = None


class DoneEvent(msgspec.Struct, frozen=True, tag_field="event", tag="done"):
    """The checkpoint lies at `output`; `report` is kept as the bytes it came in."""

    output: str
    report: msgspec.Raw = msgspec.Raw(b"null")


class FailedEvent(msgspec.Struct, frozen=True, tag_field="event", tag="failed"):
    """`message`: what went wrong, as a sentence."""

    message: str


QuantizerEvent = ProgressEvent | DoneEvent | FailedEvent

_DECODER = msgspec.json.Decoder(QuantizerEvent)


def parse_event(line: bytes) -> QuantizerEvent | None:
    """The event in a line; None for anything else, as libraries print what they like."""
    try:
        event: QuantizerEvent = _DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return event
