"""Writes a quantized checkpoint in another format: the same codes, scales and zero points, tensor after tensor."""

from collections.abc import Iterator
from pathlib import Path

from kernels.layout import PackedWeight
from quant.checkpoint.folded_scales import FOLDED_SCALES_FILE, encode_folded_scales
from quant.checkpoint.format_name import OutputFormat
from quant.checkpoint.output_format import check_fits
from quant.checkpoint.reader import CONFIG_FILE, OLD_SETTINGS, CheckpointReader
from quant.checkpoint.tensor_files import INDEX_FILE, PICKLE_SUFFIXES
from quant.checkpoint.writer import CheckpointWriter, check_place
from quant.errors import CheckpointError, QuantizationError
from quant.progress import ProgressListener, ProgressMeter, ignore_progress

# the weights, in this or another format, are what is written anew
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", *PICKLE_SUFFIXES)
# written anew, or of the source's format only; AutoRound leaves a copy of its settings in the last one
REWRITTEN_FILES = (CONFIG_FILE, INDEX_FILE, *OLD_SETTINGS, "quantization_config.json")
HEAD = "lm_head"


def convert(
    source: Path, out: Path, output_format: OutputFormat, listener: ProgressListener = ignore_progress
) -> CheckpointReader:
    """Write the quantized checkpoint in `source` into the new directory `out`, in another format. Returns it opened.

    Nothing is rounded: what the format cannot hold exactly is refused. Raises CheckpointError when the source is no
    quantized checkpoint, RecipeError when the format cannot hold a module, OutputError when `out` cannot be written,
    QuantizationError when a scale would change.
    """
    check_place(out)
    reader = CheckpointReader.open(source)
    specs = {name: reader.packed_spec(name) for name in reader.quantized_module_names}
    if not specs:
        raise CheckpointError(f"{source} has no quantized modules; `awq-serve quantize` makes a checkpoint that has")
    check_fits(output_format, specs)
    files = side_files(source)
    if reader.meta is not None and not reader.meta.may_be_scaled:
        # the other format's name does not say so
        files.setdefault(FOLDED_SCALES_FILE, encode_folded_scales({}))
    plain_names = _plain_tensor_names(reader)
    num_bytes = sum(spec.num_bits // 8 for spec in specs.values()) + sum(map(len, files.values()))
    num_bytes += sum(reader.num_bytes(name) for name in plain_names)
    meter = ProgressMeter(listener)
    total = len(plain_names) + len(specs)
    with CheckpointWriter(out, expected_bytes=num_bytes, output_format=output_format) as writer:
        meter.report("convert", 0, total)
        for done, name in enumerate(_in_order(reader, set(plain_names)), start=1):
            if name in specs:
                _add_packed(writer, name, reader.read_packed(name))
            else:
                writer.add_tensor(name, reader.read_tensor(name))
            meter.report("convert", done, total)
        writer.commit(_converted_config(reader, writer), files)
    return CheckpointReader.open(out)


def side_files(directory: Path) -> dict[str, bytes]:
    """What lies beside the weights and config.json, by name: tokenizer, templates, code, reports, scales."""
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in REWRITTEN_FILES
        and path.suffix not in WEIGHT_SUFFIXES
    }


def kept_modules(reader: CheckpointReader) -> list[str]:
    """The modules with a dense matrix, by full name: every linear that is not quantized, an embedding too.

    A tied head has no tensor of its own, and is one all the same.
    """
    suffix = ".weight"
    matrices = [name for name in reader.tensor_names if name.endswith(suffix) and len(reader.shape(name)) == 2]
    kept = [name.removesuffix(suffix) for name in matrices if not reader.is_quantized(name.removesuffix(suffix))]
    return kept if HEAD in kept or reader.is_quantized(HEAD) else [*kept, HEAD]


def _plain_tensor_names(reader: CheckpointReader) -> list[str]:
    packed = {name for module in reader.quantized_module_names for name in reader.packed_tensor_names(module)}
    return [name for name in reader.tensor_names if name not in packed]


def _in_order(reader: CheckpointReader, plain_names: set[str]) -> Iterator[str]:
    """Plain tensors and quantized modules by name, in the order of the source's tensors: each file is read once."""
    seen = set()
    for name in reader.tensor_names:
        wanted = name if name in plain_names else name.rpartition(".")[0]
        if wanted not in seen:
            seen.add(wanted)
            yield wanted


def _add_packed(writer: CheckpointWriter, name: str, weight: PackedWeight) -> None:
    try:
        writer.add_packed(name, weight)
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}; use --format {OutputFormat.COMPRESSED_TENSORS}") from error


def _converted_config(reader: CheckpointReader, writer: CheckpointWriter) -> dict[str, object]:
    """The source's config, with the new quantization_config where every loader looks: at the top."""
    field = "quantization_config"
    config = {name: value for name, value in reader.config.items() if name != field}
    text_config = config.get("text_config")
    if isinstance(text_config, dict):
        config["text_config"] = {name: value for name, value in text_config.items() if name != field}
    return {**config, field: writer.quantization_config(kept_modules(reader))}
