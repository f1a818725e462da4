"""Dense matrices as operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..closure import matvec
from .base import Claims, LinearOperator, matrix_spaces


class DenseOperator(LinearOperator):
    """A dense matrix, or a batch of them.

    Args:
        matrix: a floating-point or complex Tensor of shape `(*batch, m, n)`. It acts on vectors of shape `(*batch, n)`;
            batch dimensions broadcast, and a real matrix acts on complex vectors.
        hermitian, positive_definite: claims.

    Raises:
        ValueError: if the tensor has fewer than two dimensions, or an integer dtype.
    """

    def __init__(self, matrix: Tensor, **claims: Any) -> None:
        if matrix.ndim < 2:
            raise ValueError(f"A: expected a matrix of shape (..., m, n), got shape {tuple(matrix.shape)}")
        if not (matrix.is_floating_point() or matrix.is_complex()):
            raise ValueError(f"A: expected a floating-point or complex dtype, got {matrix.dtype}")
        self.matrix = matrix
        self.domain, self.codomain = matrix_spaces(matrix)
        self.claims = Claims.named(claims)

    def apply(self, x: Tensor) -> Tensor:
        return matvec(self.matrix, x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return matvec(self.matrix.mH, y)

    @property
    def has_adjoint(self) -> bool:
        return True

    @property
    def has_user_adjoint(self) -> bool:
        return False

    @property
    def H(self) -> LinearOperator:
        return self if self.hermitian else DenseOperator(self.matrix.mH)

    def conj(self) -> LinearOperator:
        return DenseOperator(self.matrix.conj(), hermitian=self.hermitian, positive_definite=self.positive_definite)

    def to_dense(self, like: Any = None) -> Tensor:
        return self.matrix

    def _describe(self) -> str:
        return f"DenseOperator{tuple(self.matrix.shape)}:{str(self.matrix.dtype).removeprefix('torch.')}"
