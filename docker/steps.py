"""Reads the Dockerfile into its instructions, and runs what a machine without a Docker daemon can run of them.

The build stage's COPY and RUN lines run as they stand, in a scratch directory; of the run stage, the entry point.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "Dockerfile"


@dataclass(frozen=True)
class Instruction:
    """One instruction: of which stage, its keyword, its --flags, and the rest of it on one line."""

    stage: str
    keyword: str
    flags: tuple[str, ...]
    value: str

    def pairs(self) -> dict[str, str]:
        """The NAME=value pairs of an ENV, ARG or LABEL."""
        return dict(word.partition("=")[::2] for word in shlex.split(self.value))


def read_instructions(dockerfile: Path = DOCKERFILE) -> list[Instruction]:
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    instructions: list[Instruction] = []
    stage = ""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        keyword, _, value = line.partition(" ")
        flags, value = _split_flags(value)
        if keyword == "FROM":
            stage = value.partition(" AS ")[2]
        instructions.append(Instruction(stage, keyword, flags, value))
    return instructions


def _split_flags(value: str) -> tuple[tuple[str, ...], str]:
    flags = []
    value = value.strip()
    while value.startswith("--"):
        flag, _, value = value.partition(" ")
        flags.append(flag)
        value = value.strip()
    return tuple(flags), value


def run_build_stage(instructions: Sequence[Instruction], scratch: Path, arguments: Mapping[str, str]) -> Path:
    """Run the stage `build` below `scratch`, with VENV there too; the virtual environment that it makes."""
    source, environment = scratch / "src", {**os.environ}
    source.mkdir()
    for step in (instruction for instruction in instructions if instruction.stage == "build"):
        if step.keyword in ("ARG", "ENV"):
            environment |= step.pairs()
            environment |= {name: value for name, value in arguments.items() if name in step.pairs()}
            environment["VENV"] = str(scratch / "venv")
        elif step.keyword == "COPY":
            *names, target = shlex.split(step.value)
            for name in names:
                copy(ROOT / name, source / target)
        elif step.keyword == "RUN":
            say(f"RUN {step.value}")
            subprocess.run(["/bin/sh", "-c", step.value], cwd=source, env=environment, check=True)
    return scratch / "venv"


def copy(source: Path, target: Path) -> None:
    """As COPY does: a directory's content into the target, a file into the directory that the target is."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def try_entry_point(instructions: Sequence[Instruction], venv: Path, scratch: Path) -> None:
    """The installed command and the quantizer answer, from a directory where no source of ours lies."""
    (entry_point,) = (step.value for step in instructions if step.keyword == "ENTRYPOINT")
    (command,) = (step.value for step in instructions if step.keyword == "CMD")
    words = shlex.split(entry_point.strip("[]").replace(",", " "))
    words += shlex.split(command.strip("[]").replace(",", " "))
    tries = [
        [str(venv / "bin" / words[0]), *words[1:], "--help"],
        [str(venv / "bin" / "python"), "-m", "quant", "quantize", "--help"],
        [str(venv / "bin" / "python"), "-c", "from server.demo import find_demo_gguf; find_demo_gguf()"],
    ]
    for words in tries:
        say(shlex.join(words))
        subprocess.run(words, cwd=scratch, stdout=subprocess.DEVNULL, check=True)


def say(text: str) -> None:
    sys.stdout.write(f"==> {text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", choices=("cuda", "cpu"), default="cpu", help="the build argument TORCH")
    arguments = parser.parse_args()
    instructions = read_instructions()
    with tempfile.TemporaryDirectory(prefix="awq-serve-docker-") as directory:
        scratch = Path(directory)
        try:
            venv = run_build_stage(instructions, scratch, {"TORCH": arguments.torch})
            try_entry_point(instructions, venv, scratch)
        except subprocess.CalledProcessError as error:
            say(f"failed with exit code {error.returncode}: {shlex.join(map(str, error.cmd))}")
            return 1
    say("the build stage and the entry point work; the run stage's apt-get and user need a Docker daemon")
    return 0


if __name__ == "__main__":
    sys.exit(main())
