"""Finds where a model's activations stop being finite, so that a message can name the module. It changes nothing."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def first_not_finite(module: nn.Module, run: Callable[[], object]) -> str | None:
    """The module inside of this one whose output is the first with a NaN or an infinity while it runs; else None."""
    found: list[str] = []
    leaves = ((name, leaf) for name, leaf in module.named_modules() if not any(leaf.children()))
    hooks = [leaf.register_forward_hook(_watch(name, found)) for name, leaf in leaves]
    try:
        with torch.inference_mode():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _watch(name: str, found: list[str]) -> Callable[[nn.Module, tuple[object, ...], object], None]:
    def look(_module: nn.Module, _inputs: tuple[object, ...], output: object) -> None:
        if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            found.append(name)

    return look
