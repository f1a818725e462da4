"""Dense factorisation: Cholesky where positive definiteness is claimed, LU elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..info import Status
from .base import Correction, Method, State, initial_status, zeros


@dataclass(eq=False)
class DirectState(State):
    """The factor, the residual of the refinement and the iterate."""

    x: Tensor
    r: Tensor
    factor: tuple[Tensor, ...]


@dataclass(frozen=True)
class Direct(Method[DirectState]):
    """LU (or Cholesky) factorisation of a dense matrix, with steps of iterative refinement where they are needed.

    The factor is computed once and serves the adjoint solve and every higher derivative (Golub & Van Loan 2013, §3.2,
    §4.2; refinement §3.5.3). Storage: the factor, and 2 vectors beside `b` and the solution.

    Args:
        positive_definite_matrix: factorise by Cholesky's method, reading the lower triangle only.
    """

    positive_definite_matrix: bool = False
    name: ClassVar[str] = "direct"

    def init(self, problem: Correction) -> DirectState:
        if problem.matrix is None:
            raise ValueError("method: 'direct' needs A as a dense Tensor (A.to_dense() builds one), got a function")
        norm, status = initial_status(problem)
        factor = problem.kept or self._factorise(problem.matrix)
        state = DirectState(problem, norm, status, x=zeros(problem.rhs), r=problem.rhs, factor=factor)
        singular = factor[-1].expand(problem.rhs.shape[: problem.space.batch_dims]) != 0
        failed = singular if isinstance(norm, Tensor) else bool(singular)  # as the space holds its scalars
        state.stop(Status.INDEFINITE if self.positive_definite_matrix else Status.BREAKDOWN, failed)
        return state

    def _factorise(self, matrix: Tensor) -> tuple[Tensor, ...]:
        if self.positive_definite_matrix:
            return tuple(torch.linalg.cholesky_ex(matrix))
        return tuple(torch.linalg.lu_factor_ex(matrix))

    def _substitute(self, s: DirectState, r: Tensor) -> Tensor:
        if r.is_complex() and not s.factor[0].is_complex():  # a real matrix acts on both parts
            return torch.complex(self._substitute(s, r.real), self._substitute(s, r.imag))
        factor, adjoint = s.factor[:-1], s.problem.adjoint_of_kept and bool(s.problem.kept)
        n = r.shape[-1]
        shared = factor[0].numel() == n * n
        if shared:  # one matrix, many right-hand sides: they are its columns
            factor = tuple(part.reshape(part.shape[r.ndim - 1 :]) for part in factor)
            columns = r.reshape(-1, n).mT
        else:  # one batch dimension: torch 2.13's lu_solve is wrong for a column-major factor with a dimension of size 1
            factor = tuple(part.expand(*r.shape[:-1], *part.shape[r.ndim - 1 :]).flatten(0, r.ndim - 2) for part in factor)
            columns = r.reshape(-1, n, 1)
        if self.positive_definite_matrix:  # its own adjoint
            y = torch.cholesky_solve(columns, factor[0])
        else:
            y = torch.linalg.lu_solve(*factor, columns, adjoint=adjoint)
        return (y.mT if shared else y).reshape(r.shape)

    def step(self, s: DirectState) -> DirectState:
        problem, space = s.problem, s.problem.space
        s.x = s.x + space.scale(space.where(s.running, 1.0, 0.0), self._substitute(s, s.r))
        s.r = problem.rhs - problem.apply(s.x)
        before, s.residual_norm = s.residual_norm, space.norm(s.r)
        s.stop(Status.STAGNATED, (s.residual_norm > problem.target) & (s.residual_norm >= 0.5 * before))
        return s

    def solution(self, s: DirectState) -> Tensor:
        return s.x

    def keep(self, s: DirectState) -> tuple[Tensor, ...]:
        return s.factor
