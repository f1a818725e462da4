"""Dense least squares of full rank by Householder's QR factorisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..arguments import names_options
from ..info import Status
from ..vectors import accumulator_dtype, real_dtype
from .base import CLAIMED, Correction, LeastSquaresState, Method, initial_status, zeros

# Steps of the power method on R and on its inverse: the smallest singular value of a matrix without full rank is so far below
# the others that the second step is at it.
POWER_STEPS = 3


@dataclass(eq=False)
class QRState(LeastSquaresState):
    """The factors of `A`, or of `A^H` where that is the tall one, the iterate and its dual."""

    x: Tensor
    q: Tensor
    factor: tuple[Tensor, Tensor]
    of_adjoint: bool


@names_options
@dataclass(frozen=True)
class QR(Method[QRState]):
    """Householder's `A = Q R` for a dense matrix of full rank (Golub & Van Loan 2013, §5.3, §5.6).

    `x = R^{-1} Q^H b` where `A` has no more columns than rows; else `A^H = Q R`, and `x = Q R^{-H} b` is the minimum-norm
    solution. Several times faster than the singular value decomposition. A matrix without full rank is ILL_CONDITIONED: the
    condition number of `R`, estimated by triangular solves, has reached the reciprocal of `max(m, n)` roundoffs. The factors
    serve the adjoint solve and every higher derivative. Storage: `Q` of the size of `A`, and `R` of `min(m, n)^2` numbers.
    """

    name: ClassVar[str] = "qr"
    least_squares: ClassVar[bool] = True
    direct: ClassVar[bool] = True

    def init(self, problem: Correction) -> QRState:
        assert problem.matrix is not None
        assert problem.adjoint is not None
        space, r = problem.space, problem.rhs
        norm, status = initial_status(problem)
        g = problem.adjoint(r)
        m, n = problem.matrix.shape[-2:]
        # what is kept is of the tall one of A and A^H; of a square A, of the one that was solved with first
        of_adjoint = m < n or (m == n and problem.adjoint_of_kept and bool(problem.kept))
        Q, R = problem.kept or _factorised(problem.matrix.mH if of_adjoint else problem.matrix)
        edges, batch = _norm_and_edges(R), r.shape[: space.batch_dims]
        norm_A, largest, smallest = (a.expand(batch) if isinstance(norm, Tensor) else a.item() for a in edges)
        state = QRState(
            problem,
            norm,
            status,
            normal_norm=space.norm(g),
            norm_A=norm_A,
            cond_A=space.ratio(largest, smallest),
            x=zeros(g),
            q=zeros(r),
            factor=(Q, R),
            of_adjoint=of_adjoint,
        )
        state.stop(Status.NONFINITE, space.nonfinite(norm_A))
        state.stop(Status.ILL_CONDITIONED, smallest <= max(m, n) * torch.finfo(R.dtype).eps * largest)
        return state

    def step(self, s: QRState) -> QRState:
        problem, space = s.problem, s.problem.space
        r, wide = problem.rhs, torch.promote_types(s.factor[0].dtype, problem.rhs.dtype)
        Q, R = (part.to(wide) for part in s.factor)
        column = r.to(wide).unsqueeze(-1)
        if s.of_adjoint:
            y = _solve(R.mH, column, upper=False)
            x, q = Q @ y, _solve(R, y, upper=True)
        else:
            x = _solve(R, Q.mH @ column, upper=True)
            q = Q @ _solve(R.mH, x, upper=False)
        on = space.where(s.running, 1.0, 0.0)
        s.x = space.scale(on, x.squeeze(-1).to(r.dtype))
        s.q = space.scale(on, q.squeeze(-1).to(r.dtype))
        s.stop(CLAIMED, s.running)  # what rounding has left is for the next cycle to refine
        return s

    def solution(self, s: QRState) -> Tensor:
        return s.x

    def dual(self, s: QRState) -> Tensor | None:
        return s.q

    def keep(self, s: QRState) -> tuple[Tensor, ...]:
        return s.factor


def _factorised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`Q` and `R` of matrices of 32 bits at least; NaN for the `R` of one that is not finite, which leaves the others alone."""
    matrix = matrix.to(accumulator_dtype(matrix.dtype))
    finite = torch.isfinite(matrix).all(-1).all(-1)[..., None, None]
    Q, R = torch.linalg.qr(torch.where(finite, matrix, 0.0))
    return Q, torch.where(finite, R, torch.nan)


def _solve(triangle: Tensor, columns: Tensor, upper: bool) -> Tensor:
    """`T^{-1} Y`, for leading dimensions that broadcast."""
    x: Tensor = torch.linalg.solve_triangular(triangle, columns, upper=upper)
    return x


def _norm_and_edges(R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`|R|` in Frobenius' norm, its largest singular value from below, and its smallest one from above.

    By the power method on `R^H R` and on its inverse (Golub & Van Loan 2013, §8.2), begun with a vector that no singular
    vector is orthogonal to but by design.
    """
    n, zero = R.shape[-1], R.new_zeros(R.shape[:-2], dtype=real_dtype(R.dtype))
    if n == 0:
        return zero, zero, zero + 1
    unit = R.abs().amax((-2, -1))
    R = R / torch.where(unit > 0, unit, 1.0)[..., None, None]  # so that no square leaves the range of the dtype
    singular = (R.diagonal(dim1=-2, dim2=-1) == 0).any(-1)
    T = torch.where(singular[..., None, None], torch.eye(n, dtype=R.dtype, device=R.device), R)
    v = torch.cos(torch.arange(1, n + 1, dtype=zero.dtype, device=R.device) ** 2).to(R.dtype)
    v = v.expand(R.shape[:-1]).unsqueeze(-1)
    largest = _gain(lambda v: R @ v, lambda v: R.mH @ v, v)
    inverse = _gain(lambda v: _solve(T.mH, v, upper=False), lambda v: _solve(T, v, upper=True), v)
    frobenius: Tensor = torch.linalg.vector_norm(R, dim=(-2, -1))
    return unit * frobenius, unit * largest, unit * torch.where(torch.isfinite(inverse) & ~singular, 1 / inverse, 0.0)


def _gain(apply: Callable[[Tensor], Tensor], apply_adjoint: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """By how much the power method finds that a map lengthens a vector; not finite where that is beyond the dtype."""
    largest = torch.zeros_like(v[..., 0, 0].real)
    for step in (None, *(apply, apply_adjoint) * POWER_STEPS):
        v = v if step is None else step(v)
        norm = torch.linalg.vector_norm(v, dim=(-2, -1))
        largest = largest if step is None else torch.maximum(largest, norm)
        v = v / torch.where(norm > 0, norm, 1.0)[..., None, None]
    return largest
