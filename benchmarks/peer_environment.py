"""A peer's environment: a virtual environment of its own, made once at pinned versions, with its words in a log."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.errors import BenchmarkError

COMPILERS = {"C": ("cc", "gcc", "clang"), "C++": ("c++", "g++", "clang++")}

NEEDS_AN_INDEX = "the first run needs a package index (PIP_INDEX_URL names another one), later runs none"

Announce = Callable[[str], None]


@dataclass(frozen=True)
class PeerEnvironment:
    """Where it lies. fingerprint: all that decides what is in it. variables: for the commands that make it."""

    directory: Path
    fingerprint: str
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    @property
    def log(self) -> Path:
        return self.directory.with_name(self.directory.name + ".log")

    @property
    def is_ready(self) -> bool:
        return self.python.exists() and self._stamp.exists() and self._stamp.read_text() == self.fingerprint

    @property
    def _stamp(self) -> Path:
        return self.directory / "benchmark-peer.json"

    def start_anew(self) -> None:
        """An empty environment and an empty log, whatever was there."""
        if self.directory.exists():
            shutil.rmtree(self.directory)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        self.run_logged([sys.executable, "-m", "venv", str(self.directory)], "a virtual environment could not be made")

    def mark_ready(self) -> None:
        """Say that the environment is complete: from now on it is used as it is."""
        self._stamp.write_text(self.fingerprint)

    def pip(self, arguments: Sequence[str], failure: str, read: Announce | None = None) -> None:
        self.run_logged([str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments], failure, read)

    def run_logged(self, command: Sequence[str], failure: str, read: Announce | None = None) -> None:
        """Run it with its words in the log, and each line of them to `read`. Raises BenchmarkError when it fails."""
        environment = {**os.environ, **self.variables, "PYTHONUNBUFFERED": "1"}
        lines = _lines_of(command, environment, failure=f"{failure}; its words are in {self.log}")
        # closed here, so that an interrupt ends the command and not only this loop
        with self.log.open("a") as log, closing(lines):
            for line in lines:
                log.write(line)
                if read:
                    read(line)


def check_compilers(what: str, languages: Sequence[str] = tuple(COMPILERS)) -> None:
    """Raises BenchmarkError at once for what would otherwise fail after minutes: nothing here can compile `what`."""
    for language in languages:
        if not any(map(shutil.which, COMPILERS[language])):
            raise BenchmarkError(
                f"there is no {language} compiler to build {what} with; on Debian and Ubuntu, "
                "install one with: apt-get install g++"
            )


def end_group(process: subprocess.Popen[str]) -> None:
    """End a process that leads a session of its own, and all that it started: compilers, for one, would go on."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _lines_of(command: Sequence[str], environment: Mapping[str, str], *, failure: str) -> Generator[str, None, None]:
    """The output of a command, errors included. Raises BenchmarkError when it fails; leaves none of it running."""
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield from process.stdout
            returncode = process.wait()
        except BaseException:
            end_group(process)
            raise
    if returncode != 0:
        raise BenchmarkError(failure)
