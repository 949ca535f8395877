"""The CPU benchmark's pure parts: what the peer is built with, what is counted, and how figures become a report."""

import re
from contextlib import ExitStack
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import cpu, llama_cpp_build, measured_report
from benchmarks.comparison import Comparison, Spread, render_table
from benchmarks.llama_cpp_build import CompilationMeter, LlamaCppBuild, cmake_options
from benchmarks.machine import parse_cpuinfo
from benchmarks.turn import take_turn
from benchmarks.workload import WORKLOADS, Trial, Workload

AVX2_CPUINFO = """processor\t: 0
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
flags\t\t: fpu sse4_2 avx f16c avx2 fma bmi2

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
SAPPHIRE_RAPIDS_FLAGS = parse_cpuinfo(
    "flags : sse4_2 avx avx2 fma f16c bmi2 avx_vnni avx512f avx512cd avx512dq avx512bw avx512vl avx512vbmi avx512_vnni "
    "avx512_bf16 amx_tile amx_int8 amx_bf16"
).flags


class FakeSide:
    """Takes the same time for every trial, and remembers in a list that both sides share who ran what."""

    def __init__(self, name: str, seconds: float, calls: list[tuple[str, Trial]]) -> None:
        self.name, self.seconds, self.calls = name, seconds, calls

    def run(self, trial: Trial) -> float:
        self.calls.append((self.name, trial))
        return self.seconds


def options_that_are_on(options: tuple[str, ...]) -> set[str]:
    return {option.removeprefix("-D").removesuffix("=ON") for option in options if option.endswith("=ON")}


def test_cpuinfo_gives_the_first_processor() -> None:
    # given two processors; when the text is read
    found = parse_cpuinfo(AVX2_CPUINFO)
    # then the name and flags are those of the first, and the relevant flags come in their fixed order
    assert found.name == "AMD EPYC (family 25, model 1)"
    assert found.relevant_flags == ("avx", "avx2", "fma", "f16c")


def test_an_avx2_machine_builds_without_avx512() -> None:
    options = cmake_options(parse_cpuinfo(AVX2_CPUINFO).flags)
    assert options_that_are_on(options) == {"GGML_SSE42", "GGML_AVX", "GGML_AVX2", "GGML_BMI2", "GGML_FMA", "GGML_F16C"}
    # what is off is said: the defaults of another version may differ
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX512=OFF", "-DGGML_AVX512_BF16=OFF"} <= set(options)


def test_all_that_the_cpu_has_is_used_but_for_amx() -> None:
    options = cmake_options(SAPPHIRE_RAPIDS_FLAGS)
    assert set(llama_cpp_build.CPU_OPTIONS) == options_that_are_on(options)
    assert {"-DGGML_AMX_TILE=OFF", "-DGGML_AMX_INT8=OFF", "-DGGML_AMX_BF16=OFF"} <= set(options)


@pytest.mark.parametrize("missing", ["avx512f", "avx512bw", "avx512vl"])
def test_half_an_avx512_is_none(missing: str) -> None:
    # llama.cpp compiles with the whole family at once, and would die by SIGILL
    assert "-DGGML_AVX512=OFF" in cmake_options(SAPPHIRE_RAPIDS_FLAGS - {missing})


def test_a_build_is_used_again_only_with_the_same_options(tmp_path: Path) -> None:
    # given a build that was finished with some options
    build = LlamaCppBuild(tmp_path / "peer", ("-DGGML_AVX2=ON",))
    build.environment.python.parent.mkdir(parents=True)
    build.environment.python.touch()
    was_ready = build.environment.is_ready
    build.environment.mark_ready()
    # then it serves those and no others
    assert (was_ready, build.environment.is_ready) == (False, True)
    assert not LlamaCppBuild(build.directory, ("-DGGML_AVX2=OFF",)).environment.is_ready


def test_without_a_compiler_there_is_a_sentence_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # given a machine without a compiler, and no peer built yet
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cpu, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(measured_report, "CACHE", tmp_path / "cache")
    # when the benchmark is started; then it says so, prints no table and builds nothing
    assert cpu.main([]) == 1
    said = capsys.readouterr()
    assert "no C compiler" in said.err
    assert "apt-get install g++" in said.err
    assert not said.out
    assert not list((tmp_path / "cache").glob("llama-cpp*"))


def test_a_second_benchmark_waits_for_the_first(tmp_path: Path) -> None:
    # given a benchmark that is running, and that ends when somebody is said to wait for it
    first = ExitStack()
    first.enter_context(take_turn(tmp_path, lambda line: None))
    lines: list[str] = []

    def end_the_first(line: str) -> None:
        lines.append(line)
        first.close()

    # when a second one starts; then it says that it waits, and gets its turn
    with take_turn(tmp_path, end_the_first):
        assert lines == ["another benchmark is running here; waiting for its end"]


def test_compilation_is_told_at_each_tenth() -> None:
    # given a build of 40 files that takes a second a line
    lines: list[str] = []
    seconds = iter(range(1000))
    meter = CompilationMeter(lines.append, clock=lambda: next(seconds))
    # when its output is read
    for done in range(1, 41):
        meter.read(f"  [{done}/40] Building CXX object\n")
        meter.read("  a warning\n")
    # then there are ten lines, and the last leaves nothing
    assert len(lines) == 10
    assert lines[-1] == "compiled 40 of 40 files, about 0 s left"


def test_a_workload_counts_what_it_times() -> None:
    assert Workload(prompt_tokens=512).timed_tokens == 512
    assert Workload(prompt_tokens=128, decode_tokens=64).timed_tokens == 64
    assert Workload(prompt_tokens=128, decode_tokens=64, num_sequences=8).timed_tokens == 512
    assert len({workload.name for workload in WORKLOADS}) == len(WORKLOADS)


def test_no_cache_of_prompts_can_help() -> None:
    # given the prompts of two rounds of eight sequences
    workload = Workload(prompt_tokens=128, decode_tokens=64, num_sequences=8)
    prompts = [*workload.draw("round 0").prompts, *workload.draw("round 1").prompts]
    # then no two of them begin alike, and a seed gives the same ones again
    assert len({prompt[:2] for prompt in prompts}) == 16
    assert workload.draw("round 0").prompts == tuple(prompts[:8])


def test_the_middle_and_the_ends_of_some_figures() -> None:
    assert Spread.of([5.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=5.0)
    assert Spread.of([1.0, 2.0, 3.0, 10.0]).median == 2.5


def test_a_ratio_is_taken_round_by_round() -> None:
    # given a machine that is half as fast in the second round, for both
    comparison = Comparison(Workload(prompt_tokens=128), our_seconds=(2.0, 4.0), peer_seconds=(1.0, 2.0))
    # then the speeds vary and the ratio doesn't: we take twice the time, so we have half the speed
    assert comparison.our_speed == Spread(median=48.0, low=32.0, high=64.0)
    assert comparison.peer_speed == Spread(median=96.0, low=64.0, high=128.0)
    assert comparison.ratio == Spread(median=0.5, low=0.5, high=0.5)


def test_the_table_shows_both_sides_and_the_ratio_in_80_columns() -> None:
    # given a workload on which we take twice the time
    comparison = Comparison(Workload(prompt_tokens=128), our_seconds=(2.0, 4.0), peer_seconds=(1.0, 2.0))
    console = Console(file=StringIO(), width=80)
    # when it is printed
    console.print(render_table([comparison], title="a title"))
    # then the figures stand in one row
    assert isinstance(console.file, StringIO)
    row = next(line for line in console.file.getvalue().splitlines() if "prefill 128 tokens" in line)
    assert re.split(r"\s{2,}", row.strip())[1:] == ["48.0 (32.0..64.0)", "96.0 (64.0..128.0)", "0.50 (0.50..0.50)"]


def test_sides_run_in_turn_on_the_same_tokens() -> None:
    # given two sides that remember who ran when
    calls: list[tuple[str, Trial]] = []
    own, peer = FakeSide("own", 2.0, calls), FakeSide("peer", 1.0, calls)
    # when they are compared
    comparisons = cpu.compare(lambda workload: own, peer, 3, lambda line: None)
    # then each ran every workload once untimed and once a round, one after the other, on the same prompts
    assert [name for name, _ in calls] == ["own", "peer"] * len(WORKLOADS) * 4
    trials = [trial for _, trial in calls]
    assert trials[::2] == trials[1::2]
    assert len(set(trials)) == len(WORKLOADS) * 4
    assert [comparison.ratio.median for comparison in comparisons] == [0.5] * len(WORKLOADS)


def test_a_place_that_cannot_take_the_json_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cpu.main(["--json", str(tmp_path / "absent" / "figures.json")])
    assert exit_info.value.code == 2
    assert "is not a directory that can be written to" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "many"])
def test_rounds_are_counted_from_one(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cpu.main([f"--rounds={text}"])
    assert f"{text!r} is not a whole number above 0" in capsys.readouterr().err
