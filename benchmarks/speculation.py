"""Decode speed with guesses (num_speculative_tokens) beside that without: on text that repeats, and on noise."""

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import CACHE, announce, positive_number, run_to_exit_code, writable_file
from benchmarks.comparison import Spread
from benchmarks.demo_checkpoint import find_gguf, prepare_checkpoint
from benchmarks.errors import BenchmarkError
from benchmarks.json_file import write_json
from benchmarks.machine import measure_busy_cores, usable_cores
from benchmarks.turn import take_turn
from benchmarks.workload import TOKEN_IDS
from server.engine.assembly import SETUP_ERRORS, assemble_engine
from server.engine.config import EngineConfig
from server.engine.request import EngineNews, EngineStats, GenerationRequest, SamplingParams
from server.model.loader import ignore_load_progress

DEFAULT_ROUNDS = 5
DEFAULT_TOKENS = 128
PHRASE_TOKENS, NUM_PHRASES = 32, 4
# so few that every pair of them soon has been said, so many that what followed it then seldom follows again
NUM_NOISE_TOKENS = 32
CAVEAT = "Medians and (lowest..highest) of the rounds; above a ratio of 1, guessing is faster."


@dataclass(frozen=True)
class Scenario:
    """num_sequences requests of one kind at once. is_noise: the model says tokens of a small set at random."""

    name: str
    num_sequences: int
    is_noise: bool

    def draw(self, round_name: str, num_tokens: int) -> list[GenerationRequest]:
        """The requests of one round: new ones in each, the same for both sides."""
        source = random.Random(f"{self.name}, {round_name}")
        return [self._request(source, f"{round_name}-{index}", num_tokens) for index in range(self.num_sequences)]

    def _request(self, source: random.Random, request_id: str, num_tokens: int) -> GenerationRequest:
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        if not self.is_noise:
            # a model goes on with a phrase that it has read several times
            phrase = source.sample(TOKEN_IDS, PHRASE_TOKENS)
            return GenerationRequest(request_id, tuple(phrase * NUM_PHRASES), params)
        words = source.sample(TOKEN_IDS, NUM_NOISE_TOKENS)
        bias = tuple((word, 100.0) for word in words)
        params = replace(params, temperature=6.0, seed=source.randrange(2**32), logit_bias=bias)
        return GenerationRequest(request_id, tuple(source.choices(words, k=PHRASE_TOKENS * NUM_PHRASES)), params)


SCENARIOS = (
    Scenario("a phrase that repeats", 1, is_noise=False),
    Scenario("a phrase that repeats, 8 sequences", 8, is_noise=False),
    Scenario("noise", 1, is_noise=True),
    Scenario("noise, 8 sequences", 8, is_noise=True),
)


class GuessingEngine:
    """The engine's loop in this process, with so many guesses a step, or none."""

    def __init__(
        self, checkpoint: Path, num_threads: int, num_speculative_tokens: int, draft_model: Path | None = None
    ) -> None:
        """Raises BenchmarkError when the checkpoint cannot be loaded."""
        config = EngineConfig(
            str(checkpoint),
            device="cpu",
            max_model_len=2048,
            max_num_seqs=8,
            num_threads=num_threads,
            prefix_caching=False,
            num_speculative_tokens=num_speculative_tokens,
            draft_model_path=None if draft_model is None else str(draft_model),
        )
        self._outputs: dict[str, list[int]] = {}
        self.stats: EngineStats | None = None
        try:
            self._loop, self.model = assemble_engine(config, ignore_load_progress, self._take)
        except SETUP_ERRORS as error:
            raise BenchmarkError(f"the engine cannot load {checkpoint}: {error}") from error
        gc.collect()
        gc.freeze()

    def run(self, requests: Sequence[GenerationRequest]) -> tuple[float, list[list[int]]]:
        """Seconds from the first step after which all have a token to the end of the last, and all outputs."""
        self._outputs = {request.request_id: [] for request in requests}
        for request in requests:
            self._loop.submit(request)
        while not all(self._outputs.values()):
            self._loop.step()
        start = time.perf_counter()
        while self._loop.has_work:
            self._loop.step()
        return time.perf_counter() - start, list(self._outputs.values())

    def _take(self, news: EngineNews) -> None:
        self.stats = news.stats
        for event in news.events:
            if event.error is not None:
                raise BenchmarkError(f"the engine failed a request: {event.error}")
            self._outputs[event.request_id].extend(event.token_ids)


@dataclass
class Measured:
    """One scenario's seconds, a round each, and what was guessed in all of them."""

    scenario: Scenario
    num_tokens: int
    guessing_seconds: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def ratio(self) -> Spread:
        """Speed with guesses over speed without, of each round."""
        return Spread.of([b / a for a, b in zip(self.guessing_seconds, self.plain_seconds, strict=True)])

    def speed(self, seconds: Sequence[float]) -> Spread:
        """Tokens per second."""
        num_tokens = self.scenario.num_sequences * (self.num_tokens - 1)
        return Spread.of([num_tokens / one for one in seconds])

    @property
    def acceptance(self) -> str:
        return f"{self.num_accepted} of {self.num_drafted}"

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "ratio": asdict(self.ratio)}


def measure(
    guessing: GuessingEngine, plain: GuessingEngine, rounds: int, num_tokens: int, say: Callable[[str], None]
) -> list[Measured]:
    """Both sides in turn, never together, and by turns first. Raises BenchmarkError when their outputs differ."""
    measured = [Measured(scenario, num_tokens) for scenario in SCENARIOS]
    for scenario in SCENARIOS:
        for engine in (guessing, plain):
            engine.run(scenario.draw("warm-up", 8))
    for index in range(rounds):
        say(f"round {index + 1} of {rounds}")
        for one in measured:
            requests = one.scenario.draw(f"round {index}", num_tokens)
            before = _counts(guessing)
            # what slows the machine down must not always meet the same side
            sides = (guessing, plain) if index % 2 else (plain, guessing)
            found = {engine: engine.run(requests) for engine in sides}
            if found[guessing][1] != found[plain][1]:
                raise BenchmarkError(f"{one.scenario.name}: with guesses the output is another one than without")
            one.guessing_seconds.append(found[guessing][0])
            one.plain_seconds.append(found[plain][0])
            after = _counts(guessing)
            one.num_drafted += after[0] - before[0]
            one.num_accepted += after[1] - before[1]
    return measured


def _counts(engine: GuessingEngine) -> tuple[int, int]:
    assert engine.stats is not None
    return engine.stats.draft_tokens, engine.stats.accepted_tokens


def render(measured: Sequence[Measured], num_speculative_tokens: int) -> Table:
    title = f"SmolLM2-135M-Instruct, up to {num_speculative_tokens} guesses a step"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("tokens per second")
    for name in ("without", "with", "ratio", "accepted"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in measured:
        speeds = [one.speed(seconds).render(decimals=0) for seconds in (one.plain_seconds, one.guessing_seconds)]
        table.add_row(one.scenario.name, *speeds, one.ratio.render(decimals=2), one.acceptance)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return run_to_exit_code(lambda: measure_and_print(options))


def measure_and_print(options: argparse.Namespace) -> None:
    """The table on the terminal, and its figures in a file where one is asked for."""
    with take_turn(CACHE, announce):
        checkpoint = prepare_checkpoint(find_gguf(), CACHE / "models", announce)
        announce("loading both sides")
        guessing = GuessingEngine(checkpoint, options.threads, options.speculative_tokens, options.draft_model)
        plain = GuessingEngine(checkpoint, options.threads, 0)
        busy = measure_busy_cores()
        measured = measure(guessing, plain, options.rounds, options.tokens, announce)
    Console().print(render(measured, options.speculative_tokens))
    print(f"{CAVEAT}\n{guessing.model.kernels}; other programs kept {busy:.1f} cores busy before")
    if options.json is not None:
        write_json(options.json, {"scenarios": [one.to_json() for one in measured]})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=__doc__)
    parser.add_argument("--rounds", type=positive_number, default=DEFAULT_ROUNDS, help="default: %(default)s")
    parser.add_argument("--threads", type=positive_number, default=min(2, usable_cores()), help="default: %(default)s")
    parser.add_argument(
        "--tokens", type=positive_number, default=DEFAULT_TOKENS, help="of each answer; default: %(default)s"
    )
    parser.add_argument(
        "--speculative-tokens", type=positive_number, default=8, help="guesses a step; default: %(default)s"
    )
    parser.add_argument("--draft-model", type=Path, help="a checkpoint that guesses; without: prompt look-up")
    parser.add_argument("--json", type=writable_file, help="a file for the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
