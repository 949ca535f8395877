"""What crosses the socket between the API and the engine's process, and its bytes. No pickle.

`Start` goes to the child's standard input as JSON; everything else is MessagePack over one ZeroMQ pair.
"""

import msgspec

from server.engine.config import EngineConfig
from server.engine.request import EngineNews, GenerationRequest, ModelInfo

# raised with every change of a message: an upgrade under a running server must not be misread
PROTOCOL_VERSION = 11


class Start(msgspec.Struct, frozen=True):
    """address: the ZeroMQ endpoint to connect to. parent_pid: whose death ends the child.

    heartbeat_descriptor: the pipe to write to every beat_seconds.
    """

    protocol_version: int
    address: str
    parent_pid: int
    heartbeat_descriptor: int
    beat_seconds: float
    config: EngineConfig


class Generate(msgspec.Struct, frozen=True, tag=True):
    request: GenerationRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Loading(msgspec.Struct, frozen=True, tag=True):
    """detail: how far the start is, for people."""

    detail: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    model: ModelInfo


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The child's last words: why it cannot serve, as one sentence."""

    detail: str


class News(msgspec.Struct, frozen=True, tag=True):
    news: EngineNews


ToEngine = Generate | Abort
FromEngine = Loading | Ready | StartFailed | News

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    return _encoder.encode(message)


def decode_to_engine(frame: bytes) -> ToEngine:
    """Raises msgspec.ValidationError for anything that is no such message."""
    return _to_engine.decode(frame)


def decode_from_engine(frame: bytes) -> FromEngine:
    """Raises msgspec.ValidationError for anything that is no such message."""
    return _from_engine.decode(frame)


def encode_start(start: Start) -> bytes:
    return msgspec.json.encode(start)


def decode_start(line: bytes) -> Start:
    """Raises msgspec.ValidationError for anything else."""
    return msgspec.json.decode(line, type=Start)
