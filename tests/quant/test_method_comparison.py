"""Every method's row is what its checkpoint measures, and nothing is left behind or half-written."""

import gc
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.modeling_utils import PreTrainedModel

from quant.checkpoint.reader import CheckpointReader
from quant.dense_checkpoint import load_dense
from quant.errors import OutputError, RecipeError, SourceError, Terminated
from quant.evaluate import EvalOptions, Quality, TextWindows, evaluate_checkpoint
from quant.method_comparison import ComparisonOptions, MethodTable, compare_methods, parse_methods, way_back
from quant.recipe import Method, Recipe
from tests.tiny_models import save_tiny_model

SMALL = Recipe(num_windows=0, num_samples=4, sample_tokens=32)
WINDOWS = TextWindows(num_windows=2, window_tokens=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a version number in its name is no file ending
    return save_tiny_model("llama", tmp_path_factory.mktemp("source") / "tiny-1.5")


@pytest.fixture(scope="module")
def kept(model: Path) -> Path:
    return model.parent / "kept"


@pytest.fixture(scope="module")
def table(model: Path, kept: Path) -> MethodTable:
    return compare_methods(ComparisonOptions(model, (Method.AWQ, Method.RTN), SMALL, WINDOWS, kept))


def test_each_method_has_its_row_in_the_order_asked_for(table: MethodTable) -> None:
    assert [row.method for row in table.results] == [Method.AWQ, Method.RTN]
    assert [row.quality.name for row in table.results] == ["awq", "rtn"]
    assert [row.report.recipe.method for row in table.results] == [Method.AWQ, Method.RTN]
    assert (table.num_windows, table.window_tokens) == (2, 64)


def test_a_row_is_what_its_checkpoint_measures_by_itself(table: MethodTable, kept: Path) -> None:
    original, plain, saved = evaluate_checkpoint(EvalOptions(kept / "tiny-1.5-awq", windows=WINDOWS)).rows

    awq, rtn = (row.quality for row in table.results)
    assert table.original.perplexity == pytest.approx(original.perplexity, rel=1e-6)
    assert awq.perplexity == pytest.approx(saved.perplexity, rel=1e-6)
    assert awq.mean_kl == pytest.approx(saved.mean_kl, rel=1e-5)
    # scales and norms are stored in half precision by one, and not by the other
    assert rtn.mean_kl == pytest.approx(plain.mean_kl, rel=0.05)


def test_the_kept_checkpoints_are_named_after_model_and_method(table: MethodTable, kept: Path) -> None:
    assert {path.name for path in kept.iterdir()} == {"tiny-1.5-awq", "tiny-1.5-rtn"}
    assert CheckpointReader.open(kept / "tiny-1.5-rtn").quantized_module_names
    load_dense(kept / "tiny-1.5-rtn")
    # and nothing else is beside them
    assert {path.name for path in kept.parent.iterdir()} == {"tiny-1.5", "kept"}


def test_the_json_has_every_figure_and_report(table: MethodTable) -> None:
    figures = json.loads(json.dumps(table.to_json()))

    assert figures["original"]["perplexity"] == table.original.perplexity
    assert [row["quality"]["name"] for row in figures["results"]] == ["awq", "rtn"]
    assert figures["results"][0]["report"]["recipe"]["num_samples"] == 4


def test_without_a_place_to_keep_them_no_checkpoint_is_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    table = compare_methods(ComparisonOptions(model, (Method.RTN,), SMALL, WINDOWS))

    assert [row.method for row in table.results] == [Method.RTN]
    assert not list(tmp_path.iterdir())


def test_no_more_than_two_models_are_in_memory_at_any_time(model: Path) -> None:
    before = num_models_in_memory()
    counts: list[int] = []

    compare_methods(
        ComparisonOptions(model, (Method.RTN, Method.AWQ), SMALL, WINDOWS),
        lambda phase, done, total, seconds_left: counts.append(num_models_in_memory() - before),
    )

    assert max(counts) == 2


def num_models_in_memory() -> int:
    """Models with weights of their own: skeletons on the meta device take none."""
    return sum(
        issubclass(type(thing), PreTrainedModel)
        and thing.get_output_embeddings() is not None
        and thing.device.type != "meta"
        for thing in gc.get_objects()
    )


def test_only_the_original_can_be_measured_and_no_text_is_read_for_it(model: Path) -> None:
    recipe = Recipe(num_windows=0, calibration="absent.txt")

    table = compare_methods(ComparisonOptions(model, parse_methods("fp"), recipe, WINDOWS))

    assert table.results == ()
    assert table.original.perplexity > 1


@pytest.mark.parametrize(
    ("perplexity", "share"),
    [(20.0, 0.0), (10.0, 1.0), (14.0, 0.6), (25.0, -0.5)],
)
def test_the_way_back_is_what_is_not_lost_of_what_plain_rounding_loses(perplexity: float, share: float) -> None:
    original, plain = Quality("original", 10.0, None, None), Quality("rtn", 20.0, 0.1, 0.9)

    assert way_back(Quality("awq", perplexity, 0.1, 0.9), plain, original) == pytest.approx(share)


def test_there_is_no_way_back_where_plain_rounding_was_not_measured_or_loses_nothing() -> None:
    original, other = Quality("original", 10.0, None, None), Quality("awq", 9.0, 0.1, 0.9)

    assert way_back(other, None, original) is None
    assert way_back(other, Quality("rtn", 9.5, 0.1, 0.9), original) is None


def test_a_list_of_methods_names_each_once_and_in_its_order() -> None:
    assert parse_methods("rtn, fp,awq,rtn") == (Method.RTN, Method.AWQ)


@pytest.mark.parametrize("text", ["magic", "rtn,", ""])
def test_a_method_that_there_is_not_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(RecipeError, match="is no method; choose from fp, ") as refusal:
        parse_methods(text)
    assert all(method.value in str(refusal.value) for method in Method)


@pytest.mark.parametrize(
    ("recipe", "windows", "sentence"),
    [
        (replace(SMALL, sample_tokens=513), WINDOWS, "calibration tokens is 513, .* use --calib-seqlen 512 or less"),
        (SMALL, replace(WINDOWS, window_tokens=513), "windows have 513 tokens, .* use --window-tokens 512 or less"),
    ],
    ids=["rows", "windows"],
)
def test_text_longer_than_the_models_context_is_told_before_any_method_runs(
    model: Path, recipe: Recipe, windows: TextWindows, sentence: str
) -> None:
    heard: list[str] = []
    with pytest.raises(RecipeError, match=sentence):
        compare_methods(
            ComparisonOptions(model, (Method.RTN, Method.AWQ), recipe, windows),
            lambda phase, done, total, seconds_left: heard.append(phase),
        )
    assert set(heard) == {"load"}


def test_a_calibration_text_that_is_not_there_is_told_before_any_method_runs(model: Path, tmp_path: Path) -> None:
    recipe = Recipe(num_windows=0, calibration=str(tmp_path / "absent.txt"))
    heard: list[str] = []

    with pytest.raises(SourceError, match=r"absent\.txt"):
        compare_methods(
            ComparisonOptions(model, (Method.RTN, Method.AWQ), recipe, WINDOWS, tmp_path / "kept"),
            lambda phase, done, total, seconds_left: heard.append(phase),
        )
    assert heard == []
    assert not list(tmp_path.iterdir())


def test_a_place_that_exists_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        compare_methods(ComparisonOptions(model, (Method.RTN,), SMALL, WINDOWS, tmp_path))


def test_when_a_method_fails_nothing_is_kept_of_those_before_it(model: Path, tmp_path: Path) -> None:
    # given a text that is too short for the second method, which is found out when it has run the first
    (tmp_path / "short.txt").write_text("short")
    recipe = Recipe(num_windows=0, calibration=str(tmp_path / "short.txt"))

    with pytest.raises(RecipeError):
        compare_methods(ComparisonOptions(model, (Method.RTN, Method.AWQ), recipe, WINDOWS, tmp_path / "new" / "kept"))
    assert [path.name for path in tmp_path.rglob("*")] == ["short.txt"]


def test_a_termination_leaves_no_folder_that_was_made_for_what_was_to_be_kept(model: Path, tmp_path: Path) -> None:
    def end(phase: str, done: int, total: int, seconds_left: float | None) -> None:
        if (phase, done) == ("rtn quantize", 1):
            raise Terminated

    kept = tmp_path / "new" / "and" / "kept"
    with pytest.raises(Terminated):
        compare_methods(ComparisonOptions(model, (Method.RTN,), SMALL, WINDOWS, kept), end)
    assert not list(tmp_path.iterdir())
