"""Decides which tokens each step computes, and owns every request's progress. Knows neither tensors nor transports.

One rule: a request has tokens known and tokens computed, and each step spends a token budget on letting the second
catch up with the first. Chunked prefill, decode and recomputation after a preemption are all that same subtraction.
"""

import math
from bisect import insort
from dataclasses import dataclass
from itertools import islice

from server.engine.block_pool import BlockPool
from server.engine.cache_manager import CacheManager
from server.engine.draft_length import Speculation
from server.engine.drafter import Drafter, PromptLookup
from server.engine.errors import EngineSetupError
from server.engine.output_tokens import OutputTokens
from server.engine.plan_builder import build_plan
from server.engine.request import EngineStats, FinishReason, GenerationRequest, TokenEvent
from server.engine.sequence import Sequence, SequenceState
from server.engine.step_budget import StepBudget
from server.engine.step_plan import SampledToken, StepPlan, StepResult
from server.engine.structured_output import OutputGuide
from server.engine.token_events import event_of_end, timeout_event
from server.engine.waiting_queue import WaitingQueue

# a sequence preempted this often is spared until all that run are: no request is recomputed for ever
PREEMPTION_BOUND = 3

_OUT_OF_MEMORY = "the device has not enough free memory to compute even the smallest part of this request"


@dataclass(frozen=True)
class SchedulerLimits:
    """max_num_seqs: how many run at once. max_num_batched_tokens: the budget of one step.

    prefill_chunk: a sequence is computed up to the next multiple of it at a time, or not in this step, so that where
    a prompt is cut follows from the prompt alone; without deterministic, one for whose chunk alone the device has no
    memory is given a smaller one. None cuts it where the budget ends.
    prefix_caching: a prompt that begins as an earlier one did, and has its salt, starts where that one's blocks end.
    deterministic: nothing is read that was not computed as the request alone would have computed it. Of a prompt,
    whole chunks are shared and nothing else; output is recomputed token by token. Takes a prefill_chunk.
    copies_blocks: where a prompt's beginning ends inside of a block, that block is copied. Not where deterministic.
    speculation: None for none.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    prefill_chunk: int | None = None
    prefix_caching: bool = True
    deterministic: bool = False
    copies_blocks: bool = False
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise EngineSetupError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, fewer than max_num_seqs "
                f"{self.max_num_seqs}: a step must have room for one token of every running sequence"
            )
        if self.prefill_chunk is not None:
            # so the first sequence that waits for its chunk gets it in every step, whoever decodes beside it
            assert 1 <= self.prefill_chunk <= self.max_num_batched_tokens - self.max_num_seqs + 1
        assert self.prefill_chunk is not None or not self.deterministic

    @property
    def max_num_drawn(self) -> int:
        """The most tokens that a step draws: one a sequence, and one after each guess."""
        num_guesses = self.speculation.num_tokens if self.speculation is not None else 0
        return min(self.max_num_batched_tokens, self.max_num_seqs * (1 + num_guesses))


class Scheduler:
    """add, abort and expire between steps; then plan_step, execute elsewhere, apply, or take_back if that failed."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool, drafter: Drafter | None = None) -> None:
        """drafter: what guesses where limits.speculation says so; prompt look-up where there is none."""
        self._limits = limits
        self._drafter = (drafter or PromptLookup()) if limits.speculation is not None else None
        self._pool = pool
        self._budget = StepBudget(limits.max_num_batched_tokens, limits.max_num_seqs, limits.prefill_chunk or 1)
        self._cache = CacheManager(
            pool,
            limits.max_num_seqs,
            prefix_caching=limits.prefix_caching,
            shared_chunk=limits.prefill_chunk if limits.deterministic else None,
            copies_blocks=limits.copies_blocks,
        )
        self._output = OutputTokens()
        self._sequences: dict[str, Sequence] = {}
        self._waiting = WaitingQueue()
        # the most urgent first, those of one priority as they started: whoever is last yields first
        self._running: list[Sequence] = []
        # those that the step planned last started
        self._admitted: list[Sequence] = []
        # no request ends for its deadline before
        self._next_deadline = math.inf
        self._num_preemptions = 0
        self._num_out_of_memory = 0
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_free_blocks=self._pool.num_free,
            num_blocks=self._pool.num_blocks,
            num_preemptions=self._num_preemptions,
            prompt_tokens=self._output.prompt_tokens,
            generation_tokens=self._output.generation_tokens,
            num_steps=self._num_steps,
            cached_prompt_tokens=self._output.cached_prompt_tokens,
            num_out_of_memory=self._num_out_of_memory,
            num_drafts=self._output.num_drafts,
            draft_tokens=self._output.draft_tokens,
            accepted_tokens=self._output.accepted_tokens,
        )

    def check_integrity(self) -> None:
        """Assert that blocks and queues agree with the sequences."""
        self._pool.check_integrity(sequence.blocks for sequence in self._sequences.values() if sequence.blocks)
        queued = [*self._waiting, *self._running]
        assert len(queued) == len(self._sequences), "a sequence is in no queue, or in two"
        assert set(queued) == set(self._sequences.values()), "a queue holds a sequence that has ended"

    def add(self, request: GenerationRequest, guide: OutputGuide | None = None) -> None:
        """Queue a request that is known to fit the cache when it runs alone. guide: what its output keeps to."""
        assert request.request_id not in self._sequences, f"request id {request.request_id} is in use"
        sequence = Sequence(request, self._pool.block_size, guide)
        assert sequence.max_num_blocks <= self._pool.num_blocks, "the request can never fit the cache"
        self._sequences[request.request_id] = sequence
        self._waiting.add(sequence)
        self._next_deadline = min(self._next_deadline, sequence.deadline)

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a request and free its blocks; None when it has ended already."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        self._finish(sequence)
        return TokenEvent(request_id, (), finish_reason=FinishReason.ABORTED)

    def expire(self, now: float) -> list[TokenEvent]:
        """End the requests whose deadline has come. now: on the clock of their deadlines."""
        if now < self._next_deadline:
            return []
        late = [sequence for sequence in self._sequences.values() if sequence.deadline <= now]
        for sequence in late:
            self._finish(sequence)
        self._next_deadline = min((sequence.deadline for sequence in self._sequences.values()), default=math.inf)
        return [timeout_event(sequence) for sequence in late]

    def plan_step(self) -> StepPlan | None:
        """Spend the token budget: first on the running sequences in order, then on waiting ones. None without work."""
        num_tokens: dict[Sequence, int] = {}
        budget, max_seqs = self._budget.num_tokens, self._budget.num_seqs
        num_preemptions = self._num_preemptions
        running = SequenceState.RUNNING
        for sequence in tuple(self._running):
            if budget == 0 or len(num_tokens) == max_seqs:
                break
            if sequence.num_known > sequence.num_places:
                for victim in self._make_room(sequence):
                    budget += num_tokens.pop(victim, 0)
            if sequence.state is running and (share := self._share(sequence, budget)):
                num_tokens[sequence] = share
                budget -= share
        # not before all of them are sure of their place in this step
        block_size = self._pool.block_size
        for sequence, share in num_tokens.items():
            # mostly one token is added to a block that stays open
            if share > 1 or (sequence.num_computed + 1) % block_size == 0:
                self._cache.offer(sequence, share)
        self._admitted = []
        # who was just preempted comes first, so nobody new may take the room it left
        if num_preemptions == self._num_preemptions:
            while budget > 0 and (admitted := self._admit_next(budget)) is not None:
                num_tokens[admitted] = self._share(admitted, budget)
                self._cache.offer(admitted, num_tokens[admitted])
                budget -= num_tokens[admitted]
        if not num_tokens:
            assert not self._sequences, "requests wait, yet none fits the empty cache"
            return None
        if self._limits.speculation is not None and self._drafter is not None and not self._budget.is_reduced:
            self._add_drafts(self._limits.speculation, self._drafter, num_tokens, budget)
        self._num_steps += 1
        self._waiting.charge(num_tokens)
        return self._freeze(num_tokens)

    def apply(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Take over what the step computed. Returns one event for every request that has news."""
        self._budget.note_success()
        counts = plan.query_starts[1:] - plan.query_starts[:-1]
        for request_id, num_tokens in zip(plan.request_ids, counts.tolist(), strict=True):
            self._sequences[request_id].num_computed += num_tokens
        for scored, logprobs in zip(plan.prompt_logprob_rows, result.prompt_logprobs, strict=True):
            self._sequences[scored.request_id].prompt_logprobs.extend(logprobs)
        drawn = zip(plan.sampling_rows, result.tokens, strict=True)
        events = []
        for row, token in drawn:
            sequence = self._sequences[row.request_id]
            if sequence.num_drafted:
                tokens = [token, *(following for _, following in islice(drawn, sequence.num_drafted))]
                event = self._take_verified(sequence, tokens)
            else:
                event = self._output.take(sequence, token)
            if event.finish_reason is not None:
                if event.finish_reason is FinishReason.ERROR:
                    self._cache.forget(sequence)
                self._finish(sequence)
            events.append(event)
        return events

    def take_back(self, plan: StepPlan) -> list[TokenEvent]:
        """Undo the step planned last, which the device had no memory for: nothing of it was computed.

        The next ones are smaller for a while. Returns the last event of a request that no step can be small enough for.
        """
        self._num_out_of_memory += 1
        sequences = [self._sequences[request_id] for request_id in plan.request_ids]
        num_drafted = sum(sequence.num_drafted for sequence in sequences)
        for sequence in sequences:
            sequence.num_drafted = 0
            self._cache.forget_uncomputed(sequence)
        for sequence in reversed(self._admitted):
            # it may have counted on blocks that another of this step was to compute
            self._stop_running(sequence)
            self._waiting.put_back(sequence)
        if self._budget.shrink(len(plan.token_ids), len(sequences), num_drafted):
            return []
        if not self._limits.deterministic and sequences[0].halve_chunk(len(plan.token_ids)):
            return []
        self._finish(sequences[0])
        return [event_of_end(sequences[0], FinishReason.ERROR, _OUT_OF_MEMORY)]

    def _take_verified(self, sequence: Sequence, tokens: list[SampledToken]) -> TokenEvent:
        num_drafted = sequence.num_drafted
        num_accepted = sequence.settle_draft(tokens)
        # nobody was offered yet what only guesses filled
        self._cache.offer(sequence, 0)
        return self._output.take_verified(sequence, tokens[: num_accepted + 1], num_drafted)

    def _add_drafts(
        self, speculation: Speculation, drafter: Drafter, num_tokens: dict[Sequence, int], budget: int
    ) -> None:
        """Spend what nobody else needs of a step, budget and blocks, on guesses at what comes after known tokens."""
        cost = speculation.relative_cost(len(num_tokens), sum(num_tokens.values()))
        num_free, block_size = self._pool.num_free, self._pool.block_size
        wanted = {}
        for sequence in num_tokens:
            if sequence.num_known - sequence.num_computed == 1 and budget:
                length = sequence.choose_draft_length(min(speculation.num_tokens, budget), cost)
                # a guess that has no place would be made for nothing
                length = min(length, sequence.num_places + num_free * block_size - sequence.num_known)
                if length:
                    wanted[sequence] = length
                    budget -= length
                    num_free -= max(sequence.num_blocks_for(sequence.num_known + length) - len(sequence.blocks), 0)
        for sequence, guesses in drafter.draft(wanted).items():
            sequence.put_draft(guesses)
            has_places = self._cache.allocate_missing(sequence)
            assert has_places, "more guesses than were asked for"
            num_tokens[sequence] += sequence.num_drafted

    def _share(self, sequence: Sequence, budget: int) -> int:
        """How many of its tokens a sequence gets of what is left of a step's budget; 0 if its chunk does not fit."""
        missing = sequence.num_known - sequence.num_computed
        if missing == 1:
            return 1
        chunk = self._limits.prefill_chunk
        if chunk is None:
            return min(missing, budget)
        if self._limits.deterministic:
            missing = max(sequence.num_prompt - sequence.num_computed, 1)
        if sequence.max_chunk is not None:
            chunk = min(chunk, sequence.max_chunk)
        wanted = min(missing, chunk - sequence.num_computed % chunk)
        return wanted if wanted <= budget else 0

    def _admit_next(self, budget: int) -> Sequence | None:
        """Move the first waiting sequence to the running ones, with blocks for all it knows; None if it must wait."""
        if not self._waiting or len(self._running) >= self._budget.num_seqs:
            return None
        sequence = self._waiting.first()
        self._cache.take_cached(sequence)
        if not self._share(sequence, budget) or not self._cache.allocate_missing(sequence):
            self._cache.release(sequence)
            return None
        self._waiting.start(sequence)
        insort(self._running, sequence, key=_priority)
        self._admitted.append(sequence)
        sequence.state = SequenceState.RUNNING
        sequence.enter_tables(self._cache.tables)
        return sequence

    def _make_room(self, sequence: Sequence) -> list[Sequence]:
        """Give a running sequence blocks for all it knows. Returns who was preempted for it, itself perhaps."""
        victims: list[Sequence] = []
        while sequence.state is SequenceState.RUNNING and not self._cache.allocate_missing(sequence):
            # the last, so of the least urgent, of those that have not been preempted too often
            victim = min(reversed(self._running), key=lambda other: other.num_preemptions >= PREEMPTION_BOUND)
            self._preempt(victim)
            victims.append(victim)
        return victims

    def _preempt(self, sequence: Sequence) -> None:
        self._cache.note_ends(sequence)
        self._stop_running(sequence)
        self._waiting.put_back(sequence)
        sequence.num_preemptions += 1
        self._num_preemptions += 1

    def _stop_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        sequence.leave_tables()
        self._cache.release(sequence)
        if self._drafter is not None:
            self._drafter.stop(sequence)
        sequence.state = SequenceState.WAITING

    def _finish(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.RUNNING:
            self._cache.note_ends(sequence)
            self._stop_running(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED
        del self._sequences[sequence.request_id]
        if not self._sequences:
            self._waiting.forget_owners()

    def _freeze(self, num_tokens: dict[Sequence, int]) -> StepPlan:
        first_time = [sequence for sequence in self._admitted if not sequence.was_started]
        for sequence in self._admitted:
            sequence.was_started = True
            if sequence.num_preemptions == 0:
                sequence.num_cached_prompt = sequence.num_computed
        copies = [copy for sequence in self._admitted if (copy := self._cache.take_copy(sequence)) is not None]
        started = tuple([sequence.request_id for sequence in first_time])
        return build_plan(num_tokens, self._cache.tables, started, tuple(copies))


def _priority(sequence: Sequence) -> int:
    return sequence.priority
