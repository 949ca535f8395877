"""What `quantization_config` of a config.json says: which format, and what it claims of all modules.

The config is a hint. Whether one module is quantized, and in what groups and bits, is decided by its tensors
(reader.py) wherever the format allows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from kernels.weight_kinds import SUPPORTED_BITS
from quant.checkpoint import config_fields
from quant.errors import CheckpointError

REQUANTIZE = "quantize the original model with `awq-serve quantize`, or take a version in another format"


class CheckpointFormat(StrEnum):
    """How the tensors of a quantized module are laid out; the value is what people call it."""

    AWQ_GEMM = "AWQ gemm"
    AWQ_GEMV = "AWQ gemv"
    AWQ_GEMV_FAST = "AWQ gemv_fast"
    GPTQ_V1 = "GPTQ v1"
    GPTQ_V2 = "GPTQ v2"
    COMPRESSED_TENSORS = "compressed-tensors pack-quantized"


@dataclass(frozen=True)
class QuantizationMeta:
    """How the quantized modules of a checkpoint are stored, where all are alike; None where the tensors must say.

    group_size: input channels a scale, -1 for all of a row. symmetric: whether zero points may be absent.
    may_be_scaled: whether methods that write it so divide the weights' inputs by scales (quant.scale_fold). Lists of
    modules that are not quantized are not read: they are matched in many ways, and the tensors say it.
    """

    format: CheckpointFormat
    bits: int | None
    group_size: int | None
    symmetric: bool | None = None
    may_be_scaled: bool = True


AWQ_VERSIONS = {
    "gemm": CheckpointFormat.AWQ_GEMM,
    "gemv": CheckpointFormat.AWQ_GEMV,
    "gemv_fast": CheckpointFormat.AWQ_GEMV_FAST,
}
UNREAD_AWQ_VERSIONS = {
    "llm-awq": f"llm-awq's layout is not read: {REQUANTIZE}",
    "marlin": f"AutoAWQ's marlin layout is obsolete and is not read: {REQUANTIZE}",
}
GPTQ_FORMATS = {"gptq": CheckpointFormat.GPTQ_V1, "gptq_v2": CheckpointFormat.GPTQ_V2}
UNREAD_GPTQ_FORMATS = {
    "marlin": f"GPTQ weights in Marlin's layout are not read: {REQUANTIZE}",
    "bitblas": f"GPTQ weights in BitBLAS's layout are not read: {REQUANTIZE}",
}
# AutoRound's own names for the tiles of other formats; only auto_gptq stores the zero point minus 1
AUTO_ROUND_PACKINGS = {
    "auto_round": CheckpointFormat.GPTQ_V2,
    "auto_round:gptqmodel": CheckpointFormat.GPTQ_V2,
    "auto_round:auto_gptq": CheckpointFormat.GPTQ_V1,
    "auto_round:auto_awq": CheckpointFormat.AWQ_GEMM,
}
# what the activations go through before the weights: without it they mean something else
AUTO_ROUND_ROTATIONS = ("rotation_config", "spinquant_config")
COMPRESSED_FORMAT = "pack-quantized"
MIXED_FORMAT = "mixed-precision"
STRATEGIES = ("group", "channel")


def parse_meta(config: Mapping[str, object]) -> QuantizationMeta | None:
    """The meta in a config.json, also when it is nested under `text_config`; None when the model is unquantized.

    Raises CheckpointError naming the format, or the field and its value, when it is none that is read.
    """
    fields = config.get("quantization_config")
    text_config = config.get("text_config")
    if fields is None and isinstance(text_config, dict):
        fields = text_config.get("quantization_config")
    if fields is None:
        return None
    if not isinstance(fields, dict):
        raise CheckpointError(f"quantization_config must be an object, not {fields!r}")
    quant_method = config_fields.text(fields, "quant_method", "none")
    if quant_method not in PARSERS:
        known = ", ".join(PARSERS)
        raise CheckpointError(
            f"quantization_config says quant_method {quant_method!r}, which is not read ({known} are): {REQUANTIZE}"
        )
    return PARSERS[quant_method](fields)


def _parse_awq(fields: Mapping[str, object]) -> QuantizationMeta:
    version = config_fields.text(fields, "version", "gemm")
    stored_as = _choose(AWQ_VERSIONS, UNREAD_AWQ_VERSIONS, "version", version)
    bits = _read_bits(fields, (4,), "AWQ checkpoints")
    return QuantizationMeta(stored_as, bits, config_fields.group_size(fields))


def _parse_gptq(fields: Mapping[str, object]) -> QuantizationMeta:
    # AutoGPTQ's way to say it, before the format had a name
    is_marlin = fields.get("is_marlin_format") is True
    named = "marlin" if is_marlin else config_fields.text(fields, "checkpoint_format", "gptq")
    stored_as = _choose(GPTQ_FORMATS, UNREAD_GPTQ_FORMATS, "checkpoint_format", named)
    # GPTQModel: patterns of modules that differ
    has_exceptions = bool(config_fields.mapping(fields, "dynamic"))
    return _parse_uniform(fields, stored_as, has_exceptions=has_exceptions)


def _parse_auto_round(fields: Mapping[str, object]) -> QuantizationMeta:
    for part in AUTO_ROUND_ROTATIONS:
        if config_fields.mapping(fields, part):
            raise CheckpointError(f"quantization_config.{part} asks for rotations, which are not read: {REQUANTIZE}")
    packing = config_fields.text(fields, "packing_format", "auto_round")
    stored_as = _choose(AUTO_ROUND_PACKINGS, {}, "packing_format", packing)
    has_exceptions = bool(config_fields.mapping(fields, "extra_config"))
    return _parse_uniform(fields, stored_as, has_exceptions=has_exceptions)


def _parse_uniform(
    fields: Mapping[str, object], stored_as: CheckpointFormat, *, has_exceptions: bool
) -> QuantizationMeta:
    """One number of bits and one group size for all modules, unless some are said to be exceptions."""
    bits = _read_bits(fields, SUPPORTED_BITS, f"{stored_as} checkpoints")
    size = config_fields.group_size(fields)
    return QuantizationMeta(stored_as, bits, None if has_exceptions else size, may_be_scaled=False)


def _parse_compressed_tensors(fields: Mapping[str, object]) -> QuantizationMeta:
    # both change what the weights mean, and both are written empty where there is none
    if config_fields.mapping(fields, "transform_config"):
        raise CheckpointError(f"quantization_config.transform_config asks for transforms, not read: {REQUANTIZE}")
    if config_fields.text(config_fields.mapping(fields, "sparsity_config"), "format", "dense") != "dense":
        raise CheckpointError(f"quantization_config.sparsity_config asks for sparse weights, not read: {REQUANTIZE}")
    groups = config_fields.mapping(fields, "config_groups")
    if not groups:
        raise CheckpointError("quantization_config has no config_groups, which say how compressed-tensors are stored")
    top_format = config_fields.text(fields, "format", COMPRESSED_FORMAT)
    schemes = {_parse_group(name, groups, top_format) for name in groups}
    bits = {scheme[0] for scheme in schemes}
    symmetric = {scheme[1] for scheme in schemes}
    return QuantizationMeta(
        CheckpointFormat.COMPRESSED_TENSORS,
        bits.pop() if len(bits) == 1 else None,
        None,
        symmetric.pop() if len(symmetric) == 1 else None,
    )


def _parse_group(name: str, groups: Mapping[str, object], top_format: str) -> tuple[int, bool]:
    """(bits, symmetric) of one config group. Raises CheckpointError, naming the group, when it is not read."""
    group = config_fields.mapping(groups, name)
    where = f"quantization_config.config_groups.{name}"
    stored_as = config_fields.text(group, "format", COMPRESSED_FORMAT if top_format == MIXED_FORMAT else top_format)
    if stored_as != COMPRESSED_FORMAT:
        raise CheckpointError(f"{where} has format {stored_as!r}; only {COMPRESSED_FORMAT} is read: {REQUANTIZE}")
    if group.get("input_activations") is not None:
        raise CheckpointError(f"{where} quantizes activations, which is not read: {REQUANTIZE}")
    weights = config_fields.mapping(group, "weights")
    kind = config_fields.text(weights, "type", "int")
    strategy = config_fields.text(weights, "strategy", "group")
    if kind != "int" or strategy not in STRATEGIES:
        raise CheckpointError(
            f"{where} has weights of type {kind!r} and strategy {strategy!r}; int weights by group or channel are read"
        )
    bits = config_fields.positive_integer(weights, "num_bits")
    if bits not in SUPPORTED_BITS:
        raise CheckpointError(f"{where} has {bits} bits; supported: {', '.join(map(str, SUPPORTED_BITS))}")
    return bits, weights.get("symmetric", True) is not False


def _read_bits(fields: Mapping[str, object], supported: tuple[int, ...], whose: str) -> int:
    bits = config_fields.positive_integer(fields, "bits")
    if bits not in supported:
        raise CheckpointError(f"quantization_config says {bits} bits; {whose} are read with {_join(supported)}")
    return bits


def _choose(
    known: Mapping[str, CheckpointFormat], unread: Mapping[str, str], field: str, value: str
) -> CheckpointFormat:
    if value in known:
        return known[value]
    reason = unread.get(value, f"it is not a known layout; {', '.join(known)} are read")
    raise CheckpointError(f"quantization_config says {field} {value!r}: {reason}")


def _join(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, numbers)) + " bits"


PARSERS: dict[str, Callable[[Mapping[str, object]], QuantizationMeta]] = {
    "awq": _parse_awq,
    "gptq": _parse_gptq,
    "auto-round": _parse_auto_round,
    "intel/auto-round": _parse_auto_round,
    "compressed-tensors": _parse_compressed_tensors,
}
