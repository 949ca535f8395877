"""What is done with each block of a model: its groups, and how its weights are rounded. It changes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from quant.block import BlockPlan
from quant.block_groups import groups_of
from quant.errors import SourceError
from quant.model_structure import BlockStack, find_blocks, find_head
from quant.recipe import Recipe, choose_group_size
from quant.scale_groups import ROUTER_NAMES, linear_of, rows_of
from quant.scale_search import Grouping

# norms, biases and routers are less of a block than this; experts that are no linear layers are more
MAX_PLAIN_SHARE = 0.2


@dataclass(frozen=True)
class HeadPlan:
    """The output head, where it is quantized: its full name, and how it is rounded."""

    name: str
    grouping: Grouping


@dataclass(frozen=True)
class ModelPlan:
    """How a model is quantized: where its blocks are, a plan for each by its full name, and its output head's.

    grouping: that of all linears of the blocks, but for those of a mixture.
    """

    stack: BlockStack
    blocks: Mapping[str, BlockPlan]
    grouping: Grouping
    head: HeadPlan | None

    def block_groupings(self) -> dict[str, Grouping]:
        """How each linear of the blocks is rounded, by full name."""
        return {
            f"{block}.{linear}": plan.grouping_of(linear)
            for block, plan in self.blocks.items()
            for linear in plan.linear_names()
        }

    def groupings(self) -> dict[str, Grouping]:
        """How each linear that is quantized is rounded, by full name: those of the blocks, and the head."""
        head = {self.head.name: self.head.grouping} if self.head is not None else {}
        return {**self.block_groupings(), **head}


def plan_model(recipe: Recipe, model: PreTrainedModel) -> ModelPlan:
    """How the blocks of this model are quantized.

    Raises RecipeError naming the layer that the group size misses, SourceError when the blocks have no linear layer,
    or there is no output head to quantize.
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
    head = None if recipe.lm_head is None else find_head(model)
    in_features = {name: linear.in_features for name, linear in linears.items()}
    if head is not None:
        in_features[head] = linear_of(model, head).in_features
    grouping = Grouping(recipe.bits, choose_group_size(recipe.group_size, in_features))
    return ModelPlan(
        stack=stack,
        blocks={name: BlockPlan(own, grouping, recipe.steps) for name, own in groups.items()},
        grouping=grouping,
        head=None if head is None or recipe.lm_head is None else HeadPlan(head, replace(grouping, bits=recipe.lm_head)),
    )


def mix(plan: ModelPlan, groupings: Mapping[str, Grouping]) -> ModelPlan:
    """The same plan with these groupings of the blocks' linears, by full name."""
    blocks = {
        name: replace(block, mixture={linear: groupings[f"{name}.{linear}"] for linear in block.linear_names()})
        for name, block in plan.blocks.items()
    }
    return replace(plan, blocks=blocks)


def shortcomings(plan: ModelPlan, model: PreTrainedModel) -> tuple[str, ...]:
    """What is done less well than it could be, in sentences."""
    notes = []
    if not rows_of(model.config.model_type):
        notes.append(
            f"{model.config.model_type} has no row in the table of architectures: its layers were rounded without "
            "scaling their inputs, which loses more than it would with a row"
        )
    num_weights = sum(parameter.numel() for block in plan.stack.blocks.values() for parameter in block.parameters())
    num_quantized = sum(linear_of(model, name).weight.numel() for name in plan.block_groupings())
    share = 1 - num_quantized / num_weights
    if share > MAX_PLAIN_SHARE:
        notes.append(f"{share:.0%} of the blocks' weights are not in linear layers, and stay in 16 bits")
    return tuple(notes)


def plain_names(plan: ModelPlan, model: PreTrainedModel) -> tuple[str, ...]:
    """The linears and routers of the whole model that stay as they are, by full name.

    transformers' routers are no linears, but in other servers they are.
    """
    quantized = plan.groupings().keys()
    return tuple(
        name
        for name, module in model.named_modules()
        if name not in quantized and (isinstance(module, nn.Linear) or _is_router(name, module))
    )


def _is_router(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] in ROUTER_NAMES and hasattr(module, "weight")
