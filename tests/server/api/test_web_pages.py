"""A web page that somebody on this machine looks at cannot use a server that has no key."""

import json

import pytest
from fastapi.testclient import TestClient

from tests.server.api.conftest import AppFactory, local_client
from tests.server.api.fake_engine import FakeEngineClient

BODY = json.dumps({"prompt": "a", "max_tokens": 2})


def post(client: TestClient, content_type: str | None, path: str = "/v1/completions") -> int:
    headers = {} if content_type is None else {"Content-Type": content_type}
    return client.post(path, content=BODY, headers=headers).status_code


# what a browser sends to another origin without asking it first, and what is no media type at all
@pytest.mark.parametrize(
    "content_type",
    [
        *("text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data"),
        *("text/plain; application/json", "application/jsonx", "image/x+json", "json", "", None),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/quantize"])
def test_a_body_of_another_type_is_refused_unread(
    client: TestClient, engine: FakeEngineClient, path: str, content_type: str | None
) -> None:
    assert post(client, content_type, path) == 415
    assert not engine.requests


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON ;charset=utf-8",
        "application/vnd.x+json",
    ],
)
def test_json_by_any_of_its_names_is_read(client: TestClient, content_type: str) -> None:
    assert post(client, content_type) == 200


def test_the_refusal_says_which_type_would_be_right(client: TestClient) -> None:
    error = client.post("/v1/completions", content=BODY, headers={"Content-Type": "text/plain"}).json()["error"]
    assert "application/json" in error["message"]
    assert '"text/plain"' in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "unsupported_media_type")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]", "192.168.1.2", ""]
)
@pytest.mark.parametrize("path", ["/v1/models", "/live", "/quantize", "/metrics"])
def test_a_name_that_was_made_to_lead_here_gets_nothing(client: TestClient, path: str, host: str) -> None:
    response = client.get(path, headers={"Host": host})
    assert response.status_code == 403
    assert "--allowed-host" in response.json()["error"]["message"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "LocalHost:1", "localhost", "[::1]", "[::1]:8000"])
def test_the_names_of_this_machine_are_answered_to(client: TestClient, host: str) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_names_that_were_set_are_answered_to(make_app: AppFactory) -> None:
    with local_client(make_app(allowed_hosts=("gpu.lan", "Other.lan"))) as client:
        for host, status in [("gpu.lan", 200), ("GPU.lan:80", 200), ("other.lan", 200), ("third.lan", 403)]:
            assert client.get("/v1/models", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("settings", [{"api_keys": ("k",)}, {"host": "0.0.0.0", "allow_insecure_bind": True}])
def test_a_server_with_a_key_or_for_other_machines_takes_any_name(
    make_app: AppFactory, settings: dict[str, object]
) -> None:
    with local_client(make_app(**settings)) as client:
        assert client.get("/live", headers={"Host": "gpu.example"}).status_code == 200
