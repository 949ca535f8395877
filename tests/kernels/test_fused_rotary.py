"""Norm, rotation and cache write in one launch against the reference, and against what the decoder computes apart."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference, reference_fused
from kernels.fused_rotary import rotate_and_write
from kernels.kv_codes import CODE_DTYPES
from kernels.paged_batch import PagedLayer
from kernels.rotary import HeadNorms, Rotation
from tests.kernels.attention_scenes import Heads, broken_layer, on_device
from tests.kernels.launches import DEVICE, HALF_TYPES, LAST_PLACE, fresh_memory_is_nan

NUM_BLOCKS, BLOCK_SIZE = 5, 4


@dataclass(frozen=True)
class Scene:
    """heads [T, H + 2 H_kv, D] of tokens that each have a slot of their own in a cache full of -1 and -2."""

    heads: Tensor
    rotation: Rotation
    norms: HeadNorms | None
    layer: PagedLayer
    slots: Tensor

    def on_device(self) -> "Scene":
        """A copy of everything."""
        norms = None
        if self.norms is not None:
            norms = HeadNorms(self.norms.query_weight.to(DEVICE), self.norms.key_weight.to(DEVICE), self.norms.epsilon)
        rotation = Rotation(self.rotation.cosines.to(DEVICE), self.rotation.signed_sines.to(DEVICE))
        layer = PagedLayer(self.layer.keys.to(DEVICE, copy=True), self.layer.values.to(DEVICE, copy=True))
        return Scene(self.heads.to(DEVICE), rotation, norms, layer, self.slots.to(DEVICE))


def build_scene(
    num_tokens: int,
    *,
    group: int = 3,
    num_kv_heads: int = 2,
    width: int = 16,
    rotary_width: int = 16,
    dtype: torch.dtype = torch.float16,
    with_norms: bool = False,
    seed: int = 0,
) -> Scene:
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(num_tokens, (group + 2) * num_kv_heads, width, generator=generator).to(dtype)
    angles = torch.rand(num_tokens, rotary_width // 2, generator=generator) * 6.3
    cosines, sines = angles.cos(), angles.sin()
    rotation = Rotation(torch.cat((cosines, cosines), dim=-1).to(dtype), torch.cat((-sines, sines), dim=-1).to(dtype))
    weights = (torch.rand(2, width, generator=generator) + 0.5).to(dtype)
    shape = (NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, width)
    return Scene(
        heads=heads,
        rotation=rotation,
        norms=HeadNorms(weights[0], weights[1], 1e-6) if with_norms else None,
        layer=PagedLayer(torch.full(shape, -1.0, dtype=dtype), torch.full(shape, -2.0, dtype=dtype)),
        slots=torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=generator)[:num_tokens],
    )


def run(scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, and the cache's keys and values afterwards."""
    there = scene.on_device()
    with fresh_memory_is_nan():
        queries = rotate_and_write(there.heads, there.rotation, there.norms, there.layer, there.slots)
    return queries.cpu(), there.layer.keys.cpu(), there.layer.values.cpu()


def assert_is_the_reference(scene: Scene) -> None:
    queries, keys, values = run(scene)
    layer = PagedLayer(scene.layer.keys.clone(), scene.layer.values.clone())
    expected = reference_fused.rotate_and_write(scene.heads, scene.rotation, scene.norms, layer, scene.slots)
    # two products may cancel, and a norm's rounding border is met twice
    tolerance = LAST_PLACE[scene.heads.dtype] * (4 if scene.norms is not None else 1)
    torch.testing.assert_close(queries, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(keys, layer.keys, rtol=tolerance, atol=tolerance)
    assert torch.equal(values, layer.values)
    untouched = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool).index_fill(0, scene.slots, False)
    assert (keys.transpose(1, 2).flatten(0, 1)[untouched] == -1).all()


@settings(max_examples=10, deadline=None)
@given(
    num_tokens=st.integers(1, 6),
    group=st.sampled_from([1, 3, 4, 8]),
    num_kv_heads=st.sampled_from([1, 3]),
    widths=st.sampled_from([(8, 8), (64, 64), (80, 80), (64, 16), (96, 24), (128, 64)]),
    dtype=st.sampled_from(HALF_TYPES),
    with_norms=st.booleans(),
)
def test_any_heads_are_the_reference(
    num_tokens: int, group: int, num_kv_heads: int, widths: tuple[int, int], dtype: torch.dtype, with_norms: bool
) -> None:
    width, rotary_width = widths
    assert_is_the_reference(
        build_scene(
            num_tokens,
            group=group,
            num_kv_heads=num_kv_heads,
            width=width,
            rotary_width=rotary_width,
            dtype=dtype,
            with_norms=with_norms,
        )
    )


def test_a_quarter_turn_exchanges_the_halves_and_leaves_the_rest() -> None:
    # given one query, key and value head of 6 elements, of which the first 4 turn by 90 degrees
    heads = torch.tensor([[[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18]]]).half()
    rotation = Rotation(torch.zeros(1, 4).half(), torch.tensor([[-1, -1, 1, 1]]).half())
    layer = PagedLayer(torch.zeros(1, 1, 2, 6).half(), torch.zeros(1, 1, 2, 6).half())

    queries, keys, values = run(Scene(heads, rotation, None, layer, torch.tensor([1])))

    assert queries.tolist() == [[[-3, -4, 1, 2, 5, 6]]]
    assert keys[0, 0].tolist() == [[0] * 6, [-9, -10, 7, 8, 11, 12]]
    assert values[0, 0].tolist() == [[0] * 6, [13, 14, 15, 16, 17, 18]]


def test_a_token_has_the_same_bits_whatever_runs_beside_it() -> None:
    scene = build_scene(6, with_norms=True)
    together, _, _ = run(scene)

    for token in (0, 5):
        one = slice(token, token + 1)
        rotation = Rotation(scene.rotation.cosines[one], scene.rotation.signed_sines[one])
        alone, _, _ = run(dataclasses.replace(scene, heads=scene.heads[one], rotation=rotation, slots=scene.slots[one]))
        assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_token_and_head(value: float) -> None:
    scene = build_scene(3, with_norms=True)
    clean, clean_keys, _ = run(scene)
    scene.heads[1, 2, 3] = value

    queries, keys, _ = run(scene)

    assert queries[1, 2].isnan().any()
    queries[1, 2] = clean[1, 2]
    assert torch.equal(queries, clean)
    assert torch.equal(keys, clean_keys)


@pytest.mark.parametrize("cache_dtype", CODE_DTYPES)
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_a_cache_of_codes_gets_the_codes_of_what_another_cache_gets(
    dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    scene = build_scene(6, dtype=dtype, width=20, with_norms=True)
    queries, keys, values = run(scene)
    blocks, offsets = scene.slots // BLOCK_SIZE, scene.slots % BLOCK_SIZE
    heads = Heads(num_query_heads=6, num_kv_heads=2, width=20, block_size=BLOCK_SIZE)
    expected = broken_layer(NUM_BLOCKS, heads, cache_dtype)
    reference.write_kv(keys[blocks, :, offsets], values[blocks, :, offsets], expected, scene.slots)

    layer = on_device(broken_layer(NUM_BLOCKS, heads, cache_dtype))
    there = scene.on_device()
    coded_queries = rotate_and_write(there.heads, there.rotation, there.norms, layer, there.slots)

    assert torch.equal(coded_queries.cpu(), queries)
    for name in ("keys", "values", "key_scales", "value_scales"):
        ours, theirs = getattr(layer, name), getattr(expected, name)
        assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8)), name


def test_no_tokens_are_no_launch() -> None:
    assert run(build_scene(0))[0].shape == (0, 6, 16)


def test_operands_that_do_not_fit_are_refused() -> None:
    scene = build_scene(2, with_norms=True)
    assert scene.norms is not None

    def run_with(
        *,
        heads: Tensor = scene.heads,
        rotation: Rotation = scene.rotation,
        norms: HeadNorms = scene.norms,
        slots: Tensor = scene.slots,
    ) -> None:
        rotate_and_write(heads, rotation, norms, scene.layer, slots)

    with pytest.raises(ValueError, match="float16 or bfloat16"):
        run_with(heads=scene.heads.float())
    with pytest.raises(ValueError, match="the cache must be in the dtype of heads"):
        run_with(heads=scene.heads.bfloat16())
    with pytest.raises(ValueError, match=r"heads must be \[T, H \+ 4, D\] with H a multiple of the cache's 2 heads"):
        run_with(heads=scene.heads[:, :4])
    with pytest.raises(ValueError, match="one row per token"):
        run_with(rotation=Rotation(scene.rotation.cosines[:1], scene.rotation.signed_sines[:1]))
    with pytest.raises(ValueError, match="an even number of a head's 16 elements"):
        run_with(rotation=Rotation(scene.rotation.cosines[:, :5], scene.rotation.signed_sines[:, :5]))
    with pytest.raises(ValueError, match=r"key_weight must be contiguous \[16\]"):
        run_with(norms=dataclasses.replace(scene.norms, key_weight=scene.norms.key_weight[:8]))
    with pytest.raises(ValueError, match="one int64 slot"):
        run_with(slots=scene.slots.int())
