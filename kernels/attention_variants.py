"""Data: every (architecture, shape of heads, dtype) of attention over the paged cache."""

from dataclasses import dataclass
from itertools import product
from typing import Literal

from kernels import paged_attention
from kernels.tiles import (
    COPY_WARPS,
    DECODE_TILE,
    MERGE_WARPS,
    SPAN_TOKENS,
    AttentionTile,
    head_tile,
    prefill_tile,
    row_tile,
)
from kernels.variant import DTYPES, DType, Family, LoopRules, Variant, plain_variant

# tokens that the length of the loop is counted per, on four warps, as the budgets of other kernels are published
COUNTED_KEYS = 64
COUNTED_WARPS = 4


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


def all_variants(arch: int) -> list[Variant]:
    """Everything for one architecture: both dtypes, each shape of heads."""
    return [variant for dtype, shape in product(DTYPES, HEAD_SHAPES) for variant in shape_variants(arch, dtype, shape)]


def sample_variants(arch: int) -> list[Variant]:
    """Every kernel once."""
    return shape_variants(arch, "bf16", HEAD_SHAPES[0])


def shape_variants(arch: int, dtype: DType, shape: HeadShape) -> list[Variant]:
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
        loop=LoopRules(
            f"{COUNTED_KEYS} keys",
            units=tile.num_keys / COUNTED_KEYS * (COUNTED_WARPS / tile.num_warps),
            warp_products=kernel == "decode_kernel",
        ),
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
    return plain_variant("merge_kernel", arch, f"{dtype} {shape.label}", arguments, constants, MERGE_WARPS)


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
    return plain_variant("write_kv_kernel", arch, f"{dtype} {shape.label}", arguments, constants, COPY_WARPS)


FAMILY = Family(
    name="attention",
    kernels={
        "decode_kernel": paged_attention.decode_kernel,
        "merge_kernel": paged_attention.merge_kernel,
        "prefill_kernel": paged_attention.prefill_kernel,
        "write_kv_kernel": paged_attention.write_kv_kernel,
    },
    all_variants=all_variants,
    sample_variants=sample_variants,
)
