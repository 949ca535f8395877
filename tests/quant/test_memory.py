"""A model's size does not decide on the memory that quantizing takes: only its largest block does."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.random_model import ModelShape, write_random_model

ROOT = Path(__file__).resolve().parents[2]
# blocks of 13 MB in float32
SHAPES = {
    name: ModelShape(num_blocks, hidden_size=512, mlp_size=1536, num_heads=8, num_kv_heads=4, vocab_size=272)
    for name, num_blocks in (("few", 2), ("many", 12))
}
# peaks only grow, so the small model comes first
QUANTIZE_ALL = """
import json, sys
from pathlib import Path
from quant.pipeline import quantize
from quant.recipe import Method, Recipe

folder = Path(sys.argv[1])
peaks = {}
text = f"{folder / 'text.txt'}:1"
calibrated = Recipe(method=Method.GPTQ, calibration=text, num_samples=2, sample_tokens=32, num_windows=1)
for model, recipe in (("few", calibrated), ("many", Recipe(method=Method.RTN, num_windows=0)), ("many", calibrated)):
    report = quantize(recipe, folder / model, folder / f"{model}-{recipe.method}")
    peaks[f"{model} {recipe.method}"] = report.peak_memory_bytes
print(json.dumps(peaks))
"""


def test_more_blocks_take_little_more_than_what_is_waiting_to_be_written(tmp_path: Path) -> None:
    # given two models with blocks of one size
    for name, shape in SHAPES.items():
        write_random_model(tmp_path / name, shape)
    (tmp_path / "text.txt").write_text("The river rises in the hills. " * 20)

    # when a process quantizes the small one and then the large one
    ended = subprocess.run(
        [sys.executable, "-c", QUANTIZE_ALL, str(tmp_path)],
        cwd=ROOT,
        # what is freed goes back to the system at once, so that the peak is what was held, and no holes between
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )

    # then its peak grows by a fraction of the other blocks: they take 4 bits a weight until a shard is full
    assert ended.returncode == 0, ended.stderr
    peaks = json.loads(ended.stdout.splitlines()[-1])
    more_bytes = 4 * (SHAPES["many"].parameters - SHAPES["few"].parameters)
    assert peaks["many gptq"] - peaks["few gptq"] < 0.3 * more_bytes
    # and is what is promised
    assert max(peaks.values()) < 1.5 * 4 * SHAPES["many"].block_parameters + 2e9
