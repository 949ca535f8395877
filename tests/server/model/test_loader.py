"""Loading is strict: what is missing, left over or of the wrong kind is named before anything is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.errors import CheckpointError
from server.model.decoder import Decoder
from server.model.layers import DenseLinear
from server.model.loader import LoadedModel, LoadProgress, load_model
from tests.server.model.quantized_models import TENSOR_FILE, quantize_in_place
from tests.tiny_models import save_tiny_model

CPU = torch.device("cpu")


def ignore_progress(progress: LoadProgress) -> None:
    pass


def load(directory: Path, dtype: torch.dtype | None = None) -> LoadedModel:
    return load_model(directory, CPU, dtype, ignore_progress)


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / TENSOR_FILE)
    change(tensors)
    save_file(tensors, directory / TENSOR_FILE, metadata={"format": "pt"})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path)


def drop_a_norm(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.input_layernorm.weight"]


def drop_a_projection(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.self_attn.k_proj.weight"]


def add_a_bias(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)


def add_a_layer(tensors: dict[str, Tensor]) -> None:
    tensors |= {
        name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in tensors.items() if ".1." in name
    }


def narrow_a_projection(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(64, 96)


def make_a_norm_integer(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_a_norm, "lacks model.layers.1.input_layernorm.weight"),
        (drop_a_projection, "lacks model.layers.0.self_attn.k_proj.weight"),
        (add_a_bias, "has model.layers.0.self_attn.q_proj.bias, which a model of its config has no place for"),
        (add_a_layer, "has model.layers.2.input_layernorm.weight.* and 4 more, which a model"),
        (
            narrow_a_projection,
            r"model.layers.1.mlp.down_proj.weight has the shape \[64, 96\]; the config asks for \[64, 128\]",
        ),
        (make_a_norm_integer, "model.norm.weight is torch.int32; it must be float32, bfloat16 or float16"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(
    llama: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    rewrite(llama, change)

    with pytest.raises(CheckpointError, match=message):
        load(llama)


def test_a_packed_module_of_another_shape_is_named(tmp_path: Path) -> None:
    directory = save_tiny_model("llama", tmp_path, config_overrides={"intermediate_size": 160})
    quantize_in_place(directory, lambda name: True)
    config_file = directory / "config.json"
    config_file.write_text(config_file.read_text().replace('"intermediate_size": 160', '"intermediate_size": 128'))

    with pytest.raises(CheckpointError, match=r"mlp.gate_proj is quantized with 160 outputs and 64 inputs; .* 128"):
        load(directory)


def test_a_truncated_file_is_named(llama: Path) -> None:
    file = llama / TENSOR_FILE
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match=TENSOR_FILE):
        load(llama)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path)


def test_a_device_without_kernels_is_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match="no kernels for the device meta"):
        load_model(llama, torch.device("meta"), None, ignore_progress)


def test_frequencies_that_old_checkpoints_carry_are_ignored(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))

    assert load(llama).config.num_layers == 2


def test_a_tied_model_uses_its_embedding_as_head(llama: Path) -> None:
    decoder = load(llama).decoder

    assert isinstance(decoder.head, DenseLinear)
    assert decoder.head.weight is decoder.embedding


def test_a_redundant_head_of_a_tied_model_is_not_kept_twice(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))

    decoder = load(llama).decoder

    assert isinstance(decoder.head, DenseLinear)
    assert decoder.head.weight is decoder.embedding


def test_a_head_that_differs_unties_the_model(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))

    decoder = load(llama).decoder

    assert isinstance(decoder.head, DenseLinear)
    assert torch.equal(decoder.head.weight, decoder.embedding + 1)


@pytest.mark.parametrize(
    ("asked", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
)
def test_a_cpu_computes_in_float32_unless_told_otherwise(
    asked: torch.dtype | None, expected: torch.dtype, tmp_path: Path
) -> None:
    model = load(save_tiny_model("llama", tmp_path, dtype=torch.bfloat16), asked)

    assert model.config.dtype == expected
    assert model.decoder.embedding.dtype == expected


def test_progress_counts_the_layers(llama: Path) -> None:
    seen: list[LoadProgress] = []

    load_model(llama, CPU, None, seen.append)

    assert seen == [LoadProgress(1, 2), LoadProgress(2, 2)]


@pytest.mark.parametrize(("max_model_len", "first_angle"), [(None, 1.0 / 4), (64, 1.0 / 4), (32, 1.0 / 2)])
def test_a_model_that_turns_long_sequences_otherwise_is_told_how_long_they_get(
    max_model_len: int | None, first_angle: float, tmp_path: Path
) -> None:
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [2.0] * 8, "long_factor": [4.0] * 8}
    fields = {"original_max_position_embeddings": 32, "rope_parameters": longrope}
    save_tiny_model("phi3", tmp_path, config_overrides=fields)

    decoder = load_model(tmp_path, CPU, None, ignore_progress, max_model_len=max_model_len).decoder

    assert isinstance(decoder, Decoder)
    assert float(decoder.rotaries[0].inverse_frequencies[0]) == first_angle


def test_layers_that_turn_alike_share_their_angles(tmp_path: Path) -> None:
    fields = {"num_hidden_layers": 5, "no_rope_layers": [1, 0, 1, 0, 1]}

    decoder = load(save_tiny_model("smollm3", tmp_path, config_overrides=fields)).decoder

    assert isinstance(decoder, Decoder)
    assert len(decoder.rotaries) == 2
    assert [layer.attention.rotary for layer in decoder.layers] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("model_type", "module"),
    [("phi3", "self_attn.qkv_proj"), ("phi3", "mlp.gate_up_proj"), ("glm4", "mlp.gate_up_proj")],
)
def test_a_fused_module_of_another_shape_is_named(model_type: str, module: str, tmp_path: Path) -> None:
    directory = save_tiny_model(model_type, tmp_path)
    name = f"model.layers.1.{module}.weight"
    rewrite(directory, lambda tensors: tensors.update({name: tensors[name][:-2].clone()}))

    with pytest.raises(CheckpointError, match=f"{name} has the shape"):
        load(directory)


def test_embeddings_are_scaled_in_the_precision_that_the_model_was_trained_in(tmp_path: Path) -> None:
    # given a width whose root has more digits than bfloat16
    directory = save_tiny_model("gemma", tmp_path, config_overrides={"hidden_size": 96})

    decoders = [load(directory, dtype).decoder for dtype in (torch.float32, torch.bfloat16)]

    scales = [decoder.embedding_scale for decoder in decoders if isinstance(decoder, Decoder)]
    assert scales == [pytest.approx(96**0.5), 9.8125]
