"""What a quantization cost on held-out text, block by block, against the models run whole, and when it is too much."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant import held_out
from quant.blockwise_model import BlockwiseModel
from quant.errors import QualityError, QuantizationError
from quant.evaluate import QualitySums
from quant.held_out import HeldOutStates, check_quality, read_windows
from quant.original_weights import RoundedWeights
from quant.progress import ProgressMeter, ignore_progress
from quant.report import HeldOutQuality
from quant.source import open_source
from tests.quant.blockwise_models import to_blockwise
from tests.quant.tiny_families import VARIANTS, open_tiny
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

METER = ProgressMeter(ignore_progress)
WINDOWS = torch.arange(2 * 24).view(2, 24) * 7 % 256
# heads that are tied, scaled or cut off, embeddings that are scaled or narrower than the blocks, and vision beside it
FAMILIES = [
    variant
    for variant in VARIANTS
    if variant.name in ("llama", "mistral", "gemma2", "gemma3-with-vision", "cohere", "granite", "gpt-neox", "opt-350m")
]


@torch.no_grad()
def measure(original: BlockwiseModel, changed: BlockwiseModel, windows: torch.Tensor = WINDOWS) -> HeldOutQuality:
    """As the walk does it: each block of both models, one after the other."""
    states = HeldOutStates(windows, original, changed)
    for index, name in enumerate(original.stack.blocks):
        states.follow_original(original.load_block(index), name, index)
        states.follow_quantized(changed.load_block(index), name, index)
    quality = states.measure(original, changed, METER)
    assert quality is not None
    return quality


@pytest.mark.parametrize("variant", FAMILIES, ids=str)
def test_block_by_block_is_what_the_whole_models_predict(variant: object, tmp_path: Path) -> None:
    # given a model, and the same with other weights in a block, the last norm and the head
    original, changed = (open_tiny(variant, tmp_path / str(number)) for number in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "layers.1." in name or "norm" in name or parameter is changed.get_output_embeddings().weight:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        expected, logits = (model(WINDOWS).logits[:, :-1].flatten(0, 1).float() for model in (original, changed))
    sums, original_sums = QualitySums(), QualitySums()
    sums.add(logits, expected, WINDOWS[:, 1:].flatten())
    original_sums.add(expected, expected, WINDOWS[:, 1:].flatten())

    quality = measure(to_blockwise(original), to_blockwise(changed))

    assert quality.perplexity == pytest.approx(sums.perplexity, rel=1e-5)
    assert quality.original_perplexity == pytest.approx(original_sums.perplexity, rel=1e-5)
    assert quality.mean_kl == pytest.approx(sums.mean_kl, rel=1e-3)
    assert quality.mean_kl > 1e-4
    assert quality.top1_agreement == sums.top1_agreement
    assert (quality.num_windows, quality.window_tokens) == (2, 24)


def test_the_sums_are_over_tokens() -> None:
    # given an original that expects 1/2, 1/4, 1/4, and what became of it, that expects 1/4, 1/2, 1/4
    expected = torch.tensor([0.5, 0.25, 0.25]).log().expand(4, -1)
    logits = torch.tensor([0.25, 0.5, 0.25]).log().expand(4, -1)
    targets = torch.tensor([0, 0, 0, 1])
    original, changed = QualitySums(), QualitySums()
    for rows in (slice(1), slice(1, 4)):
        original.add(expected[rows], expected[rows], targets[rows])
        changed.add(logits[rows], expected[rows], targets[rows])

    # then the losses are ln 2 three times and ln 4 once; for the result the other way round
    assert original.perplexity == pytest.approx(math.exp((math.log(2) * 3 + math.log(4)) / 4))
    assert changed.perplexity == pytest.approx(math.exp((math.log(4) * 3 + math.log(2)) / 4))
    # and KL = 1/2 ln 2 - 1/4 ln 2, with no first choice in common
    assert changed.mean_kl == pytest.approx(0.25 * math.log(2))
    assert changed.top1_agreement == 0


def test_a_model_that_stayed_as_it_was_lost_nothing(tmp_path: Path) -> None:
    model = to_blockwise(open_source(save_tiny_model("llama", tmp_path)).model)
    quality = measure(model, model)
    assert quality.perplexity == quality.original_perplexity
    assert quality.mean_kl == pytest.approx(0, abs=1e-6)
    assert quality.top1_agreement == 1


def test_the_logits_that_are_held_stay_within_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # given room for the logits after five tokens and a half
    model = to_blockwise(open_source(save_tiny_model("llama", tmp_path)).model)
    expected = measure(model, model)
    monkeypatch.setattr(held_out, "LOGIT_BYTES", VOCAB_SIZE * 4 * 11 // 2)
    counts: list[int] = []
    hook = model.model.get_submodule("model.norm").register_forward_hook(
        lambda _module, inputs, _output: counts.append(inputs[0].shape[1])
    )
    quality = measure(model, model)
    hook.remove()
    assert counts[-10:] == [5, 5, 5, 5, 5, 5, 5, 5, 3, 3]
    assert quality.perplexity == pytest.approx(expected.perplexity, rel=1e-6)


def test_a_window_is_no_longer_than_the_models_context(tmp_path: Path) -> None:
    short = open_source(save_tiny_model("llama", tmp_path / "model", config_overrides={"max_position_embeddings": 40}))
    assert read_windows(short.config, short.tokenizer, 2).shape == (2, 40)


def test_where_nothing_is_asked_nothing_is_measured(tmp_path: Path) -> None:
    source = open_source(save_tiny_model("llama", tmp_path / "model"))
    model = to_blockwise(source.model)
    states = HeldOutStates(read_windows(source.config, source.tokenizer, 0), model, model)
    states.follow_original(model.load_block(0), "model.layers.0", 0)
    assert states.measure(model, model, METER) is None


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj", "model.norm"])
def test_an_original_that_predicts_no_numbers_is_refused(name: str, tmp_path: Path) -> None:
    source = open_source(save_tiny_model("llama", tmp_path / "model"))
    with torch.no_grad():
        source.model.get_parameter(f"{name}.weight").fill_(3e38)
    broken = to_blockwise(source.model)
    with pytest.raises(QuantizationError, match=rf"original cannot be measured: the output of {name} is not"):
        measure(broken, broken)


def test_the_head_of_the_quantized_model_is_measured(tmp_path: Path) -> None:
    model = to_blockwise(open_source(save_tiny_model("llama", tmp_path / "model")).model)
    head = torch.zeros(VOCAB_SIZE, 64)
    quality = measure(
        model, replace(model, weights=RoundedWeights(model.weights, torch.float16, {"lm_head.weight": head}))
    )
    assert quality.perplexity == pytest.approx(VOCAB_SIZE)


def test_a_result_worse_than_allowed_is_refused_with_the_measured_number() -> None:
    quality = HeldOutQuality(10.0, 12.0, 0.25, 0.8, 2, 512)
    check_quality(quality, None)
    check_quality(quality, 0.25)
    with pytest.raises(QualityError, match=r"mean KL to the original is 0\.25000 nats .* at most 0\.2 is allowed"):
        check_quality(quality, 0.2)
