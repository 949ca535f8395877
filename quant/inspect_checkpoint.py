"""What a checkpoint holds, without its weights: format, bits a weight, each layer's shape, size and measured error."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import msgspec
from rich.table import Table

from quant.checkpoint.folded_scales import FOLDED_SCALES_FILE, read_folded_scales
from quant.checkpoint.reader import CheckpointReader
from quant.errors import CheckpointError
from quant.report import REPORT_FILE
from quant.salience import SALIENT_SHARE, ChannelErrors, Salience

# of a module's salient channels, that many are named in the table
CHANNELS_SHOWN = 4


@dataclass(frozen=True)
class QuantizedModule:
    """shape: [N, K]. num_bytes: codes, scales and zero points as stored.

    plain_error and error: output error as a share of the output, by plain rounding and as written, where a report
    beside the checkpoint has them. salience: the input channels that matter most, where it has that.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    num_bytes: int
    plain_error: float | None
    error: float | None
    salience: Salience | None


@dataclass(frozen=True)
class MeasuredLayer:
    """What a report beside a checkpoint says of one module: output error by plain rounding and as written."""

    plain: float | None = None
    chosen: float | None = None
    salience: Salience | None = None


@dataclass(frozen=True)
class PlainTensor:
    """A matrix that is not quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True)
class Inspection:
    """bits_per_weight: of the quantized modules, scales and zero points included; None where there are none.

    bits_per_parameter: of everything, norms and embeddings included. num_scaled: how many linears have scales folded
    in, as the file beside them says; None where there is no such file.
    """

    checkpoint: str
    format: str | None
    bits_per_weight: float | None
    bits_per_parameter: float
    num_parameters: int
    num_bytes: int
    num_scaled: int | None
    quantized: tuple[QuantizedModule, ...]
    unquantized: tuple[PlainTensor, ...]

    def to_json(self) -> dict[str, object]:
        """The fields as plain JSON values."""
        return asdict(self)


def inspect_checkpoint(directory: Path) -> Inspection:
    """Look at a checkpoint, quantized or not. Raises CheckpointError when it is none, or is damaged."""
    reader = CheckpointReader.open(directory)
    layers = _measured_layers(directory / REPORT_FILE)
    quantized = tuple(_describe_module(reader, name, layers) for name in reader.quantized_module_names)
    packed = {name for module in reader.quantized_module_names for name in reader.packed_tensor_names(module)}
    plain = [name for name in reader.tensor_names if name not in packed]
    num_weights = sum(math.prod(module.shape) for module in quantized)
    num_parameters = num_weights + sum(math.prod(reader.shape(name)) for name in plain)
    num_bytes = sum(map(reader.num_bytes, reader.tensor_names))
    scales = read_folded_scales(directory)
    return Inspection(
        checkpoint=str(directory),
        format=str(reader.meta.format) if reader.meta and quantized else None,
        bits_per_weight=8 * sum(module.num_bytes for module in quantized) / num_weights if quantized else None,
        bits_per_parameter=8 * num_bytes / num_parameters if num_parameters else 0.0,
        num_parameters=num_parameters,
        num_bytes=num_bytes,
        num_scaled=None if scales is None else len(scales),
        quantized=quantized,
        unquantized=tuple(_describe_tensor(reader, name) for name in plain if len(reader.shape(name)) > 1),
    )


def module_table(inspection: Inspection) -> Table:
    """The quantized modules, one a row; the errors where they are known."""
    has_errors = any(module.error is not None for module in inspection.quantized)
    table = Table(title="quantized", title_justify="left")
    table.add_column("module")
    for column in ("outputs x inputs", "bits", "group", "kB", *(("error", "plain rounding") if has_errors else ())):
        table.add_column(column, justify="right")
    for module in inspection.quantized:
        group = "row" if module.group_size == module.shape[1] else str(module.group_size)
        cells = [module.name, _size(module.shape), str(module.bits), group, _kilobytes(module.num_bytes)]
        if has_errors:
            cells += ["" if error is None else f"{error:.5f}" for error in (module.error, module.plain_error)]
        table.add_row(*cells)
    return table


def salience_table(inspection: Inspection) -> Table:
    """Per module: the salient channels, and what they carry of plain rounding's error, plain and as written.

    Beside them as many channels that are picked by the norm of their weights. Raises CheckpointError when no report
    beside the checkpoint says so.
    """
    known = [(module.name, module.salience) for module in inspection.quantized if module.salience is not None]
    if not known:
        raise CheckpointError(
            f"{inspection.checkpoint} has no {REPORT_FILE} that says which channels are salient: quantize the model "
            "with this program, by a method that reads calibration text"
        )
    table = Table(
        title=f"share of plain rounding's output error in {100 * SALIENT_SHARE:g} % of the channels",
        title_justify="left",
    )
    table.add_column("module")
    table.add_column("channels that carry the most")
    for column in ("plain rounding", "as written", "change", "by weight norm: plain", "as written"):
        table.add_column(column, justify="right")
    for name, salience in known:
        first = ", ".join(map(str, salience.channels[:CHANNELS_SHOWN]))
        num_more = len(salience.channels) - CHANNELS_SHOWN
        table.add_row(name, f"{first} and {num_more} more" if num_more > 0 else first, *_salience_cells(salience))
    if len(known) > 1:
        table.add_section()
        table.add_row("mean", "", *_salience_cells(_mean_salience([salience for _, salience in known])))
    return table


def plain_table(inspection: Inspection) -> Table:
    """The matrices that are not quantized, one a row."""
    table = Table(title="not quantized", title_justify="left")
    table.add_column("tensor")
    for column in ("shape", "type", "kB"):
        table.add_column(column, justify="right")
    for tensor in inspection.unquantized:
        table.add_row(tensor.name, _size(tensor.shape), tensor.dtype, _kilobytes(tensor.num_bytes))
    return table


def summary_table(inspection: Inspection) -> Table:
    """The numbers of the whole checkpoint, one a row."""
    table = Table(show_header=False, box=None)
    rows = {
        "checkpoint": inspection.checkpoint,
        "format": inspection.format or "unquantized",
        "parameters": f"{inspection.num_parameters / 1e6:.1f} million in {inspection.num_bytes / 1e6:.1f} MB",
        "bits per parameter": f"{inspection.bits_per_parameter:.3f}, all tensors",
    }
    if inspection.bits_per_weight is not None:
        rows["bits per weight"] = f"{inspection.bits_per_weight:.3f}, quantized modules with scales and zero points"
    if inspection.num_scaled is not None:
        rows["folded scales"] = f"of {inspection.num_scaled} linears, in {FOLDED_SCALES_FILE}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _describe_module(reader: CheckpointReader, name: str, layers: Mapping[str, MeasuredLayer]) -> QuantizedModule:
    spec = reader.packed_spec(name)
    num_bytes = sum(map(reader.num_bytes, reader.packed_tensor_names(name)))
    layer = layers.get(name, MeasuredLayer())
    return QuantizedModule(
        name, spec.shape, spec.bits, spec.group_size, num_bytes, layer.plain, layer.chosen, layer.salience
    )


def _describe_tensor(reader: CheckpointReader, name: str) -> PlainTensor:
    dtype = str(reader.dtype(name)).removeprefix("torch.")
    return PlainTensor(name, reader.shape(name), dtype, reader.num_bytes(name))


def _measured_layers(report_file: Path) -> dict[str, MeasuredLayer]:
    """What was measured, by module; empty where no report of the quantizer lies beside the checkpoint."""
    try:
        report: object = json.loads(report_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    layers = report.get("layers") if isinstance(report, dict) else None
    entries = [entry for entry in layers if isinstance(entry, dict)] if isinstance(layers, list) else []
    return {str(entry.get("name")): _measured_layer(entry) for entry in entries}


def _measured_layer(entry: Mapping[str, object]) -> MeasuredLayer:
    """What can be understood of a report's entry: other programs write files of that name too."""
    try:
        return msgspec.convert(entry, MeasuredLayer)
    except msgspec.ValidationError:
        return MeasuredLayer()


def _mean_salience(saliences: Sequence[Salience]) -> Salience:
    def mean(errors: Sequence[ChannelErrors]) -> ChannelErrors:
        return ChannelErrors(fmean(error.plain for error in errors), fmean(error.chosen for error in errors))

    by_magnitude = mean([salience.by_magnitude for salience in saliences])
    return Salience((), by_magnitude, mean([salience.by_weight for salience in saliences]))


def _salience_cells(salience: Salience) -> tuple[str, ...]:
    salient, by_weight = salience.by_magnitude, salience.by_weight
    change = f"x {salient.chosen / salient.plain:.2f}" if salient.plain > 0 else ""
    shares = [f"{100 * share:.1f} %" for share in (salient.plain, salient.chosen, by_weight.plain, by_weight.chosen)]
    return (*shares[:2], change, *shares[2:])


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _kilobytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e3:.1f}"
