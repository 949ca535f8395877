"""Opens the model to be quantized, for calibration in float32, and what goes with it: tokenizer, template, defaults.

Reads a Hugging Face directory (safetensors only) or a GGUF file. Runs no code that comes with a model.
"""

import json
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from quant.blockwise_model import BlockwiseModel, hold_nothing
from quant.checkpoint.reader import CONFIG_FILE, CheckpointReader
from quant.checkpoint.tensor_files import StoredTensor, find_tensors
from quant.checkpoint.tensor_spec import TensorSpec
from quant.errors import SourceError
from quant.linear_experts import linearize_experts
from quant.original_weights import HeldWeights, OriginalWeights, find_stored

GGUF_MAGIC = b"GGUF"
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# what a model directory may hold beside its weights and config; copied as it is, so nothing is lost in translation
SIDE_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG_FILE,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_CONFIG_FILE,
    "LICENSE",
    "LICENSE.txt",
)
# where the source lay, how transformers held it, and code that is neither run nor copied: nothing a checkpoint repeats
TRANSIENT_CONFIG_FIELDS = (
    "_name_or_path",
    "_model_name_or_path",
    "quantization_config",
    "transformers_version",
    "auto_map",
)
# tensors that older tools saved and every loader computes for itself
COMPUTED_TENSORS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
# what transformers and gguf raise for files that are no model, or a damaged one, or a config that makes no sense
LOADING_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
    struct.error,
)


@dataclass(frozen=True)
class SourceModel:
    """model: in float32 on the CPU or without memory on the meta device, in eval mode, experts as linears.

    path: the directory or .gguf file it is from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    path: Path

    def side_files(self) -> dict[str, bytes]:
        """Tokenizer, chat template and generation config, by file name.

        A directory's files are taken as they are; a GGUF file's are made from what transformers read out of it.
        """
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder)
            if self.model.generation_config is not None:
                self.model.generation_config.save_pretrained(made)
            if self.path.is_file():
                self.tokenizer.save_pretrained(made)
                _name_tokenizer_class_for_all_versions(made / TOKENIZER_CONFIG_FILE)
            files = {file.name: file.read_bytes() for file in sorted(made.iterdir())}
        if self.path.is_dir():
            own = (self.path / name for name in SIDE_FILES)
            files |= {file.name: file.read_bytes() for file in own if file.is_file()}
        return files

    def checkpoint_config(self, dtype: torch.dtype) -> dict[str, object]:
        """The config.json of a checkpoint of this model whose plain tensors have `dtype`; without quantization_config.

        A directory's config is kept field by field. A GGUF file's is written in the spelling of transformers 4 too,
        which other servers still read.
        """
        if self.path.is_dir():
            fields: dict[str, object] = json.loads((self.path / CONFIG_FILE).read_text(encoding="utf-8"))
        else:
            fields = {**self.config.to_diff_dict(), "architectures": [type(self.model).__name__]}
            rope_parameters = fields.get("rope_parameters")
            if isinstance(rope_parameters, dict) and "rope_theta" in rope_parameters:
                fields["rope_theta"] = rope_parameters["rope_theta"]
        dtype_name = str(dtype).removeprefix("torch.")
        kept = {name: value for name, value in fields.items() if name not in TRANSIENT_CONFIG_FIELDS}
        # as the weights are: a file that ships a head of its own is not tied, whatever its config says
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()  # type: ignore[no-untyped-call]
        is_tied = head is not None and head.weight is embedding.weight
        return {**kept, "tie_word_embeddings": is_tied, "dtype": dtype_name, "torch_dtype": dtype_name}


def open_source(path: Path) -> SourceModel:
    """Load an unquantized model directory or a .gguf file (see location.resolve_model) for calibration.

    Raises SourceError when it is no model, is quantized already, lacks a tokenizer or tensors, has values that are not
    finite, or needs code of its own; CheckpointError
    naming the damaged file.
    """
    if path.is_file():
        return _open_gguf(path)
    check_directory(path)
    return _load(path, path, gguf_file=None)


def open_streamed(path: Path, on_notice: Callable[[str], None]) -> tuple[SourceModel, BlockwiseModel]:
    """Open what `open_source` opens, to be read block by block: the source's model is the other's, without weights.

    A GGUF file is held in memory whole, and so is a model whose files hold its tensors in another layout than it
    computes with; on_notice hears of the latter. Raises what `open_source` does.
    """
    if path.is_dir():
        check_directory(path)
        files = find_tensors(path)
        source = _load_skeleton(path, files)
        stored = find_stored(source.model, files)
        if stored is not None:
            _check_finite(path, [name for name, _ in source.model.named_parameters()], stored)
            return source, BlockwiseModel(source.model, stored)
        on_notice(
            f"{source.config.model_type} models are stored in another layout than they compute with, so this one is "
            "held in memory whole, 4 bytes a parameter"
        )
    source = open_source(path)
    return source, BlockwiseModel(source.model, HeldWeights(hold_nothing(source.model)))


def context_tokens(config: PreTrainedConfig) -> int | None:
    """How many tokens the model reads at once, at most; None where its config sets no limit."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def check_directory(path: Path) -> None:
    """What can be said of a model directory before its weights are read; raises what open_source does."""
    reader = CheckpointReader.open(path)
    if reader.meta is not None:
        raise SourceError(f"{path} is quantized already ({reader.meta.format}); give the original model")
    model_type = str(reader.config.get("model_type"))
    if "auto_map" in reader.config and model_type not in CONFIG_MAPPING:
        raise SourceError(
            f"{path} needs code of its own for the architecture {model_type} (auto_map in {CONFIG_FILE}), and code "
            "that comes with a model is never run; only architectures that transformers has can be quantized"
        )


def _open_gguf(file: Path) -> SourceModel:
    with file.open("rb") as stream:
        magic = stream.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise SourceError(f"{file} is no GGUF file: it starts with {magic!r}, not {GGUF_MAGIC!r}")
    # alone in a folder: transformers would mix in the tokenizer files that lie beside it
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file.name).symlink_to(file.absolute())
        return _load(file, Path(folder), gguf_file=file.name)


def _load(path: Path, directory: Path, *, gguf_file: str | None) -> SourceModel:
    with _naming(path):
        # parsed once and handed on: transformers would parse a GGUF file again for every question
        config = AutoConfig.from_pretrained(directory, gguf_file=gguf_file, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(
            directory, gguf_file=gguf_file, trust_remote_code=False, local_files_only=True
        )
        loaded: object = AutoModelForCausalLM.from_pretrained(
            directory,
            gguf_file=gguf_file,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    source = _checked(path, loaded, tokenizer)
    parameters = dict(source.model.named_parameters())
    _check_finite(path, parameters, HeldWeights(parameters))
    return source


def _load_skeleton(path: Path, files: Mapping[str, StoredTensor]) -> SourceModel:
    """The model without memory for its weights, as it would be after it was loaded from these files."""
    with _naming(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model_class = type(AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]
        loaded: object = model_class.from_pretrained(
            None,
            config=config,
            state_dict={name: _Announced(tensor.spec) for name, tensor in files.items()},
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return _checked(path, loaded, tokenizer)


class _Announced:
    """What transformers takes for a tensor in a file, and loads into no memory."""

    def __init__(self, spec: TensorSpec) -> None:
        self._spec = spec

    def __getitem__(self, _whole: object) -> "_Announced":
        return self

    def to(self, device: object, dtype: torch.dtype | None) -> Tensor:
        """The tensor of that dtype on the meta device, whatever device is asked for."""
        del device
        return torch.empty(self._spec.shape, dtype=dtype or self._spec.dtype, device="meta")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what transformers and gguf raise into a SourceError that names the model."""
    try:
        yield
    except LOADING_ERRORS as error:
        # transformers advises an option there that is not given here
        needs_code = "trust_remote_code" in str(error)
        reason = "it needs code of its own (auto_map), and code that comes with a model is never run"
        raise SourceError(f"{path} cannot be loaded as a language model: {reason if needs_code else error}") from error


def _checked(path: Path, loaded: object, tokenizer: PreTrainedTokenizerBase) -> SourceModel:
    """The source, of what from_pretrained gave with its loading info."""
    model, loading = cast(tuple[PreTrainedModel, dict[str, list[object]]], loaded)
    _check_loading(path, loading)
    _check_token_ids(path, model)
    linearize_experts(model)
    # transformers' default is 1e30, which would be written into the checkpoint
    limit = context_tokens(model.config) or tokenizer.model_max_length
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    model.train(mode=False)
    return SourceModel(model=model, tokenizer=tokenizer, config=model.config, path=path)


def _check_loading(path: Path, loading: dict[str, list[object]]) -> None:
    """Raises SourceError naming tensors that are missing, of another shape, or in the file and not in the model."""
    missing = [*map(str, loading["missing_keys"])]
    # each is (name, shape in the file, shape that the config asks for)
    missing += [
        f"{key[0]} (as {tuple(key[2])}, not {tuple(key[1])})"
        for key in loading["mismatched_keys"]
        if isinstance(key, tuple)
    ]
    if missing:
        names = ", ".join(sorted(missing)[:5])
        raise SourceError(f"{path} lacks tensors its config asks for: {names} ({len(missing)} in all)")
    unused = sorted(name for name in map(str, loading["unexpected_keys"]) if not name.endswith(COMPUTED_TENSORS))
    if unused:
        raise SourceError(
            f"{path} holds tensors that its config has no place for: {', '.join(unused[:5])} ({len(unused)} in all); "
            "config.json belongs to another model, or a field of it is wrong"
        )


def _check_finite(path: Path, names: Iterable[str], weights: OriginalWeights) -> None:
    """Raises SourceError naming the first tensor that holds a NaN or an infinity."""
    for name in names:
        num_bad = sum(int((~torch.isfinite(piece)).sum()) for piece in weights.pieces(name))
        if num_bad:
            raise SourceError(
                f"{path}: {name} has {num_bad} values that are not finite, so the model is damaged; fetch it again"
            )


def _check_token_ids(path: Path, model: PreTrainedModel) -> None:
    """Raises SourceError for a model without blocks, or a special token beyond the vocabulary."""
    config = model.config.get_text_config()
    if config.num_hidden_layers < 1:
        raise SourceError(f"{path}: num_hidden_layers is {config.num_hidden_layers}; there is nothing to quantize")
    for field in ("bos_token_id", "eos_token_id"):
        value = getattr(config, field)
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and not 0 <= token_id < config.vocab_size:
                raise SourceError(f"{path}: {field} is {token_id}, but the vocabulary has {config.vocab_size} tokens")


def _name_tokenizer_class_for_all_versions(file: Path) -> None:
    """transformers 5 writes a class name that version 4, and the servers built on it, do not know."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    for transient in ("is_local", "local_files_only"):
        fields.pop(transient, None)
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
