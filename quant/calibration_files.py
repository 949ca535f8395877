"""Reads text and conversations out of files: plain text, JSON lines, Parquet, compressed or not. Fetches nothing.

Parquet and zstd need pyarrow, an optional extra: no other format asks for a library of that size.
"""

import gzip
import importlib.util
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from quant.calibration_mix import COMPRESSED_SUFFIXES, Column
from quant.errors import SourceError

# tokenizing more text than this would take longer than calibrating on it
MAX_TEXT_CHARACTERS = 20_000_000
PARQUET_ROWS_AT_ONCE = 1024
PARQUET_SUFFIX = ".parquet"
JSON_LINES_SUFFIXES = (".jsonl", ".json")
READING_ERRORS = (OSError, UnicodeDecodeError, EOFError, zlib.error)

Conversation = tuple[Mapping[str, str], ...]
# text in one piece, or conversations that a chat template turns into text
Content = str | tuple[Conversation, ...]


@dataclass(frozen=True)
class Row:
    """A line of JSON lines or a row of Parquet. place: where it stands, for messages."""

    place: str
    value: object


def read_content(file: Path, column: Column | None = None, separator: str = "\n\n") -> Content:
    """What a file holds, up to MAX_TEXT_CHARACTERS; column None takes `text` where its first row has it.

    The texts of rows are joined by the separator. Raises SourceError naming the line when a row is damaged or has no
    such column, or when the file cannot be read.
    """
    try:
        return _read(file, column, separator)
    except READING_ERRORS as error:
        raise SourceError(f"calibration text {file} cannot be read as UTF-8 text: {error}") from error


def _read(file: Path, column: Column | None, separator: str) -> Content:
    compression = file.suffix if file.suffix in COMPRESSED_SUFFIXES else ""
    kind = Path(file.name.removesuffix(compression)).suffix
    if kind == PARQUET_SUFFIX:
        return _take(_parquet_rows(file, column), column, separator)
    with _open_text(file, compression) as stream:
        if kind in JSON_LINES_SUFFIXES:
            return _take(_json_rows(stream, file), column, separator)
        return stream.read(MAX_TEXT_CHARACTERS)


def _open_text(file: Path, compression: str) -> TextIO:
    if compression == ".gz":
        return io.TextIOWrapper(gzip.open(file), encoding="utf-8")
    if compression == ".zst":
        _check_pyarrow(file)
        import pyarrow as pa  # the optional extra

        return io.TextIOWrapper(pa.input_stream(str(file), compression="zstd"), encoding="utf-8")
    return file.open(encoding="utf-8")


def _json_rows(stream: TextIO, file: Path) -> Iterator[Row]:
    """The objects of JSON lines; empty lines are passed over."""
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        place = f"line {number} of {file}"
        try:
            yield Row(place, json.loads(line))
        except json.JSONDecodeError as error:
            raise SourceError(f"{place} is no JSON: {error}") from error


def _parquet_rows(file: Path, column: Column | None) -> Iterator[Row]:
    _check_pyarrow(file)
    import pyarrow as pa  # the optional extra
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            chosen = _choose_column(file, table.schema_arrow.names, column)
            batches = table.iter_batches(batch_size=PARQUET_ROWS_AT_ONCE, columns=[chosen.value])
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            for number, value in enumerate(values, start=1):
                yield Row(f"row {number} of {file}", {chosen.value: value})
    except pa.ArrowException as error:
        raise SourceError(f"calibration text {file} cannot be read as Parquet: {error}") from error


def _choose_column(file: Path, present: Sequence[str], column: Column | None) -> Column:
    wanted = [column] if column else list(Column)
    for name in wanted:
        if name in present:
            return name
    raise SourceError(f"{file} has no column {' or '.join(wanted)}, only {', '.join(present)}")


def _take(rows: Iterable[Row], column: Column | None, separator: str) -> Content:
    """The content of the first rows that fill MAX_TEXT_CHARACTERS; the last text is cut there."""
    texts: list[str] = []
    conversations: list[Conversation] = []
    num_characters = 0
    for row in rows:
        column = column or _first_column(row)
        if column is Column.TEXT:
            texts.append(_text_of(row))
            num_characters += len(texts[-1]) + len(separator)
        else:
            conversations.append(_conversation_of(row))
            num_characters += sum(len(message["content"]) for message in conversations[-1])
        if num_characters >= MAX_TEXT_CHARACTERS:
            break
    return tuple(conversations) if column is Column.MESSAGES else separator.join(texts)[:MAX_TEXT_CHARACTERS]


def _first_column(row: Row) -> Column:
    for column in Column:
        if isinstance(row.value, dict) and column in row.value:
            return column
    raise SourceError(f"{row.place} is no object with a text field, nor one with messages")


def _text_of(row: Row) -> str:
    text = row.value.get(Column.TEXT) if isinstance(row.value, dict) else None
    if not isinstance(text, str):
        raise SourceError(f"{row.place} is no object with a text field")
    return text


def _conversation_of(row: Row) -> Conversation:
    messages = row.value.get(Column.MESSAGES) if isinstance(row.value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise SourceError(f"{row.place} is no object with messages: a list of objects with role and content")
    conversation = []
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise SourceError(f"{row.place} has a message without a role and a content of text")
        conversation.append({"role": role, "content": content})
    return tuple(conversation)


def _check_pyarrow(file: Path) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise SourceError(
            f"{file.name} is read with pyarrow, which is not installed: pip install 'awq-serve[parquet]' (or pyarrow); "
            "or give the text as .txt or .jsonl"
        )
