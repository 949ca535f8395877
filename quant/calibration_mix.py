"""What a calibration may be called: one source, or several with their shares, and how many rows each gives.

Reads no file and fetches nothing: whether a source is there is found out when it is read.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath

from quant.errors import RecipeError

SELF_CALIBRATION = "self"
TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".zst")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# thirds are written as 0.33
SUM_TOLERANCE = 0.011
_NAME_AND_SHARE = re.compile(r"(?P<name>.+?):(?P<share>\d+(?:\.\d*)?|\.\d+)(?:,|$)", re.DOTALL)


class Column(StrEnum):
    """The field of a data set's rows that is read: prose, or a conversation's messages with role and content."""

    TEXT = "text"
    MESSAGES = "messages"


@dataclass(frozen=True)
class Preset:
    """A well-known data set of the hub. files: a pattern in the repository, of which the first file is read.

    separator: what stands between two rows of text.
    """

    repository: str
    files: str
    column: Column = Column.TEXT
    separator: str = "\n\n"


# train splits where there are any, so that the usual test splits stay unseen
PRESETS = {
    # its rows are the lines of the text, each with its line break
    "wikitext": Preset("Salesforce/wikitext", "wikitext-2-raw-v1/train-*.parquet", separator=""),
    "c4": Preset("allenai/c4", "en/c4-train.00000-of-*.json.gz"),
    "pileval": Preset("mit-han-lab/pile-val-backup", "val.jsonl*"),
    "ultrachat": Preset("HuggingFaceH4/ultrachat_200k", "data/train_sft-00000-of-*.parquet", Column.MESSAGES),
}


@dataclass(frozen=True)
class Share:
    """One source of a calibration, and what part of its rows, above 0 to 1, comes from it."""

    name: str
    share: float


def parse_mix(text: str) -> tuple[Share, ...]:
    """`NAME`, or `NAME:SHARE,NAME:SHARE`: the sources with their shares, which must add up to 1.

    A name ends at the last `:SHARE` before a comma or the end, so a name may hold colons, and commas too where it has
    a share. Raises RecipeError saying what is wrong.
    """
    if not text.strip():
        raise RecipeError("calibration is empty; give self, a preset, the path of a text file, or a hub data set")
    sources, position = [], 0
    while match := _NAME_AND_SHARE.match(text, position):
        sources.append(Share(match["name"], float(match["share"])))
        position = match.end()
    if not sources:
        return (Share(text, 1.0),)
    if position < len(text) or text.endswith(","):
        raise RecipeError(
            f"calibration {text!r} mixes sources, and {text[position:]!r} at its end has no share; "
            "write NAME:SHARE,NAME:SHARE, like wikitext:0.5,self:0.5"
        )
    return _check_shares(text, sources)


def with_own_text(text: str, own_share: float, num_rows: int) -> tuple[Share, ...]:
    """The sources of parse_mix; where text names a single one without a share, so much of the model's own text beside.

    The own text has whole rows, and none where its share of num_rows is less than one.
    """
    sources = parse_mix(text)
    num_own = int(own_share * num_rows)
    if num_own == 0 or text == SELF_CALIBRATION or _NAME_AND_SHARE.match(text):
        return sources
    return Share(text, 1 - num_own / num_rows), Share(SELF_CALIBRATION, num_own / num_rows)


def single_source(name: str) -> str:
    """The text that parse_mix takes for one source of that name; with its share where the name ends like a share."""
    return f"{name}:1" if _NAME_AND_SHARE.match(name) else name


def rename_sources(text: str, rename: Callable[[str], str]) -> str:
    """The same mix with every source by the name that rename gives it. Raises as parse_mix does, and as rename does."""
    sources = parse_mix(text)
    if not _NAME_AND_SHARE.match(text):
        return single_source(rename(text))
    return ",".join(f"{rename(source.name)}:{source.share:g}" for source in sources)


def without_directories(text: str) -> str:
    """The calibration with only the file names of its paths: what may be published of it."""
    return rename_sources(text, _published_name)


def row_counts(sources: Sequence[Share], num_rows: int) -> tuple[int, ...]:
    """How many of the rows each source gives: its share, rounded such that the sum is num_rows.

    Raises RecipeError when a share is too small for one row.
    """
    total = sum(source.share for source in sources)
    exact = [num_rows * source.share / total for source in sources]
    counts = [math.floor(rows) for rows in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: num_rows - sum(counts)]:
        counts[index] += 1
    for source, count in zip(sources, counts, strict=True):
        if count == 0:
            raise RecipeError(
                f"{num_rows} calibration samples give {source.name} with its share of {source.share:g} not one; "
                "use more samples, or a larger share"
            )
    return tuple(counts)


def interleaved(counts: Sequence[int]) -> list[int]:
    """The index of the source of each row, such that the rows of every source are spread evenly over all."""
    places = [((row + 0.5) / count, index) for index, count in enumerate(counts) for row in range(count)]
    return [index for _, index in sorted(places)]


def is_hub_name(name: str) -> bool:
    """Whether a name that is no file here has the form of a hub data set (owner/name)."""
    return HUB_NAME.fullmatch(name) is not None and not name.startswith(".") and not _has_text_suffix(name)


def _check_shares(text: str, sources: list[Share]) -> tuple[Share, ...]:
    names = [source.name for source in sources]
    total = sum(source.share for source in sources)
    for source in sources:
        if source.share <= 0:
            raise RecipeError(f"calibration {text!r} gives {source.name} a share of 0; leave it out")
        if names.count(source.name) > 1:
            raise RecipeError(f"calibration {text!r} names {source.name} twice; give it one share")
    if abs(total - 1) > SUM_TOLERANCE:
        raise RecipeError(
            f"the shares of calibration {text!r} add up to {total:g}; they must add up to 1 "
            "(a single path that ends in a colon and a number is written with its share: PATH:1)"
        )
    return tuple(sources)


def _published_name(name: str) -> str:
    if name == SELF_CALIBRATION or name in PRESETS or is_hub_name(name):
        return name
    return PurePath(name).name or name


def _has_text_suffix(name: str) -> bool:
    suffixes = [suffix for suffix in PurePath(name).suffixes if suffix not in COMPRESSED_SUFFIXES]
    return bool(suffixes) and suffixes[-1] in TEXT_SUFFIXES
