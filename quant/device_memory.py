"""How much memory of a GPU a quantization takes at most, from the shapes of what is there at once. It asks no GPU.

Legend: P = parameters of a block, N and K = out and in features of a linear.
"""

from collections.abc import Sequence

import torch
from transformers.modeling_utils import PreTrainedModel

from quant.capture import CHUNK_TOKENS
from quant.clip_search import GPU_VALUES_AT_A_TIME
from quant.device import GPU_RESERVE_BYTES
from quant.method import MethodSteps
from quant.model_plan import ModelPlan
from quant.row_spans import GPU_SPAN_BYTES
from quant.scale_groups import linear_of

FLOAT_BYTES = 4
# matrices of K x K at the widest linear that are worked out of the sums, which are counted apart
SEARCH_MATRICES = 2
CORRECTION_MATRICES = 4
# a span of a weight's rows, and what is worked out of it beside
SPAN_COPIES = 8
# values of a chunk that a block holds at once, as multiples of its widest linear's inputs
CHUNK_WIDTHS = 8
# what candidates of a range are beside themselves: rounded, their errors, the products of these
RANGE_COPIES = 6
# the head's weight, and beside it what was rounded and what that lost
HEAD_COPIES = 3


def device_bytes(model: PreTrainedModel, plan: ModelPlan) -> int:
    """For the largest block, or the output head where it is quantized and takes more."""
    sizes = []
    for name, block in plan.stack.blocks.items():
        own = plan.blocks[name]
        shapes = [linear_of(block, linear).weight.shape for linear in own.linear_names()]
        num_values = sum(parameter.numel() for parameter in block.parameters())
        if own.steps.calibrates:
            # the sums of all inputs of a stage are there at once: with a mixture of experts, of every expert
            num_values += sum(linear_of(block, group.linears[0]).in_features ** 2 for group in own.groups)
        sizes.append(_bytes_of(num_values, shapes, own.steps))
    if plan.head is not None:
        shape = linear_of(model, plan.head.name).weight.shape
        sizes.append(_bytes_of(HEAD_COPIES * shape.numel(), [shape], next(iter(plan.blocks.values())).steps))
    return max(sizes) + GPU_RESERVE_BYTES


def _bytes_of(num_values: int, shapes: Sequence[torch.Size], steps: MethodSteps) -> int:
    """num_values: of what is there all the time. shapes: [N, K] of linears that are rounded, one after the other."""
    largest = max((FLOAT_BYTES * shape.numel() for shape in shapes), default=0)
    num_bytes = FLOAT_BYTES * num_values + SPAN_COPIES * min(largest, GPU_SPAN_BYTES)
    widest_input = max((shape[1] for shape in shapes), default=0)
    num_bytes += FLOAT_BYTES * CHUNK_WIDTHS * CHUNK_TOKENS * widest_input
    if not steps.calibrates:
        return num_bytes
    num_matrices = CORRECTION_MATRICES if steps.correction else SEARCH_MATRICES
    return num_bytes + FLOAT_BYTES * (num_matrices * widest_input**2 + RANGE_COPIES * GPU_VALUES_AT_A_TIME)
