"""LSMR for least-squares problems of any shape and rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import names_options
from ..vectors import Scalar, Space
from .base import Correction, LeastSquaresState, Method, zeros
from .golub_kahan import GolubKahan


@dataclass(eq=False)
class Iterate:
    """The iterate and its two directions; one for `x` and, where it is wanted, one for its dual."""

    x: Tensor
    h: Tensor
    h_bar: Tensor

    @classmethod
    def start(cls, v: Tensor) -> Iterate:
        """Zero, with the first vector of the process for a direction."""
        return cls(x=zeros(v), h=v.clone(), h_bar=zeros(v))

    def advance(self, space: Space, v: Tensor, back: Scalar, length: Scalar, on: Scalar) -> None:
        """`h_bar = h - back h_bar`, `x += length h_bar`, `h = v - on h`."""
        self.h_bar = space.xpay(self.h, -back, self.h_bar)
        self.x = space.axpy(length, self.h_bar, self.x)
        self.h = space.xpay(v, -on, self.h)


@dataclass(eq=False)
class LSMRState(LeastSquaresState):
    """The process, the iterates, and the scalars of the two QR factorisations and of the norm of the residual."""

    gk: GolubKahan
    iterate: Iterate
    dual: Iterate | None
    scale: Scalar
    alpha_bar: Scalar
    zeta_bar: Scalar
    zeta: Scalar
    rho: Scalar
    rho_bar: Scalar
    c_bar: Scalar
    s_bar: Scalar
    beta_dd: Scalar
    beta_d: Scalar
    rho_d: Scalar
    tau_tilde: Scalar
    theta_tilde: Scalar
    rho_bar_max: Scalar
    rho_bar_min: Scalar
    first: bool = True


@names_options
@dataclass(frozen=True)
class LSMR(Method[LSMRState]):
    """LSMR (Fong & Saunders 2011), mathematically MINRES on the normal equations.

    For an `A` of any shape and rank; `|A^H r|` falls with every step, so that it may be stopped early. One product with `A`
    and one with `A^H` a step. Storage: `u` beside `b`, and `v`, `x` and two directions of the size of `x`; with a dual four
    vectors of the size of `b` more.
    """

    name: ClassVar[str] = "lsmr"
    least_squares: ClassVar[bool] = True

    def init(self, problem: Correction) -> LSMRState:
        space = problem.space
        gk, norm, status = GolubKahan.start(problem, problem.dual)
        one, zero = space.full(1.0, problem.rhs), norm * 0
        return LSMRState(
            problem,
            norm,
            status,
            normal_norm=gk.alpha * gk.beta,
            norm_A=gk.alpha,
            cond_A=zero,
            gk=gk,
            iterate=Iterate.start(gk.v),
            dual=None if gk.z is None else Iterate.start(gk.z),
            scale=space.ratio(norm, gk.beta),
            alpha_bar=gk.alpha,
            zeta_bar=gk.alpha * gk.beta,
            zeta=zero,
            rho=one,
            rho_bar=one,
            c_bar=one,
            s_bar=zero,
            beta_dd=gk.beta,
            beta_d=zero,
            rho_d=one,
            tau_tilde=zero,
            theta_tilde=zero,
            rho_bar_max=zero,
            rho_bar_min=one * float("inf"),
        )

    def step(self, s: LSMRState) -> LSMRState:
        space, gk = s.problem.space, s.gk
        gk.advance(s)
        s.norm_A = space.sqrt(gk.norm_A2)
        gk.norm_A2 = gk.norm_A2 + gk.alpha * gk.alpha

        # two rotations: of the bidiagonal matrix, and of the transpose of its triangle
        rho_old, rho_bar_old = s.rho, s.rho_bar
        c, sine, s.rho = space.givens(s.alpha_bar, gk.beta)
        theta, s.alpha_bar = sine * gk.alpha, c * gk.alpha
        theta_bar, size = s.s_bar * s.rho, s.c_bar * s.rho
        s.c_bar, s.s_bar, s.rho_bar = space.givens(size, theta)
        zeta_old, s.zeta = s.zeta, s.c_bar * s.zeta_bar
        s.zeta_bar = -s.s_bar * s.zeta_bar

        back = s.ratio(theta_bar * s.rho, rho_old * rho_bar_old)
        length, on = s.ratio(s.zeta, s.rho * s.rho_bar), s.ratio(theta, s.rho)
        s.iterate.advance(space, gk.v, back, length, on)
        if s.dual is not None and gk.z is not None:
            s.dual.advance(space, gk.z, back, length, on)

        # |r|: one more rotation, of the block above (Fong & Saunders 2011, §5)
        beta_hat, s.beta_dd = c * s.beta_dd, -sine * s.beta_dd
        theta_tilde_old = s.theta_tilde
        c_tilde, s_tilde, rho_tilde = space.givens(s.rho_d, theta_bar)
        s.theta_tilde, s.rho_d = s_tilde * s.rho_bar, c_tilde * s.rho_bar
        s.beta_d = c_tilde * beta_hat - s_tilde * s.beta_d
        s.tau_tilde = space.ratio(zeta_old - theta_tilde_old * s.tau_tilde, rho_tilde)
        tau_d = space.ratio(s.zeta - s.theta_tilde * s.tau_tilde, s.rho_d)
        residual = space.sqrt((s.beta_d - tau_d) ** 2 + s.beta_dd**2)
        s.residual_norm = space.where(s.running, residual * s.scale, s.residual_norm)
        s.normal_norm = space.where(s.running, abs(s.zeta_bar), s.normal_norm)

        # the diagonal of the second triangle, the newest entry of which is not final
        if s.first:
            s.first = False
        else:
            s.rho_bar_max = space.maximum(s.rho_bar_max, rho_bar_old)
            s.rho_bar_min = space.minimum(s.rho_bar_min, rho_bar_old)
            largest, smallest = space.maximum(s.rho_bar_max, size), space.minimum(s.rho_bar_min, size)
            s.cond_A = space.where(s.running, space.maximum(s.cond_A, space.ratio(largest, smallest)), s.cond_A)
        return s

    def solution(self, s: LSMRState) -> Tensor:
        return s.iterate.x

    def dual(self, s: LSMRState) -> Tensor | None:
        return None if s.dual is None else s.dual.x
