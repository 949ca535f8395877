"""The quantizers that are compared: what each is asked for, its environment, and its process."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.peer_environment import NEEDS_AN_INDEX, Announce, PeerEnvironment, check_compilers, end_group
from benchmarks.quality_job import Cost, Job
from scripts.create_environment import TORCH_VERSION, torch_arguments

ROOT = Path(__file__).resolve().parent.parent
HEARTBEAT_SECONDS = 60


@dataclass(frozen=True)
class Peer:
    """Another quantizer. Its worker is run by an environment that holds the requirements and CPU torch.

    compiles: it needs a C++ compiler while it runs.
    """

    key: str
    name: str
    worker: str
    requirements: tuple[str, ...]
    compiles: bool

    def environment(self, cache: Path) -> PeerEnvironment:
        decides = {"requirements": self.requirements, "torch": TORCH_VERSION, "python": sys.version}
        return PeerEnvironment(cache / self.key, json.dumps(decides))


LLM_COMPRESSOR = Peer(
    key="llm-compressor",
    name="llm-compressor AWQ",
    worker="benchmarks.llm_compressor_worker",
    requirements=("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0"),
    compiles=False,
)
AUTO_ROUND = Peer(
    key="auto-round",
    name="AutoRound",
    worker="benchmarks.auto_round_worker",
    requirements=("auto-round==0.16.1", "transformers==5.24.0"),
    compiles=True,
)
PEERS = {peer.key: peer for peer in (LLM_COMPRESSOR, AUTO_ROUND)}


@dataclass(frozen=True)
class Tool:
    """One row of the table: a quantizer with its settings. peer is None for ours, which this environment runs."""

    name: str
    method: str
    peer: Peer | None = None
    num_samples: int | None = None
    sample_tokens: int | None = None
    steps: int | None = None

    def job(self, model: Path, output: Path, text: Path) -> Job:
        return Job(
            model=str(model),
            output=str(output),
            text=str(text.absolute()),
            method=self.method,
            num_samples=self.num_samples,
            sample_tokens=self.sample_tokens,
            steps=self.steps,
        )


def make_environment(peer: Peer, cache: Path, announce: Announce) -> None:
    """Install the peer where it is not there yet. Raises BenchmarkError when it cannot be had or run here."""
    if peer.compiles:
        check_compilers(f"{peer.name}'s kernels", ("C++",))
    environment = peer.environment(cache)
    if environment.is_ready:
        return
    announce(f"making the environment of {peer.name} in {environment.directory} (about 1.5 GB)")
    environment.start_anew()
    failure = f"{' '.join(peer.requirements)} could not be installed: {NEEDS_AN_INDEX}"
    # torch first, from the index of its CPU builds: the peer's own requirement would bring CUDA's gigabytes
    environment.pip(["install", *torch_arguments("cpu")], failure)
    environment.pip(["install", f"torch=={TORCH_VERSION}", *peer.requirements], failure)
    environment.mark_ready()


def run_tool(tool: Tool, job: Job, cache: Path, num_threads: int, announce: Announce) -> Cost:
    """Quantize in a process of its own, cold, with a line a minute. Raises BenchmarkError naming the log."""
    output = Path(job.output)
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    job_file, cost_file, log = (output.with_name(f"{output.name}.{kind}") for kind in ("job", "cost", "log"))
    job.write(job_file)
    cost_file.unlink(missing_ok=True)
    python = tool.peer.environment(cache).python if tool.peer else Path(sys.executable)
    worker = tool.peer.worker if tool.peer else "benchmarks.own_quantizer_worker"
    command = [str(python), "-m", worker, str(job_file), str(cost_file)]
    returncode = _run_logged(command, log, _variables(num_threads, output), _Heartbeat(tool.name, announce))
    if returncode != 0 or not cost_file.exists():
        raise BenchmarkError(f"{tool.name} ended with exit code {returncode}, negative for a signal; see {log}")
    return Cost.read(cost_file)


class _Heartbeat:
    """Says each minute that a tool is still at work: some take half an hour and say nothing that is ours to show."""

    def __init__(self, name: str, announce: Announce) -> None:
        self._name = name
        self._announce = announce
        self._start_s = time.monotonic()

    def beat(self) -> None:
        self._announce(f"{self._name}: at work for {(time.monotonic() - self._start_s) / 60:.0f} min")


def _variables(num_threads: int, output: Path) -> dict[str, str]:
    """The same threads for every tool, no GPU, no hub, and no compiled code of an earlier run."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(output / "compiled"),
        "PYTHONUNBUFFERED": "1",
    }


def _run_logged(command: Sequence[str], log: Path, variables: dict[str, str], heartbeat: _Heartbeat) -> int:
    with (
        log.open("w") as words,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            while True:
                try:
                    return process.wait(HEARTBEAT_SECONDS)
                except subprocess.TimeoutExpired:
                    heartbeat.beat()
        finally:
            end_group(process)
