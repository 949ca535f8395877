"""Adapters over HTTP: listed beside the model they are of, and chosen by a request's `model`."""

from fastapi.testclient import TestClient

from tests.server.api.conftest import MODEL_NAME, AppFactory, local_client
from tests.server.api.fake_engine import FakeEngineClient

LORA = ["sql=/adapters/sql", "chat/de=/adapters/de"]


def client_of(make_app: AppFactory) -> TestClient:
    return local_client(make_app(lora=LORA))


def test_they_are_listed_with_their_parent_and_their_directory(make_app: AppFactory) -> None:
    with client_of(make_app) as client:
        models = client.get("/v1/models").json()["data"]
        one = client.get("/v1/models/chat/de").json()

    assert [(model["id"], model["parent"], model["root"]) for model in models] == [
        (MODEL_NAME, None, "/models/tiny"),
        ("sql", MODEL_NAME, "/adapters/sql"),
        ("chat/de", MODEL_NAME, "/adapters/de"),
    ]
    assert one == models[2]
    assert models[1] == {**models[0], "id": "sql", "root": "/adapters/sql", "parent": MODEL_NAME}


def test_a_request_chooses_one_by_its_name_and_the_reply_says_so(
    make_app: AppFactory, engine: FakeEngineClient
) -> None:
    completion = {"prompt": "Hi", "max_tokens": 2}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    with client_of(make_app) as client:
        replies = [
            client.post(path, json={**body, "model": name}).json()["model"]
            for path, body in (("/v1/completions", completion), ("/v1/chat/completions", chat))
            for name in ("sql", MODEL_NAME, None, "chat/de")
        ]
        streamed = client.post("/v1/completions", json={**completion, "model": "sql", "stream": True}).text

    assert replies == ["sql", MODEL_NAME, MODEL_NAME, "chat/de"] * 2
    assert '"model":"sql"' in streamed
    assert [request.adapter for request in engine.requests] == ["sql", "", "", "chat/de"] * 2 + ["sql"]


def test_all_choices_of_a_request_are_computed_by_its_adapter(make_app: AppFactory, engine: FakeEngineClient) -> None:
    completion = {"prompt": ["Hi", "Ho"], "max_tokens": 2, "n": 3, "model": "sql"}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "n": 2, "model": "chat/de"}
    with client_of(make_app) as client:
        first = client.post("/v1/completions", json=completion).json()
        second = client.post("/v1/chat/completions", json=chat).json()

    assert (len(first["choices"]), len(second["choices"])) == (6, 2)
    assert [request.adapter for request in engine.requests] == ["sql"] * 6 + ["chat/de"] * 2


def test_another_name_is_told_which_there_are(make_app: AppFactory) -> None:
    with client_of(make_app) as client:
        reply = client.post("/v1/completions", json={"prompt": "Hi", "model": "nobody"})

    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    assert f"this server serves '{MODEL_NAME}' and 'sql' and 'chat/de'" in reply.json()["error"]["message"]
