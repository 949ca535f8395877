"""Data: what differs between the architectures of the Llama family. A new one is a new row."""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Architecture:
    """One row. model_type and class_name are config.json's model_type and entry of architectures."""

    model_type: str
    class_name: str
    qkv_bias: Bias
    output_bias: Bias
    mlp_bias: Bias
    head_norm: bool
    """queries and keys are normalized per head before the rotation"""
    window: Window
    moe: MoeFamily | None = None
    """what is in the place of MLPs; None: dense ones in all layers"""


ARCHITECTURES = (
    Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        output_bias=Bias.ATTENTION_FIELD,
        mlp_bias=Bias.MLP_FIELD,
        head_norm=False,
        window=Window.NEVER,
    ),
    Architecture(
        model_type="mistral",
        class_name="MistralForCausalLM",
        qkv_bias=Bias.NEVER,
        output_bias=Bias.NEVER,
        mlp_bias=Bias.NEVER,
        head_norm=False,
        window=Window.EVERY_LAYER,
    ),
    Architecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        qkv_bias=Bias.ALWAYS,
        output_bias=Bias.NEVER,
        mlp_bias=Bias.NEVER,
        head_norm=False,
        window=Window.LISTED_LAYERS,
    ),
    Architecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        output_bias=Bias.ATTENTION_FIELD,
        mlp_bias=Bias.NEVER,
        head_norm=True,
        window=Window.LISTED_LAYERS,
    ),
    Architecture(
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        qkv_bias=Bias.NEVER,
        output_bias=Bias.NEVER,
        mlp_bias=Bias.NEVER,
        head_norm=False,
        window=Window.EVERY_LAYER,
        moe=MIXTRAL,
    ),
    Architecture(
        model_type="qwen2_moe",
        class_name="Qwen2MoeForCausalLM",
        qkv_bias=Bias.QKV_FIELD,
        output_bias=Bias.NEVER,
        mlp_bias=Bias.NEVER,
        head_norm=False,
        window=Window.EVEN_LAYERS,
        moe=QWEN2_MOE,
    ),
    Architecture(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        qkv_bias=Bias.ATTENTION_FIELD,
        output_bias=Bias.ATTENTION_FIELD,
        mlp_bias=Bias.NEVER,
        head_norm=True,
        window=Window.EVERY_LAYER_IF_USED,
        moe=QWEN3_MOE,
    ),
)
ARCHITECTURE_OF_TYPE = {architecture.model_type: architecture for architecture in ARCHITECTURES}
