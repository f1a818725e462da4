"""Conjugate gradients on the normal equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import names_options
from ..info import Status
from ..vectors import Scalar
from .base import Correction, LeastSquaresState, Method, initial_status, zeros


@dataclass(eq=False)
class CGLSState(LeastSquaresState):
    """The iterate, the residual, the direction `p`, `gamma = s^H M s` for `s = A^H r`, and the dual with its direction."""

    x: Tensor
    r: Tensor
    p: Tensor
    q: Tensor | None
    p_dual: Tensor | None
    gamma: Scalar
    trace: Scalar
    carried: Scalar
    gain_max: Scalar
    gain_min: Scalar


@names_options
@dataclass(frozen=True)
class CGLS(Method[CGLSState]):
    """CGLS (Hestenes & Stiefel 1952, §10; Björck 1996, §7.4), which forms `A^H r` from the residual and never `A^H A`.

    For an `A` of any shape and rank. One product with `A` and one with `A^H` a step. Storage, the least of all these methods:
    `x` and `p` of the size of `x`, beside what `A` and `A^H` return, and the residual; with a dual two of the size of `b` more.
    """

    name: ClassVar[str] = "cgls"
    least_squares: ClassVar[bool] = True

    def init(self, problem: Correction) -> CGLSState:
        assert problem.adjoint is not None
        space, r = problem.space, problem.rhs
        norm, status = initial_status(problem)
        s = problem.adjoint(r)
        z = problem.precondition(s)
        gamma = space.real_dot(s, z)
        state = CGLSState(
            problem,
            norm,
            status,
            normal_norm=space.sqrt(gamma),
            norm_A=space.ratio(space.sqrt(gamma), norm),
            cond_A=norm * 0,
            x=zeros(s),
            r=r,
            p=space.copy(z),
            q=zeros(r) if problem.dual else None,
            p_dual=r.clone() if problem.dual else None,
            gamma=gamma,
            trace=norm * 0,
            carried=norm * 0,
            gain_max=norm * 0,
            gain_min=norm + float("inf"),
        )
        state.stop(Status.NONFINITE, space.nonfinite(gamma))
        state.stop(Status.INDEFINITE, gamma < 0)  # M has the wrong sign
        return state

    def step(self, s: CGLSState) -> CGLSState:
        problem, space = s.problem, s.problem.space
        assert problem.adjoint is not None
        Ap = problem.apply(s.p)
        delta = space.real_dot(Ap, Ap)
        s.stop(Status.NONFINITE, space.nonfinite(delta))
        alpha = s.ratio(s.gamma, delta)
        s.x = space.axpy(alpha, s.p, s.x)
        s.r = space.axpy(-alpha, Ap, s.r)
        del Ap
        if s.q is not None and s.p_dual is not None:
            s.q = space.axpy(alpha, s.p_dual, s.q)
        s.residual_norm = space.where(s.running, space.norm(s.r), s.residual_norm)
        g = problem.adjoint(s.r)
        z = problem.precondition(g)
        gamma = space.real_dot(g, z)
        s.stop(Status.NONFINITE, space.nonfinite(gamma))
        s.stop(Status.INDEFINITE, gamma < 0)
        beta = s.ratio(gamma, s.gamma)
        s.p = space.xpay(z, beta, s.p)
        if s.p_dual is not None:
            s.p_dual = space.xpay(s.r, beta, s.p_dual)
        s.normal_norm = space.where(s.running, space.sqrt(gamma), s.normal_norm)

        # the trace of Lanczos' tridiagonal matrix of A^H A is the squared Frobenius norm of the bidiagonal one of A
        gain = space.ratio(delta, s.gamma)
        s.trace = s.trace + space.where(s.running, gain + s.carried, gain * 0)
        s.carried = beta * gain
        s.norm_A = space.sqrt(s.trace + s.carried)
        s.gain_max, s.gain_min = space.maximum(s.gain_max, gain), space.minimum(s.gain_min, gain)
        s.cond_A = space.where(s.running, space.sqrt(space.ratio(s.gain_max, s.gain_min)), s.cond_A)
        s.gamma = gamma
        return s

    def solution(self, s: CGLSState) -> Tensor:
        return s.x

    def dual(self, s: CGLSState) -> Tensor | None:
        return s.q
