"""With a key set, every route asks for it, but for the probes; the decision cannot be led astray."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from server.api.auth import KeyRing
from server.errors import AuthenticationFailed
from tests.server.api.conftest import AppFactory
from tests.server.api.fake_engine import FakeEngineClient

KEY = "sk-first"
PUBLIC = {"/live", "/ready", "/health", "/version"}


@pytest.fixture
def guarded(make_app: AppFactory) -> Iterator[TestClient]:
    with TestClient(make_app(api_keys=(KEY, "sk-second"))) as started:
        yield started


def all_routes(client: TestClient) -> list[tuple[str, str]]:
    paths = client.app.openapi()["paths"]  # type: ignore[attr-defined]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def test_every_route_but_the_probes_asks_for_the_key(guarded: TestClient) -> None:
    routes = all_routes(guarded)
    assert len(routes) >= 12
    for method, path in routes:
        status = guarded.request(method, path.replace("{", "").replace("}", "")).status_code
        assert (status == 401) == (path not in PUBLIC), (method, path, status)


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"],
)
def test_a_missing_or_wrong_key_is_401_in_openais_shape(guarded: TestClient, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = guarded.get("/v1/models", headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", "Bearer sk-second", f"Bearer  {KEY} "])
def test_each_key_opens(guarded: TestClient, header: str) -> None:
    assert guarded.get("/v1/models", headers={"Authorization": header}).status_code == 200


@pytest.mark.parametrize("host", ["x/health?", "x/live#", "localhost:80/health?a="])
def test_a_crafted_host_does_not_open_a_route(guarded: TestClient, host: str) -> None:
    assert guarded.get("/v1/models", headers={"Host": host}).status_code == 401


def test_two_keys_share_no_cached_prompt(guarded: TestClient, engine: FakeEngineClient) -> None:
    for key in (KEY, "sk-second", KEY):
        reply = guarded.post(
            "/v1/completions", json={"prompt": "ab", "max_tokens": 1}, headers={"Authorization": f"Bearer {key}"}
        )
        assert reply.status_code == 200
    first, second, again = (request.cache_salt for request in engine.requests)
    assert first == again != second
    # and the salt, which leaves the process, does not tell the key
    assert KEY not in first


def test_what_one_key_asks_for_is_one_owners(guarded: TestClient, engine: FakeEngineClient) -> None:
    for key, salt in ((KEY, "a"), ("sk-second", "a"), (KEY, "b")):
        body = {"prompt": "ab", "max_tokens": 1, "cache_salt": salt}
        guarded.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    first, second, again = (request.owner for request in engine.requests)
    # so that nobody gets more turns by inventing salts
    assert first == again != second


def test_a_body_is_not_read_without_a_key(guarded: TestClient) -> None:
    assert guarded.post("/v1/completions", content=b"{broken").status_code == 401


def test_bytes_beyond_ascii_in_the_header_are_a_wrong_key(guarded: TestClient) -> None:
    response = guarded.get("/v1/models", headers={"Authorization": "Bearer schlüssel".encode("latin-1")})  # type: ignore[dict-item]
    assert response.status_code == 401


def test_without_a_key_everything_is_open(client: TestClient) -> None:
    assert client.get("/v1/models").status_code == 200


def test_keys_are_not_kept_in_the_clear() -> None:
    ring = KeyRing([KEY])
    assert KEY not in repr(vars(ring))
    with pytest.raises(AuthenticationFailed):
        ring.check("Bearer nothing")
