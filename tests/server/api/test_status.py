"""The probes, the version, the metrics and the list of models."""

from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from server.jobs.record import JobRecipe
from tests.server.api.conftest import MAX_MODEL_LEN, AppFactory, local_client
from tests.server.api.fake_engine import FakeEngineClient


def test_a_ready_server_says_so(client: TestClient) -> None:
    for path, status in [("/live", "live"), ("/ready", "ready"), ("/health", "ready")]:
        response = client.get(path)
        assert (response.status_code, response.json()) == (200, {"status": status})


@pytest.mark.parametrize("path", ["/live", "/ready", "/health"])
def test_a_probe_may_ask_for_the_head_alone(client: TestClient, engine: FakeEngineClient, path: str) -> None:
    assert client.head(path).status_code == 200
    engine.set_state("loading", "layer 3 of 30")
    assert client.head(path).status_code == (200 if path == "/live" else 503)


@pytest.mark.parametrize("state", ["loading", "restarting", "draining", "failed"])
def test_a_server_that_is_not_ready_lives_and_says_why(
    client: TestClient, engine: FakeEngineClient, state: str
) -> None:
    engine.set_state(state, "loading layer 3 of 30")
    assert client.get("/live").status_code == 200
    for path in ("/ready", "/health"):
        response = client.get(path)
        assert response.status_code == 503
        assert "layer 3 of 30" in response.json()["error"]["message"]
        assert "retry-after" in response.headers


def test_the_version_is_told(client: TestClient) -> None:
    assert client.get("/version").json()["version"]


def test_metrics_have_vllms_names_behind_our_prefix(client: TestClient) -> None:
    client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 3})
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    for line in (
        "awq_serve_num_requests_running 0.0",
        "awq_serve_num_requests_waiting 0.0",
        "awq_serve_kv_cache_usage_perc 0.0",
        "awq_serve_prompt_tokens_total 0.0",
        "awq_serve_generation_tokens_total 0.0",
        "awq_serve_num_preemptions_total 0.0",
        "awq_serve_spec_decode_num_drafts_total 0.0",
        "awq_serve_spec_decode_num_draft_tokens_total 0.0",
        "awq_serve_spec_decode_num_accepted_tokens_total 0.0",
        'awq_serve_request_success_total{finished_reason="length"} 1.0',
        "awq_serve_time_to_first_token_seconds_count 1.0",
        "awq_serve_e2e_request_latency_seconds_count 1.0",
    ):
        assert f"\n{line}\n" in response.text


def test_two_servers_in_one_process_count_apart(make_app: AppFactory) -> None:
    with local_client(make_app()) as first, local_client(make_app()) as second:
        first.get("/nothing")
        assert "http_errors_total{" not in second.get("/metrics").text


def test_no_label_is_a_name_that_a_client_invented(client: TestClient) -> None:
    body = {"prompt": "ab", "detokenize": True, **{f"field_{number}": 1 for number in range(100)}}
    client.post("/v1/completions", json=body)
    lines = [line for line in client.get("/metrics").text.splitlines() if "unknown_request_fields_total{" in line]
    name = "awq_serve_unknown_request_fields_total"
    assert sorted(lines) == [f'{name}{{field="detokenize"}} 1.0', f'{name}{{field="other"}} 100.0']


def test_the_served_model_is_listed(client: TestClient) -> None:
    model = {
        "id": "tiny",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "awq-serve",
        "root": "/models/tiny",
        "parent": None,
        "max_model_len": MAX_MODEL_LEN,
        "status": "serving",
    }
    assert client.get("/v1/models").json() == {"object": "list", "data": [model]}
    assert client.get("/v1/models/tiny").json() == model


def test_a_finished_quantization_is_listed(make_app: AppFactory, tmp_path: Path) -> None:
    # given a job that has made a checkpoint
    output = tmp_path / "models" / "mine-awq"
    output.mkdir(parents=True)
    app = make_app()
    store = make_app.stores[-1]
    job = store.submit(JobRecipe("source", output, 4, 64, "awq", "self"))
    store.claim_next()
    store.succeed(job.id, None)
    # then it is there, and said to be no more than finished
    with local_client(app) as client:
        [finished] = client.get("/v1/models").json()["data"][1:]
        assert (finished["id"], finished["root"], finished["status"]) == ("mine-awq", str(output), "finished")
        for path in ("/v1/completions", "/v1/chat/completions"):
            body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "model": "mine-awq"}
            refusal = client.post(path, json=body)
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (404, "model_not_found")
            assert "was made here but is not served; restart the server with it" in refusal.json()["error"]["message"]


def test_a_checkpoint_by_the_served_ones_name_or_that_is_gone_is_not_listed(
    make_app: AppFactory, tmp_path: Path
) -> None:
    gone = tmp_path / "models" / "gone"
    named_alike = tmp_path / "models" / "tiny"
    named_alike.mkdir(parents=True)
    app = make_app()
    app.state.services = replace(app.state.services, finished_models=lambda: (named_alike, gone))
    with local_client(app) as client:
        assert [model["status"] for model in client.get("/v1/models").json()["data"]] == ["serving"]
        assert client.get("/v1/models/tiny").json()["root"] == "/models/tiny"


def test_an_unknown_model_is_not_found(client: TestClient) -> None:
    response = client.get("/v1/models/owner/none")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
