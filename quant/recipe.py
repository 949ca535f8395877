"""The one frozen description of a quantization, valid from the moment it exists. It reads no model and no file.

It loads no torch: the process that answers HTTP checks what it is asked for with it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kernels.weight_kinds import SUPPORTED_BITS, WHOLE_ROW
from quant.calibration_mix import SELF_CALIBRATION, Share, row_counts, with_own_text
from quant.checkpoint.format_name import OutputFormat
from quant.device_name import DeviceName
from quant.errors import RecipeError
from quant.method import STEPS, Method, MethodSteps

GROUP_SIZES = (128, 64, 32)
# how people write WHOLE_ROW, and a group size that is chosen by the model
ROW = "row"
AUTO = "auto"
MAX_DIGITS = 9
AWQ_BITS = 4
HEAD_BITS = (8, 4)
# far beyond what any calibration gains from, and what memory holds
MAX_SAMPLES = 65_536
MAX_SAMPLE_TOKENS = 1_048_576
# what torch's generators take
MAX_SEED = 2**63 - 1
# what only a method that calibrates looks at, by its option on the command line
CALIBRATION_OPTIONS = {
    "calibration": "--calib",
    "num_samples": "--calib-samples",
    "sample_tokens": "--calib-seqlen",
}


@dataclass(frozen=True)
class Recipe:
    """What the user asked for. `group_size` None means the largest of GROUP_SIZES that fits the model, WHOLE_ROW one
    scale for each row of a weight.

    format: how the checkpoint is written; None means AWQ where it holds what is asked for, else compressed-tensors.
    calibration: "self" (the model writes its own text), a preset, a file's path, a hub data set, or a mix of them with
    shares (see calibration_mix); a single one without a share has some text by the model itself beside it where the
    method fits weights to it (MethodSteps.own_text_share). num_samples, sample_tokens: that many rows of it, of so many
    tokens each; None means what the method gains from, in rows no longer than the model's context.
    num_windows: the result is measured on so many windows of the text that ships with the program; 0 measures nothing.
    max_kl: a result whose mean KL to the original is higher, in nats, is refused; None refuses none.
    target_bpw: what the blocks' linears take on average, in bits a weight with scales and zero points, at most; each
    gets `bits` or more and groups of `group_size` or less then, by what it loses. None gives all of them the same.
    lm_head: the bits of the output head; None leaves it as it is.
    device: where blocks are run, searched and rounded.
    Raises RecipeError, naming the option, when a value is out of range.
    """

    method: Method = Method.AWQ_GPTQ
    bits: int = 4
    group_size: int | None = None
    calibration: str = SELF_CALIBRATION
    num_samples: int | None = None
    sample_tokens: int | None = None
    num_windows: int = 2
    seed: int = 0
    max_kl: float | None = None
    format: OutputFormat | None = None
    target_bpw: float | None = None
    lm_head: int | None = None
    device: DeviceName = DeviceName.AUTO

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise RecipeError(f"bits is {self.bits}; supported: {', '.join(map(str, SUPPORTED_BITS))}", field="bits")
        if self.group_size not in (None, WHOLE_ROW, *GROUP_SIZES):
            raise _group_size_error(self.group_size)
        if self.lm_head not in (None, *HEAD_BITS):
            supported = ", ".join(map(str, HEAD_BITS))
            raise RecipeError(f"lm head is {self.lm_head}; supported: {supported}, or left alone", field="lm_head")
        if self.device not in list(DeviceName):
            raise RecipeError(f"device is {self.device!r}; supported: {', '.join(DeviceName)}", field="device")
        self._check_target()
        self._check_format()
        for field, name, value, smallest, largest in (
            ("num_samples", "calibration samples", self.calibration_shape[0], 1, MAX_SAMPLES),
            ("sample_tokens", "calibration tokens", self.calibration_shape[1], 1, MAX_SAMPLE_TOKENS),
            ("num_windows", "number of windows", self.num_windows, 0, MAX_SAMPLES),
            ("seed", "seed", self.seed, 0, MAX_SEED),
        ):
            if not smallest <= value <= largest:
                raise RecipeError(f"{name} is {value}; it must be {smallest} to {largest}", field=field)
        self._check_calibration()
        self._check_max_kl()

    def _check_target(self) -> None:
        if self.target_bpw is None:
            return
        if not (math.isfinite(self.target_bpw) and self.target_bpw > 0):
            raise RecipeError(
                f"the target is {self.target_bpw} bits per weight; it must be a number like 4.25", field="target_bpw"
            )
        if not self.steps.calibrates:
            raise RecipeError(
                "a target of bits per weight is shared out by what is measured on calibration text, and the method "
                f"{self.method} reads none; use --method {Method.AWQ_GPTQ}, or leave out the target",
                field="target_bpw",
            )

    def _check_calibration(self) -> None:
        """Raises RecipeError for a mix that is none, and for text that the method would not look at."""
        try:
            row_counts(self.calibration_sources, self.calibration_shape[0])
        except RecipeError as error:
            raise RecipeError(str(error), field="calibration") from error
        if self.steps.calibrates:
            return
        for field, option in CALIBRATION_OPTIONS.items():
            if getattr(self, field) != getattr(Recipe, field):
                raise RecipeError(
                    f"the method {self.method} reads no calibration text; leave out {option}, or choose another method",
                    field=field,
                )

    def _check_format(self) -> None:
        if self.format is not OutputFormat.AWQ or self._fits_awq:
            return
        if self.target_bpw is not None:
            problem = "a target of bits per weight gives linears different bits and groups"
        elif self.bits != AWQ_BITS:
            problem = f"bits is {self.bits}"
        else:
            problem = f"lm head is {self.lm_head}"
        raise RecipeError(
            f"{problem}, and the AWQ gemm format holds {AWQ_BITS} bits only; "
            f"use --format {OutputFormat.COMPRESSED_TENSORS}",
            field="format",
        )

    @property
    def _fits_awq(self) -> bool:
        return self.bits == AWQ_BITS and self.target_bpw is None and self.lm_head in (None, AWQ_BITS)

    def _check_max_kl(self) -> None:
        if self.max_kl is None:
            return
        if not (math.isfinite(self.max_kl) and self.max_kl > 0):
            raise RecipeError(
                f"the highest KL is {self.max_kl}; it must be a number of nats above 0, like 0.2", field="max_kl"
            )
        if self.num_windows == 0:
            raise RecipeError(
                "the highest KL is set, but nothing is measured: allow the measurement, or leave it out", field="max_kl"
            )

    @property
    def steps(self) -> MethodSteps:
        """What the method does."""
        return STEPS[self.method]

    @property
    def calibration_sources(self) -> tuple[Share, ...]:
        """What the calibration text is made of."""
        return with_own_text(self.calibration, self.steps.own_text_share, self.calibration_shape[0])

    @property
    def calibration_shape(self) -> tuple[int, int]:
        """Rows of calibration text, and tokens a row."""
        return (
            self.steps.num_samples if self.num_samples is None else self.num_samples,
            self.steps.sample_tokens if self.sample_tokens is None else self.sample_tokens,
        )

    def with_method(self, method: Method) -> "Recipe":
        """The same by another method, without calibration text where that one reads none."""
        if STEPS[method].calibrates:
            return replace(self, method=method)
        default = Recipe.calibration
        return replace(self, method=method, calibration=default, num_samples=None, sample_tokens=None)

    def within_context(self, context_tokens: int | None) -> "Recipe":
        """For a model that reads so many tokens at once (None: any number): the default row is cut to them.

        Raises RecipeError when longer rows are asked for.
        """
        sample_tokens = self.calibration_shape[1]
        if context_tokens is None or sample_tokens <= context_tokens:
            return self
        if self.sample_tokens is None:
            return replace(self, sample_tokens=context_tokens)
        raise RecipeError(
            f"calibration tokens is {sample_tokens}, and this model reads at most {context_tokens} at once "
            f"(max_position_embeddings); use --calib-seqlen {context_tokens} or less",
            field="sample_tokens",
        )

    @property
    def output_format(self) -> OutputFormat:
        """The format asked for, or AWQ where it holds what is asked for."""
        if self.format is not None:
            return self.format
        return OutputFormat.AWQ if self._fits_awq else OutputFormat.COMPRESSED_TENSORS


def parse_group_size(text: str) -> int | None:
    """What people say for a group size, as a Recipe takes it. Raises RecipeError when it is no size."""
    if text == AUTO:
        return None
    if text == ROW:
        return WHOLE_ROW
    # no size has more digits, and a number of thousands of them is none for Python
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise _group_size_error(repr(text))
    return int(text)


def said_group_size(group_size: int | None) -> int | str:
    """A Recipe's group size as people say it: what parse_group_size takes, but for numbers."""
    if group_size is None:
        return AUTO
    return ROW if group_size == WHOLE_ROW else group_size


def parse_format(text: str) -> OutputFormat | None:
    """What people say for a format, as a Recipe takes it. Raises RecipeError when there is none of that name."""
    if text == AUTO:
        return None
    if text not in list(OutputFormat):
        raise RecipeError(f"format is {text!r}; supported: {AUTO}, {', '.join(OutputFormat)}", field="format")
    return OutputFormat(text)


def _group_size_error(given: object) -> RecipeError:
    supported = ", ".join(map(str, (AUTO, *GROUP_SIZES, ROW)))
    return RecipeError(f"group size is {given}; supported: {supported}", field="group_size")


def choose_group_size(requested: int | None, in_features: Mapping[str, int]) -> int:
    """The group size for a model whose linears have these in features: the requested one, or the largest that fits.

    WHOLE_ROW fits every model. Raises RecipeError naming the first layer that the size does not divide.
    """
    if requested == WHOLE_ROW:
        return WHOLE_ROW
    candidates = GROUP_SIZES if requested is None else (requested,)
    for group_size in candidates:
        if all(size % group_size == 0 for size in in_features.values()):
            return group_size
    smallest = candidates[-1]
    name, size = next((name, size) for name, size in in_features.items() if size % smallest)
    fitting = [group for group in GROUP_SIZES if all(size % group == 0 for size in in_features.values())]
    advice = f"use {' or '.join(map(str, fitting))}" if fitting else "no supported group size fits this model"
    raise RecipeError(f"group size {smallest} does not divide the {size} in features of {name}; {advice}")
