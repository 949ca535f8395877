"""Finds which linears of a block add their output to the residual stream, by trying. It changes no weight.

Legend: H = width of the stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.capture import BlockInput, Observation, observe

# the name of the block itself among its modules
BLOCK = ""
# an addition is exact but for float32 rounding of a stream that can be a thousand times larger than what is added
MAX_RESIDUE = 0.02
SEED = 0


@dataclass(frozen=True)
class StreamWriter:
    """A linear's output, times multiplier, is a summand of the stream.

    reader: the module that reads the stream next; BLOCK where it is the block's output.
    """

    reader: str
    multiplier: float


def find_stream_writers(
    block: nn.Module, block_index: int, chunk: BlockInput, linears: Sequence[str]
) -> dict[str, StreamWriter]:
    """Those of the named linears whose output is added to the stream as it is, or times a constant.

    A linear is one if a disturbance of its output comes back unchanged: at a norm of the block, or at its end. A norm
    or a gate between the linear and the stream lets none come back unchanged, so such a linear is none.
    """
    width = chunk.hidden.shape[-1]
    norms = [name for name, module in block.named_modules() if _is_norm(module, width)]
    candidates = [name for name in linears if block.get_submodule(name).get_parameter("weight").shape[0] == width]
    before = observe(block, block_index, chunk, norms, [*candidates, BLOCK])
    # drawn on the CPU, so that the same comes out on every device
    generator = torch.Generator().manual_seed(SEED)
    magnitude = before.outputs[BLOCK].square().mean().sqrt()
    writers = {}
    for name in candidates:
        drawn = torch.randn(before.outputs[BLOCK].shape, generator=generator, device=generator.device)
        disturbance = drawn.to(magnitude.device) * magnitude
        writer = _follow(block, block_index, chunk, name, disturbance, before)
        if writer is not None:
            writers[name] = writer
    return writers


def _follow(
    block: nn.Module, block_index: int, chunk: BlockInput, name: str, disturbance: Tensor, before: Observation
) -> StreamWriter | None:
    """Where the disturbance of the named linear's output comes back first; None when it does nowhere, or not whole."""

    def disturb(_module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return output + disturbance.view_as(output) if output.numel() == disturbance.numel() else None

    hook = block.get_submodule(name).register_forward_hook(disturb)
    try:
        after = observe(block, block_index, chunk, list(before.inputs), [BLOCK])
    finally:
        hook.remove()
    places = {**before.inputs, BLOCK: before.outputs[BLOCK]}
    # in the order in which they ran
    for place, states in {**after.inputs, BLOCK: after.outputs[BLOCK]}.items():
        change = states - places[place]
        multiplier = float((change * disturbance).sum() / disturbance.square().sum())
        residue = float((change - multiplier * disturbance).norm() / change.norm().clamp(min=1e-30))
        if multiplier and residue < MAX_RESIDUE:
            others = places[place] - multiplier * before.outputs[name]
            # a norm that reads the output alone stands between it and the stream
            is_stream = float(others.norm()) > MAX_RESIDUE * float(places[place].norm())
            return StreamWriter(place, multiplier) if is_stream else None
    return None


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (width,)
