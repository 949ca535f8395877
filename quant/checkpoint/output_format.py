"""The formats that are written: what fits into each, and the `quantization_config` that describes it."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from kernels.layout import AWQ_COLUMNS_PER_WORD, PackedWeight
from kernels.weight_kinds import WHOLE_ROW
from quant.checkpoint import awq_gemm, compressed_tensors
from quant.checkpoint.format_name import OutputFormat
from quant.checkpoint.meta import COMPRESSED_FORMAT
from quant.checkpoint.stored_module import PackedSpec
from quant.errors import RecipeError

# what checkpoints call the output head
HEAD_NAMES = ("lm_head", "embed_out")
USE_COMPRESSED = f"use --format {OutputFormat.COMPRESSED_TENSORS}"
ENCODERS: dict[OutputFormat, Callable[[PackedWeight], dict[str, Tensor]]] = {
    OutputFormat.AWQ: awq_gemm.encode,
    OutputFormat.COMPRESSED_TENSORS: compressed_tensors.encode,
}


def check_fits(output_format: OutputFormat, modules: Mapping[str, PackedSpec]) -> None:
    """Raises RecipeError, naming the module and what to use instead, when the format cannot hold one of them."""
    if output_format is OutputFormat.COMPRESSED_TENSORS:
        return
    for name, spec in modules.items():
        if spec.bits != awq_gemm.BITS:
            raise RecipeError(
                f"{name} has {spec.bits}-bit weights, and the AWQ gemm format holds 4 bits only; {USE_COMPRESSED}"
            )
        if spec.num_outputs % AWQ_COLUMNS_PER_WORD:
            raise RecipeError(
                f"{name} has {spec.num_outputs} outputs, and the AWQ gemm format packs "
                f"{AWQ_COLUMNS_PER_WORD} of them a word; {USE_COMPRESSED}"
            )
    if _common_group_size(list(modules.values())) is None:
        sizes = sorted({spec.group_size for spec in modules.values()})
        raise RecipeError(
            f"modules have groups of {', '.join(map(str, sizes))}, and the AWQ gemm format has one group size for all; "
            f"{USE_COMPRESSED}"
        )


def quantization_config(
    output_format: OutputFormat, modules: Mapping[str, PackedSpec], kept: Sequence[str]
) -> dict[str, object]:
    """The `quantization_config` for these quantized modules; kept: the linears that stayed as they were, full names."""
    if output_format is OutputFormat.AWQ:
        return _describe_awq(modules, kept)
    return _describe_compressed(modules, kept)


def _describe_awq(modules: Mapping[str, PackedSpec], kept: Sequence[str]) -> dict[str, object]:
    """What every loader of AWQ gemm files accepts. Entries of modules_to_not_convert are matched as substrings.

    `zero_point` is always true: qzeros is always written (a symmetric weight has z = 8 there). `lm_head` says that the
    output head is quantized too; it is left out where it is not.
    """
    has_head = any(name.rpartition(".")[2] in HEAD_NAMES for name in modules)
    return {
        "quant_method": "awq",
        "bits": awq_gemm.BITS,
        "group_size": _common_group_size(list(modules.values())),
        "zero_point": True,
        "version": "gemm",
        **({"lm_head": True} if has_head else {}),
        "modules_to_not_convert": list(kept),
    }


def _common_group_size(specs: Sequence[PackedSpec]) -> int | None:
    """The one group size of all modules, WHOLE_ROW where each has one group a row of its own length; else None."""
    sizes = {spec.group_size for spec in specs}
    if len(sizes) == 1:
        return sizes.pop()
    return WHOLE_ROW if all(spec.is_whole_row for spec in specs) else None


def _describe_compressed(modules: Mapping[str, PackedSpec], kept: Sequence[str]) -> dict[str, object]:
    """One config group a kind of weight; where there are several, each names its modules."""
    # a row as long as the groups of others is one group, too
    group_sizes = {spec.group_size for spec in modules.values() if not spec.is_whole_row}
    names_by_kind: dict[tuple[int, int | None], list[str]] = {}
    for name, spec in modules.items():
        kind = (spec.bits, spec.group_size if spec.group_size in group_sizes else None)
        names_by_kind.setdefault(kind, []).append(name)
    is_uniform = len(names_by_kind) == 1
    return {
        "quant_method": "compressed-tensors",
        "format": COMPRESSED_FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": ["Linear"] if is_uniform else names,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "channel" if group_size is None else "group",
                    "group_size": group_size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for index, ((bits, group_size), names) in enumerate(names_by_kind.items())
        },
        "ignore": list(kept),
        "kv_cache_scheme": None,
    }
