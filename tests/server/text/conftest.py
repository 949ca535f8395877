"""Two byte-level tokenizers: a tiny one with one token a byte, and one with merges, as real models have."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from server.text.tokenizer import Tokenizer
from tests.tiny_models import save_tiny_model

CORPUS = [
    "The café on the corner sells naïve crêpes for 5 € 🙂 each. 日本語 and 日本 too.\n\tThe end of the corner."
] * 3
NUM_MERGES = 120


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_directory: Path) -> Tokenizer:
    return Tokenizer.load(tiny_directory)


@pytest.fixture(scope="session")
def merged_reference() -> PreTrainedTokenizerFast:
    """transformers' view of a tokenizer whose tokens are words, parts of words and parts of characters."""
    model = tokenizers.Tokenizer(BPE())
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.decoder = ByteLevelDecoder()
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab_size = 256 + len(special_tokens) + NUM_MERGES
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<|endoftext|>", eos_token="<|im_end|>")


@pytest.fixture(scope="session")
def merged_tokenizer(merged_reference: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("merged")
    merged_reference.save_pretrained(directory)
    return Tokenizer.load(directory)
