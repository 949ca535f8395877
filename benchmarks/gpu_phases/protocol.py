"""What the process that runs the phases and the one that watches over it say to each other: a JSON object a line."""

from typing import Literal, NotRequired, TypedDict

from benchmarks.gpu_phases.figures import FigureJson

# what fails where no item has begun
PREPARATION = "(its preparation)"


class Request(TypedDict):
    """phases: what is left to run, in order. first_item: of the first of them. deadline: on the monotonic clock.

    rehearsal: tiny sizes, interpreted, also where there is a GPU. figures: what earlier processes found, by phase.
    """

    phases: list[str]
    first_item: int
    deadline: float
    rehearsal: bool
    figures: dict[str, list[FigureJson]]


class Message(TypedDict):
    """kind: what happened. ready: device says on what. start: the phase begins. item: index of count begins.

    figure: was measured. failed: the item named item, with its traceback. skipped: the items listed in items, and why.
    end: of the phase; clocks is what nvidia-smi says then. broken is the process's last word: the device is of
    no use to it any more.
    """

    kind: Literal["ready", "start", "item", "figure", "failed", "skipped", "end", "broken"]
    phase: NotRequired[str]
    device: NotRequired[str]
    rehearsal: NotRequired[bool]
    item: NotRequired[str]
    index: NotRequired[int]
    count: NotRequired[int]
    figure: NotRequired[FigureJson]
    traceback: NotRequired[str]
    items: NotRequired[list[str]]
    why: NotRequired[str]
    clocks: NotRequired[dict[str, str]]
