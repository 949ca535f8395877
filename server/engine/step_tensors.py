"""StepPlan -> the tensors of one step on the device. Copies, computes slots, decides nothing."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.paged_batch import AttentionBatch
from server.engine.step_plan import StepPlan


@dataclass(frozen=True)
class StepTensors:
    """token_ids, positions: int64 [T]. sampled: int64 [S], the flat index of each sampling row."""

    token_ids: Tensor
    positions: Tensor
    sampled: Tensor
    batch: AttentionBatch


def build_step_tensors(plan: StepPlan, block_size: int, device: torch.device) -> StepTensors:
    """The plan's arrays on the device; from pinned memory and without waiting, where that is a GPU."""
    query_lens = np.diff(plan.query_starts)
    sequence_of_token = np.repeat(np.arange(len(query_lens)), query_lens)
    blocks = plan.block_tables[sequence_of_token, plan.positions // block_size].astype(np.int64)
    sampled = np.array([row.token_index for row in plan.sampling_rows], dtype=np.int64)
    return StepTensors(
        token_ids=_copy(plan.token_ids, device),
        positions=_copy(plan.positions, device),
        sampled=_copy(sampled, device),
        batch=AttentionBatch(
            query_starts=_copy(plan.query_starts, device),
            context_lens=_copy(plan.context_lens, device),
            block_tables=_copy(plan.block_tables, device),
            slot_mapping=_copy(blocks * block_size + plan.positions % block_size, device),
            max_query_len=int(query_lens.max()),
            max_context_len=int(plan.context_lens.max()),
        ),
    )


def _copy(array: NDArray[np.int64] | NDArray[np.int32], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
