"""What a quantization found out: report.json beside the checkpoint, and tables for people. It measures nothing."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from rich.table import Table

from kernels.weight_kinds import WHOLE_ROW
from quant.calibration_mix import without_directories
from quant.checkpoint.stored_module import PackedSpec
from quant.recipe import Recipe
from quant.salience import Salience

REPORT_FILE = "report.json"


@dataclass(frozen=True)
class LayerLoss:
    """A linear's output error as a share of its output, on the calibration text: rounded plainly, and as written.

    name: the linear's full name, in a report that of the checkpoint. salience: the input channels that matter most and
    their part in the error.
    """

    name: str
    formula: str
    plain: float
    chosen: float
    salience: Salience | None = None


@dataclass(frozen=True)
class BlockError:
    """A block's output error as a share of its output; kept says which weights were written: searched or plain."""

    name: str
    plain: float
    chosen: float
    kept: str


@dataclass(frozen=True)
class CalibrationOrigin:
    """One source of the calibration text: what it is called, and the rows and the share of them that are its own."""

    name: str
    share: float
    num_rows: int


@dataclass(frozen=True)
class CalibrationSummary:
    """What the search looked at. digest: SHA-256 of the token ids."""

    origins: tuple[CalibrationOrigin, ...]
    digest: str
    num_tokens: int


@dataclass(frozen=True)
class HeldOutQuality:
    """What was written beside its original, on text that no calibration has seen; mean_kl in nats a token."""

    original_perplexity: float
    perplexity: float
    mean_kl: float
    top1_agreement: float
    num_windows: int
    window_tokens: int


@dataclass(frozen=True)
class GroupingShare:
    """The linears that are rounded alike: their bits, group size (WHOLE_ROW: one scale a row), number and weights."""

    bits: int
    group_size: int
    num_linears: int
    num_weights: int


@dataclass(frozen=True)
class Report:
    """One finished quantization. bits_per_weight counts the quantized linears of the blocks, and not the output head.

    source: what opens the original again, a hub name or an absolute path.
    group_size: WHOLE_ROW (-1) where each row of a weight has one scale.
    mixture: what the linears of the blocks have instead where they differ, as the recipe's target asks for.
    notes: sentences about what was done less well than it could be.
    device: what it ran on: cpu, or a GPU's name. peak_device_bytes: the most that tensors took of a GPU at once.
    """

    source: str
    recipe: Recipe
    group_size: int
    mixture: tuple[GroupingShare, ...]
    calibration: CalibrationSummary | None
    layers: tuple[LayerLoss, ...]
    blocks: tuple[BlockError, ...]
    held_out: HeldOutQuality | None
    bits_per_weight: float
    notes: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int
    device: str
    peak_device_bytes: int | None

    def to_json(self) -> dict[str, object]:
        """The fields as plain JSON values; of calibration files only the names, as they are published with it."""
        calibration = without_directories(self.recipe.calibration)
        return {**asdict(self), "recipe": {**asdict(self.recipe), "calibration": calibration}}

    def to_bytes(self) -> bytes:
        """The content of REPORT_FILE."""
        return (json.dumps(self.to_json(), indent=2) + "\n").encode()


def layer_table(report: Report) -> Table:
    """Loss per linear before and after, one row per linear name, as the mean over the blocks."""
    table = Table(title="output error, as a share of the output", title_justify="left")
    for column in ("layer", "plain rounding", report.recipe.method.value, "change"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, losses in _by_kind(report.layers).items():
        plain = sum(loss.plain for loss in losses) / len(losses)
        chosen = sum(loss.chosen for loss in losses) / len(losses)
        table.add_row(name, f"{plain:.5f}", f"{chosen:.5f}", f"{100 * (chosen / plain - 1):+.0f} %" if plain else "")
    return table


def summary_table(report: Report) -> Table:
    """The numbers of the whole model, one a row."""
    table = Table(show_header=False, box=None)
    rows = {
        "source": report.source,
        "method": f"{report.recipe.method.value}, {describe_rounding(report)}",
        "format": str(report.recipe.output_format),
        "bits per weight": f"{report.bits_per_weight:.3f}",
        "time": f"{report.seconds:.0f} s",
        "device": report.device,
        "peak memory": f"{report.peak_memory_bytes / 1e9:.2f} GB",
    }
    if report.peak_device_bytes is not None:
        rows["peak memory of the GPU"] = f"{report.peak_device_bytes / 1e9:.2f} GB"
    if report.calibration is not None:
        rows["calibration"] = f"{report.calibration.num_tokens} tokens: {describe_origins(report.calibration)}"
    if report.held_out is not None:
        held_out = report.held_out
        rows["perplexity"] = f"{held_out.original_perplexity:.3f} before, {held_out.perplexity:.3f} after"
        rows["mean KL"] = f"{held_out.mean_kl:.5f} nats to the original"
        rows["same first choice"] = f"{100 * held_out.top1_agreement:.2f} % of tokens"
        rows["measured on"] = f"{held_out.num_windows} windows of {held_out.window_tokens} tokens of held-out text"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def shares_of(specs: Iterable[PackedSpec]) -> tuple[GroupingShare, ...]:
    """What these linears have, from the fewest bits to the most."""
    members: dict[tuple[int, int], list[PackedSpec]] = {}
    for spec in specs:
        members.setdefault((spec.bits, WHOLE_ROW if spec.is_whole_row else spec.group_size), []).append(spec)
    # a row's scale takes less than a group's, and a large group's less than a small one's
    by_size = sorted(members, key=lambda kind: (kind[0], kind[1] != WHOLE_ROW, -kind[1]))
    return tuple(
        GroupingShare(*kind, len(members[kind]), sum(spec.num_outputs * spec.num_inputs for spec in members[kind]))
        for kind in by_size
    )


def describe_rounding(report: Report) -> str:
    """Bits and groups in a few words, with their shares of the weights where there are several."""
    if not report.mixture:
        return f"{report.recipe.bits} bits, {_group_name(report.group_size)}"
    num_weights = sum(share.num_weights for share in report.mixture)
    return "; ".join(
        f"{share.bits} bits, {_group_name(share.group_size)} ({100 * share.num_weights / num_weights:.0f} %)"
        for share in report.mixture
    )


def _group_name(group_size: int) -> str:
    return "one scale a row" if group_size == WHOLE_ROW else f"groups of {group_size}"


def describe_origins(calibration: CalibrationSummary) -> str:
    """The origins in a few words, with their shares where there are several."""
    if len(calibration.origins) == 1:
        return calibration.origins[0].name
    return ", ".join(f"{100 * origin.share:.0f} % {origin.name}" for origin in calibration.origins)


def _by_kind(layers: tuple[LayerLoss, ...]) -> dict[str, list[LayerLoss]]:
    """The layers of all blocks and experts by what they are there: model.layers.3.mlp.up_proj under mlp.up_proj."""
    kinds: dict[str, list[LayerLoss]] = {}
    for layer in layers:
        words = [word for word in layer.name.split(".") if not word.isdecimal()]
        kinds.setdefault(".".join(words[-2:]), []).append(layer)
    return kinds
