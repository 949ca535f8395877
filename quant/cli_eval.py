"""The command eval: a checkpoint beside its original, or every method on an unquantized model."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quant.checkpoint.location import resolve_model
from quant.checkpoint.reader import CheckpointReader
from quant.device_name import DeviceName
from quant.errors import OutputError, RecipeError, WriteError
from quant.evaluate import EvalOptions, TextWindows, evaluate_checkpoint, render
from quant.method import STEPS, Method
from quant.method_comparison import (
    UNQUANTIZED,
    ComparisonOptions,
    compare_methods,
    parse_methods,
    render_methods,
)
from quant.method_plot import check_plotting, draw_methods
from quant.progress import progress_bar
from quant.recipe import Recipe, parse_group_size
from quant.terminal import ProgressFormat, exit_codes, tell_notice

ALL_METHODS = ",".join((UNQUANTIZED, *Method))


@dataclass(frozen=True)
class ComparisonFlags:
    """The options that only an unquantized model takes, by their flags; None where one was not given."""

    methods: str | None
    bits: int | None
    group_size: str | None
    calib: str | None
    calib_samples: int | None
    calib_seqlen: int | None
    seed: int | None
    device: DeviceName | None
    keep: Path | None
    plot: Path | None

    def given(self) -> list[str]:
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]

    def options(self, source: Path, windows: TextWindows) -> ComparisonOptions:
        """What is to be compared. Raises RecipeError when a value is out of range."""
        methods = tuple(Method) if self.methods is None else parse_methods(self.methods)
        recipe = Recipe(
            # any that reads calibration text, as the text is refused where none of them does
            method=next((method for method in methods if STEPS[method].calibrates), Method.RTN),
            bits=Recipe.bits if self.bits is None else self.bits,
            group_size=None if self.group_size is None else parse_group_size(self.group_size),
            calibration=Recipe.calibration if self.calib is None else self.calib,
            num_samples=Recipe.num_samples if self.calib_samples is None else self.calib_samples,
            sample_tokens=Recipe.sample_tokens if self.calib_seqlen is None else self.calib_seqlen,
            num_windows=0,
            seed=Recipe.seed if self.seed is None else self.seed,
            device=Recipe.device if self.device is None else self.device,
        )
        return ComparisonOptions(source, methods, recipe, windows, self.keep)


def eval_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="directory, .gguf file or hub name, quantized or not")],
    methods: Annotated[
        str | None, typer.Option(help=f"what to try on an unquantized model, by default all: {ALL_METHODS}")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="bits per weight: 3, 4 or 8")] = None,
    group_size: Annotated[str | None, typer.Option(help="as quantize takes it")] = None,
    calib: Annotated[str | None, typer.Option(help="calibration text, as quantize takes it")] = None,
    calib_samples: Annotated[int | None, typer.Option(help="calibration rows")] = None,
    calib_seqlen: Annotated[int | None, typer.Option(help="tokens per calibration row")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of the text that the model writes")] = None,
    device: Annotated[DeviceName | None, typer.Option(help="where the methods run, as quantize takes it")] = None,
    keep: Annotated[Path | None, typer.Option(help="new directory for the methods' checkpoints")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the methods into this PNG file")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write every figure there")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="SRC", help="a checkpoint's original; by default the one its report names")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file; by default a short text that ships here")] = None,
    windows: Annotated[int, typer.Option(help="windows to measure, at most")] = TextWindows.num_windows,
    window_tokens: Annotated[int, typer.Option(help="tokens per window")] = TextWindows.window_tokens,
) -> None:
    """Print perplexity, KL and top-1 agreement side by side, on the same tokens.

    A quantized MODEL is compared with its original and with plain rounding. An unquantized one is quantized by every
    method, and the methods are compared.

    **Examples**

        awq-serve eval ./smollm2-awq

        awq-serve eval ./smollm2-awq --against ./SmolLM2-135M-Instruct --text wikitext2-test.raw

        awq-serve eval ./SmolLM2-135M-Instruct --methods fp,rtn,awq --plot methods.png
    """
    flags = ComparisonFlags(methods, bits, group_size, calib, calib_samples, calib_seqlen, seed, device, keep, plot)
    with exit_codes(ProgressFormat.RICH):
        for file in (plot, json_file):
            _check_file(file)
        measured_on = TextWindows(text, windows, window_tokens)
        path = resolve_model(model)
        if _is_quantized(path):
            _refuse(flags.given(), f"{model} is quantized: only an unquantized model can be tried with other methods")
            _evaluate(EvalOptions(path, against, measured_on), json_file)
        else:
            _refuse([] if against is None else ["--against"], f"{model} is not quantized, and its own original")
            _compare(flags.options(path, measured_on), plot, json_file)


def _evaluate(options: EvalOptions, json_file: Path | None) -> None:
    with progress_bar(Console(stderr=True)) as listener:
        table = evaluate_checkpoint(options, listener)
    Console().print(render(table))
    _write_json(json_file, table.to_json())


def _compare(options: ComparisonOptions, plot: Path | None, json_file: Path | None) -> None:
    if plot is not None:
        check_plotting()
    with progress_bar(Console(stderr=True)) as listener:
        table = compare_methods(options, listener, tell_notice)
    Console().print(render_methods(table))
    _write_json(json_file, table.to_json())
    if plot is not None:
        _write(plot, draw_methods(table))


def _is_quantized(path: Path) -> bool:
    return path.is_dir() and CheckpointReader.open(path).meta is not None


def _refuse(flags: list[str], reason: str) -> None:
    if flags:
        raise RecipeError(f"{reason}; leave out {', '.join(flags)}")


def _check_file(file: Path | None) -> None:
    """Raises OutputError before minutes of measuring, and not after them, where a file cannot be written."""
    if file is None:
        return
    if file.is_dir():
        raise OutputError(f"{file} is a directory; give the name of a file")
    if not (file.absolute().parent.is_dir() and os.access(file.absolute().parent, os.W_OK)):
        raise OutputError(f"{file} cannot be written: {file.parent} is no directory that can be written to")


def _write_json(file: Path | None, figures: Mapping[str, object]) -> None:
    if file is not None:
        _write(file, (json.dumps(figures, indent=2) + "\n").encode())


def _write(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        raise WriteError(f"{file} cannot be written: {error}") from error
