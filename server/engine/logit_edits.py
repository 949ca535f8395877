"""Changes to logits before a token is chosen: bias, penalties, stop tokens that are still barred, masks.

All but the masks touch few entries of a row, so they are lists of (row, token, value), never [rows, vocabulary].
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.request import SamplingParams
from server.engine.step_plan import SamplingRow, TokenIds


def edit_logits(logits_SV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """float32 [S, V] with bias, then penalties, then bars and masks; the argument itself when no row asks for any.

    The order is vLLM's. Repetition penalty counts prompt and output, presence and frequency penalty the output only.
    """
    if not any(_wants_edits(row) for row in rows):
        return logits_SV
    edited = logits_SV.clone()
    _add_bias(edited, rows)
    _apply_penalties(edited, rows)
    _bar_stop_tokens(edited, rows)
    _bar_masked_tokens(edited, rows)
    return edited


def _wants_edits(row: SamplingRow) -> bool:
    return bool(row.params.logit_bias) or has_penalty(row.params) or row.bars_stop_tokens or row.allowed is not None


def has_penalty(params: SamplingParams) -> bool:
    """Whether tokens that were said are made less likely, or more."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _add_bias(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries = [(index, token, bias) for index, row in enumerate(rows) for token, bias in row.params.logit_bias]
    if entries:
        row_index, token_index, bias = zip(*entries, strict=True)
        where = (_on(logits, row_index), _on(logits, token_index))
        logits.index_put_(where, torch.tensor(bias, device=logits.device), accumulate=True)


def _bar_stop_tokens(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries = [
        (index, token) for index, row in enumerate(rows) if row.bars_stop_tokens for token in row.params.stop_token_ids
    ]
    if entries:
        row_index, token_index = zip(*entries, strict=True)
        logits[_on(logits, row_index), _on(logits, token_index)] = float("-inf")


def _bar_masked_tokens(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    masked = [index for index, row in enumerate(rows) if row.allowed is not None]
    if masked:
        words = np.stack([row.allowed for row in rows if row.allowed is not None]).astype("<i4")
        bits = np.unpackbits(words.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
        is_barred = torch.from_numpy(bits == 0).to(logits.device)
        logits[masked] = logits[masked].masked_fill_(is_barred, float("-inf"))


def _apply_penalties(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    penalized = [(index, row) for index, row in enumerate(rows) if has_penalty(row.params)]
    if not penalized:
        return
    counted = [_count_tokens(row) for _, row in penalized]
    lengths = [len(tokens) for tokens, _ in counted]
    settings = [
        (index, row.params.repetition_penalty, row.params.presence_penalty, row.params.frequency_penalty)
        for index, row in penalized
    ]
    # one line an entry: which row, and the three penalties of that row
    spread = np.repeat(np.array(settings, dtype=np.float64), lengths, axis=0)
    row_index = torch.from_numpy(spread[:, 0].astype(np.int64)).to(logits.device)
    token_index = torch.from_numpy(np.concatenate([tokens for tokens, _ in counted])).to(logits.device)
    num_output = torch.from_numpy(np.concatenate([counts for _, counts in counted])).to(logits.device).float()
    repetition, presence, frequency = (
        torch.from_numpy(spread[:, column].astype(np.float32)).to(logits.device) for column in (1, 2, 3)
    )
    values = logits[row_index, token_index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * num_output + presence * (num_output > 0)
    logits[row_index, token_index] = values


def _count_tokens(row: SamplingRow) -> tuple[TokenIds, NDArray[np.int64]]:
    """The distinct tokens of prompt and output, and how often each stands in the output."""
    tokens, inverse = np.unique(row.token_ids, return_inverse=True)
    return tokens, np.bincount(inverse[row.num_prompt_tokens :], minlength=len(tokens))


def _on(logits: Tensor, indices: tuple[int, ...]) -> Tensor:
    return torch.tensor(indices, device=logits.device)
