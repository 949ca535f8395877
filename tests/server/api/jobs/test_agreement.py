"""The job service starts the quantizer without importing it; what the two say of the same thing agrees."""

from pathlib import Path

import typer

from kernels.layout import SUPPORTED_BITS
from quant.cli import app
from quant.method import Method
from quant.recipe import GROUP_SIZES, Recipe
from server.api.jobs.schema import CHOICES, QuantizeBody
from server.jobs.record import JobRecipe
from server.jobs.supervisor import quantizer_arguments


def test_the_choices_of_a_job_are_those_of_the_quantizer() -> None:
    assert CHOICES["bits"] == SUPPORTED_BITS
    assert set(CHOICES["group_size"]) == {"auto", *GROUP_SIZES}
    assert set(CHOICES["method"]) == {method.value for method in Method}
    assert QuantizeBody(model="any").calib == Recipe.calibration
    assert QuantizeBody(model="any").method == Recipe.method


def test_every_option_of_a_job_is_one_of_the_command_line() -> None:
    recipe = JobRecipe("model", Path("/out"), 4, 64, "awq", "self", calib_samples=8, calib_seqlen=128)
    options = [word for word in quantizer_arguments(recipe) if word.startswith("--")]
    command = typer.main.get_command(app)
    known = {name for option in command.commands["quantize"].params for name in option.opts}
    assert len(options) == 7
    assert set(options) <= known
