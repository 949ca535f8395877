"""How many draft tokens are worth a place in the step: what of them is accepted, against what their rows cost."""

from dataclasses import dataclass

# one guess in so many decides about the estimate: few, as a text turns from repeating to not repeating at once
_MEMORY = 4
_FIRST_ESTIMATE = 0.5
# what trying again may cost, in parts of a step, where nothing is accepted
_TRIAL_COST = 0.03


@dataclass(frozen=True)
class DraftCost:
    """In parts of a step. guess: of one more guess for each sequence. pause: what each step without guesses adds to
    the cost of the next guess, as a draft model has to compute what was said meanwhile.
    """

    guess: float
    pause: float = 0.0


@dataclass(frozen=True)
class Speculation:
    """A step verifies up to num_tokens guesses at what comes next of each sequence, where that pays.

    row_cost: what a second row adds to a step of one, as a part of that step. draft_cost: what a step of one takes of
    a model that guesses, as a part of a step of the model that it guesses for; 0 where guesses are looked up.
    """

    num_tokens: int
    row_cost: float
    draft_cost: float = 0.0

    def relative_cost(self, num_sequences: int, num_rows: int) -> DraftCost:
        """What one more guess for each of num_sequences adds to a step of num_rows, in parts of that step.

        The model: each row takes row_cost, and the rest of a step of one is the weights', which all rows share. So the
        more sequences there are, the less there is to gain. A step of a model that guesses is like it, but smaller.
        """
        step = 1 + self.row_cost * (num_rows - 1)
        draft_step = self.draft_cost * (1 + self.row_cost * (num_sequences - 1))
        return DraftCost(
            guess=(self.row_cost * num_sequences + draft_step) / step,
            # sequences try again one by one
            pause=self.draft_cost * self.row_cost / step,
        )


class DraftLength:
    """One sequence's moving estimate of the part of guesses that come true, each given that those before it did."""

    def __init__(self) -> None:
        self._acceptance = _FIRST_ESTIMATE
        self._num_steps_without = 0

    def choose(self, longest: int, cost: DraftCost) -> int:
        """The length that gives most tokens for a step's time, 0 .. longest; cost: `Speculation.relative_cost`.

        Where the best is none, one guess is tried so seldom that it costs next to nothing, and never where that is
        not seldom enough.
        """
        best, best_speed = 0, 1.0
        expected, probability = 1.0, 1.0
        for length in range(1, longest + 1):
            probability *= self._acceptance
            expected += probability
            speed = expected / (1 + cost.guess * length)
            if speed <= best_speed:
                # each guess is worth less than the one before it, and costs as much
                break
            best, best_speed = length, speed
        if best:
            return best
        self._num_steps_without += 1
        return int(self._num_steps_without * (_TRIAL_COST - cost.pause) >= cost.guess and longest > 0)

    def note(self, num_drafted: int, num_accepted: int) -> None:
        """Of a draft of so many, so many came true: the first ones, as nothing after a wrong one counts."""
        self._num_steps_without = 0
        for _ in range(num_accepted):
            self._acceptance += (1 - self._acceptance) / _MEMORY
        if num_accepted < num_drafted:
            self._acceptance -= self._acceptance / _MEMORY
