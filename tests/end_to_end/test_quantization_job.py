"""A quantization through HTTP: queued, run in a process of its own, listed with the models, and served."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.end_to_end.running_server import RunningServer
from tests.tiny_models import save_tiny_model


def test_a_job_makes_a_checkpoint_that_can_be_served(
    tmp_path: Path, start: Callable[[Path, Path], RunningServer]
) -> None:
    # given a server, and a model in its models directory
    models = tmp_path / "data" / "models"
    models.mkdir(parents=True)
    source = save_tiny_model("llama", models / "tiny")
    server = start(source, tmp_path / "data")

    # when its quantization is asked for
    body = {"model": str(source), "output": "tiny-awq", "calib_samples": 4, "calib_seqlen": 64}
    accepted = httpx.post(f"{server.url}/quantize", json=body, timeout=30)
    assert accepted.status_code == httpx.codes.ACCEPTED, accepted.text
    job = f"{server.url}/quantize/{accepted.json()['id']}"
    with httpx.stream("GET", f"{job}/events", timeout=120) as events:
        told = [json.loads(line.removeprefix("data: ")) for line in events.iter_lines() if line.startswith("data: {")]

    # then its events lead to its end, each block among them
    finished = httpx.get(job).json()
    assert finished["status"] == "succeeded", finished
    assert told[-1]["data"] == finished
    assert [event["data"]["status"] for event in told if event["type"] == "state"] == ["queued", "running", "succeeded"]
    blocks = [block["name"] for block in finished["report"]["blocks"]]
    assert [event["data"]["block"] for event in told if event["type"] == "block"] == blocks

    # and it shows with the models, and the result can be served
    assert "tiny-awq" in [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]]
    assert server.stop() == 0
    served = start(models / "tiny-awq", tmp_path / "again")
    asked = {"prompt": "abc", "max_tokens": 3, "ignore_eos": True}
    answer = httpx.post(f"{served.url}/v1/completions", json=asked, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert served.stop() == 0
