"""All that a run found, as it grows: what the files are written from. Changed by messages alone."""

from dataclasses import dataclass, field
from typing import Literal, TypedDict

from benchmarks.gpu_phases.figures import Figure, FigureJson
from benchmarks.gpu_phases.phases import PHASE_OF
from benchmarks.gpu_phases.protocol import Message


class FailureJson(TypedDict):
    item: str
    traceback: str


class SkipJson(TypedDict):
    items: list[str]
    why: str


class PhaseJson(TypedDict):
    """state: ended says only that it is over; failures and skips say how."""

    title: str
    state: Literal["pending", "running", "ended"]
    seconds: float
    figures: list[FigureJson]
    failures: list[FailureJson]
    skips: list[SkipJson]
    clocks: dict[str, str]


@dataclass
class Record:
    """One run. phases: by name, in order. state: interrupted where somebody, or the time, ended it."""

    command: str
    started: str
    phases: dict[str, PhaseJson]
    device: str = "unknown"
    is_rehearsal: bool = False
    state: Literal["running", "complete", "interrupted", "out of time"] = "running"
    seconds: float = 0.0
    num_processes: int = 0
    last_item: tuple[str, int, str] | None = field(default=None)
    """phase, index and name of the item under way; None between items."""

    @classmethod
    def of(cls, command: str, started: str, names: list[str]) -> "Record":
        return cls(command, started, {name: _empty_phase(PHASE_OF[name].title) for name in names})

    def take(self, message: Message) -> None:
        """Note what a message says."""
        kind = message["kind"]
        if kind == "ready":
            self.device, self.is_rehearsal = message["device"], message["rehearsal"]
            return
        if kind == "broken":
            return
        phase = self.phases[message["phase"]]
        if kind == "start":
            phase["state"] = "running"
        elif kind == "item":
            self.last_item = (message["phase"], message["index"], message["item"])
        elif kind == "figure":
            phase["figures"].append(message["figure"])
        elif kind == "failed":
            phase["failures"].append({"item": message["item"], "traceback": message["traceback"]})
        elif kind == "skipped":
            phase["skips"].append({"items": message["items"], "why": message["why"]})
        elif kind == "end":
            phase["state"], phase["clocks"] = "ended", message["clocks"]
            self.last_item = None

    def unfinished(self) -> list[str]:
        return [name for name, phase in self.phases.items() if phase["state"] != "ended"]

    def figures(self) -> dict[str, list[FigureJson]]:
        return {name: phase["figures"] for name, phase in self.phases.items()}

    def figures_of(self, name: str) -> list[Figure]:
        phase = self.phases.get(name)
        return [] if phase is None else [Figure.from_json(figure) for figure in phase["figures"]]

    @property
    def num_failures(self) -> int:
        return sum(len(phase["failures"]) for phase in self.phases.values())

    def to_json(self) -> dict[str, object]:
        return {
            "command": self.command,
            "started": self.started,
            "state": self.state,
            "seconds": self.seconds,
            "device": self.device,
            "rehearsal": self.is_rehearsal,
            "processes": self.num_processes,
            "phases": self.phases,
        }


def _empty_phase(title: str) -> PhaseJson:
    return {
        "title": title, "state": "pending", "seconds": 0.0, "figures": [], "failures": [], "skips": [], "clocks": {},
    }  # fmt: skip
