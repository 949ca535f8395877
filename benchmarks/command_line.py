"""What the benchmarks' command lines share: their progress, their argument types, how they end."""

import argparse
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.errors import BenchmarkError

EXIT_INTERRUPTED = 130
# environments, models and results that later runs use again; `make clean` removes it
CACHE = Path(__file__).resolve().parent.parent / ".venv-bench"


def announce(line: str) -> None:
    """Progress goes to standard error, a line at a time: a bar that moves would take time from what is measured."""
    print(line, file=sys.stderr, flush=True)


def run_to_exit_code(work: Callable[[], None]) -> int:
    """0 once the work is done; 1 where it could not be, which is said in a sentence; 130 after Ctrl-C."""
    try:
        work()
    except (BenchmarkError, OSError) as error:
        announce(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        announce("interrupted")
        return EXIT_INTERRUPTED
    return 0


def positive_number(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def writable_file(text: str) -> Path:
    """A place for figures, refused before minutes of measuring and not after them."""
    path = Path(text)
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{text}: {path.parent} is not a directory that can be written to")
    return path


def own_version() -> str:
    # a bare machine runs the benchmark from the sources, without installing them
    try:
        return version("awq-serve")
    except PackageNotFoundError:
        return "not installed"
