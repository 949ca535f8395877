"""From the rows of a family to the scale groups of one block: names looked up, shapes and config checked.

Legend: C = channels of the operation that feeds, N = its out features, K = in features of the linears it feeds.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from quant.capture import BlockInput, readers_by_tensor
from quant.scale_groups import ROUTER_NAMES, GroupRow, Outputs, linear_of
from quant.scale_search import ChannelSpread


@dataclass(frozen=True)
class ScaleSource:
    """The operation that a scale is divided out of, by its name in the block.

    Of every `period` output rows the last `run` are channels, in order; norm_offset as in GroupRow.
    """

    name: str
    run: int
    period: int
    norm_offset: float


@dataclass(frozen=True)
class ScaleGroup:
    """Linears of a block that read one input, by their names in it.

    source: None where their input cannot be scaled. kept: what else reads it, and is not quantized.
    spread: how the source's channels reach the input; direct where there is no source.
    """

    source: ScaleSource | None
    linears: tuple[str, ...]
    kept: tuple[str, ...]
    spread: ChannelSpread

    @property
    def observed(self) -> str:
        """The module where the input is seen whole: a router sees every token, an expert only some."""
        return (*self.kept, *self.linears)[0]


def groups_of(block: nn.Module, rows: Sequence[GroupRow], config: PreTrainedConfig) -> tuple[ScaleGroup, ...]:
    """The scale groups of a block: every linear in one, routers and gates in none.

    A source's own group comes before what its outputs feed: scales are folded from the last group to the first.
    """
    modules = dict(block.named_modules())
    kept = {name for row in rows for name in row.kept}
    free = {
        name: None
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and name not in kept and not {*name.split(".")} & {*ROUTER_NAMES}
    }
    groups: list[ScaleGroup] = []
    for row in rows:
        for single in _per_expert(row, free):
            linears = tuple(name for pattern in single.linears for name in _matches(pattern, free))
            if linears and _holds(single, modules, config):
                groups.append(_group(block, replace(single, linears=linears), modules, config))
                for name in linears:
                    del free[name]
    return (*(_unscaled(block, (name,), ()) for name in free), *groups)


def share_inputs(
    groups: tuple[ScaleGroup, ...], block: nn.Module, block_index: int, chunk: BlockInput
) -> tuple[ScaleGroup, ...]:
    """The same groups, those without a source joined where their linears read one tensor: it is counted once then.

    Seen by running the block on a chunk; a block with one such group or none is not run.
    """
    unscaled = {group.linears[0]: group for group in groups if group.source is None and not group.kept}
    if len(unscaled) < 2:
        return groups
    joined: list[ScaleGroup] = []
    for together in readers_by_tensor(block, block_index, chunk, list(unscaled)):
        own = [unscaled.pop(name) for name in together if name in unscaled]
        if own:
            linears = tuple(name for group in own for name in group.linears)
            joined.append(replace(own[0], linears=linears))
    scaled = [group for group in groups if group.source is not None or group.kept]
    return (*unscaled.values(), *joined, *scaled)


def _per_expert(row: GroupRow, names: Collection[str]) -> Iterator[GroupRow]:
    """The row itself; one row an expert where the source is one of an expert's linears."""
    if "*" not in row.source:
        yield row
        return
    numbered = _as_regex(row.linears[0])
    for number in [match[1] for name in names if (match := numbered.fullmatch(name))]:
        linears = tuple(name.replace("*", number) for name in row.linears)
        yield replace(row, source=row.source.replace("*", number), linears=linears)


def _matches(pattern: str, names: Collection[str]) -> list[str]:
    if "*" not in pattern:
        return [pattern] if pattern in names else []
    return [name for name in names if _as_regex(pattern).fullmatch(name)]


def _as_regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))


def _holds(row: GroupRow, modules: Collection[str], config: PreTrainedConfig) -> bool:
    return row.source in modules and all(getattr(config, field) == value for field, value in row.only_if)


def _group(block: nn.Module, row: GroupRow, modules: Collection[str], config: PreTrainedConfig) -> ScaleGroup:
    kept = tuple(name for name in row.kept if name in modules)
    # a norm without a weight has nothing to divide
    weight: Tensor | None = getattr(block.get_submodule(row.source), "weight", None)
    if weight is None:
        return _unscaled(block, row.linears, kept)
    num_outputs, num_inputs = weight.shape[0], linear_of(block, row.linears[0]).in_features
    num_channels = _num_channels(row.outputs, num_outputs, num_inputs)
    head_width = _head_width(config)
    spread = _spread(num_channels, num_inputs, head_width)
    if spread is None:
        return _unscaled(block, row.linears, kept)
    if row.outputs is Outputs.VALUES_PER_HEAD:
        run, period = head_width, num_outputs * head_width // num_channels
    else:
        run, period = num_channels, num_outputs
    return ScaleGroup(ScaleSource(row.source, run, period, row.norm_offset), row.linears, kept, spread)


def _unscaled(block: nn.Module, linears: tuple[str, ...], kept: tuple[str, ...]) -> ScaleGroup:
    direct = ChannelSpread(width=linear_of(block, linears[0]).in_features, repeats=1)
    return ScaleGroup(None, linears, kept, direct)


def _num_channels(outputs: Outputs, num_outputs: int, num_inputs: int) -> int:
    """C. Queries are as wide as what attention hands on: keys and values share what else a fused projection gives."""
    if outputs is Outputs.ALL:
        return num_outputs
    if outputs is Outputs.SECOND_HALF:
        return num_outputs // 2
    return (num_outputs - num_inputs) // 2


def _spread(num_channels: int, num_inputs: int, head_width: int) -> ChannelSpread | None:
    """How C channels reach K inputs; None when the shapes do not say."""
    if num_inputs == num_channels:
        return ChannelSpread(width=num_channels, repeats=1)
    if num_inputs % num_channels or num_channels % head_width:
        return None
    return ChannelSpread(width=head_width, repeats=num_inputs // num_channels)


def _head_width(config: PreTrainedConfig) -> int:
    width: int | None = getattr(config, "head_dim", None)
    if width is None:
        width = config.hidden_size // config.num_attention_heads
    return width
