"""What a checkpoint directory is read as, and what is refused before any tensor is loaded."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quant.checkpoint.awq_gemm import encode
from quant.checkpoint.meta import CheckpointFormat
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.stored_module import PackedSpec
from quant.errors import CheckpointError
from tests.quant.checkpoint.stored_modules import assert_same_weight, awq_config, meta_of, random_weight

QUANTIZED = "model.layers.0.mlp.down_proj"
PLAIN = "model.norm"


def write_checkpoint(directory: Path) -> None:
    """One quantized module with a bias and one plain one, as other tools write them: without our writer."""
    directory.mkdir()
    tensors = encode(random_weight(16, 64, 32))
    stored = {
        **{f"{QUANTIZED}.{suffix}": tensor for suffix, tensor in tensors.items()},
        f"{QUANTIZED}.bias": torch.ones(16).half(),
        f"{PLAIN}.weight": torch.arange(64).bfloat16(),
    }
    save_file(stored, directory / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": awq_config(32)}
    (directory / "config.json").write_text(json.dumps(config))


def shard_checkpoint(directory: Path) -> None:
    """The same checkpoint in two files with an index: the quantized module in one, the rest in the other."""
    write_checkpoint(directory)
    reader = CheckpointReader.open(directory)
    files = {"a.safetensors": reader.tensor_names_of(QUANTIZED), "b.safetensors": reader.tensor_names_of(PLAIN)}
    for file, names in files.items():
        save_file({name: reader.read_tensor(name).clone() for name in names}, directory / file)
    (directory / "model.safetensors").unlink()
    write_index(directory, {name: file for file, names in files.items() for name in names})


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(params=[write_checkpoint, shard_checkpoint], ids=["one file", "two shards"])
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    request.param(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_tensors_are_described_without_being_read(checkpoint: Path) -> None:
    reader = CheckpointReader.open(checkpoint)

    assert reader.config["model_type"] == "llama"
    assert reader.meta == meta_of(CheckpointFormat.AWQ_GEMM, bits=4, group_size=32)
    assert set(reader.tensor_names_of(QUANTIZED)) == {
        f"{QUANTIZED}.{x}" for x in ("qweight", "qzeros", "scales", "bias")
    }
    assert reader.shape(f"{QUANTIZED}.qweight") == (64, 2)
    assert reader.dtype(f"{PLAIN}.weight") == torch.bfloat16
    assert reader.packed_spec(QUANTIZED) == PackedSpec(16, 64, 4, 32, torch.float16)


def test_what_was_read_holds_no_file(checkpoint: Path) -> None:
    # given tensors of each kind that are in use
    reader = CheckpointReader.open(checkpoint)
    held = [reader.read_tensor(name) for name in reader.tensor_names], reader.read_packed(QUANTIZED)

    # then no page of a file counts as this process's memory, and none is open
    assert str(checkpoint) not in Path("/proc/self/maps").read_text()
    assert not [file for file in Path("/proc/self/fd").iterdir() if checkpoint in file.resolve().parents]
    assert len(held[0]) == len(reader.tensor_names)


@pytest.mark.parametrize("tensor", [torch.tensor(3.5), torch.zeros(0, 4, dtype=torch.int32), torch.tensor([True])])
def test_a_tensor_of_any_shape_is_read(tensor: torch.Tensor, tmp_path: Path) -> None:
    save_file({"odd": tensor}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    read = CheckpointReader.open(tmp_path).read_tensor("odd")

    assert read.dtype == tensor.dtype
    assert torch.equal(read, tensor)


def test_a_plain_tensor_comes_as_it_is_stored(checkpoint: Path) -> None:
    assert torch.equal(CheckpointReader.open(checkpoint).read_tensor(f"{PLAIN}.weight"), torch.arange(64).bfloat16())


def test_a_quantized_module_comes_as_a_packed_weight(checkpoint: Path) -> None:
    weight = CheckpointReader.open(checkpoint).read_packed(QUANTIZED)

    assert_same_weight(weight, random_weight(16, 64, 32))


def test_the_tensors_decide_which_module_is_quantized(checkpoint: Path) -> None:
    # given a config that claims the opposite of what the file holds
    config = {"quantization_config": awq_config(32, (QUANTIZED,))}
    (checkpoint / "config.json").write_text(json.dumps(config))

    reader = CheckpointReader.open(checkpoint)

    assert reader.quantized_module_names == (QUANTIZED,)
    assert reader.is_quantized(QUANTIZED)
    assert not reader.is_quantized(PLAIN)


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
        ("quantize_config.json", {"quant_method": "awq", "group_size": 32, "bits": 4, "checkpoint_format": "gemm"}),
    ],
)
def test_settings_in_a_file_of_their_own_are_found(checkpoint: Path, file: str, fields: dict[str, object]) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    (checkpoint / file).write_text(json.dumps(fields))

    assert_same_weight(CheckpointReader.open(checkpoint).read_packed(QUANTIZED), random_weight(16, 64, 32))


def test_old_settings_that_are_not_read_are_refused_with_their_file(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    (checkpoint / "quantize_config.json").write_text('{"bits": 2, "group_size": 128, "desc_act": false}')

    with pytest.raises(CheckpointError, match=r"quantize_config\.json: .*2 bits; GPTQ v1 checkpoints are read with"):
        CheckpointReader.open(checkpoint)


def test_an_unquantized_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    # settings that a tool has left beside the original
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")

    reader = CheckpointReader.open(tmp_path)

    assert reader.meta is None
    assert reader.quantized_module_names == ()


def test_an_absent_tensor_is_named(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor model\.embed_tokens\.weight"):
        CheckpointReader.open(checkpoint).read_tensor("model.embed_tokens.weight")


def safetensors_bytes(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# a file of two floats a tensor, damaged in one way each: its bytes, and what the message must say
DAMAGED_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes, too few"),
    "cut inside the header length": (b"\x08\x00\x00", "has 3 bytes, too few"),
    "cut inside the header": (safetensors_bytes({"a": entry()}, b"")[:30], "bytes of header, but has 30 bytes in all"),
    "a header larger than any memory": (struct.pack("<Q", 2**63) + b"{}", "announces 9223372036854775808 bytes"),
    "cut inside the tensors": (safetensors_bytes({"a": entry()}, bytes(5)), "has 5 bytes of tensors, not the 8"),
    "bytes after the last tensor": (safetensors_bytes({"a": entry()}, bytes(12)), "has 12 bytes of tensors, not the 8"),
    "a header that is no JSON": (safetensors_bytes(b"\xff\xfe{]", b""), "holds no valid JSON"),
    "a header that is a list": (safetensors_bytes([1], b""), "must hold a JSON object, not list"),
    "an entry that is a number": (safetensors_bytes({"a": 1}, b""), "the header entry of a is 1"),
    "an entry without offsets": (safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, b""), "header entry of a"),
    "a negative size": (safetensors_bytes({"a": entry(shape=[-2])}, bytes(8)), "header entry of a"),
    "a fractional size": (safetensors_bytes({"a": entry(shape=[2.0])}, bytes(8)), "header entry of a"),
    "three offsets": (safetensors_bytes({"a": entry(offsets=[0, 8, 16])}, bytes(8)), "header entry of a"),
    "an unknown dtype": (safetensors_bytes({"a": entry(dtype="F4")}, bytes(8)), "a has dtype 'F4', which is not read"),
    "a shape larger than its bytes": (safetensors_bytes({"a": entry(shape=[3])}, bytes(8)), "12 bytes, but .* span 8"),
    "offsets backwards": (safetensors_bytes({"a": entry(offsets=[8, 0])}, bytes(8)), "offsets span -8"),
    "overlapping tensors": (
        safetensors_bytes({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        "b starts at byte 4 and overlaps",
    ),
    "a hole between tensors": (
        safetensors_bytes({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
        "b starts at byte 12 and leaves a hole",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_FILES)
def test_a_damaged_file_is_named_and_refused(case: str, tmp_path: Path) -> None:
    content, message = DAMAGED_FILES[case]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        CheckpointReader.open(tmp_path)


@pytest.mark.parametrize("num_kept", [0, 4, 100, -1, -4096])
def test_a_checkpoint_cut_anywhere_is_refused(num_kept: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_kept])

    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        CheckpointReader.open(tmp_path / "checkpoint")


def remove_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def break_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": ')


def drop_quantization_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "llama"}')


def claim_bitsandbytes(directory: Path) -> None:
    (directory / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')


def claim_another_group_size(directory: Path) -> None:
    config = {"quantization_config": awq_config(16)}
    (directory / "config.json").write_text(json.dumps(config))


def remove_shard(directory: Path) -> None:
    (directory / "a.safetensors").unlink()


def name_an_absent_tensor(directory: Path) -> None:
    write_index(directory, {f"{PLAIN}.weight": "b.safetensors", "model.embed_tokens.weight": "b.safetensors"})


def point_outside(directory: Path) -> None:
    write_index(directory, {f"{PLAIN}.weight": "../b.safetensors"})


def empty_index(directory: Path) -> None:
    write_index(directory, {})


def leave_out_qzeros(directory: Path) -> None:
    kept = [f"{QUANTIZED}.{suffix}" for suffix in ("qweight", "scales")]
    reader = CheckpointReader.open(directory)
    save_file({name: reader.read_tensor(name) for name in kept}, directory / "a.safetensors")
    write_index(directory, dict.fromkeys(kept, "a.safetensors"))


def forget_a_tensor(directory: Path) -> None:
    write_index(directory, {f"{QUANTIZED}.qweight": "a.safetensors", f"{QUANTIZED}.scales": "a.safetensors"})


def store_a_tensor_twice(directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    save_file({f"{PLAIN}.weight": torch.ones(64)}, directory / "c.safetensors")
    write_index(directory, {**index, f"{PLAIN}.weight": "c.safetensors", f"{PLAIN}.bias": "b.safetensors"})
    save_file({f"{PLAIN}.{kind}": torch.ones(64) for kind in ("weight", "bias")}, directory / "b.safetensors")


def leave_only_pickles(directory: Path) -> None:
    for file in directory.glob("*safetensors*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    (directory / "awq.pt").write_bytes(pickle.dumps({}))


def leave_no_tensors(directory: Path) -> None:
    for file in directory.glob("*safetensors*"):
        file.unlink()


BROKEN_DIRECTORIES: list[tuple[Callable[[Path], None], str]] = [
    (remove_config, r"has no config\.json"),
    (break_config, r"config\.json holds no valid JSON"),
    (drop_quantization_config, r"down_proj is quantized, but .*config\.json has no quantization_config"),
    (claim_bitsandbytes, r"config\.json: .*quant_method 'bitsandbytes', which is not read"),
    (claim_another_group_size, r"down_proj is stored in groups of 32, but quantization_config says 16"),
    (remove_shard, r"names a\.safetensors, which is not there"),
    (name_an_absent_tensor, r"places model\.embed_tokens\.weight in b\.safetensors, which has no such tensor"),
    (point_outside, r"'\.\./b\.safetensors', which is no \.safetensors file beside it"),
    (empty_index, "has no weight_map"),
    (leave_out_qzeros, r"down_proj\.qzeros is missing: the module has qweight, scales"),
    (forget_a_tensor, r"a\.safetensors holds .*down_proj\.bias and 1 more, which model.*json does not place there"),
    (store_a_tensor_twice, r"b\.safetensors holds model\.norm\.weight, which model.*json does not place there"),
    (leave_only_pickles, r"only pickle files \(awq\.pt, pytorch_model\.bin\)"),
    (leave_no_tensors, r"neither model\.safetensors nor model\.safetensors\.index\.json"),
]


@pytest.mark.parametrize(("breakage", "message"), BROKEN_DIRECTORIES, ids=[b.__name__ for b, _ in BROKEN_DIRECTORIES])
def test_a_broken_directory_is_refused_with_the_reason(
    breakage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoint"
    shard_checkpoint(directory)
    breakage(directory)

    with pytest.raises(CheckpointError, match=message):
        CheckpointReader.open(directory)


def test_a_place_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory"):
        CheckpointReader.open(tmp_path / "absent")
