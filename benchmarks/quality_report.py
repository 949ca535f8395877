"""From measured models and costs to figures: a row a model, a table a text, and all of it as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks.errors import BenchmarkError
from benchmarks.quality_job import Cost
from benchmarks.quality_tools import Tool
from quant.checkpoint.tensor_files import find_tensors
from quant.evaluate import Quality

ORIGINAL = "unquantized"
PLAIN_ROUNDING = "plain rounding"
# the linears of the blocks are what the yardstick quantizes
BLOCKS = "model.layers."


@dataclass(frozen=True)
class Outcome:
    """A tool that has run. calibration_tokens: how many it looked at; bits_per_weight: as its files say."""

    tool: Tool
    cost: Cost
    calibration_tokens: int
    bits_per_weight: float

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.tool.name,
            "method": self.tool.method,
            "steps": self.tool.steps,
            "calibration_tokens": self.calibration_tokens,
            "bits_per_weight": self.bits_per_weight,
            **asdict(self.cost),
        }


@dataclass(frozen=True)
class TextResult:
    """Every model on one text, the original first. text: the file's name."""

    text: str
    num_windows: int
    window_tokens: int
    rows: tuple[Quality, ...]

    @property
    def ways_back(self) -> Mapping[str, float | None]:
        """By model, how much of what plain rounding costs in perplexity it gives back; None where that is nothing."""
        perplexities = {row.name: row.perplexity for row in self.rows}
        return {
            name: way_back(perplexity, plain=perplexities[PLAIN_ROUNDING], original=perplexities[ORIGINAL])
            for name, perplexity in perplexities.items()
        }

    def to_json(self) -> dict[str, object]:
        ways_back = self.ways_back
        return {
            "text": self.text,
            "num_windows": self.num_windows,
            "window_tokens": self.window_tokens,
            "models": [{**asdict(row), "way_back": ways_back[row.name]} for row in self.rows],
        }


def way_back(perplexity: float, *, plain: float, original: float) -> float | None:
    """The share of the way from plain rounding's perplexity back to the original's: 0 for the one, 1 for the other.

    None where plain rounding costs nothing on this text: there is no way then.
    """
    return (plain - perplexity) / (plain - original) if plain > original else None


def measure_bits_per_weight(original: Path, checkpoint: Path) -> float:
    """What a quantized weight takes in the checkpoint's files: its code, and its share of scales and all else.

    Raises BenchmarkError when the checkpoint quantizes other modules than the linears of the blocks.
    """
    stored = find_tensors(checkpoint)
    sizes: dict[str, int] = {}
    for name, tensor in find_tensors(original).items():
        is_kept = name in stored
        is_linear = name.startswith(BLOCKS) and len(tensor.spec.shape) > 1
        if is_kept == is_linear:
            raise BenchmarkError(
                f"{checkpoint} {'does not quantize' if is_kept else 'quantizes'} {name}: the linears of the blocks are "
                "what is compared, all of them and nothing else"
            )
        if is_linear:
            rows, columns = tensor.spec.shape
            sizes[name.removesuffix(".weight")] = rows * columns
    num_bytes = sum(
        tensor.spec.num_bytes
        for name, tensor in stored.items()
        if name.rpartition(".")[0] in sizes and not name.endswith(".bias")
    )
    return 8 * num_bytes / sum(sizes.values())


def render_table(result: TextResult, outcomes: Sequence[Outcome]) -> Table:
    """The models side by side on one text, in a terminal of 80 columns."""
    title = f"{result.num_windows} windows of {result.window_tokens} tokens of {result.text}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("model", no_wrap=True)
    for name in ("perplexity", "way back", "mean KL", "top-1", "bits", "seconds", "GB"):
        table.add_column(name, justify="right", no_wrap=True)
    by_name = {outcome.tool.name: outcome for outcome in outcomes}
    ways_back = result.ways_back
    for row in result.rows:
        table.add_row(*_quality_cells(row, ways_back[row.name]), *_cost_cells(by_name.get(row.name)))
    return table


def _quality_cells(row: Quality, share: float | None) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.perplexity:.3f}",
        "" if share is None else f"{100 * share:.1f} %",
        "" if row.mean_kl is None else f"{row.mean_kl:.4f}",
        "" if row.top1_agreement is None else f"{row.top1_agreement:.4f}",
    )


def _cost_cells(outcome: Outcome | None) -> tuple[str, ...]:
    if outcome is None:
        return ("", "", "")
    cost = outcome.cost
    return (f"{outcome.bits_per_weight:.2f}", f"{cost.seconds:.0f}", f"{cost.peak_memory_bytes / 1e9:.2f}")
