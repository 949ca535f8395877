"""The text that the model writes itself: the same seed gives the same tokens, and prompts open its rows."""

from pathlib import Path

import pytest
import torch

from kernels.cpu import AVX2_TRAITS, BF16_TRAITS, CpuTraits
from quant.errors import SourceError
from quant.progress import ignore_notice
from quant.self_text import draw, open_writer, write_text
from quant.source import SourceModel, open_source, open_streamed
from tests.tiny_models import IM_END_ID, IM_START_ID, save_tiny_model


def open_tiny(directory: Path) -> SourceModel:
    return open_source(save_tiny_model("llama", directory))


def ignore_step(done: int, total: int) -> None:
    pass


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(tmp_path: Path) -> None:
    source = open_tiny(tmp_path)
    first, again, other = (write_text(source.model, source.tokenizer, (3, 90), seed, ignore_step) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_other_row_opens_with_a_prompt_in_the_chat_template(tmp_path: Path) -> None:
    source = open_tiny(tmp_path)
    rows = write_text(source.model, source.tokenizer, (2, 80), 0, ignore_step)
    opening = source.tokenizer.decode(rows[0])
    assert opening.startswith("<|im_start|>user\nWrite an encyclopedia article about a river.<|im_end|>")
    assert int(rows[0, 0]) == IM_START_ID
    assert int(rows[1, 0]) == source.config.bos_token_id


def test_a_row_that_ended_goes_on_with_the_next_prompt(tmp_path: Path) -> None:
    source = open_tiny(tmp_path)
    with torch.no_grad():
        # a head that can say nothing but the end token
        source.model.get_submodule("model.norm").get_parameter("weight").zero_()
    source.model.config.eos_token_id = list(range(source.config.vocab_size))
    rows = write_text(source.model, source.tokenizer, (1, 200), 0, ignore_step)
    assert source.tokenizer.decode(rows[0]).count("<|im_start|>user\n") > 1
    assert IM_END_ID in rows[0]


def test_a_model_without_a_chat_template_writes_from_its_first_token(tmp_path: Path) -> None:
    source = open_tiny(tmp_path)
    source.tokenizer.chat_template = None
    rows = write_text(source.model, source.tokenizer, (2, 8), 0, ignore_step)
    assert rows.shape == (2, 8)
    assert rows[:, 0].tolist() == [source.config.bos_token_id] * 2


def test_every_step_is_told(tmp_path: Path) -> None:
    source, steps = open_tiny(tmp_path), []
    write_text(source.model, source.tokenizer, (1, 3), 0, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_a_long_row_is_written_in_pieces_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.self_text.PIECE_TOKENS", 10)
    source = open_tiny(tmp_path)
    steps: list[tuple[int, int]] = []
    rows = write_text(source.model, source.tokenizer, (2, 25), 0, lambda done, total: steps.append((done, total)))
    # three pieces of nine tokens each, of which the last two tokens are left out
    assert rows.shape == (2, 25)
    assert steps == [(step, 9) for step in range(1, 10)]


def test_tokens_are_drawn_by_their_probabilities() -> None:
    # given a token that cannot come, at either end and in the middle
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = draw(probabilities.log().expand(20000, -1), torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=6) / len(drawn)
    # three standard deviations
    torch.testing.assert_close(shares, probabilities, atol=0.011, rtol=0)
    assert drawn.bincount(minlength=6)[[0, 2, 5]].sum() == 0


def test_what_is_written_is_what_the_model_gives_for_all_that_was_written_before(tmp_path: Path) -> None:
    # given a model that says one token almost surely, so that any state that got lost would show
    source = open_tiny(tmp_path)
    with torch.no_grad():
        source.model.get_input_embeddings().weight.mul_(30)
        rows = write_text(source.model, source.tokenizer, (2, 40), 0, ignore_step)
        most_likely = source.model(rows).logits.argmax(dim=-1)
    # the first row opens with a prompt, the second with one token
    assert torch.equal(rows[1, 1:], most_likely[1, :-1])


@pytest.mark.parametrize(
    ("stored", "traits", "expected"),
    [
        (torch.bfloat16, AVX2_TRAITS, torch.bfloat16),
        (torch.float16, AVX2_TRAITS, torch.float32),
        (torch.float32, AVX2_TRAITS, torch.float32),
        (torch.float32, BF16_TRAITS, torch.bfloat16),
    ],
)
def test_a_model_writes_in_bfloat16_where_it_is_stored_so_or_the_processor_has_it(
    stored: torch.dtype, traits: CpuTraits, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.self_text.cpu_traits", lambda: traits)
    _, model = open_streamed(save_tiny_model("llama", tmp_path, dtype=stored), ignore_notice)
    writer = open_writer(model, (2, 8))
    assert {parameter.dtype for parameter in writer.parameters()} == {expected}
    assert all(parameter.is_meta for parameter in model.model.parameters())


def test_a_model_that_has_no_room_to_write_is_refused_with_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = open_streamed(save_tiny_model("llama", tmp_path), ignore_notice)
    monkeypatch.setattr("quant.self_text.cpu_traits", lambda: AVX2_TRAITS)
    # 4 bytes for each weight, and for the 2 layers' keys and values of 2 heads of 16 at each of 10 x 100 tokens
    num_bytes = 4 * (sum(parameter.numel() for parameter in model.model.parameters()) + 10 * 100 * 2 * 2 * 2 * 16)
    monkeypatch.setattr("quant.self_text.available_bytes", lambda: num_bytes - 1)
    with pytest.raises(
        SourceError, match=r"takes about 0\.0 GB of memory to write .* calibrate on a text alone, .* --calib wikitext:1"
    ):
        open_writer(model, (10, 100))
    monkeypatch.setattr("quant.self_text.available_bytes", lambda: num_bytes)
    open_writer(model, (10, 100))
