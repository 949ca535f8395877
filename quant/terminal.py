"""What the quantizer's commands share at a terminal: how they tell progress, failures and exit codes."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import typer
from rich.console import Console

from quant.checkpoint.writer import has_finished_work
from quant.errors import QuantError, Terminated
from quant.progress import JsonLines
from quant.report import BlockError, LayerLoss

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
        _tell_failure(_describe_end(error, out), progress_format)
        raise typer.Exit(EXIT_INTERRUPTED) from error
    except KeyboardInterrupt as error:
        _tell_failure("interrupted; nothing was written", progress_format)
        raise typer.Exit(EXIT_INTERRUPTED) from error


def tell_notice(sentence: str) -> None:
    """What a run has to say on its way, on stderr: stdout has only its result."""
    _tell(f"{PROGRAM}: {sentence}")


def tell_block(block: BlockError, layers: Sequence[LayerLoss]) -> None:
    """A line for each linear of a finished block, on stderr: its formula, its error by plain rounding and now."""
    width = max((len(layer.name) for layer in layers), default=0)
    for layer in layers:
        errors = f"{layer.plain:.6f} -> {layer.chosen:.6f}"
        _tell(f"{layer.name:<{width}}  {layer.formula}  {errors}  {block.kept}")
    _tell(f"{block.name:<{width}}  block  {block.plain:.6f} -> {block.chosen:.6f}  {block.kept}")


def _tell(line: str) -> None:
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


def _describe_end(error: Terminated, out: Path | None) -> str:
    """What a termination leaves. Work that lies beside `out` may be another recipe's, or another run's under way."""
    if out is None:
        return "terminated"
    if error.kept_for == out.absolute():
        return "terminated; the same command goes on with what was finished"
    if has_finished_work(out):
        return f"terminated; what another run for {out} had finished is left as it was"
    return "terminated"


def _tell_failure(message: str, progress_format: ProgressFormat) -> None:
    if progress_format is ProgressFormat.JSON:
        JsonLines(sys.stdout).on_failed(message)
    else:
        Console(stderr=True).print(f"{PROGRAM}: {message}", style="red", markup=False, soft_wrap=True)
