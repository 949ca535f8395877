"""A mixed step gives each sequence what transformers gives with its merged weights; what is wrong is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.parity_models import FAMILIES, PARITY_MODELS, TinyModel
from kernels.lora import AdapterRows, plan_rows
from quant.errors import CheckpointError
from server.model.adapter import Adapter, open_adapter
from server.model.adapter_stacks import AdapterStacks, adapter_bytes, adapter_row_bytes
from server.model.config import read_model_config
from server.model.decoder import Decoder
from server.model.expected_tensors import layer_spec
from server.model.fixed_rows import fix_rows
from server.model.loader import LoadedModel, load_model
from tests.lora_adapters import CONFIG_FILE, PREFIX, TENSOR_FILE, merged_weights, save_adapter
from tests.paged_cache import Chunk, build_batch, build_layers, build_positions
from tests.server.model.quantized_models import quantize_in_place
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

CPU = torch.device("cpu")
MODEL_FILE = "model.safetensors"
BLOCK_SIZE = 8
# both compute in float32; what is left is the order of summation
TOLERANCE = 1e-4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
FUSED_QKV = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
FUSED_MLP = (*ATTENTION, "gate_up_proj", "down_proj")
TARGETS = {"phi3": FUSED_QKV, "glm4": FUSED_MLP, "mixtral": ATTENTION, "qwen3_moe": ATTENTION}
MODELS: dict[str, TinyModel] = {
    **{model_type: TinyModel(model_type) for model_type in FAMILIES},
    "llama with biases": TinyModel("llama", {"attention_bias": True, "mlp_bias": True}),
    "cohere, q and k norms": PARITY_MODELS["cohere, q and k norms"],
}


def load(directory: Path, *adapters: Adapter) -> LoadedModel:
    return load_model(directory, CPU, None, lambda progress: None, adapters=adapters)


def random_tokens(num_tokens: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def compute(
    model: LoadedModel, texts: list[Tensor], adapters: list[int], decoder: Decoder | None = None
) -> list[Tensor]:
    """Logits [T, vocab] of each text, all in one step; adapters: of each, -1 for none."""
    config = model.config
    kv_layers = build_layers(
        config.num_layers,
        num_blocks=8 * len(texts),
        num_kv_heads=config.num_kv_heads,
        block_size=BLOCK_SIZE,
        head_dim=config.head_dim,
    )
    chunks = [Chunk(range(8 * index, 8 * index + 8), 0, len(text)) for index, text in enumerate(texts)]
    used = decoder or model.decoder
    assert isinstance(used, Decoder)
    batch, rows = build_batch(chunks, BLOCK_SIZE), rows_of(texts, adapters)
    with torch.inference_mode():
        hidden = used.forward(torch.cat(texts), build_positions(chunks), batch, kv_layers, rows)
        return list(used.compute_logits(hidden).split([len(text) for text in texts]))


def rows_of(texts: list[Tensor], adapters: list[int]) -> AdapterRows | None:
    stops = torch.tensor([len(text) for text in texts]).cumsum(0).tolist()
    spans = [
        (adapter, stop - len(text), stop)
        for adapter, stop, text in zip(adapters, stops, texts, strict=True)
        if adapter >= 0
    ]
    return plan_rows(spans, CPU) if spans else None


@pytest.mark.parametrize("name", MODELS, ids=lambda name: str(name).replace(" ", "-"))
def test_each_sequence_of_a_mixed_step_gets_what_its_merged_weights_give(name: str, tmp_path: Path) -> None:
    # given two adapters, of all linears and of some, with other ranks, scales and patterns
    model_type = MODELS[name].model_type
    targets = TARGETS.get(model_type, ALL)
    directory = save_tiny_model(model_type, tmp_path / "model", config_overrides=MODELS[name].fields)
    config = read_model_config(directory)
    some = {"rank_pattern": {targets[0]: 24}, "alpha_pattern": {targets[0]: 6.0}, "use_rslora": True}
    paths = [
        save_adapter(tmp_path / "all", directory, targets, seed=1),
        save_adapter(tmp_path / "some", directory, targets[:2], seed=2, rank=3, fields=some),
    ]
    scales = [{"": 8 / 4}, {targets[0]: 6 / 24**0.5, "": 8 / 3**0.5}]
    model = load(directory, *(open_adapter(path.name, path, config) for path in paths))

    # when one step has sequences of both and of none
    texts = [random_tokens(length, seed=length) for length in (21, 9, 1, 30)]
    logits = compute(model, texts, [1, -1, 0, 0])

    # then each is that of a model of its own
    for text, adapter, got in zip(texts, (1, -1, 0, 0), logits, strict=True):
        merged = tmp_path / f"merged-{adapter}"
        shutil.copytree(directory, merged, dirs_exist_ok=True)
        if adapter >= 0:
            weights = merged_weights(directory, paths[adapter], scales[adapter])
            save_file(weights, merged / MODEL_FILE, metadata={"format": "pt"})
        reference = AutoModelForCausalLM.from_pretrained(merged, attn_implementation="eager")
        with torch.inference_mode():
            torch.testing.assert_close(got, reference(text[None]).logits[0], atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its second layer is quantized, and in the first one the values: projections there are joined of both kinds."""
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("llama") / "model")
    quantize_in_place(directory, lambda name: "layers.1." in name or "v_proj" in name)
    return directory


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, ...]:
    dense = save_tiny_model("llama", tmp_path_factory.mktemp("dense") / "model")
    root, config = tmp_path_factory.mktemp("adapters"), read_model_config(llama)
    paths = [save_adapter(root / str(seed), dense, ALL, seed=seed) for seed in range(2)]
    return tuple(open_adapter(path.name, path, config) for path in paths)


def test_the_base_keeps_its_bits_beside_adapters_over_quantized_weights(
    llama: Path, adapters: tuple[Adapter, ...]
) -> None:
    texts = [random_tokens(length, seed=length) for length in (9, 14, 1)]

    beside = compute(load(llama, *adapters), texts, [-1, 0, -1])
    alone = compute(load(llama), texts, [-1, -1, -1])

    assert torch.equal(beside[0], alone[0])
    assert torch.equal(beside[2], alone[2])
    assert (beside[1] - alone[1]).abs().max() > 0.1


def test_in_fixed_rows_a_sequence_gets_the_bits_that_it_gets_alone(llama: Path, adapters: tuple[Adapter, ...]) -> None:
    model = load(llama, *adapters)
    assert isinstance(model.decoder, Decoder)
    fixed = fix_rows(model.decoder, 64)
    texts = [random_tokens(length, seed=length) for length in (9, 14, 1, 20)]
    numbers = [1, 0, 1, -1]

    together = compute(model, texts, numbers, fixed)

    for text, number, got in zip(texts, numbers, together, strict=True):
        assert torch.equal(got, compute(model, [text], [number], fixed)[0])


def test_the_plan_of_memory_is_what_the_stacks_take(llama: Path, adapters: tuple[Adapter, ...]) -> None:
    config = read_model_config(llama)
    stacks = AdapterStacks(adapters, {})
    groups = [specs for index in range(config.num_layers) for specs in layer_spec(config, index).joined]
    made = [stack for specs in groups if (stack := stacks.read(specs, CPU, torch.bfloat16)) is not None]

    assert len(made) == len(groups)
    assert adapter_bytes(adapters, config, torch.bfloat16) == sum(stack.down.nbytes + stack.up.nbytes for stack in made)


def test_a_rows_sums_count_in_what_a_step_works_on(llama: Path, adapters: tuple[Adapter, ...]) -> None:
    config = read_model_config(llama)
    # of one split of K: queries, keys and values, each of a padded rank of 16
    assert adapter_row_bytes(adapters, config) == 3 * 16 * 4
    # an MLP of that width is summed in 16 parts, one after the other for its down projection
    wide = replace(config, intermediate_size=4096)
    assert adapter_row_bytes(adapters, wide) == 16 * 16 * 4
    assert adapter_row_bytes((), config) == 0


def change_config(directory: Path, **fields: object) -> None:
    file = directory / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_tensors(directory: Path, **changes: Tensor | None) -> None:
    """By the end of a tensor's name in layer 0, with two underscores for a dot; None takes it away."""
    file = directory / TENSOR_FILE
    tensors = load_file(file)
    for end, tensor in changes.items():
        name = f"{PREFIX}model.layers.0.{end.replace('__', '.')}.weight"
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, file)


@pytest.fixture
def adapter(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = save_tiny_model("llama", tmp_path_factory.mktemp("dense") / "model")
    return save_adapter(tmp_path / "adapter", model, ATTENTION)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; only LORA is"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True is not supported"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"r": 0}, "r is 0; it must be a whole number from 1 up"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; it must be a number over 0"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern: q_proj is -1"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is no regular expression"),
        ({"rank_pattern": {"(?i)q_proj": 1}}, r"rank_pattern: '\(\?i\)q_proj' is no regular expression"),
        ({"target_modules": ["q_proj", "wq"]}, "target_modules has 'wq', and the model has no such linear"),
        ({"target_modules": []}, r"target_modules is \[\]; it must be a list of names, or a pattern"),
        ({"target_modules": list(ATTENTION[:3])}, r"has .*o_proj\.lora_A\.weight, but target_modules .* do not name"),
        ({"target_modules": [*ATTENTION, "up_proj"]}, r"lacks .*layers\.0\.mlp\.up_proj\.lora_A\.weight and 1 more"),
        ({"r": 5}, r"_proj\.lora_A\.weight has the shape \[4, 64\]; .* ask for \[5, 64\]"),
        ({"layers_to_transform": 0}, r"has .*layers\.1\..*, but target_modules .* do not name"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused_by_name(
    llama: Path, adapter: Path, fields: dict[str, object], words: str
) -> None:
    change_config(adapter, **fields)
    with pytest.raises(CheckpointError, match=words):
        open_adapter("a", adapter, read_model_config(llama))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"self_attn__q_proj__lora_B": None}, r"lacks .*layers\.0\.self_attn\.q_proj\.lora_B\.weight"),
        ({"self_attn__q_proj__lora_B": torch.ones(64, 3)}, r"has the shape \[64, 3\]; .* ask for \[64, 4\]"),
        ({"self_attn__q_proj__lora_A": torch.ones(4, 64).int()}, r"lora_A\.weight is torch\.int32"),
        (
            {"self_attn__w__lora_A": torch.ones(4, 64)},
            "of a linear that the model has: the adapter is of another model",
        ),
        ({"mlp__experts__0__up_proj__lora_A": torch.ones(4, 64)}, "adapts the experts or the router of a mixture"),
        ({"lm_head__lora_A": torch.ones(4, 64)}, "changes the embedding or the output head"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    llama: Path, adapter: Path, changes: dict[str, Tensor | None], words: str
) -> None:
    change_tensors(adapter, **changes)
    with pytest.raises(CheckpointError, match=words):
        open_adapter("a", adapter, read_model_config(llama))


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_a_tensor_with_a_value_that_is_no_number_is_refused_by_name(llama: Path, adapter: Path, side: str) -> None:
    shape = (4, 64) if side == "lora_A" else (64, 4)
    change_tensors(adapter, **{f"self_attn__q_proj__{side}": torch.full(shape, float("nan"))})
    opened = open_adapter("a", adapter, read_model_config(llama))
    with pytest.raises(CheckpointError, match=rf"{TENSOR_FILE}: .*layers\.0\.self_attn\.q_proj\.{side}.* no finite"):
        load(llama, opened)


def test_a_value_that_the_dtype_does_not_hold_is_refused(llama: Path, adapter: Path) -> None:
    change_tensors(adapter, self_attn__q_proj__lora_B=torch.full((64, 4), 60_000.0))
    opened = open_adapter("mine", adapter, read_model_config(llama))
    with pytest.raises(CheckpointError, match=r"the adapter mine: .*q_proj holds values that float16 has not"):
        load_model(llama, CPU, torch.float16, lambda progress: None, adapters=[opened])


def test_a_pickle_is_never_loaded(llama: Path, adapter: Path) -> None:
    (adapter / TENSOR_FILE).rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"as a pickle \(adapter_model\.bin\).*safe_serialization=True"):
        open_adapter("a", adapter, read_model_config(llama))


def test_layers_and_patterns_choose_modules(llama: Path, adapter: Path, tmp_path: Path) -> None:
    # an adapter of one layer alone, and one whose modules a regular expression chose
    tensors = {name: tensor for name, tensor in load_file(adapter / TENSOR_FILE).items() if "layers.1." in name}
    save_file(tensors, adapter / TENSOR_FILE)
    for fields in ({"layers_to_transform": [1]}, {"layers_to_transform": None, "target_modules": r".*layers\.1\..*"}):
        change_config(adapter, **fields)
        opened = open_adapter("a", adapter, read_model_config(llama))
        assert set(opened.down) == {f"model.layers.1.self_attn.{name}" for name in ATTENTION}
