"""Sequences and their token counts -> the frozen StepPlan. Reads sequences, changes none."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from server.engine.block_tables import BlockTables
from server.engine.sequence import Sequence
from server.engine.step_plan import PromptLogprobRows, SamplingRow, StepPlan, TokenIds
from server.engine.structured_output import TokenMask


def build_plan(
    num_tokens: Mapping[Sequence, int],
    tables: BlockTables,
    started: tuple[str, ...],
    block_copies: tuple[tuple[int, int], ...] = (),
) -> StepPlan:
    """The step that computes the next num_tokens[sequence] tokens of each sequence, in the mapping's order.

    Guesses of a sequence are among them, and a token is drawn after each: as if those before it were the output.
    """
    sequences = list(num_tokens)
    counts = np.fromiter(num_tokens.values(), dtype=np.int32, count=len(sequences))
    computed = np.array([sequence.num_computed for sequence in sequences], dtype=np.int32)
    query_starts = np.zeros(len(sequences) + 1, dtype=np.int32)
    counts.cumsum(out=query_starts[1:])
    context_lens = computed + counts
    starts = query_starts.tolist()
    adapters = tuple([sequence.request.adapter for sequence in sequences])
    return StepPlan(
        request_ids=tuple([sequence.request_id for sequence in sequences]),
        token_ids=_token_ids(sequences, counts, starts),
        positions=np.arange(starts[-1], dtype=np.int64) + (computed - query_starts[:-1]).repeat(counts),
        query_starts=query_starts,
        context_lens=context_lens,
        block_tables=tables.gather([sequence.table_row for sequence in sequences], int(context_lens.max())),
        sampling_rows=_sampling_rows(num_tokens, starts),
        prompt_logprob_rows=tuple(
            rows
            for sequence, start in zip(sequences, starts, strict=False)
            if sequence.scores_prompt and (rows := _prompt_logprob_rows(sequence, num_tokens[sequence], start))
        ),
        started=started,
        adapters=adapters if any(adapters) else (),
        block_copies=block_copies,
    )


def _sampling_rows(num_tokens: Mapping[Sequence, int], starts: list[int]) -> tuple[SamplingRow, ...]:
    """For each sequence whose known tokens are all computed then, what comes next, and what after each guess."""
    rows: list[SamplingRow] = []
    for (sequence, count), stop in zip(num_tokens.items(), starts[1:], strict=True):
        if sequence.num_computed + count >= sequence.num_known:
            num_drafted = sequence.num_drafted
            row = SamplingRow(
                sequence.request_id,
                stop - 1 - num_drafted,
                sequence.request.sampling,
                sequence.text,
                sequence.num_known,
                sequence.num_prompt,
            )
            if sequence.guide is not None:
                rows.extend(_guided_rows(row, sequence.guide.masks(num_drafted)))
                continue
            rows.append(row)
            if num_drafted:
                rows.extend(
                    row._replace(token_index=row.token_index + offset, position=row.position + offset)
                    for offset in range(1, num_drafted + 1)
                )
    return tuple(rows)


def _guided_rows(first: SamplingRow, masks: list[TokenMask]) -> list[SamplingRow]:
    """The row of the next token and one after each guess, each with what may stand there."""
    return [
        first._replace(token_index=first.token_index + offset, position=first.position + offset, allowed=mask)
        for offset, mask in enumerate(masks)
    ]


def _token_ids(sequences: list[Sequence], counts: NDArray[np.int32], starts: list[int]) -> TokenIds:
    """What the step computes of each sequence, one after the other: mostly the last token of each."""
    if starts[-1] == len(sequences):
        # a sequence of one token may still be one whose prompt or output is computed token by token
        return np.array(
            [
                sequence.last_token_id
                if sequence.num_computed + 1 == sequence.num_known
                else sequence.token_ids[sequence.num_computed]
                for sequence in sequences
            ],
            dtype=np.int64,
        )
    return np.concatenate(
        [
            sequence.text[sequence.num_computed : sequence.num_computed + count]
            for sequence, count in zip(sequences, counts.tolist(), strict=True)
        ]
    )


def _prompt_logprob_rows(sequence: Sequence, count: int, token_start: int) -> PromptLogprobRows | None:
    """The prompt tokens that this chunk predicts and that have no score yet (a recomputed chunk scores none twice)."""
    first = max(sequence.num_computed + 1, sequence.num_scored_prompt)
    stop = min(sequence.num_computed + count + 1, sequence.num_prompt)
    num_top = sequence.request.sampling.prompt_logprobs
    if num_top is None or first >= stop:
        return None
    offset = first - 1 - sequence.num_computed
    return PromptLogprobRows(sequence.request_id, token_start + offset, sequence.token_ids[first:stop], num_top)
