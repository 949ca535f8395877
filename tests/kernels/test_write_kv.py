"""The write into the paged cache: bit for bit what the reference writes, and nothing beside its slots."""

import pytest
import torch

from kernels import reference
from kernels.paged_batch import PagedLayer
from kernels.write_kv import write_kv
from tests.kernels.attention_scenes import CODE_DTYPES, Heads, broken_layer, build_scene, on_device
from tests.kernels.launches import DEVICE, HALF_TYPES

HEADS = Heads(num_query_heads=3, num_kv_heads=3, width=20, block_size=16)
SLOTS = torch.tensor([63, 0, 17, 31, 40, 16])


def assert_same_bytes(layer: PagedLayer, expected: PagedLayer) -> None:
    for name in ("keys", "values", "key_scales", "value_scales"):
        ours, theirs = getattr(layer, name), getattr(expected, name)
        if theirs is not None:
            assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8)), name


@pytest.mark.parametrize("cache_dtype", [None, *CODE_DTYPES])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_it_fills_its_slots_and_nothing_else(dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    expected = broken_layer(4, HEADS, cache_dtype or dtype)
    layer = on_device(broken_layer(4, HEADS, cache_dtype or dtype))
    # keys and values are slices of one projection's output, as in the decoder
    fused = torch.randn(6, 6, 20, generator=torch.Generator().manual_seed(0)).to(dtype)

    write_kv(fused.to(DEVICE)[:, :3], fused.to(DEVICE)[:, 3:], layer, SLOTS.to(DEVICE))

    reference.write_kv(fused[:, :3], fused[:, 3:], expected, SLOTS)
    assert_same_bytes(layer, expected)


@pytest.mark.parametrize("cache_dtype", CODE_DTYPES)
def test_it_encodes_the_ends_of_the_range_as_the_definition_does(cache_dtype: torch.dtype) -> None:
    heads = Heads(num_query_heads=4, num_kv_heads=4, width=256, block_size=16)
    expected, layer = broken_layer(1, heads, cache_dtype), on_device(broken_layer(1, heads, cache_dtype))
    # every code and every border between two, zeros, subnormal numbers; an infinity and a NaN in heads of their own
    steps = torch.linspace(-127, 127, 2 * 254 + 1)[-256:]
    keys = torch.stack([steps, torch.zeros(256), steps * 2.0**-20, steps]).half()[None]
    values = torch.stack([steps * 448 / 127, steps.flip(0) / 65536, steps, steps]).half()[None]
    keys[0, 3, 7], values[0, 2, 9] = float("inf"), float("nan")
    slots = torch.tensor([5])

    write_kv(keys.to(DEVICE), values.to(DEVICE), layer, slots.to(DEVICE))

    reference.write_kv(keys, values, expected, slots)
    # NaN has many bit patterns: scales are compared as numbers
    for ours, theirs in ((layer.key_scales, expected.key_scales), (layer.value_scales, expected.value_scales)):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(layer.keys.cpu().view(torch.uint8), expected.keys.view(torch.uint8))
    assert torch.equal(layer.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))


def test_a_write_that_does_not_fit_is_refused() -> None:
    small = Heads(num_query_heads=4, num_kv_heads=2, width=32, block_size=64)
    layer = build_scene([(3, 1)], small, torch.float16).layer
    new, slots = torch.zeros(2, 2, 32, dtype=torch.float16), torch.tensor([64, 65])

    with pytest.raises(ValueError, match=r"keys must be torch\.float16"):
        write_kv(new[:, :1], new, layer, slots)
    with pytest.raises(ValueError, match=r"values must be torch\.float16"):
        write_kv(new, new.bfloat16(), layer, slots)
    with pytest.raises(ValueError, match="one int64 slot"):
        write_kv(new, new, layer, slots.int())
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        write_kv(
            new.float(), new.float(), build_scene([(3, 1)], small, torch.half, cache_dtype=torch.uint8).layer, slots
        )
