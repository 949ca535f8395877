"""The file of folded scales: what is written is read, no server takes it for weights, and a damaged one is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.checkpoint.folded_scales import (
    FOLDED_SCALES_FILE,
    ModuleScales,
    encode_folded_scales,
    most_scale_bytes,
    read_folded_scales,
)
from quant.checkpoint.stored_module import PackedSpec
from quant.errors import CheckpointError

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def write(directory: Path, scales: dict[str, ModuleScales]) -> Path:
    file = directory / FOLDED_SCALES_FILE
    file.write_bytes(encode_folded_scales(scales))
    return file


def test_scales_come_back_as_they_were_with_ones_left_out(tmp_path: Path) -> None:
    # given two linears that share a scale, and one of them with a divisor
    shared, divisor = torch.rand(64) + 0.5, torch.rand(32) + 0.5

    write(tmp_path, {UP: ModuleScales(shared, divisor), DOWN: ModuleScales(shared)})

    read = read_folded_scales(tmp_path)
    assert read is not None
    assert set(read) == {UP, DOWN}
    assert read[DOWN].output_divisor is None
    for got, expected in ((read[UP].input_scale, shared), (read[UP].output_divisor, divisor)):
        assert isinstance(got, Tensor)
        assert torch.equal(got, expected)


def test_nothing_folded_is_something_else_than_nothing_known(tmp_path: Path) -> None:
    assert read_folded_scales(tmp_path) is None

    write(tmp_path, {})

    assert read_folded_scales(tmp_path) == {}


def test_its_name_is_none_that_servers_take_for_weights() -> None:
    assert not FOLDED_SCALES_FILE.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf"))
    assert "/" not in FOLDED_SCALES_FILE


def test_a_file_is_no_larger_than_what_room_is_kept_for(tmp_path: Path) -> None:
    file = write(tmp_path, {UP: ModuleScales(torch.ones(4096) / 2, torch.ones(8192) / 2)})

    header_bytes = 1000
    assert file.stat().st_size - header_bytes < most_scale_bytes([PackedSpec(8192, 4096, 4, 128, torch.float16)])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{UP}.input_scale": torch.tensor([1.0, 0.0])}, r"up_proj\.input_scale must be float32 numbers above 0"),
        ({f"{UP}.output_divisor": torch.tensor([torch.nan])}, r"up_proj\.output_divisor must be float32 numbers"),
        ({f"{UP}.input_scale": torch.ones(2).half()}, "must be float32 numbers above 0; fetch the file again"),
        ({f"{UP}.weight": torch.ones(2)}, rf"{FOLDED_SCALES_FILE} holds .*up_proj\.weight, which is no scale"),
    ],
)
def test_what_is_no_scale_is_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor], words: str) -> None:
    save_file(tensors, tmp_path / FOLDED_SCALES_FILE)

    with pytest.raises(CheckpointError, match=words):
        read_folded_scales(tmp_path)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, {UP: ModuleScales(torch.ones(64) / 2)})
    file.write_bytes(file.read_bytes()[:-1])

    with pytest.raises(CheckpointError, match=rf"{FOLDED_SCALES_FILE} .*bytes"):
        read_folded_scales(tmp_path)
