"""What a token's attention may not depend on: who else is in the batch, how its prompt is cut, what broke elsewhere."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.kernels.attention_scenes import CODE_DTYPES, SMALL, Heads, Scores, attend, build_scene

PROMPT = 150
GROUPED = Heads(num_query_heads=6, num_kv_heads=2, width=32, block_size=16)
CACHES = pytest.mark.parametrize("cache_dtype", [None, *CODE_DTYPES])


@CACHES
def test_a_decoded_token_has_the_same_bits_whatever_runs_beside_it(cache_dtype: torch.dtype | None) -> None:
    def decode(sequences: list[tuple[int, int]], seeds: list[int]) -> Tensor:
        return attend(build_scene(sequences, SMALL, torch.float16, cache_dtype=cache_dtype, seeds=seeds))

    alone = decode([(600, 1)], [5])

    beside_decodes = decode([(3, 1), (600, 1), (20, 1)], [1, 5, 6])
    beside_prefill = decode([(600, 1), (10, 30)], [5, 1])

    assert torch.equal(beside_decodes[1], alone[0])
    assert torch.equal(beside_prefill[0], alone[0])


def attend_in_chunks(borders: list[int], cache_dtype: torch.dtype | None, scores: Scores) -> Tensor:
    """The prompt's attention, computed chunk by chunk between the borders, each beside another prompt."""
    outputs = []
    for start, stop in pairwise(borders):
        scene = build_scene(
            [(5, start % 7 + 1), (start, stop - start)], GROUPED, torch.float16, cache_dtype=cache_dtype, seeds=[1, 2]
        )
        outputs.append(attend(scene, scores)[start % 7 + 1 :])
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("cache_dtype", "window"), [(None, None), (None, 40), (torch.uint8, None), (torch.float8_e4m3fn, 40)]
)
def test_a_prompt_has_the_same_bits_however_it_is_cut(cache_dtype: torch.dtype | None, window: int | None) -> None:
    scores = Scores(sliding_window=window, sinks=torch.linspace(-1, 1, 6))
    whole = attend_in_chunks([0, PROMPT], cache_dtype, scores)

    for borders in ([0, 2, 66, 148, PROMPT], [0, 21, 128, PROMPT]):
        assert torch.equal(attend_in_chunks(borders, cache_dtype, scores), whole), borders


@CACHES
def test_a_chunk_of_one_token_is_the_same_but_for_rounding(cache_dtype: torch.dtype | None) -> None:
    whole = attend_in_chunks([0, PROMPT], cache_dtype, Scores())

    torch.testing.assert_close(
        attend_in_chunks([0, 149, PROMPT], cache_dtype, Scores()), whole, rtol=2.0**-9, atol=2.0**-9
    )


@CACHES
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_sequence(value: float, cache_dtype: torch.dtype | None) -> None:
    scene = build_scene([(20, 1), (7, 1), (5, 3)], SMALL, torch.float16, cache_dtype=cache_dtype)
    clean = attend(scene)
    broken = scene.layer.keys if scene.layer.key_scales is None else scene.layer.key_scales
    broken[scene.batch.block_tables[1, 0], :, 2] = value
    scene.query[1] = value

    out = attend(scene)

    assert not torch.isfinite(out[1]).any()
    assert torch.equal(out[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])


@CACHES
def test_a_broken_value_breaks_its_sequence_and_no_other(cache_dtype: torch.dtype | None) -> None:
    scene = build_scene([(20, 1), (7, 3)], SMALL, torch.float16, cache_dtype=cache_dtype)
    clean = attend(scene)
    broken = scene.layer.values if scene.layer.value_scales is None else scene.layer.value_scales
    broken[scene.batch.block_tables[1, 0], :, 2] = float("nan")

    out = attend(scene)

    assert not torch.isfinite(out[1:]).any()
    assert torch.equal(out[0], clean[0])
