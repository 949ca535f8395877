"""Tiny checkpoints whose linears are quantized by plain rounding, and the model that they stand for."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels import reference
from kernels.layout import GroupCodes, PackedWeight, pack
from quant.checkpoint import awq_gemm
from tests.tiny_models import read_config

GROUP_SIZE = 32
TENSOR_FILE = "model.safetensors"
# mixtral's experts have numbers for names
PROJECTIONS = ("_proj", ".w1", ".w2", ".w3")


def round_weight(weight: Tensor) -> PackedWeight:
    """Plain asymmetric rounding of a dense weight [N, K], scales in float16."""
    groups = weight.float().unflatten(1, (-1, GROUP_SIZE))
    largest, smallest = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)
    scales = ((largest - smallest) / 15).to(torch.float16)
    zeros = (-smallest / scales.float()).round().clamp(0, 15)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15).flatten(1)
    return pack(GroupCodes(codes.to(torch.uint8), scales, zeros.to(torch.uint8), bits=4, group_size=GROUP_SIZE))


def quantize_in_place(directory: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Quantize the projections that `wanted` names. Returns the dense weights that the checkpoint now stands for."""
    tensors = load_file(directory / TENSOR_FILE)
    dense = dict(tensors)
    for name in list(tensors):
        module_name = name.removesuffix(".weight")
        if not module_name.endswith(PROJECTIONS) or name == module_name or not wanted(module_name):
            continue
        packed = round_weight(tensors.pop(name))
        dense[name] = reference.dequantize(packed)
        tensors |= {f"{module_name}.{suffix}": tensor for suffix, tensor in awq_gemm.encode(packed).items()}
    save_file(tensors, directory / TENSOR_FILE, metadata={"format": "pt"})
    method = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True}
    (directory / "config.json").write_text(json.dumps({**read_config(directory), "quantization_config": method}))
    return dense
