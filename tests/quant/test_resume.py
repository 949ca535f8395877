"""A run that ended before its time goes on after its last finished block, and gives the bytes of an unbroken run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant.checkpoint.folded_scales import read_folded_scales
from quant.errors import QuantizationError, Terminated
from quant.pipeline import quantize
from quant.progress import ProgressListener, ignore_notice
from quant.recipe import Method, Recipe
from tests.quant.tiny_families import VARIANTS, Variant
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
NUM_BLOCKS = 4
AWQ = Recipe(method=Method.AWQ, num_samples=4, sample_tokens=32, num_windows=0)
# on two streams: what the original gives is needed again, too
AWQ_GPTQ = replace(AWQ, method=Method.AWQ_GPTQ)
RTN = AWQ.with_method(Method.RTN)
OPTIONS = ("--no-eval", "--progress-format=json")
TEXT_OPTIONS = ("--calib-samples=4", "--calib-seqlen=32")
# killed, by a signal that nothing can handle, at the moment it hears that two blocks are finished
KILLED_AFTER_TWO_BLOCKS = """
import os, signal, sys
from pathlib import Path
from quant.pipeline import quantize
from quant.recipe import Method, Recipe

def listen(phase, done, total, seconds_left):
    if (phase, done) == ("quantize", 2):
        os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe(num_samples=4, sample_tokens=32, num_windows=0).with_method(Method(sys.argv[3]))
quantize(recipe, Path(sys.argv[1]), Path(sys.argv[2]), listen)
"""
PLAIN = Variant("qwen2", "qwen2")
# biases, routers and experts: all that a block holds beside its linears
MIXTURE = next(variant for variant in VARIANTS if variant.model_type == "qwen2_moe")


def save_model(directory: Path, variant: Variant = PLAIN, seed: int = 0) -> Path:
    overrides = {**variant.fields, "num_hidden_layers": NUM_BLOCKS}
    return save_tiny_model(variant.model_type, directory, config_overrides=overrides, seed=seed)


def weights_of(checkpoint: Path) -> dict[str, bytes]:
    """Everything but what says how long the run took."""
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    report = json.loads(files.pop("report.json"))
    files["layers and blocks"] = json.dumps([report["layers"], report["blocks"], report["calibration"]]).encode()
    files.pop("README.md")
    return files


def ending_with(error: BaseException, num_finished: int) -> ProgressListener:
    """A listener that ends the run when so many blocks are finished."""

    def listen(phase: str, done: int, total: int, seconds_left: float | None) -> None:
        if phase == "quantize" and done == num_finished:
            raise error

    return listen


def end_early(recipe: Recipe, model: Path, out: Path, num_finished: int = 2) -> Path:
    """A run that the system ended; returns its hidden folder."""
    with pytest.raises(Terminated):
        quantize(recipe, model, out, ending_with(Terminated(), num_finished))
    assert not out.exists()
    (folder,) = out.parent.glob(f".{out.name}.*")
    return folder


class Heard:
    """What a run said: its phases in order, and its sentences."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.progress: list[tuple[str, int, int]] = []
        self.notices: list[str] = []

    def on_progress(self, phase: str, done: int, total: int, seconds_left: float | None) -> None:
        self.progress.append((phase, done, total))
        self.phases = list(dict.fromkeys([*self.phases, phase]))


def run(recipe: Recipe, model: Path, out: Path) -> Heard:
    heard = Heard()
    quantize(recipe, model, out, heard.on_progress, heard.notices.append)
    # nothing but the checkpoint stays
    assert not list(out.parent.glob(".*"))
    return heard


def run_python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        # as many as the unbroken run in this process has: sums in another order are other sums
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("method", [Method.RTN, Method.AWQ, Method.AWQ_GPTQ])
def test_a_killed_run_goes_on_at_the_block_it_had_reached_and_gives_the_same_bytes(
    method: Method, tmp_path: Path
) -> None:
    # given a program that was killed when it had finished two blocks
    model = save_model(tmp_path / "model")
    killed = run_python("-c", KILLED_AFTER_TWO_BLOCKS, model, tmp_path / "out", method)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()

    # when the same is asked for again
    options = OPTIONS if method is Method.RTN else (*OPTIONS, *TEXT_OPTIONS)
    resumed = run_python("-m", "quant", "quantize", model, tmp_path / "out", "--method", method, *options)

    # then it says where it goes on, writes no text again, and what comes out is what an unbroken run gives
    assert resumed.returncode == 0, resumed.stderr
    events = [json.loads(line) for line in resumed.stdout.splitlines()]
    sentences = [event["message"] for event in events if event["event"] == "notice"]
    assert sentences == ["resuming at block 3 of 4: an earlier run ended there"]
    phases = list(dict.fromkeys(event["phase"] for event in events if event["event"] == "progress"))
    assert phases == ["load", "resume", "quantize"]
    quantize(AWQ.with_method(method), model, tmp_path / "unbroken")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "unbroken")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("num_finished", range(1, NUM_BLOCKS + 1))
def test_it_goes_on_after_any_block(num_finished: int, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", MIXTURE)
    quantize(AWQ_GPTQ, model, tmp_path / "unbroken")
    end_early(AWQ_GPTQ, model, tmp_path / "out", num_finished)

    heard = run(AWQ_GPTQ, model, tmp_path / "out")

    place = f"at block {num_finished + 1} of" if num_finished < NUM_BLOCKS else "after the last of"
    assert heard.notices == [f"resuming {place} {NUM_BLOCKS}: an earlier run ended there"]
    replayed = [("resume", done, num_finished) for done in range(num_finished + 1)]
    others = [("quantize", done, NUM_BLOCKS) for done in range(num_finished, NUM_BLOCKS + 1)]
    assert heard.progress[2:] == [*replayed, *others]
    # what is folded into blocks of either run included
    assert len(read_folded_scales(tmp_path / "out") or ()) > 0
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "unbroken")


def test_a_run_that_is_ended_twice_goes_on_twice(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    quantize(AWQ, model, tmp_path / "unbroken")
    end_early(AWQ, model, tmp_path / "out", 1)
    end_early(AWQ, model, tmp_path / "out", 3)

    assert "at block 4 of 4" in run(AWQ, model, tmp_path / "out").notices[0]
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "unbroken")


def test_a_mixture_and_a_quantized_head_come_out_the_same(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    recipe = replace(AWQ, target_bpw=5.0, lm_head=8)
    quantize(recipe, model, tmp_path / "unbroken")
    end_early(recipe, model, tmp_path / "out")

    run(recipe, model, tmp_path / "out")

    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "unbroken")


def test_how_the_result_is_measured_may_change(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    end_early(RTN, model, tmp_path / "out")

    heard = run(replace(RTN, num_windows=1, max_kl=10.0), model, tmp_path / "out")

    assert "resuming" in heard.notices[0]


def write_other_weights(model: Path) -> None:
    save_model(model, seed=1)


def write_other_text(model: Path) -> None:
    (model.parent / "text.txt").write_text("And now for something else. " * 20)


@pytest.mark.parametrize(
    ("changed_recipe", "change"),
    [
        ({"group_size": 32}, None),
        ({"seed": 1}, None),
        ({"method": Method.GPTQ}, None),
        ({}, write_other_weights),
        ({}, write_other_text),
    ],
    ids=["group size", "seed", "method", "weights", "text"],
)
def test_what_was_finished_for_another_recipe_or_source_is_not_taken(
    changed_recipe: dict[str, object], change: Callable[[Path], None] | None, tmp_path: Path
) -> None:
    # given a run that was ended, and after that another recipe, other weights or another text
    model = save_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    recipe = replace(AWQ, calibration=str(tmp_path / "text.txt"))
    end_early(recipe, model, tmp_path / "out")
    recipe = replace(recipe, **changed_recipe)
    if change is not None:
        change(model)

    # when it is run
    heard = run(recipe, model, tmp_path / "out")

    # then it says that it begins anew, and does
    (sentence,) = heard.notices
    assert sentence.startswith(
        "what an ended run had finished for this place is of another recipe, source, device or version"
    )
    assert "resume" not in heard.phases
    quantize(recipe, model, tmp_path / "fresh")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "fresh")


def cut_short(finished: Path) -> None:
    os.truncate(finished / "block-00002.safetensors", 1000)


def empty(finished: Path) -> None:
    os.truncate(finished / "calibration.safetensors", 0)


def remove_one(finished: Path) -> None:
    (finished / "block-00001.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut_short, "what an ended run had finished is damaged (block-00002.safetensors)"),
        (empty, "what an ended run had finished is damaged (calibration.safetensors)"),
        (remove_one, "of what an ended run had finished, block-00001.safetensors is gone"),
    ],
)
def test_damaged_work_is_not_trusted(damage: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    quantize(AWQ, model, tmp_path / "unbroken")
    damage(end_early(AWQ, model, tmp_path / "out") / "finished")

    heard = run(AWQ, model, tmp_path / "out")

    assert heard.notices[0].startswith(sentence)
    assert "resume" not in heard.phases
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "unbroken")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), QuantizationError("not finite")], ids=["Ctrl-C", "failure"])
def test_an_interrupted_or_failed_run_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")

    with pytest.raises(type(error)):
        quantize(RTN, model, tmp_path / "new" / "out", ending_with(error, 2), ignore_notice)

    assert list(tmp_path.iterdir()) == [model]
