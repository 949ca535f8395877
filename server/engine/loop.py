"""The engine's loop: plan, execute, apply. Runs in one thread or process; knows no transport."""

from collections.abc import Callable

from server.engine.admission import check_request
from server.engine.request import EngineNews, FinishReason, GenerationRequest, ModelInfo, TokenEvent
from server.engine.scheduler import Scheduler
from server.engine.step_plan import StepRunner
from server.errors import ServerError

Publish = Callable[[EngineNews], None]


class EngineLoop:
    """Whoever drives it calls submit and abort between steps, so both take effect at one point of the step."""

    def __init__(self, scheduler: Scheduler, runner: StepRunner, model: ModelInfo, publish: Publish) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._model = model
        self._publish = publish

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; one that could never run ends at once, with the reason."""
        try:
            check_request(request, self._model)
        except ServerError as error:
            self._publish_event(
                TokenEvent(request.request_id, (), finish_reason=FinishReason.ERROR, error=error.message)
            )
            return
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request now and free its blocks. One that has ended already is nobody's loss."""
        event = self._scheduler.abort(request_id)
        if event is not None:
            self._publish_event(event)

    def step(self) -> None:
        """Run one step, if there is anything to do."""
        plan = self._scheduler.plan_step()
        if plan is None:
            return
        if plan.started:
            # said before the model runs: after a crash nobody retries what may have caused it
            self._publish(EngineNews(plan.started, (), self._scheduler.stats()))
        result = self._runner.execute(plan)
        events = self._scheduler.apply(plan, result)
        self._publish(EngineNews((), tuple(events), self._scheduler.stats()))

    def publish_stats(self) -> None:
        """Say that the engine lives, when no step does."""
        self._publish(EngineNews((), (), self._scheduler.stats()))

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()

    def _publish_event(self, event: TokenEvent) -> None:
        self._publish(EngineNews((), (event,), self._scheduler.stats()))
