"""What a quantization cost, on text that no calibration has seen: the original's predictions are kept and compared.

The pipeline changes its model in place, so the original cannot be asked again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from quant.errors import QualityError
from quant.evaluate import QualitySums, TextWindows, cut_windows, predict
from quant.progress import ProgressMeter
from quant.report import HeldOutQuality
from quant.source import context_tokens

# as short as tells the models apart: `awq-serve eval` measures longer; a model with a shorter context gets its own
WINDOW_TOKENS = 512
# what the kept predictions may take: two windows of a vocabulary of 256 thousand
MAX_KEPT_BYTES = 2**30


@dataclass(frozen=True)
class KeptPredictions:
    """What the original expects: windows int64 [W, T], and of each its logits, float32 [T - 1, vocab]."""

    windows: Tensor
    logits: tuple[Tensor, ...]


def predict_held_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_windows: int, meter: ProgressMeter
) -> KeptPredictions:
    """Keep the model's predictions on windows of the text that ships here: fewer where the vocabulary is very large.

    A window is no longer than the model's context.

    Raises QuantizationError when a prediction is not finite.
    """
    window_tokens = min(WINDOW_TOKENS, context_tokens(model.config) or WINDOW_TOKENS)
    window_bytes = (window_tokens - 1) * model.config.vocab_size * torch.float32.itemsize
    num_kept = min(num_windows, max(1, MAX_KEPT_BYTES // window_bytes))
    options = TextWindows(num_windows=num_kept, window_tokens=window_tokens)
    windows = cut_windows(tokenizer, options.read(), options)
    return KeptPredictions(windows, tuple(_predict_all("original", model, windows, meter)))


def measure_held_out(kept: KeptPredictions, model: PreTrainedModel, meter: ProgressMeter) -> HeldOutQuality:
    """The model as it is now beside the kept predictions. Raises QuantizationError when one is not finite."""
    original, quantized = QualitySums(), QualitySums()
    predictions = _predict_all("quantized model", model, kept.windows, meter)
    for window, logits, expected in zip(kept.windows, predictions, kept.logits, strict=True):
        original.add(expected, expected, window[1:])
        quantized.add(logits, expected, window[1:])
    return HeldOutQuality(
        original_perplexity=original.perplexity,
        perplexity=quantized.perplexity,
        mean_kl=quantized.mean_kl,
        top1_agreement=quantized.top1_agreement,
        num_windows=quantized.num_windows,
        window_tokens=kept.windows.shape[1],
    )


def check_quality(quality: HeldOutQuality, max_kl: float | None) -> None:
    """Raises QualityError when the mean KL is higher than the recipe allows."""
    if max_kl is not None and quality.mean_kl > max_kl:
        raise QualityError(
            f"the mean KL to the original is {quality.mean_kl:.5f} nats on held-out text, and at most {max_kl:g} is "
            "allowed (--max-kl), so no checkpoint was written; what is finished is kept, and the same command with a "
            "higher bound goes on there; or try more calibration samples or a smaller group size"
        )


def _predict_all(name: str, model: PreTrainedModel, windows: Tensor, meter: ProgressMeter) -> Iterator[Tensor]:
    meter.report("evaluate", 0, len(windows))
    for index, window in enumerate(windows):
        yield predict(name, model, window)
        meter.report("evaluate", index + 1, len(windows))
