"""Wires the application together: what serves, which routes there are and which of them are public."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI

from server.api import models, status
from server.api.auth import KeyRing, require_key
from server.api.chat import route as chat
from server.api.completions import route as completions
from server.api.errors import install_error_handlers
from server.api.host_check import HostCheck
from server.api.jobs import route as jobs
from server.api.jobs.following import JobFollower
from server.api.jobs.places import JobPlaces
from server.api.jobs.serving import QuantizeJobs
from server.api.limits import BodyLimit
from server.api.request_id import RequestId
from server.api.services import ServedModel, Services
from server.engine.client_protocol import EngineClient
from server.jobs.store import JobStore
from server.jobs.supervisor import JobSupervisor
from server.metrics import ErrorCounter, Metrics
from server.settings import Settings
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer

PUBLIC_ROUTERS = (status.public_router,)
GUARDED_ROUTERS = (completions.router, chat.router, models.router, jobs.router, status.metrics_router)


def create_app(
    settings: Settings, served_model: ServedModel, engine: EngineClient, tokenizer: Tokenizer, job_store: JobStore
) -> FastAPI:
    """The ASGI application. It starts the engine and the job supervisor when it starts, and stops them at its end.

    The job store is closed with it. Raises TokenizerError for a chat template that is none.
    """
    metrics = Metrics(engine.status)
    supervisor = JobSupervisor(job_store)
    template = tokenizer.chat_template

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        supervisor.start()
        try:
            yield
        finally:
            await engine.stop(drain_seconds=0)
            await supervisor.stop()
            job_store.close()

    # the interactive pages load scripts from elsewhere, and the schema would be a route without a guard
    app = FastAPI(title="awq-serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    # a redirect would drop the key or the body of some clients; a route has one spelling
    app.router.redirect_slashes = False
    app.state.key_ring = KeyRing(settings.api_keys)
    app.state.services = Services(
        settings=settings,
        served_model=served_model,
        engine=engine,
        tokenizer=tokenizer,
        chat_template=ChatTemplate(template, tokenizer.special_tokens) if template is not None else None,
        metrics=metrics,
        finished_models=job_store.succeeded_outputs,
    )
    places = JobPlaces(settings.models_dir, settings.model_roots)
    app.state.job_supervisor = supervisor
    follower = JobFollower(job_store, supervisor.news)
    app.state.quantize_jobs = QuantizeJobs(job_store, places, supervisor.wake, follower)
    install_error_handlers(app)
    app.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(HostCheck, settings=settings)
    app.add_middleware(ErrorCounter, metrics=metrics)
    app.add_middleware(RequestId)
    for router in PUBLIC_ROUTERS:
        app.include_router(router)
    app.include_router(_guarded())
    return app


def _guarded() -> APIRouter:
    """All routes that need a key: what is not public is here."""
    guarded = APIRouter(dependencies=[Depends(require_key)])
    for router in GUARDED_ROUTERS:
        guarded.include_router(router)
    return guarded
