"""What may be written after --calib: one source or shares of several, and how many rows each then gives."""

import pytest

from quant.calibration_mix import Share, format_mix, interleaved, parse_mix, row_counts, without_directories
from quant.errors import RecipeError
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
    assert parse_mix(format_mix(sources)) == sources


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
