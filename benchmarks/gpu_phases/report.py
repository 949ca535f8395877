"""The record of a run as one Markdown page: a line a phase, the goals, then the tables."""

from collections.abc import Iterator, Sequence

from benchmarks.gpu_phases.figures import Cell, Figure
from benchmarks.gpu_phases.record import PhaseJson, Record

NAMES_SHOWN = 4


def render(record: Record) -> str:
    lines = [
        f"# GPU benchmark: {record.device}",
        "",
        f"`{record.command}`, started {record.started}, {record.seconds:.0f} s, {record.state}.",
    ]
    if record.is_rehearsal:
        lines += ["", "**A rehearsal: tiny sizes on a CPU. It shows that the script works; its times mean nothing.**"]
    lines += ["", *_phases(record), *_goals(record), *_failures(record)]
    for name, phase in record.phases.items():
        lines += [f"## {phase['title']}", ""]
        lines += [line for table in _tables(record.figures_of(name)) for line in (*table, "")]
        lines += [f"- {line}" for line in _skips(phase)] + ([""] if phase["skips"] else [])
        if phase["clocks"]:
            lines += ["At its end: " + ", ".join(f"{name} {value}" for name, value in phase["clocks"].items()), ""]
    return "\n".join(lines).rstrip() + "\n"


def _phases(record: Record) -> Iterator[str]:
    yield from ("| phase | state | seconds | figures | failed | skipped |", "|---|---|---:|---:|---:|---:|")
    for name, phase in record.phases.items():
        num_skipped = sum(len(skip["items"]) for skip in phase["skips"])
        yield (
            f"| {name} | {phase['state']} | {phase['seconds']:.1f} | {len(phase['figures'])} | "
            f"{len(phase['failures'])} | {num_skipped} |"
        )
    yield ""


def _goals(record: Record) -> Iterator[str]:
    """How many figures of each phase meet each goal, and the one that is farthest from it."""
    rows: dict[tuple[str, str], list[tuple[Figure, float, float]]] = {}
    for name in record.phases:
        for figure in record.figures_of(name):
            for goal in figure.goals:
                rows.setdefault((name, goal.name), []).append((figure, goal.reached, goal.wanted))
    if not rows:
        return
    yield from ("| goal | met | wanted | worst |", "|---|---|---:|---|")
    for (name, goal_name), reached in rows.items():
        num_met = sum(value >= wanted for _, value, wanted in reached)
        figure, value, wanted = min(reached, key=lambda row: row[1] - row[2])
        yield f"| {name}: {goal_name} | {num_met} of {len(reached)} | {wanted:.2f} | {value:.3f}: {_label(figure)} |"
    yield ""


def _label(figure: Figure) -> str:
    rows = figure.values.get("rows")
    return figure.name if rows is None else f"{figure.name}, {rows} rows"


def _failures(record: Record) -> Iterator[str]:
    """The last line of each traceback; the JSON has them whole."""
    if not record.num_failures:
        return
    yield from ("## Failed", "")
    for name, phase in record.phases.items():
        for failure in phase["failures"]:
            yield f"- {name}, {failure['item']}: `{failure['traceback'].strip().splitlines()[-1]}`"
    yield ""


def _skips(phase: PhaseJson) -> Iterator[str]:
    for skip in phase["skips"]:
        shown = ", ".join(skip["items"][:NAMES_SHOWN])
        others = len(skip["items"]) - NAMES_SHOWN
        yield f"skipped, {skip['why']}: {shown}{f' and {others} more' if others > 0 else ''}"


def _tables(figures: Sequence[Figure]) -> Iterator[list[str]]:
    """A table for each title that figures name, in the order in which the titles first come."""
    for title in dict.fromkeys(figure.table for figure in figures):
        rows = [figure for figure in figures if figure.table == title]
        columns = list(dict.fromkeys(column for figure in rows for column in figure.values))
        # a verdict has its own column
        has_goals = any(goal.name != "passed" for figure in rows for goal in figure.goals)
        header = [title, *columns, *(["goal"] if has_goals else [])]
        lines = [_line(header), "|---" + "|---:" * (len(header) - 1) + "|"]
        for figure in rows:
            cells = [figure.name, *(_cell(figure.values.get(column)) for column in columns)]
            lines.append(_line([*cells, *([_met(figure)] if has_goals else [])]))
        yield lines


def _met(figure: Figure) -> str:
    return ", ".join(
        f"{'met' if goal.is_met else 'MISSED'} ({goal.reached:.2f} of {goal.wanted:.2f})" for goal in figure.goals
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
