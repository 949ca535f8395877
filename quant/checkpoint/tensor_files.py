"""Which safetensors files a checkpoint has, what their headers promise, and rows of their tensors. No pickle ever."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from quant.checkpoint.tensor_spec import SAFETENSORS_DTYPES, TensorSpec
from quant.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEADER_LENGTH_BYTES = 8
# the limit of the safetensors library itself
MAX_HEADER_BYTES = 100_000_000
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DOWNLOAD_AGAIN = "the file is damaged or its download stopped; fetch it again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, the file's byte where it starts, and what the file's header says it is."""

    file: Path
    spec: TensorSpec
    start: int


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name, after checking the index and the header of every file.

    Raises CheckpointError naming the file when one is missing, truncated or inconsistent, or when there are only
    pickle files.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return read_header(single)
    if index.is_file():
        return _find_sharded(directory, index)
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{directory} holds only pickle files ({', '.join(pickles)}), which can run code and are never loaded; "
            "convert the model to safetensors first"
        )
    raise CheckpointError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file declares, checked against each other and against the file's size.

    Raises CheckpointError naming the file. Format: https://huggingface.co/docs/safetensors (Format).
    """
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        length_field = stream.read(HEADER_LENGTH_BYTES)
        if len(length_field) < HEADER_LENGTH_BYTES:
            raise CheckpointError(f"{file} has {file_bytes} bytes, too few for a safetensors file: {DOWNLOAD_AGAIN}")
        header_bytes = int.from_bytes(length_field, "little")
        data_bytes = file_bytes - HEADER_LENGTH_BYTES - header_bytes
        if header_bytes > MAX_HEADER_BYTES or data_bytes < 0:
            raise CheckpointError(
                f"{file} announces {header_bytes} bytes of header, but has {file_bytes} bytes in all: {DOWNLOAD_AGAIN}"
            )
        header = _parse_object(stream.read(header_bytes), file)
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        spec, (start, stop) = _parse_entry(name, entry, file)
        spans.append((start, stop, name))
        tensors[name] = StoredTensor(file, spec, HEADER_LENGTH_BYTES + header_bytes + start)
    _check_spans(spans, data_bytes, file)
    return tensors


def read_rows(stored: StoredTensor, rows: Iterable[int]) -> Tensor:
    """These rows of a tensor with a first dimension, in its dtype on the CPU, in a memory of their own.

    They are read, not mapped: the pages of a mapped file count as this process's memory until the file is closed.
    Raises CheckpointError when the file has become shorter.
    """
    wanted = rows if isinstance(rows, range) else list(rows)
    num_rows, *row_shape = stored.spec.shape
    row_bytes = stored.spec.num_bytes // max(1, num_rows)
    made = torch.empty((len(wanted), *row_shape), dtype=stored.spec.dtype)
    target = _bytes_of(made)
    with stored.file.open("rb", buffering=0) as stream:
        for place, first, length in _runs(wanted):
            stream.seek(stored.start + first * row_bytes)
            _fill(target[place * row_bytes : (place + length) * row_bytes], stream, stored.file)
    return made


def read_whole(stored: StoredTensor) -> Tensor:
    """A tensor in its dtype on the CPU, read as `read_rows` does it. Raises CheckpointError in the same case."""
    made = torch.empty(stored.spec.shape, dtype=stored.spec.dtype)
    with stored.file.open("rb", buffering=0) as stream:
        stream.seek(stored.start)
        _fill(_bytes_of(made), stream, stored.file)
    return made


def read_json_object(file: Path) -> dict[str, object]:
    """A JSON file whose top level is an object. Raises CheckpointError naming the file when it is anything else."""
    return _parse_object(file.read_bytes(), file)


def _find_sharded(directory: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files: {DOWNLOAD_AGAIN}")
    headers: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index} places {name} in {shard!r}, which is no .safetensors file beside it")
        file = directory / shard
        if shard not in headers:
            if not file.is_file():
                raise CheckpointError(f"{index} names {shard}, which is not there; fetch the missing file")
            headers[shard] = read_header(file)
        if name not in headers[shard]:
            raise CheckpointError(f"{index} places {name} in {shard}, which has no such tensor: {DOWNLOAD_AGAIN}")
        tensors[name] = headers[shard][name]
    for shard, header in headers.items():
        if left_over := sorted(name for name in header if weight_map.get(name) != shard):
            others = f" and {len(left_over) - 1} more" if len(left_over) > 1 else ""
            raise CheckpointError(
                f"{directory / shard} holds {left_over[0]}{others}, which {INDEX_FILE} does not place there: "
                "the two are of different models, or of different versions of one; fetch them again"
            )
    return tensors


def _runs(rows: range | list[int]) -> Iterator[tuple[int, int, int]]:
    """The rows that follow one another, as (place in the list, first row, number of rows)."""
    if isinstance(rows, range) and rows.step == 1:
        yield 0, rows.start, len(rows)
        return
    for _, run in groupby(enumerate(rows), key=lambda pair: pair[1] - pair[0]):
        (place, first), *others = run
        yield place, first, 1 + len(others)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _fill(target: memoryview, stream: FileIO, file: Path) -> None:
    """Read until the target is full: one call reads 2 GB at most."""
    while target:
        num_bytes = stream.readinto(target)
        if not num_bytes:
            raise CheckpointError(f"{file} has become shorter while it was read: {DOWNLOAD_AGAIN}")
        target = target[num_bytes:]


def _parse_object(data: bytes, file: Path) -> dict[str, object]:
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} holds no valid JSON ({error}): {DOWNLOAD_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(value).__name__}: {DOWNLOAD_AGAIN}")
    return value


def _parse_entry(name: str, entry: object, file: Path) -> tuple[TensorSpec, tuple[int, int]]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise CheckpointError(f"{file}: the header entry of {name} is {entry!r}: {DOWNLOAD_AGAIN}")
    if dtype not in SAFETENSORS_DTYPES:
        known = ", ".join(SAFETENSORS_DTYPES)
        raise CheckpointError(f"{file}: {name} has dtype {dtype!r}, which is not read; known dtypes: {known}")
    spec = TensorSpec(tuple(shape), SAFETENSORS_DTYPES[dtype])
    start, stop = offsets
    if stop - start != spec.num_bytes:
        raise CheckpointError(
            f"{file}: {name} is {dtype} {shape}, {spec.num_bytes} bytes, but its offsets span {stop - start}: "
            f"{DOWNLOAD_AGAIN}"
        )
    return spec, (start, stop)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_spans(spans: list[tuple[int, int, str]], data_bytes: int, file: Path) -> None:
    """The tensors must lie back to back from the first data byte to the last: no overlap, no hole, nothing cut off."""
    position = 0
    for start, stop, name in sorted(spans):
        if start != position:
            how = "overlaps the tensor before it" if start < position else "leaves a hole before it"
            raise CheckpointError(f"{file}: {name} starts at byte {start} and {how}: {DOWNLOAD_AGAIN}")
        position = stop
    if position != data_bytes:
        raise CheckpointError(
            f"{file} has {data_bytes} bytes of tensors, not the {position} of its header: {DOWNLOAD_AGAIN}"
        )
