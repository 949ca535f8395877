"""Tiny random models, made by transformers: every family that is served, and what its config can ask for besides."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 272
BOS_ID, EOS_ID = 256, 258
# shorter than the sequences that are run
SLIDING_WINDOW = 24

SHAPE: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": BOS_ID,
}
_HEADS: dict[str, object] = {"head_dim": 16}
_EXPERTS: dict[str, object] = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
_GEMMA: dict[str, object] = {**_HEADS, "tie_word_embeddings": True, "query_pre_attn_scalar": 24}
# what a model of a type has unless its fields say otherwise
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {**_HEADS, "tie_word_embeddings": True},
    "mistral": {**_HEADS, "tie_word_embeddings": False, "sliding_window": SLIDING_WINDOW},
    "qwen2": {**_HEADS, "tie_word_embeddings": True},
    "qwen3": {**_HEADS, "tie_word_embeddings": False},
    "gemma": {**_HEADS, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "gemma2": {
        **_GEMMA,
        "sliding_window": SLIDING_WINDOW,
        # low enough to bend what a tiny model gives
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_GEMMA,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
        },
    },
    "phi3": {"tie_word_embeddings": False, "sliding_window": SLIDING_WINDOW},
    "olmo2": {"tie_word_embeddings": False},
    "granite": {
        "tie_word_embeddings": True,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.5},
    "smollm3": {"tie_word_embeddings": True, "no_rope_layers": [1, 0]},
    "glm4": {**_HEADS, "tie_word_embeddings": False},
    "mixtral": {**_HEADS, "tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32, "tie_word_embeddings": False},
    "qwen3_moe": {**_EXPERTS, **_HEADS, "norm_topk_prob": True, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class TinyModel:
    """A model type, and what its config says beside SHAPE and FAMILIES."""

    model_type: str
    fields: Mapping[str, object] = field(default_factory=dict)


def _llama_rope(kind: str, **parameters: object) -> TinyModel:
    return TinyModel("llama", {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}})


_YARN: dict[str, object] = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0}
_LONG_FACTORS = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
_SHORT_FACTORS = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]


def _phi3_longrope(original_max_position_embeddings: int) -> dict[str, object]:
    """With all elements turning."""
    return {
        "original_max_position_embeddings": original_max_position_embeddings,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": _SHORT_FACTORS,
            "long_factor": _LONG_FACTORS,
            "attention_factor": 1.2,
        },
    }


_PARTIAL: dict[str, object] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}

PARITY_MODELS: dict[str, TinyModel] = {
    **{model_type: TinyModel(model_type) for model_type in FAMILIES},
    "llama, linear rope": _llama_rope("linear", factor=4.0),
    "llama, dynamic rope": _llama_rope("dynamic", factor=4.0),
    "llama, yarn": _llama_rope("yarn", **_YARN),
    "llama, yarn with strengths": _llama_rope("yarn", **_YARN, mscale=1.0, mscale_all_dim=0.5, truncate=False),
    "llama, llama3 rope": _llama_rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    # every sequence is longer than 8 tokens, and none than 512
    "phi3, longrope, long": TinyModel("phi3", {**_phi3_longrope(8), "sliding_window": None}),
    "phi3, longrope, short": TinyModel("phi3", _phi3_longrope(512)),
    "phi3, part of heads turns": TinyModel("phi3", {"head_dim": 16, "rope_parameters": _PARTIAL}),
    "glm4, all of heads turns": TinyModel(
        "glm4", {"attention_bias": False, "rope_parameters": {**_PARTIAL, "partial_rotary_factor": 1.0}}
    ),
    "cohere, q and k norms": TinyModel("cohere", {"use_qk_norm": True}),
    "gemma2, no soft caps": TinyModel("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "smollm3, no rope in each 2nd": TinyModel("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}),
}


def save_random_model(
    model_type: str, fields: Mapping[str, object], directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0
) -> None:
    """Config and weights of a model of any type that transformers knows: SHAPE, what FAMILIES say, and the fields.

    Two layers of width 64; every parameter is random, norms and biases included, so that none can be forgotten
    without a difference.
    """
    config = AutoConfig.for_model(model_type, **{**SHAPE, **FAMILIES.get(model_type, {}), **fields})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            _randomize(name, parameter)
    # in place; the model's own `to` is decorated in a way that loses its type
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(directory)


def _randomize(name: str, parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        if "norm" in name or ".ln_" in name:
            parameter.uniform_(0.5, 1.5)
        elif parameter.dim() == 1:
            parameter.normal_(0, 0.2)
        else:
            # unit-variance outputs: logits spread over several units instead of all being nearly equal
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
