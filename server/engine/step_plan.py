"""The frozen messages between scheduler and runner: what one step computes, and what came out of it.

Legend: T = tokens of the step, B = sequences of the step. Arrays live on the host; nobody writes to them.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from server.engine.request import SamplingParams, TokenLogprob

TokenIds = NDArray[np.int64]


class SamplingRow(NamedTuple):
    """One token to draw: the hidden state at flat index token_index predicts it.

    position: of the drawn token. text: int64, begins with the prompt and the output before that position; the end of
    that output may be guesses, whose own rows stand before this one. allowed: int32 [ceil(V / 32)], as
    `SamplingBatch.allowed` has it for one row; None allows all. A tuple, as every step has one for each sequence:
    a frozen dataclass takes three times as long to make.
    """

    request_id: str
    token_index: int
    params: SamplingParams
    text: TokenIds
    position: int
    num_prompt_tokens: int
    allowed: NDArray[np.int32] | None = None

    @property
    def token_ids(self) -> TokenIds:
        """Prompt and output so far, int64 [position]."""
        return self.text[: self.position]

    @property
    def bars_stop_tokens(self) -> bool:
        return self.position - self.num_prompt_tokens < self.params.min_tokens


@dataclass(frozen=True, eq=False)
class PromptLogprobRows:
    """Prompt tokens to score: the hidden state at flat index token_start + i predicts targets[i]."""

    request_id: str
    token_start: int
    targets: TokenIds
    num_top: int


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One step. Sequence b owns the flat tokens query_starts[b] .. query_starts[b + 1].

    token_ids, positions: int64 [T]. query_starts: int32 [B + 1]. context_lens: int32 [B], with this step's tokens.
    block_tables: int32 [B, max_blocks], padded with 0. started: the requests that are in a step for the first time.
    adapters: of each sequence, empty for none; no names at all where no sequence has one.
    block_copies: (from, to) blocks of all layers, to be copied in this order before anything is computed.
    """

    request_ids: tuple[str, ...]
    token_ids: TokenIds
    positions: TokenIds
    query_starts: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    sampling_rows: tuple[SamplingRow, ...]
    prompt_logprob_rows: tuple[PromptLogprobRows, ...] = ()
    started: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    block_copies: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class SampledToken:
    """What a SamplingRow drew. error: why nothing could be drawn; token_id means nothing then."""

    token_id: int
    logprob: TokenLogprob | None = None
    error: str | None = None


@dataclass(frozen=True)
class StepResult:
    """tokens: one per SamplingRow of the plan. prompt_logprobs: one tuple per PromptLogprobRows, one entry a target."""

    tokens: tuple[SampledToken, ...]
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...] = field(default=())


class StepRunner(Protocol):
    """What executes a step. It keeps keys and values in the blocks the plan names, and nothing about requests."""

    def execute(self, plan: StepPlan) -> StepResult: ...
