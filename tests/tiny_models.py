"""Tiny random transformers models saved as directories that can be served and quantized; nothing is downloaded."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

TINY_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
TINY_MOE_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe")
MISTRAL_SLIDING_WINDOW = 24
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT_ID, IM_START_ID, IM_END_ID = 256, 257, 258
# 256 bytes, the special tokens and some reserved ones, so that every id the model can give has a token
VOCAB_SIZE = 272
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SHAPE: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": END_OF_TEXT_ID,
    "eos_token_id": IM_END_ID,
    "pad_token_id": END_OF_TEXT_ID,
}
_EXPERTS: dict[str, object] = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
_FAMILY: dict[str, dict[str, object]] = {
    "llama": {"head_dim": 16, "tie_word_embeddings": True},
    "mistral": {"head_dim": 16, "tie_word_embeddings": False, "sliding_window": MISTRAL_SLIDING_WINDOW},
    "qwen2": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": False},
    "mixtral": {"head_dim": 16, "tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32, "tie_word_embeddings": False},
    "qwen3_moe": {**_EXPERTS, "norm_topk_prob": True, "head_dim": 16, "tie_word_embeddings": True},
}


def save_tiny_model(
    model_type: str,
    directory: Path,
    *,
    config_overrides: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a random model of any type that transformers knows into `directory`: config, weights, tokenizer, template.

    Two layers of width 64; every parameter is random, norms and biases included, so that none can be forgotten
    without a difference. Returns the directory.
    """
    config = AutoConfig.for_model(model_type, **{**SHAPE, **_FAMILY.get(model_type, {}), **(config_overrides or {})})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            _randomize(name, parameter)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=[IM_END_ID, END_OF_TEXT_ID], pad_token_id=END_OF_TEXT_ID
    )
    model.to(dtype).save_pretrained(directory)
    _save_tokenizer(directory)
    return directory


def _randomize(name: str, parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        if "norm" in name or ".ln_" in name:
            parameter.uniform_(0.5, 1.5)
        elif parameter.dim() == 1:
            parameter.normal_(0, 0.2)
        else:
            # unit-variance outputs: logits spread over several units instead of all being nearly equal
            parameter.normal_(0, parameter.shape[-1] ** -0.5)


def _save_tokenizer(directory: Path) -> None:
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
