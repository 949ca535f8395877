"""Guesses what comes next with a small model: a greedy step of it for each guess, for all sequences at once.

The model has a cache and blocks of its own, and follows the one rule of the scheduler: of each sequence it has tokens
known and tokens computed, and computes what is missing. Guesses that did not come true are tokens it has not computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from server.engine.block_pool import BlockPool
from server.engine.cache_manager import CacheManager
from server.engine.out_of_memory import execute_within_memory
from server.engine.plan_builder import build_plan
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.sequence import Sequence
from server.engine.step_plan import StepRunner, TokenIds

# steps without guesses after one that ran out of memory: each try reads whole texts anew
STEPS_WITHOUT_GUESSES = 64


@dataclass(frozen=True)
class DraftLimits:
    """max_num_seqs: how many run at once. max_num_tokens: of one step of the draft model, so how much of a long prompt
    it reads while everybody waits. max_model_len: behind so many tokens it guesses nothing.
    """

    max_num_seqs: int
    max_num_tokens: int
    max_model_len: int
    prefix_caching: bool = True


@dataclass
class _Shadow:
    """What the draft model knows of a sequence: the first num_followed tokens are its own, others guesses."""

    sequence: Sequence
    num_followed: int


class ModelDrafter:
    """A Drafter. Nothing that goes wrong in it costs more than guesses."""

    def __init__(self, runner: StepRunner, pool: BlockPool, limits: DraftLimits) -> None:
        self._runner = runner
        self._pool = pool
        self._limits = limits
        self._cache = CacheManager(pool, limits.max_num_seqs, prefix_caching=limits.prefix_caching, shared_chunk=None)
        self._shadows: dict[Sequence, _Shadow] = {}
        # those for which the model gives no finite logits
        self._hopeless: set[Sequence] = set()
        self._num_resting = 0

    def draft(self, wanted: Mapping[Sequence, int]) -> Mapping[Sequence, TokenIds]:
        """Those of which the draft model has not yet computed all that is known get no guess, but come nearer to it."""
        if self._num_resting:
            self._num_resting -= 1
            return {}
        followed = {
            sequence: self._follow(sequence)
            for sequence in wanted
            if sequence.num_known < self._limits.max_model_len and sequence not in self._hopeless
        }
        last = {
            shadow: min(sequence.num_known + wanted[sequence], self._limits.max_model_len)
            for sequence, shadow in followed.items()
        }
        num_tokens = self._catch_up(last)
        while num_tokens:
            drawn = self._compute(num_tokens)
            num_tokens = {
                shadow: 1
                for shadow in drawn
                if shadow.num_known < last[shadow] and self._cache.allocate_missing(shadow)
            }
        return {
            sequence: shadow.text[sequence.num_known : shadow.num_known]
            for sequence, shadow in followed.items()
            if sequence in self._shadows and shadow.num_known > sequence.num_known
        }

    def stop(self, sequence: Sequence) -> None:
        self._hopeless.discard(sequence)
        self._drop(sequence)

    def check_integrity(self) -> None:
        """Assert that the blocks agree with the sequences."""
        self._pool.check_integrity(shadow.sequence.blocks for shadow in self._shadows.values())

    def _follow(self, sequence: Sequence) -> Sequence:
        """The draft model's view of a sequence, brought up to all that is known."""
        shadow = self._shadows.get(sequence)
        if shadow is None:
            request = sequence.request
            greedy = SamplingParams(max_tokens=request.sampling.max_tokens, temperature=0.0)
            own = Sequence(
                GenerationRequest(request.request_id, request.prompt_token_ids, greedy, request.cache_salt),
                self._pool.block_size,
            )
            shadow = self._shadows[sequence] = _Shadow(own, sequence.num_prompt)
            own.enter_tables(self._cache.tables)
        # one token that it has seen, as there may be no new one
        start = shadow.num_followed - 1
        shadow.sequence.revise(start, sequence.text[start : sequence.num_known])
        shadow.num_followed = sequence.num_known
        # what was a guess and came true
        self._cache.offer(shadow.sequence, 0)
        return shadow.sequence

    def _catch_up(self, shadows: Mapping[Sequence, int]) -> dict[Sequence, int]:
        """What the next step computes of each, within its budget and the free blocks."""
        budget = self._limits.max_num_tokens
        num_tokens = {}
        for shadow in shadows:
            # one before it in this step may have offered what it can start from
            is_starting = bool(budget) and not shadow.blocks
            if is_starting:
                self._cache.take_cached(shadow)
            share = min(shadow.num_known - shadow.num_computed, budget)
            if share and self._cache.allocate_missing(shadow):
                self._cache.offer(shadow, share)
                num_tokens[shadow] = share
                budget -= share
            elif is_starting:
                # it may hold what this step is yet to compute, and would keep it where the step fails
                self._drop(self._owner(shadow))
        return num_tokens

    def _compute(self, num_tokens: dict[Sequence, int]) -> list[Sequence]:
        """One step. Returns those that guessed a token by it; none where it ran out of memory."""
        plan = build_plan(num_tokens, self._cache.tables, ())
        result = execute_within_memory(self._runner, plan)
        if result is None:
            self._start_anew(num_tokens)
            self._num_resting = STEPS_WITHOUT_GUESSES
            return []
        drawn = []
        drawing = [shadow for shadow, count in num_tokens.items() if shadow.num_computed + count == shadow.num_known]
        for shadow, count in num_tokens.items():
            shadow.num_computed += count
        for shadow, token in zip(drawing, result.tokens, strict=True):
            if token.error is None:
                shadow.append_token(token.token_id)
                drawn.append(shadow)
            else:
                self._hopeless.add(self._owner(shadow))
                self._start_anew([shadow])
        return drawn

    def _start_anew(self, shadows: Mapping[Sequence, int] | list[Sequence]) -> None:
        """Nothing that these hold may be read."""
        for shadow in shadows:
            self._cache.forget(shadow)
            self._drop(self._owner(shadow))

    def _owner(self, own: Sequence) -> Sequence:
        return next(sequence for sequence, shadow in self._shadows.items() if shadow.sequence is own)

    def _drop(self, sequence: Sequence) -> None:
        shadow = self._shadows.pop(sequence, None)
        if shadow is not None:
            shadow.sequence.leave_tables()
            self._cache.release(shadow.sequence)
