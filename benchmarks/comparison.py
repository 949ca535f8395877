"""From seconds to figures: speeds, ratios and their spread, as a table and as JSON."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.table import Table

from benchmarks.workload import Workload


@dataclass(frozen=True)
class Spread:
    """The middle of some figures and how far they lie apart."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def render(self, decimals: int) -> str:
        return f"{self.median:.{decimals}f} ({self.low:.{decimals}f}..{self.high:.{decimals}f})"


@dataclass(frozen=True)
class Comparison:
    """One workload's seconds, a round each: round i of ours and round i of the peer's ran one after the other."""

    workload: Workload
    our_seconds: tuple[float, ...]
    peer_seconds: tuple[float, ...]

    @property
    def our_speed(self) -> Spread:
        """Tokens per second."""
        return Spread.of([self.workload.timed_tokens / seconds for seconds in self.our_seconds])

    @property
    def peer_speed(self) -> Spread:
        """Tokens per second."""
        return Spread.of([self.workload.timed_tokens / seconds for seconds in self.peer_seconds])

    @property
    def ratio(self) -> Spread:
        """Our speed over the peer's, of each round: what slows the machine for a while slows both sides of a pair."""
        return Spread.of([peer / ours for ours, peer in zip(self.our_seconds, self.peer_seconds, strict=True)])

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.workload.name,
            **asdict(self.workload),
            "awq_serve": {"tokens_per_second": asdict(self.our_speed), "seconds": self.our_seconds},
            "llama_cpp": {"tokens_per_second": asdict(self.peer_speed), "seconds": self.peer_seconds},
            "ratio": asdict(self.ratio),
        }


def render_table(comparisons: Sequence[Comparison], *, title: str) -> Table:
    """Tokens per second of both sides and their ratio, as the median and (lowest..highest) of the rounds."""
    # no frame: it fits into a terminal of 80 columns
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("tokens per second", no_wrap=True)
    for name in ("awq-serve", "llama.cpp", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for comparison in comparisons:
        table.add_row(
            comparison.workload.name,
            _render_speed(comparison.our_speed),
            _render_speed(comparison.peer_speed),
            comparison.ratio.render(decimals=2),
        )
    return table


def _render_speed(speed: Spread) -> str:
    return speed.render(decimals=1 if speed.median < 100 else 0)
