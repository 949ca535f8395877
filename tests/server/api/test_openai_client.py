"""The openai client against a real socket: what it reads, how it fails, and what happens when it goes away."""

import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.server.api.conftest import ANSWER, MODEL_NAME, wait_until
from tests.server.api.fake_engine import FakeEngineClient


@pytest.fixture
def client(live_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live_url}/v1", api_key="any", max_retries=0, timeout=30) as started:
        yield started


def test_a_completion(client: openai.OpenAI) -> None:
    completion = client.completions.create(model=MODEL_NAME, prompt="ab", max_tokens=100)
    assert completion.choices[0].text == ANSWER
    assert completion.choices[0].finish_reason == "stop"


def test_a_streamed_completion(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL_NAME, prompt="ab", max_tokens=100, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == ANSWER
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 2


def test_a_chat(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].message.content == ANSWER
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": "hi"}], stream=True, n=2
    )
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [ANSWER, ANSWER]


def test_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME


def test_errors_have_their_own_types(client: openai.OpenAI, engine: FakeEngineClient) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL_NAME, prompt="ab", temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="other", prompt="ab")
    assert unknown.value.code == "model_not_found"
    engine.open.update(f"other-{number}" for number in range(8))
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL_NAME, prompt="ab")


def test_a_failure_in_a_stream_is_raised(client: openai.OpenAI, engine: FakeEngineClient) -> None:
    engine.fail_after = 3
    stream = client.completions.create(model=MODEL_NAME, prompt="ab", stream=True)
    texts: list[str] = []
    with pytest.raises(openai.APIError, match="it died"):
        texts.extend(chunk.choices[0].text for chunk in stream)


@pytest.mark.parametrize("body", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3}])
def test_a_client_that_goes_away_before_the_first_token_aborts(
    live_url: str, engine: FakeEngineClient, body: dict[str, object]
) -> None:
    # given requests that the engine has not started to answer
    engine.gate.clear()
    connection = open_request(live_url, {"prompt": "ab", **body})
    wait_until(lambda: len(engine.open) == body.get("n", 1))
    # when the client closes its connection
    connection.close()
    # then the engine is told of each
    wait_until(lambda: not engine.open)
    assert len(engine.aborted) == body.get("n", 1)


def test_a_client_that_goes_away_in_the_middle_aborts(live_url: str, engine: FakeEngineClient) -> None:
    engine.pause_after = 5
    connection = open_request(live_url, {"prompt": "ab", "stream": True, "max_tokens": 100})
    received = b""
    while b'"text":"H"' not in received:
        received += connection.recv(4096)
    connection.close()
    wait_until(lambda: not engine.open)
    assert len(engine.aborted) == 1
    # and the server goes on
    engine.pause_after = None
    assert httpx.post(f"{live_url}/v1/completions", json={"prompt": "a"}).status_code == 200


def test_a_huge_header_is_refused_and_the_server_goes_on(live_url: str) -> None:
    try:
        refused = httpx.get(f"{live_url}/live", headers={"X-Huge": "x" * 10_000_000}).status_code >= 400
    except httpx.TransportError:
        refused = True
    assert refused
    assert httpx.get(f"{live_url}/live").status_code == 200


def open_request(url: str, body: dict[str, object]) -> socket.socket:
    """A connection on which a completion was asked for and nothing is read yet."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    headers = f"Host: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    head = f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + content)
    return connection
