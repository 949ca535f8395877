"""A benchmark's report on the terminal, and in a file where one is asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console

from benchmarks.command_line import CACHE, announce
from benchmarks.json_file import write_json
from benchmarks.turn import take_turn


class MeasuredReport(Protocol):
    """Tables for a reader, and every figure for a program."""

    def print_to(self, console: Console) -> None: ...

    def to_json(self) -> Mapping[str, object]: ...


def measure_and_print(measure: Callable[[], MeasuredReport], json_path: Path | None) -> None:
    """Measure when no other benchmark does."""
    with take_turn(CACHE, announce):
        report = measure()
    report.print_to(Console())
    if json_path:
        write_json(json_path, report.to_json())
