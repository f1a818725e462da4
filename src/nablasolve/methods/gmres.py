"""Restarted GMRES for general square operators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import names_options
from ..info import Status
from ..vectors import Basis, Scalar
from .base import CYCLE_END, Correction, Method, State, initial_status, positive_integer, zeros

# A vector of norm `before`, of which one projection has left `below`, keeps a part in the basis: what rounding and the basis'
# own loss of orthogonality put there, times before / below. A second projection removes it ("twice is enough": Daniel, Gragg,
# Kaufman & Stewart 1976; Giraud et al. 2005). It is made where the first has cancelled a digit, or where that part may exceed
# this power of the precision. GMRES needs a basis that is well conditioned, not one that is orthogonal to the last digit
# (Paige, Rozloznik & Strakos 2006).
CANCELLED, ORTHOGONAL = 0.1, 0.4


@dataclass(eq=False)
class GMRESState(State):
    """The Arnoldi basis, the triangular factor `R` by columns, the rotations and the rotated right-hand side `g`.

    `loss` estimates how large a part of a basis vector lies in the span of those before it.
    """

    basis: Basis
    R: list[list[Scalar]]
    rotations: list[tuple[Scalar, Scalar, Scalar]]
    g: list[Scalar]
    norm_A: Scalar
    loss: Scalar


@names_options
@dataclass(frozen=True)
class GMRES(Method[GMRESState]):
    """GMRES(restart) (Saad & Schultz 1986; Saad 2003, Algorithm 9.5), preconditioned on the right.

    For any square `A`. One product with `A` and one with `M` a step, one more of each at a restart; the residual norm is
    the true one, whatever `M`. Classical Gram-Schmidt, with a second pass where the first one cancels or has left too much.
    Storage: `restart + 4` vectors beside `b`, those that `A` and `M` return included: the basis, the residual and two more.

    Args:
        restart: the number of steps after which the method restarts from the true residual; at least 1.
    """

    restart: int = 20
    name: ClassVar[str] = "gmres"
    steady: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive_integer("restart", self.restart)

    def init(self, problem: Correction) -> GMRESState:
        norm, status = initial_status(problem)
        width = math.prod(problem.rhs.shape[problem.space.batch_dims :])
        capacity = max(1, min(self.restart, width, problem.steps)) + 1
        basis = Basis(problem.space, problem.rhs, capacity, problem.space.ratio(1.0, norm))
        return GMRESState(problem, norm, status, basis, R=[], rotations=[], g=[norm], norm_A=norm * 0, loss=norm * 0)

    def step(self, s: GMRESState) -> GMRESState:
        problem, space, basis = s.problem, s.problem.space, s.basis
        if len(s.R) == basis.capacity - 1:
            return s  # every system has stopped, where nobody has looked yet
        # Arnoldi: w = A M v_j, made orthogonal to the basis
        w = space.copy(problem.apply(problem.precondition(basis[basis.count - 1])))
        h = basis.project(w)
        w = basis.subtract(w, h)
        below = space.norm(w)
        before = space.sqrt(below * below + space.norm(h) ** 2)
        loss = (s.loss + problem.epsilon) * space.ratio(before, below)
        if space.batch_dims or space.may((below < CANCELLED * before) | (loss > problem.epsilon**ORTHOGONAL)):
            again = basis.project(w)
            w, h = basis.subtract(w, again), h + again
            below = space.norm(w)
        else:
            s.loss = space.maximum(s.loss, loss)
        s.norm_A = space.maximum(s.norm_A, before)
        # what rounding leaves of a vector that lay in the basis is nothing: a happy breakdown
        below = space.where(below <= problem.rounding * before, below * 0, below)

        # the new column of the Hessenberg matrix, zero for the systems that have stopped, rotated into R
        column = [space.where(s.running, a, a * 0) for a in space.unstack(h)]
        below = space.where(s.running, below, below * 0)
        upper = column[0]
        for i, (c, sine, conjugate) in enumerate(s.rotations):
            lower = column[i + 1]
            column[i], upper = c * upper + sine * lower, c * lower - conjugate * upper
        column[-1] = upper
        c, sine, diagonal = space.rotation(column[-1], below)
        singular = space.sqrt(space.abs2(diagonal)) <= problem.rounding * s.norm_A
        column[-1] = space.where(singular, diagonal * 0, diagonal)
        s.R.append(column)
        s.rotations.append((c, sine, space.conj(sine)))
        s.g[-1:] = [c * s.g[-1], -space.conj(sine) * s.g[-1]]
        s.residual_norm = space.where(s.running, space.sqrt(space.abs2(s.g[-1])), s.residual_norm)
        s.stop(Status.BREAKDOWN, singular)  # the Krylov space is invariant and the system on it singular

        if len(s.R) == self.restart or len(s.R) == basis.width:
            s.stop(CYCLE_END, s.residual_norm > problem.target)
        else:
            basis.append(w, space.ratio(1.0, below))
        return s

    def solution(self, s: GMRESState) -> Tensor:
        problem, space = s.problem, s.problem.space
        y: list[Scalar] = [0.0] * len(s.R)
        for i in reversed(range(len(s.R))):  # back substitution
            rest = sum(s.R[j][i] * y[j] for j in range(i + 1, len(s.R)))
            y[i] = space.ratio(s.g[i] - rest, s.R[i][i])
        if not y:
            return zeros(problem.rhs)
        x = s.basis.combine(space.stack(y, problem.rhs))
        return x if problem.preconditioner is None else space.copy(problem.precondition(x))
