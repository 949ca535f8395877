"""Loads one checkpoint in a process of its own and says what that took: a line of JSON with bytes.

before: what the program takes without a model; after: with it; peak: the most in between.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from server.engine.config import EngineConfig
from server.engine.kernel_choice import choose_kernels
from server.model.loader import ignore_load_progress, load_model

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# what Linux takes for: the peak begins anew
_RESET_PEAK = "5"


def main(model: str, device_name: str, kernels: str) -> None:
    """kernels: `native`, or `torch`, which stands for Triton's on a GPU."""
    directory, device = Path(model), torch.device(device_name)
    config = EngineConfig(model, cpu_kernel="native" if kernels == "native" else "torch")
    native = choose_kernels(config, device, directory).native
    if device.type == "cuda":
        # what CUDA itself takes of the host is none of the model's
        torch.zeros(1, device=device)
    gc.collect()
    _CLEAR.write_text(_RESET_PEAK)
    before = _resident("VmRSS")
    loaded = load_model(directory, device, None if native else torch.bfloat16, ignore_load_progress, native)
    gc.collect()
    figures = {"before": before, "after": _resident("VmRSS"), "peak": _resident("VmHWM")}
    print(json.dumps(figures))
    # held until it has been measured
    del loaded


def _resident(field: str) -> int:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines())
    return int(fields[field].split()[0]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
