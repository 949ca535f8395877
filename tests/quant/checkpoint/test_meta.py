"""What is read from `quantization_config`: which format, what it claims of all modules, and what is refused by name."""

import pytest

from quant.checkpoint.meta import CheckpointFormat, QuantizationMeta, parse_meta
from quant.errors import CheckpointError
from tests.quant.checkpoint.stored_modules import meta_of

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}
GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": GROUP},
    "ignore": ["lm_head"],
    "sparsity_config": {},
    "transform_config": {},
}


def parse(fields: dict[str, object]) -> QuantizationMeta | None:
    return parse_meta({"quantization_config": fields})


def change_weights(**changes: object) -> dict[str, object]:
    return {"config_groups": {"group_0": {**GROUP, "weights": {**GROUP["weights"], **changes}}}}  # type: ignore[dict-item]


def test_a_config_without_the_field_is_an_unquantized_model() -> None:
    assert parse_meta({"model_type": "llama"}) is None


@pytest.mark.parametrize(
    "fields",
    [
        AWQ,
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"},
        {"quant_method": "AWQ", "bits": 4, "group_size": 64, "modules_to_not_convert": None},
        {"quant_method": "awq", "bits": 4, "group_size": 64, "format": "gemm", "zero_point": False},
    ],
    ids=["plain", "llm-awq names", "upper case, null list", "format for version, symmetric"],
)
def test_the_spellings_of_other_tools_mean_the_same(fields: dict[str, object]) -> None:
    assert parse(fields) == meta_of(CheckpointFormat.AWQ_GEMM, bits=4, group_size=64)


def test_a_config_nested_under_text_config_is_found() -> None:
    nested = parse_meta({"text_config": {"quantization_config": AWQ}})

    assert nested == meta_of(CheckpointFormat.AWQ_GEMM, bits=4, group_size=64)


@pytest.mark.parametrize(
    ("fields", "stored_as"),
    [
        ({**AWQ, "version": "gemv"}, CheckpointFormat.AWQ_GEMV),
        ({**AWQ, "version": "GEMV_FAST"}, CheckpointFormat.AWQ_GEMV_FAST),
        (GPTQ, CheckpointFormat.GPTQ_V1),
        ({**GPTQ, "checkpoint_format": "gptq"}, CheckpointFormat.GPTQ_V1),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, CheckpointFormat.GPTQ_V2),
        ({**GPTQ, "format": "gptq_v2"}, CheckpointFormat.GPTQ_V2),
        (AUTO_ROUND, CheckpointFormat.GPTQ_V2),
        ({**AUTO_ROUND, "quant_method": "intel/auto-round"}, CheckpointFormat.GPTQ_V2),
        ({**AUTO_ROUND, "packing_format": "auto_round:gptqmodel"}, CheckpointFormat.GPTQ_V2),
        ({**AUTO_ROUND, "packing_format": "auto_round:auto_gptq"}, CheckpointFormat.GPTQ_V1),
        ({**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}, CheckpointFormat.AWQ_GEMM),
        (COMPRESSED, CheckpointFormat.COMPRESSED_TENSORS),
        ({**COMPRESSED, "format": "mixed-precision"}, CheckpointFormat.COMPRESSED_TENSORS),
    ],
)
def test_each_tool_names_its_layout(fields: dict[str, object], stored_as: CheckpointFormat) -> None:
    meta = parse(fields)

    assert meta is not None
    assert meta.format is stored_as


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_comes_with_3_4_or_8_bits(bits: int) -> None:
    assert parse({**GPTQ, "bits": bits}) == meta_of(
        CheckpointFormat.GPTQ_V1, bits=bits, group_size=128, may_be_scaled=False
    )


@pytest.mark.parametrize(
    ("fields", "may_be"),
    [
        (AWQ, True),
        ({**AWQ, "version": "gemv_fast"}, True),
        # llm-compressor writes AWQ's weights so, and GPTQ's as well
        (COMPRESSED, True),
        (GPTQ, False),
        (AUTO_ROUND, False),
        ({**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}, False),
    ],
)
def test_whose_weights_may_have_scales_folded_in(fields: dict[str, object], may_be: bool) -> None:
    meta = parse(fields)

    assert meta is not None
    assert meta.may_be_scaled is may_be


@pytest.mark.parametrize("fields", [{**AWQ, "group_size": -1}, {**GPTQ, "group_size": -1}])
def test_one_scale_a_row_is_spelt_minus_one(fields: dict[str, object]) -> None:
    meta = parse(fields)

    assert meta is not None
    assert meta.group_size == -1


@pytest.mark.parametrize(
    "fields",
    [
        {**GPTQ, "dynamic": {"+:.*down_proj": {"bits": 8, "group_size": 32}}},
        {**AUTO_ROUND, "extra_config": {"model.layers.0.mlp.down_proj": {"bits": 8}}},
    ],
)
def test_where_some_modules_differ_no_group_size_is_claimed_of_all(fields: dict[str, object]) -> None:
    meta = parse(fields)

    assert meta is not None
    assert meta.group_size is None


def test_what_compressed_tensors_claims_of_all_modules() -> None:
    meta = parse(COMPRESSED)

    assert meta == QuantizationMeta(CheckpointFormat.COMPRESSED_TENSORS, 4, None, symmetric=True)


def test_of_several_config_groups_only_what_they_share_is_claimed() -> None:
    other = {**GROUP, "weights": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}}

    meta = parse({**COMPRESSED, "config_groups": {"group_0": GROUP, "group_1": other}})

    assert meta == QuantizationMeta(CheckpointFormat.COMPRESSED_TENSORS, None, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**AWQ, "quant_method": "bitsandbytes"}, r"'bitsandbytes', which is not read \(awq, gptq, .*are\): quantize"),
        ({**AWQ, "quant_method": "fp8"}, "'fp8', which is not read"),
        ({**AWQ, "version": "marlin"}, "marlin layout is obsolete and is not read: quantize the original"),
        ({**AWQ, "version": "llm-awq"}, "llm-awq's layout is not read: quantize the original"),
        ({**AWQ, "version": "exllama"}, "'exllama': it is not a known layout; gemm, gemv, gemv_fast are read"),
        ({**AWQ, "bits": 3}, "3 bits; AWQ checkpoints are read with 4 bits"),
        ({**AWQ, "bits": "4"}, "bits must be a positive integer, not '4'"),
        ({**AWQ, "group_size": -2}, "group_size must be a positive integer, not -2"),
        ({**AWQ, "group_size": None}, "group_size must be a positive integer, not None"),
        ({**GPTQ, "bits": 2}, "2 bits; GPTQ v1 checkpoints are read with 3 or 4 or 8 bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "GPTQ weights in Marlin's layout are not read"),
        ({**GPTQ, "is_marlin_format": True}, "GPTQ weights in Marlin's layout are not read"),
        ({**GPTQ, "dynamic": [1]}, r"dynamic must be an object, not \[1\]"),
        (
            {**AUTO_ROUND, "packing_format": "auto_round:llm_compressor"},
            "llm_compressor': it is not a known",
        ),
        ({**AUTO_ROUND, "rotation_config": {"hadamard_type": "random"}}, "rotation_config asks for rotations"),
        ({**COMPRESSED, "config_groups": {}}, "has no config_groups"),
        ({**COMPRESSED, "format": "float-quantized"}, "group_0 has format 'float-quantized'; only pack-quantized"),
        ({**COMPRESSED, **change_weights(num_bits=2)}, "group_0 has 2 bits; supported: 3, 4, 8"),
        ({**COMPRESSED, **change_weights(type="float")}, "group_0 has weights of type 'float'"),
        ({**COMPRESSED, **change_weights(strategy="block")}, "strategy 'block'"),
        (
            {**COMPRESSED, "config_groups": {"group_0": {**GROUP, "input_activations": {"num_bits": 8}}}},
            "group_0 quantizes activations",
        ),
        ({**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "asks for sparse weights"),
        ({**COMPRESSED, "transform_config": {"config_groups": {"u": {}}}}, "asks for transforms"),
    ],
)
def test_what_is_not_read_is_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(fields)
