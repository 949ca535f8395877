"""A dense linear in fixed rows gives a row the same bits, whatever is beside it; nothing else of a model changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.model.decoder import Decoder
from server.model.fixed_rows import BLOCK_ROWS, FixedRowsLinear, fix_rows
from server.model.layers import DenseLinear, JoinedLinear, QuantizedLinear
from server.model.loader import load_model
from tests.server.model.quantized_models import quantize_in_place
from tests.tiny_models import save_tiny_model

MAX_ROWS_TOGETHER = 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_bits_that_it_has_alone(dtype: torch.dtype) -> None:
    # given shapes of a small model's head and of its MLP
    for num_inputs, num_outputs in ((576, 3000), (1536, 576), (100, 33)):
        plain = DenseLinear(torch.randn(num_outputs, num_inputs).to(dtype), torch.randn(num_outputs).to(dtype))
        linear = FixedRowsLinear(plain, MAX_ROWS_TOGETHER)
        rows = torch.randn(MAX_ROWS_TOGETHER, num_inputs).to(dtype)
        alone = torch.cat([linear(row[None]) for row in rows])
        # when they come in any number, from any place
        for start, stop in ((0, 2), (1, BLOCK_ROWS), (3, BLOCK_ROWS + 4), (5, 50), (0, MAX_ROWS_TOGETHER)):
            assert torch.equal(linear(rows[start:stop]), alone[start:stop])
        torch.testing.assert_close(alone, plain(rows))


def test_the_rows_of_a_long_sequence_are_computed_at_once() -> None:
    plain = DenseLinear(torch.randn(33, 100), None)
    rows = torch.randn(MAX_ROWS_TOGETHER + 1, 100)
    assert torch.equal(FixedRowsLinear(plain, MAX_ROWS_TOGETHER)(rows), plain(rows))


def test_all_dense_linears_of_a_decoder_are_found_and_the_others_stay(tmp_path: Path) -> None:
    # given a model where some projections are packed, and one joined of both kinds
    directory = save_tiny_model("qwen3", tmp_path)
    quantize_in_place(directory, lambda name: "layers.0." in name or "q_proj" in name)
    decoder = load_model(directory, torch.device("cpu"), None, lambda progress: None).decoder
    assert isinstance(decoder, Decoder)

    fixed = fix_rows(decoder, MAX_ROWS_TOGETHER)

    packed, mixed = fixed.layers
    assert isinstance(fixed.head, FixedRowsLinear)
    assert isinstance(mixed.attention.output, FixedRowsLinear)
    assert isinstance(mixed.mlp.gate_up, FixedRowsLinear)
    assert isinstance(mixed.attention.qkv, JoinedLinear)
    assert [type(part) for part in mixed.attention.qkv.parts] == [QuantizedLinear, FixedRowsLinear, FixedRowsLinear]
    assert packed == decoder.layers[0]
    assert replace(fixed, head=decoder.head, layers=decoder.layers) == decoder
