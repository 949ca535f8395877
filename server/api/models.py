"""GET /v1/models: the model that is served, and the checkpoints that quantization jobs have made here."""

import asyncio
from pathlib import Path
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from server.api.services import Services, ServicesOfApp
from server.errors import NotFound

router = APIRouter(tags=["models"])


class ModelObject(BaseModel):
    """parent: the model that an adapter is of.

    status: "serving", or "finished" for a checkpoint that a restart with it would serve.
    """

    # `model_` is pydantic's own prefix, and OpenAI's too
    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["awq-serve"] = "awq-serve"
    root: str
    parent: str | None = None
    max_model_len: int | None
    status: Literal["serving", "finished"]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


@router.get("/v1/models")
async def list_models(services: ServicesOfApp) -> ModelList:
    return ModelList(data=await _models(services))


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, services: ServicesOfApp) -> ModelObject:
    for model in await _models(services):
        if model.id == model_id:
            return model
    raise NotFound(f"there is no model {model_id!r}; GET /v1/models lists them", param="model", code="model_not_found")


async def _models(services: Services) -> list[ModelObject]:
    return [_served(services), *_adapters(services), *await asyncio.to_thread(_all_finished, services)]


def _served(services: Services) -> ModelObject:
    served, loaded = services.served_model, services.engine.status().model
    return ModelObject(
        id=served.name,
        created=served.created,
        root=served.root,
        max_model_len=loaded.max_model_len if loaded is not None else None,
        status="serving",
    )


def _adapters(services: Services) -> list[ModelObject]:
    """As vLLM lists them: of the served model, and from their directories."""
    served = _served(services)
    return [
        served.model_copy(update={"id": adapter.name, "root": adapter.path, "parent": served.id})
        for adapter in services.settings.lora
    ]


def _all_finished(services: Services) -> list[ModelObject]:
    """Those that a request could not mean now; a name has one model. Reads the file system."""
    served = services.served_model
    names = {served.name, *(adapter.name for adapter in services.settings.lora)}
    others = (path for path in services.finished_models() if path.name not in names and str(path) != served.root)
    return [model for path in others if (model := _finished(path)) is not None]


def _finished(path: Path) -> ModelObject | None:
    """None for one that was deleted meanwhile."""
    try:
        created = int(path.stat().st_mtime)
    except OSError:
        return None
    return ModelObject(id=path.name, created=created, root=str(path), max_model_len=None, status="finished")
