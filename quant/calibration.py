"""Where calibration tokens come from: the model itself, a text file, or a hub data set. It runs no statistics."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from quant.errors import RecipeError, SourceError
from quant.recipe import SELF_CALIBRATION, Recipe
from quant.self_text import write_text
from quant.source import SourceModel

# tokenizing more text than this would take longer than calibrating on it
MAX_TEXT_CHARACTERS = 20_000_000
HUB_TEXT_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class CalibrationTokens:
    """ids: int64 [samples, tokens]. origin: where the text came from. digest: SHA-256 of the ids, to compare runs."""

    ids: Tensor
    origin: str
    digest: str


def calibration_tokens(recipe: Recipe, source: SourceModel, on_step: Callable[[int, int], None]) -> CalibrationTokens:
    """The tokens a recipe asks for; on_step(done, total) follows the writing of text by the model itself.

    Raises RecipeError when the text is too short for the recipe, SourceError when it cannot be read.
    """
    shape = (recipe.num_samples, recipe.sample_tokens)
    if recipe.calibration == SELF_CALIBRATION:
        ids = write_text(source.model, source.tokenizer, shape, recipe.seed, on_step)
        origin = f"text by {source.name} itself"
    else:
        text, origin = _read_text(recipe.calibration)
        ids = _cut_rows(source.tokenizer, text, shape, origin)
    return CalibrationTokens(ids, origin, hashlib.sha256(ids.numpy().tobytes()).hexdigest())


def _read_text(name: str) -> tuple[str, str]:
    path = Path(name)
    if path.is_file():
        return _read_file(path), str(path)
    if path.exists() or name.startswith((".", "/", "~")):
        raise SourceError(f"calibration text {name} is no file; give a text file, a hub data set, or self")
    return _read_hub(name), f"hub data set {name}"


def _read_file(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as stream:
            if path.suffix == ".jsonl":
                return _join_documents(stream.read(MAX_TEXT_CHARACTERS).splitlines(), path)
            return stream.read(MAX_TEXT_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"calibration text {path} cannot be read as UTF-8 text: {error}") from error


def _read_hub(name: str) -> str:
    """The first text or JSON-lines file of a hub data set, as one text."""
    try:
        files = sorted(HfApi().list_repo_files(name, repo_type="dataset"))
        readable = [file for file in files if file.endswith(HUB_TEXT_SUFFIXES)]
        if not readable:
            raise SourceError(
                f"hub data set {name} has no {' or '.join(HUB_TEXT_SUFFIXES)} file; download it, save its text as one "
                "and give its path"
            )
        return _read_file(Path(hf_hub_download(name, readable[0], repo_type="dataset")))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(
            f"calibration text {name!r} is neither a file here nor a data set that the hub gives: {error}"
        ) from error


def _join_documents(lines: list[str], path: Path) -> str:
    """The `text` fields of JSON lines. A last line that the character limit cut is left out."""
    documents = []
    for number, line in enumerate(lines[:-1] if len(lines) > 1 else lines, start=1):
        try:
            documents.append(str(json.loads(line)["text"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SourceError(f"line {number} of {path} is no JSON object with a text field: {error}") from error
    return "\n\n".join(documents)


def _cut_rows(tokenizer: PreTrainedTokenizerBase, text: str, shape: tuple[int, int], origin: str) -> Tensor:
    """Rows int64 [rows, tokens] spread evenly over the text, without overlap."""
    num_rows, num_tokens = shape
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    num_needed = num_rows * num_tokens
    if len(ids) < num_needed:
        raise RecipeError(
            f"{origin} has {len(ids)} tokens; {num_rows} samples of {num_tokens} tokens "
            f"need {num_needed}: give more text, or fewer or shorter samples"
        )
    stride = len(ids) // num_rows
    return ids[: stride * num_rows].view(num_rows, stride)[:, :num_tokens].contiguous()
