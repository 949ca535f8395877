"""The server under load: told to end, killed at a job, and asked for more than its queue holds."""

import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import httpx

from tests.end_to_end.running_server import RunningServer, wait_until
from tests.tiny_models import save_tiny_model


def test_sigterm_under_load_lets_the_streams_finish_and_takes_nothing_new(
    tmp_path: Path, start: Callable[..., RunningServer]
) -> None:
    server = start(save_tiny_model("llama", tmp_path / "tiny"), tmp_path / "data")
    engine = server.engine_pid()
    have_begun = threading.Semaphore(0)

    def read_stream() -> list[str]:
        body = {"prompt": "abc", "max_tokens": 400, "ignore_eos": True, "stream": True, "temperature": 0}
        frames = []
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            for line in filter(None, response.iter_lines()):
                if not frames:
                    have_begun.release()
                frames.append(line)
        return frames

    with ThreadPoolExecutor(4) as pool:
        # given streams that have begun, held where they are
        readers = [pool.submit(read_stream) for _ in range(4)]
        for _ in readers:
            assert have_begun.acquire(timeout=60)
        os.kill(engine, signal.SIGSTOP)
        # when the server is told to end
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not server.is_ready(), 30, server.log)
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "abc"}, timeout=60)
        os.kill(engine, signal.SIGCONT)
        streams = [reader.result(timeout=60) for reader in readers]

    # then new requests are refused, and those under way finish
    assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
    assert "draining" in refused.json()["error"]["message"]
    for frames in streams:
        assert frames[-1] == "data: [DONE]"
        assert json.loads(frames[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(timeout=60) == 0


def test_a_job_whose_server_is_killed_is_run_by_the_next_server(
    tmp_path: Path, start: Callable[..., RunningServer]
) -> None:
    # given a job that runs
    models = tmp_path / "data" / "models"
    models.mkdir(parents=True)
    source = save_tiny_model("llama", models / "tiny")
    killed = start(source, tmp_path / "data")
    body = {"model": str(source), "output": "tiny-awq", "calib_samples": 4, "calib_seqlen": 64}
    job = f"/quantize/{httpx.post(f'{killed.url}/quantize', json=body, timeout=30).json()['id']}"
    wait_until(lambda: httpx.get(killed.url + job).json()["status"] == "running", 60, killed.log)

    # when its server is killed, and another one starts on the same data
    killed.process.kill()
    killed.process.wait()
    successor = start(source, tmp_path / "data")

    # then that one finds it and brings it to its end
    wait_until(lambda: httpx.get(successor.url + job).json()["status"] not in ("queued", "running"), 120, successor.log)
    assert httpx.get(successor.url + job).json()["status"] == "succeeded"
    assert "job recovered" in successor.log.read_text()
    assert (models / "tiny-awq" / "config.json").is_file()
    assert successor.stop() == 0


def test_a_full_queue_is_answered_with_when_to_come_back(tmp_path: Path, start: Callable[..., RunningServer]) -> None:
    # given an engine that is held, with room for one request and one that waits
    model = save_tiny_model("llama", tmp_path / "tiny")
    server = start(model, tmp_path / "data", "--max-num-seqs", "1", "--max-waiting", "1")
    engine = server.engine_pid()
    os.kill(engine, signal.SIGSTOP)

    def ask() -> httpx.Response:
        return httpx.post(f"{server.url}/v1/completions", json={"prompt": "abc", "max_tokens": 2}, timeout=60)

    # when three come
    with ThreadPoolExecutor(3) as pool:
        answers = as_completed([pool.submit(ask) for _ in range(3)], timeout=60)
        refused = next(answers).result()
        os.kill(engine, signal.SIGCONT)
        served = [answer.result() for answer in answers]

    # then one is told to come back, and the others are served
    assert refused.status_code == httpx.codes.TOO_MANY_REQUESTS
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "queue_full"
    assert [answer.status_code for answer in served] == [httpx.codes.OK] * 2
    assert server.stop() == 0
