"""Operators that another library applies."""

from __future__ import annotations

import numpy as np
import scipy.sparse.linalg
import torch
from operator_cases import OperatorCase
from torch import Tensor

from nablasolve.interop.scipy import from_scipy

M = np.random.default_rng(0).standard_normal((6, 6)) / 6 + 2 * np.eye(6)
C = M + 0.3j * np.random.default_rng(1).standard_normal((6, 6))


def dense(like: Tensor) -> Tensor:
    return torch.as_tensor(C if like.is_complex() else M).to(like.dtype)


def scipy_operator(like: Tensor, columns: int = 6) -> scipy.sparse.linalg.LinearOperator:
    matrix = (C if like.is_complex() else M)[:, :columns]
    return scipy.sparse.linalg.aslinearoperator(matrix.astype(str(like.dtype).removeprefix("torch.")))


CASES = [
    OperatorCase(
        "scipy operator",
        lambda dtype: {"like": torch.zeros((), dtype=dtype)},
        lambda like: from_scipy(scipy_operator(like)),
        dense,
        picklable=False,
        movable=False,
    ),
    OperatorCase(
        "rectangular scipy operator",
        lambda dtype: {"like": torch.zeros((), dtype=dtype)},
        lambda like: from_scipy(scipy_operator(like, 4)),
        lambda like: dense(like)[:, :4],
        solvable=False,
        picklable=False,
        movable=False,
    ),
]
