"""Adapters on the real program: two of them and the model side by side, each giving what it gives alone."""

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from tests.end_to_end.running_server import AWQ_SERVE, RunningServer
from tests.lora_adapters import save_adapter
from tests.tiny_models import save_tiny_model

TARGETS = ("q_proj", "v_proj", "gate_proj")
NAMES = ("tiny", "first", "second")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("served") / "tiny")


async def complete(client: openai.AsyncOpenAI, name: str) -> tuple[str, str]:
    reply = await client.completions.create(
        model=name, prompt="The quick brown fox", max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
    )
    return reply.model, reply.choices[0].text


async def complete_all(client: openai.AsyncOpenAI, names: list[str]) -> list[tuple[str, str]]:
    async with client:
        return list(await asyncio.gather(*(complete(client, name) for name in names)))


def test_each_gives_beside_the_others_what_it_gives_alone(
    model: Path, tmp_path: Path, start: Callable[..., RunningServer]
) -> None:
    paths = [save_adapter(tmp_path / name, model, TARGETS, seed=seed, alpha=32) for seed, name in enumerate(NAMES[1:])]
    flags = [word for path in paths for word in ("--lora", f"{path.name}={path}")]
    server = start(model, tmp_path / "data", "--deterministic", *flags)
    alone = [asyncio.run(complete_all(server.async_client(), [name]))[0] for name in NAMES]

    together = asyncio.run(complete_all(server.async_client(), [*NAMES] * 4))

    assert together == alone * 4
    assert [name for name, _ in alone] == list(NAMES)
    assert len({text for _, text in alone}) == len(NAMES)
    listed = server.client().models.list().data
    assert [(one.id, one.model_extra and one.model_extra["parent"]) for one in listed] == [
        ("tiny", None),
        ("first", "tiny"),
        ("second", "tiny"),
    ]
    assert "they compute no adapters" in server.log.read_text()
    assert server.stop() == 0


def start_and_fail(model: Path, data_dir: Path, lora: str) -> tuple[int, str]:
    command = [str(AWQ_SERVE), "serve", str(model), "--port", "0", "--data-dir", str(data_dir), "--lora", lora]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return ended.returncode, " ".join(ended.stderr.split())


def test_an_adapter_that_cannot_be_served_ends_the_start_with_a_sentence(model: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", model, TARGETS)
    assert start_and_fail(model, tmp_path, f"tiny={adapter}") == (
        2,
        "awq-serve: the adapter tiny has the model's name; give it another: --lora NAME=PATH",
    )
    status, words = start_and_fail(model, tmp_path, f"a={tmp_path / 'nowhere'}")
    assert status == 2
    assert "nowhere has no adapter_config.json" in words
    (adapter / "adapter_model.safetensors").unlink()
    status, words = start_and_fail(model, tmp_path, f"a={adapter}")
    assert status == 2
    assert "has no adapter_model.safetensors: give a directory that PEFT saved an adapter in" in words
