"""What is wrong with a request is a 400 with OpenAI's body that names the field; never a 500, and nothing runs."""

import json

import pytest
from fastapi.testclient import TestClient

from tests.server.api.fake_engine import FakeEngineClient
from tests.tiny_models import VOCAB_SIZE

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"

BAD_BODIES = [
    b"",
    b"{",
    b"null",
    b'"text"',
    b"3",
    b"[]",
    b'[{"prompt": "a"}]',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": -Infinity}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\xff\xfe"}',
    b'\xef\xbb\xbf{"prompt": "a"}',
    b'{"prompt": "a"} trailing',
    b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    b'{"x": ' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}",
    b'{"x": ' + b"[" * 1_000_000,
    b"prompt=a&max_tokens=3",
    json.dumps({"prompt": "a", **{f"field_{number}": 1 for number in range(200)}}).encode(),
    json.dumps({"prompt": "a", **{f"field_{number}": 1 for number in range(200_000)}}).encode(),
]

BAD_COMPLETIONS = [
    ("prompt", {}),
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [[]]}),
    ("prompt", {"prompt": ["a", ""]}),
    ("prompt", {"prompt": ["a", 1]}),
    ("prompt", {"prompt": [1, "a"]}),
    ("prompt", {"prompt": [1, [2]]}),
    ("prompt", {"prompt": True}),
    ("prompt", {"prompt": 1.5}),
    ("prompt", {"prompt": {"text": "a"}}),
    ("prompt", {"prompt": [True]}),
    ("prompt", {"prompt": [1.0]}),
    ("prompt", {"prompt": [-1]}),
    ("prompt", {"prompt": [VOCAB_SIZE]}),
    ("prompt", {"prompt": [2**70]}),
    ("prompt", {"prompt": [1] * ((1 << 20) + 1)}),
    ("prompt", {"prompt": [[1], [1] * ((1 << 20) + 1)]}),
    ("prompt", {"prompt": ["a"] * 129}),
    ("model", {"prompt": "a", "model": 3}),
    ("max_tokens", {"prompt": "a", "max_tokens": 0}),
    ("max_tokens", {"prompt": "a", "max_tokens": -1}),
    ("max_tokens", {"prompt": "a", "max_tokens": True}),
    ("max_tokens", {"prompt": "a", "max_tokens": "5"}),
    ("max_tokens", {"prompt": "a", "max_tokens": 5.0}),
    ("max_tokens", {"prompt": "a", "max_tokens": 10**30}),
    ("max_tokens", {"prompt": "a", "max_tokens": 10**18}),
    ("n", {"prompt": "a", "n": 0}),
    ("n", {"prompt": "a", "n": 129}),
    ("n", {"prompt": "a", "n": 2, "temperature": 0}),
    ("best_of", {"prompt": "a", "n": 2, "best_of": 3}),
    ("temperature", {"prompt": "a", "temperature": -0.1}),
    ("temperature", {"prompt": "a", "temperature": 2.1}),
    ("temperature", {"prompt": "a", "temperature": True}),
    ("temperature", {"prompt": "a", "temperature": "hot"}),
    ("temperature", {"prompt": "a", "temperature": []}),
    ("top_p", {"prompt": "a", "top_p": 0}),
    ("top_p", {"prompt": "a", "top_p": 1.1}),
    ("top_k", {"prompt": "a", "top_k": -2}),
    ("top_k", {"prompt": "a", "top_k": 1.5}),
    ("min_p", {"prompt": "a", "min_p": -0.1}),
    ("repetition_penalty", {"prompt": "a", "repetition_penalty": 0}),
    ("repetition_penalty", {"prompt": "a", "repetition_penalty": 1e-38}),
    ("repetition_penalty", {"prompt": "a", "repetition_penalty": 0.009}),
    ("presence_penalty", {"prompt": "a", "presence_penalty": 3}),
    ("frequency_penalty", {"prompt": "a", "frequency_penalty": -3}),
    ("logit_bias", {"prompt": "a", "logit_bias": []}),
    ("logit_bias", {"prompt": "a", "logit_bias": {"x": 1}}),
    ("logit_bias", {"prompt": "a", "logit_bias": {"-1": 1}}),
    ("logit_bias", {"prompt": "a", "logit_bias": {"²": 1}}),
    ("logit_bias", {"prompt": "a", "logit_bias": {"1": "x"}}),
    ("logit_bias", {"prompt": "a", "logit_bias": {"1": True}}),
    ("logit_bias", {"prompt": "a", "logit_bias": {"1": 101}}),
    ("logit_bias", {"prompt": "a", "logit_bias": {str(VOCAB_SIZE): 1}}),
    ("logit_bias", {"prompt": "a", "logit_bias": {str(token_id): 1 for token_id in range(1025)}}),
    ("logprobs", {"prompt": "a", "logprobs": 21}),
    ("logprobs", {"prompt": "a", "logprobs": -1}),
    ("logprobs", {"prompt": "a", "logprobs": True}),
    ("echo", {"prompt": "a", "echo": "yes"}),
    ("stop", {"prompt": "a", "stop": ""}),
    ("stop", {"prompt": "a", "stop": ["x", ""]}),
    ("stop", {"prompt": "a", "stop": [1]}),
    ("stop", {"prompt": "a", "stop": {"a": 1}}),
    ("stop", {"prompt": "a", "stop": ["x"] * 17}),
    ("stop", {"prompt": "a", "stop": ["x" * 257]}),
    ("stop_token_ids", {"prompt": "a", "stop_token_ids": [-1]}),
    ("stop_token_ids", {"prompt": "a", "stop_token_ids": [VOCAB_SIZE]}),
    ("stop_token_ids", {"prompt": "a", "stop_token_ids": "1"}),
    ("min_tokens", {"prompt": "a", "min_tokens": -1}),
    ("min_tokens", {"prompt": "a", "min_tokens": 5, "max_tokens": 4}),
    ("seed", {"prompt": "a", "seed": 2**63}),
    ("seed", {"prompt": "a", "seed": "x"}),
    ("stream", {"prompt": "a", "stream": 1}),
    ("stream", {"prompt": "a", "stream": "true"}),
    ("stream_options", {"prompt": "a", "stream_options": {"include_usage": True}}),
    ("stream_options", {"prompt": "a", "stream": True, "stream_options": []}),
    ("stream_options", {"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}}),
    ("user", {"prompt": "a", "user": 1}),
    ("priority", {"prompt": "a", "priority": 0.5}),
    ("priority", {"prompt": "a", "priority": True}),
    ("priority", {"prompt": "a", "priority": 2**63}),
    ("timeout", {"prompt": "a", "timeout": 0}),
    ("timeout", {"prompt": "a", "timeout": -1}),
    ("timeout", {"prompt": "a", "timeout": 86_401}),
    ("timeout", {"prompt": "a", "timeout": "5s"}),
    ("suffix", {"prompt": "a", "suffix": "end"}),
    ("max_completion_tokens", {"prompt": "a", "max_completion_tokens": 5}),
    ("prompt_logprobs", {"prompt": "a", "prompt_logprobs": 1}),
    ("response_format", {"prompt": "a", "response_format": {"type": "json_object"}}),
    ("guided_json", {"prompt": "a", "guided_json": {}}),
    ("bad_words", {"prompt": "a", "bad_words": ["x"]}),
    ("use_beam_search", {"prompt": "a", "use_beam_search": True}),
]

USER = {"role": "user", "content": "a"}
BAD_CHATS = [
    ("messages", {}),
    # llama.cpp's list
    ("messages", {"messages": None}),
    ("messages", {"messages": "string"}),
    ("messages", {"messages": [123]}),
    ("messages", {"messages": [{}]}),
    ("messages", {"messages": [{"role": 123}]}),
    ("messages", {"messages": [{"role": "system", "content": 123}]}),
    ("messages", {"messages": [USER, *[{"role": "assistant", "content": "b"}] * 2]}),
    ("response_format", {"messages": [USER], "response_format": {"type": "sound"}}),
    ("response_format", {"messages": [USER], "response_format": {"type": "json_object", "schema": 123}}),
    ("response_format", {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {}}}),
    # and ours
    ("messages", {"messages": []}),
    ("messages", {"messages": {}}),
    ("messages", {"messages": [{"role": "user"}]}),
    ("messages", {"messages": [{"role": "user", "content": None}]}),
    ("messages", {"messages": [{"role": "user", "content": []}]}),
    ("messages", {"messages": [{"role": "user", "content": ["a"]}]}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
    ("messages", {"messages": [{"role": "wizard", "content": "a"}]}),
    ("messages", {"messages": [{"role": "tool", "content": "a", "tool_call_id": "x"}]}),
    ("messages", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}]}),
    ("messages", {"messages": [USER] * 4097}),
    ("max_tokens", {"messages": [USER], "max_tokens": 0}),
    ("max_completion_tokens", {"messages": [USER], "max_completion_tokens": 0}),
    ("logprobs", {"messages": [USER], "logprobs": 1}),
    ("top_logprobs", {"messages": [USER], "top_logprobs": 1}),
    ("top_logprobs", {"messages": [USER], "logprobs": True, "top_logprobs": 21}),
    ("tools", {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("tool_choice", {"messages": [USER], "tool_choice": "required"}),
    ("functions", {"messages": [USER], "functions": [{"name": "f"}]}),
    ("chat_template", {"messages": [USER], "chat_template": "{{ 1 }}"}),
    ("chat_template_kwargs", {"messages": [USER], "chat_template_kwargs": {"tokenize": True}}),
    ("modalities", {"messages": [USER], "modalities": ["text", "audio"]}),
    ("continue_final_message", {"messages": [USER], "continue_final_message": True}),
    ("n", {"messages": [USER], "n": 2, "temperature": 0}),
]


def error_of(client: TestClient, path: str, body: bytes) -> dict[str, str]:
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error: dict[str, str] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:24]))
def test_a_body_that_is_no_json_object(client: TestClient, engine: FakeEngineClient, path: str, body: bytes) -> None:
    error_of(client, path, body)
    assert not engine.requests


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("param", "body"), BAD_COMPLETIONS, ids=lambda value: str(value)[:60])
def test_a_wrong_completion_names_the_field(
    client: TestClient, engine: FakeEngineClient, param: str, body: dict[str, object], stream: bool
) -> None:
    body = body if "stream" in body or "stream_options" in body else {**body, "stream": stream}
    error = error_of(client, COMPLETIONS, json.dumps(body).encode())
    assert error["param"] == param
    assert param in error["message"]
    assert not engine.requests


@pytest.mark.parametrize(("param", "body"), BAD_CHATS, ids=lambda value: str(value)[:60])
def test_a_wrong_chat_names_the_field(
    client: TestClient, engine: FakeEngineClient, param: str, body: dict[str, object]
) -> None:
    error = error_of(client, CHATS, json.dumps(body).encode())
    assert error["param"] == param
    assert param in error["message"]
    assert not engine.requests


def test_the_message_says_what_was_given_and_what_would_be_right(client: TestClient) -> None:
    error = error_of(client, COMPLETIONS, b'{"prompt": "a", "temperature": 3}')
    assert error["message"] == "temperature should be less than or equal to 2, and it is 3"


@pytest.mark.parametrize(
    ("body", "numbers"),
    [
        ({"prompt": "x" * 300}, ["256", "300"]),
        ({"prompt": "x" * 256}, ["256"]),
        ({"prompt": "x" * 200, "max_tokens": 100}, ["256", "200", "100", "56"]),
        # unread: no token has enough characters for these to fit
        ({"prompt": "x" * 10_000}, ["256", "10000 characters"]),
    ],
)
def test_a_prompt_that_is_too_long_is_told_the_numbers(
    client: TestClient, body: dict[str, object], numbers: list[str]
) -> None:
    error = error_of(client, COMPLETIONS, json.dumps(body).encode())
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in numbers)


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("messages", {"messages": [{"role": "user", "content": "x" * 300}]}),
        ("messages", {"messages": [{"role": "user", "content": "x" * 10_000}]}),
        ("max_tokens", {"messages": [USER], "max_tokens": 300}),
        ("max_completion_tokens", {"messages": [USER], "max_completion_tokens": 300}),
    ],
)
def test_a_chat_that_is_too_long_is_told_the_field_that_it_has(
    client: TestClient, param: str, body: dict[str, object]
) -> None:
    error = error_of(client, CHATS, json.dumps(body).encode())
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert param == "messages" or f"set {param} to" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHATS, {"messages": [7]}, "messages.0 should be a JSON object, and it is 7"),
        (CHATS, {"messages": "hi"}, 'messages should be a list, and it is "hi"'),
        (CHATS, {"messages": []}, "messages takes at least 1 item(s), and it has 0"),
        (CHATS, {"messages": [USER] * 4097}, "messages takes at most 4096 items, and it has 4097"),
        (COMPLETIONS, {"prompt": "a", "stream": 1}, "stream should be true or false, and it is 1"),
        (COMPLETIONS, {"prompt": "a", "user": 1}, "user should be a string, and it is 1"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "5"}, 'max_tokens should be an integer, and it is "5"'),
        (
            COMPLETIONS,
            {"prompt": "a", "stop_token_ids": [1] * 129},
            "stop_token_ids takes at most 128 items, and it has 129",
        ),
    ],
)
def test_the_words_are_those_of_json(client: TestClient, path: str, body: dict[str, object], message: str) -> None:
    assert error_of(client, path, json.dumps(body).encode())["message"] == message


def test_odd_text_that_is_valid_is_answered(client: TestClient) -> None:
    for text in ("\0", "\u202e", "e" + "\u0301" * 100, "\ufffd", "\n" * 50):
        body = json.dumps({"prompt": text, "max_tokens": 2, "echo": True})
        response = client.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"].startswith(text)
