"""What the decoder needs of config.json, checked value by value. Knows no tensor and no file but the two it reads."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quant.checkpoint.tensor_files import read_json_object
from quant.errors import CheckpointError
from server.model.architectures import ARCHITECTURE_OF_TYPE, Architecture, Bias, Window
from server.model.config_fields import ConfigFields
from server.model.moe_config import MoeConfig, read_moe

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_ROPE_THETA = 10000.0


@dataclass(frozen=True)
class RopeConfig:
    """The rotation's frequencies: theta ** (-2i / head_dim), divided by `factor` where the scaling says.

    kind linear divides all of them; llama3 those whose wavelength is over original_max_position_embeddings /
    low_freq_factor, none under ... / high_freq_factor, and blends in between.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A model of a known architecture. layer_windows: per layer, how many tokens it sees back (None: all).

    intermediate_size: of dense MLPs. moe: None without experts.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    layer_windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype | None
    moe: MoeConfig | None

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> "ModelConfig":
        """Check a config.json's values. Raises CheckpointError naming the field, its value and what would be right."""
        architecture = _find_architecture(config)
        fields = ConfigFields(config, CONFIG_FILE)
        _check_activation(fields)
        num_layers = fields.positive_int("num_hidden_layers")
        num_heads = fields.positive_int("num_attention_heads")
        hidden_size = fields.positive_int("hidden_size")
        max_position_embeddings = fields.positive_int("max_position_embeddings")
        result = cls(
            architecture=architecture,
            vocab_size=fields.positive_int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.positive_int("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.positive_int("num_key_value_heads", default=num_heads),
            head_dim=fields.positive_int("head_dim", default=hidden_size // num_heads),
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=fields.positive_float("rms_norm_eps"),
            rope=_read_rope(fields, max_position_embeddings),
            layer_windows=_read_windows(architecture.window, fields, num_layers),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
            qkv_bias=_read_bias(architecture.qkv_bias, fields),
            output_bias=_read_bias(architecture.output_bias, fields),
            mlp_bias=_read_bias(architecture.mlp_bias, fields),
            eos_token_ids=fields.token_ids("eos_token_id"),
            dtype=_read_dtype(fields),
            moe=None if architecture.moe is None else read_moe(architecture.moe, fields, num_layers),
        )
        if result.num_heads % result.num_kv_heads:
            raise CheckpointError(
                f"{CONFIG_FILE}: num_key_value_heads {result.num_kv_heads} does not divide "
                f"num_attention_heads {result.num_heads}"
            )
        if result.head_dim % 2:
            raise CheckpointError(f"{CONFIG_FILE}: head_dim must be even to be rotated, not {result.head_dim}")
        return result


def read_model_config(directory: Path) -> ModelConfig:
    """The config of a model directory; generation_config.json adds its end-of-sequence ids.

    Raises CheckpointError when a file is missing or broken, or a value is out of range.
    """
    config_file = directory / CONFIG_FILE
    if not config_file.is_file():
        raise CheckpointError(f"{directory} has no {CONFIG_FILE}; a model directory must have one")
    config = ModelConfig.from_dict(read_json_object(config_file))
    generation_file = directory / GENERATION_CONFIG_FILE
    if not generation_file.is_file():
        return config
    generation_fields = ConfigFields(read_json_object(generation_file), GENERATION_CONFIG_FILE)
    merged = dict.fromkeys((*config.eos_token_ids, *generation_fields.token_ids("eos_token_id")))
    return replace(config, eos_token_ids=tuple(merged))


def _find_architecture(config: Mapping[str, object]) -> Architecture:
    model_type = config.get("model_type")
    architecture = ARCHITECTURE_OF_TYPE.get(model_type) if isinstance(model_type, str) else None
    class_names = config.get("architectures")
    if architecture is None or (isinstance(class_names, list) and class_names != [architecture.class_name]):
        known = ", ".join(f"{row.model_type} ({row.class_name})" for row in ARCHITECTURE_OF_TYPE.values())
        raise CheckpointError(
            f"{CONFIG_FILE}: model_type {model_type!r} with architectures {class_names!r} is not supported; "
            f"supported: {known}"
        )
    return architecture


def _check_activation(fields: ConfigFields) -> None:
    activation = fields.string("hidden_act", default="silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"{CONFIG_FILE}: hidden_act {activation!r} is not supported; supported: silu")


def _read_bias(bias: Bias, fields: ConfigFields) -> bool:
    if bias in (Bias.ATTENTION_FIELD, Bias.MLP_FIELD, Bias.QKV_FIELD):
        return fields.boolean(bias.value, default=bias is Bias.QKV_FIELD)
    return bias is Bias.ALWAYS


def _read_rope(fields: ConfigFields, max_position_embeddings: int) -> RopeConfig:
    """transformers 5 writes rope_parameters; before, there were rope_theta and rope_scaling."""
    scaling = fields.mapping("rope_parameters") or fields.mapping("rope_scaling") or ConfigFields({}, CONFIG_FILE)
    theta_owner = scaling if "rope_theta" in scaling.values else fields
    theta = theta_owner.positive_float("rope_theta", default=DEFAULT_ROPE_THETA)
    if any(owner.positive_float("partial_rotary_factor", default=1.0) != 1.0 for owner in (fields, scaling)):
        raise CheckpointError(f"{CONFIG_FILE}: partial_rotary_factor is not supported; it must be 1")
    # the oldest spelling of rope_type is type
    kind = scaling.string("rope_type", default=scaling.string("type", default="default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, factor=scaling.positive_float("factor"))
    if kind == "llama3":
        return RopeConfig(
            theta,
            kind,
            factor=scaling.positive_float("factor"),
            low_freq_factor=scaling.positive_float("low_freq_factor"),
            high_freq_factor=scaling.positive_float("high_freq_factor"),
            original_max_position_embeddings=scaling.positive_int(
                "original_max_position_embeddings", default=max_position_embeddings
            ),
        )
    raise CheckpointError(f"{scaling.source}: the type {kind!r} is not supported; supported: default, linear, llama3")


def _read_windows(window: Window, fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    if window is Window.NEVER:
        return (None,) * num_layers
    if window is not Window.EVERY_LAYER and not fields.boolean("use_sliding_window", default=False):
        return (None,) * num_layers
    if window is Window.EVERY_LAYER and "sliding_window" not in fields.values:
        raise CheckpointError(f"{CONFIG_FILE} has no sliding_window; it must be a number of tokens, or null for none")
    if fields.values.get("sliding_window") is None:
        return (None,) * num_layers
    width = fields.positive_int("sliding_window")
    if window in (Window.EVERY_LAYER, Window.EVERY_LAYER_IF_USED):
        return (width,) * num_layers
    layer_types = fields.values.get("layer_types")
    if layer_types is None:
        max_window_layers = fields.whole_number("max_window_layers", minimum=0)
        if window is Window.EVEN_LAYERS:
            evens = (layer % 2 == 0 and layer < max_window_layers for layer in range(num_layers))
            return tuple(width if windowed else None for windowed in evens)
        return tuple(width if layer >= max_window_layers else None for layer in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise CheckpointError(f"{CONFIG_FILE}: layer_types must list {num_layers} layers, not {layer_types!r}")
    unknown = set(map(str, layer_types)) - {"sliding_attention", "full_attention"}
    if unknown:
        raise CheckpointError(
            f"{CONFIG_FILE}: layer_types holds {', '.join(sorted(unknown))}; "
            "each must be full_attention or sliding_attention"
        )
    return tuple(width if layer_type == "sliding_attention" else None for layer_type in layer_types)


def _read_dtype(fields: ConfigFields) -> torch.dtype | None:
    # transformers 5 writes dtype; before, it was torch_dtype
    name = fields.string("dtype", default=fields.string("torch_dtype", default="auto"))
    if name == "auto":
        return None
    if name not in DTYPES:
        raise CheckpointError(f"{CONFIG_FILE}: dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return DTYPES[name]
