"""The walk of a quantization: open, calibrate, take the blocks one by one, measure, write. It owns the opened model."""

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kernels.layout import PackedWeight
from kernels.reference import dequantize
from quant.bit_allocation import OptionRange
from quant.block import check_finite, plain_parameters, round_block_plainly, round_plain_parameters
from quant.block_search import OpenBlock, search_block
from quant.block_structure import BlockStructures
from quant.blockwise_model import BlockwiseModel
from quant.calibration import CalibrationText, CalibrationTokens, calibration_tokens, read_texts
from quant.checkpoint.folded_scales import FOLDED_SCALES_FILE, ModuleScales
from quant.checkpoint.location import recorded_name
from quant.checkpoint.output_format import check_fits
from quant.checkpoint.stored_module import bits_per_weight
from quant.checkpoint.writer import CheckpointWriter, check_place
from quant.device import (
    HOST,
    ChosenDevice,
    Gpu,
    asked_gpu,
    choose_device,
    find_gpu,
    on_host,
    peak_bytes,
    release_cache,
    telling_when_full,
)
from quant.device_memory import device_bytes
from quant.disk_space import (
    budget_bits_of,
    expected_bytes,
    finished_bytes,
    list_memory_bytes,
    planned_modules,
    scratch_bytes,
)
from quant.held_out import HeldOutStates, check_quality, read_windows
from quant.input_statistics import Streams
from quant.kept_states import KeptChunks
from quant.kept_tensors import Scratch
from quant.model_card import CARD_FILE, model_card, read_licence
from quant.model_plan import HeadPlan, ModelPlan, mix, plain_names, plan_model, shortcomings
from quant.model_structure import stored_modules, stored_tensors, untie
from quant.original_weights import RoundedWeights
from quant.output_head import HeadInput, round_head_plainly, search_head
from quant.progress import (
    BlockListener,
    ProgressListener,
    ProgressMeter,
    ignore_block,
    ignore_notice,
    ignore_progress,
)
from quant.recipe import Recipe
from quant.report import REPORT_FILE, BlockError, CalibrationSummary, HeldOutQuality, LayerLoss, Report, shares_of
from quant.resume import FinishedBlock, FinishedWork, replay_block, run_digest
from quant.scale_fold import STORAGE_DTYPE
from quant.sensitivity import measure_sensitivity, mixture_of
from quant.source import SourceModel, context_tokens, open_streamed


@dataclass(frozen=True)
class Job:
    """One quantization under way: what was asked, the original, how its blocks are quantized, on what, where they go.

    model: the source's, with its weights. num_resumed: the blocks that an earlier run had finished. start_s: when it
    began, on the monotonic clock; as much earlier as that run had worked.
    """

    recipe: Recipe
    source: SourceModel
    model: BlockwiseModel
    plan: ModelPlan
    device: ChosenDevice
    writer: CheckpointWriter
    finished: FinishedWork
    meter: ProgressMeter
    on_block: BlockListener
    num_resumed: int
    start_s: float


@dataclass(frozen=True)
class SearchNumbers:
    """What the search looked at and says of its losses; empty for plain rounding, which searches nothing.

    head: the output head, where it is quantized.
    """

    calibration: CalibrationSummary | None = None
    layers: tuple[LayerLoss, ...] = ()
    blocks: tuple[BlockError, ...] = ()
    head: PackedWeight | None = None


@torch.no_grad()
def quantize(
    recipe: Recipe,
    source_path: Path,
    out: Path,
    listener: ProgressListener = ignore_progress,
    on_notice: Callable[[str], None] = ignore_notice,
    on_block: BlockListener = ignore_block,
    find: Callable[[], Gpu | None] = find_gpu,
) -> Report:
    """Quantize the model at source_path (a directory or a .gguf file) into the new directory out.

    `out` appears whole or not at all. A run that was killed, or whose disk or GPU filled up, goes on after the last
    block it finished when the same is asked for again; on_notice hears so, in sentences. on_block hears of every block
    that is searched. find: looks for a GPU. Raises RecipeError, SourceError, OutputError or CheckpointError for bad
    input before the long work starts, QuantizationError when a result is not finite, or worse than the recipe allows.
    """
    start_s = time.monotonic()
    check_place(out)
    gpu = asked_gpu(recipe.device, find)
    texts = read_texts(recipe) if recipe.steps.calibrates else ()
    meter = ProgressMeter(listener)
    meter.report("load", 0, 1)
    source, model = open_streamed(source_path, on_notice)
    meter.report("load", 1, 1)
    recipe = recipe.within_context(context_tokens(source.config))
    plan = plan_model(recipe, source.model)
    planned = planned_modules(source.model, plan)
    check_fits(recipe.output_format, planned)
    budget_bits = budget_bits_of(recipe, source.model, plan)
    files = source.side_files()
    num_bytes = expected_bytes(source.model, planned, budget_bits) + sum(map(len, files.values()))
    num_bytes += finished_bytes(plan, planned, budget_bits) + scratch_bytes(recipe, source.model, planned)
    device = _choose_device(recipe, gpu, device_bytes(source.model, plan), on_notice)
    finished = FinishedWork(run_digest(recipe, source_path, texts), on_notice)
    with CheckpointWriter(
        out, expected_bytes=num_bytes, output_format=recipe.output_format, accepts=finished.accepts
    ) as writer:
        num_resumed = finished.num_blocks
        if num_resumed:
            on_notice(_resumption(num_resumed, len(plan.blocks)))
            start_s -= finished.read_block(num_resumed - 1).seconds
        model = replace(model, device=device.device)
        job = Job(recipe, source, model, plan, device, writer, finished, meter, on_block, num_resumed, start_s)
        with telling_when_full(device):
            report = _quantize(job, texts, budget_bits)
        card = model_card(report, out.name, read_licence(source_path), source.config.model_type)
        made = {REPORT_FILE: report.to_bytes(), CARD_FILE: card, FOLDED_SCALES_FILE: writer.folded_scales()}
        writer.commit(_checkpoint_config(job), files={**files, **made})
    return report


def _choose_device(
    recipe: Recipe, gpu: Gpu | None, needed_bytes: int, on_notice: Callable[[str], None]
) -> ChosenDevice:
    device = choose_device(recipe.device, gpu, needed_bytes)
    if device.notice is not None:
        on_notice(device.notice)
    return device


def _quantize(job: Job, texts: tuple[CalibrationText, ...], budget_bits: int | None) -> Report:
    """Write all tensors of the checkpoint."""
    tokens = _tokens(job, texts) if job.recipe.steps.calibrates else None
    if tokens is not None and budget_bits is not None:
        job = replace(job, plan=_mix(job, tokens, budget_bits))
    held_out = _held_out(job)
    numbers = _round_blocks(job, held_out) if tokens is None else _search_blocks(job, tokens, held_out)
    _write_outer_tensors(job)
    return _report(job, numbers, _measure(job, held_out, numbers.head))


def _report(job: Job, numbers: SearchNumbers, held_out: HeldOutQuality | None) -> Report:
    specs = planned_modules(job.source.model, job.plan)
    blocks = {name: specs[name] for name in job.plan.block_groupings()}
    stored = stored_modules(job.source.model, [layer.name for layer in numbers.layers])
    return Report(
        source=recorded_name(job.source.path),
        recipe=job.recipe,
        group_size=job.plan.grouping.group_size,
        mixture=() if job.recipe.target_bpw is None else shares_of(blocks.values()),
        calibration=numbers.calibration,
        layers=tuple(replace(layer, name=stored[layer.name]) for layer in numbers.layers),
        blocks=numbers.blocks,
        held_out=held_out,
        bits_per_weight=bits_per_weight(blocks.values()),
        notes=shortcomings(job.plan, job.source.model),
        seconds=time.monotonic() - job.start_s,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        device=job.device.name,
        peak_device_bytes=peak_bytes(job.device.device),
    )


def _resumption(num_resumed: int, num_blocks: int) -> str:
    place = f"at block {num_resumed + 1} of" if num_resumed < num_blocks else "after the last of"
    return f"resuming {place} {num_blocks}: an earlier run ended there"


def _tokens(job: Job, texts: tuple[CalibrationText, ...]) -> CalibrationTokens:
    kept = job.finished.read_tokens()
    if kept is not None:
        return kept
    tokens = calibration_tokens(job.recipe, job.model, job.source.tokenizer, texts, _steps_of(job.meter, "calibrate"))
    # a model that wrote them was on the device whole
    release_cache(job.device.device)
    job.finished.save_tokens(job.writer, tokens)
    return tokens


def _steps_of(meter: ProgressMeter, phase: str) -> Callable[[int, int], None]:
    return lambda done, total: meter.report(phase, done, total)


def _mix(job: Job, tokens: CalibrationTokens, budget_bits: int) -> ModelPlan:
    """The plan with the groupings that the budget allows and the measured losses ask for."""
    allowed = OptionRange(job.recipe.bits, job.recipe.group_size)
    units = measure_sensitivity(job.model, job.plan, allowed, tokens.ids, _steps_of(job.meter, "allocate"))
    return mix(job.plan, mixture_of(units, budget_bits))


def _search_blocks(job: Job, tokens: CalibrationTokens, held_out: HeldOutStates) -> SearchNumbers:
    """Block after block, each on the states that the quantized blocks before it give and on those of the original."""
    scratch = Scratch(job.writer.scratch, list_memory_bytes(planned_modules(job.source.model, job.plan)))
    inputs = KeptChunks(scratch, job.model.embed(tokens.ids))
    streams = Streams(inputs, inputs)
    head_input = None if job.plan.head is None else HeadInput(job.model, tokens.ids)
    structures = BlockStructures()
    layers: list[LayerLoss] = []
    errors: list[BlockError] = []
    _report_blocks(job, 0)
    for index, (block_name, block_plan) in enumerate(job.plan.blocks.items()):
        block = job.model.load_block(index)
        held_out.follow_original(block, block_name, index)
        # of a finished block, too: what it tells of later ones is then the same as in an unbroken run
        plan = structures.complete(block_plan, block, index, streams.original[0])
        if index < job.num_resumed:
            done = job.finished.read_block(index)
            streams = replay_block(block, index, streams, done, job.recipe.steps, scratch)
        else:
            opened = OpenBlock(block, block_name, index, partial(job.model.restore_block, block, index))
            outcome = search_block(opened, streams, plan, scratch)
            streams = outcome.next_streams
            numbers = SearchNumbers(layers=outcome.layers, blocks=(outcome.error,))
            done = _finish(job, index, block, outcome.packed, outcome.scales, numbers)
            job.on_block(outcome.error, outcome.layers)
        held_out.follow_quantized(block, block_name, index)
        if head_input is not None:
            head_input.follow(block, index)
        layers += done.layers
        errors += done.errors
        _write_block(job, block_name, block, done)
        # before the next is read
        del block
        _report_blocks(job, index + 1)
    head = None
    if job.plan.head is not None and head_input is not None:
        gram = head_input.statistics(job.model, job.plan.head.name).gram
        head, loss = search_head(_head_weight(job, job.plan.head), job.plan.head, job.recipe.steps, gram)
        head = on_host(head)
        _write_packed(job, {job.plan.head.name: head})
        layers.append(loss)
    summary = CalibrationSummary(tokens.origins, tokens.digest, tokens.ids.numel())
    return SearchNumbers(summary, tuple(layers), tuple(errors), head)


def _round_blocks(job: Job, held_out: HeldOutStates) -> SearchNumbers:
    """RTN: every block rounded as it is."""
    _report_blocks(job, 0)
    for index, (block_name, plan) in enumerate(job.plan.blocks.items()):
        block = job.model.load_block(index)
        held_out.follow_original(block, block_name, index)
        if index < job.num_resumed:
            done = job.finished.read_block(index)
            done.restore(block)
        else:
            packed = round_block_plainly(block, plan)
            round_plain_parameters(block, block_name, plan)
            done = _finish(job, index, block, packed, {}, SearchNumbers())
        held_out.follow_quantized(block, block_name, index)
        _write_block(job, block_name, block, done)
        # before the next is read
        del block
        _report_blocks(job, index + 1)
    head = None
    if job.plan.head is not None:
        head = on_host(round_head_plainly(_head_weight(job, job.plan.head), job.plan.head))
        _write_packed(job, {job.plan.head.name: head})
    return SearchNumbers(head=head)


def _head_weight(job: Job, head: HeadPlan) -> Tensor:
    """The original's, float32, on the device; from now on the model has a head of its own."""
    untie(job.source.model, head.name)
    return job.model.weights.read(f"{head.name}.weight", torch.float32).to(job.model.device)


def _report_blocks(job: Job, num_done: int) -> None:
    """Blocks that an earlier run had finished are a phase of their own: they take far less time than the others."""
    if num_done <= job.num_resumed > 0:
        job.meter.report("resume", num_done, job.num_resumed)
    if num_done >= job.num_resumed:
        job.meter.report("quantize", num_done, len(job.plan.blocks))


def _finish(
    job: Job,
    index: int,
    block: nn.Module,
    packed: Mapping[str, PackedWeight],
    scales: Mapping[str, ModuleScales],
    numbers: SearchNumbers,
) -> FinishedBlock:
    """Put the block of that index, which has its final values, where a later run finds it."""
    plain = plain_parameters(block, list(job.plan.blocks.values())[index])
    done = FinishedBlock(
        packed={name: on_host(weight) for name, weight in packed.items()},
        scales=scales,
        plain={name: parameter.to(HOST, STORAGE_DTYPE) for name, parameter in plain.items()},
        layers=numbers.layers,
        errors=numbers.blocks,
        seconds=time.monotonic() - job.start_s,
    )
    job.finished.save_block(job.writer, index, done)
    return done


def _write_block(job: Job, block_name: str, block: nn.Module, done: FinishedBlock) -> None:
    _write_packed(job, {f"{block_name}.{linear}": weight for linear, weight in done.packed.items()})
    stored = stored_modules(job.source.model, [f"{block_name}.{linear}" for linear in done.scales])
    job.writer.add_scales({stored[f"{block_name}.{linear}"]: own for linear, own in done.scales.items()})
    for name, tensor in done.plain.items():
        _write_plain(job, f"{block_name}.{name}", tensor)
    # what a model saves beside its parameters stays as precise as it is: routers' corrections decide between experts
    for name, tensor in block.state_dict(prefix=f"{block_name}.", keep_vars=True).items():
        if not isinstance(tensor, nn.Parameter):
            _write_plain(job, name, tensor)


def _write_packed(job: Job, packed: Mapping[str, PackedWeight]) -> None:
    """Write packed weights by the full names of their linears."""
    stored = stored_modules(job.source.model, packed)
    for name, weight in packed.items():
        job.writer.add_packed(stored[name], weight)


def _write_outer_tensors(job: Job) -> None:
    """Write what is in no block and not quantized, parameters in STORAGE_DTYPE. Tied weights are one tensor."""
    blocks = f"{job.plan.stack.name}."
    quantized = job.plan.groupings().keys()
    for name, _ in job.source.model.named_parameters():
        if not name.startswith(blocks) and name.removesuffix(".weight") not in quantized:
            stored = job.model.weights.read(name, STORAGE_DTYPE)
            check_finite(f"{name} as {STORAGE_DTYPE}", stored)
            _write_plain(job, name, stored)
    for name, tensor in job.source.model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, nn.Parameter) and not name.startswith(blocks):
            _write_plain(job, name, job.model.weights.read(name, tensor.dtype))


def _write_plain(job: Job, name: str, tensor: Tensor) -> None:
    for stored_name, stored in stored_tensors(job.source.model, {name: tensor}).items():
        job.writer.add_tensor(stored_name, stored)


def _quantized_outside(job: Job, head: PackedWeight | None) -> BlockwiseModel:
    """The model with what its checkpoint has outside of the blocks."""
    replaced = {}
    if job.plan.head is not None and head is not None:
        replaced[f"{job.plan.head.name}.weight"] = dequantize(head)
    return replace(job.model, weights=RoundedWeights(job.model.weights, STORAGE_DTYPE, replaced))


def _held_out(job: Job) -> HeldOutStates:
    windows = read_windows(job.source.config, job.source.tokenizer, job.recipe.num_windows)
    return HeldOutStates(windows, job.model, _quantized_outside(job, None))


def _measure(job: Job, held_out: HeldOutStates, head: PackedWeight | None) -> HeldOutQuality | None:
    """None where nothing is asked. Raises QualityError when the result is worse than the recipe allows."""
    quality = held_out.measure(job.model, _quantized_outside(job, head), job.meter)
    if quality is not None:
        check_quality(quality, job.recipe.max_kl)
    return quality


def _checkpoint_config(job: Job) -> dict[str, object]:
    """The source's config with what was done to it; every linear that stayed as it was is listed by its full name."""
    model = job.source.model
    kept = list(stored_modules(model, plain_names(job.plan, model)).values())
    config = job.source.checkpoint_config(STORAGE_DTYPE)
    return {**config, "quantization_config": job.writer.quantization_config(kept)}
