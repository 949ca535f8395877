"""Whether the server lives and is ready, its version and its metrics. The probes are public, the metrics are not."""

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from server.api.services import Services, ServicesOfApp
from server.errors import EngineUnavailable

DISTRIBUTION = "awq-serve"

public_router = APIRouter(tags=["status"])
metrics_router = APIRouter(tags=["status"])


class StatusObject(BaseModel):
    status: Literal["live", "ready"]


class VersionObject(BaseModel):
    version: str


@public_router.head("/live", include_in_schema=False)
@public_router.get("/live")
async def live() -> StatusObject:
    """The process is up and its event loop runs."""
    return StatusObject(status="live")


@public_router.head("/ready", include_in_schema=False)
@public_router.get("/ready")
async def ready(services: ServicesOfApp) -> StatusObject:
    """200 when requests are taken; else 503, with what the engine is doing."""
    return _readiness(services)


@public_router.head("/health", include_in_schema=False)
@public_router.get("/health")
async def health(services: ServicesOfApp) -> StatusObject:
    """The same as /ready, under the name that clients and load balancers of other servers ask for."""
    return _readiness(services)


@public_router.get("/version")
async def get_version() -> VersionObject:
    return VersionObject(version=installed_version())


@metrics_router.get("/metrics", response_model=None)
async def get_metrics(services: ServicesOfApp) -> Response:
    """All counters, for Prometheus."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def installed_version() -> str:
    """The distribution's version, or "source" when the program runs from its sources alone."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "source"


def _readiness(services: Services) -> StatusObject:
    status = services.engine.status()
    if status.state != "ready":
        raise EngineUnavailable(f"the engine is {status.state}: {status.detail}")
    return StatusObject(status="ready")
