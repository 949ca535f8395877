"""Whatever format a checkpoint is in, the decoder computes what transformers does on the dequantized weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kernels.layout import PackedWeight
from kernels.weight_kinds import WHOLE_ROW
from quant.checkpoint.compressed_tensors import encode
from quant.checkpoint.format_name import OutputFormat
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.writer import CheckpointWriter
from quant.dense_checkpoint import load_dense
from quant.errors import CheckpointError
from quant.method import Method
from quant.pipeline import quantize
from quant.recipe import Recipe
from server.model.layers import DenseLinear, JoinedLinear, Linear, QuantizedLinear
from server.model.loader import LoadedModel, load_model
from tests.quant.checkpoint.stored_modules import random_weight
from tests.quant.checkpoint.test_awq_gemv import pack_gemv, pack_gemv_fast
from tests.quant.checkpoint.test_gptq import pack_v2
from tests.server.model.test_quantized_decoder import TOLERANCE, TYPICAL_ERROR, run_prompt
from tests.tiny_models import save_tiny_model

# where a row has one scale, its rounding to bfloat16 is the same in all its products and does not average out
MAX_ERROR = 2 * TOLERANCE
TOKEN_IDS = torch.arange(40) * 7 % 250
CPU = torch.device("cpu")


def load(directory: Path) -> LoadedModel:
    return load_model(directory, CPU, None, lambda progress: None)


def assert_computes_the_dequantized_model(directory: Path) -> LoadedModel:
    model = load(directory)
    with torch.inference_mode():
        expected = load_dense(directory)(TOKEN_IDS[None]).logits[0]
    errors = (run_prompt(model, TOKEN_IDS) - expected).abs()
    assert float(errors.mean()) < TYPICAL_ERROR
    assert float(errors.max()) < MAX_ERROR
    return model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("dense") / "model")


@pytest.mark.parametrize(
    ("bits", "group_size", "output_format", "kind"),
    [
        (3, 32, None, QuantizedLinear),
        (3, WHOLE_ROW, None, QuantizedLinear),
        (4, 64, OutputFormat.COMPRESSED_TENSORS, QuantizedLinear),
        (4, WHOLE_ROW, OutputFormat.AWQ, QuantizedLinear),
        (8, 32, None, DenseLinear),
    ],
)
def test_what_we_write_is_served(
    dense: Path, tmp_path: Path, bits: int, group_size: int, output_format: OutputFormat | None, kind: type[Linear]
) -> None:
    recipe = Recipe(method=Method.RTN, num_windows=0, bits=bits, group_size=group_size, format=output_format)
    quantize(recipe, dense, tmp_path / "out")

    model = assert_computes_the_dequantized_model(tmp_path / "out")

    for layer in model.decoder.layers:
        assert isinstance(layer.attention.qkv, kind)
        assert isinstance(layer.mlp.down, kind)


@pytest.mark.parametrize("model_type", ["llama", "mistral"], ids=["tied", "untied"])
@pytest.mark.parametrize(("bits", "kind"), [(4, QuantizedLinear), (8, DenseLinear)])
def test_a_quantized_head_is_served(model_type: str, bits: int, kind: type[Linear], tmp_path: Path) -> None:
    original = save_tiny_model(model_type, tmp_path / "model")
    quantize(Recipe(method=Method.RTN, num_windows=0, lm_head=bits), original, tmp_path / "out")

    model = assert_computes_the_dequantized_model(tmp_path / "out")

    assert isinstance(model.decoder.head, kind)
    # the embedding is the original's, and not what the head was rounded to
    embedding = AutoModelForCausalLM.from_pretrained(original).get_input_embeddings().weight
    assert torch.equal(model.decoder.embedding, embedding.half().float())


def test_a_mixture_is_served_with_one_layer_for_linears_of_one_input(dense: Path, tmp_path: Path) -> None:
    quantize(Recipe(num_samples=4, sample_tokens=32, num_windows=0, target_bpw=6.0), dense, tmp_path / "out")

    model = assert_computes_the_dequantized_model(tmp_path / "out")

    parts = [part for layer in model.decoder.layers for part in (layer.attention.qkv, layer.mlp.gate_up)]
    assert not any(isinstance(part, JoinedLinear) for part in parts)
    others = [part for layer in model.decoder.layers for part in (layer.attention.output, layer.mlp.down)]
    assert {type(part) for part in (*parts, *others)} == {QuantizedLinear, DenseLinear}


def rewrite(
    checkpoint: Path, out: Path, fields: dict[str, object], encode_as: Callable[[PackedWeight], dict[str, Tensor]]
) -> Path:
    """The checkpoint in a format that we do not write."""
    reader = CheckpointReader.open(checkpoint)
    packed = {x for name in reader.quantized_module_names for x in reader.packed_tensor_names(name)}
    tensors = {name: reader.read_tensor(name) for name in reader.tensor_names if name not in packed}
    for name in reader.quantized_module_names:
        tensors |= {f"{name}.{suffix}": x for suffix, x in encode_as(reader.read_packed(name)).items()}
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps({**reader.config, "quantization_config": fields}))
    return out


def symmetric(weight: PackedWeight) -> dict[str, Tensor]:
    """Without its zero points, which then are all 8: another weight, but one that reads so."""
    return {suffix: tensor for suffix, tensor in encode(weight).items() if suffix != "weight_zero_point"}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
SYMMETRIC = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": True}}},
}


@pytest.mark.parametrize(
    ("fields", "encode_as"),
    [
        (GPTQ, pack_v2),
        ({**AWQ, "version": "gemv"}, lambda weight: pack_gemv(weight, 4)),
        ({**AWQ, "version": "gemv_fast"}, lambda weight: pack_gemv_fast(weight, 4)),
        (SYMMETRIC, symmetric),
    ],
    ids=["GPTQ", "gemv", "gemv_fast", "compressed-tensors symmetric"],
)
def test_what_other_tools_write_is_served(
    dense: Path,
    tmp_path: Path,
    fields: dict[str, object],
    encode_as: Callable[[PackedWeight], dict[str, Tensor]],
) -> None:
    quantize(Recipe(method=Method.RTN, num_windows=0, group_size=32), dense, tmp_path / "awq")
    foreign = rewrite(tmp_path / "awq", tmp_path / "foreign", fields, encode_as)

    model = assert_computes_the_dequantized_model(foreign)

    assert isinstance(model.decoder.layers[0].attention.qkv, QuantizedLinear)


def test_modules_of_one_input_may_differ_in_bits_and_groups(dense: Path, tmp_path: Path) -> None:
    # given queries of 3 bits, keys of 4 and values of 8; gate and up with groups of their own
    kinds = {"q_proj": (3, 32), "k_proj": (4, 32), "v_proj": (8, 64), "gate_proj": (4, 32), "up_proj": (4, 64)}
    reader = CheckpointReader.open(dense)
    with CheckpointWriter(tmp_path / "out", expected_bytes=0, output_format=OutputFormat.COMPRESSED_TENSORS) as writer:
        for name in reader.tensor_names:
            module_name = name.removesuffix(".weight")
            kind = kinds.get(module_name.rpartition(".")[2])
            if kind is None:
                writer.add_tensor(name, reader.read_tensor(name))
                continue
            num_outputs, num_inputs = reader.shape(name)
            weight = random_weight(num_outputs, num_inputs, kind[1], bits=kind[0])
            weight.scales.mul_(0.02)
            writer.add_packed(module_name, weight)
        writer.commit({**reader.config, "quantization_config": writer.quantization_config(())}, {})

    layer = load(tmp_path / "out").decoder.layers[0]

    assert isinstance(layer.attention.qkv, JoinedLinear)
    assert [type(part) for part in layer.attention.qkv.parts] == [QuantizedLinear, QuantizedLinear, DenseLinear]
    assert isinstance(layer.mlp.gate_up, JoinedLinear)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    block = load_dense(tmp_path / "out").model.layers[0]
    with torch.inference_mode():
        expected = torch.cat([getattr(block.self_attn, name)(x) for name in ("q_proj", "k_proj", "v_proj")], dim=-1)
    torch.testing.assert_close(layer.attention.qkv(x), expected, atol=0.05, rtol=0.02)


def test_a_row_that_no_kernel_group_divides_is_refused_by_name(tmp_path: Path) -> None:
    narrow = {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    original = save_tiny_model("llama", tmp_path / "model", config_overrides=narrow)
    recipe = Recipe(method=Method.RTN, num_windows=0, group_size=WHOLE_ROW, format=OutputFormat.COMPRESSED_TENSORS)
    quantize(recipe, original, tmp_path / "out")

    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj: .*multiples of 32, not 40"):
        load(tmp_path / "out")
