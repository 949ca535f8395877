"""Builds the operands of sampling on the device from rows as people write them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.sampling_batch import LogitBias, Penalties, SamplingBatch
from tests.kernels.launches import DEVICE


@dataclass(frozen=True)
class Row:
    """One row's wishes; the defaults switch everything off but the draw. allowed: None for all tokens."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    allowed: Sequence[int] | None = None


def build_batch(rows: Sequence[Row], vocab_size: int) -> SamplingBatch:
    """The batch of these rows, on the host, with penalties, bias and mask only if a row has some."""
    has_penalties = any((row.repetition, row.presence, row.frequency) != (1.0, 0.0, 0.0) for row in rows)
    return SamplingBatch(
        temperatures=torch.tensor([row.temperature for row in rows], dtype=torch.float32),
        top_k=torch.tensor([row.top_k for row in rows], dtype=torch.int32),
        top_p=torch.tensor([row.top_p for row in rows], dtype=torch.float64),
        min_p=torch.tensor([row.min_p for row in rows], dtype=torch.float32),
        seeds=torch.tensor([row.seed for row in rows], dtype=torch.int64),
        positions=torch.tensor([row.position for row in rows], dtype=torch.int64),
        penalties=_penalties(rows) if has_penalties else None,
        bias=_bias(rows) if any(row.bias for row in rows) else None,
        allowed=_mask(rows, vocab_size) if any(row.allowed is not None for row in rows) else None,
    )


def on_device(batch: SamplingBatch) -> SamplingBatch:
    def moved(part: Penalties | LogitBias | SamplingBatch) -> dict[str, Tensor]:
        values = {one.name: getattr(part, one.name) for one in dataclasses.fields(part)}
        return {name: value.to(DEVICE) for name, value in values.items() if isinstance(value, Tensor)}

    return dataclasses.replace(
        batch,
        **moved(batch),
        penalties=batch.penalties and dataclasses.replace(batch.penalties, **moved(batch.penalties)),
        bias=batch.bias and dataclasses.replace(batch.bias, **moved(batch.bias)),
    )


def _penalties(rows: Sequence[Row]) -> Penalties:
    texts = [[*row.prompt, *row.output] for row in rows]
    return Penalties(
        repetition=torch.tensor([row.repetition for row in rows], dtype=torch.float32),
        presence=torch.tensor([row.presence for row in rows], dtype=torch.float32),
        frequency=torch.tensor([row.frequency for row in rows], dtype=torch.float32),
        token_ids=torch.tensor([token for text in texts for token in text], dtype=torch.int64),
        starts=torch.tensor([0, *map(len, texts)], dtype=torch.int64).cumsum(0),
        num_prompt_tokens=torch.tensor([len(row.prompt) for row in rows], dtype=torch.int64),
        max_tokens=max(map(len, texts)),
    )


def _bias(rows: Sequence[Row]) -> LogitBias:
    return LogitBias(
        starts=torch.tensor([0, *(len(row.bias) for row in rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        token_ids=torch.tensor([token for row in rows for token in row.bias], dtype=torch.int64),
        values=torch.tensor([value for row in rows for value in row.bias.values()], dtype=torch.float32),
    )


def _mask(rows: Sequence[Row], vocab_size: int) -> Tensor:
    """int32 [S, ceil(V / 32)]."""
    bits = torch.zeros(len(rows), -(-vocab_size // 32) * 32, dtype=torch.int64)
    for index, row in enumerate(rows):
        bits[index, slice(None) if row.allowed is None else list(row.allowed)] = 1
    words = (bits.view(len(rows), -1, 32) << torch.arange(32)).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
