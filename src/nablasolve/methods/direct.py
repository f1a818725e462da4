"""Direct solves: a dense matrix is factorised by Cholesky's method or LU, a known structure brings its own factorisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..arguments import names_options
from ..info import Status
from ..vectors import accumulator_dtype
from .base import CLAIMED, Correction, Method, State, initial_status, zeros


@dataclass(eq=False)
class DirectState(State):
    """The factor and the solution."""

    x: Tensor
    factor: tuple[Tensor, ...]


@names_options
@dataclass(frozen=True)
class Direct(Method[DirectState]):
    """LU (or Cholesky) factorisation of a dense matrix, refined from the recomputed residual where that is needed.

    The factor is computed once and serves the adjoint solve and every higher derivative (Golub & Van Loan 2013, §3.2,
    §4.2; refinement §3.5.3). An operator whose structure allows it (diagonal, banded, Kronecker, circulant, ...) solves by its
    own `LinearOperator.factorise`. Storage: the factor, and 2 vectors beside `b` and the solution.

    Args:
        positive_definite_matrix: factorise a dense matrix by Cholesky's method, reading the lower triangle only.
    """

    positive_definite_matrix: bool = False
    name: ClassVar[str] = "direct"
    direct: ClassVar[bool] = True

    def init(self, problem: Correction) -> DirectState:
        norm, status = initial_status(problem)
        if problem.inverse is not None:
            return DirectState(problem, norm, status, x=zeros(problem.rhs), factor=())
        if problem.matrix is None:
            raise ValueError("method: 'direct' needs A as a dense Tensor (A.to_dense() builds one), got a function")
        factor = problem.kept or factorise(problem.matrix, self.positive_definite_matrix)
        state = DirectState(problem, norm, status, x=zeros(problem.rhs), factor=factor)
        singular = factor[-1].expand(problem.rhs.shape[: problem.space.batch_dims]) != 0
        failed = singular if isinstance(norm, Tensor) else bool(singular)  # as the space holds its scalars
        state.stop(Status.INDEFINITE if self.positive_definite_matrix else Status.BREAKDOWN, failed)
        return state

    def step(self, s: DirectState) -> DirectState:
        problem, space, r = s.problem, s.problem.space, s.problem.rhs
        adjoint = problem.adjoint_of_kept and bool(problem.kept)
        x = problem.inverse(r) if problem.inverse else substitute(s.factor, r, self.positive_definite_matrix, adjoint)
        s.x = space.scale(space.where(s.running, 1.0, 0.0), x)
        s.stop(CLAIMED, s.running)  # what rounding has left is for the next cycle to refine
        return s

    def solution(self, s: DirectState) -> Tensor:
        return s.x

    def keep(self, s: DirectState) -> tuple[Tensor, ...]:
        return s.factor


def factorise(matrix: Tensor, positive_definite: bool) -> tuple[Tensor, ...]:
    """Cholesky's factor, or LU and its pivots, of matrices `(*batch, n, n)`; the last part is not 0 where it failed.

    Matrices of 16 bits are factorised in 32.
    """
    matrix = matrix.to(accumulator_dtype(matrix.dtype))
    return tuple(torch.linalg.cholesky_ex(matrix) if positive_definite else torch.linalg.lu_factor_ex(matrix))


def substitute(factor: tuple[Tensor, ...], r: Tensor, positive_definite: bool, adjoint: bool) -> Tensor:
    """`A^{-1} r`, or `A^{-H} r`, for `r` of shape `(*batch, n)` and a factor with the same batch dimensions or 1s."""
    if r.is_complex() and not factor[0].is_complex():  # a real matrix acts on both parts
        return torch.complex(*(substitute(factor, part, positive_definite, adjoint) for part in (r.real, r.imag)))
    if r.dtype in (torch.float16, torch.bfloat16):
        return substitute(factor, r.to(factor[0].dtype), positive_definite, adjoint).to(r.dtype)
    if factor[0].is_complex() and not r.is_complex():
        r = r.to(factor[0].dtype)
    parts, n = factor[:-1], r.shape[-1]
    shared = parts[0].numel() == n * n
    if shared:  # one matrix, many right-hand sides: they are its columns
        parts = tuple(part.reshape(part.shape[r.ndim - 1 :]) for part in parts)
        columns = r.reshape(-1, n).mT
    else:  # one batch dimension: torch 2.13's lu_solve is wrong for a column-major factor with a dimension of size 1
        parts = tuple(part.expand(*r.shape[:-1], *part.shape[r.ndim - 1 :]).flatten(0, r.ndim - 2) for part in parts)
        columns = r.reshape(-1, n, 1)
    if positive_definite:  # its own adjoint
        y = torch.cholesky_solve(columns, parts[0])
    else:
        y = torch.linalg.lu_solve(*parts, columns, adjoint=adjoint)
    return (y.mT if shared else y).reshape(r.shape)
