"""Compiles kernels/native for the running CPU, once, into a folder of the user's; later starts find it there.

Nothing needs it: where it cannot be made, `NativeUnavailable` says why, and the torch kernels do the work.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
MAIN_SOURCE = "program.cpp"
CPUINFO = Path("/proc/cpuinfo")
COMPILERS = ("g++", "clang++", "c++")
OPTIONS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
# ten seconds on an idle machine
_COMPILE_TIMEOUT_SECONDS = 600


class NativeUnavailable(Exception):
    """Why there are no native kernels here: the end of a sentence."""


@dataclass(frozen=True)
class InstructionSet:
    """cpu_flags: as Linux names them. options: what makes the compiler use it."""

    name: str
    cpu_flags: frozenset[str]
    options: tuple[str, ...]


_AVX2_OPTIONS = ("-mavx2", "-mfma", "-mf16c")
_AVX2 = InstructionSet(
    "avx2",
    frozenset({"avx2", "fma", "f16c"}),
    # GCC would add the products up in a tree that does not fit the 16 registers: a quarter slower
    (*_AVX2_OPTIONS, "-fno-tree-reassoc"),
)
_AVX512 = InstructionSet(
    "avx512",
    _AVX2.cpu_flags | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    (*_AVX2_OPTIONS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
)
_AMX = InstructionSet(
    "amx", _AVX512.cpu_flags | {"amx_tile", "amx_int8"}, (*_AVX512.options, "-mamx-tile", "-mamx-int8")
)
# the best first
INSTRUCTION_SETS = (_AMX, _AVX512, _AVX2)


def instruction_sets_of(cpu_flags: frozenset[str]) -> tuple[InstructionSet, ...]:
    """Those that a CPU with these flags has, the best first."""
    return tuple(candidate for candidate in INSTRUCTION_SETS if candidate.cpu_flags <= cpu_flags)


def running_instruction_set() -> InstructionSet:
    """The best that the running CPU has. Raises NativeUnavailable where it has none of them."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise NativeUnavailable(f"they are for x86-64 Linux, and this is {sys.platform} {platform.machine()}")
    for line in CPUINFO.read_text().splitlines():
        if line.startswith("flags"):
            found = instruction_sets_of(frozenset(line.partition(":")[2].split()))
            if found:
                return found[0]
    raise NativeUnavailable("they need a CPU with AVX2, FMA and F16C")


def find_compiler() -> str:
    """The C++ compiler on PATH. Raises NativeUnavailable."""
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise NativeUnavailable(f"there is no C++ compiler on PATH ({' or '.join(COMPILERS)})")


def default_cache() -> Path:
    """Where a user's programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "awq-serve" / "native"


@dataclass(frozen=True)
class NativeBuild:
    """What makes the library of an instruction set, and where it is kept: a file named after all that it depends on."""

    instruction_set: InstructionSet
    compiler: str
    cache: Path

    @property
    def library(self) -> Path:
        version = subprocess.run([self.compiler, "--version"], capture_output=True, text=True, check=False).stdout
        key = hashlib.sha256("\0".join((version, *self._command("")[1:])).encode())
        for source in sorted(SOURCES.iterdir()):
            key.update(source.name.encode() + b"\0" + source.read_bytes())
        return self.cache / f"{self.instruction_set.name}-{key.hexdigest()[:32]}.so"

    def make(self, announce: Callable[[str], None]) -> Path:
        """The library, compiled first if it is not there whole. Raises NativeUnavailable.

        Processes that start together compile it once: the others wait for the first.
        """
        library = self.library
        if _is_whole(library):
            return library
        try:
            self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(library.with_suffix(".lock")):
                if not _is_whole(library):
                    announce(f"compiling the CPU kernels for {self.instruction_set.name}, once; it takes some seconds")
                    self._compile(library)
        except OSError as error:
            raise NativeUnavailable(f"they cannot be kept in {self.cache}: {error.strerror}") from error
        return library

    def _compile(self, library: Path) -> None:
        with tempfile.TemporaryDirectory(dir=self.cache) as folder:
            made = Path(folder) / library.name
            try:
                compilation = subprocess.run(
                    self._command(str(made)),
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=_COMPILE_TIMEOUT_SECONDS,
                )
            except subprocess.TimeoutExpired:
                raise NativeUnavailable(f"{self.compiler} took over {_COMPILE_TIMEOUT_SECONDS} s") from None
            if compilation.returncode != 0:
                lines = [line for line in compilation.stderr.splitlines() if "error" in line] or ["no message"]
                raise NativeUnavailable(f"{self.compiler} cannot compile them: {lines[0].strip()}")
            digest = made.with_suffix(".sha256")
            digest.write_text(_digest(made))
            # a library without its digest is no whole one, so that one must be there first
            digest.replace(_digest_file(library))
            made.replace(library)

    def _command(self, output: str) -> list[str]:
        options = (*OPTIONS, *self.instruction_set.options)
        return [self.compiler, *options, str(SOURCES / MAIN_SOURCE), "-o", output]


def build_native(announce: Callable[[str], None]) -> Path:
    """The library for the running CPU. Raises NativeUnavailable."""
    return NativeBuild(running_instruction_set(), find_compiler(), default_cache()).make(announce)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_whole(library: Path) -> bool:
    """Whether it is there as it was made: loading half of a library would end the process."""
    digest = _digest_file(library)
    return library.is_file() and digest.is_file() and digest.read_text() == _digest(library)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the file's lock, which the kernel takes back from a process that dies."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
