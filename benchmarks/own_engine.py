"""Our side: the engine's loop in this process, stepped by hand, as the server's engine process steps it."""

import gc
import time
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.workload import MAX_SEQUENCE_TOKENS, MAX_SEQUENCES, MAX_STEP_TOKENS, Trial
from server.engine.assembly import SETUP_ERRORS, assemble_engine
from server.engine.config import EngineConfig
from server.engine.request import EngineNews, GenerationRequest, SamplingParams
from server.model.loader import ignore_load_progress


class OwnEngine:
    """A Side. What the engine publishes is counted; request ids are never used twice."""

    def __init__(self, checkpoint: Path, num_threads: int) -> None:
        """Raises BenchmarkError when the checkpoint cannot be loaded."""
        config = EngineConfig(
            str(checkpoint),
            device="cpu",
            max_model_len=MAX_SEQUENCE_TOKENS,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=MAX_STEP_TOKENS,
            num_threads=num_threads,
            # every trial computes all of its prompts, as the peer does
            prefix_caching=False,
        )
        self._num_tokens: dict[str, int] = {}
        self._num_trials = 0
        try:
            self._loop, self.model = assemble_engine(config, ignore_load_progress, self._count)
        except SETUP_ERRORS as error:
            raise BenchmarkError(f"our engine cannot load {checkpoint}: {error}") from error
        # as the engine's process does it
        gc.collect()
        gc.freeze()

    def run(self, trial: Trial) -> float:
        requests = self._requests_of(trial)
        self._num_tokens = {request.request_id: 0 for request in requests}
        start = time.perf_counter()
        for request in requests:
            self._loop.submit(request)
        self._step_until(1)
        if trial.decode_tokens:
            start = time.perf_counter()
            self._step_until(1 + trial.decode_tokens)
        return time.perf_counter() - start

    def _requests_of(self, trial: Trial) -> list[GenerationRequest]:
        self._num_trials += 1
        sampling = SamplingParams(max_tokens=1 + trial.decode_tokens, temperature=0.0)
        return [
            GenerationRequest(f"{self._num_trials}-{index}", prompt, sampling)
            for index, prompt in enumerate(trial.prompts)
        ]

    def _step_until(self, num_tokens: int) -> None:
        """Step until every request has so many tokens, and none has more: they go in step, or times mean nothing."""
        while min(self._num_tokens.values()) < num_tokens:
            if not self._loop.has_work:
                raise BenchmarkError(f"our engine ended a request before token {num_tokens}")
            self._loop.step()
        if max(self._num_tokens.values()) > num_tokens:
            raise BenchmarkError("our engine's sequences do not go in step: what was timed is not what is said")

    def _count(self, news: EngineNews) -> None:
        for event in news.events:
            if event.error is not None:
                raise BenchmarkError(f"our engine failed a request: {event.error}")
            self._num_tokens[event.request_id] += len(event.token_ids)
