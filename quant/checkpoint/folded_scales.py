"""The scales that AWQ folded into a checkpoint's linears: what an adapter of the original model is to be multiplied by.

A safetensors file that is not called one: servers load every *.safetensors, *.bin and *.pt of a directory, and end at
tensors that are no weights of the model.

Legend: K = in features of a linear, N = out features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from quant.checkpoint.stored_module import PackedSpec
from quant.checkpoint.tensor_files import StoredTensor, read_header, read_whole
from quant.errors import CheckpointError

FOLDED_SCALES_FILE = "folded_scales.awq"
# after a module's name
_INPUT, _OUTPUT = ".input_scale", ".output_divisor"


@dataclass(frozen=True)
class ModuleScales:
    """What folding did to a linear W of the original: it is diag(1 / divisor) W diag(scale) now, and then rounded.

    input_scale: float32 [K], what its input is divided by. output_divisor: float32 [N], what its output is divided by.
    None for ones.
    """

    input_scale: Tensor | None = None
    output_divisor: Tensor | None = None


def encode_folded_scales(scales: Mapping[str, ModuleScales]) -> bytes:
    """The file's bytes, from scales by the name of the linear in the checkpoint."""
    return save(scale_tensors(scales))


def read_folded_scales(directory: Path) -> dict[str, ModuleScales] | None:
    """Scales by the name of the linear in the checkpoint; None where the checkpoint has no such file.

    Raises CheckpointError for a file that is damaged, or holds something else than float32 numbers above 0.
    """
    file = directory / FOLDED_SCALES_FILE
    if not file.is_file():
        return None
    tensors = {name: _read_scale(name, stored) for name, stored in read_header(file).items()}
    scales = take_scales(tensors)
    if tensors:
        raise CheckpointError(f"{file} holds {min(tensors)}, which is no scale of a linear; fetch the file again")
    return scales


def scale_tensors(scales: Mapping[str, ModuleScales]) -> dict[str, Tensor]:
    """Scales by the name of their linear as tensors on the CPU, by names and in a memory of their own."""
    inputs = {name + _INPUT: own.input_scale for name, own in scales.items()}
    outputs = {name + _OUTPUT: own.output_divisor for name, own in scales.items()}
    # linears that read one input have one scale, and the library writes no memory twice
    return {name: own.to("cpu", copy=True) for name, own in {**inputs, **outputs}.items() if own is not None}


def take_scales(tensors: dict[str, Tensor]) -> dict[str, ModuleScales]:
    """The inverse of `scale_tensors`; takes its tensors out of the dictionary, and leaves all others there."""
    ends = (_INPUT, _OUTPUT)
    modules = dict.fromkeys(name.removesuffix(end) for name in tensors for end in ends if name.endswith(end))
    return {name: ModuleScales(*(tensors.pop(name + end, None) for end in ends)) for name in modules}


def most_scale_bytes(modules: Iterable[PackedSpec]) -> int:
    """What the scales of these linears take, at most."""
    return sum(spec.num_inputs + spec.num_outputs for spec in modules) * torch.float32.itemsize


def _read_scale(name: str, stored: StoredTensor) -> Tensor:
    scale = read_whole(stored)
    if scale.dtype is not torch.float32 or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(f"{stored.file}: {name} must be float32 numbers above 0; fetch the file again")
    return scale
