"""Wires an engine from its settings: device, model, KV cache, scheduler, runner. The loop comes out ready to step."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kernels import dispatch
from kernels.native_cpu import KV_DTYPE
from kernels.paged_batch import PagedLayer
from quant.checkpoint.reader import CheckpointReader
from quant.errors import QuantError
from server.engine import host_memory
from server.engine.block_pool import BlockPool
from server.engine.config import EngineConfig
from server.engine.draft_length import Speculation
from server.engine.draft_model import (
    build_draft_runner,
    build_drafter,
    check_draft_kernels,
    check_draft_model,
    draft_cost,
    load_draft_model,
)
from server.engine.errors import EngineSetupError
from server.engine.graph_recorder import GraphRecorder
from server.engine.graph_sizes import graph_sizes
from server.engine.kernel_choice import NATIVE_CACHE_DTYPES, KernelChoice, choose_kernels
from server.engine.kv_cache import (
    KvCacheSize,
    KvGeometry,
    allocate_layers,
    check_context_len,
    choose_dtype,
    choose_size,
    gpu_memory,
)
from server.engine.loop import EngineLoop, Publish
from server.engine.memory_plan import check_gpu_fits, check_host_fits, graph_bytes, weight_bytes, workspace_bytes
from server.engine.model_runner import ModelRunner
from server.engine.request import ModelInfo, SamplingDefaults
from server.engine.runner_setup import (
    BuiltRunner,
    Report,
    build_graphs,
    choose_recorder,
    get_ready,
    records_graphs,
)
from server.engine.sampling_defaults import read_sampling_defaults
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.warm_up import WarmUpLimits
from server.model.adapter import Adapter, open_adapter
from server.model.adapter_base import fit_adapters
from server.model.adapter_stacks import adapter_bytes, adapter_row_bytes
from server.model.config import DTYPES, ModelConfig, read_model_config
from server.model.decoder import Decoder
from server.model.fixed_rows import fix_rows
from server.model.loader import LoadedModel, ignore_load_progress, load_model
from server.model.moe import Moe

_GPU_STEP_TOKENS = 2048
# a running request waits for it once a step. The demo model on two cores that others use too: 256 tokens take 2 s,
# 512 take 5 s, 2047 take 30 s one token 0.1 s, so short ones lose no time; alone 0.9, 1.4, 10 and 0.04 s
_CPU_PREFILL_CHUNK = 256
# the native kernels take 512 tokens in 0.2 s there, and a prompt of so many takes a fifteenth less in one go
_NATIVE_PREFILL_CHUNK = 512

# where deterministic, prompts share whole chunks that are whole blocks: a multiple of every default size of a block
_WHOLE_BLOCKS = 64

# what the row of one more token adds to a step of one, as a part of it: python -m benchmarks.speculation prints it
_NATIVE_ROW_COST = 0.15
_CPU_ROW_COST = 0.35
# not measured: what a row of activations adds to reading the weights, and room for attention over the context
_GPU_ROW_COST = 0.02

# what assemble_engine raises when settings, machine or checkpoint are at fault: a sentence, not a defect of ours
SETUP_ERRORS = (EngineSetupError, QuantError, ValueError, OSError)


def resolve_device(config: EngineConfig) -> torch.device:
    """The device the settings ask for; auto is the GPU where there is one. Raises EngineSetupError without one."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EngineSetupError("device is cuda, but torch sees no NVIDIA GPU here: use cpu, or auto")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def choose_limits(config: EngineConfig, device: torch.device, cpu_chunk: int = _CPU_PREFILL_CHUNK) -> SchedulerLimits:
    """What one step may hold. Raises EngineSetupError when the settings contradict each other.

    On a CPU, and wherever a request must get the tokens that it gets alone, a prompt is cut at fixed places: the sums
    of its linears come out differently by a last bit for another number of rows.
    """
    is_cpu = device.type == "cpu"
    num_tokens = config.max_num_batched_tokens or (cpu_chunk + config.max_num_seqs if is_cpu else _GPU_STEP_TOKENS)
    chunk = min(cpu_chunk, num_tokens - config.max_num_seqs + 1)
    if chunk > _WHOLE_BLOCKS:
        chunk -= chunk % _WHOLE_BLOCKS
    return SchedulerLimits(
        config.max_num_seqs,
        num_tokens,
        # where there is no room for a chunk, SchedulerLimits says so
        max(chunk, 1) if is_cpu or config.deterministic else None,
        prefix_caching=config.prefix_caching,
        deterministic=config.deterministic,
        speculation=_choose_speculation(config, _CPU_ROW_COST if is_cpu else _GPU_ROW_COST),
    )


def _choose_speculation(config: EngineConfig, row_cost: float) -> Speculation | None:
    if not config.num_speculative_tokens:
        return None
    return Speculation(config.num_speculative_tokens, row_cost, draft_cost(config))


def assemble_engine(config: EngineConfig, report: Report, publish: Publish) -> tuple[EngineLoop, ModelInfo]:
    """Load the model and size the cache. Raises one of SETUP_ERRORS with a sentence for whoever starts the engine."""
    # what can be refused is refused before the weights are read
    device = resolve_device(config)
    check_draft_model(config, read_model_config(Path(config.model_path)))
    choose_limits(config, device)
    _set_threads(config.num_threads)
    directory = Path(config.model_path)
    dtype = None if config.dtype == "auto" else DTYPES[config.dtype]
    kernels = _check_and_choose_kernels(config, read_model_config(directory), dtype, device)
    adapters = open_adapters(config, directory)
    _check_memory(config, directory, dtype, device, adapters, is_native=kernels.native is not None)
    sampling_defaults = SamplingDefaults() if config.generation_config == "off" else read_sampling_defaults(directory)
    model = load_model(directory, device, dtype, report, kernels.native, config.max_model_len, adapters)
    draft = load_draft_model(config, device, dtype, kernels)
    recorder = choose_recorder(config, device)
    loop, info = wire_engine(
        config, model, device, kernels, sampling_defaults, publish, draft, recorder=recorder, report=report
    )
    notes = tuple(adapter.note for adapter in adapters if adapter.note)
    doubts = tuple(adapter.doubt for adapter in adapters if adapter.doubt)
    return loop, replace(info, adapter_notes=notes, adapter_doubts=doubts)


def wire_engine(
    config: EngineConfig,
    model: LoadedModel,
    device: torch.device,
    kernels: KernelChoice,
    sampling_defaults: SamplingDefaults,
    publish: Publish,
    draft: LoadedModel | None = None,
    recorder: GraphRecorder | None = None,
    report: Report = ignore_load_progress,
) -> tuple[EngineLoop, ModelInfo]:
    """The engine around a model that is on the device. Raises EngineSetupError when no cache of the settings fits.

    draft: the model that guesses, on the same device. recorder: what decoding is recorded with before this returns.
    """
    dtype = _dtype_of(model)
    geometry = replace(_loaded_geometry(config, model, device), draft=_draft_geometry(config, draft, device))
    geometry = geometry.with_scratch_blocks(int(recorder is not None))
    limits = choose_limits(config, device)
    workspace = _workspace(model.config, dtype, limits, model.adapters)
    size = choose_size(config, geometry, device, workspace)
    if recorder is not None:
        models = [one.config for one in (model, draft) if one is not None]
        # of contexts that the cache can hold
        size = choose_size(config, geometry, device, workspace + _graph_bytes(config, models, size.max_model_len))
    if kernels.native is not None:
        limits = _native_limits(config, device)
    layers = allocate_layers(size, geometry, device)
    drafting = build_draft_runner(draft, geometry.draft, size, limits, device, recorder)
    drafter = build_drafter(drafting, size, limits)
    scheduler = Scheduler(limits, BlockPool(size.num_blocks, size.block_size), drafter)
    built = _build_runner(config, model, layers, limits, size, recorder)
    # a draft model's graphs first, of which a step replays several
    get_ready([*([drafting] if drafting is not None else []), built], device, report)
    graphs = "" if built.graphs is None else f", decoding in {built.graphs.num_recorded} graphs"
    info = ModelInfo(
        model_path=config.model_path,
        max_model_len=size.max_model_len,
        vocab_size=model.config.vocab_size,
        eos_token_ids=model.config.eos_token_ids,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        num_blocks=size.num_blocks,
        block_size=size.block_size,
        sampling_defaults=sampling_defaults,
        kernels=kernels.description + graphs,
        adapters=built.limits.adapters,
    )
    return EngineLoop(scheduler, built.runner, info, publish), info


def _native_limits(config: EngineConfig, device: torch.device) -> SchedulerLimits:
    """With the native kernels a row never depends on what is beside it or on how its prompt was cut.

    So there is nothing to keep apart.
    """
    limits = choose_limits(config, device, _NATIVE_PREFILL_CHUNK)
    speculation = _choose_speculation(config, _NATIVE_ROW_COST)
    return replace(limits, deterministic=False, copies_blocks=True, speculation=speculation)


def _build_runner(
    config: EngineConfig,
    model: LoadedModel,
    layers: tuple[PagedLayer, ...],
    limits: SchedulerLimits,
    size: KvCacheSize,
    recorder: GraphRecorder | None,
) -> BuiltRunner:
    decoder, device = model.decoder, model.decoder.embedding.device
    adapters = tuple(adapter.name for adapter in config.adapters)
    within = WarmUpLimits(
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        size.max_model_len,
        model.config.vocab_size,
        size.block_size,
        adapters,
    )
    if not isinstance(decoder, Decoder):
        return BuiltRunner(ModelRunner(decoder, layers, None, adapters), None, within)
    is_isolated = device.type == "cpu" or config.deterministic
    max_rows_together = dispatch.max_rows_together(device) if is_isolated else None
    if config.deterministic and _mixes_by_floats(decoder, device):
        # each sequence alone: how many rows an expert gets follows from who runs beside it
        max_rows_together = 1
    if config.deterministic and max_rows_together is not None:
        decoder = fix_rows(decoder, max_rows_together)
    most_together = min(limits.max_num_seqs, max_rows_together or limits.max_num_seqs)
    graphs = build_graphs(decoder, layers, most_together, size.max_model_len, recorder)
    return BuiltRunner(ModelRunner(decoder, layers, max_rows_together, adapters, graphs), graphs, within)


def _graph_bytes(config: EngineConfig, models: Sequence[ModelConfig], max_model_len: int) -> int:
    """What recorded steps of these models take."""
    lens = [min(max_model_len, model.max_position_embeddings) for model in models]
    return sum(
        graph_bytes(model, graph_sizes(config.max_num_seqs, length)) for model, length in zip(models, lens, strict=True)
    )


def _mixes_by_floats(decoder: Decoder, device: torch.device) -> bool:
    """Whether a mixture of experts has products of floats, which sum otherwise for another number of rows.

    Where the kernels are Triton's its router is one.
    """
    mixtures = [layer.mlp for layer in decoder.layers if isinstance(layer.mlp, Moe)]
    experts = [weights for mixture in mixtures for weights in (mixture.gate_up, mixture.down)]
    return any(dispatch.runs_triton(device) or isinstance(weights, torch.Tensor) for weights in experts)


def _set_threads(num_threads: int | None) -> None:
    if num_threads is None:
        return
    num_cpus = os.cpu_count() or 1
    if num_threads > num_cpus:
        # OpenMP crashes on what it cannot start
        raise EngineSetupError(f"num_threads is {num_threads}, but there are {num_cpus} CPUs: set it to at most that")
    torch.set_num_threads(num_threads)


def _check_and_choose_kernels(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype | None, device: torch.device
) -> KernelChoice:
    """Raise EngineSetupError for settings that the model's config contradicts, before anything is compiled or read."""
    check_context_len(config, model.max_position_embeddings)
    # as load_model chooses; None where the weights themselves decide
    expected_dtype = dtype or (torch.float32 if device.type == "cpu" else model.dtype)
    # with native kernels a cache takes least: what is too little then always is
    may_be_native = device.type == "cpu" and config.kv_cache_dtype in NATIVE_CACHE_DTYPES
    _check_cache_size(config, model, expected_dtype, device, is_native=may_be_native)
    kernels = choose_kernels(config, device, Path(config.model_path))
    _check_cache_size(config, model, expected_dtype, device, is_native=kernels.native is not None)
    _check_speculation(config, is_native=kernels.native is not None)
    check_draft_kernels(config, kernels)
    if kernels.native is not None:
        # what is left to torch is small, and threads of its own would fight for the cores: 4 ms for a maximum
        torch.set_num_threads(1)
    return kernels


def _check_speculation(config: EngineConfig, *, is_native: bool) -> None:
    if config.deterministic and config.num_speculative_tokens and not is_native:
        raise EngineSetupError(
            f"deterministic is set and num_speculative_tokens is {config.num_speculative_tokens}, but only the native "
            "CPU kernels compute a token among guesses as they compute it alone: leave one of the two out"
        )


def open_adapters(config: EngineConfig, directory: Path) -> tuple[Adapter, ...]:
    """Those of the settings, checked against the model. Raises CheckpointError naming what is wrong."""
    if not config.adapters:
        return ()
    model = read_model_config(directory)
    adapters = [open_adapter(adapter.name, Path(adapter.path), model) for adapter in config.adapters]
    return fit_adapters(adapters, directory)


def _check_memory(
    config: EngineConfig,
    directory: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    adapters: Sequence[Adapter],
    *,
    is_native: bool,
) -> None:
    """Raise EngineSetupError for weights and adapters that the device has no room for."""
    model = read_model_config(directory)
    directories = (directory, *([Path(config.draft_model_path)] if config.draft_model_path is not None else []))
    readers = [CheckpointReader.open(one) for one in directories]
    if device.type == "cpu":
        computed = dtype or torch.float32
        # the native kernels keep the embedding as it is stored
        weights = sum(weight_bytes(reader, None if is_native else computed) for reader in readers)
        weights += adapter_bytes(adapters, model, computed)
        check_host_fits(weights, host_memory.available_bytes())
        return
    dtype = dtype or model.dtype or torch.bfloat16
    workspace = _workspace(model, dtype, choose_limits(config, device), adapters)
    weights = sum(weight_bytes(reader, dtype) for reader in readers) + adapter_bytes(adapters, model, dtype)
    check_gpu_fits(weights, workspace, gpu_memory(device), config)


def _workspace(model: ModelConfig, dtype: torch.dtype, limits: SchedulerLimits, adapters: Sequence[Adapter]) -> int:
    of_adapters = limits.max_num_batched_tokens * adapter_row_bytes(adapters, model)
    return of_adapters + workspace_bytes(
        model, dtype, max_num_tokens=limits.max_num_batched_tokens, max_num_drawn=limits.max_num_drawn
    )


def _check_cache_size(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype | None, device: torch.device, *, is_native: bool
) -> None:
    if dtype is None:
        return
    geometry = _geometry(config, model, dtype, device, is_native=is_native)
    if config.kv_cache_bytes is not None:
        choose_size(config, geometry, device)


def _draft_geometry(config: EngineConfig, draft: LoadedModel | None, device: torch.device) -> KvGeometry | None:
    return None if draft is None else _loaded_geometry(config, draft, device)


def _loaded_geometry(config: EngineConfig, model: LoadedModel, device: torch.device) -> KvGeometry:
    return _geometry(config, model.config, _dtype_of(model), device, is_native=model.is_native)


def _dtype_of(model: LoadedModel) -> torch.dtype:
    """What it computes in."""
    return model.config.dtype or model.decoder.embedding.dtype


def _geometry(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, *, is_native: bool
) -> KvGeometry:
    return KvGeometry(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=KV_DTYPE if is_native else choose_dtype(config, dtype, device),
        max_model_len=model.max_position_embeddings,
        native=is_native,
        num_scratch_blocks=int(records_graphs(config, device)),
    )
