"""How a command's end is told: a termination promises to go on only where there is something to go on with."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import typer

from quant.checkpoint.writer import CheckpointWriter
from quant.errors import Terminated
from quant.terminal import ProgressFormat, exit_codes


def end_with_finished_work(out: Path) -> None:
    with CheckpointWriter(out, expected_bytes=0) as writer:
        writer.save_finished("part.safetensors", {"a": torch.ones(2)}, {})
        raise Terminated


def end_with_nothing_finished(out: Path) -> None:
    with CheckpointWriter(out, expected_bytes=0):
        raise Terminated


def end_before_writing(_out: Path) -> None:
    raise Terminated


def end_while_loading_beside_the_work_of_another_recipe(out: Path) -> None:
    with suppress(Terminated):
        end_with_finished_work(out)
    raise Terminated


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        (end_with_finished_work, "terminated; the same command goes on with what was finished"),
        (end_with_nothing_finished, "terminated"),
        (end_before_writing, "terminated"),
        (
            end_while_loading_beside_the_work_of_another_recipe,
            "terminated; what another run for {out} had finished is left as it was",
        ),
    ],
)
def test_a_terminated_run_promises_to_go_on_only_where_it_finished_something(
    end: Callable[[Path], None], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out[1]"

    with pytest.raises(typer.Exit) as ended, exit_codes(ProgressFormat.RICH, out):
        end(out)

    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == f"awq-serve: {sentence.format(out=out)}\n"


def test_a_terminated_command_that_writes_no_work_in_steps_promises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), exit_codes(ProgressFormat.RICH):
        raise Terminated

    assert capsys.readouterr().err == "awq-serve: terminated\n"
