"""Random LoRA adapters of tiny models, as PEFT saves them, and the weights that they stand for."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(
    directory: Path,
    model: Path,
    targets: Sequence[str],
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 8,
    fields: Mapping[str, object] | None = None,
) -> Path:
    """Write a random adapter of a model directory's linears with these names. fields: of its config, beside the usual.

    rank_pattern may name modules whole. Returns the directory.
    """
    config: dict[str, object] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "bias": "none",
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        **(fields or {}),
    }
    ranks = config["rank_pattern"]
    assert isinstance(ranks, dict)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if name != module and module.rpartition(".")[2] in targets and ".experts." not in module:
            own_rank = next((own for key, own in ranks.items() if module.endswith(key)), rank)
            down = torch.randn(own_rank, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
            # a fraction of what the weight gives, so that rounding is not blown up
            up = torch.randn(weight.shape[0], own_rank, generator=generator) * 0.25 * own_rank**-0.5
            tensors |= {f"{PREFIX}{module}.lora_A.weight": down, f"{PREFIX}{module}.lora_B.weight": up}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    save_file(tensors, directory / TENSOR_FILE)
    return directory


def merged_weights(model: Path, adapter: Path, scales: Mapping[str, float]) -> dict[str, Tensor]:
    """The model's weights with the products of the adapter's matrices added to them.

    scales: what a module's is multiplied by, by the end of its name.
    """
    weights, tensors = load_file(model / "model.safetensors"), load_file(adapter / TENSOR_FILE)
    for name, down in tensors.items():
        if match := re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_A\.weight", name):
            module = match[1]
            scale = next(scale for end, scale in scales.items() if module.endswith(end))
            weights[f"{module}.weight"] += scale * tensors[f"{PREFIX}{module}.lora_B.weight"] @ down
    return weights
