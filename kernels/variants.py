"""Data: every (kernel, architecture, tile, dtype, group) that the server may launch, as `compile` builds them."""

from dataclasses import dataclass
from itertools import cycle, product
from typing import Literal

from kernels.layout import PLANAR_GROUP_SIZES
from kernels.tiles import (
    COPY_WARPS,
    DECODE_TILE,
    FEW_ROWS_TILES,
    MANY_ROWS_TILES,
    MERGE_WARPS,
    SPAN_TOKENS,
    SUM_COLUMNS,
    AttentionTile,
    LinearTile,
    head_tile,
    prefill_tile,
    row_tile,
)

KernelName = Literal[
    "gemv_int4_kernel", "sum_parts_kernel", "gemm_int4_kernel", "decode_kernel", "merge_kernel", "prefill_kernel",
    "write_kv_kernel",
]  # fmt: skip
DType = Literal["fp16", "bf16"]
DTYPES: tuple[DType, ...] = ("fp16", "bf16")


@dataclass(frozen=True)
class Variant:
    """One compilation. arguments: each run-time argument's Triton type, with ":16" where it is a multiple of 16.

    constants: the other arguments. required: a pattern for each kind of instruction that the machine code must have.
    """

    kernel: KernelName
    arch: int
    label: str
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | bool | None], ...]
    num_warps: int
    num_stages: int
    required: tuple[str, ...]


@dataclass(frozen=True)
class HeadShape:
    """width: of a head. group: query heads a key head. block_size: tokens a block of the cache."""

    width: int
    group: int
    block_size: int

    @property
    def label(self) -> str:
        return f"D{self.width} group {self.group} block {self.block_size}"


# Llama-like 8B and 70B models, SmolLM2-135M, heads without groups, groups of no power of two, the widest heads; cache
# blocks narrower and wider than a tile of keys
HEAD_SHAPES = (
    HeadShape(128, 4, 64),
    HeadShape(128, 8, 16),
    HeadShape(64, 3, 16),
    HeadShape(128, 1, 16),
    HeadShape(128, 5, 16),
    HeadShape(256, 2, 16),
)

# key heads of the write that is compiled
WRITTEN_HEADS = 8
# what Triton takes when it is not told
PLAIN_STAGES = 3

TENSOR_CORES = r"\b(HMMA|HGMMA|UTC\w*MMA)\b"
WIDE_ASYNC_COPIES = r"\bLDGSTS\S*\.128\b"


def all_variants(arch: int) -> list[Variant]:
    """Everything for one architecture: both dtypes, each group size, each tile."""
    tiles = [*FEW_ROWS_TILES[arch].values()]
    linear = []
    for dtype, group_size in product(DTYPES, PLANAR_GROUP_SIZES):
        for tile, out in product(tiles, ("parts", dtype)):
            linear.append(few_rows_variant(arch, tile, dtype, group_size, is_split=out == "parts"))
        linear.append(many_rows_variant(arch, MANY_ROWS_TILES[arch], dtype, group_size))
    attention = [
        variant for dtype, shape in product(DTYPES, HEAD_SHAPES) for variant in attention_variants(arch, dtype, shape)
    ]
    return [*linear, *(sum_variant(arch, dtype) for dtype in DTYPES), *attention]


def sample_variants(arch: int) -> list[Variant]:
    """What the tests compile: every kernel and every tile once, taking dtypes, groups and outputs in turn."""
    dtypes, groups, splits = cycle(DTYPES), cycle(PLANAR_GROUP_SIZES[::-1]), cycle((True, True, False))
    few_rows = [
        few_rows_variant(arch, tile, next(dtypes), next(groups), is_split=next(splits))
        for tile in FEW_ROWS_TILES[arch].values()
    ]
    many_rows = many_rows_variant(arch, MANY_ROWS_TILES[arch], next(dtypes), next(groups))
    attention = attention_variants(arch, "bf16", HEAD_SHAPES[0])
    return [*few_rows, many_rows, sum_variant(arch, "fp16"), *attention]


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


def _linear_variant(
    kernel: KernelName, arch: int, tile: LinearTile, label: str, own: dict[str, str], dtype: DType, group_size: int
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
        required=(TENSOR_CORES, WIDE_ASYNC_COPIES),
    )


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
    return _plain_variant("sum_parts_kernel", arch, dtype, arguments, {"TILE_COLUMNS": SUM_COLUMNS}, COPY_WARPS)


def attention_variants(arch: int, dtype: DType, shape: HeadShape) -> list[Variant]:
    """Decode, merge, prefill and the write to the cache, for one shape of heads."""
    return [
        _attention_variant("decode_kernel", arch, dtype, shape, DECODE_TILE),
        _merge_variant(arch, dtype, shape),
        _attention_variant("prefill_kernel", arch, dtype, shape, prefill_tile(shape.width, shape.group)),
        _write_variant(arch, dtype, shape),
    ]


def _attention_variant(
    kernel: Literal["decode_kernel", "prefill_kernel"], arch: int, dtype: DType, shape: HeadShape, tile: AttentionTile
) -> Variant:
    half = f"*{dtype}:16"
    parts = {"totals_ptr": "*fp32:16", "stats_ptr": "*fp32:16", "num_spans": "i32"}
    arguments = {
        "query_ptr": half,
        "keys_ptr": half,
        "values_ptr": half,
        "query_starts_ptr": "*i32:16",
        "context_lens_ptr": "*i32:16",
        "tables_ptr": "*i32:16",
        "token_stride": "i32:16",
        "head_stride": "i32:16",
        "table_stride": "i32",
        "block_stride": "i32:16",
        "exponent_scale": "fp32",
        "sliding_window": "i32",
        **(parts if kernel == "decode_kernel" else {"out_ptr": half}),
    }
    constants: dict[str, int | bool | None] = {
        "GROUP": shape.group,
        "BLOCK_SIZE": shape.block_size,
        "HEAD_WIDTH": shape.width,
        "TILE_WIDTH": head_tile(shape.width),
        "TILE_ROWS": row_tile(tile, shape.group),
        "TILE_KEYS": tile.num_keys,
        "INTERPRETED": False,
        **({"SPAN": SPAN_TOKENS} if kernel == "decode_kernel" else {}),
    }
    return Variant(
        kernel=kernel,
        arch=arch,
        label=f"{dtype} {shape.label}",
        arguments=tuple(arguments.items()),
        constants=tuple(constants.items()),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        required=(TENSOR_CORES, WIDE_ASYNC_COPIES),
    )


def _merge_variant(arch: int, dtype: DType, shape: HeadShape) -> Variant:
    arguments = {
        "totals_ptr": "*fp32:16",
        "stats_ptr": "*fp32:16",
        "query_starts_ptr": "*i32:16",
        "context_lens_ptr": "*i32:16",
        "out_ptr": f"*{dtype}:16",
        "num_spans": "i32",
        "exponent_scale": "fp32",
        "sliding_window": "i32",
    }
    constants = {"SPAN": SPAN_TOKENS, "HEAD_WIDTH": shape.width, "TILE_WIDTH": head_tile(shape.width)}
    return _plain_variant("merge_kernel", arch, f"{dtype} {shape.label}", arguments, constants, MERGE_WARPS)


def _write_variant(arch: int, dtype: DType, shape: HeadShape) -> Variant:
    half = f"*{dtype}:16"
    arguments = {
        "new_keys_ptr": half,
        "new_values_ptr": half,
        "keys_ptr": half,
        "values_ptr": half,
        "slots_ptr": "*i64:16",
        "key_stride": "i32:16",
        "value_stride": "i32:16",
        "block_stride": "i32:16",
    }
    constants = {
        "NUM_HEADS": WRITTEN_HEADS,
        "BLOCK_SIZE": shape.block_size,
        "HEAD_WIDTH": shape.width,
        "TILE_HEADS": WRITTEN_HEADS,
        "TILE_WIDTH": head_tile(shape.width),
    }
    return _plain_variant("write_kv_kernel", arch, f"{dtype} {shape.label}", arguments, constants, COPY_WARPS)


def _plain_variant(
    kernel: KernelName, arch: int, label: str, arguments: dict[str, str], constants: dict[str, int], num_warps: int
) -> Variant:
    """A kernel without a dot: nothing to pipeline, no instructions that it must have."""
    return Variant(
        kernel=kernel,
        arch=arch,
        label=label,
        arguments=tuple(arguments.items()),
        constants=tuple(constants.items()),
        num_warps=num_warps,
        num_stages=PLAIN_STAGES,
        required=(),
    )
