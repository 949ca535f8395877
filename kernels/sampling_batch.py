"""How each row of logits becomes a token: the operands of sampling on the device, and their checks.

Legend: S = rows, V = vocabulary, E = entries of all rows together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# below this a temperature is 0: dividing by it would overflow
GREEDY_TEMPERATURE = 1e-5
# what stands for a token where a row's logits are not finite
NO_TOKEN = -1
MASK_BITS = 32


@dataclass(frozen=True)
class Penalties:
    """repetition, presence, frequency: float32 [S], 1, 0 and 0 where off.

    Row s's prompt and output so far are token_ids int64 [E] at starts[s] .. starts[s + 1], the first
    num_prompt_tokens[s] of them the prompt. Repetition looks at both, presence and frequency at the output.
    starts: int64 [S + 1]. num_prompt_tokens: int64 [S]. max_tokens: of the longest row, on the host.
    """

    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    token_ids: Tensor
    starts: Tensor
    num_prompt_tokens: Tensor
    max_tokens: int


@dataclass(frozen=True)
class LogitBias:
    """Row s adds values float32 [E] to the logits of token_ids int64 [E], both at starts[s] .. starts[s + 1].

    starts: int32 [S + 1]. A value of -inf bars a token.
    """

    starts: Tensor
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class SamplingBatch:
    """temperatures float32 [S] (0: greedy), top_k int32 [S] (0: off), top_p float64 [S] (1: off), min_p float32 [S]
    (0: off). A draw is a function of seeds and positions, int64 [S], alone.

    allowed: int32 [S, ceil(V / 32)], bit i of word w set where token 32 w + i is allowed; None allows all.
    """

    temperatures: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    penalties: Penalties | None = None
    bias: LogitBias | None = None
    allowed: Tensor | None = None

    def check(self, num_rows: int, vocab_size: int) -> dict[str, Tensor]:
        """Every operand under its name. Raises ValueError unless each fits logits [num_rows, vocab_size]."""
        wanted: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
            "temperatures": (self.temperatures, torch.float32, (num_rows,)),
            "top_k": (self.top_k, torch.int32, (num_rows,)),
            "top_p": (self.top_p, torch.float64, (num_rows,)),
            "min_p": (self.min_p, torch.float32, (num_rows,)),
            "seeds": (self.seeds, torch.int64, (num_rows,)),
            "positions": (self.positions, torch.int64, (num_rows,)),
        }
        if self.penalties is not None:
            penalties = self.penalties
            wanted["repetition"] = (penalties.repetition, torch.float32, (num_rows,))
            wanted["presence"] = (penalties.presence, torch.float32, (num_rows,))
            wanted["frequency"] = (penalties.frequency, torch.float32, (num_rows,))
            wanted["penalized token_ids"] = (penalties.token_ids, torch.int64, (-1,))
            wanted["starts"] = (penalties.starts, torch.int64, (num_rows + 1,))
            wanted["num_prompt_tokens"] = (penalties.num_prompt_tokens, torch.int64, (num_rows,))
        if self.bias is not None:
            wanted["bias starts"] = (self.bias.starts, torch.int32, (num_rows + 1,))
            wanted["bias token_ids"] = (self.bias.token_ids, torch.int64, (-1,))
            wanted["bias values"] = (self.bias.values, torch.float32, tuple(self.bias.token_ids.shape))
        if self.allowed is not None:
            wanted["allowed"] = (self.allowed, torch.int32, (num_rows, -(-vocab_size // MASK_BITS)))
        for name, (tensor, dtype, shape) in wanted.items():
            _check_operand(name, tensor, dtype, shape)
        return {name: tensor for name, (tensor, _, _) in wanted.items()}


def _check_operand(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """-1 in the shape stands for any length."""
    fits = tensor.ndim == len(shape) and all(
        wanted in (-1, length) for wanted, length in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits or not tensor.is_contiguous():
        shown = ", ".join("any" if length == -1 else str(length) for length in shape)
        raise ValueError(f"{name} must be contiguous {dtype} [{shown}], not {tensor.dtype} {list(tensor.shape)}")
