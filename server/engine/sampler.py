"""Logits and sampling rows in, one token a row out, batched on the logits' device. Pure: no state, no global random."""

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.logit_edits import edit_logits
from server.engine.logprobs import collect_logprobs
from server.engine.random_draw import draw, row_argmax, uniform
from server.engine.step_plan import SampledToken, SamplingRow
from server.engine.truncation import truncate

# below this a temperature is 0: dividing by it would overflow
GREEDY_TEMPERATURE = 1e-5
NOT_FINITE = "the model's logits are not finite numbers, so no token could be chosen"


def sample(logits_SV: Tensor, rows: Sequence[SamplingRow]) -> tuple[SampledToken, ...]:
    """The next token of each row from float32 logits [S, V], one row of logits a sampling row, and at least one.

    Edits (bias, penalties, bars), then temperature, then top-k, top-p and min-p, then the draw; greedy rows take the
    largest edited logit. A row whose logits are not finite gets an error and disturbs no other.
    """
    edited = edit_logits(logits_SV, rows)
    chosen, peaks = row_argmax(edited)
    is_finite = peaks.isfinite()
    random_rows = [index for index, row in enumerate(rows) if row.params.temperature >= GREEDY_TEMPERATURE]
    if len(random_rows) == len(rows):
        chosen = _draw_rows(edited, rows)
    elif random_rows:
        chosen[random_rows] = _draw_rows(edited[random_rows], [rows[index] for index in random_rows])
    # the one point where the host waits for the device
    drawn = torch.stack((chosen, is_finite.long())).tolist()
    tokens = [
        SampledToken(token_id) if finite else SampledToken(0, error=NOT_FINITE)
        for token_id, finite in zip(*drawn, strict=True)
    ]
    return _with_logprobs(tokens, logits_SV, chosen, rows)


def _draw_rows(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    device = logits_RV.device
    temperatures = torch.tensor([row.params.temperature for row in rows], device=device)
    uniforms = [uniform(row.params.seed, row.position) for row in rows]
    probs_RV = (logits_RV / temperatures[:, None]).softmax(dim=-1)
    kept_RV = truncate(probs_RV, [row.params for row in rows])
    return draw(kept_RV, torch.tensor(uniforms, dtype=torch.float64, device=device))


def _with_logprobs(
    tokens: list[SampledToken], logits_SV: Tensor, chosen_S: Tensor, rows: Sequence[SamplingRow]
) -> tuple[SampledToken, ...]:
    asked = [
        (index, row.params.logprobs)
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True))
        if row.params.logprobs is not None and token.error is None
    ]
    if asked:
        indices = [index for index, _ in asked]
        found = collect_logprobs(logits_SV[indices], chosen_S[indices], [count for _, count in asked])
        for index, logprob in zip(indices, found, strict=True):
            tokens[index] = SampledToken(tokens[index].token_id, logprob)
    return tuple(tokens)
