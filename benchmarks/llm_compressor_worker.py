"""llm-compressor's process: python -m benchmarks.llm_compressor_worker JOB COST, by its own environment's Python."""

import shutil
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from benchmarks.quality_job import BITS, GROUP_SIZE, Cost, Job


def main() -> int:
    job, cost_file = Job.read(Path(sys.argv[1])), Path(sys.argv[2])
    if not torch.accelerator.is_available():
        # it pins what it calibrates with for copies to a GPU, which torch refuses where there is none
        IntermediatesCache.pin_memory = _leave_unpinned
    cost = Cost.of(lambda: quantize(job), packages=("llmcompressor", "compressed-tensors", "transformers", "torch"))
    save_dense(job)
    cost.write(cost_file)
    return 0


def quantize(job: Job) -> None:
    """AWQ as its documentation shows it, with this benchmark's bits and group size."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows = job.read_rows(lambda text: tokenizer(text, verbose=False)["input_ids"])
    weights = QuantizationArgs(num_bits=BITS, symmetric=False, strategy="group", group_size=GROUP_SIZE)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=[AWQModifier(), QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": scheme})],
        num_calibration_samples=len(rows),
        max_seq_length=job.sample_tokens,
    )
    # its scales have the model's dtype: saved in float32 they would cost a quarter of a bit a weight more
    model.half()  # type: ignore[no-untyped-call]
    model.save_pretrained(job.checkpoint, save_compressed=True)


def save_dense(job: Job) -> None:
    """What it reads back of its files, in float32."""
    loading = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=torch.float32, quantization_config=loading)
    job.dense.mkdir()
    # without the scales and zero points that stay beside a weight when it is multiplied out
    kept = (".weight", ".bias")
    weights = {name: weight.detach() for name, weight in model.named_parameters() if name.endswith(kept)}
    save_file(weights, job.dense / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(Path(job.model) / "config.json", job.dense)


def _leave_unpinned(_cache: object, _batch_index: int, _input_names: list[str] | None = None) -> None:
    """Nothing is copied to a GPU here."""


if __name__ == "__main__":
    sys.exit(main())
