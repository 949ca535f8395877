"""Data: every (kernel, architecture, shape, dtype) of the operations between the products of a layer."""

from dataclasses import dataclass
from itertools import product

from kernels import fused_activation, fused_embedding, fused_norm, fused_rotary, fused_routing
from kernels.tiles import (
    COPY_WARPS,
    GATE_COLUMNS,
    GATHERED_COLUMNS,
    MAX_FEW_ROWS,
    MIN_GROUPED_ROWS,
    PLANNED_TILES,
    ROUTING_WARPS,
    SORTED_ASSIGNMENTS,
    head_tile,
    next_power_of_two,
    row_warps,
)
from kernels.variant import DTYPES, DType, Family, Variant, plain_variant

# hidden sizes of SmolLM2-135M, Qwen2-0.5B and 1.5B, Llama-3 8B and 70B, and the widest row there may be
NORM_WIDTHS = (576, 896, 1536, 4096, 8192, 32_768)


# experts, and choices of a token, of Mixtral, Qwen1.5-MoE and Qwen3-30B-A3B
ROUTINGS = ((8, 2), (60, 4), (128, 8))


@dataclass(frozen=True)
class RotaryShape:
    """width: of a head, of which rotary_width elements turn. group: query heads a key head.

    has_wide_norms: whether the weights of its norms are float32, as they are where a model multiplies by 1 + w.
    """

    width: int
    rotary_width: int
    group: int
    block_size: int
    has_norms: bool = False
    has_wide_norms: bool = False

    @property
    def label(self) -> str:
        norms = " float32 norms" if self.has_wide_norms else " norms" if self.has_norms else ""
        return f"D{self.width} R{self.rotary_width} group {self.group} block {self.block_size}{norms}"


# Llama-like 8B models, Qwen3, SmolLM2-135M, a model that turns a part of its heads, many queries a key head, wide heads
ROTARY_SHAPES = (
    RotaryShape(128, 128, 4, 64),
    RotaryShape(128, 128, 4, 16, has_norms=True),
    RotaryShape(64, 64, 3, 16),
    RotaryShape(80, 32, 1, 16),
    RotaryShape(128, 128, 16, 16),
    RotaryShape(256, 256, 2, 16, has_norms=True),
    RotaryShape(256, 256, 2, 16, has_norms=True, has_wide_norms=True),
)


def all_variants(arch: int) -> list[Variant]:
    """Everything for one architecture: both dtypes, each width and shape of heads."""
    of_dtypes = [variant for dtype in DTYPES for variant in _dtype_variants(arch, dtype, NORM_WIDTHS, ROTARY_SHAPES)]
    routes = [
        _route_variant(arch, dtype, *routing, renormalized=renormalized)
        for dtype, routing, renormalized in product(DTYPES, ROUTINGS, (False, True))
    ]
    sorts = [
        _sort_variant(arch, num_experts, rows)
        for (num_experts, _), rows in product(ROUTINGS, (MIN_GROUPED_ROWS, 2 * MIN_GROUPED_ROWS, MAX_FEW_ROWS))
    ]
    return [*of_dtypes, *routes, *sorts]


def sample_variants(arch: int) -> list[Variant]:
    """Every kernel once, with and without what is optional."""
    of_dtype = _dtype_variants(arch, "bf16", NORM_WIDTHS[3:4], ROTARY_SHAPES[1:2])
    num_experts, num_choices = ROUTINGS[-1]
    route = _route_variant(arch, "bf16", num_experts, num_choices, renormalized=True)
    return [*of_dtype, route, _sort_variant(arch, num_experts, MIN_GROUPED_ROWS)]


def _dtype_variants(arch: int, dtype: DType, widths: tuple[int, ...], shapes: tuple[RotaryShape, ...]) -> list[Variant]:
    gates = [_gate_variant(kernel, arch, dtype) for kernel in ("silu_gate_kernel", "gelu_gate_kernel")]
    gathers = [_gather_variant(arch, dtype, table) for table in (dtype, "i8")]
    norms = [
        _norm_variant(arch, dtype, width, weight, with_residual=added)
        for width, weight, added in product(widths, (dtype, "fp32"), (False, True))
    ]
    return [*norms, *gates, *gathers, *(_rotary_variant(arch, dtype, shape) for shape in shapes)]


def _norm_variant(arch: int, dtype: DType, width: int, weight: str, *, with_residual: bool) -> Variant:
    """weight: its dtype, float32 where a model multiplies by 1 + w."""
    half = f"*{dtype}:16"
    arguments = {
        "x_ptr": half,
        "weight_ptr": f"*{weight}:16",
        "normed_ptr": half,
        "x_stride": "i32:16",
        "residual_stride": "i32:16",
        "epsilon": "fp32",
        **({"residual_ptr": half, "total_ptr": half} if with_residual else {}),
    }
    constants = {
        **({} if with_residual else {"residual_ptr": None, "total_ptr": None}),
        "WIDTH": width,
        "TILE_WIDTH": next_power_of_two(width),
    }
    weights = "" if weight == dtype else f" {weight} weight"
    label = f"{dtype} {width}{weights}{' residual' if with_residual else ''}"
    return plain_variant("rms_norm_kernel", arch, label, arguments, constants, row_warps(width))


def _gate_variant(kernel: str, arch: int, dtype: DType) -> Variant:
    half = f"*{dtype}:16"
    arguments = {"gate_up_ptr": half, "out_ptr": half, "gate_up_stride": "i32:16", "num_columns": "i32:16"}
    return plain_variant(kernel, arch, dtype, arguments, {"TILE_COLUMNS": GATE_COLUMNS}, COPY_WARPS)


def _gather_variant(arch: int, dtype: DType, table: str) -> Variant:
    is_quantized = table != dtype
    arguments = {
        "token_ids_ptr": "*i64:16",
        "table_ptr": f"*{table}:16",
        "out_ptr": f"*{dtype}:16",
        "table_stride": "i32:16",
        "num_table_rows": "i32",
        "num_columns": "i32:16",
        **({"scales_ptr": f"*{dtype}:16"} if is_quantized else {}),
    }
    constants = {**({} if is_quantized else {"scales_ptr": None}), "TILE_COLUMNS": GATHERED_COLUMNS}
    label = f"{dtype}{' from int8' if is_quantized else ''}"
    return plain_variant("gather_rows_kernel", arch, label, arguments, constants, COPY_WARPS)


def _route_variant(arch: int, dtype: DType, num_experts: int, num_choices: int, *, renormalized: bool) -> Variant:
    arguments = {
        "logits_ptr": f"*{dtype}:16",
        "experts_ptr": "*i64:16",
        "weights_ptr": "*fp32:16",
        "logits_stride": "i32",
        "num_experts": "i32",
    }
    constants = {
        "NUM_CHOICES": num_choices,
        "RENORMALIZED": renormalized,
        "TILE_EXPERTS": next_power_of_two(num_experts),
        "TILE_CHOICES": next_power_of_two(num_choices),
    }
    label = f"{dtype} {num_choices} of {num_experts}{' renormalized' if renormalized else ''}"
    return plain_variant("route_kernel", arch, label, arguments, constants, 1)


def _sort_variant(arch: int, num_experts: int, max_tile_rows: int) -> Variant:
    arguments = {
        "experts_ptr": "*i64:16",
        "order_ptr": "*i32:16",
        "tile_experts_ptr": "*i32:16",
        "tile_rows_ptr": "*i32:16",
        "num_assignments": "i32",
        "num_experts": "i32",
        "num_tiles": "i32",
    }
    constants = {
        "MAX_TILE_ROWS": max_tile_rows,
        "TILE_EXPERTS": next_power_of_two(num_experts),
        "TILE_ASSIGNMENTS": SORTED_ASSIGNMENTS,
        "TILE_PLANNED": PLANNED_TILES,
    }
    label = f"{num_experts} experts, {max_tile_rows} rows"
    return plain_variant("sort_assignments_kernel", arch, label, arguments, constants, ROUTING_WARPS)


def _rotary_variant(arch: int, dtype: DType, shape: RotaryShape) -> Variant:
    half = f"*{dtype}:16"
    names = ("heads", "cosines", "signed_sines", "queries", "keys", "values")
    weights = ("query_weight_ptr", "key_weight_ptr")
    arguments = {
        **{f"{name}_ptr": half for name in names},
        **(dict.fromkeys(weights, "*fp32:16" if shape.has_wide_norms else half) if shape.has_norms else {}),
        "slots_ptr": "*i64:16",
        "token_stride": "i32:16",
        "rotation_stride": "i32:16",
        "block_stride": "i32:16",
        "epsilon": "fp32",
    }
    constants: dict[str, int | bool | str | None] = {
        **({} if shape.has_norms else dict.fromkeys(weights)),
        **dict.fromkeys(("key_scales_ptr", "value_scales_ptr", "CODES")),
        "GROUP": shape.group,
        "BLOCK_SIZE": shape.block_size,
        "HEAD_WIDTH": shape.width,
        "ROTARY_WIDTH": shape.rotary_width,
        "TILE_HEADS": next_power_of_two(shape.group),
        "TILE_WIDTH": head_tile(shape.width),
    }
    label = f"{dtype} {shape.label}"
    return plain_variant("rotate_and_write_kernel", arch, label, arguments, constants, COPY_WARPS)


FAMILY = Family(
    name="fused",
    kernels={
        "rms_norm_kernel": fused_norm.rms_norm_kernel,
        "silu_gate_kernel": fused_activation.silu_gate_kernel,
        "gelu_gate_kernel": fused_activation.gelu_gate_kernel,
        "gather_rows_kernel": fused_embedding.gather_rows_kernel,
        "route_kernel": fused_routing.route_kernel,
        "sort_assignments_kernel": fused_routing.sort_assignments_kernel,
        "rotate_and_write_kernel": fused_rotary.rotate_and_write_kernel,
    },
    all_variants=all_variants,
    sample_variants=sample_variants,
)
