"""The main job: a real model is quantized, served and asked, through the real program and the openai client."""

import httpx
import openai
import pytest

from tests.end_to_end.running_server import RunningServer

pytestmark = pytest.mark.real_model


def test_a_completion_answers_in_good_english(server: RunningServer) -> None:
    completion = server.client().completions.create(
        model="demo", prompt="The capital of France is", max_tokens=8, temperature=0
    )
    assert completion.choices[0].text.startswith(" Paris")
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 8


def test_a_chat_knows_the_capital_of_france(server: RunningServer) -> None:
    chat = server.client().chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=32,
        temperature=0,
    )
    assert "Paris" in (chat.choices[0].message.content or "")
    assert chat.choices[0].finish_reason == "stop"


def test_a_stream_joins_to_the_reply_that_is_not_streamed(server: RunningServer) -> None:
    client = server.client()
    whole = client.completions.create(model="demo", prompt="The sun rises in", max_tokens=24, temperature=0)
    chunks = list(
        client.completions.create(
            model="demo",
            prompt="The sun rises in",
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len(chunks) > 2
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    usage = chunks[-1].usage
    # but for what of the prompt was computed before: all that can be, by then
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_a_seeded_draw_repeats_and_another_seed_differs(server: RunningServer) -> None:
    def draw(seed: int) -> str:
        completion = server.client().completions.create(
            model="demo", prompt="Once upon a time", max_tokens=24, temperature=1.0, seed=seed
        )
        return completion.choices[0].text

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_echo_with_logprobs_scores_the_prompt(server: RunningServer) -> None:
    completion = server.client().completions.create(
        model="demo", prompt="The capital of France is Paris", max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == completion.choices[0].text
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])
    # " Paris" is the last token of the prompt, and a model that reads it well expects it
    assert logprobs.token_logprobs[-2] is not None
    assert logprobs.token_logprobs[-2] > -2.5


def test_a_wrong_request_is_told_what_is_wrong(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        server.client().completions.create(model="demo", prompt="x", temperature=3.0)
    assert refusal.value.param == "temperature"
    assert "temperature" in refusal.value.message


def test_a_prompt_that_is_too_long_is_told_the_numbers(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        server.client().completions.create(model="demo", prompt="word " * 2000, max_tokens=8)
    assert refusal.value.code == "context_length_exceeded"
    assert "1024" in refusal.value.message


def test_an_unknown_model_is_not_found(server: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        server.client().completions.create(model="no-such-model", prompt="x")
    assert refusal.value.code == "model_not_found"


def test_the_model_list_and_the_probes_answer(server: RunningServer) -> None:
    assert "demo" in [model.id for model in server.client().models.list()]
    for route in ("/health", "/live", "/ready", "/version", "/metrics"):
        assert httpx.get(f"{server.url}{route}").status_code == httpx.codes.OK
