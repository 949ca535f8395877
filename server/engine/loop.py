"""The engine's loop: plan, execute, apply. Runs in one thread or process; knows no transport."""

import time
from collections.abc import Callable

from server.engine.admission import check_request
from server.engine.out_of_memory import execute_within_memory
from server.engine.request import EngineNews, FinishReason, GenerationRequest, ModelInfo, TokenEvent
from server.engine.scheduler import Scheduler
from server.engine.step_plan import StepPlan, StepRunner
from server.engine.structured_output import GrammarBackend, start_guide
from server.errors import ServerError

Publish = Callable[[EngineNews], None]
Clock = Callable[[], float]


class EngineLoop:
    """Whoever drives it calls submit and abort between steps, so both take effect at one point of the step."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        model: ModelInfo,
        publish: Publish,
        clock: Clock = time.monotonic,
        grammars: GrammarBackend | None = None,
    ) -> None:
        """clock: the seconds that deadlines of requests are measured by. grammars: for structured output."""
        self._scheduler = scheduler
        self._runner = runner
        self._model = model
        self._publish = publish
        self._clock = clock
        self._grammars = grammars

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; one that could never run ends at once, with the reason."""
        try:
            check_request(request, self._model)
            structure = request.sampling.structure
            guide = None if structure is None else start_guide(structure, self._grammars, self._model.vocab_size)
        except ServerError as error:
            self._publish_event(
                TokenEvent(request.request_id, (), finish_reason=FinishReason.ERROR, error=error.message)
            )
            return
        self._scheduler.add(request, guide)

    def abort(self, request_id: str) -> None:
        """End a request now and free its blocks. One that has ended already is nobody's loss."""
        event = self._scheduler.abort(request_id)
        if event is not None:
            self._publish_event(event)

    def step(self) -> None:
        """End the requests whose time is over, then run one step, if there is anything to do."""
        events = self._scheduler.expire(self._clock())
        plan = self._scheduler.plan_step()
        if plan is not None:
            if plan.started:
                # said before the model runs: after a crash nobody retries what may have caused it
                self._publish(EngineNews(plan.started, (), self._scheduler.stats()))
            events += self._execute(plan)
        if plan is not None or events:
            self._publish(EngineNews((), tuple(events), self._scheduler.stats()))

    def _execute(self, plan: StepPlan) -> list[TokenEvent]:
        """What came out of a step; where it ran out of memory it is taken back, and the next one is smaller."""
        result = execute_within_memory(self._runner, plan)
        return self._scheduler.take_back(plan) if result is None else self._scheduler.apply(plan, result)

    def publish_stats(self) -> None:
        """Say that the engine lives, when no step does."""
        self._publish(EngineNews((), (), self._scheduler.stats()))

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()

    def _publish_event(self, event: TokenEvent) -> None:
        self._publish(EngineNews((), (event,), self._scheduler.stats()))
