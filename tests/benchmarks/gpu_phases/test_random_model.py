"""The model that was never on a disk has the sizes that the roofline is made of."""

import pytest

from benchmarks.gpu_phases.bench import Bench
from benchmarks.gpu_phases.random_model import build_random_model, flops_per_token, weight_bytes
from benchmarks.gpu_phases.sizes import FULL, LLAMA_8B
from server.model.config import ModelConfig
from server.model.layers import QuantizedLinear


def test_a_step_of_the_8b_model_reads_what_its_makers_parameters_say() -> None:
    config = ModelConfig.from_dict(FULL.model.to_config(4096))

    # 6.979e9 parameters in the blocks at 4.25 bits, and a head of 128256 x 4096 in 16 bits
    assert weight_bytes(config) == pytest.approx(6.979e9 * 4.25 / 8 + 2 * 128256 * 4096, rel=1e-4)
    assert flops_per_token(config) == pytest.approx(2 * 6.979e9, rel=1e-4)


def test_the_timed_shapes_are_those_of_the_model() -> None:
    model = FULL.model
    qkv = (model.heads.num_heads + 2 * model.heads.num_kv_heads) * model.heads.width

    assert [(shape.num_columns, shape.num_inputs) for shape in LLAMA_8B] == [
        (qkv, model.hidden_size),
        (model.hidden_size, model.heads.num_heads * model.heads.width),
        (2 * model.intermediate_size, model.hidden_size),
        (model.hidden_size, model.intermediate_size),
    ]


def test_all_linears_of_the_blocks_are_packed(bench: Bench) -> None:
    decoder = build_random_model(bench, bench.sizes.model, 64).decoder

    for layer in decoder.layers:
        for linear in (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down):
            assert isinstance(linear, QuantizedLinear)
