"""From the name a user gives to a place on disk: a directory, a GGUF file, or a model fetched from the hub.

Imports no torch, so the process that answers HTTP can use it too.
"""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from quant.errors import SourceError

GGUF_SUFFIX = ".gguf"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
WHAT_A_MODEL_IS = f"give a directory, a {GGUF_SUFFIX} file or a hub name (owner/name)"
# weights as safetensors, what was folded into them, configs, tokenizers, chat templates and the card, which states the
# licence: no code, no pickle
HUB_PATTERNS = ["*.json", "*.safetensors", "*.awq", "*.txt", "*.model", "*.jinja", "README.md"]
# sub-folders hold other formats of the same model, and consolidated files a second copy of the weights
HUB_IGNORED = ["*/*", "consolidated*.safetensors"]


def resolve_model(name: str) -> Path:
    """The directory or .gguf file that `name` stands for; a hub name ("owner/name") is downloaded once and cached.

    Raises SourceError when it is none of them, or cannot be fetched.
    """
    if not name:
        raise SourceError(f"the model's name is empty: {WHAT_A_MODEL_IS}")
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == GGUF_SUFFIX):
        return path
    if path.exists():
        raise SourceError(f"{name} is no model: {WHAT_A_MODEL_IS}")
    if not HUB_NAME.fullmatch(name):
        raise SourceError(f"{name} does not exist, and is no hub name (owner/name) either")
    return _download(name)


def recorded_name(path: Path) -> str:
    """What opens the model at this path again: its hub name where it lies in the hub's cache, else the absolute path.

    A snapshot's path would say nothing on another machine, and more than needed of this one.
    """
    path = path.absolute()
    repository = path.parent.parent
    name = repository.name.removeprefix("models--").replace("--", "/")
    if path.parent.name == "snapshots" and repository.parent == Path(HF_HUB_CACHE).absolute() and "/" in name:
        return name
    return str(path)


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED))
    except GatedRepoError as error:
        raise SourceError(
            f"{name} asks for its terms to be accepted on the hub; do that, then log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"{name} is no directory here and no model on the hub; a private model needs `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{name} is no directory here, and the hub cannot be reached to fetch it; "
            "check the network, or give a directory"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise SourceError(f"{name} could not be fetched from the hub: {error}") from error
