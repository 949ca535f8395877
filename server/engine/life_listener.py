"""Who hears of the lives and deaths of the engine's process. The engine writes no log: it runs without structlog."""

from typing import Protocol

from server.engine.request import ModelInfo


class LifeListener(Protocol):
    """Called on the event loop, when it has happened."""

    def spawned(self, process_id: int) -> None: ...

    def became_ready(self, process_id: int, model: ModelInfo) -> None: ...

    def pulse_changed(self, process_id: int, *, is_alive: bool) -> None:
        """Its heartbeat stays away, or is back."""

    def ended(self, process_id: int, reason: str, num_lost_requests: int) -> None:
        """Not called for an end that was asked for."""

    def restarting(self, delay_seconds: float) -> None:
        """A new process is started after the delay."""

    def given_up(self, reason: str) -> None:
        """No other process is started."""


class NoListener:
    """For whoever does not want to know."""

    def spawned(self, process_id: int) -> None:
        pass

    def became_ready(self, process_id: int, model: ModelInfo) -> None:
        pass

    def pulse_changed(self, process_id: int, *, is_alive: bool) -> None:
        pass

    def ended(self, process_id: int, reason: str, num_lost_requests: int) -> None:
        pass

    def restarting(self, delay_seconds: float) -> None:
        pass

    def given_up(self, reason: str) -> None:
        pass
