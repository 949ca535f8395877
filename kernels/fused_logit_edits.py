"""Bias, penalties, mask and temperature on whole rows of logits: Triton kernels and their wrapper.

Legend: S = rows, V = vocabulary, E = tokens of all rows' texts.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSE_FLOATS
from kernels.sampling_batch import GREEDY_TEMPERATURE, MASK_BITS, Penalties, SamplingBatch
from kernels.tiles import COPY_WARPS, EDITED_COLUMNS

GREEDY = tl.constexpr(GREEDY_TEMPERATURE)
WORD_BITS = tl.constexpr(MASK_BITS)
# a token's count: bit 0 says that the prompt has it, and each time the output has it adds 2
IN_PROMPT = tl.constexpr(1)
IN_OUTPUT = tl.constexpr(2)
# rows of edited logits start at multiples of this, so that they are read 128 bits at a time
ROW_ALIGNMENT = 16


@triton.jit
def count_tokens_kernel(
    token_ids_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    num_prompt_tokens_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    vocab_size: tl.tensor,
    TILE_TOKENS: tl.constexpr,
) -> None:
    """Program (row, token tile) marks its tokens of token_ids [E] in counts int32 [S, V], which starts as zeros."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    start = tl.load(starts_ptr + row)
    inside = index < tl.load(starts_ptr + row + 1) - start
    num_prompt = tl.load(num_prompt_tokens_ptr + row)
    tokens = tl.load(token_ids_ptr + start + index, mask=inside, other=-1)
    inside = (tokens >= 0) & (tokens < vocab_size)
    # whole numbers: the sum is the same in whatever order they are added
    count_ptrs = counts_ptr + row * vocab_size + tokens
    tl.atomic_or(count_ptrs, tl.full((TILE_TOKENS,), IN_PROMPT, tl.int32), mask=inside & (index < num_prompt))
    tl.atomic_add(count_ptrs, tl.full((TILE_TOKENS,), IN_OUTPUT, tl.int32), mask=inside & (index >= num_prompt))


@triton.jit
def edit_logits_kernel(
    logits_ptr: tl.tensor,
    temperatures_ptr: tl.tensor,
    bias_starts_ptr: tl.tensor,
    bias_token_ids_ptr: tl.tensor,
    bias_values_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    repetition_ptr: tl.tensor,
    presence_ptr: tl.tensor,
    frequency_ptr: tl.tensor,
    allowed_ptr: tl.tensor,
    edited_ptr: tl.tensor,
    logits_stride: tl.tensor,
    edited_stride: tl.tensor,
    vocab_size: tl.tensor,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Program (row, column tile): edited = (logits + bias, penalized, -inf where not allowed) / temperature.

    logits, edited float32 [S, V]; a greedy row is not divided. The pointers of what no row asks for are None.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TILE_COLUMNS
    columns = first + tl.arange(0, TILE_COLUMNS)
    inside = columns < vocab_size
    values = tl.load(logits_ptr + row * logits_stride + columns, mask=inside, other=0.0)
    if bias_starts_ptr is not None:
        for entry in range(tl.load(bias_starts_ptr + row), tl.load(bias_starts_ptr + row + 1)):
            token = tl.load(bias_token_ids_ptr + entry)
            if (token >= first) & (token < first + TILE_COLUMNS):
                values = tl.where(columns == token, values + tl.load(bias_values_ptr + entry), values)
    if counts_ptr is not None:
        counts = tl.load(counts_ptr + row * vocab_size + columns, mask=inside, other=0)
        repetition = tl.load(repetition_ptr + row)
        penalized = tl.where(values > 0, tl.div_rn(values, tl.zeros_like(values) + repetition), values * repetition)
        values = tl.where(counts > 0, penalized, values)
        num_output = (counts // IN_OUTPUT).to(tl.float32)
        once = (counts >= IN_OUTPUT).to(tl.float32)
        values -= tl.load(frequency_ptr + row) * num_output + tl.load(presence_ptr + row) * once
    if allowed_ptr is not None:
        words = tl.load(allowed_ptr + row * tl.cdiv(vocab_size, WORD_BITS) + columns // WORD_BITS, mask=inside, other=0)
        values = tl.where((words >> (columns % WORD_BITS)) & 1 != 0, values, float("-inf"))
    temperature = tl.load(temperatures_ptr + row)
    divisor = tl.where(temperature < GREEDY, 1.0, temperature)
    values = tl.div_rn(values, tl.zeros_like(values) + divisor)
    tl.store(edited_ptr + row * edited_stride + columns, values, mask=inside)


def edit_logits(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Edited and scaled logits, float32 [S, V], of float32 logits [S, V] and a batch that was checked against them."""
    num_rows, vocab_size = logits.shape
    padded_size = triton.cdiv(vocab_size, ROW_ALIGNMENT) * ROW_ALIGNMENT
    edited = torch.empty((num_rows, padded_size), dtype=torch.float32, device=logits.device)[:, :vocab_size]
    bias, penalties = batch.bias, batch.penalties
    counts = None if penalties is None else _count_tokens(penalties, vocab_size)
    edit_logits_kernel[(num_rows, triton.cdiv(vocab_size, EDITED_COLUMNS))](
        logits,
        batch.temperatures,
        None if bias is None else bias.starts,
        None if bias is None else bias.token_ids,
        None if bias is None else bias.values,
        counts,
        None if penalties is None else penalties.repetition,
        None if penalties is None else penalties.presence,
        None if penalties is None else penalties.frequency,
        batch.allowed,
        edited,
        logits.stride(0),
        edited.stride(0),
        vocab_size,
        TILE_COLUMNS=EDITED_COLUMNS,
        num_warps=COPY_WARPS,
        enable_fp_fusion=FUSE_FLOATS,
    )
    return edited


def _count_tokens(penalties: Penalties, vocab_size: int) -> Tensor:
    """int32 [S, V]: which tokens a row's text has, and how often its output has them."""
    num_rows = len(penalties.num_prompt_tokens)
    counts = torch.zeros((num_rows, vocab_size), dtype=torch.int32, device=penalties.token_ids.device)
    if penalties.max_tokens > 0:
        count_tokens_kernel[(num_rows, triton.cdiv(penalties.max_tokens, EDITED_COLUMNS))](
            penalties.token_ids,
            penalties.starts,
            penalties.num_prompt_tokens,
            counts,
            vocab_size,
            TILE_TOKENS=EDITED_COLUMNS,
            num_warps=COPY_WARPS,
            enable_fp_fusion=FUSE_FLOATS,
        )
    return counts
