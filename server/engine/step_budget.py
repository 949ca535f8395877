"""How much a step may hold: what the limits allow, and less for a while after one ran out of memory."""

# steps that must go well before a shrunk budget doubles: a try that fails costs one step in so many
RECOVERY_STEPS = 64


class StepBudget:
    """num_tokens, num_seqs: the most of a step. Both halve where one was too large, and double when steps go well.

    A step of one sequence was too large by its tokens alone.
    """

    def __init__(self, num_tokens: int, num_seqs: int, min_tokens: int) -> None:
        """min_tokens: the fewest that one sequence can be given, its chunk where prompts are cut at fixed places."""
        self.num_tokens, self.num_seqs = num_tokens, num_seqs
        self._full = (num_tokens, num_seqs)
        self._min_tokens = min_tokens
        self._num_good_steps = 0
        # no step takes what it could do without while this is so
        self.is_reduced = False

    def shrink(self, num_tokens: int, num_seqs: int, num_drafted: int) -> bool:
        """After a step of so many ran out of memory. False when none can be smaller: one sequence, and its least.

        num_drafted: those of the tokens that were guesses, which are left out first.
        """
        if num_seqs == 1 and num_tokens <= self._min_tokens and num_drafted == 0:
            return False
        self.is_reduced = True
        self.num_tokens = max(num_tokens // 2, self._min_tokens)
        # room for one token of each but the last, and the least for that: whoever decodes beside it, a prompt goes on
        roomy = self.num_tokens - self._min_tokens + 1
        self.num_seqs = min(num_seqs // 2 if num_seqs > 1 else self.num_seqs, roomy)
        self._num_good_steps = 0
        return True

    def note_success(self) -> None:
        if not self.is_reduced:
            return
        self._num_good_steps += 1
        if self._num_good_steps == RECOVERY_STEPS:
            self._num_good_steps = 0
            self.num_tokens = min(2 * self.num_tokens, self._full[0])
            self.num_seqs = min(2 * self.num_seqs, self._full[1])
            self.is_reduced = (self.num_tokens, self.num_seqs) != self._full
