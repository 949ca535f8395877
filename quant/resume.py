"""What a run has finished, kept on disk so that a later run goes on there. It quantizes nothing.

A block is finished when its file is: the file holds all that the block's weights became and what the report says of
it. Every file names its run, so that no block of another recipe, source or version is ever taken.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kernels.layout import PackedWeight, WeightLayout
from kernels.reference import dequantize
from quant.calibration import CalibrationText, CalibrationTokens
from quant.capture import BlockInput, run_block
from quant.checkpoint.folded_scales import ModuleScales, scale_tensors, take_scales
from quant.checkpoint.location import recorded_name
from quant.checkpoint.tensor_files import read_header
from quant.checkpoint.writer import CheckpointWriter
from quant.errors import CheckpointError
from quant.fast_products import fast_products
from quant.input_statistics import Streams
from quant.kept_states import KeptChunks
from quant.kept_tensors import Scratch
from quant.method import MethodSteps
from quant.recipe import Recipe
from quant.report import BlockError, CalibrationOrigin, LayerLoss

TOKENS_FILE = "calibration.safetensors"
TOKENS = "ids"
# fields of the recipe that change no weight
MEASURING_FIELDS = ("num_windows", "max_kl")
# that counts as what it came to
# in a file's metadata: the run it is of, and what the report says
RUN_KEY, NOTES_KEY = "run", "notes"


@dataclass(frozen=True)
class FinishedBlock:
    """All that a block became. packed: by linear name; plain: its other parameters by name, as they are stored.

    scales: what is folded into it, by linear name. layers, errors: what the report says of it. seconds: of work on the
    run until the block was finished.
    """

    packed: Mapping[str, PackedWeight]
    scales: Mapping[str, ModuleScales]
    plain: Mapping[str, Tensor]
    layers: tuple[LayerLoss, ...]
    errors: tuple[BlockError, ...]
    seconds: float

    def restore(self, block: nn.Module) -> None:
        """Give the original block these weights, in place."""
        with torch.no_grad():
            for name, weight in self.packed.items():
                block.get_submodule(name).get_parameter("weight").copy_(dequantize(weight))
            for name, tensor in self.plain.items():
                block.get_parameter(name).copy_(tensor)


class FinishedWork:
    """The finished part of one run: read from the folder of a dead run, where there is one, and added to.

    run: what `run_digest` says of it. tell: hears why the work of a dead run is not gone on with. Give `accepts` to
    the writer before anything else is asked.
    """

    def __init__(self, run: str, tell: Callable[[str], None]) -> None:
        self._run = run
        self._tell = tell
        self._files: dict[str, Path] = {}

    def accepts(self, finished: Path) -> bool:
        """Whether the folder holds whole files of this run; they are gone on with then."""
        files = sorted(finished.glob("*.safetensors"))
        if not files:
            return False
        for file in files:
            try:
                read_header(file)
                run = _read_metadata(file).get(RUN_KEY)
            except (CheckpointError, SafetensorError, OSError):
                self._tell(f"what an ended run had finished is damaged ({file.name}): it is removed, and all done anew")
                return False
            if run != self._run:
                self._tell(
                    "what an ended run had finished for this place is of another recipe, source, device or version: it "
                    "is removed, and all done anew"
                )
                return False
        found = {file.name: file for file in files}
        num_blocks = len(found.keys() - {TOKENS_FILE})
        missing = [name for name in map(_block_file, range(num_blocks)) if name not in found]
        if missing:
            self._tell(
                f"of what an ended run had finished, {missing[0]} is gone: the rest is removed, and all done anew"
            )
            return False
        self._files = found
        return True

    @property
    def num_blocks(self) -> int:
        """How many blocks, from the first on, are finished."""
        return len(self._files.keys() - {TOKENS_FILE})

    def read_block(self, index: int) -> FinishedBlock:
        """A block that is finished."""
        file = self._files[_block_file(index)]
        notes = json.loads(_read_metadata(file)[NOTES_KEY])
        tensors = _read_tensors(file)
        packed = {
            name: PackedWeight(
                codes=tensors.pop(f"{name}.codes"),
                scales=tensors.pop(f"{name}.scales"),
                zeros=tensors.pop(f"{name}.zeros"),
                shape=(num_outputs, num_inputs),
                bits=bits,
                group_size=group_size,
                layout=WeightLayout.ROW_MAJOR,
            )
            for name, (num_outputs, num_inputs, bits, group_size) in notes["packed"].items()
        }
        scales = take_scales(tensors)
        return FinishedBlock(
            packed=packed,
            scales=scales,
            plain=tensors,
            layers=tuple(LayerLoss(**fields) for fields in notes["layers"]),
            errors=tuple(BlockError(**fields) for fields in notes["errors"]),
            seconds=notes["seconds"],
        )

    def save_block(self, writer: CheckpointWriter, index: int, block: FinishedBlock) -> None:
        """From now on the block is finished, whatever happens. Raises OutputError when the disk is full."""
        parts = {
            f"{name}.{part}": tensor
            for name, weight in block.packed.items()
            for part, tensor in (("codes", weight.codes), ("scales", weight.scales), ("zeros", weight.zeros))
        }
        notes = {
            "packed": {name: (*weight.shape, weight.bits, weight.group_size) for name, weight in block.packed.items()},
            "layers": [asdict(layer) for layer in block.layers],
            "errors": [asdict(error) for error in block.errors],
            "seconds": block.seconds,
        }
        self._save(writer, _block_file(index), {**parts, **scale_tensors(block.scales), **block.plain}, notes)

    def read_tokens(self) -> CalibrationTokens | None:
        """The tokens that the run calibrates on, where it had them already."""
        file = self._files.get(TOKENS_FILE)
        if file is None:
            return None
        notes = json.loads(_read_metadata(file)[NOTES_KEY])
        origins = tuple(CalibrationOrigin(**fields) for fields in notes["origins"])
        return CalibrationTokens(_read_tensors(file)[TOKENS], origins, notes["digest"])

    def save_tokens(self, writer: CheckpointWriter, tokens: CalibrationTokens) -> None:
        """Keep the tokens: a model takes minutes to write them. Raises OutputError when the disk is full."""
        notes = {"origins": [asdict(origin) for origin in tokens.origins], "digest": tokens.digest}
        self._save(writer, TOKENS_FILE, {TOKENS: tokens.ids}, notes)

    def _save(
        self, writer: CheckpointWriter, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, object]
    ) -> None:
        writer.save_finished(name, tensors, {RUN_KEY: self._run, NOTES_KEY: json.dumps(notes)})
        self._files[name] = writer.finished / name


def replay_block(
    block: nn.Module, index: int, streams: Streams, finished: FinishedBlock, steps: MethodSteps, scratch: Scratch
) -> Streams:
    """Give the block of that index its finished weights, in place, and return the next one's streams.

    They have the bits that they had when the block was finished: inputs, weights and operations are the same.
    """

    def run(chunks: Iterable[BlockInput]) -> KeptChunks:
        with fast_products():
            return KeptChunks(scratch, (run_block(block, index, chunk) for chunk in chunks))

    outputs = run(streams.original) if steps.correction else None
    finished.restore(block)
    current = run(streams.current)
    return Streams(current if outputs is None else outputs, current)


def run_digest(recipe: Recipe, source_path: Path, texts: tuple[CalibrationText, ...]) -> str:
    """SHA-256 of all that a run's weights follow from: recipe, source files, calibration text, this program.

    A file of the source is known by its name, its size and when it was changed. Of the device it is what was asked for:
    where that leaves the choice, a run goes on wherever there is room, rather than from the beginning.
    """
    files = sorted(source_path.iterdir()) if source_path.is_dir() else [source_path]
    stats = {file.name: file.stat() for file in files if file.is_file()}
    origin = {
        "recipe": {name: value for name, value in asdict(recipe).items() if name not in MEASURING_FIELDS},
        "source": recorded_name(source_path),
        "files": {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()},
        "texts": [(asdict(text.origin), text.content) for text in texts],
        "versions": (torch.__version__, transformers.__version__, _program_digest()),
    }
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()


def _program_digest() -> str:
    """SHA-256 of the quantizer's own sources: a block of another version may have been searched in another way."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _block_file(index: int) -> str:
    return f"block-{index + 1:05d}.safetensors"


def _read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def _read_tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
