"""Tensors come out of their files as they lie there, one by one or by rows, and only where they are the model's own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quant import original_weights
from quant.blockwise_model import hold_nothing
from quant.checkpoint.tensor_files import find_tensors
from quant.errors import CheckpointError
from quant.original_weights import HeldWeights, RoundedWeights, StoredWeights, find_stored
from tests.quant.tiny_families import VARIANTS, open_tiny
from tests.tiny_models import save_tiny_model

TABLE, VALUE, COUNT = "table", "value", "count"


@pytest.fixture
def stored(tmp_path: Path) -> StoredWeights:
    tensors = {
        TABLE: torch.arange(40.0).view(10, 4).bfloat16(),
        VALUE: torch.tensor(1 / 3),
        COUNT: torch.tensor([1, 2**40 + 1]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return StoredWeights(find_tensors(tmp_path))


@pytest.mark.parametrize("piece_bytes", [1, 24, 2**20])
def test_a_tensor_is_read_in_pieces_of_any_size(
    piece_bytes: int, stored: StoredWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(original_weights, "PIECE_BYTES", piece_bytes)
    table = torch.arange(40.0).view(10, 4)
    assert torch.equal(stored.read(TABLE, torch.float32), table)
    assert torch.equal(stored.read(TABLE, torch.float16), table.half())
    assert torch.equal(torch.cat(list(stored.pieces(TABLE))), table)
    assert torch.equal(stored.read(VALUE, torch.float32), torch.tensor(1 / 3))
    # whole numbers are not taken through floating ones
    assert stored.read(COUNT, torch.int64).tolist() == [1, 2**40 + 1]


def test_rows_are_read_in_any_order(stored: StoredWeights) -> None:
    rows = torch.tensor([3, 4, 5, 0, 9, 9])
    assert torch.equal(stored.read_rows(TABLE, rows), torch.arange(40.0).view(10, 4)[rows])


def test_what_is_read_is_the_callers_own(stored: StoredWeights) -> None:
    for weights in (stored, HeldWeights({TABLE: torch.arange(40.0).view(10, 4)})):
        weights.read(TABLE, torch.float32).zero_()
        assert float(weights.read(TABLE, torch.float32).sum()) == 780


def test_a_file_that_became_shorter_is_named(stored: StoredWeights) -> None:
    file = stored.tensors[TABLE].file
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has become shorter while it was read"):
        [stored.read(name, torch.float32) for name in (TABLE, VALUE, COUNT)]


def test_most_values_decide_on_the_dtype(stored: StoredWeights) -> None:
    assert stored.dtype == torch.bfloat16


def test_rounded_weights_are_what_a_checkpoint_holds() -> None:
    third = torch.tensor([[1 / 3], [2 / 3]])
    rounded = RoundedWeights(HeldWeights({"a": third, "b": third}), torch.float16, {"b": torch.ones(2, 1)})
    half = third.half().float()
    for values in (rounded.read("a", torch.float32), *rounded.pieces("a"), rounded.read_rows("a", torch.arange(2))):
        assert torch.equal(values, half)
    for values in (rounded.read("b", torch.float32), *rounded.pieces("b"), rounded.read_rows("b", torch.arange(2))):
        assert torch.equal(values, torch.ones(2, 1))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_family_with_rows_is_read_tensor_by_tensor(variant: object, tmp_path: Path) -> None:
    # given a model as transformers holds it, experts as linears
    model = open_tiny(variant, tmp_path)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hold_nothing(model)

    found = find_stored(model, find_tensors(tmp_path))

    assert found is not None
    for name, tensor in expected.items():
        assert torch.equal(found.read(name, tensor.dtype), tensor), name


def test_names_that_do_not_follow_from_the_model_are_not_guessed(tmp_path: Path) -> None:
    # given files of the decoder alone, without the name of the model around it
    save_tiny_model("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(short, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert find_stored(AutoModelForCausalLM.from_pretrained(tmp_path), find_tensors(tmp_path)) is None


def test_a_tensor_of_another_shape_is_not_taken(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model("llama", tmp_path))
    files = find_tensors(tmp_path)
    name = "model.norm.weight"
    files[name] = replace(files[name], spec=replace(files[name].spec, shape=(8, 8)))
    assert find_stored(model, files) is None
