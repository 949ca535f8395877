"""For how many sequences, and for contexts of which length, decoding is recorded: plain functions of the settings."""

from dataclasses import dataclass
from itertools import product

# a step of more sequences has so much to compute that launching it costs nothing beside
MAX_GRAPH_SEQS = 256
# a graph of attention starts programs for the longest context that it serves. Those for keys that no sequence has end
# after a few instructions, at most three for each that works
_FIRST_CONTEXT_LEN = 2048
_CONTEXT_FACTOR = 4


@dataclass(frozen=True, order=True)
class GraphSize:
    """The most that a recorded step holds: sequences with one new token each, and tokens of the longest of them."""

    num_seqs: int
    context_len: int


def graph_sizes(max_num_seqs: int, max_model_len: int) -> tuple[GraphSize, ...]:
    """The sizes to record, the largest first, so that the smaller ones find their memory in what those took."""
    sizes = product(batch_sizes(max_num_seqs), context_sizes(max_model_len))
    return tuple(GraphSize(*size) for size in sorted(sizes, reverse=True))


def batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, every 8th up to 64, every 16th up to MAX_GRAPH_SEQS, and max_num_seqs itself where it is below that."""
    regular = (1, 2, 4, *range(8, 64, 8), *range(64, MAX_GRAPH_SEQS + 1, 16))
    largest = min(max_num_seqs, MAX_GRAPH_SEQS)
    return (*(size for size in regular if size < largest), largest)


def context_sizes(max_model_len: int) -> tuple[int, ...]:
    """2048 tokens, four times as many, and so on, up to max_model_len."""
    sizes = []
    size = _FIRST_CONTEXT_LEN
    while size < max_model_len:
        sizes.append(size)
        size *= _CONTEXT_FACTOR
    return (*sizes, max_model_len)
