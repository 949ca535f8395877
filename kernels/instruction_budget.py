"""How many instructions each kernel's inner loop may have per unit of work: kept in files, and may only fall.

A compiler's version decides what it makes of a kernel, so each version of Triton has its own numbers; one that no
number was kept for is not held to any. See `machine_code` for what is counted.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import triton

from kernels.machine_code import MachineCode
from kernels.variants import family_of

DIRECTORY = Path(__file__).parent / "budgets"
# major.minor: what a patch release changes in machine code is a fault to look at
VERSION = ".".join(triton.__version__.split(".")[:2])

# version of Triton -> name of the variant -> instructions per unit
Budgets = dict[str, dict[str, float]]


def read(family: str) -> Budgets:
    """The budgets of one family of kernels; empty before the first were kept."""
    path = DIRECTORY / f"{family}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def find_overrun(code: MachineCode, budgets: Budgets) -> str | None:
    """What the variant's loop is too long by, and what to do. None when it is within its budget or has none."""
    budget = budgets.get(VERSION, {}).get(code.variant.name)
    if budget is None or code.variant.loop is None or code.cost is None or code.cost <= budget:
        return None
    return f"needs {code.cost:.3f} instructions per {code.variant.loop.unit}, its budget is {budget:.3f}"


def lower(codes: Iterable[MachineCode], names: dict[str, set[str]]) -> dict[str, int]:
    """Keep what the codes need where it is less than their budgets, or they have none. Returns changes per family.

    names: all variants that each family has; budgets of others are dropped.
    """
    found: dict[str, dict[str, float]] = {family: {} for family in names}
    for code in codes:
        if code.cost is not None:
            found[family_of(code.variant).name][code.variant.name] = code.cost
    changes = {}
    for family, costs in found.items():
        budgets = read(family)
        before = budgets.get(VERSION, {})
        lowered = before | {name: min(cost, before.get(name, cost)) for name, cost in costs.items()}
        after = {name: cost for name, cost in lowered.items() if name in names[family]}
        changes[family] = len(set(after.items()) ^ set(before.items()))
        if changes[family]:
            DIRECTORY.mkdir(exist_ok=True)
            text = json.dumps({**budgets, VERSION: after}, indent=1, sort_keys=True)
            (DIRECTORY / f"{family}.json").write_text(text + "\n")
    return changes
