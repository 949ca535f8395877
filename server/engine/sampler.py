"""Logits and sampling rows in, one token a row out, batched on the logits' device. Pure: no state, no global random."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import dispatch
from kernels.counter_random import uniform
from kernels.sampling_batch import GREEDY_TEMPERATURE, NO_TOKEN
from server.engine.logit_edits import edit_logits
from server.engine.logprobs import collect_logprobs
from server.engine.random_draw import draw, row_argmax
from server.engine.request import TokenLogprob
from server.engine.step_plan import SampledToken, SamplingRow
from server.engine.step_tensors import pick_rows
from server.engine.truncation import truncate

NOT_FINITE = "the model's logits are not finite numbers, so no token could be chosen"
NONE_LEFT = (
    "no token could be chosen: min_tokens and logit_bias bar all that the output's structure allows here, or the "
    "model's logits are not finite numbers"
)


def sample(logits_SV: Tensor, rows: Sequence[SamplingRow]) -> tuple[SampledToken, ...]:
    """The next token of each row from float32 logits [S, V], one row of logits a sampling row, and at least one.

    Edits (bias, penalties, bars, masks), then temperature, then top-k, top-p and min-p, then the draw; greedy rows
    take the largest edited logit. A row whose logits are not finite gets an error and disturbs no other.
    """
    chosen = _choose(logits_SV, rows)
    asked = [(index, row.params.logprobs) for index, row in enumerate(rows) if row.params.logprobs is not None]
    found: dict[int, TokenLogprob] = {}
    if asked:
        indices = [index for index, _ in asked]
        # asked of the device before the host waits for the tokens
        scores = collect_logprobs(
            pick_rows(logits_SV, indices), pick_rows(chosen, indices), [count for _, count in asked]
        )
        found = dict(zip(indices, scores, strict=True))
    # the one point where the host waits for the device
    return tuple(
        SampledToken(0, error=NOT_FINITE if row.allowed is None else NONE_LEFT)
        if token_id == NO_TOKEN
        else SampledToken(token_id, found.get(index))
        for index, (token_id, row) in enumerate(zip(chosen.tolist(), rows, strict=True))
    )


def _choose(logits_SV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The token of each row, int64 [S] on the logits' device; NO_TOKEN where the logits are not finite."""
    if dispatch.runs_triton(logits_SV.device):
        from server.engine.device_sampling import choose_tokens

        return choose_tokens(logits_SV, rows)
    edited = edit_logits(logits_SV, rows)
    chosen, peaks = row_argmax(edited)
    random_rows = [index for index, row in enumerate(rows) if row.params.temperature >= GREEDY_TEMPERATURE]
    if len(random_rows) == len(rows):
        chosen = _draw_rows(edited, rows)
    elif random_rows:
        chosen[random_rows] = _draw_rows(edited[random_rows], [rows[index] for index in random_rows])
    return torch.where(peaks.isfinite(), chosen, NO_TOKEN)


def _draw_rows(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    temperatures = torch.tensor([row.params.temperature for row in rows])
    uniforms = [uniform(row.params.seed, row.position) for row in rows]
    probs_RV = (logits_RV / temperatures[:, None]).softmax(dim=-1)
    kept_RV = truncate(probs_RV, [row.params for row in rows])
    return draw(kept_RV, torch.tensor(uniforms, dtype=torch.float64))
