"""What the gate reads out of machine code: the inner loop, its length, and what is wrong with it."""

import dataclasses

import pytest

from kernels.machine_code import MachineCode, find_faults, inner_loop, max_registers
from kernels.variant import LoopRules, Variant

# as nvdisasm -c prints it: an outer loop around the one that multiplies, then the copies' tail
ASSEMBLY = """
        /*0000*/                   I2F.RP R4, R6 ;
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R39], [R20.64], !P0 ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   HMMA.16816.F32 R92, R88.reuse, R28, RZ ;
        /*0050*/              @!P0 LOP3.LUT R53, R29, 0xf000f, R36.reuse, 0xea, !PT ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   FFMA R19, R79, R23, R19 ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP;
"""
LOOP = ("LDGSTS.E.BYPASS.128", "LDGDEPBAR", "HMMA.16816.F32", "LOP3.LUT", "BRA")
VARIANT = Variant(
    kernel="gemv_int4_kernel",
    arch=89,
    label="a tile",
    arguments=(),
    constants=(),
    num_warps=4,
    num_stages=3,
    loop=LoopRules("weight", units=2),
    min_programs=2,
)
GOOD = MachineCode(
    variant=VARIANT,
    shared_bytes=101_376,
    registers=255,
    stack_bytes=0,
    copies_per_iteration=1,
    assembly=ASSEMBLY,
    seconds=1.0,
)


def fault(**changes: object) -> str:
    """The one fault that the changed code has."""
    faults = find_faults(dataclasses.replace(GOOD, **changes))  # type: ignore[arg-type]
    assert len(faults) == 1
    return faults[0]


def test_the_inner_loop_is_the_innermost_that_multiplies() -> None:
    assert inner_loop(ASSEMBLY, has_edges=False) == LOOP


def test_code_without_a_loop_that_multiplies_has_none() -> None:
    assert inner_loop(ASSEMBLY.replace("HMMA", "HADD2"), has_edges=False) == ()


def test_where_a_longer_loop_is_for_the_ends_the_shorter_is_the_inner_one() -> None:
    longer = ASSEMBLY + ASSEMBLY.replace("HMMA", "NOP ;\n        /*0045*/ HMMA").replace(".L_x_", ".L_y_")

    assert inner_loop(longer, has_edges=True) == LOOP
    assert len(inner_loop(longer, has_edges=False)) == len(LOOP) + 1


def test_what_jumps_back_from_behind_the_end_is_no_loop() -> None:
    outlined = ASSEMBLY.replace("/*0090*/", "/*0088*/ EXIT ;\n        /*008a*/ BRA `(.L_x_1) ;\n        /*0090*/")

    assert inner_loop(outlined, has_edges=False) == LOOP


def test_the_cost_is_instructions_for_each_unit_of_work() -> None:
    assert GOOD.cost == 2.5


def test_a_loop_that_the_compiler_unrolled_does_the_work_of_several_iterations() -> None:
    twice = ASSEMBLY.replace("LDGDEPBAR ;", "LDGDEPBAR ;\n        /*0035*/       LDGDEPBAR ;")

    assert dataclasses.replace(GOOD, assembly=twice).cost == 1.5


def test_good_code_has_no_fault() -> None:
    assert find_faults(GOOD) == []


def test_code_that_could_not_launch_is_found() -> None:
    assert "101377 bytes of shared memory, the GPU has 101376" in fault(shared_bytes=101_377)


def test_spills_are_found() -> None:
    assert "spills" in fault(stack_bytes=8)
    assert "spills" in fault(assembly=ASSEMBLY.replace("FFMA R19, R79, R23, R19", "STL [R1], R2"))


def test_registers_that_leave_no_room_for_the_planned_programs_are_found() -> None:
    three = dataclasses.replace(VARIANT, min_programs=3)

    assert max_registers(three) == 168
    assert "255 registers; 3 programs leave 168" in fault(variant=three)


@pytest.mark.parametrize("arch", [90, 100])
def test_tensor_cores_of_another_generation_are_found(arch: int) -> None:
    assert "multiplies by other instructions" in fault(variant=dataclasses.replace(VARIANT, arch=arch))


@pytest.mark.parametrize("arch", [90, 100])
def test_tiles_of_few_rows_may_multiply_by_the_warp(arch: int) -> None:
    rules = LoopRules("token", units=2, warp_products=True)
    few_rows = dataclasses.replace(VARIANT, arch=arch, loop=rules)

    assert find_faults(dataclasses.replace(GOOD, variant=few_rows)) == []


def test_what_only_stands_outside_of_the_loop_does_not_count() -> None:
    moved = ASSEMBLY.replace("LDGSTS.E.BYPASS.128 [R39], [R20.64], !P0", "LDGSTS.E.64 [R39], [R20.64]").replace(
        "FFMA R19, R79, R23, R19", "LDGSTS.E.BYPASS.128 [R39], [R20.64]"
    )

    assert "no asynchronous copies of 128 bits" in fault(assembly=moved)


def test_conversions_of_integers_in_the_loop_are_found() -> None:
    assert "converts integers" in fault(assembly=ASSEMBLY.replace("LOP3.LUT R53", "I2FP.F32.S32 R53"))


def test_code_that_lost_its_loop_is_found() -> None:
    assert "no loop" in fault(assembly=ASSEMBLY.replace("@P1 BRA `(.L_x_1)", "NOP").replace("@P2 BRA", "NOP"))


def test_programs_without_work_that_end_late_are_found() -> None:
    # given a way out as the third instruction
    leaving = ASSEMBLY.replace("        /*0020*/", "        /*0018*/              @!P0 EXIT ;\n        /*0020*/", 1)
    assembly = leaving.replace(".L_x_1:\n", "", 1).replace("        /*0020*/", ".L_x_1:\n        /*0020*/", 1)
    patient, hasty = (
        dataclasses.replace(VARIANT, loop=dataclasses.replace(VARIANT.loop, max_idle=most))  # type: ignore[type-var]
        for most in (3, 2)
    )
    assert find_faults(dataclasses.replace(GOOD, assembly=assembly, variant=patient)) == []
    assert "ends after 3 instructions" in fault(assembly=assembly, variant=hasty)
