"""The engine is killed under fifty streams: everybody is told, nobody who only waited notices, and nothing is lost."""

import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import httpx

from tests.end_to_end.running_server import RunningServer, wait_until
from tests.tiny_models import save_tiny_model

NUM_STREAMS = 50
NUM_WAITING = 4
# what an outage may take beside the loading: noticing the end, and the first delay of the restarts
OUTAGE_SECONDS = 2.0


@dataclass(frozen=True)
class Resources:
    """What a server's process holds: open descriptors by kind, and children."""

    descriptors: Counter[str]
    num_children: int


def resources_of(server: RunningServer) -> Resources:
    process = Path(f"/proc/{server.process.pid}")
    kinds: Counter[str] = Counter()
    for descriptor in (process / "fd").iterdir():
        # one that is closed meanwhile is none
        with suppress(FileNotFoundError):
            kinds[re.sub(r"\d+", "N", str(descriptor.readlink()))] += 1
    children = (process / "task" / process.name / "children").read_text().split()
    return Resources(kinds, len(children))


def time_of_last(event: str, log: Path) -> float:
    """When a line of the log was written, in seconds since 1970."""
    *_, timestamp = re.findall(rf'^timestamp=(\S+) level=\w+ event="{event}"', log.read_text(), flags=re.MULTILINE)
    return datetime.fromisoformat(timestamp).timestamp()


def test_fifty_streams_survive_a_killed_engine(tmp_path: Path, start: Callable[..., RunningServer]) -> None:
    model = save_tiny_model("llama", tmp_path / "tiny")
    server = start(model, tmp_path / "data", "--max-num-seqs", str(NUM_STREAMS))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    have_begun = threading.Semaphore(0)

    with httpx.Client(base_url=server.url, limits=limits, timeout=120) as client:

        def read_stream(index: int) -> list[str]:
            body = {"prompt": f"stream {index}", "max_tokens": 480, "ignore_eos": True, "stream": True, "seed": index}
            frames: list[str] = []
            with client.stream("POST", "/v1/completions", json=body) as response:
                for line in filter(None, response.iter_lines()):
                    if not frames:
                        have_begun.release()
                    frames.append(line)
            return frames

        def ask_behind_them(index: int) -> httpx.Response:
            return client.post("/v1/completions", json={"prompt": f"waits {index}", "max_tokens": 2})

        with ThreadPoolExecutor(NUM_STREAMS + NUM_WAITING) as pool:
            # given fifty streams that have begun, and some requests behind them that have not
            before = resources_of(server)
            streams = [pool.submit(read_stream, index) for index in range(NUM_STREAMS)]
            for _ in streams:
                assert have_begun.acquire(timeout=60)
            waiting = [pool.submit(ask_behind_them, index) for index in range(NUM_WAITING)]
            wait_until(lambda: server.metric("num_requests_waiting") == NUM_WAITING, 30, server.log)
            assert not any(stream.done() for stream in streams)

            # when the engine is killed
            killed = server.engine_pid()
            killed_at = time.time()
            os.kill(killed, signal.SIGKILL)

            # then the server is not ready as soon as the first client knows
            next(as_completed(streams, timeout=30))
            assert not server.is_ready()
            # and all of them are told, in words that a client understands
            for stream in streams:
                *_, error, end = stream.result(timeout=30)
                assert "killed" in json.loads(error.removeprefix("data: "))["error"]["message"]
                assert end == "data: [DONE]"
            # and who had only waited is answered by the next engine
            assert [answer.result(timeout=60).status_code for answer in waiting] == [httpx.codes.OK] * NUM_WAITING

    # and that one was there after the time that its loading took and little more
    assert server.is_ready()
    assert time_of_last("engine started", server.log) - killed_at < OUTAGE_SECONDS
    # and nothing of the first stays: no descriptor, no process, no block
    assert not Path(f"/proc/{killed}").exists()
    wait_until(lambda: resources_of(server) == before, 30, server.log)
    wait_until(lambda: server.metric("kv_cache_usage_perc") == 0, 30, server.log)
    assert server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0
    assert server.stop() == 0
