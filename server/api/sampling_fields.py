"""The request fields that completions and chats share: their bounds, and what they mean to the engine."""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from server.api.errors import describe
from server.api.ignored_fields import field_labels
from server.api.unsupported_fields import UnsupportedField, check_unsupported
from server.engine.request import GenerationRequest, ModelInfo, SamplingParams
from server.errors import InvalidRequest
from server.settings import Settings

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKENS = 128
MAX_SALT_CHARACTERS = 256
# a day
MAX_TIMEOUT_SECONDS = 86_400
INT64 = 1 << 63


def _parse_stop(value: object) -> object:
    """One string or a list of them, always as a tuple."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"stop must be a string or a list of strings, and it is {describe(value)}")
    if "" in stops:
        raise ValueError("stop must not hold an empty string, which would end every text at once")
    return tuple(stops)


def _parse_logit_bias(value: object) -> object:
    """Token ids as JSON writes the keys of an object, to (token id, bias)."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise ValueError(f"logit_bias must map token ids to biases, and it is {describe(value)}")
    if len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"logit_bias takes at most {MAX_LOGIT_BIASES} tokens, and it has {len(value)}")
    biases = []
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError(f"logit_bias must have token ids as keys, and one is {describe(key)}")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"logit_bias must be numbers from -100 to 100, and token {key} has {describe(bias)}")
        biases.append((int(key), float(bias)))
    return tuple(biases)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(BaseModel):
    """Every optional field may be null, which means the same as leaving it out.

    Unknown fields are kept in `model_extra`, to be counted and ignored.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    # below, logits that are divided by it leave the range of their type, and no token can be drawn
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[tuple[tuple[int, float], ...], BeforeValidator(_parse_logit_bias)] = ()
    stop: Annotated[tuple[str, ...], BeforeValidator(_parse_stop)] = ()
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    skip_special_tokens: bool | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = None
    # as in vLLM: lower goes first
    priority: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; leave it out, or set stream to true")
        if self.num_choices > 1 and self.temperature == 0:
            raise ValueError("n must be 1 at temperature 0, where all choices are the same; or raise temperature")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def skips_special_tokens(self) -> bool:
        return self.skip_special_tokens is not False

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def includes_usage_always(self) -> bool:
        return self.includes_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def unknown_fields(self, unsupported: Mapping[str, UnsupportedField]) -> list[str]:
        """Labels of the fields to count and ignore. Raises InvalidRequest for one that would change the answer."""
        extra = self.model_extra or {}
        check_unsupported(extra, unsupported)
        return field_labels(name for name in extra if name not in unsupported)

    def base_seed(self) -> int:
        """The seed of the first choice; drawn here when the client gave none. -1 counts as none, as in vLLM.

        Choice i of a prompt draws with this seed plus i (modulo 2**63), so that choices differ and can be repeated.
        """
        return secrets.randbelow(INT64) if self.seed in (None, -1) else (self.seed or 0) % INT64


def check_num_choices(num_prompts: int, num_choices: int, settings: Settings) -> None:
    """Raise InvalidRequest for more choices than the engine ever takes: "try later" would be told for ever."""
    total, limit = num_prompts * num_choices, settings.max_num_seqs + settings.max_waiting
    if total > limit:
        raise InvalidRequest(
            f"n must be smaller, or the prompts fewer: {num_prompts} with n {num_choices} make {total} choices, and "
            f"the server takes {limit} at most: max_num_seqs, {settings.max_num_seqs}, and max_waiting, "
            f"{settings.max_waiting}",
            param="n" if num_choices > 1 else "prompt",
        )


def stop_strings(fields: SamplingFields, settings: Settings) -> tuple[str, ...]:
    """The stop strings, checked against the server's bounds."""
    if len(fields.stop) > settings.max_stop_strings:
        raise InvalidRequest(
            f"stop takes at most {settings.max_stop_strings} strings, and it has {len(fields.stop)}", param="stop"
        )
    longest = max(map(len, fields.stop), default=0)
    if longest > settings.max_stop_characters:
        raise InvalidRequest(
            f"a stop string has at most {settings.max_stop_characters} characters, and one has {longest}", param="stop"
        )
    return fields.stop


@dataclass(frozen=True)
class Sender:
    """Whom a request is from, and what it is for. tenant: a name for the key. arrived: when it came, by time.monotonic.

    adapter: the one that computes it, empty for the model alone.
    """

    tenant: str
    arrived: float
    adapter: str


def generation_request(
    request_id: str, prompt: tuple[int, ...], sampling: SamplingParams, fields: SamplingFields, sender: Sender
) -> GenerationRequest:
    """One choice as the engine is asked for it."""
    return GenerationRequest(
        request_id,
        prompt,
        sampling,
        # what keeps the cache of a tenant's prompts, and of one salt of theirs, from all others
        cache_salt=f"{sender.tenant}:{fields.cache_salt or ''}",
        priority=fields.priority or 0,
        owner=sender.tenant,
        deadline=None if fields.timeout is None else sender.arrived + fields.timeout,
        adapter=sender.adapter,
    )


@dataclass(frozen=True)
class LogprobCounts:
    """How many likeliest tokens to report at each place; None for no logprobs at all."""

    output: int | None
    prompt: int | None


def sampling_params(
    fields: SamplingFields, model: ModelInfo, max_tokens: int, logprobs: LogprobCounts
) -> SamplingParams:
    """What the engine samples with. Raises InvalidRequest for token ids that the model does not have."""
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most max_tokens, {max_tokens}, and it is {min_tokens}", param="min_tokens"
        )
    stop_token_ids = tuple(fields.stop_token_ids or ())
    check_token_ids("stop_token_ids", stop_token_ids, model)
    check_token_ids("logit_bias", [token_id for token_id, _ in fields.logit_bias], model)
    end_token_ids = () if fields.ignore_eos else model.eos_token_ids
    defaults = model.sampling_defaults
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_default(fields.temperature, defaults.temperature),
        top_k=defaults.top_k if fields.top_k is None else max(fields.top_k, 0),
        top_p=_default(fields.top_p, defaults.top_p),
        min_p=_default(fields.min_p, 0.0),
        repetition_penalty=_default(fields.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_default(fields.presence_penalty, 0.0),
        frequency_penalty=_default(fields.frequency_penalty, 0.0),
        min_tokens=min_tokens,
        logprobs=logprobs.output,
        prompt_logprobs=logprobs.prompt,
        logit_bias=fields.logit_bias,
        stop_token_ids=tuple(dict.fromkeys((*end_token_ids, *stop_token_ids))),
    )


def check_token_ids(param: str, token_ids: Iterable[int], model: ModelInfo) -> None:
    """Raise InvalidRequest for a token id that is not in the vocabulary."""
    highest = max(token_ids, default=0)
    if highest >= model.vocab_size:
        raise InvalidRequest(
            f"{param} must hold token ids below {model.vocab_size}, the size of the vocabulary, and one is {highest}",
            param=param,
        )


def _default(value: float | None, default: float) -> float:
    return default if value is None else value
