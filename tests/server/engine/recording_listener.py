"""Hears of the engine process's life and death, and keeps what it heard."""

from server.engine.request import ModelInfo


class RecordingListener:
    """A LifeListener that keeps what it was told."""

    def __init__(self) -> None:
        self.events: list[tuple[str | int | float, ...]] = []

    def spawned(self, process_id: int) -> None:
        self.events.append(("spawned", process_id))

    def became_ready(self, process_id: int, model: ModelInfo) -> None:
        self.events.append(("ready", process_id))

    def pulse_changed(self, process_id: int, *, is_alive: bool) -> None:
        self.events.append(("pulse", process_id, is_alive))

    def ended(self, process_id: int, reason: str, num_lost_requests: int) -> None:
        self.events.append(("ended", process_id, reason, num_lost_requests))

    def restarting(self, delay_seconds: float) -> None:
        self.events.append(("restarting", delay_seconds))

    def given_up(self, reason: str) -> None:
        self.events.append(("given up", reason))
