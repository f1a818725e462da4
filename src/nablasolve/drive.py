"""The only loop: scaling, stopping, freezing, callbacks, progress, restarts and unrolling, for every method."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import certify
from .adjoint import Transpose, pull_back
from .arguments import check_result
from .closure import is_wrapped
from .info import Column, SolveInfo, Status, read_report
from .methods.base import CLAIMED, RUNNING, Correction, LeastSquaresState
from .problem import Problem
from .vectors import HostSpace, Scalar, Space, TensorSpace, accumulator_dtype, any_true, precise_norm, real_dtype

logger = logging.getLogger("nablasolve")

# How far the residual under the true adjoint may exceed the tolerance before a claimed adjoint is called false.
CLAIM_SLACK = 10.0
# After so many steps, and then each time after so many times more, a method that trusts A to be Hermitian and has gained little
# since is worth two products that test it.
FIRST_MILESTONE, MILESTONES = 128, 4
# The relative residual from which on a failed direct solution is a good start for another method.
NEAR = 1e-3
# By what factor a restarted method is to reduce the true residual at least.
RESTART_GAIN = 0.1


@dataclass(frozen=True)
class IterationState:
    """What a callback sees, once an iteration. Return a true value to stop.

    Attributes:
        iteration: the number of the iteration, from 1.
        residual_norm: the method's own residual norm, in the units of `b`; a tensor of the batch shape for a batch.
        phase: `"forward"` or `"adjoint"`.
    """

    iteration: int
    residual_norm: Any
    phase: str


@dataclass
class Outcome:
    """A finished solve: the solution, its record, and what it leaves for the next one."""

    x: Tensor
    report: Tensor
    history: Tensor
    kept: tuple[Tensor, ...]
    dual: Tensor | None = None


class _Operator:
    """An application of `A` (or `A^H`) that counts itself and checks what the user's function returns."""

    def __init__(self, name: str, apply: Callable[[Tensor], Tensor], like: Tensor | None = None) -> None:
        self.name, self._apply, self.like, self.count = name, apply, like, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        y, due = self._apply(v), v if self.like is None else self.like
        if type(y) is not type(due) or y.shape != due.shape or y.dtype != due.dtype or y.device != due.device:
            check_result(self.name, v, y, due)
        return y


def solve_concretely(
    problem: Problem, b: Tensor, x0: Tensor | None, given: Sequence[Tensor], kept: tuple[Tensor, ...]
) -> Outcome:
    """Solve one problem with its tensors, without gradients, keep its record and apply the failure policy.

    Raises:
        ConvergenceError: under `on_failure="raise"`.
    """
    if problem.known:
        assert x0 is not None
        return _known(x0, problem.batch_dims)
    with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(False):
        outcome, method = run(problem, b, x0, given, kept, dual=problem.dual), problem.options.method
        fallback = problem.options.fallback
        if fallback is not None and any_true(certify.may_be_solved_otherwise(outcome.report[..., Column.STATUS])):
            first, method = outcome, fallback
            near = (
                first.report[..., Column.RELATIVE] <= NEAR
            )  # else what a direct solve has left is rounding, and may have exploded
            outcome = run(problem.solved_by(fallback), b, _where(near, first.x), given)
            for column in (Column.ITERATIONS, Column.MATVECS, Column.RMATVECS):
                outcome.report[..., column] += first.report[..., column]
            outcome.history = torch.cat([first.history, outcome.history[..., 1:]], dim=-1)
        past = outcome.history.movedim(-1, 0) if problem.history else None
        info = read_report(
            outcome.report, past, method.name, problem.adjoint_records, mapped=False, least_squares=problem.least_squares
        )
    problem.records.append(info)
    logger.debug("%s solve: %r", problem.phase, info)
    if problem.options.on_failure != "ignore" and not _all_converged(info):
        x = problem.solution_layout.unpack(outcome.x) if problem.batch_dims == problem.layout.batch_dims else outcome.x
        certify.enforce(problem.options.on_failure, problem.phase, x, info)
    return outcome


def _known(x: Tensor, batch_dims: int) -> Outcome:
    """The outcome of a solve that was done before; its residual is not known any more, which is what infinity says."""
    report = torch.full((*x.shape[:batch_dims], Column.COUNT), torch.inf, dtype=torch.float64, device=x.device)
    return Outcome(x.clone(), report, report[..., :0], ())


def _all_converged(info: SolveInfo) -> bool:
    return bool(info.converged.all()) if isinstance(info.converged, Tensor) else bool(info.converged)


def run(
    problem: Problem,
    b: Tensor,
    x0: Tensor | None,
    given: Sequence[Tensor],
    kept: tuple[Tensor, ...] = (),
    unroll: bool = False,
    dual: bool = False,
) -> Outcome:
    """Run the problem's method to its end: the loop that every solve goes through.

    Each cycle solves the correction equation `A d = r / |r|` for the true residual `r = b - A x`, adds `|r| d` to `x`,
    recomputes the residual, and lets `certify` decide. A least-squares method does so in the least-squares sense, and what
    is decided on is `|A^H r|` as well. `dual` asks it for the `q` with `x = A^H q`.
    """
    options, method, batch_dims = problem.options, problem.options.method, problem.batch_dims
    space: Space
    if batch_dims == 0 and b.device.type == "cpu" and not unroll and not is_wrapped(b):
        space = HostSpace(b)
    else:
        space = TensorSpace(batch_dims, in_place=not unroll)
    parts = problem.split(given)
    A, M = _operators(problem, b, parts)
    least = method.least_squares
    A_adjoint = _adjoint_of(problem, b, parts, unroll) if least else None
    inverse = _inverse(problem, parts)
    matrix = problem.operator.matrix(parts["operator"])
    if matrix is not None and problem.transposed:
        matrix = matrix.mH
    # of a singular system, the projections onto the complements of its nullspaces
    off_left, off_right = _complements(problem, parts)

    norm_b = precise_norm(b.detach(), batch_dims)
    threshold = torch.clamp(options.rtol * norm_b, min=0.0 if problem.derived else options.atol)
    valid = torch.isfinite(norm_b)
    if space.any(~valid):
        b = _where(valid, b)
    within = off_left(b)
    outside = precise_norm((b - within).detach(), batch_dims) > threshold if within is not b else ~valid
    b = within
    x = None
    if x0 is not None:
        finite = torch.isfinite(precise_norm(x0.detach(), batch_dims))
        x = off_right(_where(finite & (norm_b > 0), x0))  # a copy; and zero solves a zero b exactly
        valid = valid & (finite | (norm_b == 0))
    r = b if x is None else b - A(x)
    norm_r = precise_norm(r.detach(), batch_dims)
    status = certify.opening(valid, norm_r, threshold)
    iterations: Scalar = space.full(0, b)
    watch = _Watch(problem, norm_r)
    rescaled = _Rescaled(A, A_adjoint, space) if M is None and matrix is None and inverse is None else None
    first_cycle, direction, ended = True, None, status
    hermitian = problem.hermitian or method.hermitian
    norm_s = norm_A = cond_A = torch.zeros_like(norm_r)
    q = None

    while True:
        spent = torch.as_tensor(iterations >= options.maxiter, device=b.device)
        status = torch.where((status == RUNNING) & spent, int(Status.MAXITER), status)
        running = status == RUNNING
        if not space.any(running):
            break
        scale = torch.where(running, norm_r, 1.0)
        # after a claim that did not hold, aim below the threshold: else the restart ends at its first step and gains nothing
        aim = torch.where(ended == CLAIMED, RESTART_GAIN, 1.0)
        target = torch.where(ended == CLAIMED, torch.minimum(threshold, RESTART_GAIN * norm_r), threshold) / scale
        equation = Correction(
            space=space,
            apply=A if rescaled is None else rescaled,
            preconditioner=_projected(M, problem, off_left, off_right) if not (least and problem.transposed) else None,
            rhs=_where(running, _divide(r, scale)),
            target=_as_scalar(target, space, b.dtype),
            steps=options.maxiter,
            matrix=matrix,
            kept=kept,
            adjoint_of_kept=problem.transposed,
            inverse=inverse,
            adjoint=A_adjoint if rescaled is None or A_adjoint is None else rescaled.adjoint,
            left_preconditioner=M if least and problem.transposed else None,
            dual=dual,
        )
        state = method.init(equation)
        steps, milestone, reached = 0, FIRST_MILESTONE, state.residual_norm
        normal = _NormalEquations(problem, state, space, aim) if least else None
        while True:
            if normal is not None:
                normal.look(state)
            active = state.running
            if not space.any(active):
                break
            state = method.step(state)
            iterations, steps = iterations + active, steps + 1
            state.stop(Status.NONFINITE, space.nonfinite(state.residual_norm))
            state.stop(CLAIMED, state.residual_norm <= equation.target)
            if watch.wanted and watch.stops(state.residual_norm, scale, running, norm_r):
                state.stop(Status.STOPPED, state.running)
            if normal is not None:
                normal.look(state)
            state.stop(Status.MAXITER, iterations >= options.maxiter)
            if hermitian and steps == milestone:
                if space.any(state.running & (state.residual_norm > certify.WORTHWHILE_GAIN * reached)):
                    with torch.no_grad():
                        broken = certify.asymmetric(space, A, b)
                    state.stop(Status.NOT_HERMITIAN, broken.item() if isinstance(space, HostSpace) else broken)
                milestone, reached = MILESTONES * milestone, state.residual_norm
        kept, direction = kept or method.keep(state), method.direction(state)
        ended = torch.as_tensor(state.status, device=b.device)
        d, dq = method.solution(state), method.dual(state) if dual else None
        direction = d if direction is None else direction
        if normal is not None:
            normal.close(state, rescaled, scale)
            norm_A, cond_A = torch.maximum(norm_A, normal.norm_A), torch.maximum(cond_A, normal.cond_A)
        del state  # its vectors are not needed beside those of the next cycle
        correction = off_right(_rescale(d if rescaled is None else rescaled.restore(d), scale))
        x_new = correction if x is None else x + correction
        del correction
        r_new = b - A(x_new)
        norm_new = precise_norm(r_new.detach(), batch_dims)
        overflow = running & ((ended == Status.NONFINITE) | ~torch.isfinite(norm_new))
        if space.any(overflow):
            ended = torch.where(overflow, _who_overflowed(A, M, _where(running, _divide(r, scale)), batch_dims), ended)
        normals = (
            None if normal is None or A_adjoint is None else normal.recomputed(A_adjoint, M, r_new, norm_new, norm_b, x_new)
        )
        code = certify.verdict(status, ended, norm_r, norm_new, threshold, equation.epsilon, normals)
        refused = ~running | certify.useless(code, norm_r, norm_new, first_cycle, equation.epsilon, least)
        if space.any(refused):
            x_new = _where(~refused, x_new, x)
            r_new, norm_new = _where(~refused, r_new, r), torch.where(refused, norm_r, norm_new)
        if normals is not None:
            norm_s = torch.where(refused, torch.where(running, normals.before, norm_s), normals.after)
        if dq is not None:
            dq = _where(~refused, _rescale(dq if rescaled is None else rescaled.restore(rescaled.restore(dq)), scale))
            q = dq if q is None else q + dq
        x, r, norm_r, status, first_cycle = x_new, r_new, norm_new, code, False
    watch.close()

    if x is None:
        zero = problem.solution_layout.zero(b, batch_dims)
        x = b * 0 if unroll and zero.shape == b.shape else zero
    diagnosis: _Operator | None = None
    if not least and not first_cycle and space.any(certify.unexplained(status)):
        definite = problem.positive_definite or method.positive_definite
        unknowns = certify.dimension(b, batch_dims)
        if hermitian:
            diagnosis = A
        elif unknowns > certify.SMALL:  # a smaller system is diagnosed without it
            diagnosis = _adjoint_or_none(problem, b, parts)
        exhausted = (status != Status.MAXITER) | torch.as_tensor(iterations >= unknowns, device=b.device)
        with torch.no_grad():
            status = certify.diagnose(
                space, A, diagnosis, b, x, r, direction, status, threshold, exhausted, A.count, hermitian, definite
            )
    if problem.user_adjoint and A_adjoint is not None and space.any(certify.unexplained(status)):
        with torch.no_grad():
            false = certify.mismatched(space, A, A_adjoint, x.detach(), r.detach())
        status = torch.where(certify.unexplained(status) & false, int(Status.NOT_HERMITIAN), status)
    if not problem.derived:
        status = torch.where(outside & valid, int(Status.INCONSISTENT), status)
    if (least or problem.transposed) and (hermitian or problem.user_adjoint):
        status, norm_r = _check_claimed_adjoint(problem, b, x, r, parts["operator"], status, norm_r, threshold, norm_A)
    matvecs, rmatvecs = _counts(problem, A, A_adjoint if least else diagnosis)
    norm_r = torch.where(valid, norm_r, torch.nan)  # what was asked was not solved, however well zero solves zero
    if problem.derived and space.any(~valid):  # the derivative of a loss that is not finite
        x = _where(valid, x, torch.full_like(x, torch.nan))
    residual, size = norm_r, norm_b
    if problem.data is not None:  # of a damped problem, the misfit of the data
        residual = torch.where(valid, precise_norm(r.detach()[..., : problem.data], batch_dims), torch.nan)
        size = precise_norm(b.detach()[..., : problem.data], batch_dims)
    relative = torch.where(size > 0, residual / torch.where(size > 0, size, 1.0), residual)
    dual_error = torch.full_like(norm_r, torch.inf)
    if q is not None:
        q, dual_error = _certified_dual(space, A_adjoint, q, x.detach(), r.detach(), status)
    norm_x = precise_norm(x.detach(), batch_dims) if least else norm_r
    columns = (status, iterations, residual, relative, matvecs, rmatvecs, norm_r, norm_s, norm_A, cond_A, norm_x, dual_error)
    report = torch.stack([torch.as_tensor(c, device=b.device).to(norm_b).expand_as(norm_b) for c in columns], dim=-1)
    return Outcome(x, report, watch.history(), kept, q)


class _NormalEquations:
    """`|A^H r|` in one cycle of a least-squares method: its stopping by what the method estimates, and its recomputation.

    The test is that of Paige & Saunders (1982, §6), `|A^H r| <= rtol |A| |r|`. Where `A` is known to reach every `b` the test
    serves only to stop where it does not, at the level of rounding.
    """

    def __init__(self, problem: Problem, state: LeastSquaresState, space: Space, aim: Tensor) -> None:
        self.problem, self.space, self.eps = problem, space, state.problem.epsilon
        eps = self.eps
        self.sought = problem.least_squares and not problem.onto
        self.rtol = max(problem.options.rtol, eps) if self.sought else certify.NULL_SLACK * eps
        self.meaning = Status.LEAST_SQUARES if self.sought else Status.INCONSISTENT
        self.tolerance = _as_scalar(self.rtol * aim, space, state.problem.rhs.dtype)
        self.limit = 1 / (certify.NULL_SLACK * eps)
        self.first = state.normal_norm

    def look(self, state: LeastSquaresState) -> None:
        """Stop the systems whose estimates meet the test, or whose condition leaves no digit."""
        small = state.normal_norm <= self.tolerance * state.norm_A * state.residual_norm
        state.stop(CLAIMED, small)
        state.stop(Status.ILL_CONDITIONED, state.cond_A >= self.limit)

    def close(self, state: LeastSquaresState, rescaled: _Rescaled | None, scale: Tensor) -> None:
        """Keep the estimates, in the units of `A` and `b`, when the cycle has ended."""
        unit = 1.0 if rescaled is None or rescaled.size is None else rescaled.size
        wide = [torch.as_tensor(a, device=scale.device).detach().to(scale) for a in (self.first, state.norm_A, state.cond_A)]
        self.before, self.norm_A, self.cond_A = wide[0] * unit * scale, wide[1] * unit, wide[2]

    def recomputed(
        self,
        adjoint: Callable[[Tensor], Tensor],
        M: Callable[[Tensor], Tensor] | None,
        r: Tensor,
        norm_r: Tensor,
        norm_b: Tensor,
        x: Tensor,
    ) -> certify.Normal:
        """What has become of `|A^H r|`; with a preconditioner of the domain in the norm that it defines, as in the method.

        A least-squares solution is none the worse for the rounding of `b - A x`, which a small `r` may be little more than.
        """
        with torch.no_grad():
            s = adjoint(r.detach())
            if M is None or self.problem.transposed:
                after = precise_norm(s, self.space.batch_dims)
            else:
                after = torch.as_tensor(self.space.sqrt(self.space.real_dot(s, M(s))), device=r.device).to(norm_r)
        limit = self.rtol * self.norm_A * norm_r
        if self.sought and M is None:
            size = norm_b + self.norm_A * precise_norm(x.detach(), self.space.batch_dims)
            limit = torch.maximum(limit, certify.NULL_SLACK * self.eps * self.norm_A * size)
        return certify.Normal(self.before, after, limit, self.meaning)


def _certified_dual(
    space: Space, A_adjoint: Callable[[Tensor], Tensor] | None, q: Tensor, x: Tensor, r: Tensor, status: Tensor
) -> tuple[Tensor, Tensor]:
    """The dual `q` without its part in the nullspace of `A^H`, and the relative error of `x = A^H q`.

    Every vector of the process has a multiple of the residual of the least-squares solution in it, which is in that nullspace.
    """
    assert A_adjoint is not None
    batch_dims = space.batch_dims
    with torch.no_grad():
        norm_r, norm_x = precise_norm(r, batch_dims), precise_norm(x, batch_dims)
        part = _divide(r, torch.where(norm_r > 0, norm_r, 1.0))
        q = torch.where(_spread(status == Status.LEAST_SQUARES, q), space.axpy(-space.dot(part, q), part, q.clone()), q)
        error = precise_norm(x - A_adjoint(q), batch_dims)
    return q, error / torch.where(norm_x > 0, norm_x, 1.0)


def _complements(
    problem: Problem, parts: Mapping[str, Sequence[Tensor]]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """`v -> v - P v` with the projection onto the nullspace of `A^H`, and with that of `A`; the identity if there is none."""

    def complement(name: str) -> Callable[[Tensor], Tensor]:
        if name not in parts:
            return lambda v: v
        project = problem.closures[name].bind(parts[name])
        return lambda v: v - project(v)

    left, right = complement("left_nullspace"), complement("nullspace")
    return (right, left) if problem.transposed else (left, right)


def _projected(
    M: Callable[[Tensor], Tensor] | None, problem: Problem, left: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor] | None:
    """The preconditioner between the complements of the nullspaces."""
    return M if M is None or problem.nullspace is None else lambda r: right(M(left(r)))


def _as_scalar(a: Tensor, space: Space, dtype: torch.dtype) -> Scalar:
    """A float64 tensor of the batch shape as a scalar of the space."""
    return a.item() if isinstance(space, HostSpace) else a.to(accumulator_dtype(real_dtype(dtype)))


def _who_overflowed(A: _Operator, M: Callable[[Tensor], Tensor] | None, start: Tensor, batch_dims: int) -> Tensor:
    """What a NaN or an Inf in a cycle means: NONFINITE if `A` or `M` makes one of the vector that the cycle started with.

    Where both make finite vectors of it, it is the method that has left the range of the dtype: a BREAKDOWN.
    """
    with torch.no_grad():
        norms = [precise_norm(apply(start), batch_dims) for apply in (A, M) if apply is not None]
    sound = torch.stack([torch.isfinite(norm) for norm in norms]).all(0)
    return torch.where(sound, int(Status.BREAKDOWN), int(Status.NONFINITE))


def _spread(a: Tensor, x: Tensor) -> Tensor:
    """A tensor of the batch shape, shaped to multiply the vector `x`."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def _where(condition: Tensor, x: Tensor, other: Tensor | None = None) -> Tensor:
    """A new tensor: the systems of `x` where the condition holds, those of `other`, by default zero, elsewhere."""
    return torch.where(_spread(condition, x), x, 0.0 if other is None else other).contiguous()


def _divide(x: Tensor, by: Tensor) -> Tensor:
    """`x / by`, computed in float64 where a narrow dtype could overflow or underflow on the way."""
    return (x / _spread(by, x)).to(x.dtype)


def _rescale(d: Tensor, scale: Tensor) -> Tensor:
    """`scale d`, likewise."""
    return (d * _spread(scale, d)).to(d.dtype)


class _Rescaled:
    """`v -> A v / s` with a power of two `s` near `|A|`, where products of squares would leave the range of the dtype.

    A Krylov method's iterates for `(A / s) d' = r` and for `A d = r` are the same but for `d = d' / s`; so an operator of
    size 1e-30 in float32 is solved as well as one of size 1. For ordinary sizes `s = 1`, and nothing is done.
    """

    def __init__(self, A: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor] | None, space: Space) -> None:
        self.A, self.A_adjoint, self.batch_dims = A, adjoint, space.batch_dims
        self.size: Tensor | None = None
        self.ordinary = False

    def __call__(self, v: Tensor) -> Tensor:
        return self._divided(self.A, v)

    def adjoint(self, u: Tensor) -> Tensor:
        """`A^H u / s`."""
        assert self.A_adjoint is not None
        return self._divided(self.A_adjoint, u)

    def _divided(self, apply: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        y = apply(v)
        if self.size is None:
            ratio = precise_norm(y.detach(), self.batch_dims) / precise_norm(v.detach(), self.batch_dims)
            limit = torch.finfo(v.dtype).tiny ** -0.25
            extreme = torch.isfinite(ratio) & (ratio > 0) & ((ratio > limit) | (ratio < 1 / limit))
            self.size = torch.where(extreme, torch.exp2(torch.log2(torch.where(extreme, ratio, 1.0)).round()), 1.0)
            self.ordinary = not any_true(extreme)
        return y if self.ordinary else _divide(y, self.size)

    def restore(self, d: Tensor) -> Tensor:
        """The correction for `A` of one for `A / s`."""
        return d if self.ordinary or self.size is None else _divide(d, self.size)


def _adjoint_or_none(problem: Problem, like: Tensor, parts: Mapping[str, Sequence[Tensor]]) -> _Operator | None:
    """The adjoint of the operator that is being solved with, or None for code that autograd cannot see into."""
    try:
        return _operators(problem.H, like, parts)[0]
    except (RuntimeError, TypeError):
        return None


def _check_claimed_adjoint(
    problem: Problem,
    b: Tensor,
    x: Tensor,
    r: Tensor,
    given: Sequence[Tensor],
    status: Tensor,
    norm_r: Tensor,
    threshold: Tensor,
    norm_A: Tensor,
) -> tuple[Tensor, Tensor]:
    """Certify a solve that trusted a claim (Hermitian, or the user's adjoint) with the adjoint of autograd.

    So a false claim is a failed solve, never a wrong gradient. Where autograd cannot derive the adjoint, the claim stands.
    """
    try:
        transpose = Transpose(lambda v: problem.operator.apply(v, given), _domain_zero(problem, b))
        if not problem.transposed:
            slack = CLAIM_SLACK * max(problem.options.rtol, torch.finfo(b.dtype).eps) * norm_A * norm_r
            false_claim = (status == Status.LEAST_SQUARES) & ~(precise_norm(transpose(r.detach()), problem.batch_dims) <= slack)
            return torch.where(false_claim, int(Status.NOT_HERMITIAN), status), norm_r
        true_residual = b - transpose(x)
    except (RuntimeError, TypeError):  # opaque code: what its author claims is all there is
        return status, norm_r
    true_norm = precise_norm(true_residual, problem.batch_dims)
    false_claim = (status == Status.CONVERGED) & ~(true_norm <= CLAIM_SLACK * torch.maximum(threshold, norm_r))
    return torch.where(false_claim, int(Status.NOT_HERMITIAN), status), torch.where(false_claim, true_norm, norm_r)


def _operators(
    problem: Problem, like: Tensor, parts: Mapping[str, Sequence[Tensor]]
) -> tuple[_Operator, Callable[[Tensor], Tensor] | None]:
    """`A` and `M` (or, for the transposed problem, `A^H` and the preconditioner of that side) as functions."""

    def bound(name: str) -> Callable[[Tensor], Tensor]:
        return problem.closures[name].bind(parts[name])

    hermitian = problem.hermitian or problem.options.method.hermitian
    A = bound("operator")
    if problem.transposed and not hermitian:
        A = bound("operator_adjoint") if problem.operator_adjoint is not None else Transpose(A, like)
    M: Callable[[Tensor], Tensor] | None = None
    if problem.transposed and problem.adjoint_preconditioner is not None:
        M = bound("adjoint_preconditioner")
    elif problem.preconditioner is not None:
        M = bound("preconditioner")
        if problem.transposed and not hermitian:
            M = bound("preconditioner_adjoint") if problem.preconditioner_adjoint is not None else Transpose(M, like)
    return _Operator("A", A, like), None if M is None else _Operator("M", M)


def _adjoint_of(problem: Problem, b: Tensor, parts: Mapping[str, Sequence[Tensor]], unroll: bool) -> _Operator:
    """The adjoint of the operator that is being solved with; one that autograd can follow where the loop is unrolled."""
    A, zero = problem.operator.bind(parts["operator"]), _domain_zero(problem, b)
    if problem.transposed:
        return _Operator("A", A, problem.solution_layout.zero(b, problem.batch_dims))
    if problem.hermitian or problem.options.method.hermitian:
        return _Operator("A", A)
    if problem.operator_adjoint is not None and not unroll:
        return _Operator("A^H", problem.operator_adjoint.bind(parts["operator_adjoint"]), zero)
    return _Operator("A^H", (lambda u: pull_back(A, u, zero.clone())) if unroll else Transpose(A, zero), zero)


def _domain_zero(problem: Problem, b: Tensor) -> Tensor:
    """The zero vector of the domain of `A`, for a right-hand side of this problem, whichever way it goes."""
    return torch.zeros_like(b) if problem.transposed else problem.solution_layout.zero(b, problem.batch_dims)


def _inverse(problem: Problem, parts: Mapping[str, Sequence[Tensor]]) -> Callable[[Tensor], Tensor] | None:
    """`r -> A^{-1} r`, or `A^{-H} r` for the transposed problem, where the structure of the operator gives it."""
    name = "inverse_adjoint" if problem.transposed else "inverse"
    return _Operator("A.factorise()", problem.closures[name].bind(parts[name])) if name in problem.closures else None


def _counts(problem: Problem, A: _Operator, A_adjoint: _Operator | None) -> tuple[int, int]:
    """Applications of `A` and of `A^H`; `A_adjoint` served a diagnosis."""
    if problem.hermitian or problem.options.method.hermitian:
        return A.count + (0 if problem.derived else problem.recordings), 0
    recorded_transposes = int(problem.operator_adjoint is None)
    if problem.transposed:
        return recorded_transposes + (0 if A_adjoint is None else A_adjoint.count), A.count
    if A_adjoint is not None:
        return A.count + (0 if problem.derived else problem.recordings) + recorded_transposes, A_adjoint.count
    return A.count + (0 if problem.derived else problem.recordings), 0


class _Watch:
    """History, callback and progress bar, each off unless asked for."""

    def __init__(self, problem: Problem, norm_r: Tensor) -> None:
        self.callback, self.phase, self.steps = problem.callback, problem.phase, 0
        self.norms = [norm_r] if problem.history else []
        self.bar = None
        self.empty = norm_r.new_empty((*norm_r.shape, 0))
        if problem.progress:
            try:
                from tqdm.auto import tqdm
            except ImportError as error:
                raise ImportError("progress=True needs tqdm: pip install tqdm, or pip install 'nablasolve[demo]'") from error
            self.bar = tqdm(desc=f"{problem.options.method.name} ({self.phase})", unit="it", leave=False)
        self.wanted = self.callback is not None or self.bar is not None or problem.history

    def stops(self, norm: Scalar, scale: Tensor, running: Tensor, ended: Tensor) -> bool:
        """Keep, show and hand on the residual norm of this step, given in units of `scale`; whether to stop."""
        self.steps += 1
        norm = torch.as_tensor(norm, dtype=scale.dtype, device=scale.device).detach()
        norm = torch.where(running, norm * scale, ended)
        if self.norms:
            self.norms.append(norm)
        mapped = is_wrapped(norm)
        if self.bar is not None:
            self.bar.update(1)
            if norm.numel() and not mapped:
                self.bar.set_postfix(residual=f"{norm.max().item():.2e}", refresh=False)
        if self.callback is None:
            return False
        value: Scalar = norm if norm.ndim or mapped else norm.item()
        return bool(self.callback(IterationState(self.steps, value, self.phase)))

    def history(self) -> Tensor:
        """The norms that were kept, of shape `(*batch, steps + 1)`; empty where none were asked for."""
        return torch.stack(self.norms, dim=-1) if self.norms else self.empty

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
