"""Our quantizer's process: python -m benchmarks.own_quantizer_worker JOB COST."""

import os
import sys
from pathlib import Path

# as the program itself does it, and before torch is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.quality_job import BITS, GROUP_SIZE, Cost, Job
from quant.errors import QuantError
from quant.method import Method
from quant.pipeline import quantize
from quant.recipe import Recipe


def main() -> int:
    job, cost_file = Job.read(Path(sys.argv[1])), Path(sys.argv[2])
    try:
        cost = Cost.of(lambda: run(job), packages=("transformers", "torch"))
    except QuantError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    cost.write(cost_file)
    return 0


def run(job: Job) -> None:
    """The method with its default number of tokens, without measuring the result."""
    asked = Recipe(bits=BITS, group_size=GROUP_SIZE, calibration=job.text, num_windows=0)
    quantize(asked.with_method(Method(job.method)), Path(job.model), job.checkpoint)


if __name__ == "__main__":
    sys.exit(main())
