"""A recipe is valid or does not exist; the group size fits every layer or is refused by the layer's name."""

import pytest

from kernels.weight_kinds import WHOLE_ROW
from quant.checkpoint.format_name import OutputFormat
from quant.errors import RecipeError
from quant.method import Method
from quant.recipe import Recipe, choose_group_size, parse_format, parse_group_size


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("bits", 5, "bits is 5; supported: 3, 4, 8"),
        ("group_size", 48, "group size is 48; supported: auto, 128, 64, 32, row"),
        ("bits", 2, "bits is 2"),
        ("group_size", -2, "group size is -2"),
        ("calibration", " ", "calibration is empty"),
        ("num_samples", 0, "calibration samples is 0"),
        ("sample_tokens", -1, "calibration tokens is -1"),
        ("num_windows", -1, "number of windows is -1"),
        ("seed", -3, "seed is -3"),
        ("device", "tpu", "device is 'tpu'; supported: auto, cpu, cuda"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name(field: str, value: object, named: str) -> None:
    with pytest.raises(RecipeError, match=named) as refusal:
        Recipe(**{field: value})
    assert refusal.value.field == field


@pytest.mark.parametrize("bits", [3, 8])
def test_bits_that_awq_cannot_hold_name_the_format_that_can(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"bits is {bits}, .* use --format compressed-tensors"):
        Recipe(bits=bits, format=OutputFormat.AWQ)


@pytest.mark.parametrize(("bits", "expected"), [(3, "compressed-tensors"), (4, "awq"), (8, "compressed-tensors")])
def test_the_format_follows_from_the_bits(bits: int, expected: str) -> None:
    assert Recipe(bits=bits).output_format == expected
    assert Recipe(bits=bits, format=OutputFormat.COMPRESSED_TENSORS).output_format == "compressed-tensors"


def test_one_scale_a_row_fits_every_model() -> None:
    assert choose_group_size(WHOLE_ROW, {"layers.0.q": 100, "layers.0.down": 7}) == WHOLE_ROW


@pytest.mark.parametrize(
    ("sizes", "expected"), [((4096, 11008), 128), ((576, 1536), 64), ((96, 128), 32), ((128, 64), 64)]
)
def test_auto_is_the_largest_group_size_that_divides_every_layer(sizes: tuple[int, int], expected: int) -> None:
    assert choose_group_size(None, {"a": sizes[0], "b": sizes[1]}) == expected


def test_a_requested_group_size_that_fits_is_taken() -> None:
    assert choose_group_size(32, {"a": 4096}) == 32


def test_a_group_size_that_does_not_divide_names_the_layer_and_what_would_fit() -> None:
    with pytest.raises(RecipeError, match=r"128 does not divide the 576 in features of layers\.0\.q; use 64 or 32"):
        choose_group_size(128, {"layers.0.down": 1536, "layers.0.q": 576})


def test_a_model_that_no_group_size_fits_is_refused() -> None:
    with pytest.raises(RecipeError, match="no supported group size fits"):
        choose_group_size(None, {"layers.0.q": 100})


@pytest.mark.parametrize(("context", "expected"), [(None, 512), (2048, 512), (512, 512), (128, 128)])
def test_the_default_row_is_cut_to_the_models_context(context: int | None, expected: int) -> None:
    fitted = Recipe().within_context(context)
    assert fitted.calibration_shape == (Recipe().calibration_shape[0], expected)


def test_a_row_that_is_asked_for_and_longer_than_the_context_is_refused_with_the_limit() -> None:
    assert Recipe(sample_tokens=128).within_context(128).sample_tokens == 128
    with pytest.raises(
        RecipeError, match=r"calibration tokens is 129, .* at most 128 .*use --calib-seqlen 128 or less"
    ):
        Recipe(sample_tokens=129).within_context(128)


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"calibration": "wikitext"}, "--calib"),
        ({"num_samples": 8}, "--calib-samples"),
        ({"sample_tokens": 8}, "--calib-seqlen"),
    ],
)
def test_a_method_that_reads_no_text_is_given_none(given: dict[str, object], option: str) -> None:
    with pytest.raises(RecipeError, match=f"the method rtn reads no calibration text; leave out {option},") as refusal:
        Recipe(method=Method.RTN, **given)
    assert refusal.value.field == next(iter(given))
    assert Recipe(**given).with_method(Method.RTN) == Recipe(method=Method.RTN)
    assert Recipe(**given).with_method(Method.BEST) == Recipe(method=Method.BEST, **given)


def test_a_mix_that_is_none_is_the_fault_of_the_calibration() -> None:
    with pytest.raises(RecipeError, match=r"add up to 0\.9") as refusal:
        Recipe(calibration="self:0.5,wikitext:0.4")
    assert refusal.value.field == "calibration"


@pytest.mark.parametrize(("text", "size"), [("auto", None), ("row", WHOLE_ROW), ("64", 64)])
def test_a_group_size_is_said_in_words_or_as_a_number(text: str, size: int | None) -> None:
    assert parse_group_size(text) == size


@pytest.mark.parametrize("text", ["big", "-64", "6.4", ""])
def test_a_group_size_that_is_none_is_refused_with_the_choices(text: str) -> None:
    with pytest.raises(RecipeError, match=f"group size is '{text}'; supported: auto, 128, 64, 32, row") as refusal:
        parse_group_size(text)
    assert refusal.value.field == "group_size"


def test_a_format_is_said_by_its_name_or_left_open() -> None:
    assert [parse_format(text) for text in ("auto", "awq")] == [None, OutputFormat.AWQ]
    with pytest.raises(RecipeError, match="format is 'gptq'; supported: auto, awq, compressed-tensors"):
        parse_format("gptq")
