"""Which kernel runs is a matter of device and rows, an absent one is an error, and `kernels` stays a quiet name."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kernels import dispatch, reference
from kernels.experts import stack_experts, with_scales_alike
from kernels.layout import WeightLayout, repack_planar
from tests.kernels.packed_weights import random_packed_weight


def test_each_device_reads_its_own_layout() -> None:
    assert dispatch.runtime_layout(torch.device("cpu")) is WeightLayout.INT4_CPU
    assert dispatch.runtime_layout(torch.device("cuda")) is WeightLayout.PLANAR


def test_a_prepared_weight_gives_the_reference_on_the_cpu() -> None:
    weight = random_packed_weight(40, 576, 64)
    x = torch.randn(3, 576, generator=torch.Generator().manual_seed(0))

    output = dispatch.quantized_linear(x, dispatch.prepare_weight(weight, torch.device("cpu")))

    torch.testing.assert_close(output, reference.quantized_linear(x, weight), atol=0.05, rtol=0.02)


def test_codes_of_8_bits_are_multiplied_as_they_are_packed_on_a_gpu_only() -> None:
    weight = random_packed_weight(8, 64, 32, bits=8)

    assert dispatch.has_packed_kernel(weight, torch.device("cuda"))
    assert not dispatch.has_packed_kernel(weight, torch.device("cpu"))


def test_prepared_experts_give_the_reference_on_the_cpu() -> None:
    weights = [random_packed_weight(40, 64, 32, seed=seed) for seed in range(3)]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))

    routing = dispatch.route(logits, 2, renormalized=True)
    plan = dispatch.plan_experts(routing.experts, 3)
    experts = dispatch.prepare_experts(weights, torch.device("cpu"))
    output = dispatch.sum_choices(dispatch.grouped_linear(x, experts, plan), routing.weights)

    expected = reference.route(logits, 2, renormalized=True)
    choices = reference.grouped_linear(x, weights, expected.experts.flatten())
    torch.testing.assert_close(output, reference.sum_choices(choices, expected.weights), atol=0.05, rtol=0.02)


def test_experts_are_multiplied_where_they_were_prepared_for() -> None:
    choices = torch.tensor([[0, 1]])
    on_cpu = dispatch.prepare_experts([random_packed_weight(8, 64, 32)] * 2, torch.device("cpu"))
    on_gpu = stack_experts([repack_planar(random_packed_weight(8, 64, 32))] * 2)
    x = torch.ones(1, 64, dtype=torch.float16)

    with pytest.raises(ValueError, match="in the planar layout are multiplied on a GPU"):
        dispatch.grouped_linear(x, on_gpu, dispatch.plan_experts(choices, 2))
    with pytest.raises(ValueError, match="in the int4_cpu layout are multiplied on a CPU"):
        dispatch.grouped_linear(x, on_cpu, reference.sorted_by_expert(choices, 2, 16))


def test_experts_whose_scales_need_different_halves_are_stacked_in_the_one_that_holds_all() -> None:
    # given scales in float32, of which the second expert's are below what fp16 holds
    weights = [random_packed_weight(8, 64, 32, seed=seed) for seed in range(2)]
    wide = [
        replace(weight, scales=weight.scales.float() * factor)
        for weight, factor in zip(weights, (1.0, 2.0**-20), strict=True)
    ]

    stacked = stack_experts([repack_planar(weight) for weight in with_scales_alike(wide)])

    assert stacked.scales.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="scales of a layer's experts must agree"):
        stack_experts([repack_planar(weight) for weight in wide])


def test_a_device_without_kernels_is_refused() -> None:
    meta = torch.device("meta")

    with pytest.raises(ValueError, match="no kernels for the device meta; use cpu or cuda"):
        dispatch.runtime_layout(meta)
    with pytest.raises(ValueError, match="no kernels for the device meta; use cpu or cuda"):
        dispatch.quantized_linear(torch.ones(1, 64, device=meta), random_packed_weight(4, 64, 32))
    with pytest.raises(ValueError, match="no kernels for the device meta; use cpu or cuda"):
        dispatch.rms_norm(torch.ones(1, 64, device=meta), torch.ones(64, device=meta), 1e-5)


def test_the_cpu_path_never_imports_triton() -> None:
    program = (
        "import sys, torch\n"
        "from kernels import dispatch\n"
        "dispatch.rms_norm(torch.ones(1, 8), torch.ones(8), 1e-5)\n"
        "print([name for name in sys.modules if name.startswith('kernels.')])\n"
    )

    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    ).stdout

    assert "kernels.cpu" in printed
    assert not any(name in printed for name in ("gemv_int4", "gemm_int4", "paged_attention"))


def test_transformers_does_not_take_our_kernels_for_the_public_distribution() -> None:
    program = (
        "import kernels.dispatch\nfrom transformers.utils import is_kernels_available\nprint(is_kernels_available())\n"
    )

    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    ).stdout

    assert printed.split() == ["False"]
