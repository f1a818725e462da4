"""LSQR for least-squares problems of any shape and rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import names_options
from ..vectors import Scalar
from .base import Correction, LeastSquaresState, Method, zeros
from .golub_kahan import GolubKahan


@dataclass(eq=False)
class LSQRState(LeastSquaresState):
    """The process, the iterate `x` with its direction `w`, the same for the dual, and the scalars of the QR factorisation."""

    gk: GolubKahan
    x: Tensor
    w: Tensor
    q: Tensor | None
    w_dual: Tensor | None
    scale: Scalar
    phi_bar: Scalar
    rho_bar: Scalar
    rho_max: Scalar
    rho_min: Scalar


@names_options
@dataclass(frozen=True)
class LSQR(Method[LSQRState]):
    """LSQR (Paige & Saunders 1982), mathematically conjugate gradients on the normal equations.

    For an `A` of any shape and rank; `|r|` falls with every step. One product with `A` and one with `A^H` a step. Storage: `u`
    beside `b`, and `v`, `x` and `w` of the size of `x`; with a dual three vectors of the size of `b` more.
    """

    name: ClassVar[str] = "lsqr"
    least_squares: ClassVar[bool] = True

    def init(self, problem: Correction) -> LSQRState:
        gk, norm, status = GolubKahan.start(problem, problem.dual)
        return LSQRState(
            problem,
            norm,
            status,
            normal_norm=gk.alpha * gk.beta,
            norm_A=gk.alpha,
            cond_A=norm * 0,
            gk=gk,
            x=zeros(gk.v),
            w=gk.v.clone(),
            q=None if gk.z is None else zeros(gk.z),
            w_dual=None if gk.z is None else gk.z.clone(),
            scale=problem.space.ratio(norm, gk.beta),
            phi_bar=gk.beta,
            rho_bar=gk.alpha,
            rho_max=norm * 0,
            rho_min=norm + float("inf"),
        )

    def step(self, s: LSQRState) -> LSQRState:
        space, gk = s.problem.space, s.gk
        gk.advance(s)
        s.norm_A = space.sqrt(gk.norm_A2)
        gk.norm_A2 = gk.norm_A2 + gk.alpha * gk.alpha

        c, sine, rho = space.givens(s.rho_bar, gk.beta)
        theta, s.rho_bar = sine * gk.alpha, -c * gk.alpha
        phi, s.phi_bar = c * s.phi_bar, sine * s.phi_bar

        length, on = s.ratio(phi, rho), s.ratio(theta, rho)
        s.x = space.axpy(length, s.w, s.x)
        s.w = space.xpay(gk.v, -on, s.w)
        if s.q is not None and s.w_dual is not None and gk.z is not None:
            s.q = space.axpy(length, s.w_dual, s.q)
            s.w_dual = space.xpay(gk.z, -on, s.w_dual)

        s.residual_norm = space.where(s.running, abs(s.phi_bar) * s.scale, s.residual_norm)
        s.normal_norm = space.where(s.running, abs(s.phi_bar * s.rho_bar), s.normal_norm)
        s.rho_max, s.rho_min = space.maximum(s.rho_max, rho), space.minimum(s.rho_min, rho)
        s.cond_A = space.where(s.running, space.maximum(s.cond_A, space.ratio(s.rho_max, s.rho_min)), s.cond_A)
        return s

    def solution(self, s: LSQRState) -> Tensor:
        return s.x

    def dual(self, s: LSQRState) -> Tensor | None:
        return s.q
