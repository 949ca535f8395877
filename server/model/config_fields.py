"""Typed reads from a JSON object: each checks one value and names it when it is wrong. Knows no model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from quant.errors import CheckpointError


@dataclass(frozen=True)
class ConfigFields:
    """`values` read from `source`, which every error names. A null counts as absent."""

    values: Mapping[str, object]
    source: str

    def whole_number(self, name: str, *, minimum: int, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._error(name, value, f"a whole number from {minimum} up")
        return value

    def positive_int(self, name: str, *, default: int | None = None) -> int:
        return self.whole_number(name, minimum=1, default=default)

    def number(self, name: str, *, minimum: float, maximum: float, default: float) -> float:
        value = self._value(name, default)
        # not the other way round, which would let a NaN pass
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= maximum:
            raise self._error(name, value, f"a number from {minimum:g} to {maximum:g}")
        return float(value)

    def positive_float(self, name: str, *, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self._error(name, value, "a number over 0")
        return float(value)

    def optional_positive_float(self, name: str) -> float | None:
        """None when absent."""
        return None if self.values.get(name) is None else self.positive_float(name)

    def positive_floats(self, name: str, count: int) -> tuple[float, ...]:
        value = self._value(name, None)
        listed = value if isinstance(value, list) else []
        numbers = tuple(
            float(item)
            for item in listed
            if isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item) and item > 0
        )
        if len(listed) != count or len(numbers) != count:
            raise self._error(name, value, f"a list of {count} numbers over 0")
        return numbers

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._error(name, value, "true or false")
        return value

    def string(self, name: str, *, default: str) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._error(name, value, "a string")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; absent means none."""
        value = self.values.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        ids = tuple(item for item in listed if isinstance(item, int) and not isinstance(item, bool) and item >= 0)
        if len(ids) != len(listed):
            raise self._error(name, value, "a token id (0 or more) or a list of them")
        return ids

    def whole_numbers(self, name: str) -> tuple[int, ...]:
        """A list of numbers from 0 up; absent means none."""
        value = self._value(name, [])
        listed = value if isinstance(value, list) else [value]
        numbers = tuple(item for item in listed if isinstance(item, int) and not isinstance(item, bool) and item >= 0)
        if not isinstance(value, list) or len(numbers) != len(value):
            raise self._error(name, value, "a list of whole numbers from 0 up")
        return numbers

    def mapping(self, name: str) -> "ConfigFields | None":
        """A nested object, None when absent."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._error(name, value, "an object")
        return ConfigFields(value, f"{self.source}: {name}")

    def _value(self, name: str, default: object) -> object:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.source} has no {name}, which the model cannot be built without")
        return default

    def _error(self, name: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {name} is {value!r}; it must be {expected}")
