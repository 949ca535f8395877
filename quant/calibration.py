"""Where calibration tokens come from: the model itself, a text file, or a hub data set. It runs no statistics."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download

# HTTPError is that of whichever HTTP client the hub's library uses
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from quant.errors import RecipeError, SourceError
from quant.recipe import SELF_CALIBRATION, Recipe
from quant.self_text import write_text
from quant.source import SourceModel

# tokenizing more text than this would take longer than calibrating on it
MAX_TEXT_CHARACTERS = 20_000_000
TEXT_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class CalibrationTokens:
    """ids: int64 [samples, tokens]. origin: where the text came from. digest: SHA-256 of the ids, to compare runs."""

    ids: Tensor
    origin: str
    digest: str


@dataclass(frozen=True)
class CalibrationText:
    """Text that is there before the model is: content, and where it came from."""

    content: str
    origin: str


def read_text(recipe: Recipe) -> CalibrationText | None:
    """The text that the recipe names; None where the model writes it. Raises SourceError when it cannot be read."""
    name = recipe.calibration
    if name == SELF_CALIBRATION:
        return None
    path = Path(name).expanduser()
    if path.is_file():
        return CalibrationText(_read_file(path), str(path))
    if path.exists() or name.startswith((".", "/", "~")) or path.suffix in TEXT_SUFFIXES or "/" not in name:
        raise SourceError(f"calibration text {name} is no file; give a text file, a hub data set (owner/name), or self")
    return CalibrationText(_read_hub(name), f"hub data set {name}")


def calibration_tokens(
    recipe: Recipe, source: SourceModel, text: CalibrationText | None, on_step: Callable[[int, int], None]
) -> CalibrationTokens:
    """The tokens a recipe asks for, from its text; on_step(done, total) follows the writing where there is none.

    Raises RecipeError when the text is too short for the recipe, QuantizationError when the model writes none.
    """
    shape = (recipe.num_samples, recipe.sample_tokens)
    if text is None:
        ids = write_text(source.model, source.tokenizer, shape, recipe.seed, on_step)
        origin = f"text by {source.name} itself"
    else:
        origin = text.origin
        ids = _cut_rows(source.tokenizer, text, shape)
    return CalibrationTokens(ids, origin, hashlib.sha256(ids.numpy().tobytes()).hexdigest())


def _read_file(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as stream:
            content = stream.read(MAX_TEXT_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"calibration text {path} cannot be read as UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        return content
    lines = content.split("\n")
    # the limit may have cut the last line short
    return _join_documents(lines[:-1] if len(content) == MAX_TEXT_CHARACTERS else lines, path)


def _read_hub(name: str) -> str:
    """The first text or JSON-lines file of a hub data set, as one text."""
    try:
        files = sorted(HfApi().list_repo_files(name, repo_type="dataset"))
        readable = [file for file in files if file.endswith(TEXT_SUFFIXES) and "LICENSE" not in file]
        if not readable:
            raise SourceError(
                f"hub data set {name} has no {' or '.join(TEXT_SUFFIXES)} file; download it, save its text as one "
                "and give its path"
            )
        return _read_file(Path(hf_hub_download(name, readable[0], repo_type="dataset")))
    except (HTTPError, HFValidationError, OSError) as error:
        raise SourceError(
            f"calibration text {name!r} is neither a file here nor a data set that the hub gives: {error}"
        ) from error


def _join_documents(lines: list[str], path: Path) -> str:
    """The `text` fields of JSON lines; empty lines are passed over."""
    documents: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry: object = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"line {number} of {path} is no JSON: {error}") from error
        text = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise SourceError(f"line {number} of {path} is no JSON object with a text field")
        documents.append(text)
    return "\n\n".join(documents)


def _cut_rows(tokenizer: PreTrainedTokenizerBase, text: CalibrationText, shape: tuple[int, int]) -> Tensor:
    """Rows int64 [rows, tokens] spread evenly over the text, without overlap."""
    num_rows, num_tokens = shape
    ids = torch.tensor(tokenizer(text.content, verbose=False)["input_ids"])
    num_needed = num_rows * num_tokens
    if len(ids) < num_needed:
        raise RecipeError(
            f"{text.origin} has {len(ids)} tokens; {num_rows} samples of {num_tokens} tokens "
            f"need {num_needed}: give more text, or fewer or shorter samples"
        )
    stride = len(ids) // num_rows
    return ids[: stride * num_rows].view(num_rows, stride)[:, :num_tokens].contiguous()
