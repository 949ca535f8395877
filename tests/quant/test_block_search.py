"""One block: what is written is what the next block reads, and plain rounding stands in for a search that failed."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quant.block
import quant.block_search
from kernels.layout import PackedWeight, unpack
from kernels.reference import dequantize
from quant.block import BlockPlan, FoldedGroup, fold_scales, round_block_plainly
from quant.block_groups import ScaleGroup, groups_of
from quant.block_pair import CurrentBlock
from quant.block_search import BlockOutcome, OpenBlock, search_block, stages_of
from quant.block_structure import BlockStructures
from quant.capture import BlockInput, embed, run_block
from quant.fast_products import fast_products
from quant.input_statistics import Streams, capture
from quant.kept_tensors import Scratch
from quant.method import STEPS, Method
from quant.model_structure import find_blocks
from quant.rounding import GroupRange, full_range
from quant.salience import channel_errors
from quant.scale_groups import linear_of, rows_of
from quant.scale_search import IDENTITY, Grouping, ScaleChoice, output_error
from tests.quant.fast_close import assert_close_for_fast_products
from tests.quant.tiny_families import VARIANTS, open_tiny
from tests.tiny_models import save_tiny_model

NAME = "model.layers.0"


def reading_again(block: nn.Module) -> Callable[[Collection[str]], None]:
    """What gives parameters of the block the values that they have now."""
    values = copy.deepcopy(dict(block.named_parameters()))

    def read_again(names: Collection[str]) -> None:
        for name in names:
            block.get_parameter(name).copy_(values[name])

    return read_again


@dataclass(frozen=True)
class Subject:
    """The first block of a tiny model, its inputs, and how it was before anything was done to it."""

    block: nn.Module
    plan: BlockPlan
    inputs: list[BlockInput]
    original_output: Tensor
    plain: Mapping[str, PackedWeight]

    def search(self) -> BlockOutcome:
        with torch.no_grad():
            opened = OpenBlock(self.block, NAME, 0, reading_again(self.block))
            return search_block(opened, Streams(self.inputs, self.inputs), self.plan, Scratch())


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    directory = save_tiny_model("llama", tmp_path / "model")
    tokens = torch.arange(4 * 32).view(4, 32) * 7 % 256
    with torch.no_grad():
        model, rounded = (AutoModelForCausalLM.from_pretrained(directory).eval() for _ in range(2))
        block = find_blocks(model).blocks[NAME]
        groups = groups_of(block, rows_of("llama"), model.config)
        steps = STEPS[Method.AWQ_GPTQ]
        inputs = list(embed(find_blocks(model), tokens))
        plan = BlockStructures().complete(BlockPlan(groups, Grouping(4, 32), steps), block, 0, inputs[0])
        plain = round_block_plainly(find_blocks(rounded).blocks[NAME], plan)
        return Subject(block, plan, inputs, run_block(block, 0, inputs[0]).hidden, plain)


def is_plain(subject: Subject, outcome: BlockOutcome) -> bool:
    return all(
        torch.equal(unpack(outcome.packed[name]).codes, unpack(packed).codes) for name, packed in subject.plain.items()
    )


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("self_attn.q_proj", "input_layernorm.weight"),
        # the next linears' scales are folded into the rows of these
        ("self_attn.v_proj", "input_layernorm.weight"),
        ("mlp.up_proj", "post_attention_layernorm.weight"),
    ],
)
def test_each_layer_says_what_it_and_its_salient_channels_make_of_the_error(
    name: str, norm: str, subject: Subject
) -> None:
    # given the method that moves no weight towards another target, and a bias of ones, which is divided as the rows are
    linear_of(subject.block, name).bias = nn.Parameter(torch.ones(len(linear_of(subject.block, name).weight)))
    original = copy.deepcopy(subject.block)
    subject = replace(subject, plan=replace(subject.plan, steps=STEPS[Method.AWQ]))

    outcome = subject.search()

    # then the shares are those of a weight whose scales are taken out again: the norm before it was divided by its own
    with torch.no_grad():
        weight, scale = (
            linear_of(original, name).weight,
            original.get_parameter(norm) / subject.block.get_parameter(norm),
        )
        rows = 1 / linear_of(subject.block, name).bias
        known = capture(CurrentBlock(subject.block, 0, subject.inputs, Scratch()), [name])[name]
        gram = known.gram * scale[:, None] * scale
        signal = output_error(weight, gram).sum()
        plain = channel_errors([weight - dequantize(subject.plain[name])], gram)
        written = channel_errors([weight - rows[:, None] * dequantize(outcome.packed[name]) / scale], gram)
    # 1 % of 64 channels is one
    most = int((known.mean_magnitude * scale).argmax())
    layer = next(layer for layer in outcome.layers if layer.name == f"{NAME}.{name}")
    salience = layer.salience
    assert layer.plain == pytest.approx(float(plain.sum() / signal), rel=1e-3)
    assert layer.chosen == pytest.approx(float(written.sum() / signal), rel=1e-2)
    assert salience is not None
    assert salience.channels == (most,)
    assert salience.by_magnitude.plain == pytest.approx(float(plain[most] / plain.sum()), rel=1e-3)
    assert salience.by_magnitude.chosen == pytest.approx(float(written[most] / plain.sum()), rel=1e-2)


def test_the_next_block_reads_what_the_packed_weights_give(subject: Subject) -> None:
    outcome = subject.search()

    assert outcome.error.kept == "searched"
    for name, packed in outcome.packed.items():
        assert torch.equal(linear_of(subject.block, name).weight, dequantize(packed))
    with torch.no_grad(), fast_products():
        quantized = run_block(subject.block, 0, subject.inputs[0]).hidden
    assert torch.equal(outcome.next_streams.current[0].hidden, quantized)
    assert not torch.allclose(outcome.next_streams.current[0].hidden, subject.original_output, atol=1e-3)


def test_a_fold_that_changes_the_function_is_undone(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    # given folding that forgets one consumer
    def forget_the_gate(
        block: nn.Module, groups: Sequence[ScaleGroup], choices: Mapping[str, ScaleChoice]
    ) -> dict[str, FoldedGroup]:
        weight = linear_of(block, "mlp.gate_proj").weight
        before = weight.detach().clone()
        folded = fold_scales(block, groups, choices)
        weight.copy_(before)
        return folded

    monkeypatch.setattr(quant.block_search, "fold_scales", forget_the_gate)

    outcome = subject.search()

    # then the MLP goes unscaled, attention keeps its scales, and the block is still better than plainly rounded
    formulas = {layer.name.rpartition(".")[2]: layer.formula for layer in outcome.layers}
    assert {formulas["gate_proj"], formulas["up_proj"], formulas["down_proj"]} == {IDENTITY}
    assert formulas["q_proj"] != IDENTITY
    assert outcome.error.kept == "searched"
    assert outcome.error.chosen < outcome.error.plain


def test_a_search_that_ends_worse_than_plain_rounding_is_not_written(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given ranges that clip nearly everything
    def far_too_narrow(weight: Tensor, _gram: Tensor, grouping: Grouping) -> GroupRange:
        widest = full_range(weight, grouping.group_size)
        return GroupRange(low=widest.low / 50, high=widest.high / 50)

    monkeypatch.setattr(quant.block, "search_range", far_too_narrow)

    outcome = subject.search()

    assert outcome.error.kept == "plain"
    assert is_plain(subject, outcome)
    assert all(layer.chosen == layer.plain for layer in outcome.layers)
    saliences = [layer.salience for layer in outcome.layers if layer.salience is not None]
    assert len(saliences) == len(outcome.layers)
    assert all(salience.by_magnitude.chosen == salience.by_magnitude.plain for salience in saliences)


def test_attention_is_quantized_before_the_mlp_and_scales_stay_with_what_they_fold_into(subject: Subject) -> None:
    # given the groups in another order than they run in
    groups = subject.plan.groups
    stages = stages_of(subject.block, [*groups[2:], *groups[:2]])
    assert [[group.observed for group in stage] for stage in stages] == [
        ["self_attn.q_proj", "self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.down_proj"],
    ]


def test_the_original_goes_on_beside_the_quantized_model_where_weights_are_corrected(subject: Subject) -> None:
    outcome = subject.search()
    assert_close_for_fast_products(outcome.next_streams.original[0].hidden, subject.original_output)


def drifted(inputs: list[BlockInput]) -> list[BlockInput]:
    """The states with a disturbance that they themselves tell, as rounded blocks before would leave it."""
    width = inputs[0].hidden.shape[-1]
    mixing = 0.1 * torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    return [BlockInput(chunk.hidden + chunk.hidden @ mixing, chunk.contexts) for chunk in inputs]


@pytest.mark.parametrize("name", ["llama", "granite", "cohere", "falcon-7b", "opt", "qwen3-moe", "opt-350m"])
def test_a_block_takes_back_what_the_stream_has_drifted(name: str, tmp_path: Path) -> None:
    # given a block whose inputs have drifted, rounded so finely that the drift is all of its error
    errors = {}
    for corrected in (True, False):
        model = open_tiny(next(variant for variant in VARIANTS if variant.name == name), tmp_path / str(corrected))
        stack = find_blocks(model)
        block_name, block = next(iter(stack.blocks.items()))
        groups = groups_of(block, rows_of(model.config.model_type), model.config)
        plan = BlockPlan(groups, Grouping(bits=8, group_size=32), STEPS[Method.AWQ_GPTQ])
        tokens = torch.randint(256, (16, 32), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            inputs = list(embed(stack, tokens))
            if corrected:
                plan = BlockStructures().complete(plan, block, 0, inputs[0])
            opened = OpenBlock(block, block_name, 0, reading_again(block))
            outcome = search_block(opened, Streams(inputs, drifted(inputs)), plan, Scratch())
        pairs = zip(outcome.next_streams.original, outcome.next_streams.current, strict=True)
        errors[corrected] = sum(float((x.hidden - y.hidden).square().sum()) for x, y in pairs)

    # then what adds to the stream has put it right, once and not twice
    assert errors[True] < 0.7 * errors[False]
