"""The tensors that hold keys and values, sized once before the first request. Knows nothing of requests.

A block is block_size tokens of every layer, so one block id names a place in each layer's tensors.
"""

from dataclasses import dataclass

import torch

from kernels.native_cpu import allocate_native_layer
from kernels.paged_batch import PagedLayer
from server.engine import host_memory
from server.engine.config import EngineConfig
from server.engine.errors import EngineSetupError

# what the kernels read well; a CPU gathers blocks, so larger ones mean less work
_DEFAULT_BLOCK_SIZES = {"cuda": 16, "cpu": 32}
_CPU_MEMORY_SHARE = 0.25
_MIB = 2**20


@dataclass(frozen=True)
class KvGeometry:
    """What of the model decides the size of its cache. max_model_len: the longest context it was trained for.

    native: for the native CPU kernels, which have keys in an order of their own.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    max_model_len: int
    native: bool = False

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class KvCacheSize:
    """max_model_len: the longest sequence the engine takes; one of that length always fits."""

    num_blocks: int
    block_size: int
    max_model_len: int


def check_context_len(config: EngineConfig, trained_len: int) -> None:
    """Raise EngineSetupError when max_model_len is more than the context the model was trained for."""
    if config.max_model_len is not None and config.max_model_len > trained_len:
        raise EngineSetupError(
            f"max_model_len is {config.max_model_len}, but the model's context is {trained_len} tokens: "
            f"set max_model_len to at most {trained_len}"
        )


def choose_size(config: EngineConfig, geometry: KvGeometry, device: torch.device) -> KvCacheSize:
    """How many blocks the settings and the memory left after the weights allow.

    Raises EngineSetupError when a sequence of max_model_len would not fit, naming the numbers that would do.
    """
    block_size = config.block_size or _DEFAULT_BLOCK_SIZES[device.type]
    bytes_per_block = block_size * geometry.bytes_per_token
    wanted_len = config.max_model_len or geometry.max_model_len
    useful_blocks = config.max_num_seqs * -(-wanted_len // block_size)
    cache_bytes = _cache_bytes(config, device)
    num_blocks = min(cache_bytes // bytes_per_block, useful_blocks)
    capacity = num_blocks * block_size
    # the length that was asked for; where none was, any that a block holds will do
    shortest_len, name = (
        (block_size, "a block of") if config.max_model_len is None else (config.max_model_len, "max_model_len")
    )
    if capacity < shortest_len:
        smallest = -(-shortest_len // block_size) * bytes_per_block
        raise EngineSetupError(
            f"the KV cache of {cache_bytes} bytes holds {capacity} tokens, fewer than {name} {shortest_len}: "
            f"{_advice(config, device)} (at least {smallest} bytes are needed), "
            f"or lower {'block_size' if config.max_model_len is None else 'max_model_len'}"
        )
    return KvCacheSize(num_blocks, block_size, min(wanted_len, capacity))


def allocate_layers(size: KvCacheSize, geometry: KvGeometry, device: torch.device) -> tuple[PagedLayer, ...]:
    """The caches [num_blocks, H_kv, block_size, D] of each layer.

    On a GPU they are zeroed: its kernels read a block to the end and mask the rest, which must be finite. On a CPU no
    slot is read before it is written, and memory that nobody has touched yet is not taken from the machine.
    """
    allocate = torch.empty if device.type == "cpu" else torch.zeros
    shape = (size.num_blocks, geometry.num_kv_heads, size.block_size, geometry.head_dim)
    try:
        if geometry.native:
            return tuple(allocate_native_layer(*shape) for _ in range(geometry.num_layers))
        return tuple(
            PagedLayer(
                allocate(shape, dtype=geometry.dtype, device=device),
                allocate(shape, dtype=geometry.dtype, device=device),
            )
            for _ in range(geometry.num_layers)
        )
    except RuntimeError as error:
        needed = size.num_blocks * size.block_size * geometry.bytes_per_token
        raise EngineSetupError(
            f"{needed / _MIB:.1f} MiB for the KV cache could not be allocated ({error}): set kv_cache_bytes lower"
        ) from error


def _cache_bytes(config: EngineConfig, device: torch.device) -> int:
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(int(total * config.gpu_memory_utilization) - (total - free), 0)
    return int(host_memory.available_bytes() * _CPU_MEMORY_SHARE)


def _advice(config: EngineConfig, device: torch.device) -> str:
    if config.kv_cache_bytes is None and device.type == "cuda":
        return f"raise gpu_memory_utilization, which is {config.gpu_memory_utilization}, or set kv_cache_bytes"
    if config.kv_cache_bytes is None:
        return "free some memory, or set kv_cache_bytes"
    return f"raise kv_cache_bytes, which is {config.kv_cache_bytes}"
