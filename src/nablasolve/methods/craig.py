"""CRAIG's method for consistent systems of any shape, with the dual variable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import names_options
from ..info import Status
from ..vectors import Scalar
from .base import CLAIMED, Correction, LeastSquaresState, Method, zeros
from .golub_kahan import GolubKahan


@dataclass(eq=False)
class CRAIGState(LeastSquaresState):
    """The process, the iterate `x`, its dual `y`, and `zeta`; and LSQR's `rho_bar = |A^H r| / |r|`."""

    gk: GolubKahan
    x: Tensor
    y: Tensor
    zeta: Scalar
    scale: Scalar
    rho_bar: Scalar


@names_options
@dataclass(frozen=True)
class CRAIG(Method[CRAIGState]):
    """CRAIG's method (Craig 1955; Paige & Saunders 1982, §7.2; Saunders 1995) for `min |x|` subject to `A x = b`.

    The error falls with every step. It finds the dual variable `y` of the constraint as well, with `x = A^H y`, so that
    one run on `A^H w = c` gives `w` and, for an `A` of full column rank, `y = (A^H A)^{-1} c`. For an inconsistent system it
    diverges; that it is INCONSISTENT shows in LSQR's residual, which the same process knows. One product with `A` and one with
    `A^H` a step. Storage: `x` and `v` of the size of `x`, and `u`, `y` and its direction of that of `b`.
    """

    name: ClassVar[str] = "craig"
    least_squares: ClassVar[bool] = True

    def init(self, problem: Correction) -> CRAIGState:
        space = problem.space
        gk, norm, status = GolubKahan.start(problem, dual=True)
        state = CRAIGState(
            problem,
            norm,
            status,
            normal_norm=gk.alpha * gk.beta,
            norm_A=gk.alpha,
            cond_A=norm * 0,
            gk=gk,
            x=zeros(gk.v),
            y=zeros(gk.u),
            zeta=-space.full(1.0, problem.rhs),
            scale=space.ratio(norm, gk.beta),
            rho_bar=gk.alpha,
        )
        state.stop(Status.INCONSISTENT, gk.alpha == 0)
        return state

    def step(self, s: CRAIGState) -> CRAIGState:
        space, gk = s.problem.space, s.gk
        assert gk.z is not None
        s.zeta = -s.ratio(gk.beta, gk.alpha) * s.zeta
        s.x = space.axpy(s.zeta, gk.v, s.x)
        s.y = space.axpy(s.zeta, gk.z, s.y)
        gk.advance(s)
        s.norm_A = space.sqrt(gk.norm_A2)
        gk.norm_A2 = gk.norm_A2 + gk.alpha * gk.alpha
        s.residual_norm = space.where(s.running, abs(gk.beta * s.zeta) * s.scale, s.residual_norm)
        s.normal_norm = s.norm_A * 0 + float("inf")  # of no use here, and not known
        s.stop(CLAIMED, s.residual_norm <= s.problem.target)

        # A^H r = 0 for LSQR's residual r != 0: b has a part outside the range
        c, _, _ = space.givens(s.rho_bar, gk.beta)
        s.rho_bar = -c * gk.alpha
        s.stop(Status.INCONSISTENT, abs(s.rho_bar) <= s.problem.rounding * s.norm_A)
        return s

    def solution(self, s: CRAIGState) -> Tensor:
        return s.x

    def dual(self, s: CRAIGState) -> Tensor | None:
        return s.y
