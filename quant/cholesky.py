"""Cholesky's factorization in the memory of the matrix: a Gram matrix can be larger than a block's weights."""

import torch
from torch import Tensor


def factor_in_place(matrix: Tensor) -> bool:
    """Make a symmetric matrix [K, K] its lower triangular factor L, L L^T being what it was; zeros above.

    The matrix has to lie column by column (its transpose is contiguous). False where its dtype does not hold it as
    positive definite: what is in it means nothing then.
    """
    if not matrix.T.is_contiguous():
        raise ValueError(f"a matrix of strides {matrix.stride()} does not lie column by column")
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
    return not failed
