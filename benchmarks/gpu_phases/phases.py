"""Data: the phases in the order in which they run, the most valuable first, and their shares of the time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """name: also of the module with its `plan`, which only the process that runs it imports. share: of the time."""

    name: str
    title: str
    share: float

    @property
    def module(self) -> str:
        return f"benchmarks.gpu_phases.{self.name}"


PHASES = (
    Phase("compilation", "Compiling all kernels at once", 12),
    Phase("machine", "The machine", 4),
    Phase("correctness", "Correctness of every kernel", 16),
    Phase("linear", "INT4 linear layers", 30),
    Phase("attention", "Attention over the paged cache", 13),
    Phase("end_to_end", "A whole model of random weights", 20),
    Phase("quantize", "Quantizing", 8),
    Phase("tune", "Tiles for the shapes that miss their goal", 9),
)
PHASE_OF = {phase.name: phase for phase in PHASES}


def seconds_for(phase: Phase, later: tuple[Phase, ...], seconds_left: float) -> float:
    """What the phase may take of the time that is left; what it leaves is shared by those after it."""
    return seconds_left * phase.share / (phase.share + sum(other.share for other in later))
