"""Data: every (architecture, tile, dtype, bits, group, dtype of the scales) of the INT4 linear layers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, product

from kernels import dequantize_int4, gemm_int4, gemv_int4, grouped_dense, grouped_int4
from kernels.layout import PLANAR_BLOCKS, PLANAR_GROUP_SIZES
from kernels.tiles import (
    COPY_WARPS,
    DENSE_BLOCK,
    DEQUANTIZING_WARPS,
    FEW_ROWS_MAX_REGISTERS,
    FEW_ROWS_TILES,
    MAX_REGISTERS,
    MIN_GROUPED_ROWS,
    SUM_COLUMNS,
    LinearTile,
    few_rows_tile,
    grouped_dense_tile,
    grouped_tile,
    many_rows_tile,
)
from kernels.variant import DTYPES, DType, Family, LoopRules, Variant, plain_variant


@dataclass(frozen=True)
class Weights:
    """What of its operands a kernel is compiled for. dtype: of the activations. bits: stored. scales: their dtype."""

    dtype: DType
    bits: int
    group_size: int
    scales: DType

    @property
    def label(self) -> str:
        scales = "" if self.scales == "fp16" else f" {self.scales} scales"
        return f"{self.dtype} int{self.bits} g{self.group_size}{scales}"


# bf16 scales are those of models in bf16 that another tool quantized
WEIGHTS = (
    *(Weights(dtype, 4, group_size, "fp16") for dtype, group_size in product(DTYPES, PLANAR_GROUP_SIZES[4])),
    *(Weights("bf16", 4, group_size, "bf16") for group_size in (64, 128)),
    *(Weights(dtype, 8, 64, dtype) for dtype in DTYPES),
)
SAMPLED_WEIGHTS = (WEIGHTS[2], WEIGHTS[4], WEIGHTS[0], WEIGHTS[7], WEIGHTS[8])


def all_variants(arch: int) -> list[Variant]:
    """Everything for one architecture: each kind of weights with each tile."""
    variants = []
    for weights in WEIGHTS:
        for bucket in FEW_ROWS_TILES[arch]:
            tile = few_rows_tile(arch, bucket, weights.group_size)
            variants += [few_rows_variant(arch, tile, weights, is_split=is_split) for is_split in (True, False)]
        variants.append(many_rows_variant(arch, many_rows_tile(arch, weights.group_size), weights))
    for bucket in FEW_ROWS_TILES[arch]:
        if bucket >= MIN_GROUPED_ROWS:
            tiles = [(grouped_tile(arch, bucket, weights.group_size), weights) for weights in WEIGHTS]
            variants += [grouped_variant(arch, tile, weights) for tile, weights in tiles]
            variants += [grouped_dense_variant(arch, grouped_dense_tile(arch, bucket), dtype) for dtype in DTYPES]
    variants += [dense_variant(arch, weights) for weights in WEIGHTS]
    variants += [kind(arch, dtype) for kind in (sum_variant, choices_variant) for dtype in DTYPES]
    # two buckets of rows may share a tile
    return list(dict.fromkeys(variants))


def sample_variants(arch: int) -> list[Variant]:
    """Every kernel and every tile once, taking kinds of weights and outputs in turn."""
    weights, splits = cycle(SAMPLED_WEIGHTS), cycle((True, True, False))
    sampled = [
        (few_rows_tile(arch, bucket, kind.group_size), kind)
        for bucket, kind in zip(FEW_ROWS_TILES[arch], weights, strict=False)
    ]
    of_any = [pair for bucket in FEW_ROWS_TILES[arch] for pair in _each_once(partial(few_rows_tile, arch, bucket))]
    few_rows = {**dict(of_any), **dict(sampled)}
    buckets = [bucket for bucket in FEW_ROWS_TILES[arch] if bucket >= MIN_GROUPED_ROWS]
    return [
        *(few_rows_variant(arch, tile, kind, is_split=next(splits)) for tile, kind in few_rows.items()),
        *(many_rows_variant(arch, tile, kind) for tile, kind in _each_once(partial(many_rows_tile, arch))),
        *(
            grouped_variant(arch, tile, kind)
            for bucket in buckets
            for tile, kind in _each_once(partial(grouped_tile, arch, bucket))
        ),
        *(grouped_dense_variant(arch, grouped_dense_tile(arch, bucket), "bf16") for bucket in buckets),
        dense_variant(arch, next(weights)),
        sum_variant(arch, "fp16"),
        choices_variant(arch, "bf16"),
    ]


def _each_once(tile_of: Callable[[int], LinearTile]) -> list[tuple[LinearTile, Weights]]:
    """The tiles that it gives for the group sizes, each with the first kind of weights that takes it."""
    kinds: dict[LinearTile, Weights] = {}
    for weights in WEIGHTS:
        kinds.setdefault(tile_of(weights.group_size), weights)
    return list(kinds.items())


def few_rows_variant(arch: int, tile: LinearTile, weights: Weights, *, is_split: bool) -> Variant:
    """The few-row kernel, writing float32 parts or the answer with its bias."""
    out = "*fp32:16" if is_split else f"*{weights.dtype}:16"
    bias = {} if is_split else {"bias_ptr": f"*{weights.dtype}:16"}
    label = "parts" if is_split else "direct"
    variant = _linear_variant("gemv_int4_kernel", arch, tile, weights, {"out_ptr": out, **bias}, label)
    return replace(variant, max_registers=FEW_ROWS_MAX_REGISTERS.get((arch, weights.group_size, tile.num_rows)))


def many_rows_variant(arch: int, tile: LinearTile, weights: Weights) -> Variant:
    """The many-row kernel, without bias."""
    own = {"out_ptr": f"*{weights.dtype}:16", "num_splits": "i32"}
    variant = _linear_variant("gemm_int4_kernel", arch, tile, weights, own, "direct")
    return replace(variant, max_registers=MAX_REGISTERS.get(arch))


def grouped_variant(arch: int, tile: LinearTile, weights: Weights) -> Variant:
    """The kernel over experts."""
    own = {
        "order_ptr": "*i32:16",
        "tile_experts_ptr": "*i32:16",
        "tile_rows_ptr": "*i32:16",
        "out_ptr": f"*{weights.dtype}:16",
        "words_stride": "i32:16",
        "pairs_stride": "i32:16",
        "num_splits": "i32",
        "x_repeats": "i32",
    }
    variant = _linear_variant("grouped_int4_kernel", arch, tile, weights, own, "experts")
    return replace(variant, max_registers=MAX_REGISTERS.get(arch))


def grouped_dense_variant(arch: int, tile: LinearTile, dtype: DType) -> Variant:
    """The kernel over experts that are not quantized."""
    half = f"*{dtype}:16"
    arguments = {
        "x_ptr": half,
        "weight_ptr": half,
        "order_ptr": "*i32:16",
        "tile_experts_ptr": "*i32:16",
        "tile_rows_ptr": "*i32:16",
        "out_ptr": half,
        "num_columns": "i32:16",
        "num_inputs": "i32:16",
        "x_stride": "i32:16",
        "x_repeats": "i32",
    }
    constants = {
        "TILE_ROWS": tile.num_rows,
        "TILE_COLUMNS": tile.num_columns,
        "BLOCK": DENSE_BLOCK,
        "INTERPRETED": False,
    }
    return Variant(
        kernel="grouped_dense_kernel",
        arch=arch,
        label=f"{tile.num_rows}x{tile.num_columns} {dtype}",
        arguments=tuple(arguments.items()),
        constants=tuple(constants.items()),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        loop=LoopRules("weight", units=tile.num_columns * DENSE_BLOCK / (32 * tile.num_warps)),
    )


def dense_variant(arch: int, weights: Weights) -> Variant:
    """The kernel that dequantizes."""
    arguments = {
        "words_ptr": "*i16:16",
        "pairs_ptr": "*i32:16",
        "out_ptr": f"*{weights.dtype}:16",
        "num_columns": "i32",
        "num_inputs": "i32:16",
        "num_blocks": "i32",
    }
    constants = {
        "BITS": weights.bits,
        "GROUP_SIZE": weights.group_size,
        "SCALES_ARE_BF16": weights.scales == "bf16",
        "INTERPRETED": False,
    }
    return plain_variant("dequantize_int4_kernel", arch, weights.label, arguments, constants, DEQUANTIZING_WARPS)


def choices_variant(arch: int, dtype: DType) -> Variant:
    """The ordered sum over a token's experts."""
    half = f"*{dtype}:16"
    arguments = {
        "choices_ptr": half,
        "router_ptr": "*fp32:16",
        "out_ptr": half,
        "num_columns": "i32:16",
        "num_choices": "i32",
    }
    return plain_variant("sum_choices_kernel", arch, dtype, arguments, {"TILE_COLUMNS": SUM_COLUMNS}, COPY_WARPS)


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
    kernel: str, arch: int, tile: LinearTile, weights: Weights, own: dict[str, str], label: str
) -> Variant:
    has_bias_argument = kernel != "grouped_int4_kernel"
    arguments = {
        "x_ptr": f"*{weights.dtype}:16",
        "words_ptr": "*i16:16",
        "pairs_ptr": "*i32:16",
        **({"num_rows": "i32"} if has_bias_argument else {}),
        "num_columns": "i32:16",
        "num_blocks": "i32",
        "x_stride": "i32:16",
        **own,
    }
    constants: dict[str, int | bool | None] = {
        **({"bias_ptr": None} if has_bias_argument and "bias_ptr" not in own else {}),
        "BITS": weights.bits,
        "GROUP_SIZE": weights.group_size,
        "SCALES_ARE_BF16": weights.scales == "bf16",
        "TILE_ROWS": tile.num_rows,
        "TILE_COLUMNS": tile.num_columns,
        "INTERPRETED": False,
    }
    return Variant(
        kernel=kernel,
        arch=arch,
        label=f"{tile.num_rows}x{tile.num_columns} {weights.label} {label}",
        arguments=tuple(arguments.items()),
        constants=tuple(constants.items()),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        loop=LoopRules("weight", units=tile.num_columns * PLANAR_BLOCKS[weights.bits] / (32 * tile.num_warps)),
    )


FAMILY = Family(
    name="linear",
    kernels={
        "gemv_int4_kernel": gemv_int4.gemv_int4_kernel,
        "sum_parts_kernel": gemv_int4.sum_parts_kernel,
        "gemm_int4_kernel": gemm_int4.gemm_int4_kernel,
        "dequantize_int4_kernel": dequantize_int4.dequantize_int4_kernel,
        "grouped_int4_kernel": grouped_int4.grouped_int4_kernel,
        "grouped_dense_kernel": grouped_dense.grouped_dense_kernel,
        "sum_choices_kernel": grouped_int4.sum_choices_kernel,
    },
    all_variants=all_variants,
    sample_variants=sample_variants,
)
