"""How queries and keys turn, as config.json says it, in old and new spelling. Knows no tensor.

Source of the scalings' fields and defaults: transformers, modeling_rope_utils.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from quant.errors import CheckpointError
from server.model.architectures import Architecture, RopeLayers
from server.model.config_fields import ConfigFields
from server.model.layer_windows import FULL, SLIDING

DEFAULT_ROPE_THETA = 10000.0
DEFAULT_LOCAL_THETA = 10000.0
DEFAULT_NO_ROPE_INTERVAL = 4
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# what the first Phi-3 checkpoints call it
OLD_NAMES = {"su": "longrope"}


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies are divided by factor."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequencies whose wavelength is over original_max_position_embeddings / low_freq_factor are divided by factor,
    those under ... / high_freq_factor are not, and in between they are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling:
    """Frequencies that turn less than beta_slow times in original_max_position_embeddings are divided by factor, those
    that turn more than beta_fast times are not; in between a ramp blends them, which truncate starts and ends at whole
    elements. Rotated queries and keys are multiplied by attention_factor."""

    factor: float
    attention_factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int
    truncate: bool


@dataclass(frozen=True)
class LongRopeScaling:
    """Each frequency is divided by a factor of its own: one of long_factors where sequences may be longer than
    original_max_position_embeddings. Rotated queries and keys are multiplied by attention_factor."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    attention_factor: float
    original_max_position_embeddings: int


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class RopeConfig:
    """The first rotary_dim elements of a head turn, by angles of frequencies theta ** (-2i / rotary_dim), scaled."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


def read_layer_ropes(
    architecture: Architecture, fields: ConfigFields, head_dim: int, layer_windows: tuple[int | None, ...]
) -> tuple[RopeConfig | None, ...]:
    """Per layer, how it turns queries and keys (None: not at all). Raises CheckpointError naming what is wrong."""
    if architecture.rope_layers is RopeLayers.BY_WINDOW:
        of_window = _read_rope(architecture, _fields_of_kind(fields, SLIDING), head_dim)
        of_others = _read_rope(architecture, _fields_of_kind(fields, FULL), head_dim)
        return tuple(of_others if window is None else of_window for window in layer_windows)
    rope = _read_rope(architecture, fields, head_dim)
    if architecture.rope_layers is RopeLayers.ALL_ALIKE:
        return (rope,) * len(layer_windows)
    return tuple(rope if turns else None for turns in _read_turning_layers(fields, len(layer_windows)))


def _read_turning_layers(fields: ConfigFields, num_layers: int) -> tuple[bool, ...]:
    interval = fields.positive_int("no_rope_layer_interval", default=DEFAULT_NO_ROPE_INTERVAL)
    listed = fields.whole_numbers("no_rope_layers")
    if not listed:
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if len(listed) < num_layers:
        raise CheckpointError(
            f"{fields.source}: no_rope_layers lists {len(listed)} layers; it must list all {num_layers}"
        )
    return tuple(number != 0 for number in listed[:num_layers])


def _fields_of_kind(fields: ConfigFields, kind: str) -> ConfigFields:
    """config.json's fields, as they are for the layers of one kind: those with a window never were scaled before
    transformers 5, which nests both kinds in rope_parameters."""
    nested = fields.mapping("rope_parameters")
    own: dict[str, object] = {}
    if nested is not None:
        if unknown := set(nested.values) - {SLIDING, FULL}:
            raise CheckpointError(
                f"{nested.source} holds {', '.join(sorted(unknown))}; it must hold {FULL} and {SLIDING}"
            )
        scaling = nested.mapping(kind)
        own = {"rope_parameters": {} if scaling is None else dict(scaling.values)}
    if kind == SLIDING:
        own |= {"rope_theta": fields.values.get("rope_local_base_freq", DEFAULT_LOCAL_THETA), "rope_scaling": None}
    return ConfigFields({**fields.values, **own}, fields.source if nested is None else f"{fields.source}: {kind}")


def _read_rope(architecture: Architecture, fields: ConfigFields, head_dim: int) -> RopeConfig:
    """transformers 5 writes rope_parameters; before, there were rope_theta and rope_scaling."""
    scaling = fields.mapping("rope_parameters") or fields.mapping("rope_scaling") or ConfigFields({}, fields.source)
    if nested := [name for name, value in scaling.values.items() if isinstance(value, Mapping)]:
        raise CheckpointError(
            f"{scaling.source}: {nested[0]} is an object, but {architecture.model_type} turns all layers alike"
        )
    theta = _owner("rope_theta", scaling, fields).positive_float("rope_theta", default=DEFAULT_ROPE_THETA)
    share = _owner("partial_rotary_factor", scaling, fields).positive_float("partial_rotary_factor", default=1.0)
    if share != 1.0 and not architecture.partial_rotary:
        raise CheckpointError(
            f"{fields.source}: partial_rotary_factor is not supported for {architecture.model_type}; it must be 1"
        )
    rotary_dim = int(head_dim * share)
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        raise CheckpointError(
            f"{fields.source}: partial_rotary_factor {share:g} turns {rotary_dim} of a head's {head_dim} elements; "
            "it must be an even number of them"
        )
    return RopeConfig(theta, rotary_dim, _read_scaling(scaling, fields, rotary_dim))


def _owner(name: str, scaling: ConfigFields, fields: ConfigFields) -> ConfigFields:
    return scaling if name in scaling.values else fields


def _read_scaling(scaling: ConfigFields, fields: ConfigFields, rotary_dim: int) -> RopeScaling | None:
    # the oldest spelling of rope_type is type
    name = scaling.string("rope_type", default=scaling.string("type", default="default"))
    kind = OLD_NAMES.get(name, name)
    if kind not in ROPE_KINDS:
        raise CheckpointError(
            f"{scaling.source}: the type {name!r} is not supported; supported: {', '.join(ROPE_KINDS)}"
        )
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(scaling.positive_float("factor"))
    max_len = fields.positive_int("max_position_embeddings")
    if kind == "dynamic":
        # its frequencies change where a sequence outgrows max_position_embeddings, and no sequence is let to
        scaling.positive_float("factor")
        return None
    original_len = _owner("original_max_position_embeddings", fields, scaling).positive_int(
        "original_max_position_embeddings", default=max_len
    )
    if kind == "llama3":
        return Llama3Scaling(
            factor=scaling.positive_float("factor"),
            low_freq_factor=scaling.positive_float("low_freq_factor"),
            high_freq_factor=scaling.positive_float("high_freq_factor"),
            original_max_position_embeddings=original_len,
        )
    factor = scaling.positive_float("factor", default=max_len / original_len)
    if kind == "yarn":
        return YarnScaling(
            factor=factor,
            attention_factor=_read_yarn_attention_factor(scaling, factor),
            beta_fast=scaling.positive_float("beta_fast", default=32.0),
            beta_slow=scaling.positive_float("beta_slow", default=1.0),
            original_max_position_embeddings=original_len,
            truncate=scaling.boolean("truncate", default=True),
        )
    grown = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original_len))
    return LongRopeScaling(
        short_factors=scaling.positive_floats("short_factor", rotary_dim // 2),
        long_factors=scaling.positive_floats("long_factor", rotary_dim // 2),
        attention_factor=scaling.positive_float("attention_factor", default=grown),
        original_max_position_embeddings=original_len,
    )


def _read_yarn_attention_factor(scaling: ConfigFields, factor: float) -> float:
    def grown(strength: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * strength * math.log(factor) + 1.0

    strength = scaling.optional_positive_float("mscale")
    all_strength = scaling.optional_positive_float("mscale_all_dim")
    default = grown(1.0) if strength is None or all_strength is None else grown(strength) / grown(all_strength)
    return scaling.positive_float("attention_factor", default=default)
