"""How the native kernels are compiled and kept: once, whole, by one process, and without harm where they cannot be.

The compiler is a stand-in that counts its runs; the real one is what the tests of the kernels take.
"""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import native_build
from kernels.native_build import (
    INSTRUCTION_SETS,
    NativeBuild,
    NativeUnavailable,
    build_native,
    find_compiler,
    instruction_sets_of,
)
from kernels.native_cpu import NativeCpu

ROOT = Path(__file__).resolve().parents[2]
AMX, AVX512, AVX2 = INSTRUCTION_SETS
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "stand-in {version}"; exit 0; fi
echo compiled >> {log}
{action}
"""
# the last argument is where the library goes
WRITE = 'for last; do :; done; echo "a library" > "$last"'


class Compiler:
    def __init__(self, folder: Path, *, version: int = 1, action: str = WRITE) -> None:
        self._log = folder / "log"
        self.path = folder / "compiler"
        self.path.write_text(COMPILER.format(version=version, log=self._log, action=action))
        self.path.chmod(stat.S_IRWXU)

    @property
    def num_runs(self) -> int:
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0

    def build(self, cache: Path, sentences: list[str] | None = None) -> Path:
        heard = [] if sentences is None else sentences
        return NativeBuild(AVX2, str(self.path), cache).make(heard.append)


def test_a_second_start_compiles_nothing_and_says_nothing(tmp_path: Path) -> None:
    compiler = Compiler(tmp_path)
    sentences: list[str] = []

    first, second = (compiler.build(tmp_path / "cache", sentences) for _ in range(2))

    assert first == second
    assert first.read_text() == "a library\n"
    assert compiler.num_runs == 1
    assert sentences == ["compiling the CPU kernels for avx2, once; it takes some seconds"]
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == stat.S_IRWXU


def test_another_compiler_or_instruction_set_is_another_library(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    library = Compiler(tmp_path, version=1).build(cache)

    updated = Compiler(tmp_path, version=2)

    assert updated.build(cache) != library
    assert NativeBuild(AVX512, str(updated.path), cache).make(lambda sentence: None) != updated.build(cache)


@pytest.mark.parametrize("harm", ["cut", "changed", "without its digest", "gone"])
def test_a_library_that_is_not_whole_is_compiled_again(harm: str, tmp_path: Path) -> None:
    compiler = Compiler(tmp_path)
    library = compiler.build(tmp_path / "cache")
    match harm:
        case "cut":
            library.write_text("a lib")
        case "changed":
            library.write_text("a libraru\n")
        case "without its digest":
            library.with_suffix(".sha256").unlink()
        case "gone":
            library.unlink()

    compiler.build(tmp_path / "cache")

    assert compiler.num_runs == 2
    assert library.read_text() == "a library\n"


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    # given a compiler that ends only when the second process has asked for the library too
    second_asks = tmp_path / "asks"
    compiler = Compiler(tmp_path, action=f"while [ ! -e {second_asks} ]; do :; done; {WRITE}")
    program = (
        "import sys; from pathlib import Path; from kernels.native_build import *\n"
        "build = NativeBuild(INSTRUCTION_SETS[-1], sys.argv[1], Path(sys.argv[2]))\n"
        "Path(sys.argv[3]).touch()\n"
        "print(build.make(lambda sentence: None).read_text(), end='')\n"
    )

    def start(announcement: Path) -> subprocess.Popen[str]:
        arguments = [str(compiler.path), str(tmp_path / "cache"), str(announcement)]
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    processes = [start(tmp_path / "first"), start(second_asks)]

    assert [process.communicate(timeout=120)[0] for process in processes] == ["a library\n"] * 2
    assert compiler.num_runs == 1


def test_what_does_not_compile_is_unavailable_with_the_compilers_first_error(tmp_path: Path) -> None:
    compiler = Compiler(tmp_path, action='echo "a note" >&2; echo "program.cpp:3: error: no such thing" >&2; exit 1')

    with pytest.raises(NativeUnavailable, match=r"compiler cannot compile them: program\.cpp:3: error: no such thing"):
        compiler.build(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_place_that_cannot_be_written_to_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(NativeUnavailable, match=r"cannot be kept in .*: Not a directory"):
        Compiler(tmp_path).build(tmp_path / "file" / "cache")


def test_a_library_that_does_not_load_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(NativeUnavailable, match="cannot be loaded"):
        NativeCpu(Compiler(tmp_path).build(tmp_path / "cache"), 1)


def test_a_machine_without_a_compiler_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler on PATH"):
        find_compiler()


@pytest.mark.parametrize(
    ("cpuinfo", "reason"),
    [("flags\t\t: fpu sse2 avx\n", "need a CPU with AVX2"), ("CPU architecture: 8\n", "need a CPU with AVX2")],
)
def test_a_cpu_without_avx2_has_none(
    cpuinfo: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(native_build, "CPUINFO", tmp_path / "cpuinfo")

    with pytest.raises(NativeUnavailable, match=reason):
        build_native(lambda sentence: None)


def test_instruction_sets_are_those_of_the_flags_the_best_first() -> None:
    assert instruction_sets_of(AMX.cpu_flags | {"sse2"}) == (AMX, AVX512, AVX2)
    assert instruction_sets_of(AMX.cpu_flags - {"amx_int8"}) == (AVX512, AVX2)
    # the first CPUs with AVX-512 had no dot products of bytes
    assert instruction_sets_of(AVX512.cpu_flags - {"avx512_vnni"}) == (AVX2,)
    assert instruction_sets_of(frozenset({"avx2", "fma"})) == ()
