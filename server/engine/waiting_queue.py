"""The order in which requests start: by priority, within one in turns between owners, and nobody waits for ever."""

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping

from server.engine.sequence import Sequence

# after so many that were let past it, the request that came first of all that wait is next
OVERTAKING_BOUND = 32


class _PriorityLevel:
    """Those of one priority that wait: who was preempted before all others, then each owner's in their order."""

    def __init__(self) -> None:
        self.returned: deque[Sequence] = deque()
        self.by_owner: dict[str, OrderedDict[Sequence, None]] = {}

    @property
    def is_empty(self) -> bool:
        return not self.returned and not self.by_owner

    def add(self, sequence: Sequence) -> None:
        self.by_owner.setdefault(sequence.request.owner, OrderedDict())[sequence] = None

    def first(self, served: Mapping[str, int]) -> Sequence:
        if self.returned:
            return self.returned[0]
        # of those served alike, the one who has waited longer for a turn: dictionaries keep that order
        owner = min(self.by_owner, key=served.__getitem__) if len(self.by_owner) > 1 else next(iter(self.by_owner))
        return next(iter(self.by_owner[owner]))

    def remove(self, sequence: Sequence) -> None:
        owner = sequence.request.owner
        if sequence not in self.by_owner.get(owner, ()):
            self.returned.remove(sequence)
            return
        del self.by_owner[owner][sequence]
        if not self.by_owner[owner]:
            del self.by_owner[owner]


class WaitingQueue:
    """Sequences that wait, preempted ones included. The first is the one to start, and nobody passes it for fitting.

    Fairness is a virtual token counter (Sheng et al., OSDI 2024): of the owners that wait at the most urgent priority,
    the one for whom fewest tokens were computed is next. Whoever begins to wait starts at the level of those who do,
    so nobody saves up turns while idle. Owners are few (one an API key), and forgotten when nothing is under way.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _PriorityLevel] = {}
        self._priorities: list[int] = []
        # in the order they came, as `arrival` counts it
        self._by_arrival: list[Sequence] = []
        self._num_arrived = 0
        # how many started while somebody who came before them waits
        self._num_let_past = 0
        # tokens computed for each owner, counted from an arbitrary level
        self._served: dict[str, int] = {}
        self._last_owner = ""

    def __len__(self) -> int:
        return len(self._by_arrival)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_arrival)

    def add(self, sequence: Sequence) -> None:
        """Take in a new request."""
        level = self._level_of(sequence)
        self._lift(sequence.request.owner, level)
        level.add(sequence)
        self._by_arrival.append(sequence)
        sequence.arrival = self._num_arrived
        self._num_arrived += 1

    def put_back(self, sequence: Sequence) -> None:
        """Take in one that was preempted: it is the first of its priority."""
        self._level_of(sequence).returned.appendleft(sequence)
        insort(self._by_arrival, sequence, key=_arrival)

    def first(self) -> Sequence:
        """The one to start next. There must be one."""
        if self._num_let_past >= OVERTAKING_BOUND:
            return self._by_arrival[0]
        return self._levels[self._priorities[0]].first(self._served)

    def start(self, sequence: Sequence) -> None:
        """Take out the first, which starts."""
        self._num_let_past = 0 if sequence is self._by_arrival[0] else self._num_let_past + 1
        self._last_owner = sequence.request.owner
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        priority = sequence.request.priority
        self._levels[priority].remove(sequence)
        if self._levels[priority].is_empty:
            del self._levels[priority]
            self._priorities.remove(priority)
        del self._by_arrival[bisect_left(self._by_arrival, sequence.arrival, key=_arrival)]

    def charge(self, num_tokens: Mapping[Sequence, int]) -> None:
        """Note what a step computes for each owner. With one owner there is nothing to compare."""
        if len(self._served) > 1:
            for sequence, count in num_tokens.items():
                self._served[sequence.request.owner] += count

    def forget_owners(self) -> None:
        """Nothing is under way: whoever comes next starts afresh."""
        self._served.clear()

    def _level_of(self, sequence: Sequence) -> _PriorityLevel:
        priority = sequence.request.priority
        if priority not in self._levels:
            self._levels[priority] = _PriorityLevel()
            insort(self._priorities, priority)
        return self._levels[priority]

    def _lift(self, owner: str, level: _PriorityLevel) -> None:
        """Before an owner begins to wait at a level: take away the turns that it did not use."""
        if owner in level.by_owner:
            return
        floor = (
            min(self._served[other] for other in level.by_owner)
            if level.by_owner
            else self._served.get(self._last_owner, 0)
        )
        self._served[owner] = max(self._served.get(owner, 0), floor)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
