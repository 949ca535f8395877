"""A LoRA adapter's directory, checked against the model that it is for. Strict, as the loader: nothing is guessed.

Legend: R = rank, K = in features, N = out features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quant.checkpoint.folded_scales import ModuleScales
from quant.checkpoint.tensor_files import PICKLE_SUFFIXES, StoredTensor, read_header, read_whole
from quant.errors import CheckpointError
from server.model.config import ModelConfig
from server.model.expected_tensors import FLOAT_DTYPES, LinearSpec, layer_spec
from server.model.lora_config import CONFIG_FILE, LoraConfig, is_target, read_lora_config

TENSOR_FILE = "adapter_model.safetensors"
# what PEFT puts before a module's name, and after
_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_NO_SCALES = ModuleScales()


@dataclass(frozen=True)
class Adapter:
    """name: what requests call it. down, up: by module, the tensors [R, K] and [N, R]; a module has both or none.

    scales: by module, what the model's inputs and outputs are divided by and those that it was trained on are not.
    note: how it is taken over the model, doubt: what may be wrong with that; sentences for the log, or empty.
    """

    name: str
    config: LoraConfig
    down: Mapping[str, StoredTensor]
    up: Mapping[str, StoredTensor]
    scales: Mapping[str, ModuleScales] = field(default_factory=dict)
    note: str = ""
    doubt: str = ""

    def rank_of(self, module: str) -> int:
        """0 where the adapter leaves the module as it is."""
        return self.config.rank_of(module) if module in self.down else 0

    def read_down(self, module: str) -> Tensor:
        """A, float32 [R, K], or A diag(scale). Raises CheckpointError for a tensor with a value that is no number."""
        down = _read_finite(self.down[module], _PREFIX + module + _DOWN)
        scale = self.scales.get(module, _NO_SCALES).input_scale
        return down if scale is None else down * scale

    def read_up(self, module: str) -> Tensor:
        """B, float32 [N, R], or diag(1 / divisor) B, with the adapter's own scale in it. Raises as `read_down` does."""
        up = self.config.scale_of(module) * _read_finite(self.up[module], _PREFIX + module + _UP)
        divisor = self.scales.get(module, _NO_SCALES).output_divisor
        return up if divisor is None else up / divisor[:, None]


def open_adapter(name: str, directory: Path, model: ModelConfig) -> Adapter:
    """Check an adapter's config, and the names, shapes and dtypes of its tensors; nothing is loaded.

    Raises CheckpointError naming the file, and the field or the tensor that is wrong.
    """
    config = read_lora_config(directory)
    file = directory / TENSOR_FILE
    if not file.is_file():
        raise CheckpointError(_without_tensors(directory))
    adaptable = _adaptable_linears(model)
    wanted = _find_targets(config, adaptable, directory / CONFIG_FILE)
    down: dict[str, StoredTensor] = {}
    up: dict[str, StoredTensor] = {}
    for tensor_name, stored in read_header(file).items():
        module, side = _parse_name(tensor_name)
        if module not in adaptable:
            raise CheckpointError(f"{file} has {tensor_name}, which {_why_not(module, model)}")
        if wanted is not None and module not in wanted:
            raise CheckpointError(f"{file} has {tensor_name}, but target_modules in {CONFIG_FILE} do not name {module}")
        linear, rank = adaptable[module], config.rank_of(module)
        shape = (rank, linear.num_inputs) if side == _DOWN else (linear.num_outputs, rank)
        _check_tensor(file, tensor_name, stored, shape)
        (down if side == _DOWN else up)[module] = stored
    _check_complete(file, set(down), set(up), wanted)
    return Adapter(name, config, down, up)


def _adaptable_linears(model: ModelConfig) -> dict[str, LinearSpec]:
    """All but the output head, and the experts and routers of mixtures."""
    layers = [layer_spec(model, index) for index in range(model.num_layers)]
    return {linear.name: linear for layer in layers for linears in layer.joined for linear in linears}


def _find_targets(config: LoraConfig, adaptable: Mapping[str, LinearSpec], file: Path) -> set[str] | None:
    """The modules that the config names; None where it leaves that to a pattern, and so to the tensors."""
    if config.target_modules is None:
        return None
    found = set()
    for target in config.target_modules:
        meant = {name for name in adaptable if is_target(target, name) and _is_in(config.layers, name)}
        if not meant:
            known = sorted({name.rpartition(".")[2] for name in adaptable})
            raise CheckpointError(
                f"{file}: target_modules has {target!r}, and the model has no such linear that takes an adapter; those "
                f"that do are {', '.join(known)}"
            )
        found |= meant
    return found


def _is_in(layers: tuple[int, ...] | None, module: str) -> bool:
    return layers is None or int(module.split(".")[2]) in layers


def _parse_name(tensor_name: str) -> tuple[str, str]:
    """The module, and which side of it; the name itself for a tensor of another kind, which is no module's name."""
    for side in (_DOWN, _UP):
        if tensor_name.startswith(_PREFIX) and tensor_name.endswith(side):
            return tensor_name.removeprefix(_PREFIX).removesuffix(side), side
    return tensor_name, ""


def _why_not(module: str, model: ModelConfig) -> str:
    if ".experts" in module or (model.moe is not None and module.endswith(".gate")):
        return "adapts the experts or the router of a mixture: only attention, dense MLPs and shared experts may be"
    if "lm_head" in module or "embed_tokens" in module:
        return "changes the embedding or the output head: only the linears of the layers may be adapted"
    return "is neither lora_A nor lora_B of a linear that the model has: the adapter is of another model"


def _check_tensor(file: Path, name: str, stored: StoredTensor, shape: tuple[int, int]) -> None:
    if stored.spec.shape != shape:
        raise CheckpointError(
            f"{file}: {name} has the shape {list(stored.spec.shape)}; the model and {CONFIG_FILE} ask for {list(shape)}"
        )
    if stored.spec.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{file}: {name} is {stored.spec.dtype}; it must be float32, bfloat16 or float16")


def _check_complete(file: Path, down: set[str], up: set[str], wanted: set[str] | None) -> None:
    expected = wanted if wanted is not None else down | up
    for present, side in ((down, _DOWN), (up, _UP)):
        if missing := sorted(expected - present):
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{file} lacks {_PREFIX}{missing[0]}{side}{others}; save the adapter again")
    if not expected:
        raise CheckpointError(f"{file} has no tensor; save the adapter again")


def _without_tensors(directory: Path) -> str:
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{directory} holds its adapter as a pickle ({pickles[0]}), which can run code and is never loaded; save "
            "it with PEFT's save_pretrained(..., safe_serialization=True)"
        )
    return f"{directory} has no {TENSOR_FILE}: give a directory that PEFT saved an adapter in"


def _read_finite(stored: StoredTensor, name: str) -> Tensor:
    tensor = read_whole(stored).float()
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{stored.file}: {name} holds a value that is no finite number; the adapter is damaged")
    return tensor
