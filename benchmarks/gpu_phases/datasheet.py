"""Data: what vendors say of their GPUs, and what this project asks of its kernels on each architecture."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Datasheet:
    """bytes_per_second: of the memory. half_flops: dense fp16 with float32 sums, a second."""

    bytes_per_second: float
    half_flops: float


# by a part of the name that the driver gives, the longer before the shorter
DATASHEETS = {
    "H200": Datasheet(4.8e12, 989e12),
    "H100 PCIe": Datasheet(2.04e12, 756e12),
    "H100 NVL": Datasheet(3.94e12, 835e12),
    "H100": Datasheet(3.35e12, 989e12),
    "A100-PCIE-40GB": Datasheet(1.555e12, 312e12),
    "A100-SXM4-40GB": Datasheet(1.555e12, 312e12),
    "A100 80GB PCIe": Datasheet(1.935e12, 312e12),
    "A100": Datasheet(2.039e12, 312e12),
    "L40S": Datasheet(0.864e12, 362e12),
    "RTX 4090": Datasheet(1.008e12, 165e12),
    "RTX 3090": Datasheet(0.936e12, 71e12),
}

# the share of measured copy bandwidth that a linear layer of 1 to 16 rows should reach, by compute capability times
# ten; others: the lower one
LINEAR_BANDWIDTH_GOALS = {86: 0.90, 89: 0.90, 120: 0.90}
LOWEST_LINEAR_BANDWIDTH_GOAL = 0.75
MAX_BANDWIDTH_ROWS = 16
# of cuBLAS in fp16, above that many rows
MANY_ROWS_GOAL = 0.85
MANY_ROWS = 512
ATTENTION_BANDWIDTH_GOAL = 0.85
# of what the parts of a step take when each is timed alone
END_TO_END_GOAL = 0.85


def datasheet_of(device_name: str) -> Datasheet | None:
    """None for a device that the table does not have."""
    return next((sheet for part, sheet in DATASHEETS.items() if part in device_name), None)


def linear_bandwidth_goal(architecture: int) -> float:
    return LINEAR_BANDWIDTH_GOALS.get(architecture, LOWEST_LINEAR_BANDWIDTH_GOAL)
