"""What config.json says of a mixture of experts, and data: what its families call it."""

from dataclasses import dataclass

from quant.errors import CheckpointError
from server.model.config_fields import ConfigFields


@dataclass(frozen=True)
class MoeFamily:
    """One row. block: what checkpoints call the module of a layer that holds router and experts.

    gate, up, down: the linears of an expert. width_field, shared_width_field: config.json's fields of how wide an
    expert, and the one that every token goes through, is inside; None where there is none.
    norm_topk_prob: whether the weights of a token's choices are made to add up to 1, unless config.json says.
    """

    block: str
    gate: str
    up: str
    down: str
    width_field: str
    shared_width_field: str | None
    norm_topk_prob: bool


MIXTRAL = MoeFamily("block_sparse_moe", "w1", "w3", "w2", "intermediate_size", None, norm_topk_prob=True)
QWEN2_MOE = MoeFamily(
    "mlp",
    "gate_proj",
    "up_proj",
    "down_proj",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    norm_topk_prob=False,
)
QWEN3_MOE = MoeFamily("mlp", "gate_proj", "up_proj", "down_proj", "moe_intermediate_size", None, norm_topk_prob=False)


@dataclass(frozen=True)
class MoeConfig:
    """A model's mixtures of experts. sparse_layers: whether each layer has one; the others have a dense MLP.

    intermediate_size: of an expert. shared_intermediate_size: of the one that every token goes through, None without.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    shared_intermediate_size: int | None
    norm_topk_prob: bool
    sparse_layers: tuple[bool, ...]


def read_moe(family: MoeFamily, fields: ConfigFields, num_layers: int) -> MoeConfig:
    """Raises CheckpointError naming the field, its value and what would be right."""
    # transformers 5 calls the field of some families by mixtral's name
    count_field = "num_local_experts" if fields.values.get("num_local_experts") is not None else "num_experts"
    num_experts = fields.positive_int(count_field)
    num_choices = fields.positive_int("num_experts_per_tok")
    if num_choices > num_experts:
        raise CheckpointError(
            f"{fields.source}: num_experts_per_tok is {num_choices}, but {count_field} is {num_experts}"
        )
    step = fields.positive_int("decoder_sparse_step", default=1)
    dense = set(fields.whole_numbers("mlp_only_layers"))
    shared_field = family.shared_width_field
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=num_choices,
        intermediate_size=fields.positive_int(family.width_field),
        shared_intermediate_size=None if shared_field is None else fields.positive_int(shared_field),
        norm_topk_prob=fields.boolean("norm_topk_prob", default=family.norm_topk_prob),
        sparse_layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)),
    )
