"""The quantizer's command line: options to a Recipe, progress and results to the terminal or to a program."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

import typer
from rich.console import Console
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from quant import cli_options as options
from quant.calibration_mix import SELF_CALIBRATION
from quant.checkpoint.location import resolve_model
from quant.cli_checkpoint import convert_command, inspect_command
from quant.cli_eval import eval_command
from quant.errors import Terminated
from quant.pipeline import quantize
from quant.progress import BlockListener, JsonLines, ignore_block, progress_bar
from quant.recipe import AUTO, Recipe, parse_format, parse_group_size
from quant.report import layer_table, summary_table
from quant.terminal import PROGRAM, ProgressFormat, exit_codes, tell_block, tell_notice

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False
)


app.command("convert")(convert_command)
app.command("eval")(eval_command)
app.command("inspect")(inspect_command)


@app.callback()
def describe() -> None:
    """Quantize a language model to 3, 4 or 8 bits, and measure what that costs."""


@app.command("quantize")
def quantize_command(
    source: options.Source,
    output: options.Output,
    bits: options.Bits = Recipe.bits,
    group_size: options.GroupSize = AUTO,
    target_bpw: options.TargetBpw = None,
    lm_head: options.LmHead = None,
    output_format: options.Format = AUTO,
    method: options.MethodChoice = Recipe.method,
    calib: options.Calib = SELF_CALIBRATION,
    calib_samples: options.CalibSamples = None,
    calib_seqlen: options.CalibSeqlen = None,
    seed: options.Seed = Recipe.seed,
    device: options.Device = Recipe.device,
    progress_format: options.Progress = ProgressFormat.RICH,
    max_kl: options.MaxKl = None,
    *,
    no_eval: options.NoEval = False,
    verbose: options.Verbose = False,
) -> None:
    """Quantize the model SRC into the new directory OUT.

    **Examples**

        awq-serve quantize ./SmolLM2-135M-Instruct ./smollm2-awq

        awq-serve quantize model.gguf out --group-size 32 --calib wikitext:0.5,self:0.5 --max-kl 0.2

        awq-serve quantize ./model ./model-w8 --bits 8 --group-size row --device cpu -v

        awq-serve quantize ./model ./model-mixed --target-bpw 4.5 --lm-head 8
    """
    with exit_codes(progress_format, output):
        recipe = Recipe(
            method=method,
            bits=bits,
            group_size=parse_group_size(group_size),
            calibration=calib,
            num_samples=calib_samples,
            sample_tokens=calib_seqlen,
            num_windows=0 if no_eval else Recipe.num_windows,
            seed=seed,
            max_kl=max_kl,
            format=parse_format(output_format),
            target_bpw=target_bpw,
            lm_head=lm_head,
            device=device,
        )
        blocks = _block_listener(progress_format) if verbose else ignore_block
        _run(recipe, resolve_model(source), output, progress_format, blocks)


def main() -> None:
    """Run the command line. Ctrl-C removes what was written; SIGTERM and SIGHUP leave finished work to a later run."""
    signal.signal(signal.SIGINT, _interrupt)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    # its table of missing tensors, beside the sentence that names them
    set_verbosity_error()  # type: ignore[no-untyped-call]
    app(prog_name=PROGRAM)


def _block_listener(progress_format: ProgressFormat) -> BlockListener:
    return JsonLines(sys.stdout).on_block if progress_format is ProgressFormat.JSON else tell_block


def _run(recipe: Recipe, source: Path, output: Path, progress_format: ProgressFormat, on_block: BlockListener) -> None:
    if progress_format is ProgressFormat.JSON:
        lines = JsonLines(sys.stdout)
        report = quantize(recipe, source, output, lines.on_progress, lines.on_notice, on_block)
        lines.on_done(str(output), report.to_json())
        return
    with progress_bar(Console(stderr=True)) as listener:
        report = quantize(recipe, source, output, listener, tell_notice, on_block)
    console = Console()
    if report.layers:
        console.print(layer_table(report))
    console.print(summary_table(report))
    for note in report.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(f"written to {output}", soft_wrap=True)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated
