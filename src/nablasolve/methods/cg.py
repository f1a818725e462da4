"""Conjugate gradients for Hermitian positive definite operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import names_options
from ..info import Status
from ..vectors import Scalar
from .base import Correction, Method, State, initial_status, zeros


@dataclass(eq=False)
class CGState(State):
    """The iterate `x`, the residual `r`, the direction `p`, `rho = r^H M r` and the M^{-1}-norm `pi` of `p`."""

    x: Tensor
    r: Tensor
    p: Tensor
    rho: Scalar
    pi: Scalar
    largest: Scalar


@names_options
@dataclass(frozen=True)
class CG(Method[CGState]):
    """The preconditioned conjugate gradient method (Hestenes & Stiefel 1952; Saad 2003, Algorithm 9.1).

    For Hermitian positive definite `A` and `M`. One product with `A` and one with `M` a step. Storage: 3 vectors
    (`x`, `r`, `p`) beside `b`, the solution, and what `A` and `M` return.
    """

    name: ClassVar[str] = "cg"
    hermitian: ClassVar[bool] = True
    positive_definite: ClassVar[bool] = True

    def init(self, problem: Correction) -> CGState:
        space, r = problem.space, problem.rhs
        norm, status = initial_status(problem)
        z = problem.precondition(r)
        rho = space.real_dot(r, z)
        state = CGState(problem, norm, status, x=zeros(r), r=r, p=z.clone(), rho=rho, pi=rho, largest=rho * 0)
        state.stop(Status.NONFINITE, space.nonfinite(rho))
        state.stop(Status.INDEFINITE, rho <= 0)  # M has the wrong sign
        return state

    def step(self, s: CGState) -> CGState:
        problem, space = s.problem, s.problem.space
        q = problem.apply(s.p)
        curvature = space.real_dot(s.p, q)
        # `curvature / pi` is a Rayleigh quotient of M A: one that is zero beside the largest seen so far belongs to
        # a singular or an indefinite operator, and a negative one to an indefinite operator.
        rayleigh = space.ratio(curvature, s.pi)
        s.largest = space.maximum(s.largest, rayleigh)
        s.stop(Status.BREAKDOWN, abs(rayleigh) <= problem.rounding * s.largest)
        s.stop(Status.INDEFINITE, rayleigh < 0)

        if not space.may(s.running):
            return s  # p is the direction that stopped the last system

        alpha = s.ratio(s.rho, curvature)
        s.x = space.axpy(alpha, s.p, s.x)
        s.r = space.axpy(-alpha, q, s.r)
        z = problem.precondition(s.r)
        rho = space.real_dot(s.r, z)
        beta = s.ratio(rho, s.rho)
        s.p = space.xpay(z, beta, s.p)
        if problem.preconditioner is None:
            s.residual_norm = space.sqrt(rho)
        else:
            s.residual_norm = space.norm(s.r)
            s.stop(Status.NONFINITE, space.nonfinite(rho))
            s.stop(Status.INDEFINITE, (rho <= 0) & (s.residual_norm > s.problem.target))
        s.rho, s.pi = rho, rho + beta * beta * s.pi
        return s

    def solution(self, s: CGState) -> Tensor:
        return s.x

    def direction(self, s: CGState) -> Tensor:
        return s.p
