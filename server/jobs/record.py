"""What a quantization job is, and which way its state may go. Knows no database, no process and no HTTP."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class JobState(Enum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]


# running goes back to queued when the server stops or dies under the job: the work starts over at the next start
TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.QUEUED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


@dataclass(frozen=True)
class JobRecipe:
    """What to quantize, how, and where the result goes, in the words of the quantizer's command line.

    source: a model directory, a GGUF file or a hub name. output: an absolute path that does not exist yet.
    The others are the options of `awq-serve quantize`, checked already; None leaves one out.
    """

    source: str
    output: Path
    bits: int
    group_size: int | str
    method: str
    calib: str
    calib_samples: int | None = None
    calib_seqlen: int | None = None
    seed: int = 0
    device: str = "auto"
    format: str = "auto"
    target_bpw: float | None = None
    lm_head: int | None = None
    max_kl: float | None = None
    no_eval: bool = False


@dataclass(frozen=True)
class JobProgress:
    """How far a running job is: `done` of `total` units of `phase`; seconds_left None while there is no estimate."""

    phase: str
    done: int
    total: int
    seconds_left: float | None


@dataclass(frozen=True)
class JobRecord:
    """One job as the store holds it.

    entered_at: when the job last came into each state it has been in, in seconds since the epoch.
    num_starts: how often a quantizer was started for it without the server stopping it in good order.
    report_json: the quantizer's report as JSON text, of a job that succeeded.
    """

    id: str
    state: JobState
    recipe: JobRecipe
    created_at: int
    entered_at: Mapping[JobState, int]
    cancel_requested_at: int | None
    num_starts: int
    progress: JobProgress | None
    error: str | None
    report_json: str | None
