"""Every architecture with rows in scale_groups as tiny random models, in the variants that its rows tell apart."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.parity_models import SHAPE
from quant.linear_experts import linearize_experts
from tests.tiny_models import save_tiny_model

# shorter than the sequences of the tests, so that a mask of the wrong layer type shows
SLIDING_WINDOW = 12
HEAD_WIDTH = 16
TOKENS = torch.arange(40).view(2, 20) * 5 % 256


@dataclass(frozen=True)
class Variant:
    """A model type and what makes this one of its kinds; tests read it, pytest shows its name."""

    name: str
    model_type: str
    fields: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


HEADS: dict[str, object] = {"head_dim": HEAD_WIDTH}
MULTI_HEAD: dict[str, object] = {"num_key_value_heads": 4}
EXPERTS: dict[str, object] = {
    **HEADS,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
FALCON: dict[str, object] = {"alibi": False, "bias": False, "ffn_hidden_size": 128, "tie_word_embeddings": True}
OPT: dict[str, object] = {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}

VARIANTS = (
    Variant("llama", "llama"),
    Variant(
        "llama-mha", "llama", {**MULTI_HEAD, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    ),
    Variant("mistral", "mistral"),
    Variant("qwen2", "qwen2"),
    Variant("qwen3", "qwen3"),
    Variant("gemma", "gemma", {**HEADS, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    Variant("gemma2", "gemma2", {**HEADS, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 16}),
    Variant(
        "gemma3",
        "gemma3_text",
        {
            **HEADS,
            "sliding_window": SLIDING_WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Variant(
        "gemma3-with-vision",
        "gemma3",
        {
            "text_config": {**SHAPE, **HEADS, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 16},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
        },
    ),
    Variant("phi3", "phi3", {"tie_word_embeddings": False}),
    Variant("phi3-mha", "phi3", {**MULTI_HEAD, "sliding_window": SLIDING_WINDOW}),
    Variant("mixtral", "mixtral", {"num_local_experts": 4, "intermediate_size": 64, "tie_word_embeddings": False}),
    Variant("qwen2-moe", "qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64, "qkv_bias": True}),
    Variant(
        "qwen2-moe-dense-block", "qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64, "mlp_only_layers": [1]}
    ),
    Variant("qwen3-moe", "qwen3_moe", {**EXPERTS, "tie_word_embeddings": True}),
    Variant("qwen3-moe-sparse-step", "qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2}),
    Variant("olmo2", "olmo2", {"tie_word_embeddings": False}),
    Variant(
        "granite",
        "granite",
        {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    ),
    Variant("cohere", "cohere", {"logit_scale": 4.0, "tie_word_embeddings": True}),
    Variant("cohere-qk-norm", "cohere", {"use_qk_norm": True, "logit_scale": 4.0, "tie_word_embeddings": True}),
    Variant("smollm3", "smollm3"),
    Variant("glm4", "glm4"),
    Variant("gpt-neox", "gpt_neox", {"tie_word_embeddings": False}),
    Variant("gpt-neox-sequential", "gpt_neox", {"use_parallel_residual": False}),
    Variant("opt", "opt", OPT),
    Variant("opt-350m", "opt", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    Variant("galactica", "opt", {**OPT, "activation_function": "gelu", "enable_bias": False}),
    Variant("falcon-7b", "falcon", {**FALCON, "multi_query": True, "parallel_attn": True}),
    Variant("falcon-40b", "falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    Variant(
        "falcon-11b",
        "falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    Variant(
        "falcon-rw",
        "falcon",
        {**FALCON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    ),
    Variant("starcoder2", "starcoder2", {"use_bias": True, "sliding_window": SLIDING_WINDOW}),
)


def open_tiny(variant: Variant, directory: Path) -> PreTrainedModel:
    """The saved tiny model as the quantizer holds it: in float32, its experts as linears."""
    saved = save_tiny_model(variant.model_type, directory, config_overrides=variant.fields)
    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    linearize_experts(model)
    return model
