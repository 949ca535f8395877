"""What a phase finds out: figures, each a row of a table with the goals it is held against. They travel as JSON."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypedDict

Cell = str | int | float | bool | None


class GoalJson(TypedDict):
    name: str
    reached: float
    wanted: float


class FigureJson(TypedDict):
    table: str
    name: str
    values: dict[str, Cell]
    goals: list[GoalJson]


@dataclass(frozen=True)
class Goal:
    """A number that is to be at least `wanted`."""

    name: str
    reached: float
    wanted: float

    @property
    def is_met(self) -> bool:
        return self.reached >= self.wanted


@dataclass(frozen=True)
class Figure:
    """A row of the table of that title; its name is the first cell, values are the others by column."""

    table: str
    name: str
    values: Mapping[str, Cell]
    goals: tuple[Goal, ...] = ()

    def to_json(self) -> FigureJson:
        return {
            "table": self.table,
            "name": self.name,
            "values": {column: _finite(value) for column, value in self.values.items()},
            "goals": [
                {
                    "name": goal.name,
                    "reached": goal.reached if math.isfinite(goal.reached) else 0.0,
                    "wanted": goal.wanted,
                }
                for goal in self.goals
            ],
        }

    @classmethod
    def from_json(cls, figure: FigureJson) -> "Figure":
        goals = tuple(Goal(goal["name"], goal["reached"], goal["wanted"]) for goal in figure["goals"])
        return cls(figure["table"], figure["name"], figure["values"], goals)

    def number(self, column: str) -> float | None:
        """The number in a column; None where there is none."""
        value = self.values.get(column)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Findings:
    """The figures so far, by phase; later phases look up what earlier ones measured."""

    by_phase: dict[str, list[Figure]] = field(default_factory=dict)

    def add(self, phase: str, figure: Figure) -> None:
        self.by_phase.setdefault(phase, []).append(figure)

    def of(self, phase: str) -> Iterable[Figure]:
        return self.by_phase.get(phase, ())


def _finite(value: Cell) -> Cell:
    """JSON has no word for NaN and the infinities."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
