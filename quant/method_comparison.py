"""Every method on one unquantized model, measured beside it on the same tokens: the table that chooses a method.

The methods run one after the other, each checkpoint is written, read back, measured and removed, so that no more than
two dense models are in memory at any time.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from quant.calibration import read_texts
from quant.checkpoint.location import GGUF_SUFFIX, recorded_name
from quant.checkpoint.work_folder import make_parents, remove_empty
from quant.checkpoint.writer import check_place
from quant.dense_checkpoint import load_dense
from quant.device import asked_gpu, find_gpu
from quant.errors import OutputError, RecipeError
from quant.evaluate import ORIGINAL, QUALITY_COLUMNS, Quality, TextWindows, compare, cut_windows, quality_cells
from quant.method import Method
from quant.pipeline import quantize
from quant.progress import ProgressListener, ProgressMeter, ignore_notice, ignore_progress
from quant.recipe import Recipe
from quant.report import Report
from quant.source import context_tokens, open_source

# what people call the original in a list of methods
UNQUANTIZED = "fp"


@dataclass(frozen=True)
class ComparisonOptions:
    """source: an unquantized model directory or .gguf file. recipe: what all methods share; its method is not used.

    keep: a new directory for the checkpoints, one a method; None removes each when it is measured.
    """

    source: Path
    methods: tuple[Method, ...]
    recipe: Recipe
    windows: TextWindows
    keep: Path | None = None


@dataclass(frozen=True)
class MethodResult:
    """One method's checkpoint. way_back: the share of what plain rounding adds to the perplexity that is not added.

    It is None where plain rounding was not measured, or costs nothing. report: what the quantization found out.
    """

    method: Method
    quality: Quality
    way_back: float | None
    report: Report


@dataclass(frozen=True)
class MethodTable:
    """The original, and the methods in the order they were asked for, on the same windows of a text."""

    source: str
    original: Quality
    results: tuple[MethodResult, ...]
    text: str
    num_windows: int
    window_tokens: int

    def to_json(self) -> dict[str, object]:
        """The measurements and each method's report as plain JSON values."""
        return {**asdict(self), "results": [{**asdict(row), "report": row.report.to_json()} for row in self.results]}


def parse_methods(text: str) -> tuple[Method, ...]:
    """The methods of a list like "fp,rtn,awq", each once; fp, the original, is measured anyway.

    Raises RecipeError naming the one that there is not.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in (UNQUANTIZED, *Method):
            raise RecipeError(f"{name!r} is no method; choose from {', '.join((UNQUANTIZED, *Method))}")
    return tuple(Method(name) for name in dict.fromkeys(names) if name != UNQUANTIZED)


def compare_methods(
    options: ComparisonOptions,
    listener: ProgressListener = ignore_progress,
    on_notice: Callable[[str], None] = ignore_notice,
) -> MethodTable:
    """Quantize the model by every method and measure each checkpoint beside it, in float32 on the CPU.

    on_notice hears what each quantization has to say. Raises RecipeError, SourceError, OutputError or CheckpointError
    for bad input before the long work starts, QuantizationError when a result is not finite.
    """
    if options.keep is not None:
        check_place(options.keep)
    asked_gpu(options.recipe.device, find_gpu)
    text = options.windows.read()
    recipes = [options.recipe.with_method(method) for method in options.methods]
    for recipe in recipes:
        # a text that is not there is told before the methods that need none have run
        if recipe.steps.calibrates:
            read_texts(recipe)
    meter = ProgressMeter(listener)
    meter.report("load", 0, 1)
    source = open_source(options.source)
    for recipe in recipes:
        recipe.within_context(context_tokens(source.config))
    options.windows.check_context(context_tokens(source.config))
    windows = cut_windows(source.tokenizer, text, options.windows)
    meter.report("load", 1, 1)
    original = _measure({ORIGINAL: source.model}, windows, meter)[0]
    with _checkpoint_folder(options.keep) as folder:
        measured = [
            _try_method(method, options, source.model, windows, folder, listener, on_notice)
            for method in options.methods
        ]
    plain = next((quality for quality, report in measured if report.recipe.method is Method.RTN), None)
    return MethodTable(
        source=recorded_name(options.source),
        original=original,
        results=tuple(
            MethodResult(report.recipe.method, quality, way_back(quality, plain, original), report)
            for quality, report in measured
        ),
        text=options.windows.origin,
        num_windows=windows.shape[0],
        window_tokens=windows.shape[1],
    )


def way_back(quality: Quality, plain: Quality | None, original: Quality) -> float | None:
    """1 where the perplexity is the original's, 0 where it is plain rounding's; None where the two do not differ."""
    if plain is None or plain.perplexity <= original.perplexity:
        return None
    return (plain.perplexity - quality.perplexity) / (plain.perplexity - original.perplexity)


def render_methods(table: MethodTable) -> Table:
    """The measurements side by side, for people."""
    title = f"{table.source} on {table.num_windows} windows of {table.window_tokens} tokens of {table.text}"
    rendered = Table(title=title, title_justify="left")
    rendered.add_column("method")
    for column in (*QUALITY_COLUMNS, f"way back to {UNQUANTIZED}", "bits per weight", "time"):
        rendered.add_column(column, justify="right")
    rendered.add_row(UNQUANTIZED, *quality_cells(table.original))
    for row in table.results:
        back = "" if row.way_back is None else f"{100 * row.way_back:.0f} %"
        costs = (f"{row.report.bits_per_weight:.3f}", f"{row.report.seconds:.0f} s")
        rendered.add_row(row.method.value, *quality_cells(row.quality), back, *costs)
    return rendered


def _try_method(
    method: Method,
    options: ComparisonOptions,
    original: PreTrainedModel,
    windows: Tensor,
    folder: Path,
    listener: ProgressListener,
    on_notice: Callable[[str], None],
) -> tuple[Quality, Report]:
    """Quantize into the folder, read back, measure; the checkpoint stays where it is to be kept."""

    def listen(phase: str, done: int, total: int, seconds_left: float | None) -> None:
        listener(f"{method} {phase}", done, total, seconds_left)

    name = Path(recorded_name(options.source)).name.removesuffix(GGUF_SUFFIX)
    checkpoint = folder / f"{name}-{method}"
    report = quantize(options.recipe.with_method(method), options.source, checkpoint, listen, on_notice)
    models = {ORIGINAL: original, f"{method} checkpoint": load_dense(checkpoint)}
    quality = _measure(models, windows, ProgressMeter(listen))[1]
    if options.keep is None:
        shutil.rmtree(checkpoint)
    return replace(quality, name=method.value), report


@torch.inference_mode()
def _measure(models: Mapping[str, PreTrainedModel], windows: Tensor, meter: ProgressMeter) -> tuple[Quality, ...]:
    return compare(models, windows, meter)


@contextmanager
def _checkpoint_folder(keep: Path | None) -> Iterator[Path]:
    """Where checkpoints are written: a temporary folder, which becomes `keep` only when all are there."""
    new_parents = () if keep is None else make_parents(keep.absolute())
    beside = None if keep is None else keep.absolute().parent
    try:
        with tempfile.TemporaryDirectory(dir=beside, prefix=".awq-serve-eval-") as temporary:
            # a folder of its own: only the temporary one is closed to other users
            folder = Path(temporary) / "checkpoints"
            folder.mkdir()
            yield folder
            if keep is not None:
                _publish(folder, keep)
    finally:
        # however it ended, those that hold nothing are of no use
        remove_empty(new_parents)


def _publish(folder: Path, keep: Path) -> None:
    try:
        folder.rename(keep)
    except OSError as error:
        raise OutputError(f"{keep} cannot be written: {error}") from error
