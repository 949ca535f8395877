"""What a model's name may be, without a network."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.utils import filter_repo_objects

from quant.checkpoint.folded_scales import FOLDED_SCALES_FILE
from quant.checkpoint.location import HUB_IGNORED, HUB_PATTERNS, recorded_name, resolve_model
from quant.errors import SourceError


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_gguf_file_is_itself(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    assert resolve_model(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")

    with pytest.raises(SourceError, match=r"notes\.txt is no model: give a directory"):
        resolve_model(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("name", ["/no/such/place", "no-such-model", "a/b/c", "a b/c"])
def test_a_name_that_is_neither_a_place_nor_a_hub_name_is_refused(name: str) -> None:
    with pytest.raises(SourceError, match="does not exist, and is no hub name"):
        resolve_model(name)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(SourceError, match="name is empty: give a directory"):
        resolve_model("")


def test_a_hub_name_without_a_network_is_one_sentence(tmp_path: Path) -> None:
    # given a machine where the hub is switched off and nothing is cached
    code = "from quant.checkpoint.location import resolve_model; resolve_model('owner/name')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}

    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)

    assert "SourceError: owner/name is no directory here, and the hub cannot be reached" in result.stderr


def test_the_scales_that_are_folded_in_are_fetched_with_the_weights() -> None:
    names = ["model.safetensors", FOLDED_SCALES_FILE, "model.gguf", "onnx/model.safetensors"]

    fetched = filter_repo_objects(names, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED)

    assert list(fetched) == ["model.safetensors", FOLDED_SCALES_FILE]


def test_locating_a_model_imports_no_torch() -> None:
    code = "import sys, quant.checkpoint.location; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_model_of_the_hubs_cache_is_recorded_by_its_hub_name() -> None:
    snapshot = Path(HF_HUB_CACHE) / "models--owner--my-model" / "snapshots" / "0123abc"
    assert recorded_name(snapshot) == "owner/my-model"


@pytest.mark.parametrize(
    "path",
    [
        "mine/models--owner--my-model/snapshots/0123abc",
        f"{HF_HUB_CACHE}/models--gpt2/snapshots/0123abc",
        f"{HF_HUB_CACHE}/models--owner--my-model/snapshots/0123abc/model.gguf",
        "mine",
    ],
)
def test_a_model_that_no_hub_name_opens_is_recorded_by_its_path(path: str) -> None:
    assert recorded_name(Path(path)) == str(Path(path).absolute())
