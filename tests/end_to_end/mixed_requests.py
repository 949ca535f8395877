"""Two hundred requests of every kind, and what an answer to one is made of: all that a client can compare."""

import asyncio
import json
from dataclasses import dataclass
from typing import TypedDict

import httpx

from tests.end_to_end.running_server import RunningServer

NUM_REQUESTS = 200
# tokens of a byte each: less than a block of the cache, several, and more than a step takes of one prompt on a CPU
PREFIXES = ("", "You are a helpful clerk who answers in verse. ", "The rules of the house are these. " * 9)
NUM_TOP = 3


class Logprobs(TypedDict):
    """Those of either route, in one form."""

    tokens: list[str]
    logprobs: list[float]
    tops: list[dict[str, float]]


@dataclass(frozen=True)
class Answer:
    """tokens, logprobs and tops have an entry a token; a top holds the likeliest tokens' log-probabilities."""

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    tops: tuple[dict[str, float], ...]
    finish_reason: str


def is_chat(index: int) -> bool:
    return index % 2 == 1


def is_greedy(index: int) -> bool:
    return index % 3 == 0


def body_of(index: int) -> dict[str, object]:
    """Completions and chats, streamed or not, greedy or seeded in several ways, of 1 to 15 tokens."""
    prompt = f"{PREFIXES[index // 2 % 3]}{index % 7} apples" + " and pears" * (index % 5)
    # both cases are often the same: some prompts are asked more than once
    body: dict[str, object] = {"max_tokens": 1 + index * 5 % 15, "ignore_eos": True, "stream": index // 4 % 2 == 0}
    if is_chat(index):
        body |= {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": NUM_TOP}
    else:
        body |= {"prompt": prompt, "logprobs": NUM_TOP}
    if is_greedy(index):
        return {**body, "temperature": 0, "repetition_penalty": 1.0 + index % 2 / 5}
    ways: list[dict[str, object]] = [{}, {"top_p": 0.9}, {"top_k": 20, "min_p": 0.01}, {"presence_penalty": 0.5}]
    return {**body, "temperature": 0.8, "seed": index, **ways[index % 4]}


def ask_one_by_one(server: RunningServer) -> list[Answer]:
    async def ask_all() -> list[Answer]:
        async with _client(server) as client:
            return [await _ask(client, index) for index in range(NUM_REQUESTS)]

    return asyncio.run(ask_all())


def ask_at_once(server: RunningServer) -> list[Answer]:
    async def ask_all() -> list[Answer]:
        async with _client(server) as client:
            return list(await asyncio.gather(*(_ask(client, index) for index in range(NUM_REQUESTS))))

    return asyncio.run(ask_all())


def _client(server: RunningServer) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=240, limits=httpx.Limits(max_connections=None))


async def _ask(client: httpx.AsyncClient, index: int) -> Answer:
    route = "/v1/chat/completions" if is_chat(index) else "/v1/completions"
    response = await client.post(route, json=body_of(index))
    assert response.status_code == httpx.codes.OK, response.text
    if response.headers["content-type"] == "application/json":
        pieces = [response.json()]
    else:
        frames = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert frames[-1] == "[DONE]"
        pieces = [json.loads(frame) for frame in frames[:-1]]
    return _join([piece["choices"][0] for piece in pieces])


def _join(choices: list[dict[str, object]]) -> Answer:
    texts: list[str] = []
    joined: Logprobs = {"tokens": [], "logprobs": [], "tops": []}
    for choice in choices:
        message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
        assert isinstance(message, dict)
        texts.append(message.get("content") or "")
        logprobs = choice.get("logprobs")
        assert logprobs is None or isinstance(logprobs, dict)
        if logprobs is None:
            continue
        if "content" in logprobs:
            entries = logprobs["content"]
            # the bytes name a token whose text is broken
            joined["tokens"] += [f"{entry['token']} {entry['bytes']}" for entry in entries]
            joined["logprobs"] += [entry["logprob"] for entry in entries]
            joined["tops"] += [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries]
        else:
            joined["tokens"] += logprobs["tokens"]
            joined["logprobs"] += logprobs["token_logprobs"]
            joined["tops"] += logprobs["top_logprobs"]
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert len(reasons) == 1
    return Answer(
        "".join(texts), tuple(joined["tokens"]), tuple(joined["logprobs"]), tuple(joined["tops"]), str(reasons[0])
    )
