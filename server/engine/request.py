"""What the API asks of the engine and what it gets back. Frozen and plain, so that any transport carries them."""

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True)
class StructuredOutput:
    """What an output must keep to. source: a JSON schema, a regular expression or a grammar, as text."""

    kind: Literal["json_schema", "regex", "grammar"]
    source: str


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Ranges are checked by the API; the defaults switch everything off.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. A draw is a function of (seed, position) alone.
    logprobs: None for none, k for the chosen token's log-probability and the k likeliest. They are those of the
    distribution the model gives, before temperature and truncation. prompt_logprobs: the same for the prompt's tokens.
    stop_token_ids end the request (end-of-sequence ids included, unless the client asked to ignore them);
    they are barred until min_tokens are out.
    structure: what the output must keep to; the request ends when it is whole and nothing may follow.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    structure: StructuredOutput | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """cache_salt: only requests with the same one read what the other computed for a common beginning of prompts.

    priority: lower starts first and is preempted last. owner: among equal priorities, owners take turns.
    adapter: the name of the one that computes it, empty for the model alone.
    deadline: when the request ends with FinishReason.TIMEOUT unless it is done, on the clock of time.monotonic, which
    all processes of a machine share; None for never.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str = ""
    priority: int = 0
    owner: str = ""
    deadline: float | None = None
    adapter: str = ""

    @property
    def cache_root(self) -> str:
        """What requests must have in common to share: adapter and salt, which cannot be taken for each other."""
        return f"{len(self.adapter)}:{self.adapter}{self.cache_salt}"


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of one chosen token, and the likeliest alternatives as (token id, log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenEvent(NamedTuple):
    """News of one request. Every admitted request gets exactly one event with a finish reason, its last.

    A tuple, as there is one for every token: a frozen dataclass takes three times as long to make.

    token_ids: the tokens that are new since the event before. The token that ended a request by stop_token_ids is
    included as the last one. logprobs: one entry a token when asked for, else empty.
    prompt_logprobs: on the first event when asked for; entry 0 is None, as nothing predicts the first token.
    num_cached_tokens: how many of the prompt's were found in the cache; on the first event with a token, else 0.
    error: what went wrong, for FinishReason.ERROR and TIMEOUT.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model's makers want it sampled where a request does not say."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class ModelInfo:
    """What the API must know of the loaded model. kernels: which ones compute it, for the log.

    adapters: the names that requests may choose by. adapter_notes, adapter_doubts: sentences on them for the log; the
    second say what may be wrong.
    """

    model_path: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    num_blocks: int
    block_size: int
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    kernels: str = ""
    adapters: tuple[str, ...] = ()
    adapter_notes: tuple[str, ...] = ()
    adapter_doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for the metrics. Blocks count KV cache blocks, free ones with and without cached content.

    cached_prompt_tokens: those of prompt_tokens that were found in the cache. num_out_of_memory: steps that the device
    had no memory for. num_drafts: guesses at several tokens that steps verified, draft_tokens: tokens in them,
    accepted_tokens: those of draft_tokens that became output.
    """

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    num_steps: int
    cached_prompt_tokens: int = 0
    num_out_of_memory: int = 0
    num_drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class EngineStatus:
    """Where the engine stands. detail: load progress, or why it is not ready. model: known once it was ready.

    num_restarts: how often its process was started anew after it had died. is_refusal: it failed because settings,
    machine or checkpoint do not let it start; detail says what to change.
    """

    state: Literal["loading", "ready", "unresponsive", "restarting", "draining", "failed"]
    detail: str
    model: ModelInfo | None
    stats: EngineStats | None
    num_restarts: int = 0
    is_refusal: bool = False


@dataclass(frozen=True)
class EngineNews:
    """What the engine publishes, before a step (the requests it starts) and after it (what came out, and the stats)."""

    started: tuple[str, ...]
    events: tuple[TokenEvent, ...]
    stats: EngineStats
