"""What weights and a step's work take of a memory, and what that leaves for the KV cache.

Pure, so that no GPU is needed to know whether a model fits one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.tiles import SPAN_TOKENS
from quant.checkpoint.reader import CheckpointReader
from server.engine.config import EngineConfig
from server.engine.errors import EngineSetupError
from server.engine.graph_sizes import GraphSize
from server.model.config import ModelConfig

_GIB = 2**30
# a step holds the logits, what is left of them after the edits, and probabilities, in float32
_LOGIT_COPIES = 3
# what a driver keeps of a layer's launches in a CUDA graph. Not measured: more than the 24 MiB that users of vLLM tell
# of for a graph of 64 layers
_GRAPH_BYTES_PER_LAYER = 2**19


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes. What is not free is taken by others, or by what was loaded already."""

    total: int
    free: int


def weight_bytes(reader: CheckpointReader, dtype: torch.dtype | None) -> int:
    """What a checkpoint's tensors take once loaded: packed modules as stored, others in dtype, or as stored for None.

    Rather less than more, as a layer without a packed kernel is dequantized.
    """
    packed = {name for module in reader.quantized_module_names for name in reader.packed_tensor_names(module)}
    return sum(
        reader.num_bytes(name) if dtype is None or name in packed else math.prod(reader.shape(name)) * dtype.itemsize
        for name in reader.tensor_names
    )


def workspace_bytes(model: ModelConfig, dtype: torch.dtype, *, max_num_tokens: int, max_num_drawn: int) -> int:
    """The most that a step computes in: one layer's activations for its tokens, and the logits of those it draws."""
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    # the stream, its sum and its norm; the heads and what they attended to; the MLP's own
    width = 3 * model.hidden_size + heads + model.num_heads * model.head_dim + _mlp_width(model)
    activations = max_num_tokens * width * dtype.itemsize
    return activations + _LOGIT_COPIES * max_num_drawn * model.vocab_size * torch.float32.itemsize


def graph_bytes(model: ModelConfig, sizes: Sequence[GraphSize]) -> int:
    """What recordings of decoding steps take beside a step's work, about.

    Of each its launches; and once, as they share it, what the largest computes in, with what attention's spans leave to
    be merged.
    """
    if not sizes:
        return 0
    num_spans = max(size.num_seqs * -(-size.context_len // SPAN_TOKENS) for size in sizes)
    # float32: the weighted sum, and two numbers beside it
    spans = num_spans * model.num_heads * (model.head_dim + 2) * torch.float32.itemsize
    work = workspace_bytes(model, torch.float32, max_num_tokens=max(size.num_seqs for size in sizes), max_num_drawn=0)
    return len(sizes) * model.num_layers * _GRAPH_BYTES_PER_LAYER + spans + work


def _mlp_width(model: ModelConfig) -> int:
    """Values that a token's MLP, or its mixture of experts, computes in: gate, up, product, and choices' outputs."""
    dense = 3 * model.intermediate_size
    if model.moe is None:
        return dense
    choices = model.moe.num_experts_per_tok * (3 * model.moe.intermediate_size + model.hidden_size)
    return max(dense, choices + 3 * (model.moe.shared_intermediate_size or 0))


def cache_budget(memory: DeviceMemory, utilization: float, workspace: int) -> int:
    """Bytes for the KV cache on a GPU that holds the weights already; 0 where nothing is left."""
    return max(_room(memory, utilization) - workspace, 0)


def check_gpu_fits(weights: int, workspace: int, memory: DeviceMemory, config: EngineConfig) -> None:
    """Raise EngineSetupError, with the numbers to change, when a GPU has no room for weights and work."""
    room = _room(memory, config.gpu_memory_utilization)
    if weights + workspace > room:
        raise EngineSetupError(
            f"the weights take {weights / _GIB:.1f} GiB and a step's work {workspace / _GIB:.1f} GiB, but "
            f"gpu_memory_utilization {config.gpu_memory_utilization} leaves {max(room, 0) / _GIB:.1f} GiB: of the "
            f"GPU's {memory.total / _GIB:.1f} GiB {memory.free / _GIB:.1f} are free. Raise gpu_memory_utilization, "
            "lower max_num_batched_tokens or max_num_seqs, or serve fewer adapters or a checkpoint of fewer bits"
        )


def check_host_fits(weights: int, available: int) -> None:
    """Raise EngineSetupError when a CPU's memory has no room for the weights, which would end in the kernel's kill."""
    if weights > available:
        raise EngineSetupError(
            f"the weights take {weights / _GIB:.1f} GiB, but {available / _GIB:.1f} GiB of memory are "
            "free: free some, set dtype to bfloat16, or serve fewer adapters or a checkpoint of fewer bits"
        )


def _room(memory: DeviceMemory, utilization: float) -> int:
    return int(memory.total * utilization) - (memory.total - memory.free)
