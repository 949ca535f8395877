"""What the server survives, and what it refuses in one sentence: killed processes, broken files, a taken port."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.running_server import AWQ_SERVE, RunningServer, wait_until
from tests.tiny_models import save_tiny_model


def test_killing_the_engine_ends_the_streams_with_an_error_and_the_next_request_works(
    tmp_path: Path, start: Callable[[Path, Path], RunningServer]
) -> None:
    server = start(save_tiny_model("llama", tmp_path / "tiny"), tmp_path / "data")
    frames: list[str] = []
    started = threading.Event()

    def read_stream() -> None:
        body = {"prompt": "abc", "max_tokens": 100, "ignore_eos": True, "stream": True, "n": 8, "temperature": 1.0}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line:
                    frames.append(line)
                    started.set()

    # given open streams
    os.kill(server.engine_pid(), signal.SIGSTOP)
    reader = threading.Thread(target=read_stream)
    reader.start()
    stopped_engine = server.engine_pid()
    os.kill(stopped_engine, signal.SIGCONT)
    assert started.wait(30)

    # when the engine is killed
    os.kill(stopped_engine, signal.SIGKILL)
    reader.join(timeout=60)

    # then the client is told, the server recovers, and nothing stays behind
    assert frames[-1] == "data: [DONE]"
    assert "error" in json.loads(frames[-2].removeprefix("data: "))
    wait_until(server.is_ready, 60, server.log)
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "abc", "max_tokens": 2}, timeout=60)
    assert answer.status_code == httpx.codes.OK
    engine = server.engine_pid()
    assert server.stop() == 0
    assert not Path(f"/proc/{engine}").exists()


def test_killing_the_server_leaves_no_engine_behind(
    tmp_path: Path, start: Callable[[Path, Path], RunningServer]
) -> None:
    server = start(save_tiny_model("llama", tmp_path / "tiny"), tmp_path / "data")
    engine = server.engine_pid()
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not Path(f"/proc/{engine}").exists(), 30)


def refusal_of(*arguments: str) -> str:
    """What the program prints to say no; it must end by itself, with status 2, and no traceback."""
    result = subprocess.run([str(AWQ_SERVE), *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def test_a_truncated_checkpoint_is_named_and_not_served(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "tiny")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refusal_of("serve", str(model), "--data-dir", str(tmp_path / "data"), "--port", "0")


def test_a_port_that_is_taken_is_named(tmp_path: Path, server: RunningServer) -> None:
    model = save_tiny_model("llama", tmp_path / "tiny")
    words = refusal_of("serve", str(model), "--data-dir", str(tmp_path / "data"), "--port", str(server.port))
    assert str(server.port) in words


def test_a_public_address_without_a_key_is_refused(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "tiny")
    words = refusal_of("serve", str(model), "--data-dir", str(tmp_path / "data"), "--host", "0.0.0.0", "--port", "0")
    assert "--api-key" in words


@pytest.mark.parametrize("arguments", [["quantize", "no-such-directory", "out"], ["serve", "no-such-directory"]])
def test_a_source_that_is_no_model_is_refused(arguments: list[str], tmp_path: Path) -> None:
    source = str(tmp_path / arguments[1])
    assert source in refusal_of(arguments[0], source, *(str(tmp_path / name) for name in arguments[2:]))
