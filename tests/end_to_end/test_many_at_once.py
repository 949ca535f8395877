"""Many requests at once: each gets what it would get alone, and what is cancelled gives its blocks back."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.end_to_end.running_server import RunningServer, wait_until

pytestmark = pytest.mark.real_model

SUBJECTS = (
    "rivers", "music", "bread", "stars", "trains", "bees", "glass", "winter",
    "salt", "maps", "clocks", "paper", "dogs", "islands", "chess", "gold",
)  # fmt: skip


@dataclass(frozen=True)
class GreedyTokens:
    """A greedy continuation: its tokens, and at each step how far the best was ahead of the next, to the last bit."""

    tokens: tuple[str, ...]
    margins: tuple[float, ...]


def prompt_and_length(index: int) -> tuple[str, int]:
    """Prompts of 8 to 160 tokens, continuations of 12 to 57: no two requests of a batch move in step."""
    subject = SUBJECTS[index]
    return f"A short note about {subject}. " * (
        1 + 20 * index // 16
    ) + f"The history of {subject} begins", 12 + 3 * index


async def stream_greedily(server: RunningServer, index: int) -> GreedyTokens:
    prompt, length = prompt_and_length(index)
    tokens: list[str] = []
    margins: list[float] = []
    async with server.async_client() as client:
        stream = await client.completions.create(
            model="demo", prompt=prompt, max_tokens=length, temperature=0, logprobs=2, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        async for chunk in stream:
            logprobs = chunk.choices[0].logprobs
            if logprobs is None:
                continue
            assert logprobs.tokens is not None
            assert logprobs.top_logprobs is not None
            tokens += logprobs.tokens
            for top in logprobs.top_logprobs:
                best = sorted((top or {}).values(), reverse=True)
                margins.append(best[0] - best[1] if len(best) > 1 else 0.0)
    assert len(tokens) == length
    return GreedyTokens(tuple(tokens), tuple(margins))


def test_sixteen_streams_each_equal_what_they_give_alone(
    quantized_demo: Path, tmp_path: Path, start: Callable[..., RunningServer]
) -> None:
    server = start(quantized_demo, tmp_path, "--served-model-name", "demo", "--deterministic")

    async def run() -> tuple[list[GreedyTokens], list[GreedyTokens]]:
        alone = [await stream_greedily(server, index) for index in range(16)]
        together = await asyncio.gather(*(stream_greedily(server, index) for index in range(16)))
        return alone, list(together)

    alone, together = asyncio.run(run())

    assert together == alone


def test_the_second_turn_of_a_chat_reads_the_first_from_the_cache(server: RunningServer) -> None:
    client = server.client()
    turns: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name three rivers, and say where."}]
    first = client.chat.completions.create(model="demo", messages=turns, max_tokens=24, temperature=0)
    assert first.usage is not None
    turns += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And three more?"},
    ]

    second = client.chat.completions.create(model="demo", messages=turns, max_tokens=4, temperature=0)

    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    # all whole blocks of 32 tokens that the first turn had asked and answered
    assert cached is not None
    assert first.usage.prompt_tokens // 32 * 32 <= cached < second.usage.prompt_tokens
    assert cached > 0


def test_cancelling_half_of_sixteen_streams_returns_every_block(server: RunningServer) -> None:
    wait_until(lambda: server.metric("num_requests_running") == 0, 30)

    async def cancel_after_three(index: int) -> None:
        async with server.async_client() as client:
            stream = await client.completions.create(
                model="demo", prompt=prompt_and_length(index)[0], max_tokens=400, temperature=0, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            num_chunks = 0
            async for _ in stream:
                num_chunks += 1
                if num_chunks == 3:
                    await stream.close()
                    return

    async def run() -> list[GreedyTokens | None]:
        cancelled = [cancel_after_three(index) for index in range(0, 16, 2)]
        finished = [stream_greedily(server, index) for index in range(1, 16, 2)]
        return list(await asyncio.gather(*cancelled, *finished))

    results = asyncio.run(run())

    assert sum(result is not None for result in results) == 8
    wait_until(lambda: server.metric("num_requests_running") == 0, 30)
    wait_until(lambda: server.metric("kv_cache_usage_perc") == 0, 30)
