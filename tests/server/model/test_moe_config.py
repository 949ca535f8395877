"""What config.json says of experts: which layers have them, how many, how wide, and how their outputs are weighted."""

import pytest

from quant.errors import CheckpointError
from server.model.config import ModelConfig
from server.model.moe_config import MoeConfig
from tests.server.model.test_config import LLAMA, MISTRAL

MIXTRAL = {
    **MISTRAL,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN: dict[str, object] = {**LLAMA, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 96}
QWEN2_MOE = {
    **QWEN,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 192,
}
QWEN3_MOE = {**QWEN, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


def moe_of(config: dict[str, object]) -> MoeConfig:
    moe = ModelConfig.from_dict(config).moe
    assert moe is not None
    return moe


def test_a_dense_model_has_no_experts() -> None:
    assert ModelConfig.from_dict({**LLAMA, "num_experts": 8}).moe is None


def test_mixtral_has_experts_of_its_intermediate_size_in_every_layer_and_weights_that_add_up() -> None:
    assert moe_of(MIXTRAL) == MoeConfig(8, 2, 128, None, norm_topk_prob=True, sparse_layers=(True, True, True))


def test_qwen2_moe_has_a_shared_expert_and_weights_as_they_are() -> None:
    assert moe_of(QWEN2_MOE) == MoeConfig(60, 4, 96, 192, norm_topk_prob=False, sparse_layers=(True, True, True))


def test_the_number_of_experts_is_read_in_either_spelling() -> None:
    # transformers 5 saves qwen3_moe's as num_local_experts
    respelt = {**QWEN3_MOE, "num_experts": None, "num_local_experts": 60}

    assert moe_of(respelt) == moe_of(QWEN3_MOE)
    assert moe_of({**QWEN3_MOE, "norm_topk_prob": True}).norm_topk_prob


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mlp_only_layers": [0, 2]}, (False, True, False)),
        ({"decoder_sparse_step": 2}, (False, True, False)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, (False, False, False)),
    ],
)
def test_layers_may_be_dense(fields: dict[str, object], expected: tuple[bool, ...]) -> None:
    assert moe_of({**QWEN3_MOE, **fields}).sparse_layers == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": None}, "has no num_experts"),
        ({"num_experts": 0}, "num_experts is 0; it must be a whole number from 1 up"),
        ({"num_experts_per_tok": 61}, "num_experts_per_tok is 61, but num_experts is 60"),
        ({"moe_intermediate_size": None}, "has no moe_intermediate_size"),
        ({"shared_expert_intermediate_size": None}, "has no shared_expert_intermediate_size"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be true or false"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be a whole number from 1 up"),
        ({"mlp_only_layers": [0, -1]}, r"mlp_only_layers is \[0, -1\]; it must be a list of whole numbers from 0 up"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1; it must be a list"),
    ],
)
def test_a_value_that_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict({**QWEN2_MOE, **change})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MIXTRAL, (24, 24, 24)),
        ({**QWEN3_MOE, "sliding_window": 24}, (None, None, None)),
        ({**QWEN3_MOE, "sliding_window": 24, "use_sliding_window": True}, (24, 24, 24)),
        ({**QWEN2_MOE, "sliding_window": 0, "use_sliding_window": False}, (None, None, None)),
        (
            {**QWEN2_MOE, "sliding_window": 24, "use_sliding_window": True, "max_window_layers": 28},
            (24, None, 24),
        ),
        (
            {**QWEN2_MOE, "sliding_window": 24, "use_sliding_window": True, "max_window_layers": 2},
            (24, None, None),
        ),
    ],
)
def test_each_family_has_its_own_rule_of_windows(config: dict[str, object], expected: tuple[int | None, ...]) -> None:
    assert ModelConfig.from_dict(config).layer_windows == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (QWEN2_MOE, (True, False)),
        ({**QWEN2_MOE, "qkv_bias": False}, (False, False)),
        (QWEN3_MOE, (False, False)),
        ({**QWEN3_MOE, "attention_bias": True}, (True, True)),
        (MIXTRAL, (False, False)),
    ],
)
def test_each_family_has_its_own_rule_of_biases(config: dict[str, object], expected: tuple[bool, bool]) -> None:
    read = ModelConfig.from_dict(config)

    assert (read.qkv_bias, read.output_bias) == expected
