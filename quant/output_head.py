"""Quantizes the output head: what it reads, its ranges and its rounding. The embedding stays as it is, tied or not.

Its input is not scaled: the norm before it could take a scale, but in several families it feeds more than the head.
"""

import torch
from torch import Tensor, nn

from kernels.layout import PackedWeight
from kernels.reference import dequantize
from quant.block import check_finite, find_codes, pack_codes, plain_codes
from quant.blockwise_model import BlockwiseModel
from quant.capture import run_block
from quant.input_statistics import InputStatistics, StatisticsSum
from quant.method import MethodSteps
from quant.model_plan import HeadPlan
from quant.report import LayerLoss
from quant.rounding import round_plainly
from quant.row_spans import row_spans
from quant.scale_search import IDENTITY, relative_loss, total_error

# what the head reads is known well enough from so many
SAMPLE_TOKENS = 8192


class HeadInput:
    """What the head of a quantized model reads on some tokens, followed through its blocks."""

    def __init__(self, model: BlockwiseModel, token_ids: Tensor) -> None:
        """token_ids: int64 [sequences, T]; about SAMPLE_TOKENS of them are taken, evenly spread."""
        num_rows = max(1, SAMPLE_TOKENS // token_ids.shape[1])
        sample = token_ids[:: max(1, token_ids.shape[0] // num_rows)][:num_rows]
        self._states = list(model.embed(sample))
        self._token_ids = torch.split(sample, [len(chunk.hidden) for chunk in self._states])

    def follow(self, block: nn.Module, index: int) -> None:
        """Take the states through the quantized block of that index."""
        self._states = [run_block(block, index, chunk) for chunk in self._states]

    def statistics(self, model: BlockwiseModel, name: str) -> InputStatistics:
        """Of the input of the head of that name, when all blocks are behind. What is outside of them is `model`'s."""
        head = model.model.get_submodule(name)
        counter = _InputCounter(head, model.device)
        model.model.set_submodule(name, counter)
        try:
            for token_ids, chunk in zip(self._token_ids, self._states, strict=True):
                model.run_outer(token_ids, chunk.hidden)
        finally:
            model.model.set_submodule(name, head)
        return counter.total.result()


class _InputCounter(nn.Module):
    """Stands in for the head: counts what it would read, and spares the logits."""

    def __init__(self, head: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.total = StatisticsSum(head.get_parameter("weight").shape[1], device)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1]).float()
        self.total.add(rows, rows.new_ones(len(rows)))
        return hidden


def round_head_plainly(weight: Tensor, plan: HeadPlan) -> PackedWeight:
    """The head's weight [V, K] rounded to nearest over the full range of its groups."""
    return pack_codes(plan.name, plain_codes(weight, plan.grouping))


def search_head(weight: Tensor, plan: HeadPlan, steps: MethodSteps, gram: Tensor) -> tuple[PackedWeight, LayerLoss]:
    """Round the head's weight [V, K] by the method's steps for what it reads, of Gram matrix [K, K].

    Raises QuantizationError when what it reads is not finite.
    """
    check_finite(f"the input of {plan.name}", gram.diagonal())
    signal = total_error(row_spans(weight), gram)
    (codes,) = find_codes([weight], gram, steps, plan.grouping)
    packed = pack_codes(plan.name, codes)
    plain = (rows - round_plainly(rows, plan.grouping.group_size, plan.grouping.bits) for rows in row_spans(weight))
    spans = zip(row_spans(weight), row_spans(dequantize(packed)), strict=True)
    chosen = (rows - rounded for rows, rounded in spans)
    plain_loss, loss = (relative_loss(differences, gram, signal) for differences in (plain, chosen))
    return packed, LayerLoss(plan.name, IDENTITY, plain_loss, loss)
