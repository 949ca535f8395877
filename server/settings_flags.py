"""Every setting as a flag of `awq-serve serve`: the settings model is the only list of them."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, get_args

import typer
from pydantic.fields import FieldInfo

from server.settings import Settings

# the command's argument, and the flags whose repetition reads better in the singular
ARGUMENT = "model"
FLAGS = {"api_keys": "--api-key", "allowed_hosts": "--allowed-host"}


def add_settings_command(app: typer.Typer, name: str, run: Callable[[Mapping[str, object], Path | None], None]) -> None:
    """Add a command with an argument MODEL, --config and one flag a setting.

    It calls `run` with the given flags, as text that the settings parse, and with the settings file.
    """

    def command(*, config: Path | None, **flags: object) -> None:
        run({name: value for name, value in flags.items() if value not in (None, [])}, config)

    parameters = [_parameter(name, field) for name, field in Settings.model_fields.items()]
    config = Annotated[Path | None, typer.Option("--config", help="TOML file with settings")]
    parameters.append(_keyword("config", config, None))
    # typer asks a function for its signature, and this one's depends on the settings
    setattr(command, "__signature__", inspect.Signature(parameters))  # noqa: B010
    command.__doc__ = run.__doc__
    app.command(name)(command)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    if name == ARGUMENT:
        return _keyword(name, Annotated[str | None, typer.Argument(metavar="MODEL", help=field.description)], None)
    flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
    if field.annotation is bool:
        # both ways and no default, so that a flag wins over a variable whichever it says
        both = f"{flag}/--no-{flag.removeprefix('--')}"
        return _keyword(name, Annotated[bool | None, typer.Option(both, help=field.description)], None)
    if tuple in (field.annotation, getattr(field.annotation, "__origin__", None)):
        return _keyword(name, Annotated[list[str], typer.Option(flag, help=field.description)], [])
    default = f" (default {field.default})" if field.default is not None else ""
    option = typer.Option(flag, help=f"{field.description}{default}", metavar=_metavar(field))
    return _keyword(name, Annotated[str | None, option], None)


def _metavar(field: FieldInfo) -> str:
    kinds = {int: "INTEGER", float: "NUMBER", Path: "PATH"}
    types = get_args(field.annotation) or (field.annotation,)
    return next((kinds[kind] for kind in types if kind in kinds), "TEXT")


def _keyword(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
