"""Data: what differs between the architectures that the decoder computes. A new one is a new row.

Sources: the models' modeling and configuration files in transformers 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from server.model.moe_config import MIXTRAL, QWEN2_MOE, QWEN3_MOE, MoeFamily


class Bias(Enum):
    """Whether a projection has a bias."""

    NEVER = "never"
    ALWAYS = "always"
    ATTENTION_FIELD = "attention_bias"
    """as config.json's attention_bias says"""
    MLP_FIELD = "mlp_bias"
    """as config.json's mlp_bias says"""
    QKV_FIELD = "qkv_bias"
    """as config.json's qkv_bias says; there is one when it says nothing"""


class Window(Enum):
    """Which layers see only the last `sliding_window` tokens."""

    NEVER = "never"
    EVERY_LAYER = "every_layer"
    """all, when config.json has a sliding_window"""
    LISTED_LAYERS = "listed_layers"
    """those that config.json's layer_types or max_window_layers name, when use_sliding_window is true"""
    EVERY_LAYER_IF_USED = "every_layer_if_used"
    """all, when use_sliding_window is true"""
    EVEN_LAYERS = "even_layers"
    """those that layer_types names, or else every second below max_window_layers, when use_sliding_window is true"""
    ALL_BUT_EVERY_NTH = "all_but_every_nth"
    """those that layer_types names, or else all but each sliding_window_pattern-th"""


class NormKind(Enum):
    """What a norm does with its weight w."""

    RMS = "rms"
    """x / rms(x) * w"""
    RMS_ONE_PLUS = "rms_one_plus"
    """x / rms(x) * (1 + w)"""
    LAYER = "layer"
    """(x - mean(x)) / std(x) * w"""


class HeadNorm(Enum):
    """How queries and keys are normalized before they turn. The weights are q_norm and k_norm."""

    NEVER = "never"
    EVERY_HEAD = "every_head"
    """each head by itself, all with the same weight"""
    WHOLE_PROJECTION = "whole_projection"
    """all heads together"""
    OWN_WEIGHTS = "own_weights"
    """each head by itself with its own weight, when config.json's use_qk_norm is true"""


class Activation(Enum):
    """What the gate of an MLP goes through."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


SILU_ONLY = {"silu": Activation.SILU, "swish": Activation.SILU}
ACTIVATIONS = {**SILU_ONLY, "gelu_pytorch_tanh": Activation.GELU_TANH, "gelu_new": Activation.GELU_TANH}


class RopeLayers(Enum):
    """Which layers turn queries and keys, and by which angles."""

    ALL_ALIKE = "all_alike"
    BY_WINDOW = "by_window"
    """those with a window by other angles than those without"""
    ALL_BUT_LISTED = "all_but_listed"
    """all but those with a 0 in no_rope_layers, or else each no_rope_layer_interval-th"""


@dataclass(frozen=True)
class LayerNorms:
    """What checkpoints call the norms of a layer; None where there is none.

    attention, mlp: of the hidden states that attention and MLP read; of what they give: attention_output, mlp_output.
    """

    attention: str | None = "input_layernorm"
    mlp: str | None = "post_attention_layernorm"
    attention_output: str | None = None
    mlp_output: str | None = None


@dataclass(frozen=True)
class Scale:
    """config.json's `field` to the power of `power`."""

    field: str
    power: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """One row; what it does not say is as in Llama.

    model_type and class_name are config.json's model_type and entry of architectures.
    """

    model_type: str
    class_name: str
    qkv_bias: Bias = Bias.NEVER
    output_bias: Bias = Bias.NEVER
    mlp_bias: Bias = Bias.NEVER
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """what the projections to queries, keys and values are called; one name where they are one module"""
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    head_norm: HeadNorm = HeadNorm.NEVER
    norm: NormKind = NormKind.RMS
    layer_norms: LayerNorms = LayerNorms()
    epsilon_field: str = "rms_norm_eps"
    is_parallel: bool = False
    """attention and MLP read the same normalized hidden states, and their sum is added to them"""
    activation_field: str = "hidden_act"
    activations: Mapping[str, Activation] = field(default_factory=lambda: ACTIVATIONS)
    """by config.json's names"""
    window: Window = Window.NEVER
    rope_layers: RopeLayers = RopeLayers.ALL_ALIKE
    turns_neighbours: bool = False
    """element 2i of a head turns with element 2i + 1, and not with one half of them further"""
    partial_rotary: bool = False
    """config.json's partial_rotary_factor says which share of a head turns"""
    embedding_scale: Scale | None = None
    """what embeddings are multiplied by"""
    rounds_embedding_scale: bool = False
    """to the dtype of the activations, as it was in training"""
    residual_scale: Scale | None = None
    """what attention and MLP give is multiplied by before it is added to the hidden states"""
    softmax_scale: Scale | None = None
    """what products of queries and keys are multiplied by; None: the head width to the power of -0.5"""
    logit_scale: Scale | None = None
    attention_soft_cap_field: str | None = None
    logit_soft_cap_field: str | None = None
    moe: MoeFamily | None = None
    """what is in the place of MLPs; None: dense ones in all layers"""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """what fields stand for that config.json lacks, where other rows take them for something else"""


GEMMA_DEFAULTS: dict[str, object] = {"head_dim": 256, "tie_word_embeddings": True}
ROOT_OF_WIDTH = Scale("hidden_size", 0.5)
GEMMA_LAYER_NORMS = LayerNorms(
    attention_output="post_attention_layernorm",
    mlp="pre_feedforward_layernorm",
    mlp_output="post_feedforward_layernorm",
)
LOGIT_SOFT_CAP = "final_logit_softcapping"

ARCHITECTURES = (
    Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        output_bias=Bias.ATTENTION_FIELD,
        mlp_bias=Bias.MLP_FIELD,
    ),
    Architecture(model_type="mistral", class_name="MistralForCausalLM", window=Window.EVERY_LAYER),
    Architecture(model_type="qwen2", class_name="Qwen2ForCausalLM", qkv_bias=Bias.ALWAYS, window=Window.LISTED_LAYERS),
    Architecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        output_bias=Bias.ATTENTION_FIELD,
        head_norm=HeadNorm.EVERY_HEAD,
        window=Window.LISTED_LAYERS,
    ),
    Architecture(
        model_type="gemma",
        class_name="GemmaForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        output_bias=Bias.ATTENTION_FIELD,
        norm=NormKind.RMS_ONE_PLUS,
        embedding_scale=ROOT_OF_WIDTH,
        rounds_embedding_scale=True,
        # the first checkpoints say gelu and mean its approximation
        activations={**ACTIVATIONS, "gelu": Activation.GELU_TANH},
        defaults={**GEMMA_DEFAULTS, "hidden_act": "gelu_pytorch_tanh"},
    ),
    Architecture(
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        output_bias=Bias.ATTENTION_FIELD,
        norm=NormKind.RMS_ONE_PLUS,
        layer_norms=GEMMA_LAYER_NORMS,
        activation_field="hidden_activation",
        window=Window.ALL_BUT_EVERY_NTH,
        embedding_scale=ROOT_OF_WIDTH,
        rounds_embedding_scale=True,
        softmax_scale=Scale("query_pre_attn_scalar", -0.5),
        attention_soft_cap_field="attn_logit_softcapping",
        logit_soft_cap_field=LOGIT_SOFT_CAP,
        defaults={
            **GEMMA_DEFAULTS,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            LOGIT_SOFT_CAP: 30.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
        },
    ),
    Architecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        output_bias=Bias.ATTENTION_FIELD,
        head_norm=HeadNorm.EVERY_HEAD,
        norm=NormKind.RMS_ONE_PLUS,
        layer_norms=GEMMA_LAYER_NORMS,
        activation_field="hidden_activation",
        window=Window.ALL_BUT_EVERY_NTH,
        rope_layers=RopeLayers.BY_WINDOW,
        embedding_scale=ROOT_OF_WIDTH,
        rounds_embedding_scale=True,
        softmax_scale=Scale("query_pre_attn_scalar", -0.5),
        logit_soft_cap_field=LOGIT_SOFT_CAP,
        defaults={
            **GEMMA_DEFAULTS,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
        },
    ),
    Architecture(
        model_type="phi3",
        class_name="Phi3ForCausalLM",
        qkv=("qkv_proj",),
        gate_up=("gate_up_proj",),
        window=Window.EVERY_LAYER,
        partial_rotary=True,
        defaults={"sliding_window": None, "original_max_position_embeddings": 4096},
    ),
    Architecture(
        model_type="olmo2",
        class_name="Olmo2ForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        output_bias=Bias.ATTENTION_FIELD,
        head_norm=HeadNorm.WHOLE_PROJECTION,
        layer_norms=LayerNorms(
            attention=None,
            attention_output="post_attention_layernorm",
            mlp=None,
            mlp_output="post_feedforward_layernorm",
        ),
    ),
    Architecture(
        model_type="granite",
        class_name="GraniteForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        output_bias=Bias.ATTENTION_FIELD,
        mlp_bias=Bias.MLP_FIELD,
        embedding_scale=Scale("embedding_multiplier"),
        residual_scale=Scale("residual_multiplier"),
        softmax_scale=Scale("attention_multiplier"),
        logit_scale=Scale("logits_scaling", -1),
        defaults={
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    Architecture(
        model_type="cohere",
        class_name="CohereForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        output_bias=Bias.ATTENTION_FIELD,
        head_norm=HeadNorm.OWN_WEIGHTS,
        norm=NormKind.LAYER,
        layer_norms=LayerNorms(mlp=None),
        epsilon_field="layer_norm_eps",
        is_parallel=True,
        turns_neighbours=True,
        logit_scale=Scale("logit_scale"),
        defaults={
            "logit_scale": 0.0625,
            "layer_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": True,
        },
    ),
    Architecture(
        model_type="smollm3",
        class_name="SmolLM3ForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        output_bias=Bias.ATTENTION_FIELD,
        mlp_bias=Bias.MLP_FIELD,
        window=Window.LISTED_LAYERS,
        rope_layers=RopeLayers.ALL_BUT_LISTED,
        defaults={"rope_theta": 2_000_000.0, "tie_word_embeddings": True},
    ),
    Architecture(
        model_type="glm4",
        class_name="Glm4ForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        gate_up=("gate_up_proj",),
        layer_norms=LayerNorms(
            attention_output="post_self_attn_layernorm",
            mlp="post_attention_layernorm",
            mlp_output="post_mlp_layernorm",
        ),
        turns_neighbours=True,
        partial_rotary=True,
        defaults={"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5},
    ),
    Architecture(
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        window=Window.EVERY_LAYER,
        activations=SILU_ONLY,
        moe=MIXTRAL,
    ),
    Architecture(
        model_type="qwen2_moe",
        class_name="Qwen2MoeForCausalLM",
        qkv_bias=Bias.QKV_FIELD,
        window=Window.EVEN_LAYERS,
        activations=SILU_ONLY,
        moe=QWEN2_MOE,
    ),
    Architecture(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        output_bias=Bias.ATTENTION_FIELD,
        head_norm=HeadNorm.EVERY_HEAD,
        window=Window.EVERY_LAYER_IF_USED,
        activations=SILU_ONLY,
        moe=QWEN3_MOE,
    ),
)
ARCHITECTURE_OF_TYPE = {architecture.model_type: architecture for architecture in ARCHITECTURES}
