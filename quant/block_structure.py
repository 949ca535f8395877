"""What is found out about a block by running it, once for all blocks that are built the same. It changes no weight."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from quant.block import BlockPlan
from quant.block_groups import ScaleGroup, share_inputs
from quant.capture import BlockInput, Child, running_order
from quant.residual import StreamWriter, find_stream_writers

# the only setting of a block's modules in which blocks that compute the same differ
NUMBER_IN_MODEL = "layer_idx"


@dataclass(frozen=True)
class _Findings:
    groups: tuple[ScaleGroup, ...]
    writers: Mapping[str, StreamWriter]
    order: tuple[Child, ...]


class BlockStructures:
    """The structures of a model's blocks, each tried on the first block that has it."""

    def __init__(self) -> None:
        self._known: dict[object, _Findings] = {}

    def complete(self, plan: BlockPlan, block: nn.Module, block_index: int, chunk: BlockInput) -> BlockPlan:
        """The plan with its groups joined by input, its order and, for the correction, what adds to the stream.

        The block of that index is to be as the source has it; it is run on the chunk unless one like it has been.
        """
        structure = (_build_of(block), plan.groups)
        findings = self._known.get(structure)
        if findings is None:
            groups = share_inputs(plan.groups, block, block_index, chunk)
            linears = plan.linear_names() if plan.steps.correction else ()
            writers = find_stream_writers(block, block_index, chunk, linears) if linears else {}
            findings = _Findings(groups, writers, running_order(block, block_index, chunk))
            self._known[structure] = findings
        return replace(plan, groups=findings.groups, writers=findings.writers, order=findings.order)


def _build_of(block: nn.Module) -> tuple[object, ...]:
    """All modules by name, with their class, their parameters' shapes and their settings: equal ones compute alike."""
    return tuple(
        (
            name,
            type(module),
            tuple((own, parameter.shape) for own, parameter in module.named_parameters(recurse=False)),
            tuple(sorted((field, value) for field, value in vars(module).items() if _is_setting(field, value))),
        )
        for name, module in block.named_modules()
    )


def _is_setting(field: str, value: object) -> bool:
    return isinstance(value, bool | int | float | str) and field != NUMBER_IN_MODEL and not field.startswith("_")
