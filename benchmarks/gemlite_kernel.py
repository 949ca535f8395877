"""gemlite's INT4 kernel for few rows, to compare machine code with: its own code and tiles, where it can be imported.

gemlite asks at import which GPU there is. None is needed to compile, so it is told of the one that is compiled for.
"""

import importlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from kernels.tiles import ARCHITECTURES
from kernels.variant import LoopRules, Variant

PACKAGE = "gemlite"
# whose tuned tiles are taken: the GPUs of these architectures that it was tuned on
TUNED_GPUS = {80: "a100", 89: "4090", 90: "h100"}
# fp16 activations and int32 words of eight codes, as its tables call them
TYPE_ID, CODES_PER_WORD = 104, 8
BITS, NUM_OUTPUTS, NUM_INPUTS = 4, 4096, 14336


def is_installed() -> bool:
    """Whether there is a gemlite to import."""
    return importlib.util.find_spec(PACKAGE) is not None


@contextmanager
def _a_gpu(arch: int) -> Iterator[None]:
    properties = SimpleNamespace(name=TUNED_GPUS[arch], multi_processor_count=ARCHITECTURES[arch].num_processors)
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_benchmarker=lambda: None,
        get_current_device=lambda: 0,
        utils=SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": ARCHITECTURES[arch].shared_bytes}),
    )
    with (
        patch.object(triton.runtime.driver, "_active", driver),
        patch("torch.cuda.get_device_capability", lambda *_: divmod(arch, 10)),
        patch("torch.cuda.get_device_properties", lambda *_: properties),
    ):
        yield


def load_kernel(arch: int) -> JITFunction:
    """The kernel that it multiplies 2 to 64 rows with, without its tuner."""
    with _a_gpu(arch):
        module = importlib.import_module(f"{PACKAGE}.triton_kernels.gemm_splitK_kernels")
    kernel = module.gemm_splitK_INT_kernel
    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    return kernel


def variant_of(arch: int, num_rows: int, group_size: int) -> Variant:
    """Its launch for fp16 activations and a weight of 4096 x 14336, by the tile that it was tuned to on such a GPU."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    tables = json.loads((Path(spec.origin).parent / "configs" / f"{TUNED_GPUS[arch]}.json").read_text())
    signature = (num_rows, NUM_OUTPUTS, NUM_INPUTS, group_size, CODES_PER_WORD, TYPE_ID)
    tile: dict[str, int] = tables["GEMM_SPLITK"][str(signature)]
    half, number = "*fp16:16", "i32:16"
    arguments = {
        "a_ptr": half, "b_ptr": "*i32:16", "c_ptr": half, "scales_ptr": half, "zeros_ptr": half,
        "M": number, "M_CLOSEST": number, "stride_am": number, "stride_bk": number, "stride_cm": number,
        "stride_meta_g": number, "load_scales_as_block": "i1",
    }  # fmt: skip
    constants: dict[str, int | bool | str | tl.dtype | None] = {
        "scales_a_ptr": None, "stride_meta_a_m": None, "stride_meta_a_g": None, "meta_scale_norm_ptr": None,
        "stride_ak": 1, "stride_bn": 1, "stride_cn": 1, "stride_meta_n": 1,
        "N": NUM_OUTPUTS, "K": NUM_INPUTS, "W_nbits": BITS, "group_size": group_size, "unpack_mask": 2**BITS - 1,
        "elements_per_sample": CODES_PER_WORD, "type_id": TYPE_ID, "a_sizeof": 2, "b_sizeof": 4,
        "input_dtype": tl.float16, "output_dtype": tl.float16, "acc_dtype": tl.float32, "meta_dtype": tl.float16,
        # a fused multiply and add of scale and zero point, a zero point for each group
        "channel_scale_mode": 0, "W_group_mode": 4, "zero_is_scalar": False, "data_contiguous": True,
        **{name: tile[name] for name in tile if name.isupper() or name == "A_load_order"},
        "NUM_STAGES": tile["num_stages"], "EVEN_M": True, "EVEN_K": True, "EVEN_N": True,
        "meta_evict_policy": "", "atomic_mode": "relaxed", "a_evict": "evict_last", "b_evict": "evict_first",
        "use_tma": False, "use_5d_scales": False, "block_quant_size": 128, "warp_specialize": False,
    }  # fmt: skip
    units = tile["BLOCK_SIZE_N"] * tile["BLOCK_SIZE_K"] / (32 * tile["num_warps"])
    return Variant(
        kernel="gemm_splitK_INT_kernel",
        arch=arch,
        label=f"{num_rows} rows",
        arguments=tuple(arguments.items()),
        constants=tuple(constants.items()),
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        loop=LoopRules("weight", units=units),
    )
