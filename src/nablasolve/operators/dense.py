"""Dense matrices as operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..closure import matvec
from ..methods import direct
from .base import LinearOperator, StructuredOperator
from .claims import Claims
from .factorisation import Factorisation
from .nullspace import Nullspace, conjugated
from .spaces import any_batch


class DenseOperator(StructuredOperator):
    """A dense matrix, or a batch of them.

    Args:
        matrix: a floating-point or complex Tensor of shape `(*batch, m, n)`. It acts on vectors of shape `(*batch, n)`;
            batch dimensions broadcast, and a real matrix acts on complex vectors.
        hermitian, positive_definite, full_rank: claims.

    Raises:
        ValueError: if the tensor has fewer than two dimensions, or an integer dtype.
    """

    def __init__(self, matrix: Tensor, **claims: Any) -> None:
        if matrix.ndim < 2:
            remedy = "; nablasolve.Diagonal(d) is the operator of a diagonal" if matrix.ndim == 1 else ""
            raise ValueError(f"A: expected a matrix of shape (..., m, n), got shape {tuple(matrix.shape)}{remedy}")
        if not (matrix.is_floating_point() or matrix.is_complex()):
            raise ValueError(f"A: expected a floating-point or complex dtype, got {matrix.dtype}")
        self.matrix = matrix
        square = matrix.shape[-2] == matrix.shape[-1]
        domain = any_batch(matrix.shape[-1:], matrix)
        super().__init__(domain, domain if square else any_batch(matrix.shape[-2:-1], matrix), Claims.named(claims))

    def apply(self, x: Tensor) -> Tensor:
        return matvec(self.matrix, x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return matvec(self.matrix.mH, y)

    @property
    def H(self) -> LinearOperator:
        if self.hermitian:
            return self
        return self._with(self.matrix.mH, self.claims.H, self.claimed_left_nullspace, self.claimed_nullspace)

    def conj(self) -> LinearOperator:
        nullspaces = conjugated(self.claimed_nullspace), conjugated(self.claimed_left_nullspace)
        return self._with(self.matrix.conj(), self.claims, *nullspaces)

    def _with(self, matrix: Tensor, claims: Claims, nullspace: Nullspace | None, left: Nullspace | None) -> DenseOperator:
        result = DenseOperator(matrix)
        result.claims, result.claimed_nullspace, result.claimed_left_nullspace = claims, nullspace, left
        return result

    def factorise(self) -> Factorisation | None:
        if self.codomain is not self.domain:
            return None
        *factor, info = direct.factorise(self.matrix, self.positive_definite)
        batch = self.matrix.shape[:-2]

        def solve(r: Tensor, adjoint: bool) -> Tensor:
            r = r.expand(*torch.broadcast_shapes(batch, r.shape[:-1]), r.shape[-1])
            missing = (None,) * (r.ndim - 1 - len(batch))
            x = direct.substitute(tuple(part[missing] for part in (*factor, info)), r, self.positive_definite, adjoint)
            return torch.where(info.unsqueeze(-1) == 0, x, 0.0)

        return Factorisation(lambda r: solve(r, False), lambda r: solve(r, True))

    def exact_diagonal(self) -> Tensor | None:
        return self.matrix.diagonal(dim1=-2, dim2=-1) if self.codomain is self.domain else None

    def exact_trace(self) -> Tensor | None:
        diagonal = self.exact_diagonal()
        return None if diagonal is None else diagonal.sum(-1)

    def exact_norm(self) -> Tensor:
        norm: Tensor = torch.linalg.matrix_norm(self.matrix, ord=2)
        return norm

    def exact_eigenvalue_bounds(self) -> tuple[Tensor, Tensor]:
        eigenvalues = torch.linalg.eigvalsh(self.matrix)
        return eigenvalues[..., 0], eigenvalues[..., -1]

    def to_dense(self, like: Any = None) -> Tensor:
        return self.matrix
