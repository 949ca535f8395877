"""What adapter_config.json says, checked value by value. Knows no tensor and no file but that one.

Source: PEFT, tuners/lora/config.py and tuners/tuners_utils.py (check_target_module_exists, get_pattern_key).
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from quant.checkpoint.tensor_files import read_json_object
from quant.errors import CheckpointError
from server.model.config_fields import ConfigFields

CONFIG_FILE = "adapter_config.json"
BASE_MODEL_FIELD = "base_model_name_or_path"
# fields that change what is computed, or for whom, and the values that change nothing; an absent one is such a value
_CHANGING_FIELDS: dict[str, tuple[object, ...]] = {
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "use_qalora": (False,),
    "exclude_modules": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "layer_replication": ([],),
    "alora_invocation_tokens": ([],),
    # the others change the weights of the model that was trained on
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class LoraConfig:
    """target_modules: names of modules, each also the end of longer ones; None where a pattern chose them.

    layers: the layers that have them, None for all. base_model: what it was trained on, as PEFT was told; empty where
    it does not say. The patterns: of modules' names, the first that fits counts.
    """

    rank: int
    alpha: float
    has_root_scale: bool
    rank_patterns: Mapping[str, int]
    alpha_patterns: Mapping[str, float]
    target_modules: tuple[str, ...] | None
    layers: tuple[int, ...] | None
    base_model: str

    def rank_of(self, module: str) -> int:
        return self.rank_patterns.get(_find_pattern(self.rank_patterns, module), self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of a module's two matrices is multiplied by."""
        alpha = self.alpha_patterns.get(_find_pattern(self.alpha_patterns, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.has_root_scale else alpha / rank


def read_lora_config(directory: Path) -> LoraConfig:
    """Raises CheckpointError naming the file, the field, its value and what would be right."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory} has no {CONFIG_FILE}: give a directory that PEFT saved an adapter in")
    fields = ConfigFields(read_json_object(file), str(file))
    kind = fields.string("peft_type", default="LORA")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type {kind!r} is not supported; only LORA is")
    for name, neutral in _CHANGING_FIELDS.items():
        value = fields.values.get(name)
        if value is not None and value not in neutral:
            raise CheckpointError(f"{file}: {name} {value!r} is not supported")
    layers = fields.values.get("layers_to_transform")
    return LoraConfig(
        rank=fields.positive_int("r"),
        alpha=fields.positive_float("lora_alpha"),
        has_root_scale=fields.boolean("use_rslora", default=False),
        rank_patterns={name: of.positive_int(name) for of, name in _entries(fields, "rank_pattern")},
        alpha_patterns={name: of.positive_float(name) for of, name in _entries(fields, "alpha_pattern")},
        target_modules=_read_targets(fields),
        layers=(fields.whole_number("layers_to_transform", minimum=0),)
        if isinstance(layers, int)
        else fields.whole_numbers("layers_to_transform") or None,
        base_model=fields.string(BASE_MODEL_FIELD, default=""),
    )


def is_target(target: str, module: str) -> bool:
    """Whether an entry of target_modules means the module."""
    return module == target or module.endswith(f".{target}")


def _entries(fields: ConfigFields, name: str) -> list[tuple[ConfigFields, str]]:
    nested = fields.mapping(name)
    if nested is None:
        return []
    for pattern in nested.values:
        try:
            re.compile(_expression(pattern))
        except re.error as error:
            raise CheckpointError(f"{nested.source}: {pattern!r} is no regular expression: {error}") from error
    return [(nested, pattern) for pattern in nested.values]


def _expression(pattern: str) -> str:
    """What PEFT matches module names with: the pattern may also fit the end of one."""
    return rf"(.*\.)?({pattern})$"


def _find_pattern(patterns: Collection[str], module: str) -> str:
    return next((pattern for pattern in patterns if re.match(_expression(pattern), module)), "")


def _read_targets(fields: ConfigFields) -> tuple[str, ...] | None:
    value = fields.values.get("target_modules")
    if isinstance(value, str):
        return None
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{fields.source}: target_modules is {value!r}; it must be a list of names, or a pattern")
    return tuple(value)
