"""Who is urgent starts first and yields last; owners take turns; what has begun is not cut short for either."""

from dataclasses import replace

from server.engine.request import GenerationRequest
from server.engine.scheduler import PREEMPTION_BOUND
from tests.fakes import expected_output
from tests.server.engine.simulation import Simulation, request, simulation


def with_priority(name: str, priority: int, num_prompt: int = 5, max_tokens: int = 6) -> GenerationRequest:
    return replace(request(name, num_prompt, max_tokens), priority=priority)


def preempted_in_a_step(engine: Simulation) -> list[str]:
    before = {sequence: sequence.num_preemptions for sequence in engine.scheduler._running}
    engine.loop.step()
    return [sequence.request_id for sequence, count in before.items() if sequence.num_preemptions > count]


def test_the_more_urgent_start_first() -> None:
    engine = simulation(max_num_seqs=1)
    for name, priority in (("running", 9), ("batch", 3), ("plain", 0), ("urgent", -1)):
        engine.loop.submit(with_priority(name, priority))
        if name == "running":
            engine.loop.step()
    engine.run_to_end()
    # what runs goes on: nothing is thrown away for a place
    assert engine.started == ["running", "urgent", "plain", "batch"]
    assert engine.scheduler.stats().num_preemptions == 0


def test_the_least_urgent_yields_though_it_came_first() -> None:
    # given a batch job that started before three others, in a cache that holds not much more than one
    engine = simulation(num_blocks=18, max_num_seqs=4)
    engine.loop.submit(with_priority("batch", 5, num_prompt=3, max_tokens=50))
    engine.loop.step()
    for index in range(3):
        engine.loop.submit(with_priority(f"plain {index}", 0, num_prompt=3, max_tokens=50))
    victims: list[str] = []
    while not any(name.startswith("plain") for name in victims):
        victims += preempted_in_a_step(engine)
    # then it yields as long as it runs, and after it, of those alike, the one that started last
    assert victims == [*["batch"] * (len(victims) - 1), "plain 2"]
    assert "batch" in victims
    engine.run_to_end()
    for name in ("batch", "plain 0", "plain 1", "plain 2"):
        assert engine.output(name) == expected_output(request("", 3, 50))


def test_the_least_urgent_is_not_recomputed_for_ever() -> None:
    engine = simulation(num_blocks=16, max_num_seqs=3)
    engine.loop.submit(with_priority("batch", 5, num_prompt=3, max_tokens=55))
    num_urgent = num_preempted = 0
    # given urgent ones without end, each of which wants most of the cache
    while "batch" not in engine.ended:
        if engine.scheduler.stats().num_waiting < 2:
            engine.loop.submit(with_priority(f"urgent {num_urgent}", 0, num_prompt=3, max_tokens=40))
            num_urgent += 1
        num_preempted += preempted_in_a_step(engine).count("batch")
        assert num_urgent < 500
    assert num_preempted >= PREEMPTION_BOUND
    assert engine.output("batch") == expected_output(request("", 3, 55))


def test_owners_take_turns_at_what_becomes_free() -> None:
    engine = simulation(num_blocks=40, max_num_seqs=2)
    for index in range(10):
        engine.loop.submit(replace(request(f"flood {index}"), owner="flood"))
    engine.loop.step()
    for index in range(3):
        engine.loop.submit(replace(request(f"modest {index}"), owner="modest"))
    engine.run_to_end()
    # two of the flood had started; then it gets one place of two, though all of it came first
    assert [name.split()[0] for name in engine.started[2:8]].count("modest") == 3
