"""Random requests without end for a simulated engine: arrivals, aborts, deadlines, and a device short of memory."""

import random
from dataclasses import dataclass, replace

from server.engine.request import FinishReason, GenerationRequest
from server.engine.waiting_queue import OVERTAKING_BOUND
from tests.server.engine.simulation import Simulation, random_request

# as many as a server lets wait; more would wait in the client
MAX_WAITING = 40
STEPS_BETWEEN_CHECKS = 8


@dataclass
class Journey:
    """One request's way through the engine. num_older: how many were under way when it came."""

    request: GenerationRequest
    num_older: int
    num_started_before: int
    num_preemptions_before: int
    was_aborted: bool = False
    ended_at: float = 0.0
    finish_reason: FinishReason | None = None


def serve_crowd(engine: Simulation, rng: random.Random, num_requests: int) -> list[Journey]:
    """Serve so many to the end, one step a tick of the clock, and check what must hold all the while."""
    crowd = _Crowd(engine, rng)
    while len(crowd.journeys) < num_requests or engine.loop.has_work:
        crowd.bring(num_requests)
        crowd.disturb()
        engine.now += 1
        engine.loop.step()
        crowd.note_news()
        if engine.now % STEPS_BETWEEN_CHECKS == 0:
            engine.loop.check_integrity()
    engine.loop.check_integrity()
    return crowd.journeys


class _Crowd:
    def __init__(self, engine: Simulation, rng: random.Random) -> None:
        self._engine = engine
        self._rng = rng
        self.journeys: list[Journey] = []
        self._under_way: dict[str, Journey] = {}
        self._num_seen_started = self._num_preemptions = 0
        self._max_open = engine.limits.max_num_seqs + MAX_WAITING

    def bring(self, num_requests: int) -> None:
        """A few new requests, as long as there is room to wait."""
        engine = self._engine
        while len(self.journeys) < num_requests and len(self._under_way) < self._max_open and self._rng.random() < 0.6:
            request = random_request(self._rng, f"r{len(self.journeys)}")
            patience = self._rng.choice((None, None, None, None, self._rng.randint(1, 30), self._rng.randint(30, 900)))
            if patience is not None:
                request = replace(request, deadline=engine.now + patience)
            journey = Journey(request, len(self._under_way), len(engine.started), self._num_preemptions)
            self.journeys.append(journey)
            self._under_way[request.request_id] = journey
            engine.loop.submit(request)

    def disturb(self) -> None:
        """Now and then a client leaves, or the device has no memory for a step that it could take before."""
        if self._under_way and self._rng.random() < 0.05:
            journey = self._rng.choice(list(self._under_way.values()))
            journey.was_aborted = True
            self._engine.loop.abort(journey.request.request_id)
        if self._rng.random() < 0.02:
            limits = self._engine.limits
            # what the smallest step takes is always there
            least = limits.prefill_chunk or 1
            # mostly not much more: the steps are seldom as large as they may be
            memory = least + int((limits.max_num_batched_tokens - least) * self._rng.random() ** 3)
            self._engine.runner.memory_tokens = self._rng.choice((None, None, None, memory))

    def note_news(self) -> None:
        engine = self._engine
        self._num_preemptions = engine.scheduler.stats().num_preemptions
        for number in range(self._num_seen_started, len(engine.started)):
            journey = self._under_way[engine.started[number]]
            # of so many starts in a row one is of whoever has waited longest, who may be preempted and start again
            num_older = journey.num_older + self._num_preemptions - journey.num_preemptions_before
            assert number - journey.num_started_before <= (num_older + 1) * (OVERTAKING_BOUND + 1)
        self._num_seen_started = len(engine.started)
        for request_id in engine.ended:
            journey = self._under_way.pop(request_id)
            journey.ended_at = engine.now
            journey.finish_reason = engine.events[request_id][-1].finish_reason
        engine.ended.clear()
