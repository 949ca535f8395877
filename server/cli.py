"""The command `awq-serve`: serves in this process, and hands the quantizer's commands to a process of its own."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import structlog
import typer
from rich.console import Console

from quant.checkpoint.location import resolve_model
from quant.errors import QuantError
from server.api.services import ServedModel
from server.app import create_app
from server.demo import DemoModelError, find_demo_gguf, prepare_demo_model
from server.engine.client import ProcessEngineClient
from server.engine_log import EngineLog
from server.errors import JobStoreUnavailable
from server.http_server import GracefulServer, ListenError, listen
from server.jobs.store import JobStore
from server.ready_lines import ReadyLines
from server.settings import Settings, SettingsError, load_settings
from server.settings_flags import add_settings_command
from server.text.tokenizer import Tokenizer, TokenizerError

PROGRAM = "awq-serve"
EXIT_REFUSED = 2
EXIT_FAILED = 1
# quantizing these needs the network, where the demo model's file is not installed
HUB_EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False
)


class StartRefused(Exception):
    """Why the server does not start; one sentence for the terminal."""


# what stops a start, each with a sentence that says what to do
REFUSALS = (
    StartRefused,
    SettingsError,
    QuantError,
    DemoModelError,
    ListenError,
    TokenizerError,
    JobStoreUnavailable,
)


@app.callback()
def describe() -> None:
    """Quantize language models to 4-bit AWQ, and serve them behind an OpenAI-compatible API."""


def serve(flags: Mapping[str, object], config_file: Path | None) -> None:
    """Serve MODEL, a checkpoint directory or a hub name; without it, the demo model.

    Every option is also an environment variable (`AWQ_SERVE_MAX_NUM_SEQS`) and a key of the settings file.

    **Examples**

        awq-serve serve

        awq-serve serve ./SmolLM2-135M-Instruct-awq --port 8001

        awq-serve serve ./model --host 0.0.0.0 --api-key "$KEY"
    """
    try:
        check_no_foreign_kernels()
        failure = run_server(load_settings(flags, config_file))
    except REFUSALS as error:
        tell_failure(str(error))
        raise typer.Exit(EXIT_REFUSED) from error
    if failure is not None:
        tell_failure(failure)
        raise typer.Exit(EXIT_FAILED)


add_settings_command(app, "serve", serve)


@app.command("quantize", context_settings=PASSED_ON)
def quantize(context: typer.Context) -> None:
    """Quantize a model; `awq-serve quantize --help` says how."""
    run_quantizer("quantize", context.args)


@app.command("eval", context_settings=PASSED_ON)
def evaluate(context: typer.Context) -> None:
    """Measure a checkpoint against its original; `awq-serve eval --help` says how."""
    run_quantizer("eval", context.args)


@app.command("convert", context_settings=PASSED_ON)
def convert(context: typer.Context) -> None:
    """Write a checkpoint in another format; `awq-serve convert --help` says how."""
    run_quantizer("convert", context.args)


@app.command("inspect", context_settings=PASSED_ON)
def inspect(context: typer.Context) -> None:
    """Print what a checkpoint holds; `awq-serve inspect --help` says how."""
    run_quantizer("inspect", context.args)


def main() -> None:
    app(prog_name=PROGRAM)


def run_quantizer(command: str, arguments: list[str]) -> None:
    """Become the quantizer's process: the server's never loads what it needs."""
    os.execv(sys.executable, [sys.executable, "-m", "quant", command, *arguments])


def run_server(settings: Settings) -> str | None:
    """Serve until told to end, or until the engine has failed for good. Returns why it has, or None.

    Raises one of REFUSALS when it cannot start with what it was given.
    """
    set_up_logs(settings.log_level)
    listener = listen(settings.host, settings.port)
    model_path = locate_model(settings)
    tokenizer = Tokenizer.load(model_path)
    check_adapters(settings, name_model(settings, model_path))
    check_draft(settings)
    served = ServedModel(name_model(settings, model_path), str(model_path), int(time.time()))
    engine = ProcessEngineClient(settings.engine_config(model_path), listener=EngineLog())
    quantizable, settings = allow_demo_as_source(settings)
    lines = ReadyLines(
        host=settings.host,
        port=listener.getsockname()[1],
        model_name=served.name,
        has_key=bool(settings.api_keys),
        has_chat=tokenizer.chat_template is not None,
        quantizable=quantizable,
    )
    application = create_app(settings, served, engine, tokenizer, JobStore(settings.jobs_file))
    server = GracefulServer(
        application,
        settings,
        engine,
        announce=lambda: tell("\n".join(lines.render())),
        stop_jobs=application.state.job_supervisor.stop,
    )
    tell(f"Loading {model_path}")
    server.run(sockets=[listener])
    if server.failure is None:
        return None
    if server.failure.is_refusal:
        raise StartRefused(server.failure.detail)
    return server.failure.detail


def locate_model(settings: Settings) -> Path:
    """The checkpoint directory to serve; fetched or made first where that is what it takes."""
    if settings.model is None:
        return prepare_demo_model(settings.data_dir, tell)
    path = resolve_model(settings.model)
    if not path.is_dir():
        raise StartRefused(f"{path} is one file; make a checkpoint of it first: {PROGRAM} quantize {path} OUT")
    if not (path / "config.json").is_file():
        raise StartRefused(f"{path} has no config.json, so it is no model; name a model's directory or its hub name")
    return path.absolute()


def name_model(settings: Settings, path: Path) -> str:
    """What clients call the model that was found at the path, where nobody set a name."""
    if settings.served_model_name is not None:
        return settings.served_model_name
    if settings.model is None or Path(settings.model).expanduser().exists():
        return path.name
    # the hub's cache has it in a directory named after a commit
    return settings.model


def check_adapters(settings: Settings, model_name: str) -> None:
    """Raise StartRefused for an adapter that is nowhere, or has the model's name; the engine looks at what is in it."""
    for adapter in settings.lora:
        if adapter.name == model_name:
            raise StartRefused(f"the adapter {adapter.name} has the model's name; give it another: --lora NAME=PATH")
        if not (Path(adapter.path) / "adapter_config.json").is_file():
            raise StartRefused(
                f"the adapter {adapter.name}: {adapter.path} has no adapter_config.json; name a directory that PEFT "
                "saved an adapter in"
            )


def check_draft(settings: Settings) -> None:
    """Raise StartRefused for a draft model that would not be asked, or is nowhere; the engine looks into it."""
    draft = settings.draft_model
    if draft is None:
        return
    if not settings.num_speculative_tokens:
        raise StartRefused(
            f"--draft-model {draft} would make no guesses: add --num-speculative-tokens 4, say, or leave it out"
        )
    if not (draft / "config.json").is_file():
        raise StartRefused(f"--draft-model {draft} has no config.json; name the directory of a model")


def allow_demo_as_source(settings: Settings) -> tuple[str, Settings]:
    """A model for the example of a quantization job; the demo model's own file where it is installed."""
    try:
        source = find_demo_gguf()
    except DemoModelError:
        return HUB_EXAMPLE, settings
    return source.name, settings.model_copy(update={"model_roots": (*settings.model_roots, source.parent)})


def check_no_foreign_kernels() -> None:
    """Raise StartRefused where the public distribution `kernels` is installed: it has our package's import name."""
    try:
        distribution("kernels")
    except PackageNotFoundError:
        return
    raise StartRefused(
        "the Python distribution `kernels` is installed here, and it has the same import name as a package of "
        f"{PROGRAM}; uninstall it (pip uninstall kernels), or install {PROGRAM} into an environment of its own"
    )


def set_up_logs(level: str) -> None:
    """One line an event on stderr, key=value."""
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(number, logging.WARNING) if level == "info" else number, stream=sys.stderr)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def tell(message: str) -> None:
    Console(soft_wrap=True, markup=False, highlight=False).print(message)


def tell_failure(message: str) -> None:
    Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(f"{PROGRAM}: {message}", style="red")


if __name__ == "__main__":
    main()
