"""StepPlan -> the tensors of one step on the device. Copies, computes slots, decides nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.lora import AdapterRows, plan_rows
from kernels.paged_batch import AttentionBatch
from server.engine.step_plan import StepPlan

# what the operands of kernels are made of
_Array = NDArray[np.int64] | NDArray[np.int32] | NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class StepTensors:
    """token_ids, positions: int64 [T]. rows: those that have an adapter, None where none has."""

    token_ids: Tensor
    positions: Tensor
    batch: AttentionBatch
    rows: AdapterRows | None


def group_sequences(plan: StepPlan, max_rows: int | None) -> list[range]:
    """The sequences of a plan, in their order, in runs of at most max_rows tokens; a longer sequence runs alone.

    So whether a sequence is computed among few rows or as many follows from its own number of tokens alone. None puts
    them all in one run.
    """
    num_sequences = len(plan.context_lens)
    if max_rows is None:
        return [range(num_sequences)]
    runs = []
    first = 0
    for stop in range(1, num_sequences + 1):
        is_last = stop == num_sequences
        if is_last or plan.query_starts[stop + 1] - plan.query_starts[first] > max_rows:
            runs.append(range(first, stop))
            first = stop
    return runs


def build_step_tensors(
    plan: StepPlan, sequences: range, block_size: int, device: torch.device, adapters: Mapping[str, int]
) -> StepTensors:
    """The arrays of these sequences of the plan on the device; from pinned memory, without waiting, on a GPU.

    adapters: the numbers that the decoder knows them by.
    """
    query_starts = plan.query_starts[sequences.start : sequences.stop + 1]
    positions = plan.positions[query_starts[0] : query_starts[-1]]
    context_lens = plan.context_lens[sequences.start : sequences.stop]
    block_tables = plan.block_tables[sequences.start : sequences.stop]
    query_lens = np.diff(query_starts)
    sequence_of_token = np.repeat(np.arange(len(query_lens)), query_lens)
    return StepTensors(
        token_ids=copy_to_device(plan.token_ids[query_starts[0] : query_starts[-1]], device),
        positions=copy_to_device(positions, device),
        batch=AttentionBatch(
            query_starts=copy_to_device(query_starts - query_starts[0], device),
            context_lens=copy_to_device(context_lens, device),
            block_tables=copy_to_device(block_tables, device),
            slot_mapping=copy_to_device(token_slots(block_tables, sequence_of_token, positions, block_size), device),
            max_query_len=int(query_lens.max()),
            max_context_len=int(context_lens.max()),
        ),
        rows=_adapter_rows(plan, sequences, adapters, device),
    )


def token_slots(
    block_tables: NDArray[np.int32], rows: NDArray[np.int64], positions: NDArray[np.int64], block_size: int
) -> NDArray[np.int64]:
    """Where each token's key and value go, int64 [T]: it is at positions [T] of the sequence of rows [T] of tables."""
    blocks = block_tables[rows, positions // block_size].astype(np.int64)
    return blocks * block_size + positions % block_size


def _adapter_rows(
    plan: StepPlan, sequences: range, adapters: Mapping[str, int], device: torch.device
) -> AdapterRows | None:
    starts = plan.query_starts[sequences.start : sequences.stop + 1] - plan.query_starts[sequences.start]
    names = plan.adapters[sequences.start : sequences.stop]
    spans = [
        (adapters[name], first, stop)
        for name, (first, stop) in zip(names, pairwise(starts.tolist()), strict=False)
        if name
    ]
    return plan_rows(spans, device) if spans else None


def pick_rows(tensor: Tensor, indices: Sequence[int]) -> Tensor:
    """Rows of a tensor [R, ...] in the order of indices, without waiting; the tensor itself where those are all."""
    if list(indices) == list(range(len(tensor))):
        return tensor
    return tensor.index_select(0, copy_to_device(np.array(indices, dtype=np.int64), tensor.device))


def copy_to_device(array: _Array, device: torch.device) -> Tensor:
    """The array as a tensor there; from pinned memory, without waiting, on a GPU."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
