"""Whether an engine records its decoding when it starts, and the recording, with progress."""

import sys
from collections.abc import Callable

import torch

from kernels.paged_batch import PagedLayer
from server.engine.config import EngineConfig
from server.engine.decode_graphs import DecodeGraphs
from server.engine.graph_recorder import CudaGraphRecorder, GraphRecorder
from server.engine.graph_sizes import GraphSize
from server.model.decoder import Decoder
from server.model.loader import LoadProgress

Report = Callable[[LoadProgress], None]


def records_graphs(config: EngineConfig, device: torch.device) -> bool:
    """Whether decoding is to be recorded: on a GPU, unless the settings say otherwise."""
    return device.type == "cuda" and not config.enforce_eager


def choose_recorder(config: EngineConfig, device: torch.device) -> GraphRecorder | None:
    """None where nothing is recorded."""
    return CudaGraphRecorder() if records_graphs(config, device) else None


def record_graphs(
    decoder: Decoder,
    kv_layers: tuple[PagedLayer, ...],
    sizes: tuple[GraphSize, ...],
    recorder: GraphRecorder,
    report: Report,
) -> DecodeGraphs:
    """The recorded steps, for caches whose last block is given to no sequence.

    Where memory runs out, fewer are recorded, and a sentence on standard error says so.
    """
    scratch_block = len(kv_layers[0].keys) - 1
    graphs = DecodeGraphs(decoder, kv_layers, sizes, scratch_block, recorder)
    missing = graphs.record(
        lambda num_done, num_all: report(LoadProgress(num_done, num_all, "recording decoding graph"))
    )
    if missing:
        largest = missing[0]
        sys.stderr.write(
            f"{len(missing)} of {len(sizes)} decoding graphs found no memory, the largest that of {largest.num_seqs} "
            f"sequences of {largest.context_len} tokens; such steps are launched kernel by kernel. Lower "
            "gpu_memory_utilization, kv_cache_memory or max_num_seqs for all graphs, or set enforce_eager for none\n"
        )
        sys.stderr.flush()
    return graphs
