"""Where calibration tokens come from: the model itself, files, hub data sets, or a mix. It runs no statistics."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from quant.blockwise_model import BlockwiseModel
from quant.calibration_files import Content, Conversation, read_content
from quant.calibration_hub import data_set_file, preset_file
from quant.calibration_mix import (
    PRESETS,
    SELF_CALIBRATION,
    Share,
    interleaved,
    is_hub_name,
    row_counts,
)
from quant.errors import RecipeError, SourceError
from quant.recipe import Recipe
from quant.report import CalibrationOrigin
from quant.self_text import open_writer, write_text

# what is tokenized of a long text, spread over it: several times what any language needs, because a tokenizer takes
# seconds and hundreds of megabytes for each ten million characters
CHARACTERS_A_TOKEN = 16


@dataclass(frozen=True)
class CalibrationTokens:
    """ids: int64 [samples, tokens], the rows of several origins interleaved. digest: SHA-256 of the ids."""

    ids: Tensor
    origins: tuple[CalibrationOrigin, ...]
    digest: str


@dataclass(frozen=True)
class CalibrationText:
    """What one source gives before the model is there: nothing (None) where the model writes the text."""

    origin: CalibrationOrigin
    content: Content | None


def read_texts(recipe: Recipe) -> tuple[CalibrationText, ...]:
    """The text of each source that the recipe names, in its order. Raises SourceError when one cannot be read."""
    sources = recipe.calibration_sources
    counts = row_counts(sources, recipe.calibration_shape[0])
    return tuple(_read_source(source, num_rows) for source, num_rows in zip(sources, counts, strict=True))


def calibration_tokens(
    recipe: Recipe,
    model: BlockwiseModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: tuple[CalibrationText, ...],
    on_step: Callable[[int, int], None],
) -> CalibrationTokens:
    """The tokens a recipe asks for, from its texts; on_step(done, total) follows the writing where there is none.

    Raises RecipeError when a text is too short for its rows, SourceError when the model's chat template refuses a
    conversation or the model has no room to write, QuantizationError when it writes no text.
    """
    rows = []
    for text in texts:
        shape = (text.origin.num_rows, recipe.calibration_shape[1])
        if text.content is None:
            rows.append(write_text(open_writer(model, shape), tokenizer, shape, recipe.seed, on_step))
        else:
            rows.append(_cut_rows(_tokenize(tokenizer, text.content, text.origin, shape), text.origin, shape))
    remaining = [iter(ids) for ids in rows]
    order = interleaved([text.origin.num_rows for text in texts])
    ids = torch.stack([next(remaining[index]) for index in order])
    return CalibrationTokens(
        ids, tuple(text.origin for text in texts), hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    )


def _read_source(source: Share, num_rows: int) -> CalibrationText:
    name = source.name
    if name == SELF_CALIBRATION:
        return CalibrationText(CalibrationOrigin("text by the model itself", source.share, num_rows), None)
    if name in PRESETS:
        preset = PRESETS[name]
        file = preset_file(name, preset)
        origin = CalibrationOrigin(f"{name} ({preset.repository}, {file.name})", source.share, num_rows)
        return CalibrationText(origin, read_content(file, preset.column, preset.separator))
    path = Path(name).expanduser()
    if path.is_file():
        # only the file's name: the report is published with the checkpoint
        return CalibrationText(CalibrationOrigin(path.name, source.share, num_rows), read_content(path))
    if path.exists() or not is_hub_name(name):
        mix = "; a mix gives each source its share, like wikitext:0.5,self:0.5" if "," in name else ""
        raise SourceError(
            f"calibration text {name} is no file; give a text file, a hub data set (owner/name), "
            f"{', '.join(PRESETS)} or {SELF_CALIBRATION}{mix}"
        )
    file = data_set_file(name)
    origin = CalibrationOrigin(f"hub data set {name} ({file.name})", source.share, num_rows)
    return CalibrationText(origin, read_content(file))


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, content: Content, origin: CalibrationOrigin, shape: tuple[int, int]
) -> Tensor:
    """Ids, int64 [tokens], of enough of the text for the shape, evenly from all of it."""
    num_needed = shape[0] * shape[1]
    thinned = _thin(content, shape[0], num_needed * CHARACTERS_A_TOKEN)
    ids = _ids_of(tokenizer, thinned, origin)
    if len(ids) < num_needed and thinned is not content:
        ids = _ids_of(tokenizer, content, origin)
    return torch.tensor(ids, dtype=torch.int64)


def _thin(content: Content, num_pieces: int, num_characters: int) -> Content:
    """About so many characters of the content, in pieces that are spread evenly over it."""
    if not isinstance(content, str):
        total = sum(len(message["content"]) for conversation in content for message in conversation)
        step = total // num_characters
        return content[::step] if step > 1 else content
    if len(content) <= num_characters:
        return content
    width, stride = num_characters // num_pieces, len(content) // num_pieces
    return "".join(content[start : start + width] for start in range(0, stride * num_pieces, stride))


def _ids_of(tokenizer: PreTrainedTokenizerBase, content: Content, origin: CalibrationOrigin) -> list[int]:
    """The ids of text as the tokenizer begins one; of conversations as the model's chat template writes them."""
    text = content if isinstance(content, str) else _render_all(tokenizer, content, origin)
    # a template has the special tokens
    ids: list[int] = tokenizer(text, add_special_tokens=text is content, verbose=False)["input_ids"]
    return ids


def _render_all(
    tokenizer: PreTrainedTokenizerBase, conversations: tuple[Conversation, ...], origin: CalibrationOrigin
) -> str:
    if not tokenizer.chat_template:
        raise SourceError(
            f"{origin.name} holds conversations, and this model has no chat template to write them in; "
            "calibrate on text"
        )
    return "".join(_render(tokenizer, conversation, origin.name) for conversation in conversations)


def _render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, origin: str) -> str:
    try:
        return str(tokenizer.apply_chat_template([dict(message) for message in conversation], tokenize=False))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in conversation[:4])
        raise SourceError(
            f"the model's chat template refuses a conversation of {origin} (roles {roles}): {error}"
        ) from error


def _cut_rows(ids: Tensor, origin: CalibrationOrigin, shape: tuple[int, int]) -> Tensor:
    """Rows int64 [rows, tokens] spread evenly over the text, without overlap."""
    num_rows, num_tokens = shape
    num_needed = num_rows * num_tokens
    if len(ids) < num_needed:
        raise RecipeError(
            f"{origin.name} has {len(ids)} tokens; {num_rows} samples of {num_tokens} tokens "
            f"need {num_needed}: give more text, or fewer or shorter samples (--calib-samples, --calib-seqlen)"
        )
    stride = len(ids) // num_rows
    return ids[: stride * num_rows].view(num_rows, stride)[:, :num_tokens].contiguous()
