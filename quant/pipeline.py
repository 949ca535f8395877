"""The walk of a quantization: open, calibrate, take the blocks one by one, write, measure. It owns the loaded model."""

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from kernels.layout import WHOLE_ROW, PackedWeight
from quant.bit_allocation import OptionRange, Shape, budget_of
from quant.block import check_finite, round_block_plainly
from quant.block_groups import share_inputs
from quant.block_search import search_block
from quant.calibration import CalibrationTokens, calibration_tokens, read_texts
from quant.capture import embed
from quant.checkpoint.location import recorded_name
from quant.checkpoint.output_format import check_fits
from quant.checkpoint.stored_module import PackedSpec, bits_per_weight
from quant.checkpoint.writer import CheckpointWriter, check_place
from quant.held_out import check_quality, measure_held_out, predict_held_out
from quant.input_statistics import Streams
from quant.model_card import CARD_FILE, model_card, read_licence
from quant.model_plan import ModelPlan, mix, plain_names, plan_model, shortcomings
from quant.model_structure import stored_modules, stored_tensors
from quant.output_head import round_head_plainly, search_head
from quant.progress import ProgressListener, ProgressMeter, ignore_progress
from quant.recipe import Recipe
from quant.report import REPORT_FILE, BlockError, CalibrationSummary, HeldOutQuality, LayerLoss, Report, shares_of
from quant.rounding import SCALE_DTYPE
from quant.scale_fold import STORAGE_DTYPE
from quant.scale_groups import linear_of
from quant.sensitivity import measure_sensitivity, mixture_of
from quant.source import SourceModel, open_source


@dataclass(frozen=True)
class Job:
    """One quantization under way: what was asked, the model it changes, how its blocks go, where they go."""

    recipe: Recipe
    source: SourceModel
    plan: ModelPlan
    writer: CheckpointWriter
    meter: ProgressMeter


@dataclass(frozen=True)
class SearchNumbers:
    """What the search looked at and says of its losses; empty for plain rounding, which searches nothing."""

    calibration: CalibrationSummary | None = None
    layers: tuple[LayerLoss, ...] = ()
    blocks: tuple[BlockError, ...] = ()


@torch.no_grad()
def quantize(recipe: Recipe, source_path: Path, out: Path, listener: ProgressListener = ignore_progress) -> Report:
    """Quantize the model at source_path (a directory or a .gguf file) into the new directory out.

    `out` appears whole or not at all. Raises RecipeError, SourceError, OutputError or CheckpointError for bad input
    before the long work starts, QuantizationError when a result is not finite.
    """
    start_s = time.monotonic()
    check_place(out)
    texts = read_texts(recipe) if recipe.steps.calibrates else ()
    meter = ProgressMeter(listener)
    meter.report("load", 0, 1)
    source = open_source(source_path)
    meter.report("load", 1, 1)
    plan = plan_model(recipe, source.model)
    planned = planned_modules(source.model, plan)
    check_fits(recipe.output_format, planned)
    budget_bits = _budget(recipe, source.model, plan)
    files = source.side_files()
    num_bytes = expected_bytes(source.model, planned, budget_bits) + sum(map(len, files.values()))
    with CheckpointWriter(out, expected_bytes=num_bytes, output_format=recipe.output_format) as writer:
        job = Job(recipe, source, plan, writer, meter)
        tokens = (
            calibration_tokens(recipe, source, texts, _steps_of(meter, "calibrate"))
            if recipe.steps.calibrates
            else None
        )
        if tokens is not None and budget_bits is not None:
            job = replace(job, plan=_mix(job, tokens, budget_bits))
        measure = _measuring(job)
        numbers = _round_blocks(job) if tokens is None else _search_blocks(job, tokens)
        _write_plain_tensors(job)
        report = _report(job, numbers, measure(), start_s)
        card = model_card(report, out.name, read_licence(source_path))
        made = {REPORT_FILE: report.to_bytes(), CARD_FILE: card}
        writer.commit(_checkpoint_config(job), files={**files, **made})
    return report


def _report(job: Job, numbers: SearchNumbers, held_out: HeldOutQuality | None, start_s: float) -> Report:
    specs = planned_modules(job.source.model, job.plan)
    blocks = {name: specs[name] for name in job.plan.block_groupings()}
    return Report(
        source=recorded_name(job.source.path),
        recipe=job.recipe,
        group_size=job.plan.grouping.group_size,
        mixture=() if job.recipe.target_bpw is None else shares_of(blocks.values()),
        calibration=numbers.calibration,
        layers=numbers.layers,
        blocks=numbers.blocks,
        held_out=held_out,
        bits_per_weight=bits_per_weight(blocks.values()),
        notes=shortcomings(job.plan, job.source.model),
        seconds=time.monotonic() - start_s,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def planned_modules(model: PreTrainedModel, plan: ModelPlan) -> dict[str, PackedSpec]:
    """What each linear that is quantized will be stored as, by its full name."""
    modules = {}
    for name, grouping in plan.groupings().items():
        num_outputs, num_inputs = linear_of(model, name).weight.shape
        group_size = num_inputs if grouping.group_size == WHOLE_ROW else grouping.group_size
        modules[name] = PackedSpec(num_outputs, num_inputs, grouping.bits, group_size, SCALE_DTYPE)
    return modules


def expected_bytes(model: PreTrainedModel, planned: Mapping[str, PackedSpec], budget_bits: int | None) -> int:
    """What the checkpoint's tensors will take on disk, at most; budget_bits: what a target lets the linears have."""
    # a head that shares the embedding's weight is no parameter of its own, and the embedding stays as it is
    num_plain = sum(
        parameter.numel() for name, parameter in model.named_parameters() if name.removesuffix(".weight") not in planned
    )
    num_packed_bits = max(sum(spec.num_bits for spec in planned.values()), budget_bits or 0)
    return num_packed_bits // 8 + num_plain * STORAGE_DTYPE.itemsize


def _steps_of(meter: ProgressMeter, phase: str) -> Callable[[int, int], None]:
    return lambda done, total: meter.report(phase, done, total)


def _budget(recipe: Recipe, model: PreTrainedModel, plan: ModelPlan) -> int | None:
    """How many bits the linears of the blocks may take; None where the recipe has no target."""
    if recipe.target_bpw is None:
        return None
    shapes = [Shape(*linear_of(model, name).weight.shape) for name in plan.block_groupings()]
    return budget_of(recipe.target_bpw, shapes, OptionRange(recipe.bits, recipe.group_size))


def _mix(job: Job, tokens: CalibrationTokens, budget_bits: int) -> ModelPlan:
    """The plan with the groupings that the budget allows and the measured losses ask for."""
    allowed = OptionRange(job.recipe.bits, job.recipe.group_size)
    units = measure_sensitivity(job.plan, allowed, tokens.ids, _steps_of(job.meter, "allocate"))
    return mix(job.plan, mixture_of(units, budget_bits))


def _search_blocks(job: Job, tokens: CalibrationTokens) -> SearchNumbers:
    """Block after block, each on the states that the quantized blocks before it give and on those of the original."""
    inputs = embed(job.plan.stack, tokens.ids)
    streams = Streams(inputs, inputs)
    layers: list[LayerLoss] = []
    errors: list[BlockError] = []
    blocks = job.plan.stack.blocks
    job.meter.report("quantize", 0, len(blocks))
    for index, (block_name, block) in enumerate(blocks.items()):
        plan = job.plan.blocks[block_name]
        plan = replace(plan, groups=share_inputs(plan.groups, block, index, streams.current[0]))
        outcome = search_block(block, block_name, index, streams, plan)
        streams = outcome.next_streams
        layers += outcome.layers
        errors.append(outcome.error)
        _write_packed(job, _in_block(block_name, outcome.packed))
        job.meter.report("quantize", index + 1, len(blocks))
    if job.plan.head is not None:
        packed, loss = search_head(job.source.model, job.plan.head, job.recipe.steps, tokens.ids)
        _write_packed(job, {job.plan.head.name: packed})
        layers.append(loss)
    summary = CalibrationSummary(tokens.origins, tokens.digest, tokens.ids.numel())
    return SearchNumbers(summary, tuple(layers), tuple(errors))


def _round_blocks(job: Job) -> SearchNumbers:
    """RTN: every block rounded as it is."""
    blocks = job.plan.stack.blocks
    for index, (block_name, block) in enumerate(blocks.items()):
        _write_packed(job, _in_block(block_name, round_block_plainly(block, job.plan.blocks[block_name])))
        job.meter.report("quantize", index + 1, len(blocks))
    if job.plan.head is not None:
        _write_packed(job, {job.plan.head.name: round_head_plainly(job.source.model, job.plan.head)})
    return SearchNumbers()


def _in_block(block_name: str, packed: Mapping[str, PackedWeight]) -> dict[str, PackedWeight]:
    return {f"{block_name}.{linear}": weight for linear, weight in packed.items()}


def _write_packed(job: Job, packed: Mapping[str, PackedWeight]) -> None:
    """Write packed weights by the full names of their linears."""
    stored = stored_modules(job.source.model, packed)
    for name, weight in packed.items():
        job.writer.add_packed(stored[name], weight)


def _write_plain_tensors(job: Job) -> None:
    """Write what is not quantized in STORAGE_DTYPE, and give the model the same values. Tied weights are one tensor."""
    quantized = job.plan.groupings().keys()
    for name, parameter in job.source.model.named_parameters():
        if name.removesuffix(".weight") in quantized:
            continue
        stored = parameter.to(STORAGE_DTYPE)
        check_finite(f"{name} as {STORAGE_DTYPE}", stored)
        _write_plain(job, name, stored)
        parameter.copy_(stored)
    # what a model saves beside its parameters stays as precise as it is: routers' corrections decide between experts
    for name, tensor in job.source.model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, nn.Parameter):
            _write_plain(job, name, tensor)


def _write_plain(job: Job, name: str, tensor: Tensor) -> None:
    for stored_name, stored in stored_tensors(job.source.model, {name: tensor}).items():
        job.writer.add_tensor(stored_name, stored)


def _measuring(job: Job) -> Callable[[], HeldOutQuality | None]:
    """Keeps what the original expects; to be called when the model is quantized. It gives None where nothing is asked.

    The call raises QuantizationError when the result is worse than the recipe allows.
    """
    if job.recipe.num_windows == 0:
        return lambda: None
    kept = predict_held_out(job.source.model, job.source.tokenizer, job.recipe.num_windows, job.meter)

    def measure() -> HeldOutQuality:
        quality = measure_held_out(kept, job.source.model, job.meter)
        check_quality(quality, job.recipe.max_kl)
        return quality

    return measure


def _checkpoint_config(job: Job) -> dict[str, object]:
    """The source's config with what was done to it; every linear that stayed as it was is listed by its full name."""
    model = job.source.model
    kept = list(stored_modules(model, plain_names(job.plan, model)).values())
    config = job.source.checkpoint_config(STORAGE_DTYPE)
    return {**config, "quantization_config": job.writer.quantization_config(kept)}
