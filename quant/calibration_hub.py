"""Fetches the one file of a hub data set that calibration reads. What was fetched before is found without a network."""

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

# HTTPError is that of whichever HTTP client the hub's library uses
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

from quant.calibration_mix import COMPRESSED_SUFFIXES, SELF_CALIBRATION, TEXT_SUFFIXES, Preset
from quant.errors import SourceError

HUB_ERRORS = (HTTPError, HFValidationError, OSError)
READABLE = tuple(f"{suffix}{packed}" for suffix in TEXT_SUFFIXES for packed in ("", *COMPRESSED_SUFFIXES))
# text files of a repository that are about the data
NO_DATA = ("license", "readme", "requirements")
# in the order in which they are looked for: a `.json` file may be about the data, and its lines need not be rows
PREFERRED_SUFFIXES = (".parquet", ".jsonl", ".txt", ".json")


def preset_file(name: str, preset: Preset) -> Path:
    """The preset's file in the hub's cache, fetched if it is not there. Raises SourceError when it cannot be."""
    try:
        folder = Path(snapshot_download(preset.repository, repo_type="dataset", allow_patterns=[preset.files]))
    except HUB_ERRORS as error:
        raise SourceError(
            f"calibration preset {name} ({preset.repository}) cannot be fetched from the hub: {error}; check the "
            f"network, give a text file, or use {SELF_CALIBRATION}, which needs none"
        ) from error
    files = sorted(folder.glob(preset.files))
    if not files:
        raise SourceError(
            f"calibration preset {name}: {preset.repository} has no file {preset.files}, or it was never fetched; "
            f"check the network, give a text file, or use {SELF_CALIBRATION}, which needs none"
        )
    return files[0]


def data_set_file(name: str) -> Path:
    """The file of a hub data set (owner/name) to read: of its train split if one is called so. Raises SourceError."""
    try:
        chosen = choose_file(HfApi().list_repo_files(name, repo_type="dataset"))
        if chosen is None:
            raise SourceError(
                f"hub data set {name} has no {', '.join(TEXT_SUFFIXES)} file; download it, save its text as one "
                "and give its path"
            )
        return Path(hf_hub_download(name, chosen, repo_type="dataset"))
    except HUB_ERRORS as error:
        raise SourceError(
            f"calibration text {name!r} is neither a file here nor a data set that the hub gives: {error}"
        ) from error


def choose_file(files: list[str]) -> str | None:
    """The first file of rows among a repository's files, one of a train split before the others; None without any."""
    readable = [
        file
        for file in files
        if file.lower().endswith(READABLE) and not Path(file).name.lower().startswith(NO_DATA) and file[0] != "."
    ]
    return min(readable, key=lambda file: ("train" not in file.lower(), _preference(file), file), default=None)


def _preference(file: str) -> int:
    return next(index for index, suffix in enumerate(PREFERRED_SUFFIXES) if suffix in Path(file).name.lower())
