"""POST /v1/completions: what a completion holds, streamed or whole, from one prompt or many."""

import json
import time

import pytest
from fastapi.testclient import TestClient

from server.text.tokenizer import Tokenizer
from tests.server.api.conftest import ANSWER, MAX_MODEL_LEN, MODEL_NAME
from tests.server.api.fake_engine import FakeEngineClient
from tests.tiny_models import IM_END_ID, VOCAB_SIZE

NUM_ANSWER_TOKENS = len(ANSWER.encode()) + 1

Json = dict[str, object]


def complete(client: TestClient, **body: object):  # noqa: ANN201 - the reply is whatever JSON says
    response = client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 100, **body})
    assert response.status_code == 200, response.text
    return response.json()


def frames(client: TestClient, **body: object) -> list:  # type: ignore[type-arg]
    response = client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 100, "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_completion_has_openais_shape(client: TestClient) -> None:
    reply = complete(client)
    assert reply["id"].startswith("cmpl-")
    assert (reply["object"], reply["model"]) == ("text_completion", MODEL_NAME)
    assert reply["choices"] == [{"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}]
    total = 2 + NUM_ANSWER_TOKENS
    assert reply["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": NUM_ANSWER_TOKENS,
        "total_tokens": total,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_usage_says_how_much_of_each_prompt_no_choice_had_to_compute(
    client: TestClient, engine: FakeEngineClient
) -> None:
    # given two prompts: of the first, one choice computes all and the other finds 3 tokens; of the second both find 2
    engine.cached_tokens = [0, 3, 2, 2]
    reply = complete(client, prompt=["abcd", "abc"], n=2, temperature=1)
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 0 + 2}


def test_a_salt_keeps_a_request_to_itself(client: TestClient, engine: FakeEngineClient) -> None:
    for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "a"}):
        complete(client, **salt)
    plain, first, second, again = (request.cache_salt for request in engine.requests)
    assert first == again
    assert len({plain, first, second}) == 3


@pytest.mark.parametrize("body", [{}, {"stop": [". And"]}, {"max_tokens": 9}, {"echo": True}, {"logprobs": 2}])
def test_a_stream_joins_to_the_whole_reply(client: TestClient, body: Json) -> None:
    whole = complete(client, **body)["choices"][0]
    streamed = [frame["choices"][0] for frame in frames(client, **body)]
    assert "".join(choice["text"] for choice in streamed) == whole["text"]
    assert [choice["finish_reason"] for choice in streamed[:-1]] == [None] * (len(streamed) - 1)
    assert streamed[-1]["finish_reason"] == whole["finish_reason"]
    if whole["logprobs"] is not None:
        for name, values in whole["logprobs"].items():
            assert [value for choice in streamed for value in choice["logprobs"][name]] == values


@pytest.mark.parametrize("tokens_per_event", [2, 3, 7, 100])
def test_the_text_does_not_depend_on_how_tokens_come(
    client: TestClient, engine: FakeEngineClient, tokens_per_event: int
) -> None:
    expected = complete(client, stop=["r 🙂"], logprobs=1)
    engine.tokens_per_event = tokens_per_event
    reply = complete(client, stop=["r 🙂"], logprobs=1)
    assert (reply["choices"], reply["usage"]) == (expected["choices"], expected["usage"])


def test_characters_that_span_tokens_come_whole(client: TestClient) -> None:
    texts = [frame["choices"][0]["text"] for frame in frames(client)]
    assert "".join(texts) == ANSWER
    assert not any("\ufffd" in text for text in texts)


def test_one_stream_has_one_id_and_one_time(client: TestClient) -> None:
    assert len({(frame["id"], frame["created"], frame["model"]) for frame in frames(client)}) == 1


def test_usage_is_left_out_of_a_stream_unless_asked_for(client: TestClient) -> None:
    assert not any("usage" in frame for frame in frames(client))


def test_usage_comes_last_when_asked_for(client: TestClient) -> None:
    events = frames(client, stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == complete(client)["usage"]


def test_usage_comes_with_every_frame_when_asked_for(client: TestClient) -> None:
    events = frames(client, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == NUM_ANSWER_TOKENS


def test_a_stop_string_ends_the_text_before_it_and_aborts(client: TestClient, engine: FakeEngineClient) -> None:
    reply = complete(client, stop="! Stop")
    assert reply["choices"][0]["text"] == ANSWER.partition("! Stop")[0]
    assert reply["choices"][0]["finish_reason"] == "stop"
    # what the engine did beyond the match is not billed
    assert reply["usage"]["completion_tokens"] == len(f"{ANSWER.partition('! Stop')[0]}! Stop".encode())
    assert len(engine.aborted) == 1


def test_a_stop_string_stays_if_asked_for(client: TestClient) -> None:
    text = complete(client, stop=["rld"], include_stop_str_in_output=True)["choices"][0]["text"]
    assert text == "Hello wörld"


def test_stop_strings_wait_for_the_least_tokens(client: TestClient) -> None:
    text = complete(client, stop=["l"], min_tokens=6)["choices"][0]["text"]
    assert text == "Hello wör"


def test_a_token_that_ends_the_text_is_no_part_of_it(client: TestClient, tokenizer: Tokenizer) -> None:
    comma = tokenizer.encode(",", add_special_tokens=False)
    choice = complete(client, stop_token_ids=comma)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hello wörld", "stop")


def test_ignoring_the_end_of_text_goes_on(client: TestClient, engine: FakeEngineClient) -> None:
    engine.script = lambda _request: [IM_END_ID] * 5
    choice = complete(client, ignore_eos=True, max_tokens=3, skip_special_tokens=False)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("<|im_end|>" * 3, "length")


def test_the_default_is_sixteen_tokens(client: TestClient) -> None:
    assert complete(client, max_tokens=None)["usage"]["completion_tokens"] == 16


def test_many_prompts_and_choices_are_numbered_in_order(client: TestClient, engine: FakeEngineClient) -> None:
    # given an engine that repeats the prompt
    engine.script = lambda request: request.prompt_token_ids
    reply = complete(client, prompt=["one", "two", "three"], n=2, temperature=1.0)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3, 4, 5]
    assert [choice["text"] for choice in reply["choices"]] == ["one", "one", "two", "two", "three", "three"]
    # each prompt counts once
    assert reply["usage"]["prompt_tokens"] == 3 + 3 + 5


def test_choices_of_a_stream_interleave_and_each_ends_once(client: TestClient) -> None:
    choices = [frame["choices"][0] for frame in frames(client, n=3, temperature=1.0)]
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == ANSWER
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [97, 98], [[97, 98]]])
def test_every_form_of_a_prompt_reaches_the_engine(
    client: TestClient, engine: FakeEngineClient, tokenizer: Tokenizer, prompt: object
) -> None:
    if not isinstance(prompt, str) and not isinstance(prompt[0], str):  # type: ignore[index]
        ids = tokenizer.encode("ab", add_special_tokens=False)
        prompt = [ids] if isinstance(prompt[0], list) else ids  # type: ignore[index]
    complete(client, prompt=prompt)
    assert list(engine.requests[0].prompt_token_ids) == tokenizer.encode("ab", add_special_tokens=False)


def test_echo_with_logprobs_is_what_lm_eval_reads(
    client: TestClient, tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    # given its loglikelihood request: token ids, one token, greedy
    ids = tokenizer.encode("a€ b", add_special_tokens=False)
    body = {"prompt": [ids, ids[:3]], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    reply = complete(client, **body)
    # then each list has the prompt's tokens and one more, and the first has no number
    for choice, prompt in zip(reply["choices"], body["prompt"], strict=True):
        logprobs = choice["logprobs"]
        assert {name: len(values) for name, values in logprobs.items()} == dict.fromkeys(logprobs, len(prompt) + 1)
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        # "is greedy" is exact equality with the best
        assert logprobs["token_logprobs"][1:] == [max(top.values()) for top in logprobs["top_logprobs"][1:]]
    assert engine.requests[0].prompt_token_ids == tuple(ids)
    assert reply["choices"][0]["text"] == "a€ bH"
    assert reply["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1, 1, 2, 3, 4]


def test_echo_without_output_gives_the_prompt_alone(client: TestClient) -> None:
    reply = complete(client, prompt="abc", echo=True, max_tokens=0, logprobs=0)
    choice = reply["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert reply["usage"]["completion_tokens"] == 0


def test_logprobs_of_zero_still_tell_the_chosen_token(client: TestClient) -> None:
    logprobs = complete(client, logprobs=0, max_tokens=3)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["H", "e", "l"]
    assert logprobs["top_logprobs"] == [{"H": -0.5}, {"e": -0.5}, {"l": -0.5}]


def test_logprobs_made_beside_the_event_loop_are_the_same(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    here = complete(client, logprobs=3, echo=True)["choices"]
    # given that everything counts as long
    monkeypatch.setattr("server.api.prompt.LONG_TEXT_CHARACTERS", 0)
    assert complete(client, logprobs=3, echo=True)["choices"] == here


def test_logprobs_end_where_a_stop_string_cut_the_text(client: TestClient) -> None:
    logprobs = complete(client, logprobs=0, stop=["lo"])["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "Hel"


def test_a_seed_gives_each_choice_its_own(client: TestClient, engine: FakeEngineClient) -> None:
    complete(client, seed=7, n=3, temperature=1.0)
    assert [request.sampling.seed for request in engine.requests] == [7, 8, 9]


@pytest.mark.parametrize("seed", [None, -1])
def test_no_seed_is_drawn_anew(client: TestClient, engine: FakeEngineClient, seed: int | None) -> None:
    complete(client, seed=seed)
    complete(client, seed=seed)
    first, second = (request.sampling.seed for request in engine.requests)
    assert first != second
    assert min(first, second) >= 0


def test_sampling_fields_reach_the_engine(client: TestClient, engine: FakeEngineClient) -> None:
    fields = {
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "min_tokens": 2,
    }
    complete(client, **fields, logit_bias={"5": -100, "6": 1.5}, stop_token_ids=[9])
    sampling = engine.requests[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.logit_bias == ((5, -100.0), (6, 1.5))
    assert sampling.stop_token_ids == (IM_END_ID, 9)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_priority_and_time_reach_the_engine(client: TestClient, engine: FakeEngineClient, path: str) -> None:
    body = {"prompt": "ab", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    before = time.monotonic()
    assert client.post(path, json={**body, "priority": -3, "timeout": 60}).status_code == 200
    assert client.post(path, json=body).status_code == 200
    urgent, plain = engine.requests
    assert (urgent.priority, plain.priority) == (-3, 0)
    assert urgent.deadline is not None
    assert before + 60 <= urgent.deadline <= time.monotonic() + 60
    assert plain.deadline is None


def test_null_means_the_same_as_leaving_out(client: TestClient, engine: FakeEngineClient) -> None:
    names = [
        *("model", "max_tokens", "n", "best_of", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "echo", "stop", "stop_token_ids"),
        *("include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens", "seed", "stream"),
        *("stream_options", "user", "suffix", "response_format", "prompt_logprobs"),
    ]
    assert client.post("/v1/completions", json={"prompt": "ab", **dict.fromkeys(names)}).status_code == 200
    client.post("/v1/completions", json={"prompt": "ab"})
    first, second = ({**vars(request.sampling), "seed": 0} for request in engine.requests)
    assert first == second


def test_unknown_fields_are_ignored_and_counted(client: TestClient) -> None:
    complete(client, detokenize=True, some_new_field=3, **{"odd name!": 1})
    metrics = client.get("/metrics").text
    assert 'awq_serve_unknown_request_fields_total{field="detokenize"} 1.0' in metrics
    assert 'awq_serve_unknown_request_fields_total{field="other"} 2.0' in metrics


def test_the_largest_prompt_that_fits_is_taken(client: TestClient) -> None:
    reply = complete(client, prompt="x" * (MAX_MODEL_LEN - 1), max_tokens=None)
    assert reply["usage"] == {
        "prompt_tokens": MAX_MODEL_LEN - 1,
        "completion_tokens": 1,
        "total_tokens": MAX_MODEL_LEN,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_the_last_token_of_the_vocabulary_is_taken(client: TestClient) -> None:
    complete(client, prompt=[VOCAB_SIZE - 1], logit_bias={str(VOCAB_SIZE - 1): 1})
