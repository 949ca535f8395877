"""The engine's settings, resolved before it starts and never changed."""

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
KvCacheDType = Literal["auto", "bfloat16", "float16", "int8", "fp8"]
Device = Literal["auto", "cpu", "cuda"]
GenerationConfig = Literal["auto", "off"]
CpuKernel = Literal["auto", "native", "torch"]


@dataclass(frozen=True)
class AdapterConfig:
    """name: what requests call it. path: the directory that PEFT saved it in."""

    name: str
    path: str


@dataclass(frozen=True)
class EngineConfig:
    """model_path: a checkpoint directory. Sizes are in tokens unless the name says otherwise.

    max_model_len None means what the model's config says, cut to what the KV cache can hold.
    kv_cache_bytes None: on a GPU, gpu_memory_utilization of the device less what the weights take; on a CPU, a
    quarter of the free memory, at most what max_num_seqs sequences of max_model_len need.
    max_num_seqs: requests that run at once; max_waiting: how many more are taken in before QueueFull.
    max_num_batched_tokens: tokens of one step, so how much of a long prompt the running requests wait for. None: by
    device, see server/engine/assembly.py.
    kv_cache_dtype auto: the model's. int8 and fp8: codes with a scale for each token and head.
    num_threads None: as many as torch takes.
    cpu_kernel auto: the native kernels where there is a compiler for them and they can compute the model, else torch's.
    prefix_caching: prompts that begin alike are computed once. deterministic: a request's tokens are bit for bit those
    that it gets alone, whatever is cached, preempted or computed beside it.
    num_speculative_tokens: guesses at what comes next that a step verifies for a sequence, at most; 0 for none.
    adapters: those that requests may choose; all are in memory.
    draft_model_path: a checkpoint directory of a small model that makes the guesses; None: they are looked up.
    enforce_eager: on a GPU, launch every step's kernels one by one instead of replaying CUDA graphs.
    generation_config auto: the model's generation_config.json says how to sample where a request does not.
    """

    model_path: str
    device: Device = "auto"
    dtype: DType = "auto"
    kv_cache_dtype: KvCacheDType = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_waiting: int = 256
    num_threads: int | None = None
    cpu_kernel: CpuKernel = "auto"
    generation_config: GenerationConfig = "auto"
    prefix_caching: bool = True
    deterministic: bool = False
    num_speculative_tokens: int = 0
    adapters: tuple[AdapterConfig, ...] = ()
    draft_model_path: str | None = None
    enforce_eager: bool = False
