"""Dense least squares by the singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..arguments import names_options
from ..info import Status
from ..vectors import accumulator_dtype
from .base import CLAIMED, Correction, LeastSquaresState, Method, initial_status, zeros


@dataclass(eq=False)
class SVDState(LeastSquaresState):
    """The factors of `A` (or of `A^H`, whose roles are then exchanged), the iterate and its dual."""

    x: Tensor
    q: Tensor
    factor: tuple[Tensor, Tensor, Tensor]
    exchanged: bool


@names_options
@dataclass(frozen=True)
class SVD(Method[SVDState]):
    """The pseudo-inverse of a dense matrix of any shape and rank, `x = V S^+ U^H b` (Golub & Van Loan 2013, §5.5).

    Singular values below `rcond` times the largest are taken for zero. The factors serve the adjoint solve and every
    higher derivative. Storage: the factors, `(m + n) min(m, n)` numbers.

    Args:
        rcond: the relative size of a singular value that is zero; by default `max(m, n)` roundoffs, as NumPy's.

    Raises:
        ValueError: if `rcond` is no number in [0, 1).
    """

    rcond: float | None = None
    name: ClassVar[str] = "svd"
    least_squares: ClassVar[bool] = True
    direct: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rcond is not None and not (isinstance(self.rcond, int | float) and 0 <= self.rcond < 1):
            raise ValueError(f"rcond: expected a number in [0, 1) or None, got {self.rcond!r}")

    def init(self, problem: Correction) -> SVDState:
        assert problem.matrix is not None
        assert problem.adjoint is not None
        space, r = problem.space, problem.rhs
        norm, status = initial_status(problem)
        g = problem.adjoint(r)
        U, sigma, Vh = problem.kept or _decomposed(problem.matrix)
        largest = sigma.amax(-1) if sigma.shape[-1] else sigma.sum(-1)
        rank_edge = torch.where(self._nonzero(U, sigma, Vh), sigma, largest[..., None]).amin(-1) if sigma.shape[-1] else largest
        batch = r.shape[: space.batch_dims]
        norm_A, smallest = (a.expand(batch) if isinstance(norm, Tensor) else a.item() for a in (largest, rank_edge))
        state = SVDState(
            problem,
            norm,
            status,
            normal_norm=space.norm(g),
            norm_A=norm_A,
            cond_A=space.ratio(norm_A, smallest),
            x=zeros(g),
            q=zeros(r),
            factor=(U, sigma, Vh),
            exchanged=problem.adjoint_of_kept and bool(problem.kept),
        )
        state.stop(Status.NONFINITE, space.nonfinite(norm_A))
        return state

    def step(self, s: SVDState) -> SVDState:
        problem, space = s.problem, s.problem.space
        (U, sigma, Vh), r = s.factor, problem.rhs
        left, right = (Vh.mH, U) if s.exchanged else (U, Vh.mH)
        nonzero = self._nonzero(U, sigma, Vh)
        inverse = torch.where(nonzero, 1 / torch.where(nonzero, sigma, 1.0), 0.0)
        wide = torch.promote_types(left.dtype, r.dtype)
        left, right = left.to(wide), right.to(wide)
        parts = inverse * (left.mH @ r.to(wide).unsqueeze(-1)).squeeze(-1)
        on = space.where(s.running, 1.0, 0.0)
        s.x = space.scale(on, (right @ parts.unsqueeze(-1)).squeeze(-1).to(r.dtype))
        s.q = space.scale(on, (left @ (inverse * parts).unsqueeze(-1)).squeeze(-1).to(r.dtype))
        s.stop(CLAIMED, s.running)  # what rounding has left is for the next cycle to refine
        return s

    def _nonzero(self, U: Tensor, sigma: Tensor, Vh: Tensor) -> Tensor:
        rcond = max(U.shape[-2], Vh.shape[-1]) * torch.finfo(U.dtype).eps if self.rcond is None else self.rcond
        return sigma > rcond * sigma[..., :1]

    def solution(self, s: SVDState) -> Tensor:
        return s.x

    def dual(self, s: SVDState) -> Tensor | None:
        return s.q

    def keep(self, s: SVDState) -> tuple[Tensor, ...]:
        return s.factor


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U, S, V^H` of matrices of 32 bits at least; NaN for the `S` of one that is not finite, which leaves the others alone."""
    matrix = matrix.to(accumulator_dtype(matrix.dtype))
    finite = torch.isfinite(matrix).all(-1).all(-1)
    U, sigma, Vh = torch.linalg.svd(torch.where(finite[..., None, None], matrix, 0.0), full_matrices=False)
    return U, torch.where(finite[..., None], sigma, torch.nan), Vh
