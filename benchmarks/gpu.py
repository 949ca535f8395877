"""Every kernel on a GPU, checked and timed in under ten minutes: python benchmarks/gpu.py, from a bare checkout.

Needs Python 3.11, torch with CUDA, triton, transformers and safetensors; no network and no installation. Each figure is
written down as it is measured. Without a GPU it rehearses: tiny sizes in the Triton interpreter, to show that it works.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    # run as a script: Python looks for modules beside it, and some there are called like others' packages
    sys.path[0] = str(ROOT)

from benchmarks.command_line import EXIT_INTERRUPTED, announce, writable_file  # noqa: E402
from benchmarks.gpu_phases.phases import PHASES  # noqa: E402
from benchmarks.gpu_phases.plot import can_draw, draw  # noqa: E402
from benchmarks.gpu_phases.record import Record  # noqa: E402
from benchmarks.gpu_phases.report import render  # noqa: E402
from benchmarks.gpu_phases.supervisor import Watch, run_all  # noqa: E402
from benchmarks.gpu_phases.tile_choice import choose, write_choice  # noqa: E402
from benchmarks.json_file import write_json  # noqa: E402

DEFAULT_MINUTES = 9.0
DEFAULT_OUT = ROOT / "bench-results"
WORKER = (sys.executable, "-m", "benchmarks.gpu_phases.worker")
EXAMPLES = """examples:
  python benchmarks/gpu.py                                   everything, in nine minutes
  python benchmarks/gpu.py --phases linear,attention --minutes 4
  python benchmarks/gpu.py --rehearsal                       on a CPU, with tiny sizes
"""


@dataclass(frozen=True)
class Options:
    minutes: float
    phases: list[str]
    json_path: Path
    tiles_path: Path
    out: Path
    is_rehearsal: bool


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    shown = " ".join(["python benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    record = Record.of(shown, datetime.now(UTC).isoformat(timespec="seconds"), options.phases)
    save = _saving(record, options)
    save()
    watch = Watch(WORKER, time.monotonic() + 60 * options.minutes, options.is_rehearsal, announce, save)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run_all(record, watch)
    except KeyboardInterrupt:
        record.state = "interrupted"
        save()
    _write_pages(record, options)
    return _exit_code(record)


def parse_options(arguments: Sequence[str] | None) -> Options:
    names = [phase.name for phase in PHASES]
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=DEFAULT_MINUTES, help="for all phases; default: %(default)g"
    )
    parser.add_argument(
        "--phases", type=_phase_names, default=names, metavar="NAME,NAME", help=f"which of {', '.join(names)}"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="default: bench-results")
    parser.add_argument("--json", type=writable_file, metavar="PATH", help="default: gpu.json in --out")
    parser.add_argument(
        "--tiles", type=writable_file, metavar="PATH", help="where better tiles go; default: tuned_tiles.json in --out"
    )
    parser.add_argument(
        "--rehearsal", action="store_true", help="tiny sizes on the CPU; without a GPU it is always one"
    )
    parsed = parser.parse_args(arguments)
    return Options(
        minutes=parsed.minutes,
        phases=parsed.phases,
        json_path=parsed.json or parsed.out / "gpu.json",
        tiles_path=parsed.tiles or parsed.out / "tuned_tiles.json",
        out=parsed.out,
        is_rehearsal=parsed.rehearsal,
    )


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    # not the other way round, which would let a NaN pass
    if not 0 < minutes <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return minutes


def _phase_names(text: str) -> list[str]:
    asked = text.split(",")
    known = [phase.name for phase in PHASES]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no phase {unknown[0]!r}; there are {', '.join(known)}")
    # in the order in which later ones find what earlier ones measured
    return [name for name in known if name in asked]


def _saving(record: Record, options: Options) -> Callable[[], None]:
    return lambda: write_json(options.json_path, record.to_json())


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _write_pages(record: Record, options: Options) -> None:
    page = options.out / "gpu.md"
    text = render(record)
    page.write_text(text)
    sys.stdout.write(text)
    announce(f"\nfigures: {options.json_path}\ntables: {page}")
    chosen = choose(record.figures_of("tune"))
    if chosen and not record.is_rehearsal:
        write_choice(chosen, options.tiles_path)
        announce(f"tiles: {options.tiles_path}")
    picture = options.out / "gpu.png"
    if not can_draw():
        announce("no picture: matplotlib is not installed")
    elif draw(record, picture):
        announce(f"picture: {picture}")


def _exit_code(record: Record) -> int:
    if record.state == "interrupted":
        return EXIT_INTERRUPTED
    return 1 if record.num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
