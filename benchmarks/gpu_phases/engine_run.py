"""The engine's loop in this process, stepped by hand, around a model that is on the device already."""

import random
import time
from dataclasses import dataclass

from benchmarks.errors import BenchmarkError
from benchmarks.gpu_phases.bench import Bench
from server.engine.assembly import wire_engine
from server.engine.config import EngineConfig
from server.engine.kernel_choice import KernelChoice
from server.engine.kv_cache import KvGeometry, choose_size
from server.engine.request import EngineNews, GenerationRequest, SamplingDefaults, SamplingParams
from server.engine.runner_setup import choose_recorder
from server.model.loader import LoadedModel

# blocks are whole, and a sequence may need one more than its tokens fill
SPARE_TOKENS = 128
NO_PATH = "random weights"
# for one block of any model
ENOUGH_BYTES = 2**30


@dataclass(frozen=True)
class EngineSpeeds:
    """prompt_tokens_per_second: until every request has its first token."""

    prompt_tokens_per_second: float
    decode_tokens_per_second: float


def engine_block_size(bench: Bench, model: LoadedModel) -> int:
    """How many tokens a block of the engine's cache holds on the device."""
    config = model.config
    geometry = KvGeometry(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=model.decoder.embedding.dtype,
        max_model_len=config.max_position_embeddings,
    )
    settings = EngineConfig(model_path=NO_PATH, max_model_len=1, max_num_seqs=1, kv_cache_bytes=ENOUGH_BYTES)
    return choose_size(settings, geometry, bench.device).block_size


class EngineRun:
    """An engine for so many sequences of so many tokens each, as the server starts it: compiled, decoding recorded."""

    def __init__(self, bench: Bench, model: LoadedModel, max_streams: int, max_tokens: int) -> None:
        config = model.config
        kv_width = 2 * config.num_kv_heads * config.head_dim * model.decoder.embedding.element_size()
        settings = EngineConfig(
            model_path=NO_PATH,
            max_model_len=max_tokens,
            max_num_seqs=max_streams,
            kv_cache_bytes=max_streams * (max_tokens + SPARE_TOKENS) * config.num_layers * kv_width,
        )
        self._loop, _ = wire_engine(
            settings,
            model,
            bench.device,
            KernelChoice(None, "triton"),
            SamplingDefaults(),
            self._count,
            recorder=choose_recorder(settings, bench.device),
        )
        self._vocab_size, self._max_tokens = config.vocab_size, max_tokens
        self._num_tokens: dict[str, int] = {}
        self._num_runs = 0

    def run(self, num_streams: int, prompt_tokens: int, decode_steps: int) -> EngineSpeeds:
        """Read as many prompts, then decode all of them for so many steps; greedy, prompts that share nothing."""
        requests = self._requests(num_streams, prompt_tokens)
        started = time.perf_counter()
        for request in requests:
            self._loop.submit(request)
        while min(self._num_tokens.values()) < 1:
            self._step()
        prompt_seconds = time.perf_counter() - started
        num_before = sum(self._num_tokens.values())
        started = time.perf_counter()
        for _ in range(decode_steps):
            self._step()
        decode_seconds = time.perf_counter() - started
        num_decoded = sum(self._num_tokens.values()) - num_before
        for request in requests:
            self._loop.abort(request.request_id)
        return EngineSpeeds(num_streams * prompt_tokens / prompt_seconds, num_decoded / decode_seconds)

    def _requests(self, num_streams: int, prompt_tokens: int) -> list[GenerationRequest]:
        self._num_runs += 1
        source = random.Random(self._num_runs)
        # none ends before the run does
        sampling = SamplingParams(max_tokens=self._max_tokens - prompt_tokens, temperature=0.0)
        requests = [
            GenerationRequest(
                f"{self._num_runs}-{index}", tuple(source.choices(range(self._vocab_size), k=prompt_tokens)), sampling
            )
            for index in range(num_streams)
        ]
        self._num_tokens = {request.request_id: 0 for request in requests}
        return requests

    def _step(self) -> None:
        if not self._loop.has_work:
            raise BenchmarkError("the engine ended its requests before the run was over")
        self._loop.step()

    def _count(self, news: EngineNews) -> None:
        for event in news.events:
            if event.error is not None:
                raise BenchmarkError(f"the engine failed a request: {event.error}")
            self._num_tokens[event.request_id] += len(event.token_ids)
