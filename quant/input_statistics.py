"""Sums up what the linears of a block read, in the model as it is and in the original beside it. Changes no weight.

Legend: K = in features of a linear, N = its out features, X = its inputs in the original model [tokens, K],
Y = its inputs in the model whose earlier layers are quantized [tokens, K].
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.block_pair import BlockPair, CurrentBlock
from quant.capture import BlockInput, Chunks, Observation, run_hooked
from quant.correction import SplitMoments, TargetSums, ranking_rows
from quant.device import device_of
from quant.fast_products import fast_products
from quant.gram_sums import GramSum, SplitGramSum
from quant.linear_experts import Expert, LinearExperts
from quant.residual import BLOCK, StreamWriter

# an expert that saw fewer tokens than this is known too little from them, and is shown all
MIN_EXPERT_TOKENS = 256
# one token in so many tells how well a correction carries over to text that it was not fitted to
HELD_OUT_SHARE = 4
# of the median token's power: a state that is nearly 0 must not count for more than ten tokens
SMALLEST_POWER_SHARE = 0.1


@dataclass(frozen=True)
class InputStatistics:
    """What is kept of a linear's input, float32: gram = Y^T Y / tokens [K, K] and mean |y| [K]."""

    gram: Tensor
    mean_magnitude: Tensor


@dataclass(frozen=True)
class Streams:
    """The chunks on their two ways: through the original blocks, and through what has been made of them."""

    original: Chunks
    current: Chunks


@dataclass(frozen=True)
class PairedInput:
    """An input in both streams: what its linears are corrected with, and mean |y| [K] over so many tokens."""

    moments: SplitMoments
    mean_magnitude: Tensor
    num_tokens: int


@dataclass(frozen=True)
class PairStatistics:
    """By observed module. alone: of the current stream, where nothing is corrected."""

    paired: dict[str, PairedInput]
    alone: dict[str, InputStatistics]

    def take(self, observed: str) -> PairedInput | InputStatistics:
        """What is known of that module's input, the caller's own: it is let go of here, as it is large."""
        return self.paired.pop(observed) if observed in self.paired else self.alone.pop(observed)

    def inputs(self) -> dict[str, InputStatistics]:
        """What scales are searched with; of those that are paired in memory of its own."""
        return {
            **{
                name: InputStatistics(entry.moments.grams.total().div_(entry.num_tokens), entry.mean_magnitude)
                for name, entry in self.paired.items()
            },
            **self.alone,
        }

    def unscale_(self, scale: Tensor) -> None:
        """Make them, in place, those of inputs before they were divided by scale [K] in the current stream.

        All are of that width.
        """
        for entry in self.paired.values():
            entry.moments.scale_(scale)
            entry.mean_magnitude.mul_(scale)
        for statistics in self.alone.values():
            statistics.gram.mul_(scale[:, None]).mul_(scale)
            statistics.mean_magnitude.mul_(scale)


class StatisticsSum:
    """Adds up the statistics of one linear's input, on the device where that is read."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        self._gram = GramSum(num_features, device)
        self._magnitude = torch.zeros(num_features, device=device)
        self._num_tokens = 0

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Count inputs [tokens, K], in the gram by weights [tokens]; without, all count the same."""
        self._gram.add(_weighted(rows, weights), rows)
        self._magnitude += rows.abs().sum(dim=0)
        self._num_tokens += len(rows)

    @property
    def num_tokens(self) -> int:
        """How many have been counted."""
        return self._num_tokens

    def result(self) -> InputStatistics:
        """The means over all tokens counted, in the sums' memory: nothing can be counted any more.

        Where there were no tokens, every channel counts the same.
        """
        if self._num_tokens == 0:
            ones = torch.ones_like(self._magnitude)
            return InputStatistics(ones.diag(), ones)
        return InputStatistics(
            gram=self._gram.result().div_(self._num_tokens), mean_magnitude=self._magnitude / self._num_tokens
        )


class PairSum:
    """Adds up what linears that share an input are searched and corrected with, in both models."""

    def __init__(
        self, num_features: int, num_outputs: Mapping[str, int], device: torch.device, *, others: bool
    ) -> None:
        """num_outputs: N of those of the linears that add to the stream, by name. others: whether any does not.

        device: where the input is read.
        """
        self._magnitude = torch.zeros(num_features, device=device)
        self._num_tokens = 0
        self._grams = SplitGramSum(num_features, device)
        # of the held-out tokens only the rows that are looked at
        self._ranked = {linear: ranking_rows(size) for linear, size in num_outputs.items()}
        sizes = {linear: len(range(size)[self._ranked[linear]]) for linear, size in num_outputs.items()}
        self._whole, self._held_out = (
            TargetSums(
                cross=torch.zeros(num_features, num_features, device=device) if others else None,
                targets={linear: torch.zeros(size, num_features, device=device) for linear, size in rows.items()},
            )
            for rows in (num_outputs, sizes)
        )

    def add(
        self, original: Tensor | None, current: Tensor, weights: Tensor | None, targets: Mapping[str, Tensor]
    ) -> None:
        """Count inputs [tokens, K] of both models, weights [tokens] and what should be added to the stream [tokens, N].

        original: None where all linears add to the stream. weights: None where all tokens count the same.
        """
        self._magnitude += current.abs().sum(dim=0)
        self._num_tokens += len(current)
        num_fitted = len(current) - len(current) // HELD_OUT_SHARE
        fitted, held_out = slice(num_fitted), slice(num_fitted, None)
        weighted = _weighted(current, weights)
        self._grams.add_fit(weighted[fitted], current[fitted])
        self._grams.add_held_out(weighted[held_out], current[held_out])
        for sums, tokens in ((self._whole, slice(None)), (self._held_out, held_out)):
            if sums.cross is not None and original is not None:
                sums.cross.addmm_(original[tokens].T, weighted[tokens])
        for linear, target in targets.items():
            self._whole.targets[linear].addmm_(target.T, weighted)
            ranked = target[held_out, self._ranked[linear]]
            self._held_out.targets[linear].addmm_(ranked.T, weighted[held_out])

    def result(self) -> PairedInput:
        """What scales and ranges are searched with, and what the linears are corrected with."""
        moments = SplitMoments(self._grams, self._whole, self._held_out)
        return PairedInput(moments, self._magnitude / self._num_tokens, self._num_tokens)


def capture(current: CurrentBlock, names: Sequence[str]) -> dict[str, InputStatistics]:
    """What each named module reads in all chunks. An expert that few tokens reached is shown all in a second run."""
    sums = {name: _sum_for(current.block, name) for name in names}
    with fast_products():
        for number in range(len(current.chunks)):
            for name, rows in current.observe(number, names).inputs.items():
                sums[name].add(rows)
        sums |= _show_all_tokens(current, sums)
    return {name: total.result() for name, total in sums.items()}


def capture_pair(
    pair: BlockPair,
    observed: Mapping[str, str],
    writers: Mapping[str, StreamWriter],
    later: Collection[str],
    token_weights: Sequence[Tensor],
) -> PairStatistics:
    """What linears read in both streams, and what they should give where they add to the residual stream.

    observed: by linear, the module where its input is observed. writers: those of the linears that add to the stream.
    later: modules that are observed in the current stream alone, for the search: what their linears are corrected with
    is captured when the linears before are rounded. Inputs of what adds to the stream, now or later, are weighted by
    token_weights, float32 [tokens] of each chunk, and the others are not.
    """
    block = pair.current.block
    names = [*dict.fromkeys(observed.values())]
    own_writers = {
        name: {linear: writer for linear, writer in writers.items() if observed[linear] == name} for name in names
    }
    places = {writer.reader for writer in writers.values()}
    readers, given = places - {BLOCK}, places & {BLOCK}
    routed = routed_names(block)
    compared = {name for linear, name in observed.items() if linear not in writers} - routed
    alone = {name: _sum_for(block, name) for name in (*names, *later) if name in routed or name in later}
    paired = {
        name: _pair_sum_for(block, name, own_writers[name], others=name in compared)
        for name in names
        if name not in alone
    }
    with fast_products():
        for number, on_host in enumerate(token_weights):
            weights = on_host.to(device_of(block))
            current = pair.current.observe(number, {*names, *readers, *later}, {*writers} | given)
            original = pair.original.observe(number, compared | readers, given)
            for name, total in paired.items():
                targets = _targets(block, own_writers[name], original, current)
                total.add(original.inputs.get(name), current.inputs[name], weights if targets else None, targets)
            for name in alone.keys() & current.inputs.keys():
                alone[name].add(current.inputs[name], weights if name in later else None)
        alone |= _show_all_tokens(pair.current, alone)
    return PairStatistics(
        paired={name: total.result() for name, total in paired.items()},
        alone={name: total.result() for name, total in alone.items()},
    )


def routed_names(block: nn.Module) -> set[str]:
    """The modules inside of experts: which tokens reach them is decided by states that differ between two models."""
    experts = [name for name, module in block.named_modules() if isinstance(module, LinearExperts)]
    return {name for name, _ in block.named_modules() if any(name.startswith(f"{prefix}.") for prefix in experts)}


def relative_weights(outputs: Iterable[BlockInput]) -> list[Tensor]:
    """A weight per token, float32 [tokens] of each chunk, mean 1: one over the power of its state after the block.

    They are on the host, as the states are.

    What reads the stream normalises it first, so an error counts by its share of the state. Without this the first
    token, whose states are a thousand times larger in many models, would be all that the statistics show.
    """
    powers = [chunk.hidden.flatten(0, -2).float().square().sum(dim=-1) for chunk in outputs]
    smallest = SMALLEST_POWER_SHARE * torch.cat(powers).median() + torch.finfo(torch.float32).tiny
    weights = [1 / power.clamp(min=smallest) for power in powers]
    mean = torch.cat(weights).mean()
    return [weight / mean for weight in weights]


def _targets(
    block: nn.Module, writers: Mapping[str, StreamWriter], original: Observation, current: Observation
) -> dict[str, Tensor]:
    """What the linears' products would have to give for the stream to be as the original's, float32 [tokens, N]."""
    targets = {}
    for linear, writer in writers.items():
        missing = (_stream(writer, original) - _stream(writer, current)) / writer.multiplier
        product = current.outputs[linear] + missing
        bias = dict(block.get_submodule(linear).named_parameters()).get("bias")
        targets[linear] = product if bias is None else product - bias
    return targets


def _stream(writer: StreamWriter, seen: Observation) -> Tensor:
    """The stream after the linear has added to it."""
    return seen.outputs[BLOCK] if writer.reader == BLOCK else seen.inputs[writer.reader]


def _pair_sum_for(block: nn.Module, name: str, writers: Mapping[str, StreamWriter], *, others: bool) -> PairSum:
    num_outputs = {linear: len(block.get_submodule(linear).get_parameter("weight")) for linear in writers}
    weight = block.get_submodule(name).get_parameter("weight")
    return PairSum(weight.shape[1], num_outputs, weight.device, others=others)


def _show_all_tokens(current: CurrentBlock, seen: Mapping[str, StatisticsSum]) -> dict[str, StatisticsSum]:
    """Sums for the starved among the linears of experts: what they would read if every token went there."""
    block = current.block
    starved = [name for name, total in seen.items() if total.num_tokens < MIN_EXPERT_TOKENS]
    sums: dict[str, StatisticsSum] = {}
    shown_experts = []
    for name, experts in block.named_modules():
        if isinstance(experts, LinearExperts):
            for number, expert in experts.named_experts().items():
                prefix = f"{name}.{number}."
                own = {linear.removeprefix(prefix): linear for linear in starved if linear.startswith(prefix)}
                if own:
                    shown = {linear: _sum_for(block, full) for linear, full in own.items()}
                    sums |= {own[linear]: total for linear, total in shown.items()}
                    shown_experts.append((experts, _showing(expert, shown)))
    if sums:
        for chunk in current.chunks:
            hooks = [experts.register_forward_pre_hook(hook) for experts, hook in shown_experts]
            run_hooked(block, current.index, chunk, hooks)
    return sums


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows if weights is None else rows * weights[:, None]


def _sum_for(block: nn.Module, name: str) -> StatisticsSum:
    weight = block.get_submodule(name).get_parameter("weight")
    return StatisticsSum(weight.shape[1], weight.device)


def _showing(expert: Expert, sums: Mapping[str, StatisticsSum]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def show(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        read = expert.inputs(arguments[0])
        for name, total in sums.items():
            total.add(read[name].reshape(-1, read[name].shape[-1]).float())

    return show
