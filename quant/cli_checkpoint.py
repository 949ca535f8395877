"""The commands that read checkpoints and measure nothing: convert and inspect."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quant.checkpoint.format_name import OutputFormat
from quant.checkpoint.location import resolve_model
from quant.convert import convert
from quant.inspect_checkpoint import inspect_checkpoint, module_table, plain_table, salience_table, summary_table
from quant.progress import progress_bar
from quant.terminal import ProgressFormat, exit_codes


def convert_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="quantized checkpoint: directory or hub name")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="directory to create; must not exist")],
    output_format: Annotated[OutputFormat, typer.Option("--format", help="the format to write")],
) -> None:
    """Write the checkpoint SRC in another format into the new directory OUT: the same codes, scales and zero points.

    Reads AWQ gemm, gemv and gemv_fast, GPTQ, AutoRound and compressed-tensors. Nothing is rounded: what the other
    format cannot hold exactly is refused.

    **Examples**

        awq-serve convert ./model-gptq ./model-awq --format awq

        awq-serve convert ./model-awq ./model-ct --format compressed-tensors
    """
    with exit_codes(ProgressFormat.RICH):
        directory = resolve_model(source)
        with progress_bar(Console(stderr=True)) as listener:
            written = convert(directory, output, output_format, listener)
        num_modules = len(written.quantized_module_names)
        Console().print(f"{num_modules} quantized modules written to {output}", soft_wrap=True, highlight=False)


def inspect_command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="directory or hub name")],
    *,
    salience: Annotated[
        bool, typer.Option("--salience", help="which input channels matter most, and what share of the error is theirs")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object with all of it instead of tables")] = False,
) -> None:
    """Print what CHECKPOINT holds: format, bits per weight, every layer's shape, size and error, what is unquantized.

    **Examples**

        awq-serve inspect ./smollm2-awq

        awq-serve inspect ./smollm2-awq --salience

        awq-serve inspect ./smollm2-awq --json
    """
    with exit_codes(ProgressFormat.RICH):
        inspection = inspect_checkpoint(resolve_model(checkpoint))
        tables = [salience_table(inspection)] if salience else [module_table(inspection), plain_table(inspection)]
    if as_json:
        typer.echo(json.dumps(inspection.to_json(), indent=2))
        return
    console = Console()
    for table in tables:
        if table.row_count:
            console.print(table)
    console.print(summary_table(inspection))
