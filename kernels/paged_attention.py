"""Attention over the paged cache: the checked wrapper around the kernels of decode and prefill.

Which kernel a sequence takes, and its sums, never depend on its neighbours in the batch. Nor do the sums of a prompt's
token depend on how the prompt is cut into chunks, as long as each of them has two tokens or more.
Legend: T = tokens of the step, H = query heads, D = head width.
"""

import torch
from torch import Tensor

from kernels.attention_operands import check_attention
from kernels.decode_attention import decode
from kernels.paged_batch import AttentionBatch, PagedLayer
from kernels.prefill_attention import prefill


def paged_attention(
    query: Tensor,
    layer: PagedLayer,
    batch: AttentionBatch,
    *,
    softmax_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of query [T, H, D] fp16 or bf16 over each sequence's cached tokens: [T, H, D].

    What the settings mean is defined in `reference.paged_attention`; sinks [H] of any float type. Scores and sums are
    float32. Raises ValueError for operands that do not fit.
    """
    operands = check_attention(
        query,
        layer,
        batch,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
    )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if query.shape[0] == 0:
        return out
    # both, for a mixed batch: a sequence is left alone by the kernel that is not for it
    decode(operands, out)
    if batch.max_query_len > 1:
        prefill(operands, out)
    return out
