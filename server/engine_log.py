"""The lives and deaths of the engine's process in the server's log: one line an event."""

import structlog

from server.engine.request import ModelInfo

log = structlog.get_logger(__name__)


class EngineLog:
    """A LifeListener."""

    def spawned(self, process_id: int) -> None:
        log.info("engine started", pid=process_id)

    def became_ready(self, process_id: int, model: ModelInfo) -> None:
        log.info("engine ready", pid=process_id, kernels=model.kernels)
        for note in model.adapter_notes:
            log.info("adapter", note=note)
        for doubt in model.adapter_doubts:
            log.warning("adapter in doubt", reason=doubt)

    def pulse_changed(self, process_id: int, *, is_alive: bool) -> None:
        if is_alive:
            log.info("engine answers again", pid=process_id)
        else:
            log.warning("engine gives no sign of life", pid=process_id)

    def ended(self, process_id: int, reason: str, num_lost_requests: int) -> None:
        log.error("engine ended", pid=process_id, reason=reason, lost_requests=num_lost_requests)

    def restarting(self, delay_seconds: float) -> None:
        log.warning("engine restarts", delay_seconds=delay_seconds)

    def given_up(self, reason: str) -> None:
        log.critical("engine given up", reason=reason)
