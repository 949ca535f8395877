"""Fits adapters to the checkpoint that they are served over: some were trained on it, others on its original.

Quantizing by AWQ divides what a linear reads, and what some give, by scales, and multiplies the linear by them. The
model stays what it was; what an adapter of the original reads and gives does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from quant.checkpoint.folded_scales import FOLDED_SCALES_FILE, ModuleScales, read_folded_scales
from quant.checkpoint.location import recorded_name
from quant.checkpoint.reader import CheckpointReader
from quant.errors import CheckpointError
from server.model.adapter import Adapter
from server.model.lora_config import BASE_MODEL_FIELD, CONFIG_FILE


def fit_adapters(adapters: Sequence[Adapter], directory: Path) -> tuple[Adapter, ...]:
    """The adapters as they add over the checkpoint what they learned, with a word on how they were taken.

    An adapter whose config names the checkpoint, by its directory or its hub name, was trained on it and stays as it
    is; any other was trained on the original. Raises CheckpointError when the checkpoint or its file of scales is
    damaged, or the file is of another model.
    """
    scales = read_folded_scales(directory)
    if scales is None:
        meta = CheckpointReader.open(directory).meta
        if meta is not None and meta.may_be_scaled:
            return tuple(a if _was_trained_on(directory, a) else replace(a, doubt=_doubt(a)) for a in adapters)
    return tuple(_fit(adapter, directory, scales) if scales else adapter for adapter in adapters)


def _fit(adapter: Adapter, directory: Path, scales: Mapping[str, ModuleScales]) -> Adapter:
    """To a checkpoint with these scales."""
    if _was_trained_on(directory, adapter):
        return replace(adapter, note=f"{adapter.name} is taken as it is: its {BASE_MODEL_FIELD} is this checkpoint")
    own_scales = {name: own for name, own in scales.items() if name in adapter.down}
    for name, own in own_scales.items():
        num_inputs, num_outputs = adapter.down[name].spec.shape[1], adapter.up[name].spec.shape[0]
        for scale, length in ((own.input_scale, num_inputs), (own.output_divisor, num_outputs)):
            if scale is not None and scale.shape != (length,):
                raise CheckpointError(
                    f"{directory / FOLDED_SCALES_FILE} has {len(scale)} scales of {name} where {length} are needed: "
                    "it is of another model; fetch it again, or quantize the original again"
                )
    note = (
        f"{adapter.name} is multiplied by the scales that are folded into this checkpoint: its {BASE_MODEL_FIELD} is "
        f"{adapter.config.base_model!r}"
    )
    return replace(adapter, scales=own_scales, note=note, doubt=_doubt_of_base(adapter))


def _doubt_of_base(adapter: Adapter) -> str:
    """Where the name of an adapter's base does not tell that it is the original: what is taken for granted then."""
    name = adapter.config.base_model
    if name and not (Path(name).is_absolute() and not Path(name).exists()):
        return ""
    named = f"is {name}, which is not here" if name else "is empty"
    return (
        f"{adapter.name} is taken for an adapter of the original, and multiplied by this checkpoint's scales: its "
        f"{BASE_MODEL_FIELD} {named}. If it was trained on this checkpoint, name that there in its {CONFIG_FILE}"
    )


def _doubt(adapter: Adapter) -> str:
    return (
        f"{adapter.name} may add something else than it learned: most AWQ checkpoints have scales folded into their "
        f"weights, and this one has no {FOLDED_SCALES_FILE} that says which. Quantize the original with awq-serve, or "
        f"train the adapter on this checkpoint and name that as {BASE_MODEL_FIELD} in its {CONFIG_FILE}"
    )


def _was_trained_on(directory: Path, adapter: Adapter) -> bool:
    name = adapter.config.base_model
    if not name:
        return False
    return name == recorded_name(directory) or Path(name).expanduser().resolve() == directory.resolve()
