"""Tiny random transformers models saved as directories that can be served and quantized; nothing is downloaded."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast

from benchmarks.parity_models import VOCAB_SIZE, save_random_model

TINY_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
TINY_MOE_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT_ID, IM_START_ID, IM_END_ID = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_model(
    model_type: str,
    directory: Path,
    *,
    config_overrides: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a random model of any type that transformers knows into `directory`: config, weights, tokenizer, template.

    The model as in `save_random_model`. Returns the directory.
    """
    save_random_model(model_type, config_overrides or {}, directory, dtype, seed)
    GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=[IM_END_ID, END_OF_TEXT_ID], pad_token_id=END_OF_TEXT_ID
    ).save_pretrained(directory)
    _save_tokenizer(directory)
    return directory


def _save_tokenizer(directory: Path) -> None:
    # 256 bytes, the special tokens and some reserved ones, so that every id the model can give has a token
    num_reserved = VOCAB_SIZE - 256 - len(SPECIAL_TOKENS)
    special_tokens = [*SPECIAL_TOKENS, *(f"<|reserved_{index}|>" for index in range(num_reserved))]
    vocab = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(special_tokens)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def read_config(directory: Path) -> dict[str, object]:
    """The config.json of a model directory, to be changed by a test."""
    config: dict[str, object] = json.loads((directory / "config.json").read_text())
    return config
