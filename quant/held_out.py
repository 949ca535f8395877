"""What a quantization cost, on text that no calibration has seen: the original and what became of it, block by block.

The hidden states of the windows go through each block twice, before it is quantized and afterwards, so that neither
model is ever in memory whole, and no logits are kept.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from quant.blockwise_model import BlockwiseModel
from quant.capture import BlockInput, run_block
from quant.errors import QualityError, QuantizationError
from quant.evaluate import QualitySums, TextWindows, cut_windows
from quant.overflow import first_not_finite
from quant.progress import ProgressMeter
from quant.report import HeldOutQuality
from quant.source import context_tokens

# as short as tells the models apart: `awq-serve eval` measures longer; a model with a shorter context gets its own
WINDOW_TOKENS = 512
# what the logits of one model may take at once
LOGIT_BYTES = 2**27


class HeldOutStates:
    """The hidden states of windows of held-out text, on their ways through the original and the quantized blocks."""

    def __init__(self, windows: Tensor, original: BlockwiseModel, quantized: BlockwiseModel) -> None:
        """windows: int64 [W, T], perhaps none. quantized: the model as it will be outside of its blocks."""
        self._windows = windows
        self._original = list(original.embed(windows)) if len(windows) else []
        self._quantized = list(quantized.embed(windows)) if len(windows) else []

    def follow_original(self, block: nn.Module, name: str, index: int) -> None:
        """Take the original's states through its block of that name and index.

        Raises QuantizationError naming the module whose output is not finite, here and in the other methods.
        """
        self._original = [_run_checked("original", block, name, index, chunk) for chunk in self._original]

    def follow_quantized(self, block: nn.Module, name: str, index: int) -> None:
        """Take the quantized model's states through what became of the block."""
        self._quantized = [_run_checked("quantized model", block, name, index, chunk) for chunk in self._quantized]

    def measure(
        self, original: BlockwiseModel, quantized: BlockwiseModel, meter: ProgressMeter
    ) -> HeldOutQuality | None:
        """What the states after the last block make of the two models; None where there are no windows."""
        if not len(self._windows):
            return None
        sums, original_sums = QualitySums(), QualitySums()
        num_rows = max(1, LOGIT_BYTES // (original.model.config.get_text_config().vocab_size * torch.float32.itemsize))
        meter.report("evaluate", 0, len(self._windows))
        states = zip(self._windows, _by_window(self._original), _by_window(self._quantized), strict=True)
        for index, (window, original_states, quantized_states) in enumerate(states):
            for start in range(0, len(window) - 1, num_rows):
                rows = slice(start, min(start + num_rows, len(window) - 1))
                expected = _logits("original", original, window[rows], original_states[:, rows])
                logits = _logits("quantized model", quantized, window[rows], quantized_states[:, rows])
                targets = window[1:][rows].to(logits.device)
                original_sums.add(expected, expected, targets)
                sums.add(logits, expected, targets)
            meter.report("evaluate", index + 1, len(self._windows))
        return HeldOutQuality(
            original_perplexity=original_sums.perplexity,
            perplexity=sums.perplexity,
            mean_kl=sums.mean_kl,
            top1_agreement=sums.top1_agreement,
            num_windows=len(self._windows),
            window_tokens=self._windows.shape[1],
        )


def read_windows(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, num_windows: int) -> Tensor:
    """So many windows of the text that ships here, int64 [W, T]; a window is no longer than the model's context."""
    window_tokens = min(WINDOW_TOKENS, context_tokens(config) or WINDOW_TOKENS)
    if num_windows == 0:
        return torch.empty(0, window_tokens, dtype=torch.int64)
    options = TextWindows(num_windows=num_windows, window_tokens=window_tokens)
    return cut_windows(tokenizer, options.read(), options)


def check_quality(quality: HeldOutQuality, max_kl: float | None) -> None:
    """Raises QualityError when the mean KL is higher than the recipe allows."""
    if max_kl is not None and quality.mean_kl > max_kl:
        raise QualityError(
            f"the mean KL to the original is {quality.mean_kl:.5f} nats on held-out text, and at most {max_kl:g} is "
            "allowed (--max-kl), so no checkpoint was written; what is finished is kept, and the same command with a "
            "higher bound goes on there; or try more calibration samples or a smaller group size"
        )


def _by_window(chunks: Sequence[BlockInput]) -> Iterator[Tensor]:
    """The states of one window after the other, each [1, T, hidden]."""
    return (states for chunk in chunks for states in torch.split(chunk.hidden, 1))


def _run_checked(model_name: str, block: nn.Module, name: str, index: int, chunk: BlockInput) -> BlockInput:
    given = run_block(block, index, chunk)
    if not bool(torch.isfinite(given.hidden).all()):
        leaf = first_not_finite(block, lambda: run_block(block, index, chunk))
        raise _not_finite(model_name, name if leaf is None else f"{name}.{leaf}")
    return given


def _logits(model_name: str, model: BlockwiseModel, token_ids: Tensor, states: Tensor) -> Tensor:
    """float32 [n, vocab] after token ids int64 [n], from the last block's states [1, n, hidden]; on its device."""
    logits = model.run_outer(token_ids[None], states)[0].float()
    if not bool(torch.isfinite(logits).all()):
        leaf = first_not_finite(model.model, lambda: model.run_outer(token_ids[None], states))
        raise _not_finite(model_name, leaf or "the model")
    return logits


def _not_finite(model_name: str, module_name: str) -> QuantizationError:
    return QuantizationError(f"the {model_name} cannot be measured: the output of {module_name} is not finite")
