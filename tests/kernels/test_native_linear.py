"""Native linear layers, and what rounds their inputs, against the reference: numbers, rows, instruction sets, NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.layout import GroupCodes, PackedWeight, pack
from kernels.native_cpu import NativeCpu, NativeLinear
from kernels.native_program import Norm, ProgramBuilder
from kernels.tile_layout import activation_block, repack_tiles, unpack_tiles
from tests.kernels.native_libraries import open_native, running_instruction_sets
from tests.kernels.packed_weights import random_packed_weight

NAMES = [candidate.name for candidate in running_instruction_sets()] or ["none"]
# (N, K, group size): the demo model's, one output, odd counts, every block of activations, one scale a row
SHAPES = [(8, 576, 64), (1, 576, 32), (17, 128, 128), (70, 96, 96), (33, 576, 576), (960, 64, 64), (48, 512, 256)]
# an activation is rounded to so many steps between 0 and the largest of its block
STEPS = 127 * 8


@pytest.fixture(params=NAMES)
def native(request: pytest.FixtureRequest) -> NativeCpu:
    return open_native(request.param)


def random_rows(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed))


def tolerance(x: Tensor, weight: PackedWeight) -> Tensor:
    """How far [M, N] a product may be off: half a step of each activation, and the rounding of float32 sums."""
    magnitudes = reference.dequantize(weight).abs().T
    blocks = x.unflatten(1, (-1, activation_block(weight.group_size)))
    half_steps = (blocks.abs().amax(dim=-1, keepdim=True) / STEPS / 2).expand_as(blocks).flatten(1)
    return 1.01 * half_steps @ magnitudes + 1e-5 * (x.abs() @ magnitudes) + 1e-7


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_hold_the_weight(shape: tuple[int, int, int], bits: int) -> None:
    weight = random_packed_weight(*shape, bits=bits)

    back = unpack_tiles(repack_tiles(weight))

    assert (back.shape, back.bits, back.group_size) == (weight.shape, weight.bits, weight.group_size)
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(back, name), getattr(weight, name))


def test_a_group_that_is_no_multiple_of_32_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32, not 48"):
        repack_tiles(random_packed_weight(4, 96, 48))


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 50]),
    num_outputs=st.integers(1, 70),
    group_size=st.sampled_from([32, 64, 96, 128, 256]),
    num_groups=st.integers(1, 5),
    bits=st.sampled_from([3, 4, 8]),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_a_linear_is_the_reference_up_to_the_rounding_of_activations(
    num_rows: int, num_outputs: int, group_size: int, num_groups: int, bits: int, scale_dtype: torch.dtype
) -> None:
    plain = random_packed_weight(num_outputs, group_size * num_groups, group_size, bits=bits)
    weight = PackedWeight(**{**vars(plain), "scales": plain.scales.to(scale_dtype)})
    x = random_rows(num_rows, group_size * num_groups)
    bias = random_rows(1, num_outputs, seed=1)[0]
    expected = reference.quantized_linear(x, weight, bias)

    # given every instruction set of this machine, the result is the same to the bit
    outputs = [NativeLinear(open_native(name), repack_tiles(weight), bias)(x) for name in NAMES]

    assert bool(((outputs[0] - expected).abs() <= tolerance(x, weight)).all())
    assert all(torch.equal(outputs[0], output) for output in outputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_the_other_rows(native: NativeCpu, shape: tuple[int, int, int]) -> None:
    linear = NativeLinear(native, repack_tiles(random_packed_weight(*shape)))
    x = random_rows(65, shape[1])

    alone = torch.cat([linear(row[None]) for row in x])

    for num_rows in (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 48, 64, 65):
        assert torch.equal(linear(x[:num_rows]), alone[:num_rows])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_spoils_no_other(native: NativeCpu, bad: float) -> None:
    linear = NativeLinear(native, repack_tiles(random_packed_weight(20, 128, 64)))
    x = random_rows(20, 128)
    clean = linear(x)

    x[3, 70] = bad
    output = linear(x)

    assert bool(output[3].isnan().all())
    assert torch.equal(output[[0, 1, 2, *range(4, 20)]], clean[[0, 1, 2, *range(4, 20)]])


@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_codes_zeros_scales_and_activations(native: NativeCpu, bits: int) -> None:
    # given all corners of codes and zero points, subnormal and large scales, and rows from zero to huge
    largest = 2**bits - 1
    corners = torch.tensor([[0, 0], [0, largest], [largest, 0], [largest, largest]], dtype=torch.uint8)
    codes, zeros = corners.repeat(4, 1).unbind(dim=1)
    scales = torch.tensor([6e-8, 1e-4, 1.0, 60000.0]).repeat_interleave(4)
    weight = pack(
        GroupCodes(
            codes=codes[:, None].expand(16, 256).contiguous(),
            scales=scales[:, None].half(),
            zeros=zeros[:, None].contiguous(),
            bits=bits,
            group_size=256,
        )
    )
    x = random_rows(20, 256).sign() * torch.tensor([0.0, 1e-30, 1.0, 1e20]).repeat(5)[:, None]
    exact = x.double() @ reference.dequantize(weight).double().T

    output = NativeLinear(native, repack_tiles(weight))(x)

    assert bool(((output - exact).abs() <= 1e-5 * exact.abs().amax(dim=1, keepdim=True)).all())
    assert bool((output[0] == 0).all())


def test_no_rows_give_no_rows_and_a_wrong_shape_is_refused(native: NativeCpu) -> None:
    linear = NativeLinear(native, repack_tiles(random_packed_weight(20, 128, 64)))

    assert linear(torch.empty(0, 128)).shape == (0, 20)
    with pytest.raises(ValueError, match="the weight takes float32 with K=128"):
        linear(torch.ones(1, 64))
    with pytest.raises(ValueError, match="the weight takes float32 with K=128"):
        linear(torch.ones(1, 128, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="reads the tiles layout, not row_major"):
        NativeLinear(native, random_packed_weight(20, 128, 64))


@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_a_norm_before_a_linear_and_alone(native: NativeCpu, num_rows: int) -> None:
    weight = random_packed_weight(24, 192, 64)
    x, norm = 5 * random_rows(num_rows, 192), Norm(torch.rand(192) + 0.5, 1e-5)
    expected = torch.nn.functional.rms_norm(x, (192,), norm.weight, norm.epsilon)
    builder = ProgramBuilder()
    source, rounded, normalized, target = (
        builder.floats(192), builder.rounded(192, 64), builder.floats(192), builder.floats(24),
    )  # fmt: skip
    builder.quantize(source, rounded, 192, 64, norm)
    builder.linear(rounded, target, repack_tiles(weight), None)
    builder.norm(source, normalized, norm)
    outputs = {source: x, normalized: torch.empty(num_rows, 192), target: torch.empty(num_rows, 24)}

    native.run(builder.finish(), num_rows, outputs)

    torch.testing.assert_close(outputs[normalized], expected, rtol=1e-5, atol=1e-6)
    products = reference.quantized_linear(expected, weight)
    assert bool(((outputs[target] - products).abs() <= 1.01 * tolerance(expected, weight)).all())


@pytest.mark.parametrize("num_rows", [1, 19])
def test_a_gate_before_a_linear_that_adds(native: NativeCpu, num_rows: int) -> None:
    weight = random_packed_weight(40, 640, 32)
    gate_up = 4 * random_rows(num_rows, 1280)
    # far outside of what e to its power can be
    gate_up[0, :2] = torch.tensor([-200.0, 200.0])
    before = random_rows(num_rows, 40, seed=2)
    gated = torch.nn.functional.silu(gate_up[:, :640]) * gate_up[:, 640:]
    builder = ProgramBuilder()
    source, rounded, target = builder.floats(1280), builder.rounded(640, 32), builder.floats(40)
    builder.gate(source, rounded, 640, 32)
    builder.linear(rounded, target, repack_tiles(weight), None, adds=True)
    output = before.clone()

    native.run(builder.finish(), num_rows, {source: gate_up, target: output})

    expected = before + reference.quantized_linear(gated, weight)
    assert bool(((output - expected).abs() <= 1.01 * tolerance(gated, weight) + 1e-5).all())
