"""The only loop: scaling, stopping, freezing, callbacks, progress, restarts and unrolling, for every method."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import certify
from .adjoint import Transpose
from .closure import is_wrapped
from .compiling import Compiled
from .info import Column, SolveInfo, Status, converged, read_report
from .lookout import Lookout
from .methods.base import CLAIMED, RUNNING, Correction, Method
from .normal import NormalEquations, as_scalar, certified_dual
from .operands import Counted, Operands, Rescaled, adjoint_or_none, domain_zero
from .problem import Problem
from .vectors import HostSpace, Scalar, Space, TensorSpace, any_true, divide, headroom, precise_norm, select, times

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
            outcome = run(problem.solved_by(fallback), b, select(near, first.x), given)
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
    if batch_dims == 0 and b.device.type == "cpu" and not (unroll or (problem.compile and method.steady) or is_wrapped(b)):
        space = HostSpace(b)
    else:
        space = TensorSpace(batch_dims, in_place=not unroll)
    operands = Operands.of(problem, b, given, unroll)
    room = headroom(b)
    A, M, least = operands.A, operands.M, method.least_squares

    norm_b, given_b = precise_norm(b.detach(), batch_dims), b
    threshold = torch.clamp(options.rtol * norm_b, min=0.0 if problem.derived else options.atol)
    valid = torch.isfinite(norm_b)
    if space.any(~valid):
        b = select(valid, b)
    within = operands.off_left(b)
    lost = torch.zeros_like(norm_b) if within is b else precise_norm((b - within).detach(), batch_dims)
    if problem.nullspace is not None and not problem.derived:
        certify.check_nullspaces(operands.A, operands.off_left, operands.off_right, b, batch_dims)
        # |b - A x|^2 is |P b|^2 and what is left of the rest: of the tolerance 0.5 and 0.8 of it
        reachable, threshold = lost <= 0.5 * threshold, 0.8 * threshold
    b, x = within, None
    if x0 is not None:
        finite = torch.isfinite(precise_norm(x0.detach(), batch_dims))
        x = operands.off_right(select(finite & (norm_b > 0), x0))  # a copy; and zero solves a zero b exactly
        valid = valid & (finite | (norm_b == 0))
    r = b if x is None else b - A(x)
    norm_r = norm_b if r is given_b else precise_norm(r.detach(), batch_dims)
    status = certify.opening(valid, norm_r, threshold)
    if x is not None and operands.adjoint is not None and problem.least_squares and not problem.onto:
        status = certify.opening_normal(status, operands.adjoint, r, b - r, x, norm_r, options.rtol, batch_dims)
    iterations: Scalar = space.full(0, b)
    watch = _Watch(problem, norm_r)
    rescaled = Rescaled(A, operands.adjoint, space) if M is None and not method.direct else None
    step = Compiled(_step, operands, rescaled) if problem.compile else _step
    total = 0
    first_cycle, asked, direction, ended = True, False, None, status
    hermitian = problem.hermitian or method.hermitian
    norm_s = norm_A = cond_A = torch.zeros_like(norm_r)
    q: Tensor | None = None
    # those handed in are of the user's A, by its forward method; those of a transposed problem itself are of its own
    kept = kept if method == problem.forward.method else ()
    factors = kept

    while True:
        spent = torch.as_tensor(iterations >= options.maxiter, device=b.device)
        status = torch.where((status == RUNNING) & spent, int(Status.MAXITER), status)
        running = status == RUNNING
        if not space.any(running):
            break
        scale = torch.where(running, norm_r, 1.0)
        # after a claim that did not hold, aim below the threshold: else the restart ends at its first step and gains nothing
        missed = ended == CLAIMED
        target = torch.where(missed, torch.minimum(threshold, RESTART_GAIN * norm_r), threshold) / scale
        preconditioner = operands.precondition_within(problem)
        on_the_left = least and problem.transposed
        equation = Correction(
            space=space,
            apply=rescaled or A,
            preconditioner=None if on_the_left else preconditioner,
            rhs=select(running, divide(r, scale)),
            target=as_scalar(target, space, b.dtype),
            steps=options.maxiter,
            matrix=operands.matrix,
            kept=factors,
            adjoint_of_kept=problem.transposed and bool(kept),
            inverse=operands.inverse,
            adjoint=operands.adjoint if rescaled is None or operands.adjoint is None else rescaled.adjoint,
            left_preconditioner=preconditioner if on_the_left else None,
            dual=dual,
        )
        state = method.init(equation)
        steps, milestone, reached = 0, FIRST_MILESTONE, state.residual_norm
        normal = NormalEquations(problem, state, space, torch.where(missed, RESTART_GAIN, 1.0)) if least else None
        if normal is not None:
            normal.look(state)
        lookout = Lookout(problem.check_every, b, exact=method.direct or watch.wanted)
        while lookout.sees(space, state.running, steps):
            state, iterations = step(method, state, normal, iterations)
            steps, total = steps + 1, total + 1
            if total >= options.maxiter:  # before that no system can have taken so many
                state.stop(Status.MAXITER, iterations >= options.maxiter)
            if watch.wanted and not method.direct and watch.stops(state.residual_norm, scale, running, norm_r):
                state.stop(Status.STOPPED, state.running)
                asked = True
            if hermitian and steps == milestone:
                if space.any(state.running & (state.residual_norm > certify.WORTHWHILE_GAIN * reached)):
                    with torch.no_grad():
                        broken = certify.asymmetric(space, A, b)
                    state.stop(Status.NOT_HERMITIAN, broken.item() if isinstance(space, HostSpace) else broken)
                milestone, reached = MILESTONES * milestone, state.residual_norm
        factors, direction = factors or method.keep(state), method.direction(state)
        ended = torch.as_tensor(state.status, device=b.device)
        d, dq = method.solution(state), method.dual(state) if dual else None
        direction = d if direction is None else direction
        if normal is not None:
            normal.close(state, rescaled, scale)
            norm_A, cond_A = torch.maximum(norm_A, normal.norm_A), torch.maximum(cond_A, normal.cond_A)
        del state  # its vectors are not needed beside those of the next cycle
        correction = operands.off_right(times(scale, d if rescaled is None else rescaled.restore(d)))
        x_new = correction if x is None else x + correction
        del correction
        r_new = b - A(x_new)
        norm_new = precise_norm(r_new.detach(), batch_dims)
        overflow = running & ((ended == Status.NONFINITE) | ~torch.isfinite(norm_new))
        if space.any(overflow):
            ended = torch.where(overflow, _who_overflowed(problem, operands, select(running, divide(r, scale))), ended)
        normals = None if normal is None else normal.recomputed(operands, r_new, norm_new, norm_b, x_new)
        code = certify.verdict(status, ended, norm_r, norm_new, threshold, equation.epsilon, normals)
        refused = ~running | certify.useless(code, norm_r, norm_new, first_cycle, equation.epsilon, least)
        if space.any(refused):
            x_new = select(~refused, x_new, x)
            r_new, norm_new = select(~refused, r_new, r), torch.where(refused, norm_r, norm_new)
        if normals is not None:
            norm_s = torch.where(refused, torch.where(running, normals.before, norm_s), normals.after)
        if watch.wanted and method.direct and steps:  # which has no residual of its own
            asked = watch.stops(norm_new, torch.ones_like(scale), running, norm_r)
        if asked:  # and no other method goes on, either
            code = torch.where((code == RUNNING) | (running & certify.may_be_solved_otherwise(code)), int(Status.STOPPED), code)
        # another cycle from the same residual would do the same again
        code = torch.where((code == RUNNING) & refused, int(Status.STAGNATED), code)
        if dq is not None:
            dq = select(~refused, times(scale, dq if rescaled is None else rescaled.restore(rescaled.restore(dq))))
            q = dq if q is None else q + dq
        x, r, norm_r, status, first_cycle = x_new, r_new, norm_new, code, False
    watch.close()

    if x is None:
        zero = problem.solution_layout.zero(b, batch_dims)
        x = b * 0 if unroll and zero.shape == b.shape else zero
    diagnosis: Counted | None = None
    if not first_cycle and space.any(certify.unexplained(status)):
        with torch.no_grad():
            if least:
                status = _mismatch(problem, space, operands, x, r, status)
            else:
                diagnosis = _diagnosing_adjoint(problem, b, given, A, hermitian)
                definite = problem.positive_definite or method.positive_definite
                exhausted = torch.as_tensor(iterations >= certify.dimension(b, batch_dims), device=b.device)
                exhausted = exhausted | (status != Status.MAXITER)
                status = certify.diagnose(
                    space, A, diagnosis, b, x, r, direction, status, threshold, exhausted, A.count, hermitian, definite
                )
    if problem.nullspace is not None and not problem.derived:
        status = torch.where(valid & ~reachable, int(Status.INCONSISTENT), status)
        norm_r = torch.hypot(norm_r, lost)
    if (least or problem.transposed) and (hermitian or problem.user_adjoint):
        status, norm_r = _check_claimed_adjoint(problem, b, x, r, given, status, norm_r, threshold, norm_A)
    norm_r = torch.where(valid, norm_r, torch.nan)  # what was asked was not solved, however well zero solves zero
    if problem.derived and space.any(~valid):  # the derivative of a loss that is not finite
        x = select(valid, x, torch.full_like(x, torch.nan))
    residual, size = norm_r, norm_b
    if problem.data is not None:  # of a damped problem, the misfit of the data
        residual, size = (precise_norm(t.detach()[..., : problem.data], batch_dims) for t in (r, b))
        residual = torch.where(valid, residual, torch.nan)
    relative = torch.where(size > 0, residual / torch.where(size > 0, size, 1.0), residual)
    dual_error = torch.full_like(norm_r, torch.inf)
    if q is not None:
        q, dual_error = certified_dual(space, operands, q, x.detach(), r.detach(), status)
    norm_x = precise_norm(x.detach(), batch_dims) if least else norm_r
    counts = operands.counts(problem, diagnosis)
    columns = (status, iterations, residual, relative, *counts, norm_r, norm_s, norm_A, cond_A, norm_x, dual_error)
    del room
    report = torch.stack([torch.as_tensor(c, device=b.device).to(norm_b).expand_as(norm_b) for c in columns], dim=-1)
    return Outcome(x, report, watch.history(), () if problem.transposed and not kept else factors, q)


def _step(method: Method[Any], state: Any, normal: NormalEquations | None, iterations: Scalar) -> tuple[Any, Scalar]:
    """One step of the method, and what it says of itself: the body of the loop, which may be compiled as it stands."""
    space, active = state.problem.space, state.running
    state = method.step(state)
    iterations = iterations + active
    state.stop(Status.NONFINITE, space.nonfinite(state.residual_norm))
    state.stop(CLAIMED, state.residual_norm <= state.problem.target)
    if normal is not None:
        normal.look(state)
    return state, iterations


def _diagnosing_adjoint(problem: Problem, b: Tensor, given: Sequence[Tensor], A: Counted, hermitian: bool) -> Counted | None:
    """The adjoint of `A` for a diagnosis; a small system is diagnosed without it."""
    if hermitian:
        return A
    return adjoint_or_none(problem, b, given) if certify.dimension(b, problem.batch_dims) > certify.SMALL else None


def _mismatch(problem: Problem, space: Space, operands: Operands, x: Tensor, r: Tensor, status: Tensor) -> Tensor:
    """The status of a failed least-squares solve, NOT_HERMITIAN where the adjoint that was trusted is not that of `A`."""
    trusted = problem.user_adjoint or problem.hermitian or problem.options.method.hermitian
    if not trusted or operands.adjoint is None:
        return status
    false = certify.mismatched(space, operands.A, operands.adjoint, x, r)
    return torch.where(certify.unexplained(status) & false, int(Status.NOT_HERMITIAN), status)


def _who_overflowed(problem: Problem, operands: Operands, start: Tensor) -> Tensor:
    """What a NaN or an Inf in a cycle means: NONFINITE if `A` or `M` makes one of the vector that the cycle started with.

    Where both make finite vectors of it, it is the method that has left the range of the dtype: a BREAKDOWN.
    """
    with torch.no_grad():
        vector = start if operands.adjoint is None else operands.adjoint(start)
        images = [vector, operands.A(vector)]
        if operands.M is not None:
            images.append(operands.M(start if problem.transposed else vector))
        norms = [precise_norm(image, problem.batch_dims) for image in images]
    sound = torch.stack([torch.isfinite(norm) for norm in norms]).all(0)
    return torch.where(sound, int(Status.BREAKDOWN), int(Status.NONFINITE))


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
    own = problem.split(given)["operator"]
    try:
        transpose = Transpose(lambda v: problem.operator.apply(v, own), domain_zero(problem, b))
        image = transpose(x if problem.transposed else r.detach())
    except (RuntimeError, TypeError):  # opaque code: what its author claims is all there is
        return status, norm_r
    reached = converged(status, problem.least_squares)
    if not problem.transposed:  # the solution of a least-squares problem has A^H r = 0
        eps, k = torch.finfo(b.dtype).eps, problem.batch_dims
        size = precise_norm(b.detach(), k) + norm_A * precise_norm(x.detach(), k)  # as in `NormalEquations.recomputed`
        rounding = torch.minimum(certify.NULL_SLACK * eps * size, eps ** (1 / 3) * norm_r)
        limit = CLAIM_SLACK * norm_A * torch.maximum(max(problem.options.rtol, eps**0.5) * norm_r, rounding)
        false_claim = reached & (status != Status.CONVERGED) & ~(precise_norm(image, problem.batch_dims) <= limit)
        return torch.where(false_claim, int(Status.NOT_HERMITIAN), status), norm_r
    if problem.least_squares:  # r is what the claimed adjoint has left
        error = precise_norm(b - image - r, problem.batch_dims)
        return torch.where(reached & ~(error <= CLAIM_SLACK * threshold), int(Status.NOT_HERMITIAN), status), norm_r
    true_norm = precise_norm(b - image, problem.batch_dims)
    false_claim = reached & ~(true_norm <= CLAIM_SLACK * torch.maximum(threshold, norm_r))
    return torch.where(false_claim, int(Status.NOT_HERMITIAN), status), torch.where(false_claim, true_norm, norm_r)


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
