"""The minimum residual method for Hermitian operators, definite or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import names_options
from ..info import Status
from ..vectors import Scalar
from .base import Correction, Method, State, initial_status, zeros


@dataclass(eq=False)
class MINRESState(State):
    """The Lanczos pair (`u`, `u_old`, unnormalised, and `z = M u`), the directions `w` and the rotation's scalars."""

    x: Tensor
    u: Tensor
    u_old: Tensor
    z: Tensor
    w: Tensor
    w_old: Tensor
    r: Tensor | None
    beta: Scalar
    beta_old: Scalar
    c: Scalar
    s: Scalar
    delta_bar: Scalar
    epsilon: Scalar
    gamma: Scalar
    gamma_old: Scalar
    phi: Scalar
    norm_A: Scalar
    noise: Scalar


# How many roundoffs `|A r| / (|A| |r|)` may be before it is more than rounding, which grows with each step of the Lanczos
# process: to stop too early costs a restart; to stop too late pollutes `x` with a null vector.
NOISE, MORE_NOISE = 100, 40


@names_options
@dataclass(frozen=True)
class MINRES(Method[MINRESState]):
    """MINRES (Paige & Saunders 1975), preconditioned by a Hermitian positive definite `M`.

    For Hermitian `A`, indefinite and consistent singular ones included (where it finds the solution of minimum norm).
    One product with `A` and one with `M` a step. Storage: 6 vectors (`x`, three Lanczos vectors, two directions), and
    three more with a preconditioner (`M u`, and the residual with its update, for the true norm).
    """

    name: ClassVar[str] = "minres"
    hermitian: ClassVar[bool] = True

    def init(self, problem: Correction) -> MINRESState:
        space, u = problem.space, problem.rhs
        norm, status = initial_status(problem)
        z = problem.precondition(u)
        beta2 = space.real_dot(u, z)
        beta = space.sqrt(beta2)
        zero = beta * 0
        state = MINRESState(
            problem,
            norm,
            status,
            x=zeros(u),
            u=u,
            u_old=zeros(u),
            z=z if problem.preconditioner is None else space.copy(z),
            w=zeros(u),
            w_old=zeros(u),
            r=None if problem.preconditioner is None else u.clone(),
            beta=beta,
            beta_old=zero,
            c=zero - 1,
            s=zero,
            delta_bar=zero,
            epsilon=zero,
            gamma=zero,
            gamma_old=zero,
            phi=beta,
            norm_A=zero,
            noise=zero + NOISE * problem.epsilon,
        )
        state.stop(Status.NONFINITE, space.nonfinite(beta2))
        state.stop(Status.INDEFINITE, beta2 <= 0)  # M has the wrong sign
        return state

    def step(self, s: MINRESState) -> MINRESState:
        problem, space = s.problem, s.problem.space
        # Lanczos: p = A v - (alpha / beta) u - (beta / beta_old) u_old, written over u_old
        v = space.scale(s.ratio(1.0, s.beta), s.z)
        Av = problem.apply(v)
        p = space.xpay(Av, -s.ratio(s.beta, s.beta_old), s.u_old)
        alpha = space.real_dot(v, p)
        p = space.axpy(-s.ratio(alpha, s.beta), s.u, p)
        s.u_old, s.u = s.u, p
        z = problem.precondition(p)
        s.z = z if problem.preconditioner is None else space.copy(z, out=s.z)
        beta2 = space.real_dot(p, s.z)
        s.stop(Status.NONFINITE, space.nonfinite(beta2))
        s.stop(Status.INDEFINITE, beta2 < 0)  # for a definite M even rounding leaves it at zero or above
        beta = space.sqrt(beta2)
        s.beta_old, s.beta = s.beta, beta

        # QR factorisation of the tridiagonal matrix by one more rotation
        delta = s.c * s.delta_bar + s.s * alpha
        gamma_bar = s.s * s.delta_bar - s.c * alpha
        epsilon, s.epsilon = s.epsilon, s.s * beta
        s.delta_bar = -s.c * beta
        # |A r| of the iterate *before* this step; nothing more can be gained once it vanishes beside |A| |r|
        norm_Ar = s.phi * space.sqrt(gamma_bar * gamma_bar + s.delta_bar * s.delta_bar)
        s.norm_A = space.maximum(s.norm_A, space.sqrt(alpha * alpha + beta * beta))
        s.noise = space.minimum(s.noise + MORE_NOISE * problem.epsilon, 4 * problem.epsilon**0.75)
        s.stop(Status.STAGNATED, norm_Ar <= s.noise * s.norm_A * s.phi)
        gamma = space.sqrt(gamma_bar * gamma_bar + beta * beta)
        s.c, s.s = space.where(gamma > 0, space.ratio(gamma_bar, gamma), 1.0), space.ratio(beta, gamma)
        tau, s.phi = s.c * s.phi, s.s * s.phi

        # gamma w = v - epsilon w_old - delta w, written over w_old and kept without the division by gamma
        w = space.xpay(v, -space.ratio(epsilon, s.gamma_old), s.w_old)
        w = space.axpy(-space.ratio(delta, s.gamma), s.w, w)
        s.w_old, s.w = s.w, w
        s.gamma_old, s.gamma = s.gamma, gamma
        s.x = space.axpy(s.ratio(tau, gamma), w, s.x)

        if s.r is None:
            s.residual_norm = space.where(s.running, s.phi, s.residual_norm)
        else:  # r = s^2 r - (phi c / beta) u
            s.r = space.xpay(space.scale(-s.phi * s.c * space.ratio(1.0, beta), s.u), s.s * s.s, s.r)
            s.residual_norm = space.where(s.running, space.norm(s.r), s.residual_norm)
        return s

    def solution(self, s: MINRESState) -> Tensor:
        return s.x
