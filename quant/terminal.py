"""What the quantizer's commands share at a terminal: how they tell progress, failures, exit codes and group sizes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import typer
from rich.console import Console

from kernels.layout import WHOLE_ROW
from quant.checkpoint.writer import has_finished_work
from quant.errors import QuantError, RecipeError, Terminated
from quant.progress import JsonLines
from quant.recipe import AUTO, GROUP_SIZES, ROW

PROGRAM = "awq-serve"
EXIT_INTERRUPTED = 130


class ProgressFormat(StrEnum):
    """How progress is told: a bar on stderr for people, JSON lines on stdout for programs."""

    RICH = "rich"
    JSON = "json"


@contextmanager
def exit_codes(progress_format: ProgressFormat, out: Path | None = None) -> Iterator[None]:
    """Bad input and failures become one sentence and an exit code; anything else is a bug and keeps its traceback.

    out: where a run writes whose finished work outlives a termination; None where no work does.
    """
    try:
        yield
    except QuantError as error:
        _tell_failure(str(error), progress_format)
        raise typer.Exit(error.exit_code) from error
    except Terminated as error:
        is_kept = out is not None and has_finished_work(out)
        sentence = "terminated; the same command goes on with what was finished" if is_kept else "terminated"
        _tell_failure(sentence, progress_format)
        raise typer.Exit(EXIT_INTERRUPTED) from error
    except KeyboardInterrupt as error:
        _tell_failure("interrupted; nothing was written", progress_format)
        raise typer.Exit(EXIT_INTERRUPTED) from error


def tell_notice(sentence: str) -> None:
    """What a run has to say on its way: on stderr, where programs that read JSON lines are not disturbed by it."""
    Console(stderr=True).print(f"{PROGRAM}: {sentence}", markup=False, highlight=False, soft_wrap=True)


def parse_group_size(text: str) -> int | None:
    """What `--group-size` says, as a Recipe takes it. Raises RecipeError when it is no size."""
    if text == AUTO:
        return None
    if text == ROW:
        return WHOLE_ROW
    if not text.isdecimal():
        raise RecipeError(f"group size is {text!r}; supported: {AUTO}, {', '.join(map(str, GROUP_SIZES))}, {ROW}")
    return int(text)


def _tell_failure(message: str, progress_format: ProgressFormat) -> None:
    if progress_format is ProgressFormat.JSON:
        JsonLines(sys.stdout).on_failed(message)
    else:
        Console(stderr=True).print(f"{PROGRAM}: {message}", style="red", markup=False, soft_wrap=True)
