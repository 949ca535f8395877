"""Data: every (kernel, architecture, tile, dtype) of the low-rank adapters."""

from dataclasses import replace

from kernels import fused_lora
from kernels.lora import LORA_ROWS, RANK_MULTIPLE
from kernels.tiles import DENSE_BLOCK, LORA_COLUMNS, LORA_WARPS, MAX_LORA_DOWN_COLUMNS, MIN_GROUPED_ROWS
from kernels.variant import DTYPES, DType, Family, LoopRules, Variant, plain_variant

# values of a rank that a program makes: those of one module of rank 16, of two or three, and of more
DOWN_COLUMNS = tuple(columns for columns in (16, 32, 64) if MIN_GROUPED_ROWS <= columns <= MAX_LORA_DOWN_COLUMNS)


def all_variants(arch: int) -> list[Variant]:
    """Everything for one architecture."""
    downs = [down_variant(arch, columns, dtype) for columns in DOWN_COLUMNS for dtype in DTYPES]
    return [*downs, *(up_variant(arch, dtype) for dtype in DTYPES)]


def sample_variants(arch: int) -> list[Variant]:
    """Both kernels, and each tile once."""
    return [*(down_variant(arch, columns, "bf16") for columns in DOWN_COLUMNS), up_variant(arch, "fp16")]


def down_variant(arch: int, num_columns: int, dtype: DType) -> Variant:
    """From K to the rank."""
    arguments = {
        "x_ptr": f"*{dtype}:16",
        "down_ptr": f"*{dtype}:16",
        **_plan(),
        "parts_ptr": "*fp32:16",
        "num_rows": "i32",
        "num_columns": "i32:16",
        "num_inputs": "i32:16",
        "x_stride": "i32:16",
        "blocks_per_split": "i32",
    }
    # a program of few columns multiplies by the instructions of one warp
    loop = LoopRules("weight", units=num_columns * DENSE_BLOCK / (32 * LORA_WARPS), warp_products=True)
    return _variant("lora_down_kernel", arch, f"{LORA_ROWS}x{num_columns} {dtype}", arguments, num_columns, loop)


def up_variant(arch: int, dtype: DType) -> Variant:
    """From the rank to N. What it reads of weights is little: sixteen a column."""
    integers = ("num_rows", "num_splits", "first_end", "second_end", "num_columns")
    arguments = {
        "parts_ptr": "*fp32:16",
        "up_ptr": f"*{dtype}:16",
        **_plan(),
        "out_ptr": f"*{dtype}:16",
        **dict.fromkeys(integers, "i32"),
        **dict.fromkeys(("num_hidden", "rank", "out_stride"), "i32:16"),
    }
    units = LORA_COLUMNS * RANK_MULTIPLE / (32 * LORA_WARPS)
    loop = LoopRules("weight", units=units, wide_copies=False, warp_products=True)
    return _variant("lora_up_kernel", arch, f"{LORA_ROWS}x{LORA_COLUMNS} {dtype}", arguments, LORA_COLUMNS, loop)


def _plan() -> dict[str, str]:
    return dict.fromkeys(("order_ptr", "tile_adapters_ptr", "tile_rows_ptr"), "*i32:16")


def _variant(
    kernel: str, arch: int, label: str, arguments: dict[str, str], num_columns: int, loop: LoopRules
) -> Variant:
    constants = {
        "TILE_ROWS": LORA_ROWS,
        "TILE_COLUMNS": num_columns,
        "BLOCK": DENSE_BLOCK if kernel == "lora_down_kernel" else RANK_MULTIPLE,
        "INTERPRETED": False,
    }
    return replace(plain_variant(kernel, arch, label, arguments, constants, LORA_WARPS), loop=loop)


FAMILY = Family(
    name="lora",
    kernels={
        "lora_down_kernel": fused_lora.lora_down_kernel,
        "lora_up_kernel": fused_lora.lora_up_kernel,
    },
    all_variants=all_variants,
    sample_variants=sample_variants,
)
