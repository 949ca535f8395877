"""AutoAWQ's shape over this quantizer, for scripts that were written for it: load, quantize, save, load again.

Options that AutoAWQ has and this quantizer decides by itself are taken where they say what it does anyway, and refused
by name otherwise.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from quant.calibration_mix import SELF_CALIBRATION, single_source
from quant.checkpoint.location import resolve_model
from quant.checkpoint.reader import CONFIG_FILE, CheckpointReader
from quant.checkpoint.tensor_files import INDEX_FILE
from quant.checkpoint.writer import CheckpointWriter, check_place
from quant.dense_checkpoint import load_dense
from quant.device_name import DeviceName
from quant.errors import QuantizationError, RecipeError
from quant.model_card import CARD_FILE, model_card, read_licence
from quant.pipeline import quantize
from quant.recipe import Recipe
from quant.report import Report
from quant.source import GENERATION_CONFIG_FILE, check_directory

CALIBRATION_FILE = "calib_data.jsonl"
CONFIG_KEYS = ("w_bit", "q_group_size", "zero_point", "version")


@dataclass(frozen=True)
class Foreign:
    """An option of AutoAWQ's that is no option here: the values that change nothing, and what to do about others."""

    harmless: tuple[object, ...]
    advice: str


_NO_CODE = Foreign((False,), "code that comes with a model is never run; leave it out")
_NO_PICKLE = Foreign((True,), "only safetensors are read and written; leave it out")
_CPU = Foreign((None, "cpu"), "the model is held on the CPU; leave it out")
LOADING_OPTIONS = {
    "trust_remote_code": _NO_CODE,
    "safetensors": _NO_PICKLE,
    "torch_dtype": Foreign(("auto",), "calibration is in float32 whatever the weights' dtype; leave it out"),
    "low_cpu_mem_usage": Foreign((True,), "leave it out"),
    "use_cache": Foreign((False,), "calibration needs no cache; leave it out"),
    "download_kwargs": Foreign((None,), "download the model first, and give its directory"),
}
QUANTIZING_OPTIONS = {
    "split": Foreign(("train",), "give the split's text as a file or as a list of strings in calib_data"),
    "text_column": Foreign(("text",), "give the column's text as a list of strings in calib_data"),
    "duo_scaling": Foreign((True,), "scales with and without the weights' share are both tried; leave it out"),
    "apply_clip": Foreign((True,), "ranges are searched always, and kept where they help; leave it out"),
    "export_compatible": Foreign((False,), "what is saved is packed always; leave it out"),
    "n_parallel_calib_samples": Foreign((None,), "samples go through in small chunks by themselves; leave it out"),
    "max_chunk_memory": Foreign((), "memory is bounded without it; leave it out"),
    "modules_to_not_convert": Foreign((None, []), "which linears are quantized follows from the architecture"),
}
SAVING_OPTIONS = {
    "safetensors": _NO_PICKLE,
    "shard_size": Foreign((), "shards have about 512 MiB; leave it out"),
}
LOADING_BACK_OPTIONS = {
    "trust_remote_code": _NO_CODE,
    "safetensors": _NO_PICKLE,
    "device_map": _CPU,
    "quant_filename": Foreign(("",), "give the checkpoint's directory"),
    "fuse_layers": Foreign((False,), "the weights are multiplied out here; for speed use `awq-serve serve`"),
    "max_seq_len": Foreign((), "the model's own limit holds; leave it out"),
    "batch_size": Foreign((1,), "any batch can be given; leave it out"),
}


class AutoAWQForCausalLM:
    """The two ways in: an original to quantize, and a checkpoint to run."""

    @staticmethod
    def from_pretrained(
        model_path: str | Path, *, device_map: str | None = None, **options: object
    ) -> "ModelToQuantize":
        """The original, a directory, a .gguf file or a hub name; its weights are read when it is quantized.

        device_map: where that is done: "cuda", "cpu", or "auto" (and None) for a GPU with room, else the CPU. Raises
        SourceError or CheckpointError when it cannot be quantized, RecipeError for an option there is not.
        """
        _refuse("from_pretrained", options, LOADING_OPTIONS)
        path = resolve_model(str(model_path))
        if path.is_dir():
            check_directory(path)
        return ModelToQuantize(path, _device(device_map))

    @staticmethod
    def from_quantized(quant_path: str | Path, **options: object) -> PreTrainedModel:
        """A checkpoint (directory or hub name) as a transformers model, float32 on the CPU, its weights multiplied out.

        It generates and predicts as any transformers model does. Raises CheckpointError when the checkpoint is damaged.
        """
        _refuse("from_quantized", options, LOADING_BACK_OPTIONS)
        directory = resolve_model(str(quant_path))
        model = load_dense(directory)
        if (directory / GENERATION_CONFIG_FILE).is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        return model


class ModelToQuantize:
    """An original: quantized by `quantize`, written by `save_quantized`. report: what the quantization found out."""

    def __init__(self, path: Path, device: DeviceName) -> None:
        self.report: Report | None = None
        self._path = path
        self._device = device
        # the checkpoint waits here (under TMPDIR) until it is told where to go; gone with this object
        self._folder = tempfile.TemporaryDirectory(prefix="awq-serve-")
        self._num_made = 0

    def quantize(
        self,
        tokenizer: PreTrainedTokenizerBase | str | Path | Sequence[str] | None = None,
        quant_config: Mapping[str, object] | None = None,
        calib_data: str | Path | Sequence[str] | None = None,
        *,
        w_bit: int | None = None,
        q_group_size: int | None = None,
        zero_point: bool | None = None,
        version: str | None = None,
        max_calib_samples: int | None = None,
        max_calib_seq_len: int | None = None,
        **others: object,
    ) -> None:
        """Quantize with AutoAWQ's `quant_config`, or with its keys as keywords.

        tokenizer: the model's own, or None; text given first is taken as calib_data. calib_data: what `--calib` takes
        (a preset, a file, a hub data set, a mix, self), or the texts themselves; None is self. Raises RecipeError for
        an option there is not and a value out of range, and what `quant.quantize` raises.
        """
        if isinstance(tokenizer, str | Path | Sequence):
            if calib_data is not None:
                raise RecipeError("quantize() was given calibration text twice; give it as calib_data alone")
            tokenizer, calib_data = None, tokenizer
        _refuse("quantize", others, QUANTIZING_OPTIONS)
        given = dict(zip(CONFIG_KEYS, (w_bit, q_group_size, zero_point, version), strict=True))
        config = _merge(quant_config or {}, {name: value for name, value in given.items() if value is not None})
        if tokenizer is not None:
            self._check_tokenizer(tokenizer)
        recipe = Recipe(
            bits=_integer(config, "w_bit") if "w_bit" in config else Recipe.bits,
            group_size=_integer(config, "q_group_size") if "q_group_size" in config else None,
            calibration=self._calibration(calib_data),
            num_samples=max_calib_samples,
            sample_tokens=max_calib_seq_len,
            device=self._device,
        )
        self.report = None
        self._num_made += 1
        self.report = quantize(recipe, self._path, self._made)

    def save_quantized(self, save_dir: str | Path, **options: object) -> None:
        """Write the checkpoint into the new directory save_dir, whole or not at all.

        Raises OutputError when it exists or cannot be written, QuantizationError before anything was quantized.
        """
        _refuse("save_quantized", options, SAVING_OPTIONS)
        if self.report is None:
            raise QuantizationError("nothing is quantized yet: call quantize() before save_quantized()")
        out = Path(save_dir)
        check_place(out)
        reader = CheckpointReader.open(self._made)
        files = {
            file.name: file.read_bytes()
            for file in self._made.iterdir()
            if file.suffix != ".safetensors" and file.name not in (CONFIG_FILE, INDEX_FILE)
        }
        files[CARD_FILE] = model_card(self.report, out.name, read_licence(self._path), str(reader.config["model_type"]))
        num_bytes = sum(file.stat().st_size for file in self._made.iterdir())
        with CheckpointWriter(out, expected_bytes=num_bytes) as writer:
            for name in reader.tensor_names:
                writer.add_tensor(name, reader.read_tensor(name))
            writer.commit(reader.config, files)

    @property
    def _made(self) -> Path:
        return Path(self._folder.name) / f"checkpoint-{self._num_made}"

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The model's own tokenizer is used always; another one would be left out in silence."""
        if self._path.is_file():
            raise RecipeError("quantize(tokenizer=...): a GGUF file brings its own tokenizer; leave it out")
        own = AutoTokenizer.from_pretrained(self._path, trust_remote_code=False, local_files_only=True)
        if tokenizer.get_vocab() != own.get_vocab():
            raise RecipeError("quantize(tokenizer=...): it is not the model's own, which is used always; leave it out")

    def _calibration(self, data: str | Path | Sequence[str] | None) -> str:
        """The calibration as a recipe names it; texts are put into a file, one a line."""
        if data is None:
            return SELF_CALIBRATION
        if isinstance(data, str):
            return data
        if isinstance(data, Path):
            return single_source(str(data))
        if not all(isinstance(text, str) for text in data):
            raise RecipeError("quantize(calib_data=...): a list must hold strings; token ids and tensors are not taken")
        file = Path(self._folder.name) / CALIBRATION_FILE
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in data), encoding="utf-8")
        return single_source(str(file))


def _refuse(function: str, options: Mapping[str, object], known: Mapping[str, Foreign]) -> None:
    """Raises RecipeError for the first option that this quantizer does not have, saying what to do instead."""
    for name, value in options.items():
        if name not in known:
            raise RecipeError(f"{function}() has no option {name}; leave it out")
        if value not in known[name].harmless:
            raise RecipeError(f"{function}({name}={value!r}) is not supported: {known[name].advice}")


def _device(device_map: object) -> DeviceName:
    """Raises RecipeError for a map that spreads the modules, as one block at a time is on a device here."""
    if device_map is None:
        return DeviceName.AUTO
    if not isinstance(device_map, str) or device_map not in list(DeviceName):
        raise RecipeError(
            f"from_pretrained(device_map={device_map!r}) is not supported: one block at a time is on the device; give "
            f"{', '.join(DeviceName)}"
        )
    return DeviceName(device_map)


def _merge(config: Mapping[str, object], keywords: Mapping[str, object]) -> dict[str, object]:
    """quant_config and keywords together. Raises RecipeError for a key in both, an unknown key, or another format."""
    for name in config:
        if name in keywords:
            raise RecipeError(f"quantize() was given {name} in quant_config and beside it; give it once")
    foreign = {name: value for name, value in config.items() if name not in CONFIG_KEYS}
    _refuse("quantize", foreign, {"modules_to_not_convert": QUANTIZING_OPTIONS["modules_to_not_convert"]})
    merged = {**config, **keywords}
    if merged.get("zero_point", True) is not True:
        raise RecipeError("quantize(zero_point=False) is not supported: weights have zero points; leave it out")
    version = merged.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise RecipeError(f"quantize(version={version!r}) is not supported: GEMM is written, which every reader takes")
    return merged


def _integer(config: Mapping[str, object], name: str) -> int:
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise RecipeError(f"quantize({name}={value!r}): it must be a whole number")
    return value
