"""Data: what is measured, at the sizes of real models, and tiny for a rehearsal. Legend: N, K = out and in features."""

from dataclasses import dataclass
from typing import Literal

import torch

HalfName = Literal["fp16", "bf16"]
HALF_TYPES: dict[HalfName, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LinearShape:
    """A weight [num_columns, num_inputs]."""

    name: str
    num_columns: int
    num_inputs: int

    def __str__(self) -> str:
        return f"{self.name} {self.num_columns}x{self.num_inputs}"


@dataclass(frozen=True)
class LinearCase:
    """A weight's shape and how it is read, timed for each number of rows in `rows`, the most telling first."""

    shape: LinearShape
    group_size: int
    dtype: HalfName
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.shape} g{self.group_size} {self.dtype}"


@dataclass(frozen=True)
class HeadShape:
    """num_heads query heads over num_kv_heads key heads of that width."""

    num_heads: int
    num_kv_heads: int
    width: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class AttentionCase:
    """num_sequences that each have context_len tokens, of which the last num_new are new."""

    heads: HeadShape
    num_sequences: int
    context_len: int
    num_new: int

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.num_new

    def __str__(self) -> str:
        heads = f"{self.heads.num_heads}/{self.heads.num_kv_heads} heads of {self.heads.width}"
        kind = "decode" if self.num_new == 1 else f"{self.num_new} new tokens"
        return f"{kind}, {self.num_sequences} x {self.context_len}, {heads}"


@dataclass(frozen=True)
class ModelShape:
    """The fields of a Llama's config.json that decide about speed."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: HeadShape
    vocab_size: int

    def to_config(self, max_position_embeddings: int) -> dict[str, object]:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.heads.num_heads,
            "num_key_value_heads": self.heads.num_kv_heads,
            "head_dim": self.heads.width,
            "max_position_embeddings": max_position_embeddings,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "dtype": "float16",
        }


@dataclass(frozen=True)
class Sizes:
    """copy_bytes: of the buffers whose copying tells the bandwidth. checked_*: for correctness, which is slow to check.

    invariance_rows: batches that a row is compared in; the largest up to 64 is what the others are compared with.
    block_sizes: of the paged cache. int4_peer_rows: the most that torch's op is timed with; it is slow for more.
    num_rounds: how often each timed run is repeated. run_seconds: how long one should take at least, so that starting
    it does not count. streams: how many sequences decode at once, end to end, with context_len tokens each.
    decode_steps: generated tokens of each. quantized_rows: calibration rows, and the tokens of each.
    tuned_buckets: the buckets of kernels/tiles.py for which other tiles are tried, at most max_tuned_tiles of them.
    """

    name: Literal["full", "rehearsal"]
    copy_bytes: tuple[int, ...]
    checked_shapes: tuple[LinearShape, ...]
    checked_rows: tuple[int, ...]
    checked_groups: tuple[int, ...]
    invariant_shapes: tuple[LinearShape, ...]
    invariance_rows: tuple[int, ...]
    checked_heads: tuple[HeadShape, ...]
    checked_context: int
    block_sizes: tuple[int, ...]
    linear: tuple[LinearCase, ...]
    int4_peer_rows: int
    gemlite: tuple[LinearCase, ...]
    attention: tuple[AttentionCase, ...]
    model: ModelShape
    streams: tuple[int, ...]
    context_len: int
    decode_steps: int
    quantized_model: ModelShape
    quantized_rows: tuple[int, int]
    tuned_buckets: tuple[str, ...]
    max_tuned_rows: int
    max_tuned_tiles: int
    num_rounds: int
    run_seconds: float


LLAMA_8B = (
    LinearShape("Llama-3.1-8B qkv", 6144, 4096),
    LinearShape("Llama-3.1-8B o", 4096, 4096),
    LinearShape("Llama-3.1-8B gate_up", 28672, 4096),
    LinearShape("Llama-3.1-8B down", 4096, 14336),
)
QWEN_7B = (
    LinearShape("Qwen2.5-7B qkv", 4608, 3584),
    LinearShape("Qwen2.5-7B o", 3584, 3584),
    LinearShape("Qwen2.5-7B gate_up", 37888, 3584),
    LinearShape("Qwen2.5-7B down", 3584, 18944),
)
ROWS = (1, 16, 8, 64, 2048, 4, 32, 512, 128, 2, 256)
SOME_ROWS = (1, 16, 64, 2048)
LLAMA_HEADS = HeadShape(num_heads=32, num_kv_heads=8, width=128)
WIDE_GROUP_HEADS = HeadShape(num_heads=32, num_kv_heads=4, width=128)
LLAMA_MODEL = ModelShape(hidden_size=4096, intermediate_size=14336, num_layers=32, heads=LLAMA_HEADS, vocab_size=128256)
MIB = 2**20

FULL = Sizes(
    name="full",
    copy_bytes=(256 * MIB, 512 * MIB, 1024 * MIB, 2048 * MIB),
    checked_shapes=(
        LinearShape("square", 4096, 4096),
        LinearShape("wide", 28672, 4096),
        LinearShape("long", 4096, 14336),
        LinearShape("SmolLM2", 1536, 576),
        LinearShape("odd", 1000, 11008),
    ),
    checked_rows=(1, 3, 8, 16, 17, 64, 65, 333),
    checked_groups=(128, 64, 32),
    invariant_shapes=(LLAMA_8B[1], LLAMA_8B[2], LLAMA_8B[3], LinearShape("SmolLM2", 1536, 576)),
    invariance_rows=(*range(1, 65), 65, 128, 333, 1000),
    checked_heads=(
        LLAMA_HEADS,
        WIDE_GROUP_HEADS,
        HeadShape(num_heads=9, num_kv_heads=3, width=64),
        HeadShape(num_heads=8, num_kv_heads=8, width=80),
        HeadShape(num_heads=8, num_kv_heads=4, width=256),
    ),
    checked_context=2048,
    block_sizes=(16, 64),
    linear=(
        *(LinearCase(shape, 128, "fp16", ROWS) for shape in LLAMA_8B),
        *(LinearCase(shape, 128, "fp16", ROWS) for shape in QWEN_7B),
        *(LinearCase(shape, 64, "fp16", SOME_ROWS) for shape in LLAMA_8B[1:3]),
        *(LinearCase(shape, 128, "bf16", SOME_ROWS) for shape in LLAMA_8B[1:3]),
    ),
    int4_peer_rows=256,
    gemlite=tuple(LinearCase(shape, 128, "fp16", (1, 16, 64)) for shape in LLAMA_8B),
    attention=(
        *(AttentionCase(LLAMA_HEADS, batch, 2048, 1) for batch in (1, 16, 64, 8)),
        *(AttentionCase(LLAMA_HEADS, batch, 8192, 1) for batch in (1, 16, 64, 8)),
        AttentionCase(LLAMA_HEADS, 1, 2048, 2048),
        *(AttentionCase(WIDE_GROUP_HEADS, batch, 2048, 1) for batch in (1, 16, 64, 8)),
        *(AttentionCase(WIDE_GROUP_HEADS, batch, 8192, 1) for batch in (1, 16, 64, 8)),
        AttentionCase(WIDE_GROUP_HEADS, 1, 2048, 2048),
        AttentionCase(LLAMA_HEADS, 4, 8192, 512),
    ),
    model=LLAMA_MODEL,
    streams=(1, 16, 64, 8),
    context_len=2048,
    decode_steps=64,
    quantized_model=ModelShape(
        hidden_size=4096, intermediate_size=11008, num_layers=1, heads=HeadShape(32, 32, 128), vocab_size=32000
    ),
    quantized_rows=(32, 512),
    tuned_buckets=("8", "16", "many_rows", "64", "32"),
    max_tuned_rows=2048,
    max_tuned_tiles=31,
    num_rounds=15,
    run_seconds=1e-3,
)

_TINY_HEADS = HeadShape(num_heads=4, num_kv_heads=2, width=32)
_TINY = LinearShape("tiny", 128, 256)
REHEARSAL = Sizes(
    name="rehearsal",
    copy_bytes=(MIB,),
    checked_shapes=(LinearShape("odd", 72, 576),),
    checked_rows=(1, 65),
    checked_groups=(64,),
    invariant_shapes=(_TINY,),
    invariance_rows=(1, 9, 64, 65),
    checked_heads=(_TINY_HEADS,),
    checked_context=40,
    block_sizes=(16,),
    linear=(LinearCase(_TINY, 128, "fp16", (1, 65)), LinearCase(_TINY, 64, "bf16", (16,))),
    int4_peer_rows=16,
    gemlite=(LinearCase(_TINY, 128, "fp16", (1,)),),
    attention=(AttentionCase(_TINY_HEADS, 2, 40, 1), AttentionCase(_TINY_HEADS, 1, 32, 32)),
    model=ModelShape(hidden_size=128, intermediate_size=128, num_layers=1, heads=_TINY_HEADS, vocab_size=64),
    streams=(1, 2),
    context_len=24,
    decode_steps=1,
    quantized_model=ModelShape(
        hidden_size=64, intermediate_size=96, num_layers=1, heads=HeadShape(2, 2, 32), vocab_size=64
    ),
    quantized_rows=(2, 16),
    tuned_buckets=("8",),
    max_tuned_rows=1,
    max_tuned_tiles=1,
    num_rounds=2,
    run_seconds=0.0,
)
