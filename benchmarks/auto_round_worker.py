"""AutoRound's process: python -m benchmarks.auto_round_worker JOB COST, by its own environment's Python."""

import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality_job import BITS, GROUP_SIZE, Cost, Job

# what it saves of a model it puts in a folder of its own making
UNNAMED = "saved"


def main() -> int:
    job, cost_file = Job.read(Path(sys.argv[1])), Path(sys.argv[2])
    cost = Cost.of(lambda: quantize(job), packages=("auto-round", "transformers", "torch"))
    cost.write(cost_file)
    return 0


def quantize(job: Job) -> None:
    """Its own learned rounding with this benchmark's bits and group size, saved in the AWQ gemm format."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows = job.read_rows(lambda text: tokenizer(text, verbose=False)["input_ids"])
    compressor = AutoRound(
        model,
        tokenizer=tokenizer,
        scheme=f"W{BITS}A16",
        group_size=GROUP_SIZE,
        sym=False,
        iters=job.steps,
        nsamples=len(rows),
        seqlen=job.sample_tokens,
        dataset=[torch.tensor([row]) for row in rows],
        device_map="cpu",
    )
    saved = Path(job.output) / UNNAMED
    compressor.quantize_and_save(str(saved), format="auto_awq")
    config = next(saved.rglob("config.json"))
    config.parent.rename(job.checkpoint)


if __name__ == "__main__":
    sys.exit(main())
