"""An engine without a model whose loop and clock a test drives by hand, and requests for it."""

import random
from collections import defaultdict
from dataclasses import dataclass, field

import pytest

from server.engine.block_pool import BlockPool
from server.engine.loop import EngineLoop
from server.engine.request import EngineNews, FinishReason, GenerationRequest, SamplingParams, TokenEvent
from server.engine.scheduler import Scheduler, SchedulerLimits
from tests.fakes import FAKE_VOCAB_SIZE, FakeRunner, fake_model_info

MAX_MODEL_LEN = 60


@dataclass
class Simulation:
    """One engine with its loop driven by hand, and everything it said."""

    num_blocks: int
    block_size: int
    limits: SchedulerLimits
    runner_type: type[FakeRunner] = FakeRunner
    now: float = 0.0
    started: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    events: dict[str, list[TokenEvent]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, self.block_size)
        self.scheduler = Scheduler(self.limits, self.pool)
        self.runner = self.runner_type(self.num_blocks, self.block_size)
        info = fake_model_info(max_model_len=MAX_MODEL_LEN, num_blocks=self.num_blocks, block_size=self.block_size)
        self.loop = EngineLoop(self.scheduler, self.runner, info, self._take, clock=lambda: self.now)

    def _take(self, news: EngineNews) -> None:
        self.started.extend(news.started)
        for event in news.events:
            self.events[event.request_id].append(event)
            if event.finish_reason is not None:
                self.ended.append(event.request_id)

    def run_to_end(self, max_steps: int = 20_000) -> None:
        for _ in range(max_steps):
            if not self.loop.has_work:
                return
            self.loop.step()
            self.loop.check_integrity()
        pytest.fail(f"still busy after {max_steps} steps: {self.scheduler.stats()}")

    def output(self, request_id: str) -> tuple[int, ...]:
        return tuple(token for event in self.events[request_id] for token in event.token_ids)

    def finish_reasons(self, request_id: str) -> list[FinishReason]:
        return [event.finish_reason for event in self.events[request_id] if event.finish_reason is not None]


def simulation(
    *, num_blocks: int = 16, block_size: int = 4, max_num_seqs: int = 8, budget: int = 24, chunk: int | None = None
) -> Simulation:
    return Simulation(num_blocks, block_size, SchedulerLimits(max_num_seqs, budget, chunk))


_STOP_TOKENS = [tuple(random.Random(0).sample(range(FAKE_VOCAB_SIZE), k=count)) for count in (0, 0, 10, 40)]


def random_request(rng: random.Random, request_id: str) -> GenerationRequest:
    """Half of the prompts begin alike; of those, some are for one tenant and some for another."""
    num_prompt = rng.choice((1, 2, 3, 4, 5, 8, 17, 31, 40))
    max_tokens = rng.randint(1, MAX_MODEL_LEN - num_prompt)
    num_common = rng.choice((0, num_prompt // 2, num_prompt))
    return GenerationRequest(
        request_id,
        (*range(num_common), *rng.choices(range(FAKE_VOCAB_SIZE), k=num_prompt - num_common)),
        SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.randint(0, 4),
            stop_token_ids=rng.choice(_STOP_TOKENS),
            prompt_logprobs=rng.choice((None, None, None, None, 0, 2)),
        ),
        cache_salt=rng.choice(("", "tenant")),
        priority=rng.choice((0, 0, 0, -1, 3)),
        owner=rng.choice(("", "", "first", "second")),
    )


def request(request_id: str, num_prompt: int = 5, max_tokens: int = 6) -> GenerationRequest:
    prompt = tuple((7 * index + num_prompt) % FAKE_VOCAB_SIZE for index in range(num_prompt))
    return GenerationRequest(request_id, prompt, SamplingParams(max_tokens=max_tokens))
