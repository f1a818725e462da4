"""The bidiagonalisation of Golub and Kahan, which the least-squares methods are built on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..info import Status
from ..vectors import Scalar
from .base import Correction, State, initial_status


@dataclass(eq=False)
class GolubKahan:
    """`beta u = r`, `alpha v = A^H u`, and then in each step `beta u = A v - alpha u`, `alpha v = A^H u - beta v`.

    A preconditioner `M` of the domain makes it the process for `A` in the inner product of `M^{-1}`: the recurrence runs on
    vectors `s` with `v = M s` and `s^H v = 1`; one on the left likewise, with `u = M p` (Arioli & Orban 2013). Without them
    `s` is `v` and `p` is `u`. Where the dual is wanted, `alpha z = u - beta z` gives the `z` with `v = A^H z`.

    Source: Golub & Kahan 1965; Paige & Saunders 1982, §3.
    """

    problem: Correction
    p: Tensor
    u: Tensor
    s: Tensor
    v: Tensor
    alpha: Scalar
    beta: Scalar
    norm_A2: Scalar
    z: Tensor | None

    @classmethod
    def start(cls, problem: Correction, dual: bool) -> tuple[GolubKahan, Scalar, Scalar]:
        """The process after its first two lines, and the norm and the status of the right-hand side."""
        assert problem.adjoint is not None
        space, p = problem.space, problem.rhs
        norm, status = initial_status(problem)
        state = State(problem, norm, status)
        p, u, beta = _normalised(state, p, problem.left_preconditioner, norm * 0)
        s, v, alpha = _normalised(state, space.copy(problem.adjoint(u)), problem.preconditioner, norm * 0)
        z = space.scale(state.ratio(1.0, alpha), u) if dual else None
        return cls(problem, p, u, s, v, alpha, beta, alpha * alpha, z), norm, state.status

    def advance(self, state: State) -> None:
        """One step; `norm_A2` has grown by the new `beta^2`, and by the old `alpha^2`."""
        problem, space = self.problem, self.problem.space
        assert problem.adjoint is not None
        smallest = problem.rounding * space.sqrt(self.norm_A2)
        self.p = space.xpay(problem.apply(self.v), -self.alpha, self.p)
        self.p, self.u, self.beta = _normalised(state, self.p, problem.left_preconditioner, smallest)
        self.s = space.xpay(problem.adjoint(self.u), -self.beta, self.s)
        self.s, self.v, self.alpha = _normalised(state, self.s, problem.preconditioner, smallest)
        self.norm_A2 = self.norm_A2 + self.beta * self.beta
        if self.z is not None:
            self.z = space.rescale(state.ratio(1.0, self.alpha), space.xpay(self.u, -self.beta, self.z))


def _normalised(
    state: State, raw: Tensor, M: Callable[[Tensor], Tensor] | None, smallest: Scalar
) -> tuple[Tensor, Tensor, Scalar]:
    """`s / a`, `M s / a` and `a = sqrt(s^H M s)`; zero where `a` is rounding, so that no vector of noise is blown up."""
    space = state.problem.space
    if M is None:
        size = space.norm(raw)
        state.stop(Status.NONFINITE, space.nonfinite(size))
        size = space.where(size > smallest, size, size * 0)
        raw = space.rescale(state.ratio(1.0, size), raw)
        return raw, raw, size
    image = space.copy(M(raw))
    square = space.real_dot(raw, image)
    state.stop(Status.NONFINITE, space.nonfinite(square))
    state.stop(Status.INDEFINITE, square < 0)  # M has the wrong sign
    size = space.sqrt(square)
    size = space.where(size > smallest, size, size * 0)
    inverse = state.ratio(1.0, size)
    return space.rescale(inverse, raw), space.rescale(inverse, image), size
