"""The job service starts the quantizer without importing it; what the two say of the same thing agrees."""

from dataclasses import fields
from pathlib import Path

import pytest
import typer

from quant.cli import app
from quant.recipe import Recipe
from server.api.jobs.places import JobPlaces
from server.api.jobs.schema import FIELD_NAMES, QuantizeBody
from server.errors import InvalidRequest
from server.jobs.supervisor import quantizer_arguments

# options of the command that are none of a job: how it talks, and where things are
NOT_OF_A_JOB = {"source", "output", "progress_format", "verbose"}
# for each field of a recipe one that a body may give, and what it is in the recipe then
CHANGES = {
    "method": ({"method": "best"}, "best"),
    "bits": ({"bits": 8}, 8),
    "group_size": ({"group_size": "row"}, -1),
    "calibration": ({"calib": "wikitext"}, "wikitext"),
    "num_samples": ({"calib_samples": 9}, 9),
    "sample_tokens": ({"calib_seqlen": 65}, 65),
    "num_windows": ({"no_eval": True}, 0),
    "seed": ({"seed": 4}, 4),
    "device": ({"device": "cuda"}, "cuda"),
    "max_kl": ({"max_kl": 0.5}, 0.5),
    "format": ({"format": "compressed-tensors"}, "compressed-tensors"),
    "target_bpw": ({"target_bpw": 4.5}, 4.5),
    "lm_head": ({"lm_head": 8}, 8),
}


def body_of(changes: dict[str, object]) -> QuantizeBody:
    return QuantizeBody.model_validate({"model": "owner/name", **changes})


def read_by_the_command(arguments: list[str]) -> dict[str, object]:
    """The options as the quantizer's command line takes them, by their names there."""
    quantize = typer.main.get_command(app).commands["quantize"]
    return quantize.make_context("quantize", arguments).params


def test_a_body_with_nothing_but_a_model_is_the_default_recipe() -> None:
    assert body_of({}).checked_recipe() == Recipe()


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe)])
def test_every_field_of_a_recipe_can_be_given_and_reaches_the_quantizer(field: str, tmp_path: Path) -> None:
    changes, value = CHANGES[field]
    ((name, given),) = changes.items()
    assert name == FIELD_NAMES.get(field, field)

    # in the recipe that is checked
    assert getattr(body_of(changes).checked_recipe(), field) == value

    # and on the command line of the quantizer, where it is no default
    job = JobPlaces(tmp_path, ()).recipe_from_body(body_of(changes))
    unchanged = JobPlaces(tmp_path, ()).recipe_from_body(body_of({"output": job.output.name}))
    taken, default = read_by_the_command(quantizer_arguments(job)), read_by_the_command(quantizer_arguments(unchanged))
    option = {"format": "output_format"}.get(name, name)
    assert taken[option] == (str(given) if isinstance(default[option], str) else given)
    assert {other for other in taken if taken[other] != default[other]} == {option}


def test_a_job_has_every_option_of_the_command() -> None:
    quantize = typer.main.get_command(app).commands["quantize"]
    options = {"format" if option.name == "output_format" else option.name for option in quantize.params}
    assert options - NOT_OF_A_JOB == set(QuantizeBody.model_fields) - {"model", "output"}


def test_what_a_recipe_says_of_options_is_said_of_fields() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        body_of({"bits": 8, "format": "awq"}).checked_recipe()
    assert refusal.value.param == "format"
    assert refusal.value.message.endswith("holds 4 bits only; use format compressed-tensors")
    with pytest.raises(InvalidRequest) as refusal:
        body_of({"method": "rtn", "calib_samples": 8}).checked_recipe()
    assert refusal.value.param == "calib_samples"
    assert "the method rtn reads no calibration text; leave out calib_samples, or" in refusal.value.message
