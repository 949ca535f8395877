"""Which kernel runs is a matter of device and rows, an absent one is an error, and `kernels` stays a quiet name."""

import subprocess
import sys

import pytest
import torch

from kernels import dispatch, reference
from kernels.layout import WeightLayout
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
