import msgspec
import pytest

from server.engine import messages
from server.engine.config import EngineConfig
from server.engine.request import (
    EngineNews,
    EngineStats,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)

PARAMS = SamplingParams(
    max_tokens=3, temperature=0.5, seed=2**62, logprobs=2, logit_bias=((1, -2.5),), stop_token_ids=(7, 8)
)
EVENT = TokenEvent(
    "r",
    (1, 2),
    (TokenLogprob(1, -0.1, ((1, -0.1), (4, -3.0))),),
    (None, TokenLogprob(5, -2.0, ())),
    FinishReason.ERROR,
    "why",
)


REQUEST = GenerationRequest("r", (1, 2), PARAMS, cache_salt="s", priority=-(2**63), owner="o", deadline=1234.5)


@pytest.mark.parametrize("message", [messages.Generate(REQUEST), messages.Abort("r")])
def test_what_the_api_says_arrives_as_it_was(message: messages.ToEngine) -> None:
    assert messages.decode_to_engine(messages.encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        messages.Loading("loading layer 3 of 30"),
        messages.Ready(ModelInfo("path", 512, 272, (258,), "cpu", "float32", 16, 32)),
        messages.StartFailed("config.json is missing"),
        messages.News(EngineNews(("r",), (EVENT,), EngineStats(1, 2, 3, 4, 5, 6, 7, 8))),
    ],
)
def test_what_the_engine_says_arrives_as_it_was(message: messages.FromEngine) -> None:
    assert messages.decode_from_engine(messages.encode(message)) == message


def test_the_start_carries_every_setting() -> None:
    start = messages.Start(1, "ipc:///tmp/x", 12, 7, 1.0, EngineConfig("m", kv_cache_bytes=5, dtype="bfloat16"))
    assert messages.decode_start(messages.encode_start(start)) == start


@pytest.mark.parametrize("frame", [b"\x93\x01\x02\x03", messages.encode(messages.Loading("loading layer 1 of 2"))])
def test_what_is_no_such_message_is_refused(frame: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        messages.decode_to_engine(frame)
