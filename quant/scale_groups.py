"""Data: per architecture, which operation of a block feeds which linears, and how to find them. It computes nothing.

Sources: the models' modeling files in transformers 5; AutoAWQ awq/models/*.py; llm-compressor awq/mappings.py; routers
in the group as in llm-compressor #2451; heads that share keys and values as in llm-compressor #2818.
"""

from dataclasses import dataclass
from enum import Enum, auto

from torch import nn


class Outputs(Enum):
    """Which output rows of the feeding operation reach the linears, in their order."""

    ALL = auto()
    # gate above, up below: up is the half that is multiplied in
    SECOND_HALF = auto()
    # all heads' queries, then all keys, then all values
    VALUES_LAST = auto()
    # for every key and value head in turn: its queries, its key, its value
    VALUES_PER_HEAD = auto()


@dataclass(frozen=True)
class GroupRow:
    """Linears that read one input, and the operation that makes it. Names are relative to the block.

    source: a norm, or a linear whose outputs reach the input unmixed (through a product, an average or a ReLU).
    linears: every consumer that is quantized. kept: every other one: it is multiplied, and stays as precise as it is.
    norm_offset: the norm multiplies by its weight plus this.
    only_if: fields of the model's config and the values without which the row does not hold.
    A name that a block lacks is passed over; `*` stands for an expert's number, the same one in the whole row if the
    source has it. The first row that has a linear takes it; linears without a row are quantized, and not scaled.
    """

    source: str
    linears: tuple[str, ...]
    kept: tuple[str, ...] = ()
    outputs: Outputs = Outputs.ALL
    norm_offset: float = 0
    only_if: tuple[tuple[str, object], ...] = ()


# the number that gemma's norms add to their weights
ONE_PLUS_WEIGHT = 1.0

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

VALUES = GroupRow("self_attn.v_proj", ("self_attn.o_proj",))
UP = GroupRow("mlp.up_proj", ("mlp.down_proj",))

LLAMA = (
    # norms of q and k come after the projections, so folding into the input norm stays exact with them
    GroupRow("input_layernorm", QKV),
    VALUES,
    GroupRow("post_attention_layernorm", GATE_UP),
    UP,
)
GEMMA = (
    GroupRow("input_layernorm", QKV, norm_offset=ONE_PLUS_WEIGHT),
    VALUES,
    GroupRow("post_attention_layernorm", GATE_UP, norm_offset=ONE_PLUS_WEIGHT),
    UP,
)
GEMMA2 = (
    GroupRow("input_layernorm", QKV, norm_offset=ONE_PLUS_WEIGHT),
    VALUES,
    GroupRow("pre_feedforward_layernorm", GATE_UP, norm_offset=ONE_PLUS_WEIGHT),
    UP,
)
# no row for q, k, v: scaling their input made gemma 3 worse than plain rounding (llm-compressor #2522, #2571)
GEMMA3 = (
    VALUES,
    GroupRow("pre_feedforward_layernorm", GATE_UP, norm_offset=ONE_PLUS_WEIGHT),
    UP,
)
# its norms come after attention and MLP: both read the residual stream, which nothing can be divided out of
OLMO2 = (VALUES, UP)
PHI3 = (
    GroupRow("input_layernorm", ("self_attn.qkv_proj",)),
    GroupRow("self_attn.qkv_proj", ("self_attn.o_proj",), outputs=Outputs.VALUES_LAST),
    GroupRow("post_attention_layernorm", ("mlp.gate_up_proj",)),
    GroupRow("mlp.gate_up_proj", ("mlp.down_proj",), outputs=Outputs.SECOND_HALF),
)
# the norms of what attention and MLP give come after o_proj and down_proj, and change nothing
GLM4 = (
    GroupRow("input_layernorm", QKV),
    VALUES,
    GroupRow("post_attention_layernorm", ("mlp.gate_up_proj",)),
    GroupRow("mlp.gate_up_proj", ("mlp.down_proj",), outputs=Outputs.SECOND_HALF),
)
# attention and MLP side by side: one norm feeds both
COHERE = (GroupRow("input_layernorm", (*QKV, *GATE_UP)), VALUES, UP)
MIXTRAL = (
    GroupRow("input_layernorm", QKV),
    VALUES,
    GroupRow("post_attention_layernorm", ("mlp.experts.*.w1", "mlp.experts.*.w3"), kept=("mlp.gate",)),
    GroupRow("mlp.experts.*.w3", ("mlp.experts.*.w2",)),
)
QWEN_MOE = (
    GroupRow("input_layernorm", QKV),
    VALUES,
    GroupRow(
        "post_attention_layernorm",
        (
            "mlp.shared_expert.gate_proj",
            "mlp.shared_expert.up_proj",
            "mlp.experts.*.gate_proj",
            "mlp.experts.*.up_proj",
            # the blocks that mlp_only_layers and decoder_sparse_step leave without experts
            *GATE_UP,
        ),
        kept=("mlp.gate", "mlp.shared_expert_gate"),
    ),
    GroupRow("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
    GroupRow("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    UP,
)
# what GELU makes of fc1's output cannot be scaled: dense_4h_to_h and c_proj have no row
GPT_NEOX = (
    GroupRow("input_layernorm", ("attention.query_key_value",)),
    GroupRow("attention.query_key_value", ("attention.dense",), outputs=Outputs.VALUES_PER_HEAD),
    GroupRow("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
)
STARCODER2 = (GroupRow("input_layernorm", QKV), VALUES, GroupRow("post_attention_layernorm", ("mlp.c_fc",)))
OPT = (
    # OPT-350m has its norms after attention and MLP, where they feed the residual stream as well
    GroupRow("self_attn_layer_norm", QKV, only_if=(("do_layer_norm_before", True),)),
    GroupRow("self_attn.v_proj", ("self_attn.out_proj",)),
    GroupRow("final_layer_norm", ("fc1",), only_if=(("do_layer_norm_before", True),)),
    # a positive scale passes through ReLU; Galactica is an OPT with GELU
    GroupRow("fc1", ("fc2",), only_if=(("activation_function", "relu"),)),
)
FALCON = (
    # 40b and 180b: two norms side by side
    GroupRow("ln_attn", ("self_attention.query_key_value",)),
    GroupRow("ln_mlp", ("mlp.dense_h_to_4h",)),
    # 7b and 11b: one norm feeds both; rw: one after the other
    GroupRow(
        "input_layernorm",
        ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
        only_if=(("parallel_attn", True),),
    ),
    GroupRow("input_layernorm", ("self_attention.query_key_value",), only_if=(("parallel_attn", False),)),
    GroupRow("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    GroupRow("self_attention.query_key_value", ("self_attention.dense",), outputs=Outputs.VALUES_PER_HEAD),
)

FAMILIES: dict[str, tuple[GroupRow, ...]] = {
    "cohere": COHERE,
    "falcon": FALCON,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3,
    "gpt_neox": GPT_NEOX,
    "glm4": GLM4,
    "granite": LLAMA,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "olmo2": OLMO2,
    "opt": OPT,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen2_moe": QWEN_MOE,
    "qwen3": LLAMA,
    "qwen3_moe": QWEN_MOE,
    "smollm3": LLAMA,
    "starcoder2": STARCODER2,
}

# what routers, or the modules that hold them, are called where no row names them; a rounded one sends tokens to the
# wrong experts
ROUTER_NAMES = ("gate", "router", "shared_expert_gate")


def rows_of(model_type: str) -> tuple[GroupRow, ...]:
    """What is known of a model type's blocks; nothing where nobody has described it."""
    return FAMILIES.get(model_type, ())


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """The linear of that name in a block. Raises TypeError when it is another kind of module."""
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a linear layer")
    return module
