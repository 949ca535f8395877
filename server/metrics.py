"""Counters of one server, with vLLM's names behind our prefix. The API adds; a scrape reads the engine's snapshot."""

from collections.abc import Callable, Iterable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.engine.request import EngineStatus

PREFIX = "awq_serve_"
FinishedReason = Literal["stop", "length", "abort", "timeout", "error"]
# vLLM's buckets, so that its dashboards draw the same picture
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 640.0, 2560.0),
)
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Metrics:
    """One server's own registry: two servers in one process do not mix. engine_status: where the engine stands now."""

    def __init__(self, engine_status: Callable[[], EngineStatus]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine_status))
        self._finished = self._counter("request_success", "Finished choices by reason.", "finished_reason")
        self._http_errors = self._counter("http_errors", "Answers with status 400 and up.", "code")
        self._unknown_fields = self._counter("unknown_request_fields", "Request fields ignored as unknown.", "field")
        self._first_token_seconds = Histogram(
            PREFIX + "time_to_first_token_seconds",
            "From a choice's submission to its first token.",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            PREFIX + "e2e_request_latency_seconds",
            "From a choice's submission to its end.",
            buckets=_REQUEST_SECONDS,
            registry=self._registry,
        )

    def _counter(self, name: str, description: str, label: str) -> Counter:
        return Counter(PREFIX + name, description, [label], registry=self._registry)

    def count_first_token(self, seconds: float) -> None:
        self._first_token_seconds.observe(seconds)

    def count_finished(self, reason: FinishedReason, seconds: float) -> None:
        self._finished.labels(reason).inc()
        self._request_seconds.observe(seconds)

    def count_http_error(self, status: int) -> None:
        self._http_errors.labels(str(status)).inc()

    def count_unknown_fields(self, labels: Iterable[str]) -> None:
        """labels: of a set that no client can make larger, as each is a time series for ever."""
        for label in labels:
            self._unknown_fields.labels(label).inc()

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's own numbers, read when somebody scrapes. They start again from zero when the engine restarts."""

    def __init__(self, engine_status: Callable[[], EngineStatus]) -> None:
        self._engine_status = engine_status

    def collect(self) -> Iterable[Metric]:
        status = self._engine_status()
        yield _gauge("engine_ready", "1 when the engine takes requests.", float(status.state == "ready"))
        yield _counter("engine_restarts", "Restarts of the engine's process after its death.", status.num_restarts)
        stats = status.stats
        if stats is None:
            return
        num_used = stats.num_blocks - stats.num_free_blocks
        yield _gauge("num_requests_running", "Choices in the running batch.", stats.num_running)
        yield _gauge("num_requests_waiting", "Choices that wait for their turn.", stats.num_waiting)
        yield _gauge("kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1.", num_used / max(stats.num_blocks, 1))
        yield _counter("prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens)
        yield _counter("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", stats.prompt_tokens)
        yield _counter("prefix_cache_hits", "Prompt tokens found there.", stats.cached_prompt_tokens)
        yield _counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield _counter("num_preemptions", "Choices put back to wait for room in the KV cache.", stats.num_preemptions)
        yield _counter("engine_steps", "Steps of the engine.", stats.num_steps)
        yield _counter("spec_decode_num_drafts", "Drafts verified.", stats.num_drafts)
        yield _counter("spec_decode_num_draft_tokens", "Tokens drafted.", stats.draft_tokens)
        yield _counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted.", stats.accepted_tokens)
        yield _counter("out_of_memory_steps", "Steps that the device had no memory for.", stats.num_out_of_memory)


def _gauge(name: str, description: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, description, value=value)


def _counter(name: str, description: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, description, value=value)


class ErrorCounter:
    """ASGI middleware: counts the answers with an error status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._metrics.count_http_error(message["status"])
            await send(message)

        await self._app(scope, receive, counting_send)
