"""What is done with each block of a model: its groups, and how its weights are rounded. It changes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from quant.block import BlockPlan
from quant.block_groups import groups_of
from quant.errors import SourceError
from quant.model_structure import BlockStack, find_blocks
from quant.recipe import Recipe, choose_group_size
from quant.scale_groups import ROUTER_NAMES, linear_of, rows_of
from quant.scale_search import Grouping

# norms, biases and routers are less of a block than this; experts that are no linear layers are more
MAX_PLAIN_SHARE = 0.2


@dataclass(frozen=True)
class ModelPlan:
    """How a model is quantized: where its blocks are, and a plan for each by its full name."""

    stack: BlockStack
    blocks: Mapping[str, BlockPlan]
    grouping: Grouping

    def linear_names(self) -> tuple[str, ...]:
        """All linears that are quantized, by full name."""
        return tuple(f"{block}.{linear}" for block, plan in self.blocks.items() for linear in plan.linear_names())


def plan_model(recipe: Recipe, model: PreTrainedModel) -> ModelPlan:
    """How the blocks of this model are quantized.

    Raises RecipeError naming the layer that the group size misses, SourceError when the blocks have no linear layer.
    """
    model_type: str = model.config.model_type
    text_config: PreTrainedConfig = model.config.get_text_config()
    stack = find_blocks(model)
    groups = {name: groups_of(block, rows_of(model_type), text_config) for name, block in stack.blocks.items()}
    linears = {
        f"{block_name}.{linear}": linear_of(block, linear)
        for block_name, block in stack.blocks.items()
        for group in groups[block_name]
        for linear in group.linears
    }
    if not linears:
        raise SourceError(f"model type {model_type!r} has no linear layer in its blocks to quantize")
    group_size = choose_group_size(recipe.group_size, {name: linear.in_features for name, linear in linears.items()})
    grouping = Grouping(recipe.bits, group_size)
    return ModelPlan(stack, {name: BlockPlan(own, grouping, recipe.steps) for name, own in groups.items()}, grouping)


def shortcomings(plan: ModelPlan, model: PreTrainedModel) -> tuple[str, ...]:
    """What is done less well than it could be, in sentences."""
    notes = []
    if not rows_of(model.config.model_type):
        notes.append(
            f"{model.config.model_type} has no row in the table of architectures: its layers were rounded without "
            "scaling their inputs, which loses more than it would with a row"
        )
    num_weights = sum(parameter.numel() for block in plan.stack.blocks.values() for parameter in block.parameters())
    num_quantized = sum(linear_of(model, name).weight.numel() for name in plan.linear_names())
    share = 1 - num_quantized / num_weights
    if share > MAX_PLAIN_SHARE:
        notes.append(f"{share:.0%} of the blocks' weights are not in linear layers, and stay in 16 bits")
    return tuple(notes)


def plain_names(plan: ModelPlan, model: PreTrainedModel) -> tuple[str, ...]:
    """The linears and routers of the whole model that stay as they are, by full name.

    transformers' routers are no linears, but in other servers they are.
    """
    quantized = set(plan.linear_names())
    return tuple(
        name
        for name, module in model.named_modules()
        if name not in quantized and (isinstance(module, nn.Linear) or _is_router(name, module))
    )


def _is_router(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] in ROUTER_NAMES and hasattr(module, "weight")
