"""Matrices of low rank, and solves with an operator that one of them has been added to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..closure import matvec
from .base import LinearOperator, StructuredOperator, is_real, is_scalar
from .claims import Claims, is_nonzero
from .dense import DenseOperator
from .factorisation import Factorisation
from .nullspace import conjugated
from .spaces import AnyBatch, any_batch, complexified
from .triangular import check_tensor


class LowRank(StructuredOperator):
    """`x -> U V^H x`.

    The sum `A + U V^H` with an operator that can be solved with directly is itself solved directly, by Woodbury's identity
    (Golub & Van Loan 2013, §2.1.4), with `k` solves with `A` once and one more for each right-hand side:

        (A + U V^H)^{-1} = A^{-1} - A^{-1} U (I + V^H A^{-1} U)^{-1} V^H A^{-1}

    It needs an `A` that is not singular, and loses accuracy where `A` is far worse conditioned than the sum (Yip 1986); the
    refinement and the certificate of the solve stand behind it. A multiple `c * LowRank(U, V)` is a `LowRank`.

    Args:
        U: a floating-point or complex Tensor of shape `(..., m, k)`.
        V: a Tensor of shape `(..., n, k)`, of the same dtype; by default `U`, which makes the operator Hermitian positive
            semidefinite. Both act on vectors of shape `(..., n)`; batch dimensions broadcast.
        claims: `hermitian=True` and the like, where they are known.

    Raises:
        TypeError: if `U` or `V` is no Tensor.
        ValueError: if they have different ranks, dtypes or devices, or batch dimensions that do not broadcast.
    """

    def __init__(self, U: Tensor, V: Tensor | None = None, **claims: Any) -> None:
        V = U if V is None else V
        check_tensor("U", U, 2, "(..., m, k)")
        check_tensor("V", V, 2, "(..., n, k)")
        if U.shape[-1] != V.shape[-1]:
            raise ValueError(
                f"V: expected shape (..., n, {U.shape[-1]}) for U of shape {tuple(U.shape)}, got shape {tuple(V.shape)}"
            )
        if U.dtype != V.dtype or U.device != V.device:
            raise ValueError(f"V: expected {U.dtype} on {U.device} like U, got {V.dtype} on {V.device}")
        try:
            torch.broadcast_shapes(U.shape[:-2], V.shape[:-2])
        except RuntimeError:
            raise ValueError(
                f"V: its batch dimensions {tuple(V.shape[:-2])} do not broadcast with those of U, {tuple(U.shape[:-2])}"
            ) from None
        domain = any_batch(V.shape[-2:-1], V)
        codomain = domain if U.shape[-2] == V.shape[-2] else any_batch(U.shape[-2:-1], U)
        super().__init__(domain, codomain, Claims.named(claims) | Claims(positive_semidefinite=V is U))
        self.U, self.V = U, V
        self.factor: Any = 1

    @property
    def rank(self) -> int:
        """The number of columns of `U` and `V`, which the rank does not exceed."""
        return self.U.shape[-1]

    def apply(self, x: Tensor) -> Tensor:
        y: Tensor = self._multiplied(matvec(self.U, matvec(self.V.mH, x)), self.factor)
        return y

    def apply_adjoint(self, y: Tensor) -> Tensor:
        x: Tensor = self._multiplied(matvec(self.V, matvec(self.U.mH, y)), _conj(self.factor))
        return x

    @staticmethod
    def _multiplied(x: Any, factor: Any) -> Any:
        return x if not isinstance(factor, Tensor) and factor == 1 else x * factor

    def _with(self, U: Tensor, V: Tensor, factor: Any, claims: Claims) -> LowRank:
        result = LowRank(U, V)
        result.factor, result.claims = factor, claims
        return result

    @property
    def H(self) -> LinearOperator:
        if self.hermitian:
            return self
        result = self._with(self.V, self.U, _conj(self.factor), self.claims.H)
        result.claimed_nullspace, result.claimed_left_nullspace = self.claimed_left_nullspace, self.claimed_nullspace
        return result

    def conj(self) -> LinearOperator:
        U = self.U.conj()
        result = self._with(U, U if self.V is self.U else self.V.conj(), _conj(self.factor), self.claims)
        result.claimed_nullspace = conjugated(self.claimed_nullspace)
        result.claimed_left_nullspace = conjugated(self.claimed_left_nullspace)
        return result

    def __mul__(self, other: Any) -> LinearOperator:
        if not is_scalar(other):
            return NotImplemented
        result = copy.copy(self)
        result.factor, result.claims = self._multiplied(other, self.factor), self.claims.scaled(other)
        if not is_nonzero(other):
            result.claimed_nullspace = result.claimed_left_nullspace = None
        if not is_real(other):
            result.domain, result.codomain = complexified(self.domain), complexified(self.codomain)
            result.codomain = result.domain if self.codomain is self.domain else result.codomain
        return result

    __rmul__ = __mul__

    def __add__(self, other: Any) -> LinearOperator:
        """The sum; two matrices of low rank make one."""
        alike = (
            isinstance(other, LowRank) and other.U.shape[:-1] == self.U.shape[:-1] and other.V.shape[:-1] == self.V.shape[:-1]
        )
        # a tensor is multiplied where the operator is applied, so that each application has a graph of its own
        if not alike or isinstance(self.factor, Tensor) or isinstance(other.factor, Tensor):
            return super().__add__(other)
        U = torch.cat([self._multiplied(part.U, part.factor) for part in (self, other)], dim=-1)
        gram = all(part.V is part.U and part.factor == 1 for part in (self, other))
        V = U if gram else torch.cat([self.V, other.V], dim=-1).to(U.dtype)
        return self._with(U, V, 1, self.claims.plus(other.claims))

    def factorise_update(self, whole: LinearOperator) -> Factorisation | None:
        factors = whole.factorise()
        if factors is None or self.U.shape[-2] != self.V.shape[-2]:
            return None
        columns = self._multiplied(self.U, self.factor).movedim(-1, 0)
        if isinstance(whole.domain, AnyBatch):  # which may have a batch of its own, behind that of the columns
            own = factors.solve(columns[0]).ndim - columns[0].ndim
            Z = factors.solve(columns[(slice(None), *(None,) * own)]).movedim(0, -1)
        else:
            Z = torch.stack([factors.solve(u) for u in columns], dim=-1)
        V = self.V.to(Z.dtype)
        core = DenseOperator(torch.eye(self.rank, dtype=Z.dtype, device=Z.device) + V.mH @ Z).factorise()
        assert core is not None

        def solve(r: Tensor) -> Tensor:
            z: Tensor = factors.solve(r)
            return z - matvec(Z, core.solve(matvec(V.mH, z)))

        def solve_adjoint(r: Tensor) -> Tensor:
            x: Tensor = factors.solve_adjoint(r - matvec(V, core.solve_adjoint(matvec(Z.mH, r))))
            return x

        return Factorisation(solve, solve_adjoint)

    def exact_diagonal(self) -> Tensor | None:
        if self.codomain is not self.domain:
            return None
        diagonal: Tensor = self._multiplied((self.U * self.V.conj()).sum(-1), self.factor)
        return diagonal

    def exact_norm(self) -> Tensor:
        R = torch.linalg.qr(self.U).R
        S = R if self.V is self.U else torch.linalg.qr(self.V).R
        norm: Tensor = torch.linalg.matrix_norm(R @ S.mH, ord=2)
        norm = norm * abs(self.factor)
        return norm

    def exact_eigenvalue_bounds(self) -> tuple[Tensor, Tensor] | None:
        if self.V is not self.U:
            return None
        R = torch.linalg.qr(self.U).R
        eigenvalues = torch.linalg.eigvalsh(R @ R.mH)
        low = torch.zeros_like(eigenvalues[..., 0]) if self.rank < self.U.shape[-2] else eigenvalues[..., 0]
        ends = torch.stack([low, eigenvalues[..., -1]]) * self.factor
        return ends.amin(0), ends.amax(0)

    def _label(self) -> str:
        text = f"LowRank(rank {self.rank})"
        if isinstance(self.factor, Tensor):
            return f"tensor * {text}"
        return text if self.factor == 1 else f"{self.factor} * {text}"


def _conj(factor: Any) -> Any:
    return factor.conj() if isinstance(factor, Tensor) else factor.conjugate()
