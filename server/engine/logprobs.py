"""Log-probabilities for people: of the chosen token and of the likeliest ones, from the model's own distribution."""

from collections.abc import Sequence

from torch import Tensor

from server.engine.request import TokenLogprob


def collect_logprobs(logits_SV: Tensor, chosen_S: Tensor, num_top: Sequence[int]) -> tuple[TokenLogprob, ...]:
    """One entry a row: the chosen token's log-probability and the num_top likeliest, from unedited logits [S, V]."""
    logprobs = logits_SV.log_softmax(dim=-1)
    chosen = logprobs.gather(1, chosen_S[:, None])[:, 0]
    top_values, top_ids = logprobs.topk(max(num_top), dim=-1)
    rows = zip(chosen_S.tolist(), chosen.tolist(), top_ids.tolist(), top_values.tolist(), num_top, strict=True)
    return tuple(
        TokenLogprob(token_id, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for token_id, logprob, ids, values, count in rows
    )
