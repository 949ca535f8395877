"""Errors that are not about the body: unknown routes and models, a full queue, an engine that is not there or dies."""

import http.client
import json
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from server.engine.request import GenerationRequest
from server.text.tokenizer import Tokenizer
from tests.server.api.conftest import ANSWER, wait_until
from tests.server.api.fake_engine import FakeEngineClient

BODY = {"prompt": "ab", "max_tokens": 50}


def assert_is_openais(error: dict[str, object], *, code: str | None) -> None:
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


def test_an_unknown_route_is_not_found(client: TestClient) -> None:
    response = client.get("/v1/nothing")
    assert response.status_code == 404
    assert_is_openais(response.json()["error"], code=None)
    assert "/v1/nothing" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/live/", "/v1/models/", "/quantize/"])
def test_a_slash_too_many_is_no_route_and_no_redirect(client: TestClient, path: str) -> None:
    assert client.get(path, follow_redirects=False).status_code == 404


def test_a_wrong_method_is_told(client: TestClient) -> None:
    response = client.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert "GET" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_unknown_model_is_not_found(client: TestClient, path: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    response = client.post(path, json={"prompt": "a", "messages": messages, "model": "gpt-9"})
    assert response.status_code == 404
    assert_is_openais(response.json()["error"], code="model_not_found")
    assert "'tiny'" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_with_a_time_to_retry(client: TestClient, engine: FakeEngineClient, stream: bool) -> None:
    # given as many requests under way as the engine takes
    engine.open.update(f"other-{number}" for number in range(8))
    response = client.post("/v1/completions", json={**BODY, "stream": stream})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert_is_openais(response.json()["error"], code="queue_full")
    assert response.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("state", ["loading", "restarting", "draining", "failed"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_is_not_ready_is_503_with_a_time_to_retry(
    client: TestClient, engine: FakeEngineClient, state: str, stream: bool
) -> None:
    engine.set_state(state, "layer 3 of 30")
    response = client.post("/v1/completions", json={**BODY, "stream": stream})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert "layer 3 of 30" in response.json()["error"]["message"]
    assert state in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_that_cannot_be_read_ends_its_request_alone(
    client: TestClient, engine: FakeEngineClient, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    # given a tokenizer that fails at one token, and one of two requests that gets it in the middle of its text
    answer, poison = tokenizer.encode("good", add_special_tokens=False), 270
    decode = Tokenizer.decode

    def fragile(self: Tokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        if poison in token_ids:
            raise OverflowError("no such token")
        return decode(self, token_ids, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", fragile)
    engine.script = lambda request: [*answer, poison, *answer] if request.prompt_token_ids[0] == ord("s") else answer
    with ThreadPoolExecutor(2) as pool, capture_logs() as lines:
        sick, sound = pool.map(
            lambda prompt: client.post("/v1/completions", json={"prompt": [ord(prompt)], "stream": stream}), "so"
        )

    # then that one ends with an error, which the log explains, and gives its place in the engine back
    if stream:
        *_, error, end = sick.text.split("\n\n")[:-1]
        assert "the server failed on this request" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert end == "data: [DONE]"
        assert sound.text.count('"text":') == len(answer)
    else:
        assert sick.status_code == 500
        assert sound.json()["choices"][0]["text"] == "good"
    assert "error" not in sound.text
    (logged,) = (line for line in lines if line["log_level"] == "error")
    assert "no such token" in logged["traceback"]
    assert engine.open == set()
    assert len(engine.aborted) == 1


def test_a_generation_that_fails_is_500_with_the_reason(client: TestClient, engine: FakeEngineClient) -> None:
    engine.fail_after = 3
    response = client.post("/v1/completions", json=BODY)
    assert response.status_code == 500
    assert_is_openais(response.json()["error"], code="generation_failed")
    assert "it died" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_dies_is_503_with_a_time_to_retry(
    client: TestClient, engine: FakeEngineClient, stream: bool
) -> None:
    # given an engine that ends this request because it ends itself
    engine.fail_after = 0
    answer = engine.script

    def dying(request: GenerationRequest) -> Sequence[int]:
        engine.set_state("restarting", "killed by signal 9")
        return answer(request)

    engine.script = dying
    response = client.post("/v1/completions", json={**BODY, "stream": stream})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert_is_openais(response.json()["error"], code="engine_unavailable")
    assert "it died" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_that_fails_says_so_and_ends_in_order(client: TestClient, engine: FakeEngineClient, path: str) -> None:
    engine.fail_after = 3
    messages = [{"role": "user", "content": "a"}]
    response = client.post(path, json={"prompt": "a", "messages": messages, "stream": True, "n": 2})
    assert response.status_code == 200
    *_, failure, done, rest = response.text.split("\n\n")
    assert_is_openais(json.loads(failure.removeprefix("data: "))["error"], code="generation_failed")
    assert (done, rest) == ("data: [DONE]", "")
    # and the other choice is given up
    assert not engine.open


@pytest.mark.parametrize(
    ("fields", "code"), [({}, "generation_failed"), ({"timeout": 0.5}, "deadline_exceeded")], ids=["error", "timeout"]
)
def test_who_reads_late_gets_what_was_said_before_the_failure(
    client: TestClient, engine: FakeEngineClient, fields: dict[str, object], code: str
) -> None:
    # given tokens, each of which a byte, that nobody had read when the request failed
    engine.fail_after = engine.expire_after = 4
    engine.is_read_late = True
    response = client.post("/v1/completions", json={**BODY, **fields, "stream": True})
    assert response.status_code == 200
    said, failure, done, _ = response.text.split("\n\n")
    [choice] = json.loads(said.removeprefix("data: "))["choices"]
    assert (choice["text"], choice["finish_reason"]) == (ANSWER[:4], None)
    assert_is_openais(json.loads(failure.removeprefix("data: "))["error"], code=code)
    assert done == "data: [DONE]"


@pytest.mark.parametrize("fields", [{}, {"echo": True}])
def test_a_stream_that_fails_before_its_first_token_has_a_status_of_its_own(
    client: TestClient, engine: FakeEngineClient, fields: dict[str, object]
) -> None:
    engine.fail_after = 0
    assert client.post("/v1/completions", json={**BODY, **fields, "stream": True}).status_code == 500


def test_a_request_whose_time_is_over_is_504_and_not_to_be_repeated(
    client: TestClient, engine: FakeEngineClient
) -> None:
    response = client.post("/v1/completions", json={**BODY, "timeout": 0.5})
    assert response.status_code == 504
    assert response.headers["x-should-retry"] == "false"
    assert_is_openais(response.json()["error"], code="deadline_exceeded")
    assert "too late" in response.json()["error"]["message"]
    assert 'awq_serve_request_success_total{finished_reason="timeout"} 1.0' in client.get("/metrics").text


def test_a_stream_whose_time_is_over_keeps_what_it_said_and_ends_in_order(
    client: TestClient, engine: FakeEngineClient
) -> None:
    response = client.post("/v1/completions", json={**BODY, "timeout": 0.5, "stream": True})
    assert response.status_code == 200
    *said, failure, done, _ = response.text.split("\n\n")
    assert len(said) == engine.expire_after
    assert_is_openais(json.loads(failure.removeprefix("data: "))["error"], code="deadline_exceeded")
    assert done == "data: [DONE]"


def test_errors_are_counted_by_code(client: TestClient) -> None:
    client.get("/nothing")
    client.post("/v1/completions", json={})
    client.post("/v1/completions", json={})
    metrics = client.get("/metrics").text
    assert 'awq_serve_http_errors_total{code="404"} 1.0' in metrics
    assert 'awq_serve_http_errors_total{code="400"} 2.0' in metrics


def broken(_request: object) -> list[int]:
    raise ZeroDivisionError("secret")


def test_an_error_that_nobody_expected_tells_nothing_of_the_inside(
    client: TestClient, engine: FakeEngineClient
) -> None:
    engine.script = broken
    with capture_logs() as logged:
        response = client.post("/v1/completions", json=BODY, headers={"X-Request-Id": "mine"})
    assert response.status_code == 500
    assert_is_openais(response.json()["error"], code=None)
    assert "secret" not in response.text
    # but the log does, once, beside the id that the client has
    [entry] = [entry for entry in logged if entry["log_level"] == "error"]
    assert "ZeroDivisionError: secret" in entry["traceback"]
    assert entry["request_id"] == response.headers["x-request-id"] == "mine"
    assert 'http_errors_total{code="500"} 1.0' in client.get("/metrics").text


def test_an_error_that_nobody_expected_leaves_the_connection_in_order(live_url: str, engine: FakeEngineClient) -> None:
    answer, engine.script = engine.script, broken
    connection = http.client.HTTPConnection(live_url.removeprefix("http://"), timeout=30)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(BODY), headers)
    assert connection.getresponse().read()
    opened = connection.sock
    engine.script = answer
    connection.request("POST", "/v1/completions", json.dumps(BODY), headers)
    assert connection.getresponse().status == 200
    assert connection.sock is opened
    connection.close()


def test_an_error_that_nobody_expected_ends_a_stream_in_order(client: TestClient, engine: FakeEngineClient) -> None:
    # given a token that no text can be made of
    engine.script = lambda _request: [72, 72, 72, 1 << 40]
    response = client.post("/v1/completions", json={**BODY, "stream": True, "logprobs": 1})
    *_, failure, done, rest = response.text.split("\n\n")
    assert_is_openais(json.loads(failure.removeprefix("data: "))["error"], code=None)
    assert (done, rest) == ("data: [DONE]", "")


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(live_url: str) -> None:
    host, port = live_url.removeprefix("http://").split(":")
    with capture_logs() as logged:
        with socket.create_connection((host, int(port))) as connection:
            head = f"Host: {host}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + b'{"prompt"')
        wait_until(lambda: 'http_errors_total{code="499"} 1.0' in httpx.get(f"{live_url}/metrics").text)
    assert not [entry for entry in logged if entry["log_level"] in ("warning", "error")]
