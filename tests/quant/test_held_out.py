"""What a quantization cost on held-out text, against sums written out by hand, and when it is too much."""

import math
from pathlib import Path

import pytest
import torch

from quant import held_out
from quant.errors import QualityError, QuantizationError
from quant.held_out import KeptPredictions, check_quality, measure_held_out, predict_held_out
from quant.progress import ProgressMeter, ignore_progress
from quant.report import HeldOutQuality
from quant.source import SourceModel, open_source
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

METER = ProgressMeter(ignore_progress)


class FixedLogits(torch.nn.Module):
    """Gives the same logits after every token, whatever it reads."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self._logits = torch.tensor([math.log(probability) for probability in probabilities])

    def forward(self, token_ids: torch.Tensor, use_cache: bool) -> "FixedLogits":
        self.logits = self._logits.expand(*token_ids.shape, -1)
        return self


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return open_source(save_tiny_model("llama", tmp_path_factory.mktemp("model")))


def test_a_result_is_compared_with_what_the_original_expected() -> None:
    # given an original that expects 1/2, 1/4, 1/4, and what became of it, that expects 1/4, 1/2, 1/4
    windows = torch.tensor([[2, 0, 0], [2, 0, 1]])
    expected = torch.tensor([0.5, 0.25, 0.25]).log().expand(2, -1)
    kept = KeptPredictions(windows, (expected, expected))

    quality = measure_held_out(kept, FixedLogits([0.25, 0.5, 0.25]), METER)

    # then, the first tokens aside, the losses are ln 2 three times and ln 4 once; for the result the other way round
    assert quality.original_perplexity == pytest.approx(math.exp((math.log(2) + math.log(8) / 2) / 2))
    assert quality.perplexity == pytest.approx(math.exp((math.log(4) + math.log(8) / 2) / 2))
    # and KL = 1/2 ln 2 - 1/4 ln 2, with no first choice in common
    assert quality.mean_kl == pytest.approx(0.25 * math.log(2))
    assert quality.top1_agreement == 0
    assert (quality.num_windows, quality.window_tokens) == (2, 3)


def test_a_model_that_stayed_as_it_was_lost_nothing(source: SourceModel) -> None:
    with torch.no_grad():
        kept = predict_held_out(source.model, source.tokenizer, 2, METER)
        quality = measure_held_out(kept, source.model, METER)

    assert quality.perplexity == quality.original_perplexity
    assert quality.mean_kl == pytest.approx(0, abs=1e-6)
    assert quality.top1_agreement == 1


def test_kept_predictions_stay_within_their_bound(source: SourceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # given room for the predictions of one window and a half
    monkeypatch.setattr(held_out, "MAX_KEPT_BYTES", 511 * VOCAB_SIZE * 4 * 3 // 2)
    with torch.no_grad():
        kept = predict_held_out(source.model, source.tokenizer, 2, METER)
    assert kept.windows.shape == (1, 512)
    assert [logits.shape for logits in kept.logits] == [(511, VOCAB_SIZE)]


def test_a_window_is_no_longer_than_the_models_context(tmp_path: Path) -> None:
    short = open_source(save_tiny_model("llama", tmp_path / "model", config_overrides={"max_position_embeddings": 40}))
    with torch.no_grad():
        kept = predict_held_out(short.model, short.tokenizer, 2, METER)
    assert kept.windows.shape == (2, 40)


def test_an_original_that_predicts_no_numbers_is_refused(tmp_path: Path) -> None:
    broken = open_source(save_tiny_model("llama", tmp_path / "model"))
    with torch.no_grad():
        broken.model.get_parameter("model.norm.weight").fill_(float("inf"))
        with pytest.raises(QuantizationError, match=r"original cannot be measured: the output of model\.norm is not"):
            predict_held_out(broken.model, broken.tokenizer, 1, METER)


def test_a_result_worse_than_allowed_is_refused_with_the_measured_number() -> None:
    quality = HeldOutQuality(10.0, 12.0, 0.25, 0.8, 2, 512)
    check_quality(quality, None)
    check_quality(quality, 0.25)
    with pytest.raises(QualityError, match=r"mean KL to the original is 0\.25000 nats .* at most 0\.2 is allowed"):
        check_quality(quality, 0.2)
