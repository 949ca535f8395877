"""The options of `quantize` with their help. What they mean is said by Recipe, which their defaults come from."""

from pathlib import Path
from typing import Annotated

import typer

from quant.device_name import DeviceName
from quant.method import Method
from quant.terminal import ProgressFormat

Source = Annotated[str, typer.Argument(metavar="SRC", help="model directory, .gguf file, or hub name")]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="directory to create; must not exist")]
Bits = Annotated[int, typer.Option(help="bits per weight: 3, 4 or 8")]
GroupSize = Annotated[
    str, typer.Option(help="input channels per scale: 128, 64, 32, row, or auto (the largest that fits)")
]
TargetBpw = Annotated[
    float | None,
    typer.Option(
        help="bits per weight on average, scales and zero points counted: each linear gets --bits or more, and "
        "smaller groups, by what it loses"
    ),
]
LmHead = Annotated[int | None, typer.Option(help="bits of the output head, 8 or 4; by default it is left as it is")]
Format = Annotated[
    str,
    typer.Option(
        "--format", help="awq, compressed-tensors, or auto: awq where everything is in 4 bits, otherwise the other"
    ),
]
MethodChoice = Annotated[
    Method,
    typer.Option(
        help="awq+gptq scales, corrects and rounds with error feedback; best does it on more text; awq and gptq are "
        "its parts, and rtn rounds plainly"
    ),
]
Calib = Annotated[
    str,
    typer.Option(
        help="calibration text: self (the model writes it), wikitext, c4, pileval, ultrachat, a file, a hub data "
        "set, or a mix like wikitext:0.5,self:0.5"
    ),
]
CalibSamples = Annotated[int | None, typer.Option(help="calibration rows; by default what the method gains from")]
CalibSeqlen = Annotated[int | None, typer.Option(help="tokens per calibration row, likewise")]
Device = Annotated[
    DeviceName,
    typer.Option(
        help="where blocks are run, searched and rounded: cuda, cpu, or auto: a GPU with room for the largest block, "
        "else the CPU"
    ),
]
Seed = Annotated[int, typer.Option(help="seed of the text that the model writes")]
Progress = Annotated[ProgressFormat, typer.Option(help="how progress is told")]
MaxKl = Annotated[float | None, typer.Option(help="refuse a result whose mean KL to the original, in nats, is higher")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="tell each linear's formula and error as soon as its block is finished")
]
NoEval = Annotated[bool, typer.Option("--no-eval", help="measure nothing on held-out text")]
