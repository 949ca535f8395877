"""POST /v1/chat/completions: messages in, the assistant's message out, streamed or whole."""

import json

import pytest
from fastapi.testclient import TestClient

from server.text.tokenizer import Tokenizer
from tests.server.api.conftest import ANSWER, MAX_MODEL_LEN, MODEL_NAME
from tests.server.api.fake_engine import FakeEngineClient

QUESTION = [{"role": "user", "content": "hi"}]
PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def chat(client: TestClient, **body: object):  # noqa: ANN201 - the reply is whatever JSON says
    response = client.post("/v1/chat/completions", json={"messages": QUESTION, **body})
    assert response.status_code == 200, response.text
    return response.json()


def chunks(client: TestClient, **body: object) -> list:  # type: ignore[type-arg]
    response = client.post("/v1/chat/completions", json={"messages": QUESTION, "stream": True, **body})
    assert response.status_code == 200, response.text
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def prompt_text(engine: FakeEngineClient, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


def test_a_chat_has_openais_shape(client: TestClient) -> None:
    reply = chat(client)
    assert reply["id"].startswith("chatcmpl-")
    assert (reply["object"], reply["model"]) == ("chat.completion", MODEL_NAME)
    message = {"role": "assistant", "content": ANSWER, "refusal": None}
    assert reply["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]


def test_the_template_writes_the_prompt(client: TestClient, engine: FakeEngineClient, tokenizer: Tokenizer) -> None:
    chat(client)
    assert prompt_text(engine, tokenizer) == PROMPT


def test_text_parts_are_joined_by_line_ends(client: TestClient, engine: FakeEngineClient, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat(client, messages=[{"role": "user", "content": parts}])
    assert prompt_text(engine, tokenizer) == PROMPT.replace("hi", "one\ntwo")


def test_a_developer_speaks_as_the_system(client: TestClient, engine: FakeEngineClient, tokenizer: Tokenizer) -> None:
    chat(client, messages=[{"role": "developer", "content": "be brief"}, *QUESTION])
    assert prompt_text(engine, tokenizer).startswith("<|im_start|>system\nbe brief<|im_end|>")


def test_a_stream_opens_with_the_role_and_closes_with_the_reason(client: TestClient) -> None:
    choices = [chunk["choices"][0] for chunk in chunks(client)]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"]["content"] for choice in choices[:-1]) == ANSWER
    assert not any("role" in choice["delta"] for choice in choices[1:])
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "stop")
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)


def test_one_stream_has_one_id_and_one_time(client: TestClient) -> None:
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks(client)}) == 1


@pytest.mark.parametrize("message", [{"role": "assistant", "content": None}, {"role": "assistant"}])
def test_an_assistant_may_have_said_nothing(
    client: TestClient, engine: FakeEngineClient, tokenizer: Tokenizer, message: dict[str, object]
) -> None:
    chat(client, messages=[*QUESTION, message, *QUESTION])
    assert "<|im_start|>assistant\n<|im_end|>\n" in prompt_text(engine, tokenizer)


def test_usage_is_left_out_of_a_stream_unless_asked_for(client: TestClient) -> None:
    assert not any("usage" in chunk for chunk in chunks(client))


def test_usage_comes_last_when_asked_for(client: TestClient) -> None:
    events = chunks(client, stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == chat(client)["usage"]


def test_every_choice_opens_and_closes_once(client: TestClient) -> None:
    choices = [chunk["choices"][0] for chunk in chunks(client, n=2)]
    for index in range(2):
        own = [choice for choice in choices if choice["index"] == index]
        assert sum("role" in choice["delta"] for choice in own) == 1
        assert sum(choice["finish_reason"] is not None for choice in own) == 1


def test_the_default_is_all_that_fits(client: TestClient, engine: FakeEngineClient) -> None:
    chat(client)
    assert engine.requests[0].sampling.max_tokens == MAX_MODEL_LEN - len(engine.requests[0].prompt_token_ids)


def test_the_newer_name_of_the_limit_wins(client: TestClient) -> None:
    assert chat(client, max_tokens=9, max_completion_tokens=4)["usage"]["completion_tokens"] == 4


def test_logprobs_tell_tokens_and_their_bytes(client: TestClient) -> None:
    content = chat(client, logprobs=True, top_logprobs=2, max_completion_tokens=9)["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "I", "logprob": -1.5, "bytes": [73]},
        ],
    }
    # the ö is two tokens, each a part of its bytes
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "Hello wö"


def test_streamed_logprobs_are_those_of_the_whole_reply(client: TestClient) -> None:
    whole = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks(client, logprobs=True)]
    assert [token for logprobs in streamed if logprobs for token in logprobs["content"]] == whole


@pytest.mark.parametrize(
    "field",
    [
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"tools": None},
        {"tools": []},
        {"functions": []},
        {"metadata": {"a": "b"}},
        {"store": False},
        {"service_tier": "auto"},
        {"parallel_tool_calls": True},
    ],
)
def test_fields_that_change_nothing_are_taken(client: TestClient, field: dict[str, object]) -> None:
    assert chat(client, **field)["choices"][0]["message"]["content"] == ANSWER


def test_a_model_without_a_template_says_where_to_ask(client: TestClient) -> None:
    services = client.app.state.services  # type: ignore[attr-defined]
    object.__setattr__(services, "chat_template", None)
    response = client.post("/v1/chat/completions", json={"messages": QUESTION})
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]
