"""config.json is read value by value, in old and new spelling, and what is wrong is said with what would be right."""

import json
import math
from pathlib import Path

import pytest
import torch

from quant.errors import CheckpointError
from server.model.architectures import Activation
from server.model.config import ModelConfig, read_model_config
from server.model.rope_config import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from tests.tiny_models import END_OF_TEXT_ID, IM_END_ID, read_config, save_tiny_model

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 7,
}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 24}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
GEMMA3 = {
    **LLAMA,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "head_dim": 16,
    "sliding_window": 24,
}
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def test_absent_values_take_the_defaults_of_the_architecture() -> None:
    config = ModelConfig.from_dict(LLAMA)

    assert config.num_kv_heads == 4
    assert config.head_dim == 16
    assert config.layer_ropes == (RopeConfig(theta=10000.0, rotary_dim=16),) * 3
    assert config.layer_windows == (None, None, None)
    assert not config.tie_word_embeddings
    assert not config.qkv_bias
    assert config.eos_token_ids == (7,)
    assert config.dtype is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2' .* supported: llama \(LlamaForCausalLM\), mistral .*qwen2.*qwen3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*is not supported"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number from 1 up"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number from 1 up"),
        ({"vocab_size": True}, "vocab_size is True; it must be a whole number from 1 up"),
        ({"rms_norm_eps": -1.0}, r"rms_norm_eps is -1\.0; it must be a number over 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number over 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"head_dim": 15}, "head_dim must be even to be rotated, not 15"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu, swish, gelu_pytorch_tanh"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"eos_token_id": [1, "2"]}, r"eos_token_id is \[1, '2'\]; it must be a token id"),
        ({"dtype": "float8"}, "dtype 'float8' is not supported; supported: float32, bfloat16, float16"),
        (
            {"rope_scaling": {"rope_type": "mrope", "factor": 4.0}},
            "'mrope' is not supported; supported: default, linear",
        ),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling has no factor"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}},
            r"short_factor is \[1\.0\]; it must be a list of 8 numbers over 0",
        ),
        ({"rope_parameters": {"full_attention": {}}}, "full_attention is an object, but llama turns all layers alike"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported for llama"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping 50\.0 is not supported for llama"),
        ({"residual_multiplier": 0.22}, r"residual_multiplier 0\.22 is not supported for llama"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling has no factor"),
        ({"rope_scaling": 2.0}, r"rope_scaling is 2\.0; it must be an object"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is not supported for llama; it must be 1",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported for llama; it must be 1"),
    ],
)
def test_a_value_that_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict({**LLAMA, **change})


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({"rope_theta": 5000.0}, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, None),
        ({"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2}}, LinearScaling(2.0)),
        # what it scales is beyond max_position_embeddings
        ({"rope_theta": 5000.0, "rope_scaling": {"type": "dynamic", "factor": 2}}, None),
        (
            {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
            Llama3Scaling(8.0, 1.0, 4.0, 64),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, **LLAMA3_ROPE}},
            Llama3Scaling(8.0, 1.0, 4.0, 64),
        ),
        (
            {
                "rope_theta": 5000.0,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            },
            YarnScaling(4.0, 0.1 * math.log(4.0) + 1.0, 32.0, 1.0, 64, truncate=True),
        ),
        (
            {
                "rope_theta": 5000.0,
                "original_max_position_embeddings": 64,
                "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2] * 8},
            },
            LongRopeScaling((1.0,) * 8, (2.0,) * 8, math.sqrt(1 + math.log(8.0) / math.log(64.0)), 64),
        ),
    ],
)
def test_rope_is_read_in_the_old_and_the_new_spelling(
    spelling: dict[str, object], expected: RopeScaling | None
) -> None:
    assert ModelConfig.from_dict({**LLAMA, **spelling}).layer_ropes[0] == RopeConfig(5000.0, 16, expected)


@pytest.mark.parametrize(
    "spelling",
    [
        {
            "rope_theta": 70.0,
            "rope_local_base_freq": 50.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 3,
        },
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 70.0, "factor": 8.0},
            },
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ],
    ids=["old", "new"],
)
def test_gemma3_turns_layers_with_a_window_by_other_angles(spelling: dict[str, object]) -> None:
    config = ModelConfig.from_dict({**GEMMA3, **spelling})

    local, everywhere = RopeConfig(50.0, 16), RopeConfig(70.0, 16, LinearScaling(8.0))
    assert config.layer_windows == (24, 24, None)
    assert config.layer_ropes == (local, local, everywhere)


def test_gemma3_is_not_taken_for_a_model_with_one_rotation() -> None:
    with pytest.raises(CheckpointError, match="rope_parameters holds rope_theta; it must hold full_attention and"):
        ModelConfig.from_dict({**GEMMA3, "rope_parameters": {"rope_theta": 50.0}})


def test_gemma_says_gelu_and_means_its_approximation() -> None:
    gemma = {**LLAMA, "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu"}

    config = ModelConfig.from_dict(gemma)

    assert config.activation is Activation.GELU_TANH
    # what its config.json may leave out
    assert config.head_dim == 256
    assert config.tie_word_embeddings


def test_the_scales_of_granite_are_folded_into_the_hidden_states() -> None:
    multipliers = {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.015625,
        "logits_scaling": 8.0,
    }
    granite = {**LLAMA, "model_type": "granite", "architectures": ["GraniteForCausalLM"], **multipliers}

    config = ModelConfig.from_dict(granite)

    assert config.stream_embedding_scale == 24.0
    assert config.stream_norm_epsilon == 4e-5
    assert config.softmax_scale == 0.015625
    assert config.logit_scale == 0.125


def test_smollm3_turns_no_heads_in_the_layers_that_it_lists() -> None:
    smollm3 = {**LLAMA, "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]}
    rope = RopeConfig(2e6, 16)

    listed = ModelConfig.from_dict({**smollm3, "no_rope_layers": [0, 1, 0]})
    every_second = ModelConfig.from_dict({**smollm3, "no_rope_layer_interval": 2})

    assert listed.layer_ropes == (None, rope, None)
    assert every_second.layer_ropes == (rope, None, rope)
    with pytest.raises(CheckpointError, match="no_rope_layers lists 2 layers; it must list all 3"):
        ModelConfig.from_dict({**smollm3, "no_rope_layers": [0, 1]})


def test_a_part_of_a_head_that_turns_must_be_even() -> None:
    glm4 = {**LLAMA, "model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "head_dim": 16}

    assert ModelConfig.from_dict(glm4).layer_ropes[0] == RopeConfig(10000.0, 8)
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor 0\.33 turns 5 of a head's 16 elements"):
        ModelConfig.from_dict({**glm4, "partial_rotary_factor": 0.33})


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_dtype_is_read_in_the_old_and_the_new_spelling(field: str) -> None:
    assert ModelConfig.from_dict({**LLAMA, field: "bfloat16"}).dtype == torch.bfloat16


def test_mistral_windows_every_layer() -> None:
    assert ModelConfig.from_dict(MISTRAL).layer_windows == (24, 24, 24)
    assert ModelConfig.from_dict({**MISTRAL, "sliding_window": None}).layer_windows == (None, None, None)


def test_mistral_must_say_whether_it_has_a_window() -> None:
    without = {name: value for name, value in MISTRAL.items() if name != "sliding_window"}

    with pytest.raises(CheckpointError, match="has no sliding_window; it must be a number of tokens, or null"):
        ModelConfig.from_dict(without)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sliding_window": 24}, (None, None, None)),
        ({"sliding_window": 24, "use_sliding_window": False}, (None, None, None)),
        ({"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 2}, (None, None, 24)),
        ({"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 0}, (24, 24, 24)),
        (
            {
                "sliding_window": 24,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (24, None, 24),
        ),
    ],
)
def test_qwen2_windows_the_layers_that_it_lists(fields: dict[str, object], expected: tuple[int | None, ...]) -> None:
    assert ModelConfig.from_dict({**QWEN2, **fields}).layer_windows == expected


@pytest.mark.parametrize(
    ("layer_types", "message"),
    [
        (["full_attention"], "layer_types must list 3 layers"),
        (["full_attention", "linear_attention", "full_attention"], "layer_types holds linear_attention; each must be"),
    ],
)
def test_layer_types_that_do_not_fit_are_refused(layer_types: list[str], message: str) -> None:
    fields = {"sliding_window": 24, "use_sliding_window": True, "layer_types": layer_types}

    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict({**QWEN2, **fields})


def test_biases_are_a_matter_of_the_architecture_and_its_fields() -> None:
    llama = ModelConfig.from_dict({**LLAMA, "attention_bias": True})
    qwen2 = ModelConfig.from_dict(QWEN2)

    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias) == (True, True, False)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.mlp_bias) == (True, False, False)


def test_the_generation_config_adds_its_end_of_sequence_ids(tmp_path: Path) -> None:
    directory = save_tiny_model("qwen3", tmp_path)
    assert read_config(directory)["eos_token_id"] == IM_END_ID

    assert read_model_config(directory).eos_token_ids == (IM_END_ID, END_OF_TEXT_ID)


def test_a_directory_without_a_generation_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    assert read_model_config(tmp_path).eos_token_ids == (7,)


def test_a_directory_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_model_config(tmp_path)


def test_a_config_that_is_no_json_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1, 2")

    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_model_config(tmp_path)
