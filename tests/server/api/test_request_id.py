"""Every answer names its request, by the client's own id where that is one."""

import pytest
from fastapi.testclient import TestClient


@pytest.mark.parametrize("offered", ["abc", "4bf92f35-77b3/4.7:x_y", "r" * 128])
@pytest.mark.parametrize("path", ["/live", "/v1/models", "/nothing", "/v1/completions"])
def test_a_clients_own_id_comes_back(client: TestClient, path: str, offered: str) -> None:
    assert client.get(path, headers={"X-Request-Id": offered}).headers["x-request-id"] == offered


@pytest.mark.parametrize("offered", [None, "", "r" * 129, "two words", 'quote"', "café".encode("latin-1")])
def test_what_is_no_id_is_replaced_by_a_new_one(client: TestClient, offered: str | bytes | None) -> None:
    headers = {} if offered is None else {"X-Request-Id": offered}
    first = client.get("/live", headers=headers).headers["x-request-id"]  # type: ignore[arg-type]
    second = client.get("/live").headers["x-request-id"]
    assert first.startswith("req-")
    assert first != second


def test_a_refused_host_and_a_stream_have_one_too(client: TestClient) -> None:
    assert client.get("/live", headers={"Host": "evil.example"}).headers["x-request-id"]
    assert client.post("/v1/completions", json={"prompt": "a", "stream": True}).headers["x-request-id"]
