"""How near products that may read bfloat16 must come to those that read float32."""

from torch import Tensor


def assert_close_for_fast_products(actual: Tensor, expected: Tensor) -> None:
    """Equal but for what rounding the factors of one or two products to bfloat16 does: 2^-9 of each, at most."""
    assert actual.shape == expected.shape
    error = float((actual - expected).norm() / expected.norm())
    assert error < 2**-7, f"the relative error is {error:.2g}"
