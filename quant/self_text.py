"""Calibration text that the model writes itself: sampled from a seed, so the same seed gives the same tokens."""

from collections import deque
from collections.abc import Callable
from itertools import cycle

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kernels.cpu import cpu_traits
from quant.blockwise_model import BlockwiseModel
from quant.device import CUDA, GPU_RESERVE_BYTES, HOST, device_of, free_bytes
from quant.errors import QuantizationError, SourceError
from quant.machine_memory import available_bytes
from quant.overflow import first_not_finite

# long enough for a text to find its subject
PIECE_TOKENS = 256
# short openings over the kinds of text a model is asked for; the model writes the rest
PROMPTS = (
    "Write an encyclopedia article about a river.",
    "Tell me the history of an old city, with dates and names.",
    "Write the first chapter of a novel.",
    "Explain how a computer stores numbers.",
    "Write a Python function and explain it line by line.",
    "Write a newspaper report about a football match.",
    "Describe the life of a famous composer.",
    "Summarize the plot of a film and what critics said about it.",
    "Give step-by-step instructions for repairing a bicycle.",
    "Solve a word problem about trains and show the work.",
    "Write an encyclopedia article about a species of bird.",
    "Describe a naval battle and the ships that took part in it.",
    "Write a letter to a friend about a journey.",
    "What causes earthquakes, and how are they measured?",
    "List ten facts about the human heart.",
    "Write a biography of a scientist of the 19th century.",
)


def open_writer(model: BlockwiseModel, shape: tuple[int, int]) -> PreTrainedModel:
    """The model with all its weights, to write [rows, tokens].

    In bfloat16 where it is stored so or the device multiplies that natively: for a text that is drawn at random it
    is as good, and reading the weights is what takes the time. Else in float32.

    Writing needs all blocks for every token, so they are not read one by one. They are where the model's blocks are
    loaded to, or on the host if a GPU has no room for all. Raises SourceError when the host has none either.
    """
    num_values = _num_parameters(model.model) + shape[0] * shape[1] * _cached_values(model.model)
    if model.device != HOST:
        dtype = _writing_dtype(model, model.device)
        if dtype.itemsize * num_values + GPU_RESERVE_BYTES <= free_bytes(model.device):
            return model.load_whole(dtype, model.device)
    dtype = _writing_dtype(model, HOST)
    num_bytes, num_free = dtype.itemsize * num_values, available_bytes()
    if num_free is not None and num_free < num_bytes:
        raise SourceError(
            f"the model takes about {num_bytes / 1e9:.1f} GB of memory to write its own calibration text, and "
            f"{num_free / 1e9:.1f} GB are free; calibrate on a text alone, with its share, like --calib wikitext:1: "
            "that needs one block at a time"
        )
    return model.load_whole(dtype, HOST)


def write_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shape: tuple[int, int],
    seed: int,
    on_step: Callable[[int, int], None],
) -> Tensor:
    """Token ids int64 [rows, tokens] that the model samples.

    A row is written in pieces of PIECE_TOKENS at most, all pieces side by side: reading the weights takes the time, and
    twice the rows take little more of it. Every other piece starts with a prompt in the chat template, the others with
    the first token alone; after an end token the next such opening follows. on_step(done, total) is called after each
    token of a piece.
    """
    num_rows, num_tokens = shape
    num_pieces = -(-num_tokens // PIECE_TOKENS)
    pieces = (num_rows * num_pieces, -(-num_tokens // num_pieces))
    written = _write_pieces(model, tokenizer, pieces, seed, on_step)
    return written.view(num_rows, -1)[:, :num_tokens].contiguous()


def _write_pieces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shape: tuple[int, int],
    seed: int,
    on_step: Callable[[int, int], None],
) -> Tensor:
    num_rows, num_tokens = shape
    generator = torch.Generator().manual_seed(seed)
    openings = cycle(_openings(model, tokenizer))
    end_ids = _end_ids(model)
    waiting = [deque(next(openings)) for _ in range(num_rows)]
    written = torch.empty(num_rows, num_tokens, dtype=torch.int64)
    column = torch.tensor([queue.popleft() for queue in waiting])
    cache, device = _roomy_cache(model, num_tokens), device_of(model)
    with torch.inference_mode():
        for position in range(num_tokens):
            written[:, position] = column
            on_step(position + 1, num_tokens)
            given = model(column[:, None].to(device), past_key_values=cache, use_cache=True).logits[:, -1]
            # drawn on the host: a GPU may add up in another order each time
            logits = given.to(HOST).float()
            # the sum is finite only where all are, and takes a tenth of the time of looking at each
            if not bool(torch.isfinite(logits.sum())):
                read = written[:, : position + 1].to(device)
                culprit = first_not_finite(model, lambda: model(read, use_cache=False)) or "the model"  # noqa: B023
                raise QuantizationError(f"the model cannot write its own text: the output of {culprit} is not finite")
            column = draw(logits, generator)
            for row, queue in enumerate(waiting):
                if not queue and int(column[row]) in end_ids:
                    queue.extend(next(openings))
                elif queue:
                    column[row] = queue.popleft()
    return written


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token per row, int64 [rows], with the probabilities that logits float32 [rows, vocabulary] stand for.

    One random number a row, looked up among the summed probabilities: torch.multinomial draws one for every token.
    """
    summed = logits.softmax(dim=-1).cumsum(dim=-1)
    places = torch.rand(len(logits), 1, generator=generator) * summed[:, -1:]
    # the first token whose sum is above the place: it has a probability
    return torch.searchsorted(summed, places, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of the cache that has room for all tokens from the start; the usual one copies itself at each token."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_tokens = num_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the room, for keys and values [rows, heads, T, width] like the first ones."""
        super().lazy_initialization(key_states, value_states)
        self._rooms = [
            states.new_empty(*states.shape[:2], self._num_tokens, states.shape[3])
            for states in (key_states, value_states)
        ]

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Put the next tokens' keys and values beside the others; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values


def _roomy_cache(model: PreTrainedModel, num_tokens: int) -> DynamicCache:
    """The model's cache; layers that look back only so far stay as they are."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer(num_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _openings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What rows start with: each prompt in the chat template, if there is one, and the first token alone."""
    first_id = model.config.bos_token_id
    if first_id is None:
        first_id = min(_end_ids(model), default=0)
    if not tokenizer.chat_template:
        return [[first_id]]
    openings = []
    for prompt in PROMPTS:
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise SourceError(f"the model's chat template cannot be rendered: {error}") from error
        openings += [tokenizer(text, add_special_tokens=False)["input_ids"], [first_id]]
    return openings


def _writing_dtype(model: BlockwiseModel, device: torch.device) -> torch.dtype:
    if model.weights.dtype == torch.bfloat16 or device.type == CUDA:
        return torch.bfloat16
    return cpu_traits().dense_dtype


def _num_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _cached_values(model: PreTrainedModel) -> int:
    """Keys and values of one token in all blocks, at most."""
    config = model.config.get_text_config()
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * num_heads * head_width)


def _end_ids(model: PreTrainedModel) -> set[int]:
    """The tokens that end a text of this model; a config gives none, one or several."""
    end_ids = model.config.eos_token_id
    if end_ids is None:
        return set()
    return {end_ids} if isinstance(end_ids, int) else set(end_ids)
