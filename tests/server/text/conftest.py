"""Two byte-level tokenizers: a tiny one with one token a byte, and the demo model's with merges."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from server.text.tokenizer import Tokenizer
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_directory: Path) -> Tokenizer:
    return Tokenizer.load(tiny_directory)


@pytest.fixture(scope="session")
def demo_directory(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's tokenizer files, as transformers writes them."""
    directory = tmp_path_factory.mktemp("demo")
    AutoTokenizer.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def demo_tokenizer(demo_directory: Path) -> Tokenizer:
    return Tokenizer.load(demo_directory)
