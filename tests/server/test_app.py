"""The application as a whole: what it starts and stops, and what it does not serve."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from server.api.services import ServedModel
from server.app import create_app
from server.engine.request import ModelInfo
from server.jobs.store import JobStore
from server.settings import load_settings
from server.text.tokenizer import Tokenizer, TokenizerError
from tests.server.api.fake_engine import FakeEngineClient
from tests.tiny_models import save_tiny_model

MODEL = ModelInfo("/models/tiny", 256, 272, (258,), "cpu", "float32", 100, 16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(save_tiny_model("llama", tmp_path_factory.mktemp("tiny")))


def test_the_engine_starts_and_stops_with_the_application(tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = FakeEngineClient(lambda _request: [1], MODEL)
    settings = load_settings({"data_dir": tmp_path})
    served = ServedModel("tiny", "/models/tiny", 0)
    app = create_app(settings, served, engine, tokenizer, JobStore(settings.jobs_file))
    assert engine.status().state == "loading"
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/ready").status_code == 200
    assert engine.status().state == "draining"


def test_a_broken_chat_template_is_told_before_anything_starts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    broken = Tokenizer(tokenizer.model, special_tokens={}, chat_template="{% for %}")
    settings = load_settings({"data_dir": tmp_path})
    engine = FakeEngineClient(lambda _request: [1], MODEL)
    with pytest.raises(TokenizerError, match="template"):
        create_app(settings, ServedModel("x", "/x", 0), engine, broken, JobStore(settings.jobs_file))
    assert engine.status().state == "loading"


def test_no_page_or_schema_is_served_without_a_guard(tokenizer: Tokenizer, tmp_path: Path) -> None:
    settings = load_settings({"data_dir": tmp_path})
    engine = FakeEngineClient(lambda _request: [1], MODEL)
    served = ServedModel("tiny", "/models/tiny", 0)
    app = create_app(settings, served, engine, tokenizer, JobStore(settings.jobs_file))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for path in ("/docs", "/redoc", "/openapi.json"):
            assert client.get(path).status_code == 404
