"""Finds where a model's activations stop being finite, so that a message can name the module. It changes nothing."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel


def first_not_finite(model: PreTrainedModel, token_ids: Tensor) -> str:
    """The module whose output is the first with a NaN or an infinity, on token ids int64 [B, T]; else "the model"."""
    found: list[str] = []
    leaves = ((name, module) for name, module in model.named_modules() if not any(module.children()))
    hooks = [module.register_forward_hook(_watch(name, found)) for name, module in leaves]
    try:
        with torch.inference_mode():
            model(token_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the model"


def _watch(name: str, found: list[str]) -> Callable[[nn.Module, tuple[object, ...], object], None]:
    def look(_module: nn.Module, _inputs: tuple[object, ...], output: object) -> None:
        if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            found.append(name)

    return look
