"""Where blocks are and what checkpoints call tensors, found from the model itself."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from quant.errors import SourceError
from quant.model_structure import find_blocks, head_names, stored_modules
from tests.quant.tiny_families import VARIANTS, open_tiny
from tests.tiny_models import save_tiny_model

BY_NAME = {variant.name: variant for variant in VARIANTS}


@pytest.mark.parametrize(
    ("name", "list_name"),
    [
        ("llama", "model.layers"),
        ("gpt-neox", "gpt_neox.layers"),
        ("opt", "model.decoder.layers"),
        ("falcon-7b", "transformer.h"),
        ("gemma3-with-vision", "model.language_model.layers"),
    ],
)
def test_blocks_are_found_wherever_a_family_keeps_them(name: str, list_name: str, tmp_path: Path) -> None:
    model = open_tiny(BY_NAME[name], tmp_path)
    stack = find_blocks(model)
    assert list(stack.blocks) == [f"{list_name}.0", f"{list_name}.1"]
    assert stack.decoder is model.get_submodule(list_name.rpartition(".")[0])


def test_as_many_experts_as_layers_are_not_taken_for_blocks(tmp_path: Path) -> None:
    variant = BY_NAME["mixtral"]
    save_tiny_model("mixtral", tmp_path, config_overrides={**variant.fields, "num_local_experts": 2})
    assert find_blocks(AutoModelForCausalLM.from_pretrained(tmp_path)).name == "model.layers"


def test_a_model_without_a_list_of_blocks_is_refused(tmp_path: Path) -> None:
    model = open_tiny(BY_NAME["llama"], tmp_path)
    model.config.num_hidden_layers = 7
    with pytest.raises(SourceError, match="'llama' cannot be quantized: it has no list of 7 blocks"):
        find_blocks(model)


def test_modules_get_the_names_that_checkpoints_have(tmp_path: Path) -> None:
    model = open_tiny(BY_NAME["mixtral"], tmp_path)
    names = ["model.layers.1.mlp.experts.2.w1", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate"]
    assert stored_modules(model, names) == {
        "model.layers.1.mlp.experts.2.w1": "model.layers.1.block_sparse_moe.experts.2.w1",
        "model.layers.0.self_attn.q_proj": "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.gate": "model.layers.0.block_sparse_moe.gate",
    }


def test_the_head_is_called_as_checkpoints_call_it(tmp_path: Path) -> None:
    assert head_names(open_tiny(BY_NAME["gpt-neox"], tmp_path / "neox")) == {"embed_out.weight"}
    assert head_names(open_tiny(BY_NAME["llama"], tmp_path / "llama")) == {"lm_head.weight"}
