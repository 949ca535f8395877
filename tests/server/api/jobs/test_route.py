"""The quantization routes as a client sees them, with the real store and the scripted quantizer behind them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from server.api.errors import install_error_handlers
from server.api.jobs.following import JobFollower
from server.api.jobs.places import JobPlaces
from server.api.jobs.route import router
from server.api.jobs.serving import QuantizeJobs
from server.jobs.store import JobStore
from tests.server.jobs.supervising import ends, reports_progress, scripted_supervisor


@dataclass(frozen=True)
class Server:
    """The routes in an application of their own, with the store behind them."""

    client: httpx.AsyncClient
    store: JobStore

    async def submit(self, **body: object) -> httpx.Response:
        return await self.client.post("/quantize", json=body)


@pytest.fixture
def places(tmp_path: Path) -> JobPlaces:
    """A models directory and another root, with models named after the parts that the scripted quantizer plays."""
    for name in ("data/models/succeed", "data/models/hang", "mine/owner/fail", "outside/secret"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "mine" / "text.txt").write_text("some text to calibrate with")
    (tmp_path / "mine" / "tiny.gguf").write_bytes(b"GGUF")
    (tmp_path / "mine" / "empty").mkdir()
    (tmp_path / "mine" / "way-out").symlink_to(tmp_path / "outside")
    (tmp_path / "mine" / "circle").symlink_to(tmp_path / "mine" / "circle")
    return JobPlaces(tmp_path / "data" / "models", (tmp_path / "mine",))


@asynccontextmanager
async def serving(places: JobPlaces, *, run_jobs: bool = True) -> AsyncIterator[Server]:
    """Without run_jobs, what is queued stays queued."""
    store = JobStore(places.models_dir.parent / "jobs.sqlite")
    supervisor = scripted_supervisor(store)
    app = FastAPI()
    install_error_handlers(app)
    app.include_router(router)
    app.state.quantize_jobs = QuantizeJobs(store, places, supervisor.wake, JobFollower(store, supervisor.news))
    if run_jobs:
        supervisor.start()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            yield Server(client, store)
    finally:
        await supervisor.stop()


def ask(places: JobPlaces, *questions: Callable[[Server], Awaitable[httpx.Response]]) -> list[httpx.Response]:
    """The answers to some requests, made one after the other to a server that runs no job."""

    async def run() -> list[httpx.Response]:
        async with serving(places, run_jobs=False) as server:
            return [await question(server) for question in questions]

    return asyncio.run(run())


def post(content: str | bytes, **headers: str) -> Callable[[Server], Awaitable[httpx.Response]]:
    return lambda server: server.client.post(
        "/quantize", content=content, headers={"Content-Type": "application/json", **headers}
    )


def get(path: str) -> Callable[[Server], Awaitable[httpx.Response]]:
    return lambda server: server.client.get(path)


def test_a_job_is_accepted_followed_and_found_succeeded(places: JobPlaces) -> None:
    async def run() -> None:
        async with serving(places) as server:
            # when a job is submitted with nothing but its model
            accepted = await server.submit(model="succeed")

            # then the answer says where it is, and how it will be done
            job = accepted.json()
            assert accepted.status_code == httpx.codes.ACCEPTED
            assert accepted.headers["location"] == f"/quantize/{job['id']}"
            assert (job["object"], job["status"], job["output"]) == (
                "quantization.job",
                "queued",
                "succeed-awq-gptq-w4",
            )
            assert (job["bits"], job["group_size"], job["method"], job["calib"]) == (4, "auto", "awq+gptq", "self")

            # and a look at that place later finds it done
            await ends(server.store, job["id"])
            finished = (await server.client.get(accepted.headers["location"])).json()
            assert finished["status"] == "succeeded"
            assert finished["output_path"] == str(places.models_dir / "succeed-awq-gptq-w4")
            assert finished["progress"] == {"phase": "blocks", "done": 3, "total": 3, "seconds_left": 0.0}
            assert finished["report"]["perplexity"] == {"original": 32.5, "quantized": 35.25}
            assert finished["created_at"] <= finished["running_at"] <= finished["succeeded_at"]
            assert finished["failed_at"] is None

    asyncio.run(run())


def test_a_failed_job_has_its_reason(places: JobPlaces) -> None:
    async def run() -> None:
        async with serving(places) as server:
            job = (await server.submit(model="owner/fail", group_size=128)).json()
            assert job["output"] == "fail-awq-gptq-w4g128"
            await ends(server.store, job["id"])
            failed = (await server.client.get(f"/quantize/{job['id']}")).json()
            assert failed["status"] == "failed"
            assert failed["error"]["message"].startswith("group size 128 does not divide the 576 in features")

    asyncio.run(run())


def test_a_running_job_is_cancelled_as_often_as_it_is_asked_for(places: JobPlaces) -> None:
    async def run() -> None:
        async with serving(places) as server:
            job = (await server.submit(model="hang")).json()
            await reports_progress(server.store, job["id"])
            cancel = await server.client.post(f"/quantize/{job['id']}/cancel")
            assert cancel.status_code == httpx.codes.OK
            assert cancel.json()["cancel_requested_at"] is not None
            await ends(server.store, job["id"])
            assert (await server.client.get(f"/quantize/{job['id']}")).json()["status"] == "cancelled"
            again = await server.client.post(f"/quantize/{job['id']}/cancel")
            assert (again.status_code, again.json()["status"]) == (httpx.codes.OK, "cancelled")
            assert again.json()["cancel_requested_at"] == cancel.json()["cancel_requested_at"]

    asyncio.run(run())


def test_a_job_that_succeeded_cannot_be_cancelled(places: JobPlaces) -> None:
    async def run() -> None:
        async with serving(places) as server:
            job = (await server.submit(model="succeed")).json()
            await ends(server.store, job["id"])
            refusal = await server.client.post(f"/quantize/{job['id']}/cancel")
            assert refusal.status_code == httpx.codes.CONFLICT
            assert "is succeeded" in refusal.json()["error"]["message"]

    asyncio.run(run())


def test_the_list_goes_page_by_page_newest_first(places: JobPlaces) -> None:
    async def run() -> None:
        async with serving(places, run_jobs=False) as server:
            ids = [(await server.submit(model="succeed", output=f"out-{n}")).json()["id"] for n in range(3)]
            first = (await server.client.get("/quantize", params={"limit": 2})).json()
            rest = (await server.client.get("/quantize", params={"after": first["last_id"]})).json()
            assert [job["id"] for job in first["data"] + rest["data"]] == ids[::-1]
            assert (first["object"], first["has_more"], rest["has_more"]) == ("list", True, False)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "source"),
    [
        ({"model": "succeed"}, "data/models/succeed"),
        ({"model": "owner/fail"}, "mine/owner/fail"),
        ({"model": "tiny.gguf"}, "mine/tiny.gguf"),
        ({"model": "../models/hang"}, "data/models/hang"),
    ],
)
def test_a_model_is_found_by_name_under_the_allowed_directories(
    places: JobPlaces, tmp_path: Path, body: dict[str, str], source: str
) -> None:
    (answer,) = ask(places, lambda server: server.submit(**body))
    assert answer.json()["model"] == str(tmp_path / source)


def test_absolute_paths_and_hub_names_are_models_too(places: JobPlaces, tmp_path: Path) -> None:
    by_path, by_hub_name = ask(
        places,
        lambda server: server.submit(model=str(tmp_path / "mine" / "owner" / "fail"), calib="text.txt"),
        lambda server: server.submit(model="HuggingFaceTB/SmolLM2-135M", method="rtn", group_size=64),
    )
    assert by_path.json()["calib"] == str(tmp_path / "mine" / "text.txt")
    assert by_hub_name.json()["model"] == "HuggingFaceTB/SmolLM2-135M"
    assert by_hub_name.json()["output"] == "SmolLM2-135M-rtn-w4g64"


def test_calibration_may_be_a_preset_or_a_mix_of_what_the_client_may_name(places: JobPlaces, tmp_path: Path) -> None:
    preset, mix = ask(
        places,
        lambda server: server.submit(model="succeed", output="a", calib="wikitext"),
        lambda server: server.submit(model="succeed", output="b", calib="text.txt:0.5,self:0.25,owner/chat:0.25"),
    )
    assert preset.json()["calib"] == "wikitext"
    assert mix.json()["calib"] == f"{tmp_path / 'mine' / 'text.txt'}:0.5,self:0.25,owner/chat:0.25"


def test_a_job_takes_every_option_and_shows_it(places: JobPlaces) -> None:
    options = {
        "bits": 3,
        "group_size": "row",
        "format": "compressed-tensors",
        "target_bpw": 3.5,
        "lm_head": 8,
        "method": "best",
        "calib": "wikitext",
        "calib_samples": 8,
        "calib_seqlen": 128,
        "seed": 7,
        "device": "cpu",
        "max_kl": 0.25,
        "no_eval": False,
    }
    (accepted,) = ask(places, lambda server: server.submit(model="succeed", **options))
    job = accepted.json()
    assert options.items() <= job.items()
    assert job["output"] == "succeed-best-w3row-3.5bpw-head8"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ('{"bits": 4}', "model", "required"),
        ('{"model": ""}', "model", "at least 1 character"),
        ('{"model": 7}', "model", "string"),
        ('{"model": "no-such-model"}', "model", "model roots"),
        ('{"model": "circle"}', "model", "neither"),
        ('{"model": "circle/below/it"}', "model", "neither"),
        ('{"model": "succeed", "calib": "circle"}', "calib", "neither"),
        ('{"model": "empty"}', "model", "config.json"),
        ('{"model": "outside/../../outside/secret"}', "model", "neither"),
        ('{"model": "./way-out/secret"}', "model", "neither"),
        ('{"model": "/etc/passwd"}', "model", "neither"),
        ('{"model": "a\\u0000b"}', "model", "printable"),
        ('{"model": "' + "x" * 400 + '"}', "model", "neither"),
        ('{"model": "succeed", "bits": 5}', "bits", "bits is 5; supported: 3, 4, 8"),
        ('{"model": "succeed", "bits": true}', "bits", "should be an integer, and it is true"),
        ('{"model": "succeed", "bits": 4.5}', "bits", "should be an integer, and it is 4.5"),
        ('{"model": "succeed", "group_size": 48}', "group_size", "is 48; supported: auto, 128, 64, 32, row"),
        ('{"model": "succeed", "group_size": "big"}', "group_size", "is 'big'; supported: auto, 128, 64, 32, row"),
        ('{"model": "succeed", "group_size": "' + "9" * 5000 + '"}', "group_size", "supported: auto, 128, 64, 32, row"),
        ('{"model": "succeed", "group_size": true}', "group_size", 'a number, "auto" or "row", and it is true'),
        ('{"model": "succeed", "method": "hqq"}', "method", "'awq+gptq' or 'best', and it is \"hqq\""),
        ('{"model": "succeed", "format": "gptq"}', "format", "supported: auto, awq, compressed-tensors"),
        ('{"model": "succeed", "bits": 8, "format": "awq"}', "format", "use format compressed-tensors"),
        ('{"model": "succeed", "target_bpw": 0}', "target_bpw", "it must be a number like 4.25"),
        ('{"model": "succeed", "target_bpw": "4.5"}', "target_bpw", 'should be a number, and it is "4.5"'),
        ('{"model": "succeed", "target_bpw": 4.5, "method": "rtn"}', "target_bpw", "use method awq+gptq"),
        ('{"model": "succeed", "lm_head": 5}', "lm_head", "lm head is 5; supported: 8, 4, or left alone"),
        ('{"model": "succeed", "seed": -1}', "seed", "seed is -1; it must be 0 to"),
        ('{"model": "succeed", "seed": 1e300}', "seed", "should be an integer"),
        ('{"model": "succeed", "device": "tpu"}', "device", "'auto', 'cpu' or 'cuda', and it is \"tpu\""),
        ('{"model": "succeed", "max_kl": 0}', "max_kl", "a number of nats above 0"),
        ('{"model": "succeed", "max_kl": 0.2, "no_eval": true}', "max_kl", "nothing is measured"),
        ('{"model": "succeed", "no_eval": 1}', "no_eval", "should be true or false, and it is 1"),
        ('{"model": "succeed", "method": "rtn", "calib": "wikitext"}', "calib", "the method rtn reads no calibration"),
        ('{"model": "succeed", "output": "../escape"}', "output", "one plain directory name"),
        ('{"model": "succeed", "output": "a/b"}', "output", "one plain directory name"),
        ('{"model": "succeed", "output": ".hidden"}', "output", "one plain directory name"),
        ('{"model": "succeed", "calib": "/etc/passwd"}', "calib", "neither"),
        ('{"model": "succeed", "calib": "self:0.5,/etc/passwd:0.5"}', "calib", "'/etc/passwd' is neither"),
        ('{"model": "succeed", "calib": "self:0.5,wikitext:0.4"}', "calib", "add up to 0.9; they must add up to 1"),
        ('{"model": "succeed", "calib_samples": 0}', "calib_samples", "calibration samples is 0; it must be 1 to"),
        ('{"model": "succeed", "group_sise": 64}', "group_sise", "group_sise is no field that this route knows"),
        ('["succeed"]', None, "object"),
        ("{model: succeed}", None, "JSON"),
        ("", None, "empty"),
    ],
)
def test_a_wrong_body_is_refused_by_name_before_anything_is_queued(
    places: JobPlaces, body: str, param: str | None, words: str
) -> None:
    refusal, listing = ask(places, post(body), get("/quantize"))
    error = refusal.json()["error"]
    assert (refusal.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]
    # where the server keeps its models is not for clients
    assert str(places.models_dir.parent.parent) not in error["message"]
    assert listing.json()["data"] == []


def test_a_directory_below_the_working_directory_does_not_pass_for_a_hub_name(
    places: JobPlaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the quantizer would find it there, outside of the allowed directories
    monkeypatch.chdir(tmp_path)
    (refusal,) = ask(places, lambda server: server.submit(model="outside/secret"))
    assert refusal.status_code == httpx.codes.BAD_REQUEST


def test_an_output_that_exists_or_is_being_written_is_a_conflict(places: JobPlaces) -> None:
    exists, first, second = ask(
        places,
        lambda server: server.submit(model="succeed", output="hang"),
        lambda server: server.submit(model="succeed", output="new"),
        lambda server: server.submit(model="hang", output="new"),
    )
    assert [answer.status_code for answer in (exists, first, second)] == [409, 202, 409]
    assert exists.json()["error"]["param"] == second.json()["error"]["param"] == "output"
    assert str(places.models_dir) not in exists.json()["error"]["message"]
    assert first.json()["id"] in second.json()["error"]["message"]


def test_the_same_key_makes_one_job_even_after_its_output_is_there(places: JobPlaces) -> None:
    async def run() -> None:
        async with serving(places) as server:
            key = {"Idempotency-Key": "retry-1"}
            first = await server.client.post("/quantize", json={"model": "succeed"}, headers=key)
            await ends(server.store, first.json()["id"])
            again = await server.client.post("/quantize", json={"bits": 4, "model": "succeed"}, headers=key)
            other = await server.client.post("/quantize", json={"model": "hang"}, headers=key)
            assert (again.status_code, again.json()["id"]) == (httpx.codes.ACCEPTED, first.json()["id"])
            assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")

    asyncio.run(run())


def test_an_overlong_key_is_refused(places: JobPlaces) -> None:
    (refusal,) = ask(places, post('{"model": "succeed"}', **{"Idempotency-Key": "k" * 256}))
    assert refusal.status_code == httpx.codes.BAD_REQUEST


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/quantize/qjob-0", 404),
        ("/quantize?limit=0", 400),
        ("/quantize?limit=101", 400),
        ("/quantize?limit=many", 400),
        ("/quantize?after=qjob-0", 400),
    ],
)
def test_a_look_at_what_is_not_there_is_refused(places: JobPlaces, path: str, status: int) -> None:
    (refusal,) = ask(places, get(path))
    assert refusal.status_code == status
    assert refusal.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        # programs, and the server's own pages
        ({}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://server"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://server"}, 200),
        # a browser asks before it sends JSON elsewhere, and is told no
        ({"Sec-Fetch-Site": "cross-site", "Content-Type": "application/json"}, 200),
        # pages of others, whose forms and scripts a browser sends without asking
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://server:81"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}, 403),
        ({"Origin": "http://evil.example", "Content-Type": "application/x-www-form-urlencoded"}, 403),
        ({"Origin": "http://server:81"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_no_page_of_another_site_cancels_a_job(places: JobPlaces, headers: dict[str, str], status: int) -> None:
    async def run() -> httpx.Response:
        async with serving(places, run_jobs=False) as server:
            job = (await server.submit(model="succeed")).json()
            return await server.client.post(f"/quantize/{job['id']}/cancel", headers=headers)

    answer = asyncio.run(run())
    assert answer.status_code == status
    if status == httpx.codes.FORBIDDEN:
        assert answer.json()["error"]["code"] == "cross_site_request"


def test_a_job_file_that_fails_is_a_503_and_not_a_crash(places: JobPlaces) -> None:
    async def run() -> httpx.Response:
        async with serving(places, run_jobs=False) as server:
            server.store.close()
            return await server.submit(model="succeed")

    refusal = asyncio.run(run())
    assert refusal.status_code == httpx.codes.SERVICE_UNAVAILABLE
    assert refusal.headers["retry-after"] == "5"
    assert refusal.json()["error"]["code"] == "job_store_unavailable"
