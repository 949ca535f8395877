"""The tensors that hold keys and values, sized once before the first request. Knows nothing of requests.

A block is block_size tokens of every layer, so one block id names a place in each layer's tensors.
"""

from dataclasses import dataclass, replace

import torch

from kernels.kv_codes import CODE_DTYPES
from kernels.native_cpu import allocate_native_layer
from kernels.paged_batch import PagedLayer, allocate_layer
from server.engine import host_memory
from server.engine.config import EngineConfig, KvCacheDType
from server.engine.errors import EngineSetupError
from server.engine.memory_plan import DeviceMemory, cache_budget

# a tile of the kernels is one block then; a CPU gathers blocks, so larger ones mean less work
_DEFAULT_BLOCK_SIZES = {"cuda": 64, "cpu": 32}
_CACHE_DTYPES: dict[KvCacheDType, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.uint8,
    "fp8": torch.float8_e4m3fn,
}
_CPU_MEMORY_SHARE = 0.25
_MIB = 2**20


@dataclass(frozen=True)
class KvGeometry:
    """What decides the size of the cache. dtype: of the cache. max_model_len: the longest context of the training.

    native: for the native CPU kernels, which have keys in an order of their own. draft: of the model that guesses,
    whose cache has as many blocks. num_scratch_blocks: beyond those that sequences get.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    max_model_len: int
    native: bool = False
    draft: "KvGeometry | None" = None
    num_scratch_blocks: int = 0

    def with_scratch_blocks(self, num_blocks: int) -> "KvGeometry":
        """The same with so many, the draft model's too."""
        draft = None if self.draft is None else self.draft.with_scratch_blocks(num_blocks)
        return replace(self, draft=draft, num_scratch_blocks=num_blocks)

    @property
    def bytes_per_token(self) -> int:
        scale_bytes = torch.float32.itemsize if self.dtype in CODE_DTYPES else 0
        own = 2 * self.num_layers * self.num_kv_heads * (self.head_dim * self.dtype.itemsize + scale_bytes)
        return own + (self.draft.bytes_per_token if self.draft is not None else 0)


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


def choose_dtype(config: EngineConfig, model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the cache holds. Raise EngineSetupError for floats that a GPU's kernels do not read beside the model's."""
    if config.kv_cache_dtype == "auto":
        return model_dtype
    dtype = _CACHE_DTYPES[config.kv_cache_dtype]
    if device.type == "cuda" and dtype.itemsize > 1 and dtype != model_dtype:
        model_name = str(model_dtype).removeprefix("torch.")
        raise EngineSetupError(
            f"kv_cache_dtype is {config.kv_cache_dtype}, but the model computes in {model_name}, and the GPU's kernels "
            "read a cache of that: set kv_cache_dtype to auto, int8 or fp8, or dtype to what the cache is to hold"
        )
    return dtype


def choose_size(
    config: EngineConfig, geometry: KvGeometry, device: torch.device, workspace_bytes: int = 0
) -> KvCacheSize:
    """How many blocks the settings and the memory left after the weights allow, on a GPU beside a step's work.

    Raises EngineSetupError when a sequence of max_model_len would not fit, naming the numbers that would do.
    """
    block_size = config.block_size or _DEFAULT_BLOCK_SIZES[device.type]
    if geometry.dtype in CODE_DTYPES and block_size % 2:
        raise EngineSetupError(
            f"block_size is {block_size}, but a KV cache of 8 bits keeps tokens in pairs: set it to an even number"
        )
    bytes_per_block = block_size * geometry.bytes_per_token
    wanted_len = config.max_model_len or geometry.max_model_len
    useful_blocks = config.max_num_seqs * -(-wanted_len // block_size)
    cache_bytes = _cache_bytes(config, device, workspace_bytes)
    num_blocks = min(max(cache_bytes // bytes_per_block - geometry.num_scratch_blocks, 0), useful_blocks)
    capacity = num_blocks * block_size
    # the length that was asked for; where none was, any that a block holds will do
    shortest_len, name = (
        (block_size, "a block of") if config.max_model_len is None else (config.max_model_len, "max_model_len")
    )
    if capacity < shortest_len:
        smallest = (-(-shortest_len // block_size) + geometry.num_scratch_blocks) * bytes_per_block
        raise EngineSetupError(
            f"the KV cache of {cache_bytes} bytes holds {capacity} tokens, fewer than {name} {shortest_len}: "
            f"{_advice(config, device)} (at least {smallest} bytes are needed), "
            f"or lower {'block_size' if config.max_model_len is None else 'max_model_len'}"
        )
    return KvCacheSize(num_blocks, block_size, min(wanted_len, capacity))


def allocate_layers(size: KvCacheSize, geometry: KvGeometry, device: torch.device) -> tuple[PagedLayer, ...]:
    """The caches of each layer, as `PagedLayer` describes them; scratch blocks are the last ones.

    Nothing is written to them: no slot is read before it is, and memory that nobody has touched yet is not taken from
    the machine.
    """
    num_blocks = size.num_blocks + geometry.num_scratch_blocks
    try:
        if geometry.native:
            shape = (num_blocks, geometry.num_kv_heads, size.block_size, geometry.head_dim)
            return tuple(allocate_native_layer(*shape) for _ in range(geometry.num_layers))
        return tuple(
            allocate_layer(
                num_blocks,
                geometry.num_kv_heads,
                size.block_size,
                geometry.head_dim,
                dtype=geometry.dtype,
                device=device,
            )
            for _ in range(geometry.num_layers)
        )
    except RuntimeError as error:
        needed = num_blocks * size.block_size * geometry.bytes_per_token
        raise EngineSetupError(
            f"{needed / _MIB:.1f} MiB for the KV cache could not be allocated ({error}): set kv_cache_memory lower"
        ) from error


def gpu_memory(device: torch.device) -> DeviceMemory:
    """The GPU's, after what this process keeps for later use has been given back."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free)


def _cache_bytes(config: EngineConfig, device: torch.device, workspace_bytes: int) -> int:
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if device.type == "cuda":
        return cache_budget(gpu_memory(device), config.gpu_memory_utilization, workspace_bytes)
    return int(host_memory.available_bytes() * _CPU_MEMORY_SHARE)


def _advice(config: EngineConfig, device: torch.device) -> str:
    if config.kv_cache_bytes is None and device.type == "cuda":
        eager = "" if config.enforce_eager else ", or set enforce_eager"
        return f"raise gpu_memory_utilization, which is {config.gpu_memory_utilization}, or set kv_cache_memory{eager}"
    if config.kv_cache_bytes is None:
        return "free some memory, or set kv_cache_memory"
    return f"raise kv_cache_memory, which is {config.kv_cache_bytes}"
