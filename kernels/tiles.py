"""Data: the sizes kernels launch with, per GPU architecture and row bucket. Changed by a commit, never while running.

Legend: N = out features, K = in features. None of these numbers has been timed on a GPU yet; those that will be come
from `make tune-gpu`, which writes them into tuned_tiles.json beside this file, and replace the ones here.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Architecture:
    """num_processors: of its common server part. shared_bytes: what one program may use of shared memory."""

    num_processors: int
    shared_bytes: int


@dataclass(frozen=True)
class LinearTile:
    """One program of the INT4 kernels: num_rows activations against num_columns outputs, a block of K a step."""

    num_rows: int
    num_columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionTile:
    """One program of paged attention: num_rows (token, head) pairs, at least, against num_keys cached tokens a step.

    max_registers: of a thread; left to itself, the compiler may spill some rather than take more of them.
    """

    num_rows: int
    num_keys: int
    num_warps: int
    num_stages: int
    max_registers: int


# compute capability times ten: shared memory from the CUDA programming guide, "maximum per thread block"
ARCHITECTURES = {
    80: Architecture(num_processors=108, shared_bytes=166_912),
    86: Architecture(num_processors=84, shared_bytes=101_376),
    89: Architecture(num_processors=128, shared_bytes=101_376),
    90: Architecture(num_processors=132, shared_bytes=232_448),
    100: Architecture(num_processors=148, shared_bytes=232_448),
    120: Architecture(num_processors=170, shared_bytes=101_376),
}

MAX_FEW_ROWS = 64
# the narrowest tile over experts: one of 8 rows would cost nearly as much, and be filled half as often
MIN_GROUPED_ROWS = 16
WIDEST_GROUPED_TILE = 64 * 128
# its bucket for tiles of more rows
MANY_ROWS = "many_rows"


def read_tuned_tiles(path: Path) -> dict[str, dict[str, LinearTile]]:
    """What the tuner wrote, by architecture and then by bucket: the largest row count, or MANY_ROWS. Often nothing."""
    if not path.exists():
        return {}
    by_arch: dict[str, dict[str, dict[str, int]]] = json.loads(path.read_text())
    return {
        arch: {bucket: LinearTile(**fields) for bucket, fields in buckets.items()} for arch, buckets in by_arch.items()
    }


_TUNED_TILES = read_tuned_tiles(Path(__file__).with_name("tuned_tiles.json"))


def _tuned(arch: int, bucket: int | str, tile: LinearTile) -> LinearTile:
    """The measured tile, or else that one."""
    return _TUNED_TILES.get(str(arch), {}).get(str(bucket), tile)


_SERVER_TILES = {
    8: LinearTile(num_rows=8, num_columns=128, num_warps=4, num_stages=4),
    16: LinearTile(num_rows=16, num_columns=128, num_warps=4, num_stages=4),
    32: LinearTile(num_rows=32, num_columns=128, num_warps=4, num_stages=4),
    64: LinearTile(num_rows=64, num_columns=128, num_warps=4, num_stages=3),
}
# 16 rows for 8 too: Triton 3.6 multiplies tiles of 8 by other instructions than the wider ones, and those may sum in
# another order, so that a row's bits would hang on how many rows there are
_WIDE_SERVER_TILES = {**_SERVER_TILES, 8: _SERVER_TILES[16]}
_DESKTOP_TILES = {
    8: LinearTile(num_rows=8, num_columns=64, num_warps=4, num_stages=4),
    16: LinearTile(num_rows=16, num_columns=64, num_warps=4, num_stages=4),
    32: LinearTile(num_rows=32, num_columns=64, num_warps=4, num_stages=3),
    64: LinearTile(num_rows=64, num_columns=64, num_warps=4, num_stages=3),
}
# narrow groups keep two sums of a tile at once: eight warps where four would spill. By architecture, group and bucket
_EIGHT_WARPS = {
    rows: LinearTile(num_rows=rows, num_columns=128, num_warps=8, num_stages=stages)
    for rows, stages in ((16, 4), (32, 4), (64, 3))
}
_SMALL_GROUP_TILES = {
    **{(arch, group_size): {64: _EIGHT_WARPS[64]} for arch in (80, 90) for group_size in (32, 64)},
    (100, 32): {8: _EIGHT_WARPS[16], **_EIGHT_WARPS},
    (100, 64): {32: _EIGHT_WARPS[32], 64: _EIGHT_WARPS[64]},
}
_FEW_ROWS_TILES = {
    80: _SERVER_TILES,
    86: _DESKTOP_TILES,
    89: _DESKTOP_TILES,
    90: _WIDE_SERVER_TILES,
    100: _WIDE_SERVER_TILES,
    120: _DESKTOP_TILES,
}
# keyed by architecture, then by the largest row count of the bucket
FEW_ROWS_TILES = {
    arch: {bucket: _tuned(arch, bucket, tile) for bucket, tile in tiles.items()}
    for arch, tiles in _FEW_ROWS_TILES.items()
}
# two stages where the third makes the compiler spill registers
_MANY_ROWS_TILES = {
    80: LinearTile(num_rows=64, num_columns=128, num_warps=8, num_stages=2),
    86: LinearTile(num_rows=64, num_columns=128, num_warps=8, num_stages=2),
    89: LinearTile(num_rows=64, num_columns=128, num_warps=8, num_stages=2),
    90: LinearTile(num_rows=64, num_columns=128, num_warps=8, num_stages=3),
    100: LinearTile(num_rows=64, num_columns=128, num_warps=8, num_stages=3),
    120: LinearTile(num_rows=64, num_columns=128, num_warps=8, num_stages=2),
}
MANY_ROWS_TILES = {arch: _tuned(arch, MANY_ROWS, tile) for arch, tile in _MANY_ROWS_TILES.items()}
# where a narrow group's two sums make that one spill, by architecture and group size
_SMALL_GROUP_MANY_ROWS_TILES = {
    (arch, 32): LinearTile(num_rows=32, num_columns=128, num_warps=8, num_stages=2) for arch in (86, 89, 120)
}

# of a thread of the many-row kernel and of that over experts, by architecture: there the compiler spills some rather
# than take more than half of them, unless it is told that it may
MAX_REGISTERS = {86: 255, 89: 255, 120: 255}
# by architecture, group size and rows, where that is not enough
_SMALL_GROUP_GROUPED_TILES = {
    (arch, 32, 64): LinearTile(num_rows=64, num_columns=32, num_warps=4, num_stages=3) for arch in (86, 89, 120)
}
# of a thread of the few-row kernel, by architecture, group size and rows of the tile
FEW_ROWS_MAX_REGISTERS = {(80, 32, 16): 255}

# inputs that a program over experts which are not quantized multiplies a step
DENSE_BLOCK = 64

# outputs that one program adds an adapter's product to, the most values of a rank that one makes, and the warps of
# either
LORA_COLUMNS = 128
MAX_LORA_DOWN_COLUMNS = 64
LORA_WARPS = 4
MAX_LORA_SPLITS = 16

# assignments that one program places among all, tiles that one plans at a time, and the warps of either
SORTED_ASSIGNMENTS = 128
PLANNED_TILES = 16
ROUTING_WARPS = 8

# rows from which a weight is dequantized for a dense product, on the architectures named. There the library's products
# should outrun the fused loop by more than it costs to write and read the dense weight: derived, not measured
DENSE_ROWS = {80: 512, 90: 1024, 100: 1024}

# three programs on a processor at least
_DECODE_TILE = AttentionTile(num_rows=8, num_keys=64, num_warps=4, num_stages=3, max_registers=168)
_WIDE_DECODE_TILE = AttentionTile(num_rows=8, num_keys=32, num_warps=8, num_stages=3, max_registers=168)
_PREFILL_TILE = AttentionTile(num_rows=64, num_keys=64, num_warps=4, num_stages=2, max_registers=255)
_SMALL_PREFILL_TILE = AttentionTile(num_rows=64, num_keys=32, num_warps=4, num_stages=2, max_registers=255)
_WIDE_PREFILL_TILE = AttentionTile(num_rows=64, num_keys=32, num_warps=8, num_stages=2, max_registers=255)
# four warps multiply 64 rows with one instruction on sm90, and eight with twice as many
_WIDE_PREFILL_TILES = {90: _SMALL_PREFILL_TILE}
# cached tokens that one decode program reads; fixed, so that a sequence's sum never depends on its neighbours
SPAN_TOKENS = 512

# columns that one program of the ordered sum over splits adds
SUM_COLUMNS = 512
# warps of the programs that only copy or add, and of those that merge one head
COPY_WARPS = 4
# of those that dequantize a tile: fewer would hold more of it than their registers do
DEQUANTIZING_WARPS = 8
MERGE_WARPS = 1
# columns that one program of a gate, and of a gather of rows, makes
GATE_COLUMNS = 1024
GATHERED_COLUMNS = 1024
# logits that one program edits
EDITED_COLUMNS = 1024
# logits that one program of sampling, which has a row to itself, reads at a time, and thresholds that it tries at once
SAMPLED_COLUMNS = 2048
SAMPLING_WARPS = 16
NUM_THRESHOLDS = 4
# the widest row that one program holds in registers: 64 elements a thread
MAX_ROW_WIDTH = 32_768
# the tensor cores multiply at least this many elements at a time: narrower heads are padded to it
MIN_HEAD_TILE = 16

# fewer blocks than this in a split and the pipeline is filling and draining all the time
MIN_BLOCKS_PER_SPLIT = 4


def nearest_architecture(major: int, minor: int) -> int:
    """The listed architecture that a GPU of compute capability major.minor runs as: the newest not newer than it.

    Raises ValueError below 8.0, which has no asynchronous copies and no bfloat16 tensor cores.
    """
    capability = 10 * major + minor
    older = [arch for arch in ARCHITECTURES if arch <= capability]
    if not older:
        raise ValueError(f"the INT4 kernels need compute capability 8.0 or newer; this GPU has {major}.{minor}")
    return max(older)


def few_rows_tile(arch: int, num_rows: int, group_size: int) -> LinearTile:
    """The tile for 1 to 64 rows of activations. Raises ValueError for more."""
    for bucket, tile in FEW_ROWS_TILES[arch].items():
        if num_rows <= bucket:
            return _SMALL_GROUP_TILES.get((arch, group_size), {}).get(bucket, tile)
    raise ValueError(f"the few-row kernel takes up to {MAX_FEW_ROWS} rows, not {num_rows}")


def many_rows_tile(arch: int, group_size: int) -> LinearTile:
    """The tile of the many-row kernel."""
    return _SMALL_GROUP_MANY_ROWS_TILES.get((arch, group_size), MANY_ROWS_TILES[arch])


def is_dense(arch: int, num_rows: int) -> bool:
    """Whether this many rows are multiplied with a dequantized weight."""
    return arch in DENSE_ROWS and num_rows >= DENSE_ROWS[arch]


def grouped_rows(num_assignments: int, num_experts: int) -> int:
    """Rows of a tile where assignments are spread over experts: room for twice an expert's share, 16 to 64."""
    share = -(-2 * num_assignments // num_experts)
    return next_power_of_two(min(max(share, MIN_GROUPED_ROWS), MAX_FEW_ROWS))


def grouped_tile(arch: int, num_rows: int, group_size: int) -> LinearTile:
    """The tile over experts of 16, 32 or 64 rows.

    The rows' 64-bit places take registers, which the widest tile has only with eight warps.
    """
    if (arch, group_size, num_rows) in _SMALL_GROUP_GROUPED_TILES:
        return _SMALL_GROUP_GROUPED_TILES[arch, group_size, num_rows]
    tile = replace(few_rows_tile(arch, num_rows, group_size), num_rows=num_rows)
    return replace(tile, num_warps=8) if tile.num_rows * tile.num_columns == WIDEST_GROUPED_TILE else tile


def grouped_dense_tile(arch: int, num_rows: int) -> LinearTile:
    """The tile over experts that are not quantized: that of the quantized ones, three blocks of K in flight."""
    return replace(grouped_tile(arch, num_rows, group_size=128), num_stages=3)


def lora_down_columns(num_hidden: int) -> int:
    """Values that one program makes of a row's num_hidden, of all parts of a layer together."""
    return min(max(next_power_of_two(num_hidden), MIN_GROUPED_ROWS), MAX_LORA_DOWN_COLUMNS)


def lora_splits(num_inputs: int) -> int:
    """How many parts K is cut into: there are few columns, and so few programs. A function of K alone."""
    num_blocks = -(-num_inputs // DENSE_BLOCK)
    splits = 1
    while splits < MAX_LORA_SPLITS and num_blocks >= 2 * splits * MIN_BLOCKS_PER_SPLIT:
        splits *= 2
    return splits


def head_tile(width: int) -> int:
    """The power of two that a head of this width is padded to."""
    return max(next_power_of_two(width), MIN_HEAD_TILE)


def decode_tile(width: int) -> AttentionTile:
    """The tile of decode for heads of this width: half the keys where a tile of wide heads outgrows the registers."""
    return _WIDE_DECODE_TILE if width > 128 else _DECODE_TILE


def prefill_tile(arch: int, width: int, group: int) -> AttentionTile:
    """The tile of prefill for heads of this width, `group` query heads a key head.

    Half the keys where registers do not hold more: always on desktop GPUs, and elsewhere with the masks of padded heads
    or the indices of larger groups. Where a head is wide, more warps on most of them.
    """
    if width > 128:
        return _WIDE_PREFILL_TILES.get(arch, _WIDE_PREFILL_TILE)
    is_small = arch in (86, 89, 120) or group > 4 or width != head_tile(width)
    return _SMALL_PREFILL_TILE if is_small else _PREFILL_TILE


def row_tile(tile: AttentionTile, group: int) -> int:
    """Rows of an attention tile: its own, or as many as hold one token of a larger group of query heads."""
    return max(tile.num_rows, next_power_of_two(group))


def row_warps(width: int) -> int:
    """Warps of a program that holds a row of this width: 16 elements a thread, more in rows wider than 8192."""
    return min(max(next_power_of_two(width) // 512, 1), 16)


def num_splits(arch: int, num_columns: int, num_blocks: int) -> int:
    """How many parts K is cut into, a power of two: enough programs for two on every processor, if K is long enough.

    num_blocks: of K. A function of the weight and the architecture alone, so that a row's sum never depends on the
    batch.
    """
    num_tiles = -(-num_columns // FEW_ROWS_TILES[arch][8].num_columns)
    splits = 1
    while num_tiles * splits < 2 * ARCHITECTURES[arch].num_processors:
        if num_blocks < 2 * splits * MIN_BLOCKS_PER_SPLIT:
            break
        splits *= 2
    return splits


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number from 1 up."""
    return 1 << (number - 1).bit_length()
