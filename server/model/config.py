"""What the decoder needs of config.json, checked value by value. Knows no tensor and no file but the two it reads."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quant.checkpoint.tensor_files import read_json_object
from quant.errors import CheckpointError
from server.model.architectures import (
    ARCHITECTURE_OF_TYPE,
    Activation,
    Architecture,
    Bias,
    HeadNorm,
    RopeLayers,
    Scale,
)
from server.model.config_fields import ConfigFields
from server.model.layer_windows import read_windows
from server.model.moe_config import MoeConfig, read_moe
from server.model.rope_config import RopeConfig, read_layer_ropes

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# fields that change what a model computes where its architecture reads them, and the value that changes nothing
_CHANGING_FIELDS: dict[str, object] = {
    "use_bidirectional_attention": False,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "attention_multiplier": None,
    "logits_scaling": 1,
    "logit_scale": 1,
    "query_pre_attn_scalar": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_qk_norm": False,
    "no_rope_layers": None,
}


@dataclass(frozen=True)
class ModelConfig:
    """A model of a known architecture. layer_windows: per layer, how many tokens it sees back (None: all); layer_ropes:
    how it turns queries and keys (None: not at all).

    intermediate_size: of dense MLPs. moe: None without experts. The scales are what embeddings, products of queries and
    keys, what a layer adds to the hidden states, and logits are multiplied by.
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
    norm_epsilon: float
    activation: Activation
    layer_ropes: tuple[RopeConfig | None, ...]
    layer_windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norm: HeadNorm
    embedding_scale: float
    residual_scale: float
    softmax_scale: float
    logit_scale: float
    attention_soft_cap: float | None
    logit_soft_cap: float | None
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype | None
    moe: MoeConfig | None

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> "ModelConfig":
        """Check a config.json's values. Raises CheckpointError naming the field, its value and what would be right."""
        row = _find_architecture(config)
        fields = ConfigFields({**row.defaults, **config}, CONFIG_FILE)
        _refuse_foreign_fields(row, fields)
        num_layers = fields.positive_int("num_hidden_layers")
        num_heads = fields.positive_int("num_attention_heads")
        hidden_size = fields.positive_int("hidden_size")
        head_dim = fields.positive_int("head_dim", default=hidden_size // num_heads)
        num_kv_heads = fields.positive_int("num_key_value_heads", default=num_heads)
        _check_heads(num_heads, num_kv_heads, head_dim)
        layer_windows = read_windows(row.window, fields, num_layers)
        return cls(
            architecture=row,
            vocab_size=fields.positive_int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.positive_int("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.positive_int("max_position_embeddings"),
            norm_epsilon=fields.positive_float(row.epsilon_field),
            activation=_read_activation(row, fields),
            layer_ropes=read_layer_ropes(row, fields, head_dim, layer_windows),
            layer_windows=layer_windows,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
            qkv_bias=_read_bias(row.qkv_bias, fields),
            output_bias=_read_bias(row.output_bias, fields),
            mlp_bias=_read_bias(row.mlp_bias, fields),
            head_norm=_read_head_norm(row, fields),
            embedding_scale=_read_scale(row.embedding_scale, fields, default=1.0),
            residual_scale=_read_scale(row.residual_scale, fields, default=1.0),
            softmax_scale=_read_scale(row.softmax_scale, fields, default=head_dim**-0.5),
            logit_scale=_read_scale(row.logit_scale, fields, default=1.0),
            attention_soft_cap=_read_soft_cap(row.attention_soft_cap_field, fields),
            logit_soft_cap=_read_soft_cap(row.logit_soft_cap_field, fields),
            eos_token_ids=fields.token_ids("eos_token_id"),
            dtype=_read_dtype(fields),
            moe=None if row.moe is None else read_moe(row.moe, fields, num_layers),
        )

    @property
    def stream_embedding_scale(self) -> float:
        """What embeddings are multiplied by where the hidden states are kept divided by residual_scale.

        Then what a layer adds needs no factor: a norm gives the same for hidden states of any scale, if its epsilon has
        the scale too.
        """
        return self.embedding_scale / self.residual_scale

    @property
    def stream_norm_epsilon(self) -> float:
        """The epsilon of norms of hidden states that are kept divided by residual_scale."""
        return self.norm_epsilon / self.residual_scale**2


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


def _refuse_foreign_fields(row: Architecture, fields: ConfigFields) -> None:
    """A field that changes what others compute is not to be passed over where this architecture has no use for it."""
    known: set[str | None] = {
        scale.field for scale in (row.embedding_scale, row.residual_scale, row.softmax_scale, row.logit_scale) if scale
    }
    known |= {row.attention_soft_cap_field, row.logit_soft_cap_field}
    if row.head_norm is HeadNorm.OWN_WEIGHTS:
        known.add("use_qk_norm")
    if row.rope_layers is RopeLayers.ALL_BUT_LISTED:
        known.add("no_rope_layers")
    for name, neutral in _CHANGING_FIELDS.items():
        value = fields.values.get(name)
        if name not in known and value is not None and value != neutral:
            raise CheckpointError(f"{CONFIG_FILE}: {name} {value!r} is not supported for {row.model_type}")


def _check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{CONFIG_FILE}: num_key_value_heads {num_kv_heads} does not divide num_attention_heads {num_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"{CONFIG_FILE}: head_dim must be even to be rotated, not {head_dim}")


def _read_activation(row: Architecture, fields: ConfigFields) -> Activation:
    name = fields.string(row.activation_field, default="silu")
    if name not in row.activations:
        raise CheckpointError(
            f"{CONFIG_FILE}: {row.activation_field} {name!r} is not supported; supported: {', '.join(row.activations)}"
        )
    return row.activations[name]


def _read_head_norm(row: Architecture, fields: ConfigFields) -> HeadNorm:
    if row.head_norm is HeadNorm.OWN_WEIGHTS and not fields.boolean("use_qk_norm", default=False):
        return HeadNorm.NEVER
    return row.head_norm


def _read_scale(scale: Scale | None, fields: ConfigFields, *, default: float) -> float:
    return default if scale is None else fields.positive_float(scale.field) ** scale.power


def _read_soft_cap(name: str | None, fields: ConfigFields) -> float | None:
    return None if name is None else fields.optional_positive_float(name)


def _read_bias(bias: Bias, fields: ConfigFields) -> bool:
    if bias in (Bias.ATTENTION_FIELD, Bias.MLP_FIELD, Bias.QKV_FIELD):
        return fields.boolean(bias.value, default=bias is Bias.QKV_FIELD)
    return bias is Bias.ALWAYS


def _read_dtype(fields: ConfigFields) -> torch.dtype | None:
    # transformers 5 writes dtype; before, it was torch_dtype
    name = fields.string("dtype", default=fields.string("torch_dtype", default="auto"))
    if name == "auto":
        return None
    if name not in DTYPES:
        raise CheckpointError(f"{CONFIG_FILE}: dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return DTYPES[name]
