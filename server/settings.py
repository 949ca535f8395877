"""Every setting of the server, read once from flags, environment and file, then frozen. Nothing else reads them."""

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from server.engine.config import AdapterConfig, CpuKernel, Device, DType, EngineConfig, GenerationConfig, KvCacheDType

ENVIRONMENT_PREFIX = "AWQ_SERVE_"
# names the settings file itself, so it cannot be in one
CONFIG_VARIABLE = "AWQ_SERVE_CONFIG"
# the one key of most servers, under the name by which its clients have it too
KEY_VARIABLE = "AWQ_SERVE_API_KEY"
MEBIBYTE = 1 << 20
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(|KiB|MiB|GiB)")
_SIZE_UNITS = {"": 1, "KiB": 1 << 10, "MiB": MEBIBYTE, "GiB": 1 << 30}


class SettingsError(Exception):
    """A setting is unknown, out of range or does not fit another; the message is for the terminal."""


class Settings(BaseSettings):
    """What a server is told. Flags win over AWQ_SERVE_* variables, those over the file, that over the defaults.

    The descriptions are the help of the flags; docs/settings.md and server/engine/config.py say more.
    """

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, frozen=True, extra="forbid")

    model: Annotated[str | None, Field(description="checkpoint directory or hub name; the demo model if left out")] = (
        None
    )
    served_model_name: Annotated[
        str | None,
        Field(min_length=1, max_length=256, description="its name for clients; the hub's or directory's if not set"),
    ] = None
    lora: Annotated[
        tuple[AdapterConfig, ...],
        NoDecode,
        Field(description="NAME=PATH: a LoRA adapter of the model, which requests choose by NAME; may be repeated"),
    ] = ()
    host: Annotated[str, Field(description="address to listen on; beyond this machine it needs an API key")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8000
    api_keys: Annotated[
        tuple[str, ...], NoDecode, Field(repr=False, description="a key that opens the guarded routes; may be repeated")
    ] = ()
    api_key_file: Annotated[Path | None, Field(description="file with one key a line")] = None
    allow_insecure_bind: Annotated[bool, Field(description="listen for other machines without a key")] = False
    allowed_hosts: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(description="another name in Host headers to answer to without a key; may be repeated"),
    ] = ()
    data_dir: Annotated[Path, Field(description="jobs, finished checkpoints, the demo model")] = Path(
        "~/.local/share/awq-serve"
    )
    model_roots: Annotated[
        tuple[Path, ...], NoDecode, Field(description="directory that quantization jobs may read; may be repeated")
    ] = ()
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="debug, info, warning or error")
    ] = "info"
    drain_seconds: Annotated[
        float, Field(ge=0, le=3600, description="how long requests under way may finish after SIGTERM")
    ] = 30.0

    device: Annotated[Device, Field(description="cuda, cpu, or auto: a GPU where there is one")] = "auto"
    dtype: Annotated[DType, Field(description="of activations: auto, float32, bfloat16 or float16")] = "auto"
    kv_cache_dtype: Annotated[
        KvCacheDType, Field(description="of keys and values: auto (the model's), bfloat16, float16, int8 or fp8")
    ] = "auto"
    max_model_len: Annotated[
        int | None, Field(ge=1, description="tokens of prompt and answer together; the model's own if not set")
    ] = None
    max_num_seqs: Annotated[int, Field(ge=1, description="sequences that run at once")] = 64
    max_num_batched_tokens: Annotated[
        int | None, Field(ge=1, description="tokens that one step computes; by device if not set")
    ] = None
    block_size: Annotated[int | None, Field(ge=1, description="tokens in a block of the KV cache")] = None
    kv_cache_memory: Annotated[
        int | None, Field(ge=1, description="of the KV cache: bytes, or a number with KiB, MiB or GiB")
    ] = None
    gpu_memory_utilization: Annotated[
        float, Field(gt=0, le=1, description="share of the GPU for weights and KV cache")
    ] = 0.9
    max_waiting: Annotated[int, Field(ge=0, description="requests that may wait; the next one is answered 429")] = 256
    num_threads: Annotated[int | None, Field(ge=1, description="threads of the engine on a CPU")] = None
    cpu_kernel: Annotated[
        CpuKernel, Field(description="on a CPU: native (compiled at first use), torch, or auto: native where it can be")
    ] = "auto"
    generation_config: Annotated[
        GenerationConfig, Field(description="auto: sample as the model's generation_config.json says; off: plainly")
    ] = "auto"

    prefix_caching: Annotated[bool, Field(description="compute the common beginning of prompts once")] = True
    deterministic: Annotated[
        bool, Field(description="a request's tokens are bit for bit those it gets alone; slower where much is shared")
    ] = False

    num_speculative_tokens: Annotated[
        int,
        Field(ge=0, le=64, description="tokens guessed from what was said before and verified at once; 0 for none"),
    ] = 0

    draft_model: Annotated[
        Path | None,
        Field(description="checkpoint directory of a small model of the same vocabulary that makes the guesses"),
    ] = None

    enforce_eager: Annotated[
        bool, Field(description="on a GPU, launch the kernels of every step one by one instead of CUDA graphs")
    ] = False

    max_body_bytes: Annotated[int, Field(ge=1024, description="largest request body")] = 8 * MEBIBYTE
    max_prompts: Annotated[int, Field(ge=1, description="prompts in one request")] = 128
    max_stop_strings: Annotated[int, Field(ge=1, description="stop strings in one request")] = 16
    max_stop_characters: Annotated[int, Field(ge=1, description="characters of one stop string")] = 256

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        key = os.environ.get(KEY_VARIABLE)
        one_key = InitSettingsSource(settings_cls, {"api_keys": (key,)} if key else {})
        return init_settings, env_settings, one_key, TomlConfigSettingsSource(settings_cls)

    @field_validator("api_keys", "allowed_hosts", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        """An environment variable holds several with commas between."""
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value

    @field_validator("lora", mode="before")
    @classmethod
    def _parse_adapters(cls, value: object) -> object:
        """NAME=PATH, in a list or with commas between."""
        given = tuple(filter(None, value.split(","))) if isinstance(value, str) else value
        return tuple(map(parse_adapter, given)) if isinstance(given, list | tuple) else given

    @field_validator("lora")
    @classmethod
    def _check_adapters(cls, adapters: tuple[AdapterConfig, ...]) -> tuple[AdapterConfig, ...]:
        names = [adapter.name for adapter in adapters]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two adapters are called {twice}; give each a name of its own")
        return adapters

    @field_validator("kv_cache_memory", mode="before")
    @classmethod
    def _parse_size(cls, value: object) -> object:
        """`512MiB` as well as its bytes."""
        if not isinstance(value, str):
            return value
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"it must be a number of bytes, or one followed by KiB, MiB or GiB, and it is {value}")
        return int(float(match[1]) * _SIZE_UNITS[match[2]])

    @field_validator("model_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        """An environment variable holds several directories as PATH does."""
        return tuple(filter(None, value.split(os.pathsep))) if isinstance(value, str) else value

    @field_validator("model_roots")
    @classmethod
    def _expand_roots(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(root.expanduser().absolute() for root in roots)

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if not all(key.isascii() and key.isprintable() and key.strip() == key != "" for key in keys):
            raise ValueError("an API key is printable ASCII without spaces around it, and not empty")
        return keys

    @field_validator("data_dir", "api_key_file", "draft_model")
    @classmethod
    def _expand_home(cls, path: Path | None) -> Path | None:
        return path.expanduser().absolute() if path is not None else None

    @model_validator(mode="after")
    def _check_public_bind(self) -> Self:
        if self.allow_insecure_bind or self.api_keys or self.api_key_file or is_loopback(self.host):
            return self
        raise ValueError(
            f"host {self.host} is reachable from other machines and there is no API key; add --api-key KEY, "
            "or --allow-insecure-bind if something else guards the port"
        )

    @property
    def models_dir(self) -> Path:
        """Where quantization jobs put their checkpoints."""
        return self.data_dir / "models"

    @property
    def jobs_file(self) -> Path:
        return self.data_dir / "jobs.sqlite"

    def engine_config(self, model_path: Path) -> EngineConfig:
        """The part of the settings that the engine gets, for a model directory."""
        return EngineConfig(
            model_path=str(model_path),
            device=self.device,
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            kv_cache_bytes=self.kv_cache_memory,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_waiting=self.max_waiting,
            num_threads=self.num_threads,
            cpu_kernel=self.cpu_kernel,
            generation_config=self.generation_config,
            prefix_caching=self.prefix_caching,
            deterministic=self.deterministic,
            num_speculative_tokens=self.num_speculative_tokens,
            adapters=self.lora,
            draft_model_path=None if self.draft_model is None else str(self.draft_model),
            enforce_eager=self.enforce_eager,
        )


def parse_adapter(given: object) -> object:
    """NAME=PATH as an adapter, and an adapter as it is. Raises ValueError for anything else."""
    if isinstance(given, AdapterConfig):
        return given
    if not isinstance(given, str):
        raise ValueError(f"an adapter is given as NAME=PATH, and it is {given}")
    name, separator, path = given.partition("=")
    if not separator or not path or not name.isprintable() or name.strip() != name or not 0 < len(name) <= 256:
        raise ValueError(f"an adapter is given as NAME=PATH, and it is {given}")
    return AdapterConfig(name, str(Path(path).expanduser().absolute()))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address or name that a server listens on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_settings(flags: Mapping[str, object], config_file: Path | None = None) -> Settings:
    """Read the settings: the given flags, the environment, and the TOML file given or named by AWQ_SERVE_CONFIG.

    An API key file's keys, one a line, are added to api_keys. Raises SettingsError, which names what is wrong.
    """
    if config_file is None and CONFIG_VARIABLE in os.environ:
        config_file = Path(os.environ[CONFIG_VARIABLE])
    if config_file is not None:
        _check_file(config_file)
    _check_variables()

    class FileSettings(Settings):
        model_config = SettingsConfigDict(toml_file=config_file)

    try:
        settings = FileSettings.model_validate(flags)
        if settings.api_key_file is None:
            return settings
        keys = _read_keys(settings.api_key_file)
        return FileSettings.model_validate({**flags, "api_keys": (*settings.api_keys, *keys)})
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(detail["loc"], detail["msg"]) for detail in error.errors())) from error


def _check_file(path: Path) -> None:
    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"the settings file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"the settings file {path} is no valid TOML: {error}") from error


def _read_keys(path: Path) -> list[str]:
    """An empty file is an error: whoever names one means to close the server."""
    try:
        keys = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise SettingsError(f"the API key file {path} cannot be read: {error}") from error
    if not keys:
        raise SettingsError(f"the API key file {path} holds no key; write one key a line into it")
    return keys


def known_variables() -> set[str]:
    """Every environment variable that is read."""
    return {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields} | {CONFIG_VARIABLE, KEY_VARIABLE}


def _check_variables() -> None:
    """A misspelt variable must not be ignored in silence."""
    known = known_variables()
    unknown = sorted(name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX) and name not in known)
    if unknown:
        raise SettingsError(
            f"unknown environment variables: {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    if os.environ.get(KEY_VARIABLE) and os.environ.get(f"{KEY_VARIABLE}S"):
        raise SettingsError(f"{KEY_VARIABLE} and {KEY_VARIABLE}S are both set; put all keys into {KEY_VARIABLE}S")


def _sentence(location: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    if not location:
        return message
    name = str(location[0])
    if message == "Extra inputs are not permitted":
        return f"unknown setting {name!r}; known are {', '.join(sorted(Settings.model_fields))}"
    return f"{name.replace('_', '-')}: {message[0].lower()}{message[1:]}"
