"""Makes runners ready before the first request: what they launch compiled, and decoding recorded, with progress."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.paged_batch import PagedLayer
from server.engine.config import EngineConfig
from server.engine.decode_graphs import DecodeGraphs
from server.engine.graph_recorder import CudaGraphRecorder, GraphRecorder
from server.engine.graph_sizes import graph_sizes
from server.engine.model_runner import ModelRunner
from server.engine.warm_up import WarmUpLimits, warm_up
from server.model.decoder import Decoder
from server.model.loader import LoadProgress

Report = Callable[[LoadProgress], None]


@dataclass(frozen=True)
class BuiltRunner:
    """A runner that has not run yet, the graphs that it will decode with, and what its steps may hold."""

    runner: ModelRunner
    graphs: DecodeGraphs | None
    limits: WarmUpLimits


def records_graphs(config: EngineConfig, device: torch.device) -> bool:
    """Whether decoding is to be recorded: on a GPU, unless the settings say otherwise."""
    return device.type == "cuda" and not config.enforce_eager


def choose_recorder(config: EngineConfig, device: torch.device) -> GraphRecorder | None:
    """None where nothing is recorded."""
    return CudaGraphRecorder() if records_graphs(config, device) else None


def build_graphs(
    decoder: Decoder,
    kv_layers: tuple[PagedLayer, ...],
    max_num_seqs: int,
    max_model_len: int,
    recorder: GraphRecorder | None,
) -> DecodeGraphs | None:
    """For caches whose last block is given to no sequence; None without a recorder. Nothing is recorded yet."""
    if recorder is None:
        return None
    scratch_block = len(kv_layers[0].keys) - 1
    return DecodeGraphs(decoder, kv_layers, graph_sizes(max_num_seqs, max_model_len), scratch_block, recorder)


def get_ready(runners: Sequence[BuiltRunner], device: torch.device, report: Report) -> None:
    """On a GPU compile what the runners launch; then record decoding, those of the first runner first.

    Where memory runs out, fewer graphs are recorded, and a sentence on standard error says so. Raises RuntimeError for
    what no settings are at fault for.
    """
    try:
        if device.type == "cuda":
            warm_up([(built.runner, built.limits) for built in runners], report)
        for built in runners:
            if built.graphs is not None:
                _record(built.graphs, report)
    except (ValueError, OSError) as error:
        raise RuntimeError("what the engine's steps launch could not be compiled, or not be run") from error


def _record(graphs: DecodeGraphs, report: Report) -> None:
    missing = graphs.record(
        lambda num_done, num_all: report(LoadProgress(num_done, num_all, "recording decoding graph"))
    )
    if missing:
        largest = missing[0]
        sys.stderr.write(
            f"{len(missing)} of {len(missing) + graphs.num_recorded} decoding graphs found no memory, the largest that "
            f"of {largest.num_seqs} sequences of {largest.context_len} tokens; such steps are launched kernel by "
            "kernel. Lower gpu_memory_utilization, kv_cache_memory or max_num_seqs for all graphs, or set "
            "enforce_eager for none\n"
        )
        sys.stderr.flush()
