"""Decoding steps replayed from a recording, on a tape that keeps to the rules of CUDA graphs.

The decoder is one of whole numbers, so that tokens can be compared to the last; the real one, on interpreted kernels,
is in test_graph_parity.py.
"""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from server.engine.decode_graphs import DecodeGraphs
from server.engine.graph_recorder import Replay
from server.engine.graph_sizes import GraphSize, graph_sizes
from server.engine.model_runner import ModelRunner
from server.engine.request import FinishReason, GenerationRequest, SamplingParams
from server.engine.scheduler import SchedulerLimits
from server.engine.step_plan import StepPlan, StepResult
from tests.fakes import FAKE_VOCAB_SIZE
from tests.server.engine.counting_decoder import CountingDecoder, next_token, number_cache
from tests.server.engine.crowd import serve_crowd
from tests.server.engine.simulation import MAX_MODEL_LEN, Simulation
from tests.server.engine.tape import CaptureError, Tape

BLOCK_SIZE = 4
SIZES = tuple(GraphSize(num_seqs, length) for num_seqs in (8, 4, 2, 1) for length in (MAX_MODEL_LEN, 16))


class EagerRunner:
    """The engine's runner around the decoder of whole numbers; the last block of its cache is given to nobody."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.memory_tokens: int | None = None
        self.layers = (number_cache(num_blocks + 1, block_size),)
        self.runner = self.build(num_blocks)
        self.num_decode_steps = 0

    def build(self, num_blocks: int) -> ModelRunner:
        return ModelRunner(CountingDecoder(), self.layers)

    def execute(self, plan: StepPlan) -> StepResult:
        if self.memory_tokens is not None and len(plan.token_ids) > self.memory_tokens:
            raise torch.OutOfMemoryError
        self.num_decode_steps += len(plan.token_ids) == len(plan.context_lens)
        return self.runner.execute(plan)


class GraphRunner(EagerRunner):
    """The same with graphs."""

    decoder_type = CountingDecoder

    def build(self, num_blocks: int) -> ModelRunner:
        decoder = self.decoder_type()
        self.tape = Tape()
        graphs = DecodeGraphs(decoder, self.layers, SIZES, num_blocks, self.tape)
        assert graphs.record(lambda done, of: None) == ()
        return ModelRunner(decoder, self.layers, graphs=graphs)


def expected_output(request: GenerationRequest) -> tuple[int, ...]:
    params, output = request.sampling, list[int]()
    while len(output) < params.max_tokens:
        token = next_token((*request.prompt_token_ids, *output))
        while len(output) < params.min_tokens and token in params.stop_token_ids:
            token = (token + 1) % FAKE_VOCAB_SIZE
        output.append(token)
        if token in params.stop_token_ids and len(output) > params.min_tokens:
            break
    return tuple(output)


@pytest.mark.parametrize(
    ("seed", "num_blocks", "limits"),
    [
        (0, 15, SchedulerLimits(8, 24)),  # the cache holds one full request: preemption all the time
        (1, 40, SchedulerLimits(8, 40)),
        (2, 40, SchedulerLimits(8, 8, prefill_chunk=1)),  # prompts token by token, beside what decodes
        (3, 60, SchedulerLimits(16, 64)),  # more sequences than the largest graph has room for
    ],
)
def test_a_crowd_gets_the_tokens_that_each_of_it_gets_alone(
    seed: int, num_blocks: int, limits: SchedulerLimits
) -> None:
    engine = Simulation(num_blocks, BLOCK_SIZE, limits, runner_type=GraphRunner)
    # aborts, deadlines, common beginnings, a device that runs short of memory
    journeys = serve_crowd(engine, random.Random(seed), 400)

    assert engine.pool.num_free == num_blocks
    for journey in journeys:
        output, expected = engine.output(journey.request.request_id), expected_output(journey.request)
        assert output == expected[: len(output)]
        assert journey.finish_reason is not FinishReason.ERROR
        if journey.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert output == expected
    replays, steps = engine.runner.tape.num_replays, engine.runner.num_decode_steps
    assert replays == steps if limits.max_num_seqs == 8 else 0 < replays < steps


@pytest.mark.parametrize("max_rows_together", [None, 3])
def test_seeded_requests_get_the_tokens_that_they_get_without_graphs(max_rows_together: int | None) -> None:
    params = SamplingParams(max_tokens=12, temperature=4000.0, top_p=0.9, repetition_penalty=1.1, logprobs=2)
    requests = [
        GenerationRequest(f"r{index}", tuple(range(index + 1)), replace(params, seed=index, max_tokens=4 + index))
        for index in range(7)
    ]
    events = []
    for runner_type in (EagerRunner, GraphRunner):
        engine = Simulation(60, BLOCK_SIZE, SchedulerLimits(8, 40), runner_type=runner_type)
        # several recordings in one step, as a deterministic engine has them
        engine.runner.runner._max_rows_together = max_rows_together
        for request in requests:
            engine.loop.submit(request)
        engine.run_to_end()
        events.append(engine.events)
    assert events[0] == events[1]
    assert engine.runner.tape.num_replays > engine.runner.num_decode_steps // 2


def decode_plan(texts: dict[tuple[int, ...], list[int]]) -> StepPlan:
    """A step that decodes the last token of each text, which is in these blocks."""
    lens = [len(text) for text in texts]
    width = max(map(len, texts.values()))
    return StepPlan(
        request_ids=tuple(map(str, range(len(texts)))),
        token_ids=np.array([text[-1] for text in texts], dtype=np.int64),
        positions=np.array(lens, dtype=np.int64) - 1,
        query_starts=np.arange(len(texts) + 1, dtype=np.int32),
        context_lens=np.array(lens, dtype=np.int32),
        block_tables=np.array([[*blocks, *[0] * (width - len(blocks))] for blocks in texts.values()], dtype=np.int32),
        sampling_rows=(),
    )


def test_padding_changes_no_block_that_a_sequence_may_have() -> None:
    # given a cache where every slot holds something, and three sequences for a recording of four
    layer = number_cache(9, BLOCK_SIZE)
    layer.keys.copy_(torch.arange(36, dtype=torch.float64).view(layer.keys.shape))
    before = layer.keys.clone()
    graphs = DecodeGraphs(CountingDecoder(), (layer,), (GraphSize(4, 16),), 8, Tape())
    graphs.record(lambda done, of: None)
    plan = decode_plan({(1, 2, 3): [5], (4, 5, 6, 7, 8, 9): [0, 7], (3,): [2]})

    hidden = graphs.forward(plan, range(3))

    # then the three tokens' slots have changed, and the block that is nobody's
    assert hidden is not None
    assert len(hidden) == 3
    changed = (layer.keys != before).flatten().nonzero()[:, 0].tolist()
    assert set(changed) - set(range(32, 36)) <= {5 * 4 + 2, 7 * 4 + 1, 2 * 4}
    assert {5 * 4 + 2, 7 * 4 + 1, 2 * 4} <= set(changed)


def test_hidden_states_outlive_the_next_step() -> None:
    layer = number_cache(9, BLOCK_SIZE)
    graphs = DecodeGraphs(CountingDecoder(), (layer,), (GraphSize(1, 16),), 8, Tape())
    graphs.record(lambda done, of: None)
    first = graphs.forward(decode_plan({(1,): [0]}), range(1))
    second = graphs.forward(decode_plan({(2,): [1]}), range(1))
    assert (first.item(), second.item()) == (next_token((1,)), next_token((2,)))


@pytest.mark.parametrize(
    "change",
    [
        {"adapters": ("mine", "")},
        {"query_starts": np.array([0, 1, 3], dtype=np.int32)},
        {"context_lens": np.array([17, 1], dtype=np.int32)},
    ],
)
def test_a_step_that_is_no_recorded_one_runs_without(change: dict[str, object]) -> None:
    layer = number_cache(9, BLOCK_SIZE)
    graphs = DecodeGraphs(CountingDecoder(), (layer,), (GraphSize(2, 16),), 8, Tape())
    graphs.record(lambda done, of: None)
    plan = decode_plan({(1,): [0], (2,): [1]})
    assert graphs.forward(plan, range(2)) is not None
    assert graphs.forward(replace(plan, **change), range(2)) is None


class MemoryFor:
    """A recorder on a device that has memory for so few recordings, and none for larger ones."""

    def __init__(self, num_recordings: int, *, is_broken: bool) -> None:
        self.num_recordings = num_recordings
        self.is_broken = is_broken
        self.tape = Tape()

    def record(self, run: Callable[[], None]) -> Replay:
        if not self.num_recordings:
            try:
                raise torch.OutOfMemoryError
            finally:
                # a recording that is ended early may end with this
                if self.is_broken:
                    raise RuntimeError("operation failed due to a previous error during capture")
        self.num_recordings -= 1
        return self.tape.record(run)


@pytest.mark.parametrize("is_broken", [False, True])
def test_sizes_that_there_is_no_memory_for_are_told_and_the_others_used(*, is_broken: bool) -> None:
    layer = number_cache(9, BLOCK_SIZE)
    sizes = (GraphSize(4, 16), GraphSize(2, 16), GraphSize(1, 16))
    graphs = DecodeGraphs(CountingDecoder(), (layer,), sizes, 8, MemoryFor(1, is_broken=is_broken))
    told: list[tuple[int, int]] = []

    missing = graphs.record(lambda done, of: told.append((done, of)))

    assert missing == (GraphSize(2, 16), GraphSize(1, 16))
    assert told == [(1, 3), (2, 3), (3, 3)]
    hidden = graphs.forward(decode_plan({(8,): [3]}), range(1))
    assert hidden.item() == next_token((8,))


class CountsItsSteps(CountingDecoder):
    """What it computes depends on a number of the host's that changes from step to step."""

    num_steps = 0

    def forward(self, *operands: object) -> torch.Tensor:
        self.num_steps += 1
        return super().forward(*operands) + self.num_steps % 2


class WaitsForTheDevice(CountingDecoder):
    """How much it computes depends on a number of the device's."""

    def forward(self, token_ids: torch.Tensor, *operands: object) -> torch.Tensor:
        return super().forward(token_ids, *operands) + int(token_ids.max()) * 0


class ReadsAList(CountingDecoder):
    def forward(self, token_ids: torch.Tensor, *operands: object) -> torch.Tensor:
        return super().forward(token_ids, *operands) * len(token_ids.tolist())


class BringsHostData(CountingDecoder):
    def forward(self, token_ids: torch.Tensor, *operands: object) -> torch.Tensor:
        return super().forward(token_ids, *operands) + torch.tensor([0.0])


class PicksByMask(CountingDecoder):
    def forward(self, token_ids: torch.Tensor, *operands: object) -> torch.Tensor:
        hidden = super().forward(token_ids, *operands)
        return hidden[hidden[:, 0] >= 0]


def test_the_tape_repeats_a_number_of_the_hosts_as_a_cuda_graph_would() -> None:
    # what makes the comparisons above mean something: a decoder that no graph can hold gives other tokens
    class Runner(GraphRunner):
        decoder_type = CountsItsSteps

    engine = Simulation(60, BLOCK_SIZE, SchedulerLimits(8, 40), runner_type=Runner)
    engine.loop.submit(GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=20, temperature=0.0)))
    engine.run_to_end()
    eager = Simulation(60, BLOCK_SIZE, SchedulerLimits(8, 40), runner_type=EagerRunner)
    eager.runner.runner._decoder = CountsItsSteps()
    eager.loop.submit(GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=20, temperature=0.0)))
    eager.run_to_end()
    assert engine.output("r") != eager.output("r")


@pytest.mark.parametrize("decoder_type", [WaitsForTheDevice, ReadsAList, BringsHostData, PicksByMask])
def test_the_tape_refuses_what_a_cuda_graph_cannot_hold(decoder_type: type[CountingDecoder]) -> None:
    graphs = DecodeGraphs(decoder_type(), (number_cache(9, BLOCK_SIZE),), (GraphSize(2, 16),), 8, Tape())
    with pytest.raises(CaptureError):
        graphs.record(lambda done, of: None)


def test_sizes_reach_every_batch_and_context_and_come_largest_first() -> None:
    sizes = graph_sizes(max_num_seqs=20, max_model_len=10_000)
    assert sizes[0] == GraphSize(20, 10_000)
    assert sizes[-1] == GraphSize(1, 2048)
    assert {size.num_seqs for size in sizes} == {1, 2, 4, 8, 16, 20}
    assert {size.context_len for size in sizes} == {2048, 8192, 10_000}
    assert len(sizes) == 18
    # steps of so many are left to be launched one by one
    assert graph_sizes(max_num_seqs=1000, max_model_len=100)[0] == GraphSize(256, 100)
