"""Which tokens go to which experts, in two launches: the choice, and the rows in the order of `grouped_int4`.

Legend: T = tokens, C = choices of a token (top-k), A = T * C assignments, E = experts.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.experts import Routing, SortedRows, num_tiles_of
from kernels.launch import FUSE_FLOATS, launch_arch
from kernels.tiles import PLANNED_TILES, ROUTING_WARPS, SORTED_ASSIGNMENTS, next_power_of_two


@triton.jit(do_not_specialize=["logits_stride", "num_experts"])
def route_kernel(
    logits_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    logits_stride: tl.tensor,
    num_experts: tl.tensor,
    NUM_CHOICES: tl.constexpr,
    RENORMALIZED: tl.constexpr,
    TILE_EXPERTS: tl.constexpr,
    TILE_CHOICES: tl.constexpr,
) -> None:
    """Program token: the likeliest experts int64 [T, C] and their weights float32 [T, C], for logits [T, E]."""
    token = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, TILE_EXPERTS)
    row_ptr = logits_ptr + token * logits_stride + numbers
    logits = tl.load(row_ptr, mask=numbers < num_experts, other=float("-inf")).to(tl.float32)
    largest = tl.max(logits, axis=0)
    total = tl.sum(tl.exp(logits - largest), axis=0)
    choices = tl.arange(0, TILE_CHOICES)
    experts = tl.zeros((TILE_CHOICES,), tl.int32)
    weights = tl.zeros((TILE_CHOICES,), tl.float32)
    for choice in tl.static_range(NUM_CHOICES):
        best, index = tl.max(logits, axis=0, return_indices=True)
        # among NaN any index comes out, and a padding one would be no expert
        experts = tl.where(choices == choice, tl.minimum(index, num_experts - 1), experts)
        weights = tl.where(choices == choice, tl.exp(best - largest) / total, weights)
        logits = tl.where(numbers == index, float("-inf"), logits)
    if RENORMALIZED:
        weights = weights / tl.sum(weights, axis=0)
    inside = choices < NUM_CHOICES
    tl.store(experts_ptr + token * NUM_CHOICES + choices, experts.to(tl.int64), mask=inside)
    tl.store(weights_ptr + token * NUM_CHOICES + choices, weights, mask=inside)


@triton.jit(do_not_specialize=["num_assignments", "num_experts", "num_tiles"])
def sort_assignments_kernel(
    experts_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tile_experts_ptr: tl.tensor,
    tile_rows_ptr: tl.tensor,
    num_assignments: tl.tensor,
    num_experts: tl.tensor,
    num_tiles: tl.tensor,
    MAX_TILE_ROWS: tl.constexpr,
    TILE_EXPERTS: tl.constexpr,
    TILE_ASSIGNMENTS: tl.constexpr,
    TILE_PLANNED: tl.constexpr,
) -> None:
    """All programs but the last place a tile of assignments in `SortedRows.order`; the last cuts the order into tiles.

    An assignment's place is the number of those before it: every program compares its own with all.
    """
    program = tl.program_id(0)
    lanes = tl.arange(0, TILE_ASSIGNMENTS)
    if program < tl.num_programs(0) - 1:
        own = program * TILE_ASSIGNMENTS + lanes
        own_experts = tl.load(experts_ptr + own, mask=own < num_assignments, other=0).to(tl.int32)
        places = tl.zeros((TILE_ASSIGNMENTS,), tl.int32)
        for first in range(0, num_assignments, TILE_ASSIGNMENTS):
            others = first + lanes
            # what pads comes after all
            experts = tl.load(experts_ptr + others, mask=others < num_assignments, other=num_experts).to(tl.int32)
            is_same = experts[None, :] == own_experts[:, None]
            is_before = (experts[None, :] < own_experts[:, None]) | (is_same & (others[None, :] < own[:, None]))
            places += tl.sum(is_before.to(tl.int32), axis=1)
        tl.store(order_ptr + places, own, mask=own < num_assignments)
    else:
        numbers = tl.arange(0, TILE_EXPERTS)
        counts = tl.zeros((TILE_EXPERTS,), tl.int32)
        for first in range(0, num_assignments, TILE_ASSIGNMENTS):
            others = first + lanes
            experts = tl.load(experts_ptr + others, mask=others < num_assignments, other=-1).to(tl.int32)
            counts += tl.sum((experts[None, :] == numbers[:, None]).to(tl.int32), axis=1)
        ends = tl.cumsum(counts, axis=0)
        tiles = (counts + MAX_TILE_ROWS - 1) // MAX_TILE_ROWS
        tile_ends = tl.cumsum(tiles, axis=0)
        # of an expert's first tile, were it tile 0
        first_rows = ends - counts - (tile_ends - tiles) * MAX_TILE_ROWS
        for first in range(0, num_tiles, TILE_PLANNED):
            indices = first + tl.arange(0, TILE_PLANNED)
            before = tl.sum((tile_ends[None, :] <= indices[:, None]).to(tl.int32), axis=1)
            tile_experts = tl.minimum(before, num_experts - 1)
            is_own = numbers[None, :] == tile_experts[:, None]
            starts = tl.sum(tl.where(is_own, first_rows[None, :], 0), axis=1) + indices * MAX_TILE_ROWS
            stops = tl.minimum(tl.sum(tl.where(is_own, ends[None, :], 0), axis=1), starts + MAX_TILE_ROWS)
            inside = indices < num_tiles
            tl.store(tile_experts_ptr + indices, tile_experts, mask=inside)
            tl.store(tile_rows_ptr + 2 * indices, starts, mask=inside)
            tl.store(tile_rows_ptr + 2 * indices + 1, stops, mask=inside)


def route(logits: Tensor, num_choices: int, *, renormalized: bool) -> Routing:
    """`reference.route` in one launch, for logits [T, E] in any float dtype. Raises ValueError for too many choices."""
    num_tokens, num_experts = logits.shape
    if not 0 < num_choices <= num_experts:
        raise ValueError(f"a token chooses 1 to {num_experts} of {num_experts} experts, not {num_choices}")
    if logits.stride(1) != 1:
        raise ValueError(f"the columns of logits must be neighbours in memory, not {logits.stride(1)} elements apart")
    launch_arch({"logits": logits})
    experts = torch.empty((num_tokens, num_choices), dtype=torch.int64, device=logits.device)
    weights = torch.empty((num_tokens, num_choices), dtype=torch.float32, device=logits.device)
    if num_tokens:
        route_kernel[(num_tokens,)](
            logits,
            experts,
            weights,
            logits.stride(0),
            num_experts,
            NUM_CHOICES=num_choices,
            RENORMALIZED=renormalized,
            TILE_EXPERTS=next_power_of_two(num_experts),
            TILE_CHOICES=next_power_of_two(num_choices),
            num_warps=1,
            enable_fp_fusion=FUSE_FLOATS,
        )
    return Routing(experts, weights)


def sorted_by_expert(experts: Tensor, num_experts: int, max_tile_rows: int) -> SortedRows:
    """`reference.sorted_by_expert` in one launch, for the choices experts int64 [T, C], contiguous."""
    if experts.dtype != torch.int64 or not experts.is_contiguous():
        raise ValueError(f"experts must be contiguous int64, not {experts.dtype}")
    launch_arch({"experts": experts})
    num_assignments = experts.numel()
    num_tiles = num_tiles_of(num_assignments, num_experts, max_tile_rows)
    order = torch.empty((num_assignments,), dtype=torch.int32, device=experts.device)
    tile_experts = torch.empty((num_tiles,), dtype=torch.int32, device=experts.device)
    tile_rows = torch.empty((num_tiles, 2), dtype=torch.int32, device=experts.device)
    if num_assignments:
        sort_assignments_kernel[(triton.cdiv(num_assignments, SORTED_ASSIGNMENTS) + 1,)](
            experts,
            order,
            tile_experts,
            tile_rows,
            num_assignments,
            num_experts,
            num_tiles,
            MAX_TILE_ROWS=max_tile_rows,
            TILE_EXPERTS=next_power_of_two(num_experts),
            TILE_ASSIGNMENTS=SORTED_ASSIGNMENTS,
            TILE_PLANNED=PLANNED_TILES,
            num_warps=ROUTING_WARPS,
            enable_fp_fusion=FUSE_FLOATS,
        )
    return SortedRows(order, tile_experts, tile_rows, max_tile_rows, num_experts)
