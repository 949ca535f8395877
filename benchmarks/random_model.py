"""Models of any size, made on the spot: random weights in bfloat16, the same in every block, a tokenizer of bytes."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

INDEX_FILE = "model.safetensors.index.json"
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class ModelShape:
    """A llama: width of the states, width inside of the MLP, heads of keys and values among heads of queries."""

    num_blocks: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @classmethod
    def of_width(cls, width: int, *, num_blocks: int, vocab_size: int) -> "ModelShape":
        """In the proportions of Llama: heads of 128, a quarter as many of keys and values, an MLP of 11/4 the width."""
        num_heads = max(1, width // 128)
        return cls(num_blocks, width, width * 11 // 4, num_heads, max(1, num_heads // 4), vocab_size)

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_heads

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters of a block by their names in it."""
        width, kv_width = self.hidden_size, self.num_kv_heads * self.head_width
        return {
            "input_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (width, width),
            "self_attn.k_proj.weight": (kv_width, width),
            "self_attn.v_proj.weight": (kv_width, width),
            "self_attn.o_proj.weight": (width, width),
            "post_attention_layernorm.weight": (width,),
            "mlp.gate_proj.weight": (self.mlp_size, width),
            "mlp.up_proj.weight": (self.mlp_size, width),
            "mlp.down_proj.weight": (width, self.mlp_size),
        }

    @property
    def block_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.block_shapes().values())

    @property
    def parameters(self) -> int:
        return self.num_blocks * self.block_parameters + (2 * self.vocab_size + 1) * self.hidden_size


def write_random_model(directory: Path, shape: ModelShape) -> None:
    """Write a model of that shape into the new directory, a file for each block; its head is not tied."""
    generator = torch.Generator().manual_seed(0)
    block = {name: _random(own, generator) for name, own in shape.block_shapes().items()}
    vocabulary = (shape.vocab_size, shape.hidden_size)
    outer = {
        "model.embed_tokens.weight": torch.randn(vocabulary, generator=generator).bfloat16(),
        "model.norm.weight": _random((shape.hidden_size,), generator),
        "lm_head.weight": _random(vocabulary, generator),
    }
    directory.mkdir()
    files = [
        {f"model.layers.{index}.{name}": tensor for name, tensor in block.items()} for index in range(shape.num_blocks)
    ]
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate([outer, *files]):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _write_config(directory, shape)
    _write_tokenizer(directory)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norms about 1, matrices that keep the size of what they multiply."""
    if len(shape) == 1:
        return torch.rand(shape, generator=generator).add_(0.5).bfloat16()
    return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).bfloat16()


def _write_config(directory: Path, shape: ModelShape) -> None:
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.num_blocks,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_width,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)


def _write_tokenizer(directory: Path) -> None:
    vocabulary = {END_OF_TEXT: 0} | {
        character: 1 + index for index, character in enumerate(sorted(ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([END_OF_TEXT])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)  # type: ignore[no-untyped-call]
    fast.save_pretrained(directory)
