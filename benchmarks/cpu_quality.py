"""How far the CPU kernels are from float32 on the same weights: KL divergence and first choices on the demo model."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.command_line import CACHE, announce, positive_number
from benchmarks.demo_checkpoint import find_gguf, prepare_checkpoint
from benchmarks.errors import BenchmarkError
from kernels.native_build import NativeUnavailable
from kernels.native_cpu import NativeCpu, allocate_native_layer
from kernels.paged_batch import PagedLayer
from quant.dense_checkpoint import load_dense
from quant.errors import QuantError
from quant.evaluate import QualitySums, TextWindows, cut_windows, predict
from server.engine.step_plan import StepPlan
from server.engine.step_tensors import build_step_tensors
from server.model.loader import LoadedModel, ignore_load_progress, load_model

BLOCK_SIZE = 32
CPU = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_quality", description=__doc__)
    parser.add_argument("--text", type=Path, help="UTF-8 file; left out: the text that ships with awq-serve")
    parser.add_argument("--windows", type=positive_number, default=4, help="of 512 tokens; default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        checkpoint = prepare_checkpoint(find_gguf(), CACHE / "models", announce)
        Console().print(measure(checkpoint, TextWindows(options.text, options.windows)))
    except (BenchmarkError, QuantError, NativeUnavailable, OSError) as error:
        announce(f"error: {error}")
        return 1
    return 0


@torch.inference_mode()
def measure(checkpoint: Path, text: TextWindows) -> Table:
    """Each kernel's logits beside those of the checkpoint's weights multiplied out, on the same tokens."""
    exact = load_dense(checkpoint)
    windows = cut_windows(AutoTokenizer.from_pretrained(str(checkpoint)), text.read(), text)
    native = NativeCpu.open(torch.get_num_threads(), announce)
    models = {
        "torch": load_model(checkpoint, CPU, None, ignore_load_progress),
        f"native, {native.name}": load_model(checkpoint, CPU, None, ignore_load_progress, native),
    }
    sums = {name: QualitySums() for name in models}
    for index, window in enumerate(windows):
        announce(f"window {index + 1} of {len(windows)}")
        original = predict("float32", exact, window)
        for name, model in models.items():
            sums[name].add(run(model, window)[:-1], original, window[1:])
    table = Table("kernels", "mean KL (nats)", "same first choice", box=None)
    for name, found in sums.items():
        table.add_row(name, f"{found.mean_kl:.6f}", f"{found.top1_agreement:.2%}")
    return table


def run(model: LoadedModel, token_ids: Tensor) -> Tensor:
    """Logits of all tokens, computed in one step over an empty cache."""
    config, num_tokens = model.config, len(token_ids)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    plan = StepPlan(
        request_ids=("",),
        token_ids=token_ids.numpy(),
        positions=np.arange(num_tokens),
        query_starts=np.array([0, num_tokens], dtype=np.int32),
        context_lens=np.array([num_tokens], dtype=np.int32),
        block_tables=np.arange(num_blocks, dtype=np.int32)[None],
        sampling_rows=(),
    )
    step = build_step_tensors(plan, range(1), BLOCK_SIZE, CPU, {})
    layers = [_allocate(model, num_blocks) for _ in range(config.num_layers)]
    return model.decoder.compute_logits(model.decoder.forward(step.token_ids, step.positions, step.batch, layers))


def _allocate(model: LoadedModel, num_blocks: int) -> PagedLayer:
    config = model.config
    shape = (num_blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    if model.is_native:
        return allocate_native_layer(*shape)
    return PagedLayer(torch.empty(shape), torch.empty(shape))


if __name__ == "__main__":
    sys.exit(main())
