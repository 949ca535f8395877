"""Typed reading of the fields of `quantization_config`, each under every name that a tool gives it."""

from collections.abc import Mapping

from kernels.weight_kinds import WHOLE_ROW
from quant.errors import CheckpointError

# each field under the names that AutoAWQ, llm-awq, GPTQModel, AutoRound and vLLM write or accept
ALIASES = {
    "bits": ("bits", "w_bit"),
    "group_size": ("group_size", "q_group_size"),
    "version": ("version", "format", "checkpoint_format"),
    "checkpoint_format": ("checkpoint_format", "format"),
}


def find(fields: Mapping[str, object], field: str) -> object:
    """The field's value under the first of its names that has one; None where none has."""
    names = ALIASES.get(field, (field,))
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def text(fields: Mapping[str, object], field: str, default: str) -> str:
    """In lower case. Raises CheckpointError when it is no string."""
    value = find(fields, field)
    if value is None:
        return default
    if not isinstance(value, str):
        raise CheckpointError(f"quantization_config.{field} must be a string, not {value!r}")
    return value.lower()


def positive_integer(fields: Mapping[str, object], field: str) -> int:
    """Raises CheckpointError when it is absent or anything else."""
    value = find(fields, field)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"quantization_config.{field} must be a positive integer, not {value!r}")
    return value


def group_size(fields: Mapping[str, object]) -> int:
    """A positive size, or WHOLE_ROW. Raises CheckpointError when it is absent or anything else."""
    if find(fields, "group_size") == WHOLE_ROW:
        return WHOLE_ROW
    return positive_integer(fields, "group_size")


def mapping(fields: Mapping[str, object], field: str) -> Mapping[str, object]:
    """An object, empty where it is absent or null. Raises CheckpointError when it is anything else."""
    value = find(fields, field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"quantization_config.{field} must be an object, not {value!r}")
    return value
