"""Data: every (kernel, architecture) of sampling on the device."""

from kernels import fused_logit_edits, fused_logprobs, fused_sampling
from kernels.tiles import COPY_WARPS, EDITED_COLUMNS, NUM_THRESHOLDS, SAMPLED_COLUMNS, SAMPLING_WARPS
from kernels.variant import Family, Variant, plain_variant

# tiles of the largest vocabularies, of a quarter of a million tokens
MAX_TILES = 128


def all_variants(arch: int) -> list[Variant]:
    """Everything for one architecture: edits of all kinds and of none, counts, choice, log-probabilities."""
    return [
        _edit_variant(arch, with_everything=True),
        _edit_variant(arch, with_everything=False),
        _count_variant(arch),
        _choose_variant(arch),
        _logprobs_variant(arch),
    ]


def _edit_variant(arch: int, *, with_everything: bool) -> Variant:
    optional = {
        "bias_starts_ptr": "*i32:16",
        "bias_token_ids_ptr": "*i64:16",
        "bias_values_ptr": "*fp32:16",
        "counts_ptr": "*i32:16",
        "repetition_ptr": "*fp32:16",
        "presence_ptr": "*fp32:16",
        "frequency_ptr": "*fp32:16",
        "allowed_ptr": "*i32:16",
    }
    arguments = {
        "logits_ptr": "*fp32:16",
        "temperatures_ptr": "*fp32:16",
        "edited_ptr": "*fp32:16",
        "logits_stride": "i32:16",
        "edited_stride": "i32:16",
        "vocab_size": "i32:16",
        **(optional if with_everything else {}),
    }
    constants = {"TILE_COLUMNS": EDITED_COLUMNS, **({} if with_everything else dict.fromkeys(optional))}
    label = "bias penalties mask" if with_everything else "temperature"
    return plain_variant("edit_logits_kernel", arch, label, arguments, constants, COPY_WARPS)


def _count_variant(arch: int) -> Variant:
    arguments = {
        "token_ids_ptr": "*i64:16",
        "starts_ptr": "*i64:16",
        "num_prompt_tokens_ptr": "*i64:16",
        "counts_ptr": "*i32:16",
        "vocab_size": "i32:16",
    }
    return plain_variant("count_tokens_kernel", arch, "int64", arguments, {"TILE_TOKENS": EDITED_COLUMNS}, COPY_WARPS)


def _choose_variant(arch: int) -> Variant:
    arguments = {
        "scaled_ptr": "*fp32:16",
        "temperatures_ptr": "*fp32:16",
        "top_k_ptr": "*i32:16",
        "top_p_ptr": "*fp64:16",
        "min_p_ptr": "*fp32:16",
        "seeds_ptr": "*i64:16",
        "positions_ptr": "*i64:16",
        "tokens_ptr": "*i64:16",
        "row_stride": "i32:16",
        "vocab_size": "i32:16",
    }
    constants = {"TILE_COLUMNS": SAMPLED_COLUMNS, "NUM_THRESHOLDS": NUM_THRESHOLDS}
    return plain_variant("choose_tokens_kernel", arch, "fp32", arguments, constants, SAMPLING_WARPS)


def _logprobs_variant(arch: int) -> Variant:
    arguments = {
        "logits_ptr": "*fp32:16",
        "chosen_ptr": "*i64:16",
        "chosen_logprobs_ptr": "*fp32:16",
        "top_ids_ptr": "*i64:16",
        "top_logprobs_ptr": "*fp32:16",
        "row_stride": "i32:16",
        "vocab_size": "i32:16",
        "num_top": "i32",
    }
    constants = {"TILE_COLUMNS": SAMPLED_COLUMNS, "MAX_TILES": MAX_TILES}
    return plain_variant("logprobs_kernel", arch, "fp32", arguments, constants, SAMPLING_WARPS)


FAMILY = Family(
    name="sampling",
    kernels={
        "edit_logits_kernel": fused_logit_edits.edit_logits_kernel,
        "count_tokens_kernel": fused_logit_edits.count_tokens_kernel,
        "choose_tokens_kernel": fused_sampling.choose_tokens_kernel,
        "logprobs_kernel": fused_logprobs.logprobs_kernel,
    },
    all_variants=all_variants,
    sample_variants=all_variants,
)
