"""MINRES-QLP for Hermitian operators of any rank, and for right-hand sides outside their range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..arguments import names_options
from ..info import Status
from ..vectors import Scalar, Space, select
from .base import CLAIMED, CYCLE_END, RUNNING, Correction, LeastSquaresState, Method, initial_status, zeros

# A step that takes less than this part of the residual away, and yet meets a tiny entry of `L`, has met a null vector of A.
NULL_GAIN = 0.1
# A right-hand side `r` with `|A r|` below this power of the roundoff beside `|A| |r|` is nearly a null vector of A. (What is
# left of an inconsistent system by a first cycle is near the power 1/2.)
NULL_SIDE = 1 / 3
# A cycle ends where `|A r|` is this many times the square root of the roundoff beside `|A| |r|`, below which rounding moves it.
HALF_OF_THE_DIGITS = 4.0


@dataclass(frozen=True, eq=False)
class Row:
    """A row of `L mu = t`: the equation `eta mu_{j-2} + theta mu_{j-1} + gamma mu_j = tau`."""

    eta: Scalar
    theta: Scalar
    gamma: Scalar
    tau: Scalar


@dataclass(frozen=True, eq=False)
class Column:
    """What the column `k` of the tridiagonal matrix makes of the two factorisations.

    Attributes:
        rows: the rows `k - 2`, `k - 1` and `k` of `L`.
        right: the reflections of the columns `k - 2` and `k`, and `k - 1` and `k`.
        left: that of the rows `k` and `k + 1`.
        phi: the residual norm with it.
    """

    rows: tuple[Row, Row, Row]
    right: tuple[tuple[Scalar, Scalar], tuple[Scalar, Scalar]]
    left: tuple[Scalar, Scalar]
    phi: Scalar


@dataclass(eq=False)
class MINRESQLPState(LeastSquaresState):
    """Lanczos' process, which is one product ahead of the iterate, and what is not yet final of the iterate.

    Attributes:
        x: the final part of the iterate, `sum_{j < k-1} mu_j w_j`.
        w_old, w: the directions `w_{k-1}` and `w_k`.
        mu: `mu_{k-4}` to `mu_k`.
        column: the next one.
        v, p: the Lanczos vector `v_{k+1}`, and `p = beta v_{k+2}`.
        beta: the newest entry beside the diagonal of the tridiagonal matrix.
        epsilon, delta_bar: what is known of the column after the next one before its product.
        shortened: whether the iterate has been given its part in the column that ended its system.
        size: the longest column of the tridiagonal matrix, an estimate of `|A|` in the 2-norm from below.
        gamma_min: the smallest entry of the diagonal of `L`.
        image: `A r` of the right-hand side `r`, until the first step is over.
    """

    x: Tensor
    w_old: Tensor
    w: Tensor
    mu: list[Scalar]
    column: Column
    v: Tensor
    p: Tensor
    beta: Scalar
    epsilon: Scalar
    delta_bar: Scalar
    shortened: Scalar
    size: Scalar
    gamma_min: Scalar
    image: Tensor | None = None


@dataclass(eq=False)
class RangeRestrictedState(LeastSquaresState):
    """MR-II (Hanke 1995; Fischer, Hanke & Hochbruck 1996): `min |r - A d|` over the span of `A r, A^2 r, ...`.

    The directions `w_k` span that space, and their images `u_k = A w_k` are orthonormal: Lanczos' process started with `A^2 r`,

        beta_+ u_+ = A u - alpha u - beta u_-,        beta_+ w_+ = u - alpha w - beta w_-.

    A step is `d += a w` with `a = u^H r`. That is `w^H s` for `s = A r`, in which, other than in `r`, the part of `r` that no
    `d` takes away does not drown the rest.

    Attributes:
        x: the iterate.
        s: `A (r - A x)`.
        u, u_old: the images.
        w, w_old: the directions.
        beta: the newest entry beside the diagonal of the tridiagonal matrix.
        square: that of the Frobenius norm of the tridiagonal matrix.
    """

    x: Tensor
    s: Tensor
    u: Tensor
    u_old: Tensor
    w: Tensor
    w_old: Tensor
    beta: Scalar
    square: Scalar

    def advance(self) -> None:
        """One step."""
        problem, space = self.problem, self.problem.space
        a = space.where(self.running, space.real_dot(self.w, self.s), self.beta * 0)
        self.x = space.axpy(a, self.w, self.x)
        Au = problem.apply(self.u)
        self.s = space.axpy(-a, Au, self.s)
        p = space.xpay(Au, -self.beta, self.u_old)
        alpha = space.real_dot(self.u, p)
        p = space.axpy(-alpha, self.u, p)
        w = space.axpy(-alpha, self.w, space.xpay(self.u, -self.beta, self.w_old))
        beta_old, self.beta = self.beta, space.norm(p)
        self.stop(Status.NONFINITE, space.nonfinite(self.beta))

        self.square = self.square + beta_old * beta_old + alpha * alpha + self.beta * self.beta
        self.norm_A = space.where(self.running, space.maximum(self.norm_A, space.sqrt(self.square)), self.norm_A)
        residual = space.sqrt(self.residual_norm * self.residual_norm - a * a)
        self.residual_norm = space.where(self.running, residual, self.residual_norm)
        self.normal_norm = space.where(self.running, space.norm(self.s), self.normal_norm)
        # what is left of s is its rounding, or the space is exhausted
        small = self.normal_norm <= problem.rounding * self.norm_A * self.residual_norm
        self.stop(CLAIMED, small | (self.beta <= problem.rounding * self.norm_A))
        inverse = self.ratio(1.0, self.beta)
        self.u_old, self.u = self.u, space.rescale(inverse, p)
        self.w_old, self.w = self.w, space.rescale(inverse, w)


@dataclass(eq=False)
class MixedState(LeastSquaresState):
    """A batch of which only some systems, the `null` ones, have a right-hand side that is nearly a null vector."""

    null: Scalar
    others: MINRESQLPState
    restricted: RangeRestrictedState


@names_options
@dataclass(frozen=True)
class MINRESQLP(Method[LeastSquaresState]):
    """MINRES-QLP (Choi, Paige & Saunders 2011; Choi & Saunders 2014, Algorithm 937).

    For Hermitian `A`, indefinite and singular ones included: `A^+ b`, also where `b` is outside the range. Where MINRES makes
    its subproblem `min |T y - beta e_1|` triangular by reflections from the left, `R y = t`, here reflections from the right
    make it `L mu = t` with `y = P mu`, which has a solution of minimum norm when the last entry of `L` vanishes.

    Of an inconsistent system that finds half of the digits. `T` becomes as singular as `|A r| / |r|` becomes small, and with a
    residual rounding moves the solution of a least-squares problem by the square of the condition number (Wedin 1973). The `T`
    of a restart would be no better, so from a residual that is nearly a null vector MR-II goes on, in the range of `A`
    (`RangeRestrictedState`).

    One product with `A` a step, and one more at the start; another where MR-II takes over, and two a step in a batch of both
    kinds. Storage: 6 vectors (`x`, two of Lanczos, three directions; in MR-II `x`, `A r`, two images, two directions), and for
    the first step `A r`.
    """

    name: ClassVar[str] = "minres_qlp"
    hermitian: ClassVar[bool] = True
    least_squares: ClassVar[bool] = True

    def init(self, problem: Correction) -> LeastSquaresState:
        if problem.preconditioner is not None or problem.left_preconditioner is not None:
            raise ValueError("M: 'minres_qlp' takes no preconditioner; choose 'lsmr', or leave M out")
        space = problem.space
        norm, status = initial_status(problem)
        zero = norm * 0
        row = Row(zero, zero, zero, zero)
        state = MINRESQLPState(
            problem,
            norm,
            status,
            normal_norm=zero,
            norm_A=zero,
            cond_A=zero,
            x=zeros(problem.rhs),
            w_old=zeros(problem.rhs),
            w=zeros(problem.rhs),
            mu=[zero] * 5,
            column=Column((row, row, row), ((zero, zero), (zero, zero)), (zero - 1, zero), norm),
            v=zeros(problem.rhs),
            p=problem.rhs,
            beta=zero,
            epsilon=zero,
            delta_bar=zero,
            shortened=norm < 0,
            size=zero,
            gamma_min=zero + float("inf"),
        )
        self._look_ahead(state, norm)
        state.image = space.axpy(state.column.left[0] * state.size, state.v, space.copy(state.p))  # alpha v + beta v_+
        return state

    def _restricted(self, s: MINRESQLPState, started: Scalar, image: Tensor) -> LeastSquaresState:
        """After the first step, which has shown the size of `A`: MR-II for the systems that began with nearly a null vector."""
        problem, space = s.problem, s.problem.space
        norm, zero = space.norm(image), s.beta * 0
        null = started & (s.status != Status.NONFINITE) & (norm <= problem.epsilon**NULL_SIDE * s.size)
        if not space.any(null):
            return s
        w = space.scale(space.where(null, space.ratio(1.0, norm), zero), image)
        u = space.copy(problem.apply(w))
        size = space.norm(u)
        inverse = space.ratio(1.0, size)
        restricted = RangeRestrictedState(
            problem,
            space.where(null, zero + 1, s.residual_norm),
            space.where(null, RUNNING, s.status),
            normal_norm=norm,
            norm_A=size,
            cond_A=zero,
            x=zeros(w),
            s=image,
            u=space.rescale(inverse, u),
            u_old=zeros(w),
            w=space.rescale(inverse, w),
            w_old=zeros(w),
            beta=zero,
            square=zero,
        )
        if not space.any(space.where(null, False, started)):
            return restricted
        mixed = MixedState(problem, s.residual_norm, restricted.status, s.normal_norm, s.norm_A, s.cond_A, null, s, restricted)
        return self._merged(mixed)

    def _look_ahead(self, s: MINRESQLPState, norm_p: Scalar) -> None:
        """One step of Lanczos' process, `beta_+ v_+ = A v - alpha v - beta v_-`, and the column that it makes."""
        problem, space = s.problem, s.problem.space
        v = space.rescale(s.ratio(1.0, norm_p), s.p)
        p = space.xpay(problem.apply(v), -s.beta, s.v)
        alpha = space.real_dot(v, p)
        s.v, s.p = v, space.axpy(-alpha, v, p)
        beta_old, beta = s.beta, space.norm(s.p)
        s.stop(Status.NONFINITE, space.nonfinite(beta))
        s.size = space.maximum(s.size, space.sqrt(beta_old * beta_old + alpha * alpha + beta * beta))
        s.beta = space.where(beta > problem.rounding * s.size, beta, beta * 0)  # no vector of noise is blown up
        norm_A = space.sqrt(s.norm_A * s.norm_A + beta_old * beta_old + alpha * alpha + s.beta * s.beta)
        s.norm_A = space.where(s.running, norm_A, s.norm_A)

        # the left reflections: the one before acts on the new column, and a new one makes it a column of R
        (c, sine), phi = s.column.left, s.residual_norm
        epsilon, delta, gamma_bar = s.epsilon, c * s.delta_bar + sine * alpha, sine * s.delta_bar - c * alpha
        s.epsilon, s.delta_bar = sine * s.beta, -c * s.beta
        c, sine, gamma = space.givens(gamma_bar, s.beta)
        unreached = gamma  # by which the residual differs for one in this direction

        # the right ones, against epsilon and delta, make it a row of L
        _, oldest, old = s.column.rows
        c2, s2, gamma_oldest = space.givens(oldest.gamma, epsilon)
        theta_old, delta = c2 * old.theta + s2 * delta, s2 * old.theta - c2 * delta
        eta, gamma = s2 * gamma, -c2 * gamma
        c1, s1, gamma_old = space.givens(old.gamma, delta)
        theta, gamma = s1 * gamma, -c1 * gamma
        rows = (
            replace(oldest, gamma=gamma_oldest),
            replace(old, theta=theta_old, gamma=gamma_old),
            Row(eta, theta, gamma, c * phi),
        )
        s.column = Column(rows, ((c2, s2), (c1, s1)), (c, sine), sine * phi)

        # |A r| of the iterate, and what is added to it where the column is taken for zero and the solution shortened by it
        mu = _solved(space, s.mu, rows[:2])
        y = s2 * mu[-2] - c2 * s1 * mu[-1]
        normal = phi * space.sqrt(gamma_bar * gamma_bar + s.delta_bar * s.delta_bar) + s.size * abs(unreached * y)
        s.normal_norm = space.where(s.running, normal, s.normal_norm)
        # to go on would blow up the rounding of a null vector of A
        tiny, small = 10 * problem.rounding, problem.epsilon ** (2 / 3)
        s.stop(CLAIMED, (abs(gamma) <= tiny * s.size) | ((abs(gamma) <= small * s.size) & (abs(c) <= NULL_GAIN)))
        s.stop(CLAIMED, normal <= HALF_OF_THE_DIGITS * problem.epsilon**0.5 * s.size * phi)

    def step(self, s: LeastSquaresState) -> LeastSquaresState:
        space = s.problem.space
        if isinstance(s, RangeRestrictedState):
            s.advance()
            return s
        if isinstance(s, MixedState):
            return self._step_of_both(s)
        assert isinstance(s, MINRESQLPState)
        started, image = s.running, s.image
        s.image = None
        self._extend(s, s.running)
        s.residual_norm = space.where(s.running, s.column.phi, s.residual_norm)
        for row in s.column.rows:
            size = abs(row.gamma)
            s.gamma_min = space.where(s.running & (size > 0), -space.maximum(-s.gamma_min, -size), s.gamma_min)
        s.cond_A = space.where(s.running, space.ratio(s.size, s.gamma_min), s.cond_A)
        s.stop(CLAIMED, s.residual_norm <= s.problem.target)
        # the loop asks whether any system of a batch runs; to ask here too, a synchronisation a step, saves one product a cycle
        if s.running is not False:
            self._look_ahead(s, s.beta)
        return s if image is None else self._restricted(s, started, image)

    def _step_of_both(self, s: MixedState) -> MixedState:
        """A step of either method for its systems; the others have stopped in it."""
        space = s.problem.space
        s.others.status = space.where(s.null, CYCLE_END, s.status)
        s.restricted.status = space.where(s.null, s.status, CYCLE_END)
        self.step(s.others)
        self.step(s.restricted)
        return self._merged(s)

    def _merged(self, s: MixedState) -> MixedState:
        """The state with the norms of either part."""
        space = s.problem.space
        for name in ("status", "residual_norm", "normal_norm", "norm_A", "cond_A"):
            setattr(s, name, space.where(s.null, getattr(s.restricted, name), getattr(s.others, name)))
        return s

    def _extend(self, s: MINRESQLPState, running: Scalar) -> None:
        """Give the iterate of the running systems its part in the next column.

        Where the residual can fall no more, the column counts as one of zeros, in which the shortest solution has a part
        nevertheless. A system that is through with that is shifted without a reflection, and so stays.
        """
        space = s.problem.space
        ended = (s.status == CLAIMED) & (s.residual_norm > s.problem.target)
        short, s.shortened = ended & (ended != s.shortened), ended
        moves = running | short
        last = s.column.rows[2]
        eta, theta, gamma, tau = (space.where(short, a * 0, a) for a in (last.eta, last.theta, last.gamma, last.tau))
        rows = (*s.column.rows[:2], Row(eta, theta, gamma, tau))

        (c2, s2), (c1, s1) = ((space.where(moves, c, 1.0), space.where(moves, sine, 0.0)) for c, sine in s.column.right)
        w_oldest, w = _reflected(space, c2, s2, s.w_old, s.v)
        s.w_old, s.w = _reflected(space, c1, s1, s.w, w)
        stays = (*s.mu[1:], s.mu[4] * 0)
        s.mu = [space.where(moves, new, old) for new, old in zip(_solved(space, s.mu, rows), stays, strict=True)]
        s.x = space.axpy(s.mu[2], w_oldest, s.x)

    def solution(self, s: LeastSquaresState) -> Tensor:
        space = s.problem.space
        if isinstance(s, RangeRestrictedState):
            return s.x
        if isinstance(s, MixedState):
            s.others.status = space.where(s.null, CYCLE_END, s.status)
            return select(s.null, s.restricted.x, self.solution(s.others))
        assert isinstance(s, MINRESQLPState)
        s = replace(s, x=s.x.clone(), w_old=s.w_old.clone(), w=s.w.clone())
        self._extend(s, False)
        return space.axpy(s.mu[4], s.w, space.axpy(s.mu[3], s.w_old, s.x))


def _solved(space: Space, mu: list[Scalar], rows: Sequence[Row]) -> list[Scalar]:
    """The last entries of `mu` for the newest rows of `L`; a vanishing diagonal gives the entry 0, and so the least norm."""
    mu = mu[1:3]
    for row in rows:
        mu.append(space.ratio(row.tau - row.eta * mu[-2] - row.theta * mu[-1], row.gamma))
    return mu


def _reflected(space: Space, c: Scalar, s: Scalar, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`c a + s b`, written over `a`, and `s a - c b`."""
    second = space.axpy(-c, b, space.scale(s, a))
    return space.axpy(s, b, space.rescale(c, a)), second
