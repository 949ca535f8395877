"""The whole application around a fake engine: in process, and on a real socket."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.api.services import ServedModel
from server.app import create_app
from server.engine.request import ModelInfo
from server.http_server import GracefulServer, listen
from server.jobs.store import JobStore
from server.settings import load_settings
from server.text.tokenizer import Tokenizer
from tests.server.api.fake_engine import FakeEngineClient
from tests.tiny_models import IM_END_ID, VOCAB_SIZE, save_tiny_model

MODEL_NAME = "tiny"
MAX_MODEL_LEN = 256
ANSWER = "Hello wörld, 5 € for 🙂! Stop here. And on."

DEADLINE_SECONDS = 20.0


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer(tiny_directory: Path) -> Tokenizer:
    """One token a byte, so that characters span tokens."""
    return Tokenizer.load(tiny_directory)


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngineClient:
    """Says ANSWER to everything, then ends the text."""
    model = ModelInfo("/models/tiny", MAX_MODEL_LEN, VOCAB_SIZE, (IM_END_ID,), "cpu", "float32", 100, 16)
    answer = [*tokenizer.encode(ANSWER, add_special_tokens=False), IM_END_ID]
    return FakeEngineClient(lambda _request: answer, model, capacity=8)


@dataclass(frozen=True)
class AppFactory:
    """Builds the application with other settings than the defaults."""

    engine: FakeEngineClient
    tokenizer: Tokenizer
    data_dir: Path
    stores: list[JobStore] = field(default_factory=list)

    def __call__(self, **settings: object) -> FastAPI:
        store = JobStore(self.data_dir / f"jobs-{len(self.stores)}.sqlite")
        self.stores.append(store)
        served = ServedModel(MODEL_NAME, "/models/tiny", 1_700_000_000)
        return create_app(
            load_settings({"data_dir": self.data_dir, **settings}), served, self.engine, self.tokenizer, store
        )


@pytest.fixture
def make_app(engine: FakeEngineClient, tokenizer: Tokenizer, tmp_path: Path) -> AppFactory:
    return AppFactory(engine, tokenizer, tmp_path)


def local_client(app: FastAPI) -> TestClient:
    """A client on the same machine; an error that nobody expected is an answer, as in the real server."""
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture
def client(make_app: AppFactory) -> Iterator[TestClient]:
    """The started application, without keys."""
    with local_client(make_app()) as started:
        yield started


@pytest.fixture
def live_url(make_app: AppFactory, engine: FakeEngineClient) -> Iterator[str]:
    """The application on a free port, run in a thread as the command line runs it, for what needs a socket."""
    listener = listen("127.0.0.1", 0)
    ready = threading.Event()
    server = GracefulServer(make_app(), load_settings({"drain_seconds": 0}), engine, announce=ready.set)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    assert ready.wait(30)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=30)
    assert not thread.is_alive()
