"""Which sources are opened for calibration, what is kept of them, and which are refused with a sentence."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from quant.errors import CheckpointError, SourceError
from quant.source import context_tokens, open_source
from tests.quant.checkpoint.stored_modules import awq_config
from tests.tiny_models import CHAT_TEMPLATE, END_OF_TEXT_ID, IM_END_ID, TINY_MODEL_TYPES, save_tiny_model

TEXT = "Hello wörld\n\n  def f(x):\n\treturn 1234 * x  # don't<|im_end|> 東京 🎉"


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "tiny")


def edit_config(directory: Path, **fields: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("model_type", TINY_MODEL_TYPES)
def test_a_directory_opens_in_float32_with_its_own_weights(model_type: str, tmp_path: Path) -> None:
    directory = save_tiny_model(model_type, tmp_path / "tiny", dtype=torch.bfloat16)

    source = open_source(directory)

    stored = load_file(directory / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(source.model.get_parameter("model.layers.1.mlp.up_proj.weight"), stored.float())
    assert source.config.model_type == model_type
    assert not source.model.training


def test_the_side_files_of_a_directory_are_copied_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    files = open_source(tiny_model).side_files()

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert files[name] == (tiny_model / name).read_bytes()


def test_a_directory_without_a_generation_config_gets_one(tiny_model: Path, tmp_path: Path) -> None:
    (tiny_model / "generation_config.json").unlink()

    source = open_source(tiny_model)
    (tmp_path / "generation_config.json").write_bytes(source.side_files()["generation_config.json"])

    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == source.config.eos_token_id


def test_the_config_of_a_directory_keeps_every_field_but_its_dtype(tiny_model: Path) -> None:
    edit_config(tiny_model, a_field_of_the_future=[1, 2])

    config = open_source(tiny_model).checkpoint_config(torch.float16)

    assert config["a_field_of_the_future"] == [1, 2]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float16"


def test_an_architecture_that_transformers_does_not_know_is_refused(tiny_model: Path) -> None:
    edit_config(tiny_model, model_type="llama9")

    with pytest.raises(SourceError, match=r"cannot be loaded as a language model: .*`llama9`"):
        open_source(tiny_model)


def test_a_quantized_model_is_refused(tiny_model: Path) -> None:
    edit_config(tiny_model, quantization_config=awq_config(64))

    with pytest.raises(SourceError, match=r"is quantized already \(AWQ gemm\); give the original model"):
        open_source(tiny_model)


def test_a_model_with_a_missing_tensor_is_refused_and_the_tensor_named(tiny_model: Path) -> None:
    tensors = load_file(tiny_model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tiny_model / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(SourceError, match=r"lacks tensors .* model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)"):
        open_source(tiny_model)


def test_a_model_whose_tensor_has_another_shape_is_refused(tiny_model: Path) -> None:
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, tiny_model / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(SourceError, match=r"model\.norm\.weight"):
        open_source(tiny_model)


def test_tensors_that_the_config_has_no_place_for_are_refused(tiny_model: Path) -> None:
    edit_config(tiny_model, num_hidden_layers=1)

    with pytest.raises(
        SourceError, match=r"has no place for: model\.layers\.1\.input_layernorm\.weight, .* \(9 in all\)"
    ):
        open_source(tiny_model)


def test_rotary_frequencies_that_older_tools_saved_are_passed_over(tiny_model: Path) -> None:
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tiny_model / "model.safetensors", metadata={"format": "pt"})

    assert open_source(tiny_model).config.num_hidden_layers == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "64"},
        {"hidden_size": -64},
        {"num_attention_heads": 3},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0},
        {"vocab_size": 100},
        {"bos_token_id": 5000},
        {"rms_norm_eps": "x"},
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_refused_with_a_sentence(tiny_model: Path, fields: dict[str, object]) -> None:
    edit_config(tiny_model, **fields)

    with pytest.raises(SourceError, match=str(tiny_model)):
        open_source(tiny_model)


def test_code_that_came_with_a_model_is_not_named_by_the_checkpoint(tiny_model: Path) -> None:
    edit_config(tiny_model, auto_map={"AutoModelForCausalLM": "modeling.Custom"})

    assert "auto_map" not in open_source(tiny_model).checkpoint_config(torch.float16)


def test_a_truncated_model_is_refused_before_it_is_loaded(tiny_model: Path) -> None:
    file = tiny_model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes of tensors"):
        open_source(tiny_model)


def test_a_model_without_a_tokenizer_is_refused(tiny_model: Path) -> None:
    for file in tiny_model.glob("tokenizer*"):
        file.unlink()

    with pytest.raises(SourceError, match="cannot be loaded as a language model"):
        open_source(tiny_model)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 a zip file")

    with pytest.raises(SourceError, match=r"model\.gguf is no GGUF file: it starts with b'PK"):
        open_source(tmp_path / "model.gguf")


@pytest.mark.parametrize("kept", [10, 1000])
def test_a_gguf_file_cut_in_its_header_is_refused(kept: int, tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:kept])

    with pytest.raises(SourceError, match=r"cut\.gguf cannot be loaded as a language model"):
        open_source(tmp_path / "cut.gguf")


def test_a_gguf_file_cut_in_its_tensors_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:-5000])

    with pytest.raises(SourceError, match=r"cut\.gguf cannot be loaded as a language model"):
        open_source(tmp_path / "cut.gguf")


def pair_rotary_channels(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The order of rows that GGUF files of the llama family have: the two halves of a head's rotation interleaved."""
    return weight.reshape(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama as a GGUF file, as llama.cpp's converter writes it."""
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("gguf") / "tiny")
    # beside the files it was made from, none of which may be mixed in
    file = directory / "tiny.gguf"
    config = AutoConfig.from_pretrained(directory)
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(25000.0)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # a file must have a merge; the byte 255 never occurs in UTF-8, so this one changes nothing
    tokens = [*tokenizer.convert_ids_to_tokens(range(config.vocab_size - 1)), "ÿÿ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token.startswith("<|") else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(["ÿ ÿ"])
    writer.add_bos_token_id(END_OF_TEXT_ID)
    writer.add_eos_token_id(IM_END_ID)
    writer.add_chat_template(CHAT_TEMPLATE)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in load_file(directory / "model.safetensors").items():
        for hf_name, gguf_name in GGUF_NAMES.items():
            name = name.replace(hf_name, gguf_name)
        head_count = next((count for part, count in heads.items() if part in name), None)
        stored = tensor if head_count is None else pair_rotary_channels(tensor, head_count)
        writer.add_tensor(name, stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture
def gguf_checkpoint(tiny_gguf: Path, tmp_path: Path) -> Path:
    """The side files and the config that a checkpoint of the GGUF file has."""
    source = open_source(tiny_gguf)
    for name, content in source.side_files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(source.checkpoint_config(torch.float16)))
    return tmp_path


def test_a_gguf_file_opens_with_the_weights_it_was_made_from(tiny_gguf: Path) -> None:
    source = open_source(tiny_gguf)

    for name, stored in load_file(tiny_gguf.parent / "model.safetensors").items():
        assert torch.equal(source.model.get_parameter(name), stored), name


def test_the_tokenizer_of_a_gguf_file_survives_being_saved(tiny_gguf: Path, gguf_checkpoint: Path) -> None:
    original = AutoTokenizer.from_pretrained(tiny_gguf.parent)

    saved = AutoTokenizer.from_pretrained(gguf_checkpoint)

    assert saved(TEXT)["input_ids"] == original(TEXT)["input_ids"]
    assert saved.decode(saved(TEXT)["input_ids"]) == TEXT
    assert saved.eos_token == "<|im_end|>"
    assert saved.model_max_length == 512
    assert "TokenizersBackend" not in (gguf_checkpoint / "tokenizer_config.json").read_text()


def test_the_chat_template_of_a_gguf_file_survives_being_saved(gguf_checkpoint: Path) -> None:
    saved = AutoTokenizer.from_pretrained(gguf_checkpoint)

    prompt = saved.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)

    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_generation_from_a_gguf_file_stops_at_the_end_of_a_turn(gguf_checkpoint: Path) -> None:
    assert GenerationConfig.from_pretrained(gguf_checkpoint).eos_token_id == IM_END_ID


def test_the_config_of_a_gguf_file_reads_the_same_in_old_and_new_spelling(gguf_checkpoint: Path) -> None:
    fields = json.loads((gguf_checkpoint / "config.json").read_text())
    config = AutoConfig.from_pretrained(gguf_checkpoint)

    assert fields["rope_theta"] == config.rope_parameters["rope_theta"] == 25000.0
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert config.tie_word_embeddings
    assert "quantization_config" not in fields
    assert "_name_or_path" not in fields


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("llama", {"max_position_embeddings": 1234}, 1234),
        ("gpt2", {"n_positions": 77}, 77),
        ("gemma3", {"text_config": {"max_position_embeddings": 99}}, 99),
        ("bloom", {}, None),
    ],
)
def test_the_context_is_what_the_text_part_of_the_config_says(
    model_type: str, fields: dict[str, object], expected: int | None
) -> None:
    assert context_tokens(AutoConfig.for_model(model_type, **fields)) == expected
