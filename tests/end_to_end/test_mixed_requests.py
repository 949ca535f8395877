"""Two hundred mixed requests at once give what each gives alone: bit for bit, or up to near-ties where told so."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.mixed_requests import NUM_TOP, Answer, ask_at_once, ask_one_by_one, is_greedy
from tests.end_to_end.running_server import RunningServer
from tests.kernels.native_libraries import open_native
from tests.server.model.quantized_models import quantize_in_place
from tests.tiny_models import save_tiny_model

# torch's kernels round what goes into a packed linear to bfloat16, so a last bit that differs may move a
# log-probability by so much; tokens that are closer may change places
NEAR_TIE_LOGPROB = 0.05
# of 200 requests with 1,600 tokens from a random model's flat distributions; 26 when it was written
MAX_NEAR_TIES = 40


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Quantized, and of a shape that the native kernels take too."""
    directory = save_tiny_model("llama", tmp_path / "tiny")
    quantize_in_place(directory, lambda name: True)
    return directory


def test_with_native_kernels_each_is_bit_for_bit_what_it_is_alone(
    model: Path, tmp_path: Path, start: Callable[..., RunningServer]
) -> None:
    open_native()
    server = start(model, tmp_path / "data", "--cpu-kernel", "native")

    assert ask_at_once(server) == ask_one_by_one(server)


def test_with_torch_each_is_what_it_is_alone_bit_for_bit_if_told_to_be_deterministic(
    model: Path, tmp_path: Path, start: Callable[..., RunningServer]
) -> None:
    deterministic = start(model, tmp_path / "deterministic", "--cpu-kernel", "torch", "--deterministic")
    alone = ask_one_by_one(deterministic)
    assert ask_at_once(deterministic) == alone
    deterministic.stop()

    free = start(model, tmp_path / "free", "--cpu-kernel", "torch")
    together = ask_at_once(free)
    near_ties = [find_near_tie(*pair, index) for index, pair in enumerate(zip(alone, together, strict=True))]
    found = [(request, step) for request, step in enumerate(near_ties) if step is not None]
    assert len(found) <= MAX_NEAR_TIES, f"(request, token) of each: {found}"


def find_near_tie(alone: Answer, together: Answer, index: int) -> int | None:
    """The step where two answers part, which must be a near-tie; None where they are one. What comes after differs.

    Up to there all numbers are equal up to the last bits, and there both still choose from one distribution. A greedy
    choice must have two tokens at its top that are as good as equal; a drawn one fell between two.
    """
    pairs = enumerate(zip(alone.tokens, together.tokens, strict=True))
    step = next((number for number, (one, other) in pairs if one != other), None)
    assert alone.logprobs[:step] == pytest.approx(together.logprobs[:step], abs=NEAR_TIE_LOGPROB)
    # at the step where they part too: it is what both chose from
    num_alike = len(alone.tops) if step is None else step + 1
    for one, other in zip(alone.tops[:num_alike], together.tops[:num_alike], strict=True):
        assert best_of(one) == pytest.approx(best_of(other), abs=NEAR_TIE_LOGPROB)
    if step is None:
        assert alone.text == together.text
    elif is_greedy(index):
        best, second, *_ = best_of(alone.tops[step])
        assert best - second < NEAR_TIE_LOGPROB
    return step


def best_of(top: dict[str, float]) -> list[float]:
    """The log-probabilities of the likeliest tokens; which ones they are is a matter of near-ties too."""
    return sorted(top.values(), reverse=True)[:NUM_TOP]
