"""The stabilised biconjugate gradient method for general square operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import names_options
from ..info import Status
from ..vectors import Scalar
from .base import Correction, Method, State, initial_status, zeros

# Rounding leaves about this part of |r| epsilon in rho = shadow^H r, |shadow| = 1: what is smaller has no digit.
NOISE = 0.1


@dataclass(eq=False)
class BiCGStabState(State):
    """The iterate `x`, the residual `r`, its shadow, the direction `p`, `v = A M p` and `rho = shadow^H r`."""

    x: Tensor
    r: Tensor
    shadow: Tensor
    p: Tensor
    v: Tensor
    rho: Scalar


@names_options
@dataclass(frozen=True)
class BiCGStab(Method[BiCGStabState]):
    """BiCGStab (van der Vorst 1992; Saad 2003, Algorithm 7.7), preconditioned on the right.

    For any square `A`. Two products with `A` and two with `M` a step, one fewer where half a step converges. A breakdown
    is measured against the vectors that cause it. Where `rho` is rounding beside them, the answer is a restart from the true
    residual, if that is smaller than the one the cycle began with, and else the next step, which may recover. Storage:
    5 vectors (`x`, `r`, its shadow, `p`, `v`) beside `b`, the solution, and what `A` and `M` return.
    """

    name: ClassVar[str] = "bicgstab"

    def init(self, problem: Correction) -> BiCGStabState:
        r = problem.rhs
        norm, status = initial_status(problem)
        return BiCGStabState(problem, norm, status, x=zeros(r), r=r, shadow=r.clone(), p=r.clone(), v=zeros(r), rho=norm * norm)

    def step(self, s: BiCGStabState) -> BiCGStabState:
        problem, space = s.problem, s.problem.space
        p_hat = problem.precondition(s.p)
        s.v = space.copy(problem.apply(p_hat), out=s.v)
        sigma = space.dot(s.shadow, s.v)
        s.stop(Status.NONFINITE, space.nonfinite(abs(sigma)))
        s.stop(Status.BREAKDOWN, abs(sigma) == 0)
        alpha = s.ratio(s.rho, sigma)
        s.x = space.axpy(alpha, p_hat, s.x)
        del p_hat
        s.r = space.axpy(-alpha, s.v, s.r)
        half_norm = space.norm(s.r)
        s.stop(Status.BREAKDOWN, half_norm * problem.epsilon > 1)  # no digit of the equation is left
        half = half_norm <= problem.target
        if not space.may(s.running & (half_norm > problem.target)):
            s.residual_norm = space.where(s.running, half_norm, s.residual_norm)
            return s

        s_hat = problem.precondition(s.r)
        t = problem.apply(s_hat)
        ts, tt = space.dot(t, s.r), space.real_dot(t, t)
        s.stop(Status.NONFINITE, space.nonfinite(tt))
        negligible = abs(ts) <= problem.epsilon * space.sqrt(tt) * half_norm
        omega = space.where(half, ts * 0, s.ratio(ts, tt))
        s.x = space.axpy(omega, s_hat, s.x)
        s.r = space.axpy(-omega, t, s.r)
        s.residual_norm = space.norm(s.r)
        rho = space.dot(s.shadow, s.r)
        unfinished = s.residual_norm > problem.target
        # from a larger residual a restart would gain nothing
        lost = (abs(rho) <= NOISE * problem.epsilon * s.residual_norm) & (s.residual_norm < 1)
        s.stop(Status.BREAKDOWN, unfinished & (negligible | lost))
        s.stop(Status.BREAKDOWN, s.residual_norm * problem.epsilon > 1)
        # p = r + beta (p - omega v)
        beta = s.ratio(rho, s.rho) * s.ratio(alpha, omega)
        s.p = space.xpay(s.r, beta, space.axpy(-omega, s.v, s.p))
        s.rho = rho
        return s

    def solution(self, s: BiCGStabState) -> Tensor:
        return s.x
