"""Models in memory as the quantizer takes them: block by block."""

from transformers import PreTrainedModel

from quant.blockwise_model import BlockwiseModel, hold_nothing
from quant.original_weights import HeldWeights


def to_blockwise(model: PreTrainedModel) -> BlockwiseModel:
    """The model, which keeps no weight itself from then on."""
    return BlockwiseModel(model, HeldWeights(hold_nothing(model)))
