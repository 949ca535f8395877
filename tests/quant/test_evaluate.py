"""What `eval` measures, against sums written out by hand, and what it refuses."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from kernels.layout import pack
from kernels.reference import dequantize
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.writer import CheckpointWriter
from quant.dense_checkpoint import load_dense
from quant.errors import CheckpointError, RecipeError, SourceError
from quant.evaluate import EvalOptions, Quality, TextWindows, compare, cut_windows, evaluate_checkpoint
from quant.progress import ProgressMeter, ignore_progress
from quant.rounding import codes_of, full_range, grid_of
from quant.source import open_source
from tests.tiny_models import save_tiny_model

GROUP_SIZE = 32
TEXT = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(original: Path) -> Path:
    """The tiny model with its block linears rounded plainly, written as a checkpoint that names its source."""
    out = original.parent / "checkpoint"
    source = open_source(original)
    with CheckpointWriter(out, expected_bytes=0) as writer:
        for name, parameter in source.model.named_parameters():
            if "_proj" not in name:
                writer.add_tensor(name, parameter.detach())
                continue
            grid = grid_of(full_range(parameter.detach(), GROUP_SIZE), 4)
            writer.add_packed(name.removesuffix(".weight"), pack(codes_of(parameter.detach(), grid, 4)))
        config = source.checkpoint_config(torch.float32)
        config["quantization_config"] = writer.quantization_config(("lm_head",))
        writer.commit(config, {"report.json": json.dumps({"source": str(original)}).encode()})
    return out


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


class FixedLogits(torch.nn.Module):
    """Gives the same logits after every token, whatever it reads."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self._logits = torch.tensor(logits)

    def forward(self, token_ids: torch.Tensor, use_cache: bool) -> "FixedLogits":
        self.logits = self._logits.expand(*token_ids.shape, -1)
        return self


def test_perplexity_divergence_and_agreement_are_what_the_formulas_say() -> None:
    # given an original that gives the probabilities 1/2, 1/4, 1/4 and another model that gives 1/4, 1/2, 1/4
    original = FixedLogits([math.log(0.5), math.log(0.25), math.log(0.25)])
    other = FixedLogits([math.log(0.25), math.log(0.5), math.log(0.25)])
    # and two windows, whose first tokens nobody predicts
    windows = torch.tensor([[2, 0, 0], [2, 1, 2]])

    rows = compare({"original": original, "other": other}, windows, ProgressMeter(ignore_progress))

    # then the mean of the windows' mean losses is (ln 2 + ln 4) / 2, and for the other (ln 4 + (ln 2 + ln 4) / 2) / 2
    assert rows[0] == Quality("original", pytest.approx(math.sqrt(8)), None, None)
    assert rows[1].perplexity == pytest.approx(math.exp((2 * math.log(2) + 1.5 * math.log(2)) / 2))
    # and KL = 1/2 ln 2 - 1/4 ln 2, with no first choice in common
    assert rows[1].mean_kl == pytest.approx(0.25 * math.log(2))
    assert rows[1].top1_agreement == 0


def test_windows_follow_one_another_without_overlap(original: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(original)
    options = TextWindows(num_windows=3, window_tokens=10)

    windows = cut_windows(tokenizer, TEXT, options)

    assert windows.shape == (3, 10)
    assert windows.flatten().tolist() == tokenizer(TEXT)["input_ids"][:30]


def test_a_text_that_fills_fewer_windows_gives_those(original: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(original)

    assert cut_windows(tokenizer, "x" * 25, TextWindows(num_windows=24, window_tokens=10)).shape == (2, 10)


def test_the_checkpoint_is_measured_as_it_was_saved(checkpoint: Path) -> None:
    model = load_dense(checkpoint)

    packed = CheckpointReader.open(checkpoint).read_packed("model.layers.1.mlp.down_proj")
    assert torch.equal(model.get_parameter("model.layers.1.mlp.down_proj.weight"), dequantize(packed))


def test_a_plainly_rounded_checkpoint_measures_the_same_as_plain_rounding(checkpoint: Path, text: Path) -> None:
    table = evaluate_checkpoint(EvalOptions(checkpoint, windows=TextWindows(text, num_windows=4, window_tokens=64)))

    original, plain, saved = table.rows
    assert [row.name for row in table.rows] == ["original", "plain rounding", "checkpoint"]
    assert saved.perplexity == pytest.approx(plain.perplexity, rel=1e-6)
    assert saved.mean_kl == pytest.approx(plain.mean_kl, rel=1e-4)
    assert plain.mean_kl is not None
    assert plain.mean_kl > 0
    assert original.perplexity != plain.perplexity
    assert (table.num_windows, table.window_tokens, table.text) == (4, 64, str(text))


def test_a_changed_file_changes_what_is_measured(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    # given a copy of the checkpoint whose stored scales are damaged
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    file = damaged / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-64:] = bytes(64)
    file.write_bytes(bytes(content))

    table = evaluate_checkpoint(EvalOptions(damaged, windows=TextWindows(text, num_windows=2, window_tokens=64)))

    _, plain, saved = table.rows
    assert saved.mean_kl != pytest.approx(plain.mean_kl, rel=1e-4)


def test_without_a_text_the_shipped_one_is_used_and_named(checkpoint: Path) -> None:
    table = evaluate_checkpoint(EvalOptions(checkpoint, windows=TextWindows(num_windows=1, window_tokens=32)))

    assert "held_out.txt" in table.text


def test_a_checkpoint_that_names_no_original_asks_for_it(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    nameless = tmp_path / "nameless"
    shutil.copytree(checkpoint, nameless)
    (nameless / "report.json").unlink()

    with pytest.raises(RecipeError, match="names its original; give it with --against"):
        evaluate_checkpoint(EvalOptions(nameless, windows=TextWindows(text)))


def test_another_model_as_original_is_refused(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    other = save_tiny_model("llama", tmp_path / "other", config_overrides={"num_hidden_layers": 1})

    with pytest.raises(SourceError, match=r"the original has no module model\.layers\.1\."):
        evaluate_checkpoint(EvalOptions(checkpoint, str(other), TextWindows(text, window_tokens=64)))


def test_an_unquantized_model_has_nothing_to_compare(original: Path) -> None:
    with pytest.raises(CheckpointError, match="is not quantized"):
        evaluate_checkpoint(EvalOptions(original))


def test_a_text_shorter_than_a_window_is_refused_with_the_numbers(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")

    with pytest.raises(RecipeError, match="the text has 5 tokens, fewer than one window of 512"):
        evaluate_checkpoint(EvalOptions(checkpoint, windows=TextWindows(tmp_path / "short.txt")))


@pytest.mark.parametrize("sizes", [(0, 512), (24, 1)])
def test_windows_that_measure_nothing_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(RecipeError, match="at least"):
        TextWindows(num_windows=sizes[0], window_tokens=sizes[1])


def test_windows_longer_than_the_models_context_are_refused_with_the_limit(checkpoint: Path) -> None:
    with pytest.raises(RecipeError, match=r"windows have 513 tokens, .* use --window-tokens 512 or less"):
        evaluate_checkpoint(EvalOptions(checkpoint, windows=TextWindows(num_windows=1, window_tokens=513)))
