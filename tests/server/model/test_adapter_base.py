"""Which adapters are fitted to a checkpoint's folded scales, which are taken as they are, and what is said of it.

Over checkpoints of the quantizer an adapter of the original adds what it adds to the original.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.checkpoint.folded_scales import FOLDED_SCALES_FILE, ModuleScales, encode_folded_scales
from quant.errors import CheckpointError
from quant.method import Method
from quant.pipeline import quantize
from quant.recipe import Recipe
from server.model.adapter import Adapter, open_adapter
from server.model.adapter_base import fit_adapters
from server.model.config import read_model_config
from tests.lora_adapters import merged_weights, save_adapter
from tests.server.model.quantized_models import quantize_in_place
from tests.server.model.test_adapter import ALL, TARGETS, compute, load, random_tokens
from tests.tiny_models import save_tiny_model

MODEL_FILE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj"
# what rounding to 8 bits leaves, as a share of what the adapter adds; measured: 0.01 to 0.03
MAX_ERROR = 0.06
UNEVEN = ("layernorm.weight", "v_proj.weight", "up_proj.weight")
# 8 bits, so that rounding does not hide what is looked at
RECIPE = Recipe(bits=8, group_size=32, num_samples=8, sample_tokens=64, num_windows=0)
# a norm that adds 1, biases, fused projections, attention and MLP side by side, a shared expert, norms of q and k
MODEL_TYPES = ("llama", "gemma", "qwen2", "phi3", "cohere", "qwen2_moe", "glm4")


def save_uneven_model(model_type: str, directory: Path) -> Path:
    """A tiny model whose norms, values and up projections give channels of very different size, as real ones do."""
    save_tiny_model(model_type, directory)
    weights, generator = load_file(directory / MODEL_FILE), torch.Generator().manual_seed(5)
    offset = 1 if model_type == "gemma" else 0
    for name in [name for name in weights if name.endswith(UNEVEN)]:
        sizes = torch.randn(len(weights[name]), generator=generator).exp()
        sizes /= sizes.square().mean().sqrt()
        if weights[name].dim() == 1:
            weights[name] = (weights[name] + offset) * sizes - offset
        else:
            weights[name] *= sizes[:, None]
    save_file(weights, directory / MODEL_FILE, metadata={"format": "pt"})
    return directory


def reference_logits(directory: Path, text: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    with torch.inference_mode():
        logits: Tensor = model(text[None]).logits[0]
    return logits


def added_by(directory: Path, adapters: Sequence[Adapter], text: Tensor) -> list[Tensor]:
    """What each adapter adds to the logits of the served checkpoint."""
    model = load(directory, *adapters)
    base, *adapted = compute(model, [text] * (1 + len(adapters)), list(range(-1, len(adapters))))
    return [logits - base for logits in adapted]


def share_of(difference: Tensor, whole: Tensor) -> float:
    return float(difference.norm() / whole.norm())


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        *((model_type, Method.AWQ_GPTQ) for model_type in MODEL_TYPES),
        ("qwen2", Method.AWQ),
        ("llama", Method.BEST),
    ],
)
def test_an_adapter_of_the_original_adds_to_the_quantized_model_what_it_adds_to_the_original(
    model_type: str, method: Method, tmp_path: Path
) -> None:
    # given an adapter of all linears, and what it adds to the original
    original = save_uneven_model(model_type, tmp_path / "model")
    path = save_adapter(tmp_path / "adapter", original, TARGETS.get(model_type, ALL), seed=1, rank=4, alpha=8)
    merged = shutil.copytree(original, tmp_path / "merged")
    save_file(merged_weights(original, path, {"": 8 / 4}), merged / MODEL_FILE, metadata={"format": "pt"})
    text = random_tokens(40, seed=3)
    expected = reference_logits(merged, text) - reference_logits(original, text)

    # when it is served over a checkpoint with scales, fitted to them and as it is
    checkpoint = tmp_path / "quantized"
    quantize(RECIPE.with_method(method), original, checkpoint)
    opened = open_adapter("a", path, read_model_config(checkpoint))
    (fitted,) = fit_adapters([opened], checkpoint)
    with_scales, without = added_by(checkpoint, [fitted, opened], text)

    # then it adds the same, but for rounding; and as it is it would not
    assert share_of(with_scales - expected, expected) < MAX_ERROR
    assert share_of(without - expected, expected) > 5 * MAX_ERROR


@dataclass(frozen=True)
class Served:
    """A quantized checkpoint of one layer with scales in its file, and an adapter of its up projections."""

    checkpoint: Path
    adapter: Path

    def fit(self, **fields: object) -> Adapter:
        """The adapter with these fields in its config, fitted."""
        file = self.adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
        (fitted,) = fit_adapters([self.open()], self.checkpoint)
        return fitted

    def open(self) -> Adapter:
        return open_adapter("sql", self.adapter, read_model_config(self.checkpoint))


SCALES = {UP: ModuleScales(torch.linspace(0.5, 2, 64), torch.linspace(1, 3, 128))}


@pytest.fixture
def served(tmp_path: Path) -> Served:
    dense = save_tiny_model("llama", tmp_path / "dense")
    checkpoint = save_tiny_model("llama", tmp_path / "checkpoint")
    quantize_in_place(checkpoint, lambda name: name.endswith("proj"))
    (checkpoint / FOLDED_SCALES_FILE).write_bytes(encode_folded_scales(SCALES))
    return Served(checkpoint, save_adapter(tmp_path / "adapter", dense, ("up_proj",)))


@pytest.mark.parametrize("base", [None, "", "owner/original", "/somewhere/else"])
def test_one_that_was_not_trained_on_the_checkpoint_is_multiplied_by_its_scales(
    served: Served, base: str | None
) -> None:
    fitted, plain = served.fit(base_model_name_or_path=base), served.open()

    scales, divisors = SCALES[UP].input_scale, SCALES[UP].output_divisor
    assert scales is not None
    assert divisors is not None
    torch.testing.assert_close(fitted.read_down(UP), plain.read_down(UP) * scales, rtol=0, atol=0)
    torch.testing.assert_close(fitted.read_up(UP), plain.read_up(UP) / divisors[:, None], rtol=0, atol=0)
    # and a linear that nothing was folded into stays
    other = UP.replace("layers.1", "layers.0")
    assert torch.equal(fitted.read_down(other), plain.read_down(other))
    assert f"its base_model_name_or_path is {base or ''!r}" in fitted.note
    # what names no model that could be another is taken for granted, and said
    assert bool(fitted.doubt) == (base != "owner/original")


@pytest.mark.parametrize("how", ["absolute", "relative", "with a slash"])
def test_one_that_names_the_checkpoint_is_taken_as_it_is(
    served: Served, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(served.checkpoint.parent)
    names = {"absolute": str(served.checkpoint), "relative": "./checkpoint", "with a slash": f"{served.checkpoint}/"}

    fitted = served.fit(base_model_name_or_path=names[how])

    assert torch.equal(fitted.read_down(UP), served.open().read_down(UP))
    assert fitted.note == "sql is taken as it is: its base_model_name_or_path is this checkpoint"


def test_a_checkpoint_of_the_hub_is_named_by_its_hub_name(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    # given the checkpoint where the hub's cache would have it
    snapshots = served.checkpoint.parent / "models--owner--tiny" / "snapshots"
    snapshots.mkdir(parents=True)
    served.checkpoint.rename(snapshots / "0123abc")
    monkeypatch.setattr("quant.checkpoint.location.HF_HUB_CACHE", str(served.checkpoint.parent))
    cached = Served(snapshots / "0123abc", served.adapter)

    assert not cached.fit(base_model_name_or_path="owner/tiny").scales
    assert cached.fit(base_model_name_or_path="owner/other").scales


def test_where_nothing_says_what_is_folded_in_it_is_taken_as_it_is_and_doubted(served: Served) -> None:
    (served.checkpoint / FOLDED_SCALES_FILE).unlink()

    fitted = served.fit(base_model_name_or_path="owner/original")

    assert not fitted.scales
    assert fitted.doubt.startswith("sql may add something else than it learned: most AWQ checkpoints have scales")
    assert "this one has no folded_scales.awq" in fitted.doubt
    # and one that was trained on it is not
    assert not served.fit(base_model_name_or_path=str(served.checkpoint)).doubt


def test_nothing_is_said_where_there_is_nothing_to_say(served: Served) -> None:
    # given a checkpoint that says that nothing is folded in, one whose method has no scales, and a dense one
    (served.checkpoint / FOLDED_SCALES_FILE).write_bytes(encode_folded_scales({}))
    plain = [served.fit()]
    (served.checkpoint / FOLDED_SCALES_FILE).unlink()
    config = json.loads((served.checkpoint / "config.json").read_text())
    config["quantization_config"] |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}
    (served.checkpoint / "config.json").write_text(json.dumps(config))
    plain.append(served.fit())
    plain.append(Served(served.checkpoint.parent / "dense", served.adapter).fit())

    assert [(adapter.note, adapter.doubt, adapter.scales) for adapter in plain] == [("", "", {})] * 3


def test_scales_of_another_model_are_refused_before_anything_is_loaded(served: Served) -> None:
    scales = {UP: ModuleScales(torch.ones(32) / 2)}
    (served.checkpoint / FOLDED_SCALES_FILE).write_bytes(encode_folded_scales(scales))

    with pytest.raises(CheckpointError, match=r"has 32 scales of .*up_proj where 64 are needed: it is of another"):
        served.fit()
