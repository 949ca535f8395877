"""Log-probabilities for people: of the chosen token and of the likeliest ones, from the model's own distribution."""

from collections.abc import Sequence

from torch import Tensor

from kernels import dispatch
from server.engine.request import TokenLogprob


def collect_logprobs(logits_SV: Tensor, chosen_S: Tensor, num_top: Sequence[int]) -> tuple[TokenLogprob, ...]:
    """One entry a row: the chosen token's log-probability and the num_top likeliest, from unedited logits [S, V].

    Where no token could be chosen the entry means nothing.
    """
    chosen, top_ids, top_values = _on_device(logits_SV, chosen_S, max(num_top))
    rows = zip(chosen_S.tolist(), chosen.tolist(), top_ids.tolist(), top_values.tolist(), num_top, strict=True)
    return tuple(
        TokenLogprob(token_id, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for token_id, logprob, ids, values, count in rows
    )


def _on_device(logits_SV: Tensor, chosen_S: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen tokens' log-probabilities [S]; the ids of the num_top likeliest and theirs [S, num_top]."""
    if dispatch.runs_triton(logits_SV.device):
        from kernels.fused_logprobs import collect_logprobs

        return collect_logprobs(logits_SV, chosen_S, num_top)
    logprobs = logits_SV.log_softmax(dim=-1)
    top_values, top_ids = logprobs.topk(num_top, dim=-1)
    return logprobs.gather(1, chosen_S.clamp(min=0)[:, None])[:, 0], top_ids, top_values
