"""What the quantizer says on its standard output: one JSON object a line. Parses, and decides nothing."""

import msgspec


class ProgressEvent(msgspec.Struct, frozen=True, tag_field="event", tag="progress"):
    """`done` of `total` units of `phase`; seconds_left null while there is no estimate."""

    phase: str
    done: int
    total: int
    seconds_left: float | None = None


class NoticeEvent(msgspec.Struct, frozen=True, tag_field="event", tag="notice"):
    """`message`: what the quantizer has to say on its way, as a sentence."""

    message: str

    def fields(self) -> dict[str, object]:
        """As plain JSON values."""
        return {"message": self.message}


class LayerLine(msgspec.Struct, frozen=True):
    """A linear of a finished block: its scale's formula, and its relative output error, rounded plainly and now."""

    name: str
    formula: str
    plain: float
    chosen: float


class BlockEvent(msgspec.Struct, frozen=True, tag_field="event", tag="block"):
    """A block is finished. plain, chosen: its relative output error. kept: which weights stay, searched or plain."""

    block: str
    plain: float
    chosen: float
    kept: str
    layers: tuple[LayerLine, ...]

    def fields(self) -> dict[str, object]:
        """As plain JSON values."""
        fields: dict[str, object] = msgspec.structs.asdict(self)
        return {**fields, "layers": [msgspec.structs.asdict(layer) for layer in self.layers]}


class DoneEvent(msgspec.Struct, frozen=True, tag_field="event", tag="done"):
    """The checkpoint lies at `output`; `report` is kept as the bytes it came in."""

    output: str
    report: msgspec.Raw = msgspec.Raw(b"null")


class FailedEvent(msgspec.Struct, frozen=True, tag_field="event", tag="failed"):
    """`message`: what went wrong, as a sentence."""

    message: str


# what a quantizer says while it works, and how it says that it has ended
WorkEvent = ProgressEvent | NoticeEvent | BlockEvent
QuantizerEvent = WorkEvent | DoneEvent | FailedEvent

_DECODER = msgspec.json.Decoder(QuantizerEvent)


def parse_event(line: bytes) -> QuantizerEvent | None:
    """The event in a line; None for anything else, as libraries print what they like."""
    try:
        event: QuantizerEvent = _DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return event
