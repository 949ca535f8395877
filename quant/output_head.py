"""Quantizes the output head: what it reads, its ranges and its rounding. The embedding stays as it is, tied or not.

Its input is not scaled: the norm before it could take a scale, but in several families it feeds more than the head.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from kernels.layout import PackedWeight
from kernels.reference import dequantize
from quant.block import check_finite, find_codes, round_linear_plainly, store
from quant.capture import CHUNK_TOKENS
from quant.input_statistics import InputStatistics, StatisticsSum
from quant.method import MethodSteps
from quant.model_plan import HeadPlan
from quant.model_structure import untie
from quant.report import LayerLoss
from quant.rounding import round_plainly
from quant.scale_groups import linear_of
from quant.scale_search import IDENTITY, output_error, relative_loss

# what the head reads is known well enough from so many
SAMPLE_TOKENS = 8192


class _InputCounter(nn.Module):
    """Stands in for the head: counts what it would read, and spares the logits."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.total = StatisticsSum(num_features)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1]).float()
        self.total.add(rows, torch.ones(len(rows)))
        return hidden


def round_head_plainly(model: PreTrainedModel, plan: HeadPlan) -> PackedWeight:
    """Round the head to nearest over the full range of its groups, in place."""
    untie(model, plan.name)
    return round_linear_plainly(model, plan.name, plan.grouping)


def search_head(
    model: PreTrainedModel, plan: HeadPlan, steps: MethodSteps, token_ids: Tensor
) -> tuple[PackedWeight, LayerLoss]:
    """Round the head by the method's steps for what it reads on token_ids int64 [sequences, T], in place.

    Raises QuantizationError when what it reads is not finite.
    """
    gram = _what_it_reads(model, plan.name, token_ids).gram
    check_finite(f"the input of {plan.name}", gram)
    untie(model, plan.name)
    weight = linear_of(model, plan.name).weight.detach().clone()
    signal = float(output_error(weight, gram).sum())
    plain = round_plainly(weight, plan.grouping.group_size, plan.grouping.bits)
    (codes,) = find_codes([weight], gram, steps, plan.grouping)
    packed = store(model, plan.name, codes)
    plain_loss, loss = (relative_loss(weight - rounded, gram, signal) for rounded in (plain, dequantize(packed)))
    return packed, LayerLoss(plan.name, IDENTITY, plain_loss, loss)


def _what_it_reads(model: PreTrainedModel, name: str, token_ids: Tensor) -> InputStatistics:
    """From running the model, as it is now, on about SAMPLE_TOKENS of the tokens, evenly spread."""
    num_rows = max(1, SAMPLE_TOKENS // token_ids.shape[1])
    sample = token_ids[:: max(1, token_ids.shape[0] // num_rows)][:num_rows]
    head = model.get_submodule(name)
    counter = _InputCounter(linear_of(model, name).in_features)
    model.set_submodule(name, counter)
    try:
        for chunk in torch.split(sample, max(1, CHUNK_TOKENS // sample.shape[1])):
            model(chunk, use_cache=False)
    finally:
        model.set_submodule(name, head)
    return counter.total.result()
