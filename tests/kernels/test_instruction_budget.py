"""Instruction budgets: they hold to the last instruction, fall by one command, and never rise by it."""

import dataclasses
import json
from pathlib import Path

import pytest

from kernels import instruction_budget
from kernels.instruction_budget import VERSION, find_overrun, lower, read
from kernels.machine_code import MachineCode
from kernels.tiles import ARCHITECTURES
from kernels.variants import FAMILIES, sample_variants

VARIANT = next(variant for variant in sample_variants(90) if variant.kernel == "gemv_int4_kernel")


def code_of_length(length: int) -> MachineCode:
    body = "\n".join(["/*0000*/ HGMMA ;", *["/*0000*/ FFMA ;"] * (length - 2), "/*0000*/ BRA `(.L_x_1) ;"])
    assert VARIANT.loop is not None
    variant = dataclasses.replace(VARIANT, loop=dataclasses.replace(VARIANT.loop, units=100))
    return MachineCode(variant, 0, 0, 0, 1, f".L_x_1:\n{body}", 1.0)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(instruction_budget, "DIRECTORY", tmp_path)
    return tmp_path


def test_one_instruction_too_many_is_an_overrun() -> None:
    budgets = {VERSION: {VARIANT.name: 2.0}}

    assert find_overrun(code_of_length(200), budgets) is None
    assert find_overrun(code_of_length(201), budgets) == "needs 2.010 instructions per weight, its budget is 2.000"


def test_another_version_of_the_compiler_is_held_to_its_own_numbers() -> None:
    assert find_overrun(code_of_length(900), {"1.0": {VARIANT.name: 2.0}}) is None


def test_budgets_are_kept_and_only_fall() -> None:
    names = {"linear": {VARIANT.name}}

    assert lower([code_of_length(200)], names) == {"linear": 1}
    lower([code_of_length(190)], names)
    assert lower([code_of_length(195)], names) == {"linear": 0}

    assert read("linear") == {VERSION: {VARIANT.name: 1.9}}


def test_lowering_drops_variants_that_are_gone_and_leaves_other_versions_alone(directory: Path) -> None:
    kept = {VERSION: {"gone": 1.0, VARIANT.name: 3.0}, "1.0": {"gone": 2.0}}
    (directory / "linear.json").write_text(json.dumps(kept))

    lower([], {"linear": {VARIANT.name}})

    assert read("linear") == {VERSION: {VARIANT.name: 3.0}, "1.0": {"gone": 2.0}}


def test_every_kept_budget_belongs_to_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for family in FAMILIES:
        names = {variant.name for arch in ARCHITECTURES for variant in family.all_variants(arch)}
        assert set(read(family.name).get(VERSION, {})) <= names
