"""The peer's environment: llama-cpp-python at a pinned version, compiled here for this CPU, once.

A ready-made wheel would be built for the oldest CPU it may meet, and the comparison would flatter us.
"""

import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.peer_environment import NEEDS_AN_INDEX, Announce, PeerEnvironment, check_compilers

VERSION = "0.3.36"
REQUIREMENT = f"llama-cpp-python=={VERSION}"

# CMake option -> the CPU flags it needs, as llama.cpp's ggml-cpu/CMakeLists.txt turns it into compiler options
CPU_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "GGML_SSE42": ("sse4_2",),
    "GGML_AVX": ("avx",),
    "GGML_AVX2": ("avx2",),
    "GGML_BMI2": ("bmi2",),
    "GGML_FMA": ("fma",),
    "GGML_F16C": ("f16c",),
    "GGML_AVX_VNNI": ("avx_vnni",),
    "GGML_AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "GGML_AVX512_VBMI": ("avx512f", "avx512vbmi"),
    "GGML_AVX512_VNNI": ("avx512f", "avx512_vnni"),
    "GGML_AVX512_BF16": ("avx512f", "avx512_bf16"),
}
# its native build takes AMX where there is some, and may crash there; the last four are not what is measured
FIXED_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=OFF",
    "-DGGML_AMX_TILE=OFF",
    "-DGGML_AMX_INT8=OFF",
    "-DGGML_AMX_BF16=OFF",
    "-DLLAVA_BUILD=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
)
BUILD_STEP = re.compile(r"\[(\d+)/(\d+)\]")


def cmake_options(cpu_flags: frozenset[str]) -> tuple[str, ...]:
    """What makes llama.cpp use all that a CPU with these flags has, but for AMX."""
    chosen = (f"-D{option}={'ON' if cpu_flags.issuperset(needed) else 'OFF'}" for option, needed in CPU_OPTIONS.items())
    return (*FIXED_OPTIONS, *chosen)


@dataclass(frozen=True)
class LlamaCppBuild:
    """Where the environment lies, and what it must be built with."""

    directory: Path
    options: tuple[str, ...]

    @property
    def environment(self) -> PeerEnvironment:
        fingerprint = json.dumps({"requirement": REQUIREMENT, "cmake": self.options, "python": sys.version})
        return PeerEnvironment(self.directory, fingerprint, {"CMAKE_ARGS": " ".join(self.options)})

    def make(self, announce: Announce) -> None:
        """Build it, from nothing, a line for each tenth. Raises BenchmarkError when that is impossible here."""
        _check_machine()
        environment = self.environment
        sources = self.directory / "sources"
        announce(f"making the environment of llama.cpp in {self.directory}")
        environment.start_anew()
        announce(f"fetching the sources of {REQUIREMENT} (about 75 MB)")
        environment.pip(
            ["download", "--retries", "2", "--no-deps", "--no-binary", ":all:", "--dest", str(sources), REQUIREMENT],
            f"{REQUIREMENT} could not be fetched: {NEEDS_AN_INDEX}",
        )
        announce("compiling llama.cpp, which takes some minutes the first time")
        # pip would keep the wheel, and give it back when the options are others
        install = ["install", "--no-cache-dir", "--verbose", *map(str, sources.glob("*.tar.gz"))]
        environment.pip(install, "llama.cpp could not be compiled", CompilationMeter(announce).read)
        check_import = [str(environment.python), "-c", "import llama_cpp"]
        environment.run_logged(check_import, "the llama.cpp that was built does not load")
        shutil.rmtree(sources)
        environment.mark_ready()


class CompilationMeter:
    """Reads how many files are compiled from the words of CMake's build tool, and says so at each tenth."""

    def __init__(self, announce: Announce, clock: Callable[[], float] = time.monotonic) -> None:
        self._announce = announce
        self._clock = clock
        self._start_s: float | None = None
        self._tenths = 0

    def read(self, line: str) -> None:
        step = BUILD_STEP.search(line)
        if not step:
            return
        done, total = int(step[1]), int(step[2])
        if self._start_s is None:
            self._start_s = self._clock()
        tenths = done * 10 // total
        if tenths > self._tenths:
            self._tenths = tenths
            seconds_left = (self._clock() - self._start_s) / done * (total - done)
            self._announce(f"compiled {done} of {total} files, about {seconds_left:.0f} s left")


def _check_machine() -> None:
    """Refuse at once what would otherwise fail after minutes."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise BenchmarkError(
            f"llama.cpp is built for x86-64 Linux here, and this is {sys.platform} {os.uname().machine}"
        )
    check_compilers("llama.cpp")
