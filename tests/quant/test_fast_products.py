"""Products and attention in less than float32: near it, and over with the context."""

import pytest
import torch
from torch.nn import functional

from quant import fast_products as module
from quant.device import HOST
from quant.fast_products import attention_dtype, fast_products, product_dtype
from tests.quant.fast_close import assert_close_for_fast_products


@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_is_near_that_of_float32_and_gives_float32(is_masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 4, 24, 16, generator=generator) for _ in range(3))
    mask = torch.randn(2, 1, 24, 24, generator=generator) if is_masked else None
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=not is_masked)
    with fast_products():
        output = functional.scaled_dot_product_attention(
            query, key, value=value, attn_mask=mask, is_causal=not is_masked
        )
    assert output.dtype == torch.float32
    assert_close_for_fast_products(output, expected)


@pytest.mark.parametrize(("dtype", "is_rounded"), [(torch.float32, False), (torch.bfloat16, True)])
def test_attention_is_of_bfloat16_only_where_the_processor_multiplies_it(
    dtype: torch.dtype, is_rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "product_dtype", lambda _device: dtype)
    states = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(2))
    with fast_products():
        output = functional.scaled_dot_product_attention(states, states, states)
    assert torch.equal(output, output.bfloat16().float()) is is_rounded


def test_a_gpu_reads_tf32_which_only_float32_holds_and_attention_bfloat16() -> None:
    assert product_dtype(torch.device("cuda")) is torch.float32
    assert attention_dtype(torch.device("cuda")) is torch.bfloat16


def test_precision_is_as_before_even_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ValueError, match="inside"), fast_products():
        raise ValueError("inside")
    assert torch.get_float32_matmul_precision() == before
    states = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(3))
    whole = functional.scaled_dot_product_attention(states, states, states)
    assert torch.equal(whole, functional.scaled_dot_product_attention(states, states, states))


def test_a_factor_that_is_kept_as_products_read_it_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(4)
    states, weight = torch.randn(512, 576, generator=generator), torch.randn(192, 576, generator=generator)
    with fast_products():
        expected = functional.linear(states, weight)
        kept = functional.linear(states.to(product_dtype(HOST)).float(), weight)
    assert torch.equal(kept, expected)
