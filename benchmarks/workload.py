"""What is measured: the same token ids for both sides, new ones in every round. Standard library alone."""

import random
from dataclasses import dataclass
from typing import Protocol

# ordinary words of the demo model's 49152 tokens; the special ones lie below
TOKEN_IDS = range(1_000, 49_000)


@dataclass(frozen=True)
class Workload:
    """num_sequences prompts of prompt_tokens each. decode_tokens: generated after each, and only they are timed.

    decode_tokens 0: the prompts are timed, up to and with the one token that each of them predicts. over_http: ours
    goes through the whole server; the peer decodes as it does without.
    """

    prompt_tokens: int
    decode_tokens: int = 0
    num_sequences: int = 1
    over_http: bool = False

    @property
    def name(self) -> str:
        if not self.decode_tokens:
            return f"prefill {self.prompt_tokens} tokens"
        if self.over_http:
            return f"{self.num_sequences} streams over HTTP"
        return f"decode {self.num_sequences} sequence{'s' if self.num_sequences > 1 else ''}"

    @property
    def timed_tokens(self) -> int:
        return self.num_sequences * (self.decode_tokens or self.prompt_tokens)

    def draw(self, seed: str) -> "Trial":
        """One run of it: its prompts are a function of the seed, and share no beginning that a cache could keep."""
        source = random.Random(f"{self.name}, {seed}")
        prompts = tuple(tuple(source.choices(TOKEN_IDS, k=self.prompt_tokens)) for _ in range(self.num_sequences))
        return Trial(prompts, self.decode_tokens)


@dataclass(frozen=True)
class Trial:
    """Prompts of equal length, and how many tokens to generate after the first of each; 0 times the prompts instead."""

    prompts: tuple[tuple[int, ...], ...]
    decode_tokens: int


class Side(Protocol):
    """One of the two that are compared."""

    def run(self, trial: Trial) -> float:
        """Seconds that the timed part of the trial took, choosing the likeliest token each time."""


WORKLOADS = (
    Workload(prompt_tokens=128),
    Workload(prompt_tokens=512),
    Workload(prompt_tokens=128, decode_tokens=64),
    Workload(prompt_tokens=128, decode_tokens=64, num_sequences=8),
    Workload(prompt_tokens=128, decode_tokens=64, num_sequences=8, over_http=True),
)
MAX_SEQUENCE_TOKENS = max(workload.prompt_tokens + workload.decode_tokens + 1 for workload in WORKLOADS)
MAX_SEQUENCES = max(workload.num_sequences for workload in WORKLOADS)
# all prompts of a workload in one step: sequences whose prompts end in different steps would not decode in step
MAX_STEP_TOKENS = max(workload.num_sequences * workload.prompt_tokens for workload in WORKLOADS) + MAX_SEQUENCES
