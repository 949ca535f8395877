"""Data: every (architecture, tile, dtype, group) of the INT4 linear layers."""

from itertools import cycle, product

from kernels import gemm_int4, gemv_int4
from kernels.layout import PLANAR_BLOCK, PLANAR_GROUP_SIZES
from kernels.tiles import COPY_WARPS, FEW_ROWS_TILES, MANY_ROWS_TILES, SUM_COLUMNS, LinearTile
from kernels.variant import DTYPES, DType, Family, LoopRules, Variant, plain_variant


def all_variants(arch: int) -> list[Variant]:
    """Everything for one architecture: both dtypes, each group size, each tile."""
    variants = []
    for dtype, group_size in product(DTYPES, PLANAR_GROUP_SIZES):
        for tile, out in product(FEW_ROWS_TILES[arch].values(), ("parts", dtype)):
            variants.append(few_rows_variant(arch, tile, dtype, group_size, is_split=out == "parts"))
        variants.append(many_rows_variant(arch, MANY_ROWS_TILES[arch], dtype, group_size))
    return [*variants, *(sum_variant(arch, dtype) for dtype in DTYPES)]


def sample_variants(arch: int) -> list[Variant]:
    """Every kernel and every tile once, taking dtypes, groups and outputs in turn."""
    dtypes, groups, splits = cycle(DTYPES), cycle(PLANAR_GROUP_SIZES[::-1]), cycle((True, True, False))
    few_rows = [
        few_rows_variant(arch, tile, next(dtypes), next(groups), is_split=next(splits))
        for tile in FEW_ROWS_TILES[arch].values()
    ]
    many_rows = many_rows_variant(arch, MANY_ROWS_TILES[arch], next(dtypes), next(groups))
    return [*few_rows, many_rows, sum_variant(arch, "fp16")]


def few_rows_variant(arch: int, tile: LinearTile, dtype: DType, group_size: int, *, is_split: bool) -> Variant:
    """The few-row kernel, writing float32 parts or the answer with its bias."""
    out = "*fp32:16" if is_split else f"*{dtype}:16"
    bias = {} if is_split else {"bias_ptr": f"*{dtype}:16"}
    label = f"{dtype} g{group_size} {'parts' if is_split else 'direct'}"
    return _linear_variant("gemv_int4_kernel", arch, tile, label, {"out_ptr": out, **bias}, dtype, group_size)


def many_rows_variant(arch: int, tile: LinearTile, dtype: DType, group_size: int) -> Variant:
    """The many-row kernel, without bias."""
    own = {"out_ptr": f"*{dtype}:16", "num_splits": "i32"}
    return _linear_variant("gemm_int4_kernel", arch, tile, f"{dtype} g{group_size}", own, dtype, group_size)


def sum_variant(arch: int, dtype: DType) -> Variant:
    """The ordered sum over splits, with bias."""
    arguments = {
        "parts_ptr": "*fp32:16",
        "bias_ptr": f"*{dtype}:16",
        "out_ptr": f"*{dtype}:16",
        "num_rows": "i32",
        "num_columns": "i32:16",
        "num_splits": "i32",
    }
    return plain_variant("sum_parts_kernel", arch, dtype, arguments, {"TILE_COLUMNS": SUM_COLUMNS}, COPY_WARPS)


def _linear_variant(
    kernel: str, arch: int, tile: LinearTile, label: str, own: dict[str, str], dtype: DType, group_size: int
) -> Variant:
    arguments = {
        "x_ptr": f"*{dtype}:16",
        "words_ptr": "*i16:16",
        "scales_ptr": "*fp16:16",
        "zeros_ptr": "*i16:16",
        "num_rows": "i32",
        "num_columns": "i32:16",
        "num_inputs": "i32:16",
        "x_stride": "i32:16",
        "weight_stride": "i32:16",
        **own,
    }
    constants: dict[str, int | bool | None] = {
        **({} if "bias_ptr" in own else {"bias_ptr": None}),
        "GROUP_SIZE": group_size,
        "TILE_ROWS": tile.num_rows,
        "TILE_COLUMNS": tile.num_columns,
        "INTERPRETED": False,
    }
    return Variant(
        kernel=kernel,
        arch=arch,
        label=f"{tile.num_rows}x{tile.num_columns} {label}",
        arguments=tuple(arguments.items()),
        constants=tuple(constants.items()),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        loop=LoopRules("weight", units=tile.num_columns * PLANAR_BLOCK / (32 * tile.num_warps)),
    )


FAMILY = Family(
    name="linear",
    kernels={
        "gemv_int4_kernel": gemv_int4.gemv_int4_kernel,
        "sum_parts_kernel": gemv_int4.sum_parts_kernel,
        "gemm_int4_kernel": gemm_int4.gemm_int4_kernel,
    },
    all_variants=all_variants,
    sample_variants=sample_variants,
)
