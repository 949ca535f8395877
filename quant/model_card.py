"""The checkpoint's README.md: what the hub shows of it, how it was made and measured, and how to load it.

Names no place on the machine that made it.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from huggingface_hub.repocard import metadata_load

from kernels.weight_kinds import WHOLE_ROW
from quant.calibration_mix import without_directories
from quant.checkpoint.format_name import OutputFormat
from quant.device_name import DeviceName
from quant.method import Method
from quant.recipe import AUTO, ROW
from quant.report import HeldOutQuality, Report, describe_origins, describe_rounding

CARD_FILE = "README.md"
PROGRAM = "awq-serve"
# the families that `serve` serves; the server's own table must say the same (tests/quant/test_model_card.py)
SERVED_TYPES = (
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
# what a card states of its licence; all of it goes along
LICENCE_FIELDS = ("license", "license_name", "license_link")


def read_licence(source: Path) -> dict[str, str]:
    """The licence fields that the card of a model directory states; empty where it has no card, or states none."""
    card = source / CARD_FILE
    if not card.is_file():
        return {}
    try:
        stated = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        # a card that cannot be read states nothing
        return {}
    return {name: stated[name] for name in LICENCE_FIELDS if isinstance(stated.get(name), str)}


def model_card(report: Report, name: str, licence: Mapping[str, str], model_type: str) -> bytes:
    """README.md of the checkpoint called `name`, in UTF-8. licence: what read_licence gives of the original.

    model_type: the family, as config.json calls it; who serves a checkpoint depends on it.
    """
    sections = (
        _front_matter(report, licence),
        _introduction(report, name),
        _quality(report.held_out),
        _recipe(report, name),
        _loading(name, model_type),
    )
    return ("\n\n".join(sections) + "\n").encode()


def _front_matter(report: Report, licence: Mapping[str, str]) -> str:
    fields: dict[str, object] = dict(licence)
    if not Path(report.source).is_absolute():
        fields |= {"base_model": report.source, "base_model_relation": "quantized"}
    fields |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["awq", *(["mixed-precision"] if report.mixture else [f"{report.recipe.bits}-bit"]), "quantized"],
    }
    # JSON values are YAML ones, and need no thought about quoting
    return "\n".join(
        ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()), "---"]
    )


def _introduction(report: Report, name: str) -> str:
    how = "plain rounding" if report.recipe.method is Method.RTN else report.recipe.method.value
    is_awq = report.recipe.output_format is OutputFormat.AWQ
    format_name = "AWQ `gemm`" if is_awq else "compressed-tensors `pack-quantized`"
    head = "" if report.recipe.lm_head is None else f" The output head is in {report.recipe.lm_head} bits."
    return (
        f"# {name}\n\n"
        f"{_published_source(report)} with the weights of its blocks in {describe_rounding(report)}: "
        f"{format_name} format, {report.bits_per_weight:.2f} bits a weight with scales and zero points.{head} "
        f"Made with `{PROGRAM} quantize` ({how})."
    )


def _quality(held_out: HeldOutQuality | None) -> str:
    if held_out is None:
        return "## Quality\n\nNot measured when it was made."
    return (
        f"## Quality\n\nOn {held_out.num_windows} windows of {held_out.window_tokens} tokens of prose and code that no "
        "calibration has seen:\n\n"
        "| model | perplexity | mean KL (nats) | same first choice |\n"
        "|---|---|---|---|\n"
        f"| original | {held_out.original_perplexity:.3f} | | |\n"
        f"| this one | {held_out.perplexity:.3f} | {held_out.mean_kl:.5f} | {100 * held_out.top1_agreement:.2f} % |"
    )


def _recipe(report: Report, name: str) -> str:
    lines = ["## How it was made", ""]
    if report.calibration is not None:
        origins = describe_origins(report.calibration)
        lines += [f"Calibrated on {report.calibration.num_tokens} tokens: {origins}.", ""]
    command = [PROGRAM, "quantize", _published_source(report), name, *recipe_options(report)]
    lines += [
        f"    {shlex.join(command)}",
        "",
        "`report.json` has the error of every layer and the digest of the calibration's tokens.",
    ]
    return "\n".join(lines)


def recipe_options(report: Report) -> list[str]:
    """The command line's options that make this recipe; the group size is the one that `auto` came to."""
    recipe = report.recipe
    group_size = ROW if report.group_size == WHOLE_ROW else str(report.group_size)
    if recipe.target_bpw is not None and recipe.group_size is None:
        # every size may be chosen then, and not only smaller ones
        group_size = AUTO
    options = [
        *("--method", recipe.method.value, "--bits", str(recipe.bits), "--group-size", group_size),
        *("--format", recipe.output_format.value, "--seed", str(recipe.seed)),
    ]
    if recipe.steps.calibrates:
        options += ["--calib", without_directories(recipe.calibration)]
        num_samples, sample_tokens = map(str, recipe.calibration_shape)
        options += ["--calib-samples", num_samples, "--calib-seqlen", sample_tokens]
    if recipe.target_bpw is not None:
        options += ["--target-bpw", str(recipe.target_bpw)]
    if recipe.lm_head is not None:
        options += ["--lm-head", str(recipe.lm_head)]
    if recipe.device != DeviceName.AUTO:
        options += ["--device", str(recipe.device)]
    if recipe.max_kl is not None:
        options += ["--max-kl", f"{recipe.max_kl:g}"]
    return options if recipe.num_windows else [*options, "--no-eval"]


def _loading(name: str, model_type: str) -> str:
    by_vllm = f"    vllm serve {shlex.quote(name)}"
    if model_type in SERVED_TYPES:
        return f"## Load it\n\n    {PROGRAM} serve {shlex.quote(name)}\n\nor with vLLM:\n\n{by_vllm}"
    return (
        f"## Load it\n\nWith vLLM, if it knows `{model_type}` with weights like these; `{PROGRAM} serve` does not "
        f"serve this family:\n\n{by_vllm}"
    )


def _published_source(report: Report) -> str:
    """The hub name of the original, or of a local one its file or directory name."""
    path = Path(report.source)
    return path.name if path.is_absolute() else report.source
