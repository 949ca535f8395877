"""The methods a user can choose, and the steps each is made of. It computes nothing."""

from dataclasses import dataclass, replace
from enum import StrEnum


class Method(StrEnum):
    """How codes are found.

    rtn rounds the weights as they are; gptq rounds with error feedback; awq searches scales and ranges, and rounds to
    nearest; awq+gptq does both, and corrects the weights towards the original model; best is that with more text.
    """

    RTN = "rtn"
    GPTQ = "gptq"
    AWQ = "awq"
    AWQ_GPTQ = "awq+gptq"
    BEST = "best"


@dataclass(frozen=True)
class MethodSteps:
    """What is done with a linear, in this order.

    scales: input channels are scaled (scale_search). correction: weights move towards the original model's outputs
    (correction). ranges: the range of each group's codes is searched (clip_search). feedback: columns are rounded with
    the error of those before (error_feedback), else to nearest.
    num_samples, sample_tokens: the calibration text that pays, unless the user says otherwise. own_text_share: how much
    of it the model writes itself where the user names one source without a share: weights that are fitted to one kind
    of text would lose on others.
    """

    scales: bool
    correction: bool
    ranges: bool
    feedback: bool
    num_samples: int
    sample_tokens: int
    own_text_share: float = 0.0

    @property
    def calibrates(self) -> bool:
        """Whether any step looks at what the linears read."""
        return self.scales or self.correction or self.ranges or self.feedback


# what of it makes a model calibrated on prose good on code and dialogue as well (docs/benchmarks.md)
OWN_TEXT_SHARE = 0.25
_FITTED = MethodSteps(
    scales=True,
    correction=True,
    ranges=True,
    feedback=True,
    num_samples=32,
    sample_tokens=512,
    own_text_share=OWN_TEXT_SHARE,
)
STEPS = {
    Method.RTN: MethodSteps(
        scales=False, correction=False, ranges=False, feedback=False, num_samples=1, sample_tokens=1
    ),
    Method.GPTQ: MethodSteps(
        scales=False, correction=False, ranges=False, feedback=True, num_samples=32, sample_tokens=512
    ),
    Method.AWQ: MethodSteps(
        scales=True, correction=False, ranges=True, feedback=False, num_samples=16, sample_tokens=256
    ),
    Method.AWQ_GPTQ: _FITTED,
    Method.BEST: replace(_FITTED, num_samples=192),
}
