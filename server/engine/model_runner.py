"""Executes a step: tensors, decoder, logits, sampler. Owns the KV tensors, and no memory of requests."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.paged_batch import PagedLayer, copy_block
from server.engine.decode_graphs import DecodeGraphs
from server.engine.logprobs import collect_logprobs
from server.engine.request import TokenLogprob
from server.engine.sampler import sample
from server.engine.step_plan import PromptLogprobRows, SampledToken, StepPlan, StepResult
from server.engine.step_tensors import build_step_tensors, copy_to_device, group_sequences, pick_rows
from server.model.decoder import Decoder
from server.model.native_decoder import NativeDecoder

# prompt tokens scored at once: a whole prompt times the vocabulary would not fit beside the model
_SCORED_ROWS = 64


class ModelRunner:
    """The StepRunner that runs a real model."""

    def __init__(
        self,
        decoder: Decoder | NativeDecoder,
        kv_layers: tuple[PagedLayer, ...],
        max_rows_together: int | None = None,
        adapters: Sequence[str] = (),
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """max_rows_together: sequences of few tokens are computed in runs of so many, longer ones alone; None: all.

        adapters: the names of those that the decoder was loaded with, in its order. graphs: of this decoder and these
        caches, for the steps that they can stand for.
        """
        self._graphs = graphs
        self._adapters = {name: number for number, name in enumerate(adapters)}
        self._max_rows_together = max_rows_together
        self._decoder = decoder
        self._kv_layers = kv_layers
        self._device = decoder.embedding.device

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's tokens and draw one token for each of its sampling rows."""
        for source, target in plan.block_copies:
            for layer in self._kv_layers:
                copy_block(layer, source, target)
        runs = group_sequences(plan, self._max_rows_together)
        parts = [self._compute(plan, sequences) for sequences in runs]
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        tokens: tuple[SampledToken, ...] = ()
        # a step may hold nothing but the first part of a prompt
        if plan.sampling_rows:
            sampled = pick_rows(hidden, [row.token_index for row in plan.sampling_rows])
            tokens = sample(self._compute_logits(sampled), plan.sampling_rows)
        return StepResult(tokens, tuple(self._score_prompt(hidden, rows) for rows in plan.prompt_logprob_rows))

    def _compute(self, plan: StepPlan, sequences: range) -> Tensor:
        """Normalized hidden states [T, hidden] of these sequences' tokens."""
        if self._graphs is not None and (hidden := self._graphs.forward(plan, sequences)) is not None:
            return hidden
        step = build_step_tensors(plan, sequences, self._kv_layers[0].block_size, self._device, self._adapters)
        if step.rows is None:
            return self._decoder.forward(step.token_ids, step.positions, step.batch, self._kv_layers)
        assert isinstance(self._decoder, Decoder), "the native decoder knows no adapters"
        return self._decoder.forward(step.token_ids, step.positions, step.batch, self._kv_layers, step.rows)

    def _compute_logits(self, sampled: Tensor) -> Tensor:
        """float32 [S, vocab] of hidden states [S, hidden], each row of another sequence."""
        runs = torch.split(sampled, self._max_rows_together or len(sampled))
        logits = [self._decoder.compute_logits(rows) for rows in runs]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _score_prompt(self, hidden: Tensor, rows: PromptLogprobRows) -> tuple[TokenLogprob, ...]:
        scores: list[TokenLogprob] = []
        for start in range(0, len(rows.targets), _SCORED_ROWS):
            targets = copy_to_device(rows.targets[start : start + _SCORED_ROWS].copy(), self._device)
            first = rows.token_start + start
            logits = self._decoder.compute_logits(hidden[first : first + len(targets)])
            scores.extend(collect_logprobs(logits, targets, [rows.num_top] * len(targets)))
        return tuple(scores)
