"""A real engine on a tiny model, driven until it has nothing left to do."""

from collections import defaultdict
from pathlib import Path

from server.engine.assembly import assemble_engine
from server.engine.config import EngineConfig
from server.engine.request import EngineNews, EngineStats, GenerationRequest, TokenEvent, TokenLogprob
from tests.kernels.native_libraries import open_native
from tests.server.model.quantized_models import quantize_in_place
from tests.tiny_models import save_tiny_model


class Served:
    """What an engine says to requests that are submitted at once."""

    def __init__(self, config: EngineConfig, *requests: GenerationRequest) -> None:
        self.events: dict[str, list[TokenEvent]] = defaultdict(list)
        self.stats: EngineStats | None = None
        loop, self.info = assemble_engine(config, lambda progress: None, self._take)
        for request in requests:
            loop.submit(request)
        while loop.has_work:
            loop.step()
            loop.check_integrity()

    def _take(self, news: EngineNews) -> None:
        self.stats = news.stats
        for event in news.events:
            self.events[event.request_id].append(event)

    @property
    def num_accepted(self) -> int:
        assert self.stats is not None
        return self.stats.accepted_tokens

    def answer(self, name: str) -> tuple[list[int], list[TokenLogprob], list[TokenLogprob | None], object]:
        events = self.events[name]
        return (
            [token for event in events for token in event.token_ids],
            [logprob for event in events for logprob in event.logprobs],
            [logprob for event in events for logprob in event.prompt_logprobs],
            events[-1].finish_reason,
        )


def config(directory: Path, num_speculative_tokens: int) -> EngineConfig:
    return EngineConfig(
        str(directory),
        device="cpu",
        max_num_seqs=8,
        block_size=16,
        kv_cache_bytes=512 * 1024,
        num_speculative_tokens=num_speculative_tokens,
    )


def quantized_model(directory: Path) -> Path:
    """A tiny quantized model that the native kernels can run."""
    open_native()
    model = save_tiny_model("llama", directory)
    quantize_in_place(model, lambda name: True)
    return model
