"""How long an end in order may take, and what of it goes on at the same time."""

import asyncio
import signal
import threading
from pathlib import Path

import yaml
from fastapi import FastAPI

from server.engine.client import STOP_SECONDS
from server.http_server import CLOSE_SECONDS, GracefulServer, listen
from server.jobs.supervisor import GRACE_SECONDS
from server.settings import load_settings
from tests.server.test_http_server import DEADLINE_SECONDS, SettledEngine

ROOT = Path(__file__).resolve().parent.parent.parent


class DrainingEngine(SettledEngine):
    """Its drain ends when something else has happened."""

    def __init__(self) -> None:
        super().__init__("ready")
        self.has_drained = asyncio.Event()

    async def stop(self, drain_seconds: float) -> None:
        await self.has_drained.wait()
        await super().stop(drain_seconds)


def test_a_job_is_stopped_while_requests_still_finish() -> None:
    # given an engine whose drain ends no sooner than the jobs are stopped
    engine = DrainingEngine()
    ready = threading.Event()

    async def stop_jobs() -> None:
        engine.has_drained.set()

    server = GracefulServer(FastAPI(), load_settings({}), engine, ready.set, stop_jobs)  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: server.run(sockets=[listen("127.0.0.1", 0)]))
    thread.start()
    assert ready.wait(DEADLINE_SECONDS)

    server.handle_exit(signal.SIGTERM, None)

    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()
    assert engine.stops == [30]


def test_the_end_takes_no_longer_than_compose_waits_for_it() -> None:
    service = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["awq-serve"]
    grace_seconds = float(service["stop_grace_period"].removesuffix("s"))
    drain_seconds = max(load_settings({}).drain_seconds, GRACE_SECONDS)
    assert drain_seconds + STOP_SECONDS + CLOSE_SECONDS < grace_seconds
