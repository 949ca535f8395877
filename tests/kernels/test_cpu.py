"""The CPU kernels against the reference, within what their rounding to bf16 allows."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cpu, dispatch, reference
from kernels.layout import PackedWeight, repack_int4_cpu, unpack
from tests.kernels.packed_weights import random_packed_weight

# half a unit in the last of bf16's 8 significant bits
BF16_ROUNDING = 2.0**-8
# (N, K, group size): the demo model's K, one output, odd counts, groups that the op does not read as they are
SHAPES = [(8, 576, 64), (1, 576, 32), (17, 128, 128), (70, 96, 96), (33, 576, 576), (960, 64, 64)]


def weight_error_bound(weight: PackedWeight) -> Tensor:
    """How far [N, K] the weight may be off: the scale and the offset (8 - zero) * scale are each rounded to bf16."""
    plain = unpack(weight)
    zeros = plain.zeros.float().repeat_interleave(plain.group_size, dim=1)
    scales = plain.scales.float().repeat_interleave(plain.group_size, dim=1)
    return 1.01 * BF16_ROUNDING * scales * ((plain.codes - zeros).abs() + (8 - zeros).abs())


def random_rows(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantized_weights_are_off_by_the_rounding_of_scales_only(shape: tuple[int, int, int]) -> None:
    weight = random_packed_weight(*shape)

    dense = cpu.dequantize(repack_int4_cpu(weight))[:, : shape[0]].T

    assert bool(((dense - reference.dequantize(weight)).abs() <= weight_error_bound(weight)).all())


@settings(max_examples=20, deadline=None)
@given(
    num_rows=st.sampled_from([1, 2, 3, 5, 63, 64, 65, 130]),
    num_outputs=st.integers(1, 140),
    group_size=st.sampled_from([32, 64, 96, 128]),
    num_groups=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_quantized_linear_is_the_reference_up_to_bf16(
    num_rows: int, num_outputs: int, group_size: int, num_groups: int, dtype: torch.dtype
) -> None:
    weight = random_packed_weight(num_outputs, group_size * num_groups, group_size)
    x = random_rows(num_rows, group_size * num_groups).to(dtype)
    bias = random_rows(1, num_outputs, seed=1)[0].to(dtype)

    output = cpu.quantized_linear(x, repack_int4_cpu(weight), bias)

    rounded = x.to(torch.bfloat16).float()
    expected = reference.quantized_linear(rounded, weight)
    largest_products = rounded.abs() @ reference.dequantize(weight).abs().T
    # the weights' rounding, that of dense bf16 products where the CPU has them, and that of the result and its dtype
    tolerance = rounded.abs() @ weight_error_bound(weight).T + BF16_ROUNDING * largest_products
    tolerance += 2.1 * BF16_ROUNDING * (expected.abs() + bias.float().abs()) + 1e-4
    assert output.dtype == dtype
    assert output.shape == (num_rows, num_outputs)
    assert bool(((output.float() - expected - bias.float()).abs() <= tolerance).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_many_rows_differ_from_few_by_the_order_of_summation_only(shape: tuple[int, int, int]) -> None:
    weight = repack_int4_cpu(random_packed_weight(*shape))
    rounded = random_rows(7, shape[1]).to(torch.bfloat16)

    few, many = cpu.multiply_int4(rounded, weight), cpu.multiply_dense(rounded, weight, torch.float32)

    # where the two float32 sums lie on both sides of a rounding border, the results are one bf16 step apart
    sums = (rounded.float() @ cpu.dequantize(weight)).abs()
    assert bool(((few.float() - many.float()).abs() <= 2 * BF16_ROUNDING * sums + 1e-4).all())
    assert float((few != many).float().mean()) < 0.02


def test_the_dense_product_in_bf16_is_the_one_in_float32_up_to_rounded_weights() -> None:
    weight = repack_int4_cpu(random_packed_weight(70, 576, 64))
    rounded = random_rows(70, 576).to(torch.bfloat16)

    coarse, fine = (cpu.multiply_dense(rounded, weight, dtype).float() for dtype in (torch.bfloat16, torch.float32))

    largest_products = rounded.float().abs() @ cpu.dequantize(weight).abs()
    assert bool(((coarse - fine).abs() <= BF16_ROUNDING * largest_products + 2 * BF16_ROUNDING * fine.abs()).all())


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    weight = repack_int4_cpu(random_packed_weight(96, 576, 64))
    x = random_rows(cpu.cpu_traits().max_int4_op_rows, 576)

    together = cpu.quantized_linear(x, weight)

    for count in (1, 2, 3, 5, 16, 31):
        assert torch.equal(cpu.quantized_linear(x[:count], weight), together[:count])
    assert torch.equal(cpu.quantized_linear(x[-1:], weight), together[-1:])


def test_quantized_linear_refuses_another_layout_and_another_width() -> None:
    weight = random_packed_weight(4, 64, 32)

    with pytest.raises(ValueError, match="reads the int4_cpu layout, not row_major"):
        cpu.quantized_linear(torch.ones(1, 64), weight)
    with pytest.raises(ValueError, match="x has K=96, the weight has K=64"):
        cpu.quantized_linear(torch.ones(1, 96), repack_int4_cpu(weight))


def test_codes_are_unpacked_as_a_cpu_without_vector_instructions_packs_them() -> None:
    program = (
        "import torch\n"
        "from kernels import cpu\n"
        "from kernels.layout import repack_int4_cpu\n"
        "from tests.kernels.packed_weights import random_packed_weight\n"
        "weight = repack_int4_cpu(random_packed_weight(70, 64, 32))\n"
        "x = torch.eye(64, dtype=torch.bfloat16)\n"
        "same = torch.equal(cpu.multiply_int4(x, weight), cpu.multiply_dense(x, weight, torch.float32))\n"
        "print(torch.backends.cpu.get_cpu_capability(), same)\n"
    )

    finished = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )

    assert finished.stdout.split() == ["DEFAULT", "True"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 576), (5, 3, 16)])
def test_rms_norm_divides_by_the_root_of_the_mean_square(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).to(dtype)
    weight = torch.rand(shape[-1], generator=generator).to(dtype)

    output = cpu.rms_norm(x, weight, 1e-5)

    exact = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert output.dtype == dtype
    torch.testing.assert_close(output, exact.to(dtype))


@pytest.mark.parametrize("gate", [dispatch.silu_gate, dispatch.gelu_gate])
@pytest.mark.parametrize(("num_threads", "width"), [(3, 1408), (5, 4864), (7, 11008)])
def test_a_gates_row_has_the_bits_that_it_has_alone(
    gate: Callable[[Tensor], Tensor], num_threads: int, width: int
) -> None:
    # given more elements than one thread is given, cut among threads within rows
    gate_up = torch.randn(64, 2 * width, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = gate(gate_up)
        alone = torch.cat([gate(row[None]) for row in gate_up])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)
