"""Tokens of tiny models from the whole engine, without graphs and with, on interpreted Triton kernels: a program.

`python -m tests.server.engine.graph_tokens DIRECTORY [DIRECTORY ...]` prints JSON: of each model the tokens of the
requests one way and the other, how many steps were replayed, and which reports there were.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from server.engine.assembly import wire_engine
from server.engine.config import EngineConfig
from server.engine.kernel_choice import KernelChoice
from server.engine.request import EngineNews, GenerationRequest, SamplingDefaults, SamplingParams
from server.model.loader import LoadedModel, LoadProgress, load_model
from tests.server.engine.tape import Tape

CPU = torch.device("cpu")
# prompts of 1 to 3 tokens, which end at different times: from three sequences to one
REQUESTS = (
    GenerationRequest("greedy", (5, 250, 17), SamplingParams(max_tokens=5, temperature=0.0)),
    GenerationRequest("seeded", (44,), SamplingParams(max_tokens=4, temperature=1.0, seed=3)),
    GenerationRequest("short", (200, 3), SamplingParams(max_tokens=2, temperature=0.0, logprobs=0)),
)


@dataclass(frozen=True)
class Answers:
    tokens: dict[str, list[int]]
    reports: list[str]
    kernels: str


def answer(model: LoadedModel, recorder: Tape | None) -> Answers:
    """What an engine gives when all requests come at once. A block holds two tokens."""
    config = EngineConfig("random", max_model_len=10, max_num_seqs=3, block_size=2, kv_cache_bytes=2**16)
    tokens: dict[str, list[int]] = defaultdict(list)
    reports: list[LoadProgress] = []

    def take(news: EngineNews) -> None:
        for event in news.events:
            tokens[event.request_id].extend(event.token_ids)

    loop, info = wire_engine(
        config,
        model,
        CPU,
        KernelChoice(None, "triton"),
        SamplingDefaults(),
        take,
        recorder=recorder,
        report=reports.append,
    )
    for request in REQUESTS:
        loop.submit(request)
    while loop.has_work:
        loop.step()
        loop.check_integrity()
    return Answers(dict(tokens), [progress.detail for progress in reports], info.kernels)


def main(directories: list[str]) -> None:
    found = []
    for directory in directories:
        model = load_model(Path(directory), CPU, torch.float16, lambda progress: None)
        tape = Tape()
        eager, replayed = answer(model, None), answer(model, tape)
        found.append(
            {
                "eager": eager.tokens,
                "replayed": replayed.tokens,
                "num_replays": tape.num_replays,
                "reports": replayed.reports,
                "kernels": replayed.kernels,
            }
        )
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
