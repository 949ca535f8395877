"""How a model's makers want it sampled: read from its generation_config.json, or not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quant.errors import CheckpointError
from server.engine.assembly import assemble_engine
from server.engine.config import EngineConfig
from server.engine.request import ModelInfo, SamplingDefaults
from server.engine.sampling_defaults import read_sampling_defaults
from tests.tiny_models import save_tiny_model


def write(directory: Path, **values: object) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(values))
    return directory


def test_what_the_file_says_is_taken_and_the_rest_is_off(tmp_path: Path) -> None:
    write(tmp_path, do_sample=True, temperature=0.6, top_k=20, top_p=0.95, max_new_tokens=2048)
    assert read_sampling_defaults(tmp_path) == SamplingDefaults(0.6, 20, 0.95, 1.0)
    assert read_sampling_defaults(write(tmp_path, repetition_penalty=1.1, top_k=-1)) == SamplingDefaults(
        repetition_penalty=1.1
    )
    assert read_sampling_defaults(write(tmp_path, temperature=None)) == SamplingDefaults()


def test_a_model_without_the_file_is_sampled_plainly(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": "0.9"}, {"top_k": 0.5}, {"repetition_penalty": float("nan")}]
)
def test_a_value_out_of_range_is_named(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {next(iter(wrong))} is .* must be"):
        read_sampling_defaults(write(tmp_path, **wrong))


def test_the_setting_turns_it_off(tmp_path: Path) -> None:
    directory = write(save_tiny_model("llama", tmp_path), temperature=0.5)
    config = EngineConfig(str(directory), device="cpu", kv_cache_bytes=2**20)

    def info(engine_config: EngineConfig) -> ModelInfo:
        return assemble_engine(engine_config, lambda progress: None, lambda news: None)[1]

    assert info(config).sampling_defaults == SamplingDefaults(temperature=0.5)
    assert info(replace(config, generation_config="off")).sampling_defaults == SamplingDefaults()
