"""Data: per architecture, which operation of a block feeds which linears, and how to find them. It computes nothing.

Sources: AutoAWQ awq/models/{llama,mistral,qwen2,qwen3}.py; heads that share keys and values as in llm-compressor #2818.
"""

from dataclasses import dataclass

from torch import nn

from quant.errors import SourceError


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that read one input, and the operation that makes it. Names are relative to the block.

    source: a norm, or a linear whose output channels reach the input unmixed (through a product or an average).
    linears: every consumer of that input; the first one is where the input is observed.
    """

    source: str
    linears: tuple[str, ...]


LLAMA_GROUPS = (
    ScaleGroup("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",)),
    ScaleGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ScaleGroup("mlp.up_proj", ("mlp.down_proj",)),
)

SCALE_GROUPS: dict[str, tuple[ScaleGroup, ...]] = {
    "llama": LLAMA_GROUPS,
    "mistral": LLAMA_GROUPS,
    "qwen2": LLAMA_GROUPS,
    # the norms of q and k come after the projections, so folding into the input norm stays exact
    "qwen3": LLAMA_GROUPS,
}


def groups_for(model_type: str) -> tuple[ScaleGroup, ...]:
    """The scale groups of a model type. Raises SourceError, listing the known types, for another one."""
    if model_type not in SCALE_GROUPS:
        raise SourceError(f"model type {model_type!r} cannot be quantized; supported: {', '.join(SCALE_GROUPS)}")
    return SCALE_GROUPS[model_type]


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """The linear of that name in a block. Raises TypeError when it is another kind of module."""
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a linear layer")
    return module
