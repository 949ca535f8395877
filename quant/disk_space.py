"""What a quantization will store, and what it takes on disk for that. It stores nothing."""

from collections.abc import Mapping

from transformers.modeling_utils import PreTrainedModel

from kernels.weight_kinds import WHOLE_ROW
from quant.bit_allocation import OptionRange, Shape, budget_of
from quant.checkpoint.folded_scales import most_scale_bytes
from quant.checkpoint.stored_module import PackedSpec
from quant.kept_tensors import Scratch
from quant.model_plan import ModelPlan
from quant.recipe import Recipe
from quant.rounding import SCALE_DTYPE
from quant.scale_fold import STORAGE_DTYPE
from quant.scale_groups import linear_of

# read and written at once, so that a list in a file costs little time
SMALLEST_LIST_BYTES = 2**24


def planned_modules(model: PreTrainedModel, plan: ModelPlan) -> dict[str, PackedSpec]:
    """What each linear that is quantized will be stored as, by its full name."""
    modules = {}
    for name, grouping in plan.groupings().items():
        num_outputs, num_inputs = linear_of(model, name).weight.shape
        group_size = num_inputs if grouping.group_size == WHOLE_ROW else grouping.group_size
        modules[name] = PackedSpec(num_outputs, num_inputs, grouping.bits, group_size, SCALE_DTYPE)
    return modules


def expected_bytes(model: PreTrainedModel, planned: Mapping[str, PackedSpec], budget_bits: int | None) -> int:
    """What the checkpoint's tensors and scales take on disk, at most; budget_bits: what a target lets linears have."""
    # a head that shares the embedding's weight is no parameter of its own, and the embedding stays as it is
    num_plain = sum(
        parameter.numel() for name, parameter in model.named_parameters() if name.removesuffix(".weight") not in planned
    )
    num_packed_bits = max(sum(spec.num_bits for spec in planned.values()), budget_bits or 0)
    return num_packed_bits // 8 + num_plain * STORAGE_DTYPE.itemsize + most_scale_bytes(planned.values())


def finished_bytes(plan: ModelPlan, planned: Mapping[str, PackedSpec], budget_bits: int | None) -> int:
    """What the finished blocks take on disk, at most: they stay until the whole checkpoint is there."""
    specs = [planned[name] for name in plan.block_groupings()]
    num_parameters = sum(parameter.numel() for parameter in plan.stack.module_list.parameters())
    num_plain = num_parameters - sum(spec.num_outputs * spec.num_inputs for spec in specs)
    num_packed_bits = max(sum(spec.num_bits for spec in specs), budget_bits or 0)
    return num_packed_bits // 8 + num_plain * STORAGE_DTYPE.itemsize + most_scale_bytes(specs)


def budget_bits_of(recipe: Recipe, model: PreTrainedModel, plan: ModelPlan) -> int | None:
    """How many bits the linears of the blocks may take; None where the recipe has no target."""
    if recipe.target_bpw is None:
        return None
    shapes = [Shape(*linear_of(model, name).weight.shape) for name in plan.block_groupings()]
    return budget_of(recipe.target_bpw, shapes, OptionRange(recipe.bits, recipe.group_size))


def scratch_bytes(recipe: Recipe, model: PreTrainedModel, planned: Mapping[str, PackedSpec]) -> int:
    """What hidden states take on disk while blocks are searched, about; 0 where memory keeps them all."""
    if not recipe.steps.calibrates:
        return 0
    num_rows, row_tokens = recipe.calibration_shape
    width = model.config.get_text_config().hidden_size
    # the next block's inputs and this one's in both streams, and the original's stream where linears add to it
    streams = (4 + 2) * width
    # what the linears of attention and of the MLP read
    read = 3 * width + max((spec.num_inputs for spec in planned.values()), default=0)
    num_bytes = 4 * num_rows * row_tokens * (streams + read)
    return num_bytes if num_bytes > list_memory_bytes(planned) else 0


def list_memory_bytes(planned: Mapping[str, PackedSpec]) -> int:
    """What each list of hidden states may take of memory: less where a Gram matrix and its factor need more."""
    widest = max((spec.num_inputs for spec in planned.values()), default=0)
    return max(Scratch.memory_bytes - 4 * widest**2 // 8, SMALLEST_LIST_BYTES)
