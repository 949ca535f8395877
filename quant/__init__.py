"""The offline quantizer: a model directory in, a checkpoint directory out. Run it as `python -m quant`.

From Python: `quantize(recipe, resolve_model(name), out)`, or AutoAWQ's shape, `AutoAWQForCausalLM`. Both load when they
are first asked for: the process that answers HTTP imports this package too, and must stay without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quant.auto_awq import AutoAWQForCausalLM
    from quant.checkpoint.location import resolve_model
    from quant.method import Method
    from quant.pipeline import quantize
    from quant.recipe import Recipe

__all__ = ["AutoAWQForCausalLM", "Method", "Recipe", "quantize", "resolve_model"]

_HOMES = {
    "AutoAWQForCausalLM": "quant.auto_awq",
    "Method": "quant.method",
    "Recipe": "quant.recipe",
    "quantize": "quant.pipeline",
    "resolve_model": "quant.checkpoint.location",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(_HOMES[name]), name)
    return found
