"""Sequences and their token counts -> the frozen StepPlan. Reads sequences, changes none."""

from collections.abc import Mapping

import numpy as np

from server.engine.sequence import Sequence
from server.engine.step_plan import PromptLogprobRows, SamplingRow, StepPlan


def build_plan(num_tokens: Mapping[Sequence, int], started: tuple[str, ...]) -> StepPlan:
    """The step that computes the next num_tokens[sequence] tokens of each sequence, in the mapping's order."""
    sequences = tuple(num_tokens)
    counts = np.fromiter(num_tokens.values(), dtype=np.int32, count=len(sequences))
    computed = np.array([sequence.num_computed for sequence in sequences], dtype=np.int32)
    query_starts = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_starts[1:])
    block_tables = np.zeros((len(sequences), max(len(sequence.blocks) for sequence in sequences)), dtype=np.int32)
    for row, sequence in enumerate(sequences):
        block_tables[row, : len(sequence.blocks)] = sequence.block_table
    positions = np.arange(query_starts[-1], dtype=np.int64) + np.repeat(computed - query_starts[:-1], counts)
    return StepPlan(
        request_ids=tuple(sequence.request_id for sequence in sequences),
        token_ids=np.concatenate(
            [
                sequence.token_ids[sequence.num_computed : sequence.num_computed + count]
                for sequence, count in num_tokens.items()
            ]
        ),
        positions=positions,
        query_starts=query_starts,
        context_lens=computed + counts,
        block_tables=block_tables,
        sampling_rows=tuple(
            _sampling_row(sequence, int(stop) - 1)
            for (sequence, count), stop in zip(num_tokens.items(), query_starts[1:], strict=True)
            if sequence.num_computed + count == sequence.num_known
        ),
        prompt_logprob_rows=tuple(
            rows
            for (sequence, count), start in zip(num_tokens.items(), query_starts, strict=False)
            if (rows := _prompt_logprob_rows(sequence, count, int(start))) is not None
        ),
        started=started,
    )


def _sampling_row(sequence: Sequence, token_index: int) -> SamplingRow:
    return SamplingRow(
        sequence.request_id, token_index, sequence.request.sampling, sequence.token_ids, sequence.num_prompt
    )


def _prompt_logprob_rows(sequence: Sequence, count: int, token_start: int) -> PromptLogprobRows | None:
    """The prompt tokens that this chunk predicts and that have no score yet (a recomputed chunk scores none twice)."""
    num_top = sequence.request.sampling.prompt_logprobs
    first = max(sequence.num_computed + 1, sequence.num_scored_prompt)
    stop = min(sequence.num_computed + count + 1, sequence.num_prompt)
    if num_top is None or first >= stop:
        return None
    offset = first - 1 - sequence.num_computed
    return PromptLogprobRows(sequence.request_id, token_start + offset, sequence.token_ids[first:stop], num_top)
