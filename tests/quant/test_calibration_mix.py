"""What may be written after --calib: one source or shares of several, and how many rows each then gives."""

import pytest

from quant.calibration_mix import (
    Share,
    interleaved,
    parse_mix,
    rename_sources,
    row_counts,
    single_source,
    without_directories,
)
from quant.errors import RecipeError
from quant.method import Method
from quant.recipe import Recipe


@pytest.mark.parametrize(
    "name", ["self", "wikitext", "owner/name", "my text.txt", "/data/a,b.txt", "C:text.txt", "a:b.jsonl", "./self"]
)
def test_a_single_source_needs_no_share(name: str) -> None:
    assert parse_mix(name) == (Share(name, 1.0),)


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("wikitext:0.5,self:0.5", (Share("wikitext", 0.5), Share("self", 0.5))),
        ("owner/name:.25,self:.75", (Share("owner/name", 0.25), Share("self", 0.75))),
        ("a:0.33,b:0.33,c:0.33", (Share("a", 0.33), Share("b", 0.33), Share("c", 0.33))),
        # names with commas and colons, the last of which starts a share
        ("/data/a,b.txt:0.5,C:text.txt:0.5", (Share("/data/a,b.txt", 0.5), Share("C:text.txt", 0.5))),
        ("odd:2:1", (Share("odd:2", 1.0),)),
    ],
)
def test_several_sources_have_a_share_each(text: str, sources: tuple[Share, ...]) -> None:
    assert parse_mix(text) == sources


@pytest.mark.parametrize(
    "text", ["wikitext", "wikitext:1", "wikitext:0.5,self:0.5", "/data/a,b.txt:0.5,C:text.txt:0.5"]
)
def test_a_mix_whose_sources_keep_their_names_stays_as_it_was_written(text: str) -> None:
    assert rename_sources(text, str) == text


@pytest.mark.parametrize("path", ["notes.txt", "notes:2"])
def test_any_path_can_be_the_single_source(path: str) -> None:
    assert parse_mix(single_source(path)) == (Share(path, 1.0),)
    assert parse_mix(rename_sources("self", lambda _name: path)) == (Share(path, 1.0),)


@pytest.mark.parametrize("method", [Method.AWQ_GPTQ, Method.BEST])
def test_a_method_that_fits_weights_to_one_source_takes_a_quarter_of_the_models_own_text(method: Method) -> None:
    recipe = Recipe(method=method, calibration="notes.txt", num_samples=32)
    assert recipe.calibration_sources == (Share("notes.txt", 0.75), Share("self", 0.25))
    assert row_counts(recipe.calibration_sources, 32) == (24, 8)


@pytest.mark.parametrize(
    ("method", "calibration", "num_samples"),
    [
        (Method.AWQ, "notes.txt", 32),  # nothing is fitted
        (Method.AWQ_GPTQ, "notes.txt:1", 32),  # the user says how much
        (Method.AWQ_GPTQ, "self", 32),
        (Method.AWQ_GPTQ, "notes.txt", 3),  # a quarter is less than a row
    ],
)
def test_elsewhere_the_only_source_is_the_one_that_was_named(
    method: Method, calibration: str, num_samples: int
) -> None:
    recipe = Recipe(method=method, calibration=calibration, num_samples=num_samples)
    assert [source.share for source in recipe.calibration_sources] == [1.0]


def test_shares_that_rows_do_not_divide_are_still_whole_rows() -> None:
    sources = Recipe(calibration="notes.txt", num_samples=6).calibration_sources
    assert row_counts(sources, 6) == (5, 1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (" ", "calibration is empty"),
        ("wikitext:0.5,self", "'self' at its end has no share; write NAME:SHARE"),
        ("wikitext:0.5,self:0.5,", "has no share"),
        ("wikitext:0.5,self:0.4", "add up to 0.9; they must add up to 1"),
        ("wikitext:1,self:0", "gives self a share of 0; leave it out"),
        ("self:0.5,self:0.5", "names self twice"),
        ("notes:2", r"PATH:1"),
    ],
)
def test_a_mix_that_says_no_shares_is_refused_by_the_recipe(text: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        Recipe(calibration=text)


def test_a_share_too_small_for_one_row_is_refused_by_the_recipe() -> None:
    with pytest.raises(RecipeError, match=r"8 calibration samples give self with its share of 0\.02 not one"):
        Recipe(calibration="wikitext:0.98,self:0.02", num_samples=8)


@pytest.mark.parametrize(
    ("shares", "num_rows", "expected"),
    [((0.5, 0.5), 8, (4, 4)), ((0.5, 0.5), 5, (3, 2)), ((0.33, 0.33, 0.33), 32, (11, 11, 10)), ((0.9, 0.1), 6, (5, 1))],
)
def test_rows_are_shared_out_to_the_last_one(
    shares: tuple[float, ...], num_rows: int, expected: tuple[int, ...]
) -> None:
    assert row_counts([Share(str(index), share) for index, share in enumerate(shares)], num_rows) == expected


def test_the_rows_of_each_source_are_spread_over_all() -> None:
    # given three rows of one source for each of another
    order = interleaved((6, 2))
    # then both halves hold as many of each
    assert sorted(order) == [0] * 6 + [1] * 2
    assert sorted(order[:4]) == sorted(order[4:]) == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("self", "self"),
        ("wikitext:0.5,self:0.5", "wikitext:0.5,self:0.5"),
        ("owner/name", "owner/name"),
        ("/home/me/text.txt", "text.txt"),
        ("me/text.jsonl.gz:0.5,/data/chat:0.5", "text.jsonl.gz:0.5,chat:0.5"),
        ("../name", "name"),
    ],
)
def test_what_is_published_of_a_calibration_has_no_directories(text: str, published: str) -> None:
    assert without_directories(text) == published
