"""What `quantization_config` of a config.json says: the only file that knows its keys and their aliases.

The config is a hint. Whether one module is quantized is decided by its tensors (reader.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kernels.layout import SUPPORTED_BITS
from quant.errors import CheckpointError

AWQ = "awq"
GEMM = "gemm"

# each field under the names that AutoAWQ, llm-awq, GPTQModel and vLLM write or accept
ALIASES = {
    "quant_method": ("quant_method",),
    "bits": ("bits", "w_bit"),
    "group_size": ("group_size", "q_group_size"),
    "version": ("version", "format", "checkpoint_format"),
    "modules_to_not_convert": ("modules_to_not_convert",),
}

_REQUANTIZE = "quantize the original model with `awq-serve quantize`, or take its AWQ gemm version"

# formats that later readers add: a codec module beside awq_gemm.py, its row in reader.DECODERS, and its row here gone
UNSUPPORTED_METHODS = {
    "gptq": f"GPTQ checkpoints are not supported yet: {_REQUANTIZE}",
    "compressed-tensors": f"compressed-tensors checkpoints are not supported yet: {_REQUANTIZE}",
    "auto-round": f"AutoRound checkpoints are not supported yet: {_REQUANTIZE}",
    "bitsandbytes": f"bitsandbytes checkpoints are not supported: {_REQUANTIZE}",
}
UNSUPPORTED_VERSIONS = {
    "gemv": f"the AWQ gemv layout is not supported yet: {_REQUANTIZE}",
    "gemv_fast": f"the AWQ gemv_fast layout is not supported yet: {_REQUANTIZE}",
    "llm-awq": f"llm-awq's layout is not supported yet: {_REQUANTIZE}",
    "marlin": f"AutoAWQ's marlin layout is obsolete and is not read: {_REQUANTIZE}",
}


@dataclass(frozen=True)
class QuantizationMeta:
    """How the quantized modules of a checkpoint are stored. bits per code; group_size in input channels."""

    quant_method: str
    bits: int
    group_size: int
    version: str
    modules_to_not_convert: tuple[str, ...]

    def to_config(self) -> dict[str, object]:
        """The `quantization_config` to write; every loader of AWQ gemm files accepts it.

        `zero_point` is always true: qzeros is always written (a symmetric weight has z = 8 there).
        """
        return {
            "quant_method": self.quant_method,
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": True,
            "version": self.version,
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }


def awq_gemm_meta(bits: int, group_size: int, modules_to_not_convert: tuple[str, ...]) -> QuantizationMeta:
    """The meta of an AWQ gemm checkpoint. Entries should be full module names: loaders match them as substrings."""
    return QuantizationMeta(AWQ, bits, group_size, GEMM, modules_to_not_convert)


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
    _refuse_other_methods(_text(fields, "quant_method", "none"))
    version = _text(fields, "version", GEMM)
    if version != GEMM:
        reason = UNSUPPORTED_VERSIONS.get(version, f"it is not a known AWQ layout; {GEMM} is read")
        raise CheckpointError(f"quantization_config says version {version!r}: {reason}")
    bits = _positive_integer(fields, "bits")
    if bits not in SUPPORTED_BITS:
        raise CheckpointError(f"quantization_config says {bits} bits; supported: {', '.join(map(str, SUPPORTED_BITS))}")
    return awq_gemm_meta(bits, _positive_integer(fields, "group_size"), _names(fields, "modules_to_not_convert"))


def _refuse_other_methods(quant_method: str) -> None:
    if quant_method != AWQ:
        reason = UNSUPPORTED_METHODS.get(quant_method, f"it is not read: {_REQUANTIZE}")
        raise CheckpointError(f"quantization_config says quant_method {quant_method!r}: {reason}")


def _find(fields: Mapping[str, object], field: str) -> object:
    return next((fields[alias] for alias in ALIASES[field] if fields.get(alias) is not None), None)


def _text(fields: Mapping[str, object], field: str, default: str) -> str:
    value = _find(fields, field)
    if value is None:
        return default
    if not isinstance(value, str):
        raise CheckpointError(f"quantization_config.{field} must be a string, not {value!r}")
    return value.lower()


def _positive_integer(fields: Mapping[str, object], field: str) -> int:
    value = _find(fields, field)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"quantization_config.{field} must be a positive integer, not {value!r}")
    return value


def _names(fields: Mapping[str, object], field: str) -> tuple[str, ...]:
    value = _find(fields, field)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"quantization_config.{field} must be a list of module names, not {value!r}")
    return tuple(value)
