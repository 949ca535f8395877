"""Text to ids and back as transformers does it, and single tokens as bytes."""

import json
import shutil
import sys
import threading
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from server.text.tokenizer import Tokenizer, TokenizerError

TEXTS = ["", "Hello world", "  two  spaces\n\ttab", "naïve café €5 🙂 日本", "<|im_start|>user\nhi<|im_end|>"]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(
    merged_reference: PreTrainedTokenizerFast, merged_tokenizer: Tokenizer, text: str
) -> None:
    assert merged_tokenizer.encode(text, add_special_tokens=True) == merged_reference(text)["input_ids"]


def test_other_threads_run_while_a_long_text_is_read(merged_tokenizer: Tokenizer) -> None:
    # given threads that run only when another one lets them
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    begun, num_tokens = threading.Event(), []

    def read() -> None:
        begun.set()
        num_tokens.append(len(merged_tokenizer.encode("the corner " * 100_000, add_special_tokens=False)))

    # when one reads a text that takes long
    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    was_reading = not num_tokens
    sys.setswitchinterval(interval)
    reader.join()
    # then this one has run before that was done
    assert was_reading
    assert num_tokens[0] > 100_000


def test_the_longest_token_counts_the_added_ones(tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.longest_token == len("<|reserved_10|>")


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(merged_tokenizer: Tokenizer, text: str) -> None:
    token_ids = merged_tokenizer.encode(text, add_special_tokens=False)
    assert merged_tokenizer.decode(token_ids, skip_special_tokens=False) == text


@given(text=st.text())
@settings(deadline=None, max_examples=50)
def test_the_bytes_of_the_tokens_join_to_the_text(merged_tokenizer: Tokenizer, text: str) -> None:
    token_ids = merged_tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(merged_tokenizer.token_bytes, token_ids)) == text.encode()


def test_a_part_of_a_character_is_written_as_its_bytes(tiny_tokenizer: Tokenizer) -> None:
    token_ids = tiny_tokenizer.encode("€a", add_special_tokens=False)
    texts = [tiny_tokenizer.token_text(token_id) for token_id in token_ids]
    assert texts == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "a"]


def test_sentencepiece_tokens_have_their_spaces_and_bytes() -> None:
    # given a tokenizer that writes spaces as U+2581 and unknown characters byte by byte
    vocab = {"<unk>": 0, "\u2581Hello": 1, "<0xE2>": 2}
    model = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    model.decoder = Sequence([Replace("\u2581", " "), ByteFallback(), Fuse()])
    tokenizer = Tokenizer(model, special_tokens={}, chat_template=None)
    assert tokenizer.token_bytes(1) == b" Hello"
    assert tokenizer.token_bytes(2) == b"\xe2"
    assert tokenizer.context_of([5, 6, 7, 8, 9]) == [6, 7, 8, 9]


def test_an_id_without_a_token_has_no_bytes(tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.token_bytes(10_000) == b""


def test_truncation_in_the_file_does_not_cut_prompts(tiny_directory: Path, tmp_path: Path) -> None:
    content = json.loads((tiny_directory / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer.load(tmp_path).encode("abcdef", add_special_tokens=True)) == 6


def test_special_tokens_are_read_as_texts_and_as_objects(tiny_directory: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_directory / "tokenizer.json", tmp_path)
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("in_config", "in_file", "expected"),
    [
        (None, None, None),
        ("from config", None, "from config"),
        ("from config", "from file", "from file"),
        ([{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}], None, "yes"),
    ],
)
def test_the_chat_template_is_found_where_models_have_it(
    tiny_directory: Path, tmp_path: Path, in_config: object, in_file: str | None, expected: str | None
) -> None:
    shutil.copy(tiny_directory / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": in_config}))
    if in_file is not None:
        (tmp_path / "chat_template.jinja").write_text(in_file)
    assert Tokenizer.load(tmp_path).chat_template == expected


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json") as refusal:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{"), ("tokenizer.json", "[]"), ("tokenizer_config.json", "{"), ("tokenizer_config.json", "3")],
)
def test_a_broken_file_is_named(tiny_directory: Path, tmp_path: Path, name: str, content: str) -> None:
    shutil.copy(tiny_directory / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.load(tmp_path)
