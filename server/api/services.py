"""What the routes work with, put together once by server.app and handed to them by a dependency."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from server.engine.client_protocol import EngineClient
from server.engine.request import ModelInfo
from server.errors import EngineUnavailable, NotFound
from server.metrics import Metrics
from server.settings import Settings
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """name: what clients call it. root: where it was loaded from. created: when this server started, in seconds."""

    name: str
    root: str
    created: int


@dataclass(frozen=True)
class ChosenModel:
    """What a request asked for. name: for its reply. adapter: what the engine calls it, empty for the model alone."""

    name: str
    adapter: str = ""


@dataclass(frozen=True)
class Services:
    """Everything that answers requests. finished_models: the checkpoints that quantization jobs have made."""

    settings: Settings
    served_model: ServedModel
    engine: EngineClient
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    metrics: Metrics
    finished_models: Callable[[], Sequence[Path]]

    async def choose_model(self, name: str | None) -> ChosenModel:
        """The served model, or an adapter of it; no name means the model.

        Raises NotFound for a name that is neither's.
        """
        if name is None or name == self.served_model.name:
            return ChosenModel(self.served_model.name)
        if any(adapter.name == name for adapter in self.settings.lora):
            return ChosenModel(name, adapter=name)
        names = [self.served_model.name, *(adapter.name for adapter in self.settings.lora)]
        served = f"this server serves {' and '.join(map(repr, names))}"
        finished = await asyncio.to_thread(self.finished_models)
        if any(path.name == name for path in finished):
            sentence = f"the model {name!r} was made here but is not served; restart the server with it: {served}"
        else:
            sentence = f"there is no model {name!r}; {served}"
        raise NotFound(sentence, param="model", code="model_not_found")

    def loaded_model(self) -> ModelInfo:
        """The model's limits. Raises EngineUnavailable, with what the engine is doing, while it is not ready."""
        status = self.engine.status()
        if status.state != "ready" or status.model is None:
            raise EngineUnavailable(f"the engine is {status.state}: {status.detail}")
        return status.model


def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesOfApp = Annotated[Services, Depends(get_services)]
