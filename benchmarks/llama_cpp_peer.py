"""Our end of the peer's process: starts it, hands it trials, one at a time, and ends it."""

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from benchmarks.errors import BenchmarkError
from benchmarks.workload import Trial

ROOT = Path(__file__).resolve().parent.parent
END_SECONDS = 10
# of OpenMP and its implementations
THREAD_VARIABLES = ("OMP_", "GOMP_", "KMP_")


class LlamaCppPeer:
    """A Side, and a context manager: the process lives as long as the context."""

    def __init__(self, python: Path, model: Path, num_threads: int) -> None:
        """Raises BenchmarkError when the process does not come up."""
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.llama_cpp_worker", str(model), str(num_threads)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # how threads wait is the peer's to choose: with OMP_WAIT_POLICY=passive it decodes at a third of its speed
            env={name: value for name, value in os.environ.items() if not name.startswith(THREAD_VARIABLES)},
        )
        try:
            self.system = str(self._read()["system"])
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> "LlamaCppPeer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def run(self, trial: Trial) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(
                json.dumps({"prompts": trial.prompts, "decode_tokens": trial.decode_tokens}) + "\n"
            )
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        return float(str(self._read()["seconds"]))

    def _read(self) -> dict[str, object]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        answer: dict[str, object] = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(f"llama.cpp failed: {answer['error']}")
        return answer

    def _death(self) -> BenchmarkError:
        return BenchmarkError(f"llama.cpp's process ended with exit code {self._process.wait()}, negative for a signal")

    def _end(self) -> None:
        """The end of its input ends it; if not, a signal does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
