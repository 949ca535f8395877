"""The walk of a quantization: open, calibrate, take the blocks one by one, write, measure. It owns the loaded model."""

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from kernels.layout import WHOLE_ROW, PackedWeight
from quant.block import BlockPlan, check_finite, round_block_plainly
from quant.block_search import search_block
from quant.calibration import CalibrationTokens, calibration_tokens, read_text
from quant.capture import embed
from quant.checkpoint.output_format import check_fits
from quant.checkpoint.stored_module import PackedSpec, bits_per_weight
from quant.checkpoint.writer import CheckpointWriter, check_place
from quant.evaluate import HELD_OUT_TEXT, EvalOptions, compare, cut_windows
from quant.progress import ProgressListener, ProgressMeter, ignore_progress
from quant.recipe import Method, Recipe, choose_group_size
from quant.report import REPORT_FILE, BlockError, CalibrationSummary, HeldOutPerplexity, LayerLoss, Report
from quant.rounding import SCALE_DTYPE
from quant.scale_fold import STORAGE_DTYPE
from quant.scale_groups import groups_for, linear_of
from quant.scale_search import Grouping
from quant.source import SourceModel, open_source

# where a causal language model keeps its decoder and its blocks, in every family of scale_groups
DECODER = "model"
BLOCKS = "model.layers"
# as short as tells the models apart: `awq-serve eval` measures longer
WINDOW_TOKENS = 512


@dataclass(frozen=True)
class Job:
    """One quantization under way: what was asked, the model it changes, how its blocks go, where they go."""

    recipe: Recipe
    source: SourceModel
    plan: BlockPlan
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
    text = read_text(recipe) if recipe.method is Method.AWQ else None
    meter = ProgressMeter(listener)
    meter.report("load", 0, 1)
    source = open_source(source_path)
    meter.report("load", 1, 1)
    plan = plan_blocks(recipe, source)
    planned = planned_modules(source.model, plan)
    check_fits(recipe.output_format, planned)
    for name, parameter in source.model.named_parameters():
        check_finite(name, parameter)
    files = source.side_files()
    num_bytes = expected_bytes(source.model, planned) + sum(map(len, files.values()))
    with CheckpointWriter(out, expected_bytes=num_bytes, output_format=recipe.output_format) as writer:
        job = Job(recipe, source, plan, writer, meter)
        tokens = calibration_tokens(recipe, source, text, _steps_of(meter)) if recipe.method is Method.AWQ else None
        original = _measure(job)
        numbers = _round_blocks(job) if tokens is None else _search_blocks(job, tokens)
        _write_plain_tensors(job)
        quantized = _measure(job)
        report = Report(
            source=str(source_path.absolute()),
            recipe=recipe,
            group_size=plan.grouping.group_size,
            calibration=numbers.calibration,
            layers=numbers.layers,
            blocks=numbers.blocks,
            perplexity=HeldOutPerplexity(original, quantized) if original and quantized else None,
            bits_per_weight=bits_per_weight(planned.values()),
            seconds=time.monotonic() - start_s,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
        writer.commit(_checkpoint_config(job), files={**files, REPORT_FILE: report.to_bytes()})
    return report


def plan_blocks(recipe: Recipe, source: SourceModel) -> BlockPlan:
    """How the blocks of this model are quantized. Raises RecipeError naming the layer that the group size misses."""
    groups = groups_for(source.config.model_type)
    linears = {
        f"{block_name}.{linear}": linear_of(block, linear)
        for block_name, block in blocks_of(source.model).items()
        for group in groups
        for linear in group.linears
    }
    group_size = choose_group_size(recipe.group_size, {name: linear.in_features for name, linear in linears.items()})
    head_width = getattr(source.config, "head_dim", None)
    if head_width is None:
        head_width = source.config.hidden_size // source.config.num_attention_heads
    return BlockPlan(groups, head_width, Grouping(recipe.bits, group_size))


def blocks_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder blocks of a model in order, by full name."""
    return {f"{BLOCKS}.{name}": block for name, block in model.get_submodule(BLOCKS).named_children()}


def planned_modules(model: PreTrainedModel, plan: BlockPlan) -> dict[str, PackedSpec]:
    """What each linear that is quantized will be stored as, by its full name."""
    modules = {}
    for block_name, block in blocks_of(model).items():
        for name in plan.linear_names():
            num_outputs, num_inputs = linear_of(block, name).weight.shape
            group_size = num_inputs if plan.grouping.group_size == WHOLE_ROW else plan.grouping.group_size
            spec = PackedSpec(num_outputs, num_inputs, plan.grouping.bits, group_size, SCALE_DTYPE)
            modules[f"{block_name}.{name}"] = spec
    return modules


def expected_bytes(model: PreTrainedModel, planned: Mapping[str, PackedSpec]) -> int:
    """What the checkpoint's tensors will take on disk."""
    num_quantized = sum(spec.num_outputs * spec.num_inputs for spec in planned.values())
    num_plain = sum(parameter.numel() for parameter in model.parameters()) - num_quantized
    return sum(spec.num_bits for spec in planned.values()) // 8 + num_plain * STORAGE_DTYPE.itemsize


def _steps_of(meter: ProgressMeter) -> Callable[[int, int], None]:
    return lambda done, total: meter.report("calibrate", done, total)


def _search_blocks(job: Job, tokens: CalibrationTokens) -> SearchNumbers:
    """AWQ: block after block, each on the states that the quantized blocks before it give."""
    inputs = embed(job.source.model.get_submodule(DECODER), tokens.ids)
    layers: list[LayerLoss] = []
    errors: list[BlockError] = []
    blocks = blocks_of(job.source.model)
    job.meter.report("quantize", 0, len(blocks))
    for index, (block_name, block) in enumerate(blocks.items()):
        outcome = search_block(block, block_name, index, inputs, job.plan)
        inputs = outcome.next_inputs
        layers += outcome.layers
        errors.append(outcome.error)
        _write_packed(job.writer, block_name, outcome.packed)
        job.meter.report("quantize", index + 1, len(blocks))
    summary = CalibrationSummary(tokens.origin, tokens.digest, tokens.ids.numel())
    return SearchNumbers(summary, tuple(layers), tuple(errors))


def _round_blocks(job: Job) -> SearchNumbers:
    """RTN: every block rounded as it is."""
    blocks = blocks_of(job.source.model)
    for index, (block_name, block) in enumerate(blocks.items()):
        _write_packed(job.writer, block_name, round_block_plainly(block, job.plan))
        job.meter.report("quantize", index + 1, len(blocks))
    return SearchNumbers()


def _write_packed(writer: CheckpointWriter, block_name: str, packed: Mapping[str, PackedWeight]) -> None:
    for linear, weight in packed.items():
        writer.add_packed(f"{block_name}.{linear}", weight)


def _write_plain_tensors(job: Job) -> None:
    """Write what is not quantized in STORAGE_DTYPE, and give the model the same values. Tied weights are one tensor."""
    quantized = set(_quantized_modules(job.source.model, job.plan))
    for name, parameter in job.source.model.named_parameters():
        if name.removesuffix(".weight") in quantized:
            continue
        stored = parameter.to(STORAGE_DTYPE)
        check_finite(f"{name} as {STORAGE_DTYPE}", stored)
        job.writer.add_tensor(name, stored)
        parameter.copy_(stored)


def _measure(job: Job) -> float | None:
    """Perplexity of the model as it is now on text that no calibration has seen; None where nothing was asked."""
    if job.recipe.num_windows == 0:
        return None
    options = EvalOptions(job.writer.directory, num_windows=job.recipe.num_windows, window_tokens=WINDOW_TOKENS)
    windows = cut_windows(job.source.tokenizer, HELD_OUT_TEXT.read_text(encoding="utf-8"), options)
    return compare({"model": job.source.model}, windows, job.meter)[0].perplexity


def _quantized_modules(model: PreTrainedModel, plan: BlockPlan) -> list[str]:
    return [f"{block_name}.{linear}" for block_name in blocks_of(model) for linear in plan.linear_names()]


def _checkpoint_config(job: Job) -> dict[str, object]:
    """The source's config with what was done to it; every linear that stayed as it was is listed by its full name."""
    quantized = set(_quantized_modules(job.source.model, job.plan))
    kept = [
        name
        for name, module in job.source.model.named_modules()
        if isinstance(module, nn.Linear) and name not in quantized
    ]
    config = job.source.checkpoint_config(STORAGE_DTYPE)
    return {**config, "quantization_config": job.writer.quantization_config(kept)}
