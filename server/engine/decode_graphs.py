"""Decoding steps, recorded for a few sizes when the engine starts and replayed with a step's operands.

Legend: B = sequences of a recorded size, K = hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.paged_batch import PagedLayer
from server.engine.graph_recorder import GraphRecorder, Replay
from server.engine.graph_sizes import GraphSize
from server.engine.out_of_memory import is_out_of_memory
from server.engine.static_step import StaticStep, num_words
from server.engine.step_plan import StepPlan
from server.model.decoder import Decoder


@dataclass(frozen=True)
class _Recorded:
    step: StaticStep
    replay: Replay


class DecodeGraphs:
    """The decoder's forward for steps of one token a sequence without adapters, up to the largest recorded size.

    Whatever a step asks for beyond that, it runs as it would without graphs: what is computed is the same.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_layers: tuple[PagedLayer, ...],
        sizes: Sequence[GraphSize],
        scratch_block: int,
        recorder: GraphRecorder,
    ) -> None:
        """sizes: largest first. scratch_block: of kv_layers, given to no sequence. Nothing is recorded yet."""
        self._decoder = decoder
        self._kv_layers = kv_layers
        self._sizes = tuple(sizes)
        self._scratch_block = scratch_block
        self._recorder = recorder
        self._recorded: dict[GraphSize, _Recorded] = {}
        device, block_size = decoder.embedding.device, kv_layers[0].block_size
        max_num_seqs = max(size.num_seqs for size in sizes)
        most_words = max(num_words(size, block_size) for size in sizes)
        self._words = torch.zeros(most_words, dtype=torch.int32, device=device)
        self._query_starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        # outside of what recordings compute in, so that it outlives the next one
        shape = (max_num_seqs, decoder.embedding.shape[1])
        self._hidden = torch.zeros(shape, dtype=decoder.embedding.dtype, device=device)

    @torch.inference_mode()
    def record(self, report: Callable[[int, int], None]) -> tuple[GraphSize, ...]:
        """Record all sizes; report is told how many are done, of how many. Returns those that memory was missing for.

        Other errors pass.
        """
        missing = []
        for index, size in enumerate(self._sizes):
            if not self._record_size(size):
                missing.append(size)
            report(index + 1, len(self._sizes))
        return tuple(missing)

    @property
    def num_recorded(self) -> int:
        return len(self._recorded)

    def forward(self, plan: StepPlan, sequences: range) -> Tensor | None:
        """Normalized hidden states [len(sequences), K]; None for a step that none of the recorded ones can stand for.

        The tensor is the caller's: no later step writes to it.
        """
        size = self._find(plan, sequences)
        if size is None:
            return None
        recorded = self._recorded[size]
        recorded.step.fill(plan, sequences)
        recorded.replay()
        return self._hidden[: len(sequences)].clone()

    def _find(self, plan: StepPlan, sequences: range) -> GraphSize | None:
        """The smallest recorded size that has room for these sequences."""
        num_tokens = plan.query_starts[sequences.stop] - plan.query_starts[sequences.start]
        if num_tokens != len(sequences) or any(plan.adapters[sequences.start : sequences.stop]):
            return None
        context_len = plan.context_lens[sequences.start : sequences.stop].max()
        fitting = (
            size
            for size in reversed(self._sizes)
            if size in self._recorded and size.num_seqs >= len(sequences) and size.context_len >= context_len
        )
        return next(fitting, None)

    def _record_size(self, size: GraphSize) -> bool:
        """Whether there was memory for it."""
        block_size = self._kv_layers[0].block_size
        step = StaticStep(size, self._words, self._query_starts, block_size, self._scratch_block)

        def run() -> None:
            hidden = self._decoder.forward(step.token_ids, step.positions, step.batch, self._kv_layers)
            self._hidden[: size.num_seqs].copy_(hidden)

        try:
            run()
            self._recorded[size] = _Recorded(step, self._recorder.record(run))
        except (MemoryError, RuntimeError) as error:
            # where a recording ends in want of memory, to end it may be an error of its own
            first = error.__context__ if isinstance(error.__context__, Exception) else error
            if not is_out_of_memory(error) and not is_out_of_memory(first):
                raise
            return False
        return True
