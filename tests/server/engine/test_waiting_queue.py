"""Who starts next: by priority, then in turns between owners, then in order; and nobody is passed without end."""

from collections import Counter

import pytest

from server.engine.request import GenerationRequest, SamplingParams
from server.engine.sequence import Sequence
from server.engine.waiting_queue import OVERTAKING_BOUND, WaitingQueue


def sequence(name: str, owner: str = "", priority: int = 0) -> Sequence:
    return Sequence(GenerationRequest(name, (1,), SamplingParams(max_tokens=1), priority=priority, owner=owner), 4)


def start_next(queue: WaitingQueue, num_tokens: int = 0) -> str:
    """Start whoever is next, and compute so many tokens for it."""
    first = queue.first()
    queue.start(first)
    queue.charge({first: num_tokens})
    return first.request_id


def start_all(queue: WaitingQueue, num_tokens: int = 0) -> list[str]:
    return [start_next(queue, num_tokens) for _ in range(len(queue))]


def test_those_of_one_owner_and_priority_start_in_the_order_they_came() -> None:
    queue = WaitingQueue()
    for name in "abcde":
        queue.add(sequence(name))
    assert start_all(queue, 7) == list("abcde")


def test_lower_priorities_start_first() -> None:
    queue = WaitingQueue()
    for name, priority in (("batch", 5), ("plain", 0), ("urgent", -2), ("second", 0), ("also urgent", -2)):
        queue.add(sequence(name, priority=priority))
    assert start_all(queue) == ["urgent", "also urgent", "plain", "second", "batch"]


def test_a_preempted_one_is_the_first_of_its_priority_whoever_else_waits() -> None:
    queue = WaitingQueue()
    queue.add(sequence("preempted", owner="greedy", priority=1))
    start_next(queue, num_tokens=1000)
    for name, priority in (("waits", 1), ("urgent", 0)):
        queue.add(sequence(name, "other", priority))
    queue.put_back(sequence("preempted", owner="greedy", priority=1))
    assert start_all(queue) == ["urgent", "preempted", "waits"]


def test_two_that_are_preempted_keep_their_order() -> None:
    queue = WaitingQueue()
    sequences = [sequence(name) for name in "ab"]
    for one in sequences:
        queue.add(one)
    start_all(queue)
    # the last that runs yields first
    for one in reversed(sequences):
        queue.put_back(one)
    assert [one.request_id for one in queue] == ["a", "b"]
    assert start_all(queue) == ["a", "b"]


def test_who_sends_one_waits_for_one_of_who_sends_a_hundred() -> None:
    queue = WaitingQueue()
    for index in range(100):
        queue.add(sequence(f"flood {index}", owner="flood"))
    queue.add(sequence("single", owner="single"))
    assert [start_next(queue, 10), start_next(queue, 10)] == ["flood 0", "single"]


def test_owners_share_tokens_and_not_requests() -> None:
    queue = WaitingQueue()
    # given one whose requests take five times as much
    for index in range(120):
        queue.add(sequence(f"long {index}", owner="long"))
        queue.add(sequence(f"short {index}", owner="short"))
    started = Counter(start_next(queue, 50 if queue.first().request.owner == "long" else 10) for _ in range(60))
    num_long = sum(name.startswith("long") for name in started)
    assert num_long == 10


def test_turns_are_not_saved_up_while_idle() -> None:
    queue = WaitingQueue()
    for index in range(100):
        queue.add(sequence(f"busy {index}", owner="busy"))
    # another owner is known from the beginning, so what the busy one gets is counted
    queue.add(sequence("idle", owner="idle"))
    for _ in range(50):
        start_next(queue, 10)
    # when the idle one comes back after 49 turns of the busy one, they take turns from there
    for index in range(50):
        queue.add(sequence(f"back {index}", owner="idle"))
    owners = [start_next(queue, 10).split()[0] for _ in range(20)]
    assert Counter(owners) == {"busy": 10, "back": 10}


def test_turns_between_owners_are_taken_within_a_priority() -> None:
    queue = WaitingQueue()
    for index in range(4):
        queue.add(sequence(f"urgent {index}", owner="greedy", priority=0))
        queue.add(sequence(f"plain {index}", owner="modest", priority=1))
    assert [start_next(queue, 10).split()[0] for _ in range(8)] == ["urgent"] * 4 + ["plain"] * 4


@pytest.mark.parametrize(("owner", "priority"), [("", -1), ("other", 0), ("other", -1)])
def test_so_many_may_pass_and_then_the_oldest_is_next(owner: str, priority: int) -> None:
    queue = WaitingQueue()
    # given one that waits whose owner has had far more than the others, or that is less urgent
    had_much = sequence("had much", owner="first")
    queue.add(had_much)
    queue.start(had_much)
    queue.add(sequence("older", owner, priority))
    queue.charge({had_much: 10**9})
    queue.add(sequence("patient", owner="first"))
    # when others come without end
    started = []
    while "patient" not in started and len(started) < 1000:
        queue.add(sequence(f"later {len(started)}", owner, priority))
        started.append(start_next(queue))
    # then it was passed as often as is allowed, where turns and priorities alone would have made it wait for ever
    assert started == ["older", *(f"later {index}" for index in range(OVERTAKING_BOUND)), "patient"]


def test_a_backlog_that_is_passed_gets_one_start_in_so_many() -> None:
    queue = WaitingQueue()
    for index in range(10):
        queue.add(sequence(f"batch {index}", priority=9))
    started = []
    for index in range(5 * (OVERTAKING_BOUND + 1)):
        queue.add(sequence(f"urgent {index}"))
        started.append(start_next(queue))
    assert [name for name in started if name.startswith("batch")] == [f"batch {index}" for index in range(5)]


def test_who_leaves_is_forgotten() -> None:
    queue = WaitingQueue()
    sequences = [sequence(f"{owner} {priority}", owner, priority) for owner in "ab" for priority in (0, 1)]
    for one in sequences:
        queue.add(one)
    for one in sequences[1:]:
        queue.remove(one)
    assert start_all(queue) == ["a 0"]
    assert len(queue) == 0
