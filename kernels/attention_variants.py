"""Data: every (architecture, shape of heads, dtype) of attention over the paged cache."""

from dataclasses import dataclass
from itertools import product
from typing import Literal

from kernels import decode_attention, prefill_attention, write_kv
from kernels.attention_operands import FP8_ARCH
from kernels.kv_words import CODE_UNITS, Codes
from kernels.tiles import (
    COPY_WARPS,
    MERGE_WARPS,
    SPAN_TOKENS,
    AttentionTile,
    decode_tile,
    head_tile,
    prefill_tile,
    row_tile,
)
from kernels.variant import DTYPES, DType, Family, LoopRules, Variant, plain_variant

Arguments = dict[str, str]
Constants = dict[str, int | bool | str | None]

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


# Llama-like 8B and 70B models, SmolLM2-135M, heads without groups, groups of no power of two, heads of no power of
# two (Phi), the widest heads; cache blocks narrower and wider than a tile of keys
LLAMA_8B = HeadShape(128, 4, 64)
HEAD_SHAPES = (
    LLAMA_8B,
    HeadShape(128, 8, 16),
    HeadShape(64, 3, 16),
    HeadShape(64, 8, 64),
    HeadShape(80, 1, 64),
    HeadShape(96, 1, 64),
    HeadShape(128, 1, 64),
    HeadShape(128, 5, 16),
    HeadShape(256, 2, 64),
)

# instructions of a decode program for a span that its sequence does not reach. Where the tensor cores have a memory of
# their own, it is asked for first
_MAX_IDLE, _MAX_IDLE_BLACKWELL = 48, 128
BLACKWELL_ARCH = 100

# key heads of the write that is compiled
WRITTEN_HEADS = 8


@dataclass(frozen=True)
class Use:
    """What a launch is for. dtype: of the model. codes: of the cache, None where it has the model's dtype.

    is_capped: with a soft cap. has_sinks: with learned sinks.
    """

    dtype: DType
    codes: Codes | None = None
    is_capped: bool = False
    has_sinks: bool = False

    @property
    def label(self) -> str:
        extras = [self.codes, "cap" if self.is_capped else None, "sinks" if self.has_sinks else None]
        return " ".join([self.dtype, *(extra for extra in extras if extra)])


def all_variants(arch: int) -> list[Variant]:
    """Everything for one architecture: each shape of heads with both dtypes, and with both codes of the cache.

    Caps and sinks, whose code is the same whatever the shape, with the shapes of the models that have them.
    """
    uses = (*map(Use, DTYPES), Use("bf16", "int8"), Use("fp16", _fp8(arch)))
    plain = [variant for use, shape in product(uses, HEAD_SHAPES) for variant in shape_variants(arch, use, shape)]
    special = [
        variant
        for codes in (None, "int8")
        for variant in (
            *shape_variants(arch, Use("bf16", codes, is_capped=True), HeadShape(256, 2, 64)),
            *shape_variants(arch, Use("bf16", codes, has_sinks=True), HeadShape(64, 8, 64)),
        )
        if variant.kernel != "write_kv_kernel"
    ]
    return _unique([*plain, *special])


def sample_variants(arch: int) -> list[Variant]:
    """Every kernel and every tile once, and those that read codes with one kind of them each."""
    tiles = {
        (decode_tile(shape.width), prefill_tile(arch, shape.width, shape.group)): shape
        for shape in reversed(HEAD_SHAPES)
    }
    return [
        *(variant for shape in reversed(tiles.values()) for variant in shape_variants(arch, Use("bf16"), shape)),
        decode_variant(arch, Use("bf16", "int8"), LLAMA_8B),
        decode_variant(arch, Use("fp16", _fp8(arch)), LLAMA_8B),
        prefill_variant(arch, Use("bf16", "int8"), LLAMA_8B),
        _write_variant(arch, Use("fp16", _fp8(arch)), LLAMA_8B),
    ]


def shape_variants(arch: int, use: Use, shape: HeadShape) -> list[Variant]:
    """Decode, merge, prefill and the write to the cache, for one shape of heads."""
    return [
        decode_variant(arch, use, shape),
        _merge_variant(arch, use, shape),
        prefill_variant(arch, use, shape),
        _write_variant(arch, use, shape),
    ]


def decode_variant(arch: int, use: Use, shape: HeadShape) -> Variant:
    """Decode, as `decode_attention.decode` launches it."""
    own = {"totals_ptr": "*fp32:16", "stats_ptr": "*fp32:16", "num_spans": "i32"}
    tile = decode_tile(shape.width)
    return _attention_variant("decode_kernel", arch, use, shape, tile, own, {"SPAN": SPAN_TOKENS})


def prefill_variant(arch: int, use: Use, shape: HeadShape) -> Variant:
    """Prefill, as `prefill_attention.prefill` launches it."""
    own = {"out_ptr": f"*{use.dtype}:16"}
    sinks: Constants = {}
    if use.has_sinks:
        own["sinks_ptr"] = f"*{use.dtype}:16"
    else:
        sinks["sinks_ptr"] = None
    return _attention_variant(
        "prefill_kernel", arch, use, shape, prefill_tile(arch, shape.width, shape.group), own, sinks
    )


def _attention_variant(
    kernel: Literal["decode_kernel", "prefill_kernel"],
    arch: int,
    use: Use,
    shape: HeadShape,
    tile: AttentionTile,
    own_arguments: Arguments,
    own_constants: Constants,
) -> Variant:
    arguments = {
        "query_ptr": f"*{use.dtype}:16",
        **_cache_arguments(f"*{use.dtype}:16" if use.codes is None else "*i16:16", use.codes),
        "query_starts_ptr": "*i32:16",
        "context_lens_ptr": "*i32:16",
        "tables_ptr": "*i32:16",
        "token_stride": "i32:16",
        "head_stride": "i32:16",
        "table_stride": "i32",
        "score_scale": "fp32",
        **({"soft_cap": "fp32"} if use.is_capped else {}),
        "sliding_window": "i32",
        **own_arguments,
    }
    constants: Constants = {
        **_cache_constants(use.codes),
        **({} if use.is_capped else {"soft_cap": None}),
        "GROUP": shape.group,
        "BLOCK_SIZE": shape.block_size,
        "HEAD_WIDTH": shape.width,
        "TILE_WIDTH": head_tile(shape.width),
        "TILE_ROWS": row_tile(tile, shape.group),
        "TILE_KEYS": tile.num_keys,
        "CODES": use.codes,
        "CODE_UNIT": CODE_UNITS[use.codes],
        "INTERPRETED": False,
        **own_constants,
    }
    return Variant(
        kernel=kernel,
        arch=arch,
        label=f"{use.label} {shape.label}",
        arguments=tuple(arguments.items()),
        constants=tuple(constants.items()),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=tile.max_registers,
        loop=_loop_rules(tile, warp_products=kernel == "decode_kernel", max_idle=_max_idle(kernel, arch)),
    )


def _merge_variant(arch: int, use: Use, shape: HeadShape) -> Variant:
    arguments = {
        "totals_ptr": "*fp32:16",
        "stats_ptr": "*fp32:16",
        **({"sinks_ptr": f"*{use.dtype}:16"} if use.has_sinks else {}),
        "query_starts_ptr": "*i32:16",
        "context_lens_ptr": "*i32:16",
        "out_ptr": f"*{use.dtype}:16",
        "num_spans": "i32",
        "sliding_window": "i32",
    }
    constants: Constants = {
        **({} if use.has_sinks else {"sinks_ptr": None}),
        "SPAN": SPAN_TOKENS,
        "HEAD_WIDTH": shape.width,
        "TILE_WIDTH": head_tile(shape.width),
    }
    # the same kernel whatever the cache holds and however scores were capped
    label = Use(use.dtype, has_sinks=use.has_sinks).label
    return plain_variant("merge_kernel", arch, f"{label} D{shape.width}", arguments, constants, MERGE_WARPS)


def _write_variant(arch: int, use: Use, shape: HeadShape) -> Variant:
    new = f"*{use.dtype}:16"
    # every architecture encodes e4m3 alike
    codes = "fp8" if use.codes == "fp8_native" else use.codes
    arguments = {
        "new_keys_ptr": new,
        "new_values_ptr": new,
        **_cache_arguments(new if codes is None else "*u8:16", codes),
        "slots_ptr": "*i64:16",
        "key_stride": "i32:16",
        "value_stride": "i32:16",
    }
    constants: Constants = {
        **_cache_constants(codes),
        "NUM_HEADS": WRITTEN_HEADS,
        "BLOCK_SIZE": shape.block_size,
        "HEAD_WIDTH": shape.width,
        "TILE_HEADS": WRITTEN_HEADS,
        "TILE_WIDTH": head_tile(shape.width),
        "CODES": codes,
    }
    label = f"{Use(use.dtype, codes).label} D{shape.width} block {shape.block_size}"
    return plain_variant("write_kv_kernel", arch, label, arguments, constants, COPY_WARPS)


def _loop_rules(tile: AttentionTile, *, warp_products: bool, max_idle: int | None) -> LoopRules:
    units = tile.num_keys / COUNTED_KEYS * (COUNTED_WARPS / tile.num_warps)
    unit = f"{COUNTED_KEYS} keys"
    return LoopRules(unit, units=units, warp_products=warp_products, has_edges=True, max_idle=max_idle)


def _max_idle(kernel: str, arch: int) -> int | None:
    """A recorded launch of decode is for longer contexts than most sequences have."""
    if kernel != "decode_kernel":
        return None
    return _MAX_IDLE_BLACKWELL if arch == BLACKWELL_ARCH else _MAX_IDLE


def _cache_arguments(cached: str, codes: Codes | None) -> Arguments:
    scales = {} if codes is None else {"key_scales_ptr": "*fp32:16", "value_scales_ptr": "*fp32:16"}
    return {"keys_ptr": cached, "values_ptr": cached, **scales}


def _cache_constants(codes: Codes | None) -> Constants:
    return {"key_scales_ptr": None, "value_scales_ptr": None} if codes is None else {}


def _fp8(arch: int) -> Codes:
    return "fp8_native" if arch >= FP8_ARCH else "fp8"


def _unique(variants: list[Variant]) -> list[Variant]:
    return list({variant.name: variant for variant in variants}.values())


FAMILY = Family(
    name="attention",
    kernels={
        "decode_kernel": decode_attention.decode_kernel,
        "merge_kernel": decode_attention.merge_kernel,
        "prefill_kernel": prefill_attention.prefill_kernel,
        "write_kv_kernel": write_kv.write_kv_kernel,
    },
    all_variants=all_variants,
    sample_variants=sample_variants,
)
