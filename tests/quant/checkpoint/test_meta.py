"""What is read from and written to `quantization_config`."""

import pytest
from transformers import AwqConfig

from quant.checkpoint.meta import QuantizationMeta, awq_gemm_meta, parse_meta
from quant.errors import CheckpointError

PLAIN = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}


def test_what_is_written_is_read_back() -> None:
    meta = awq_gemm_meta(4, 64, ("lm_head",))

    assert parse_meta({"quantization_config": meta.to_config()}) == meta


def test_a_config_without_the_field_is_an_unquantized_model() -> None:
    assert parse_meta({"model_type": "llama"}) is None


@pytest.mark.parametrize(
    "fields",
    [
        PLAIN,
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"},
        {"quant_method": "AWQ", "bits": 4, "group_size": 64, "modules_to_not_convert": None},
        {"quant_method": "awq", "bits": 4, "group_size": 64, "format": "gemm", "zero_point": False},
    ],
    ids=["plain", "llm-awq names", "upper case, null list", "format for version, symmetric"],
)
def test_the_spellings_of_other_tools_mean_the_same(fields: dict[str, object]) -> None:
    assert parse_meta({"quantization_config": fields}) == QuantizationMeta("awq", 4, 64, "gemm", ())


def test_a_config_nested_under_text_config_is_found() -> None:
    assert parse_meta({"text_config": {"quantization_config": PLAIN}}) == awq_gemm_meta(4, 64, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "GPTQ checkpoints are not supported yet"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors checkpoints are not supported yet"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes checkpoints are not supported"),
        ({"quant_method": "fp8"}, "'fp8': it is not read"),
        ({"version": "gemv"}, "gemv layout is not supported yet"),
        ({"version": "gemv_fast"}, "gemv_fast layout is not supported yet"),
        ({"version": "marlin"}, "marlin layout is obsolete"),
        ({"version": "exllama"}, "'exllama': it is not a known AWQ layout; gemm is read"),
        ({"bits": 3}, "3 bits; supported: 4"),
        ({"bits": "4"}, "bits must be a positive integer, not '4'"),
        ({"group_size": -1}, "group_size must be a positive integer, not -1"),
        ({"group_size": None}, "group_size must be a positive integer, not None"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of module names, not 'lm_head'"),
    ],
)
def test_what_is_not_read_is_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_meta({"quantization_config": {**PLAIN, **change}})


def test_transformers_takes_what_is_written_for_an_awq_gemm_config() -> None:
    config = AwqConfig.from_dict(awq_gemm_meta(4, 64, ("lm_head",)).to_config())

    assert (config.bits, config.group_size, config.zero_point) == (4, 64, True)
    assert config.modules_to_not_convert == ["lm_head"]
