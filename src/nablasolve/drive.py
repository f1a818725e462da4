"""The only loop: scaling, stopping, freezing, callbacks, progress, restarts and unrolling, for every method."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import certify
from .closure import is_wrapped
from .info import SolveInfo, Status, read_report
from .methods.base import CLAIMED, RUNNING, Correction
from .problem import Problem, Transpose
from .vectors import HostSpace, Scalar, Space, TensorSpace, precise_norm

logger = logging.getLogger("nablasolve")

# How far the residual under the true adjoint may exceed the tolerance before a claimed adjoint is called false.
CLAIM_SLACK = 10.0


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


class _Operator:
    """An application of `A` (or `A^H`) that counts itself and checks what the user's function returns."""

    def __init__(self, name: str, apply: Callable[[Tensor], Tensor]) -> None:
        self.name, self._apply, self.count = name, apply, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        y = self._apply(v)
        if type(y) is not type(v) or y.shape != v.shape or y.dtype != v.dtype or y.device != v.device:
            check_result(self.name, v, y)
        return y


def check_result(name: str, v: Tensor, y: Any) -> None:
    """Raise if `y`, which the user's function `name` returned for the vector `v`, is not a vector like it.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if its shape, dtype or device differ.
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"{name}: expected {name}(v) to be a Tensor like v, got {type(y).__name__}")
    if y.shape != v.shape:
        raise ValueError(f"{name}: expected {name}(v) to have the shape {tuple(v.shape)} of v, got {tuple(y.shape)}")
    if y.dtype != v.dtype:
        remedy = ""
        if y.is_complex() and not v.is_complex():
            remedy = f"; if the operator is complex, give b as {y.dtype}"
        raise ValueError(f"{name}: expected {name}(v) to have the dtype {v.dtype} of v, got {y.dtype}{remedy}")
    if y.device != v.device:
        raise ValueError(f"{name}: expected {name}(v) to be on the device {v.device} of v, got {y.device}")


def solve_concretely(
    problem: Problem, b: Tensor, x0: Tensor | None, given: Sequence[Tensor], kept: tuple[Tensor, ...]
) -> Outcome:
    """Solve one problem with its tensors, without gradients, keep its record and apply the failure policy.

    Raises:
        ConvergenceError: under `on_failure="raise"`.
    """
    with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(False):
        outcome = run(problem, b, x0, given, kept)
        info = read_report(outcome.report, outcome.history if problem.history else None, problem.options.method.name,
                           problem.adjoint_records, mapped=False)  # fmt: skip
    problem.records.append(info)
    logger.debug("%s solve: %r", problem.phase, info)
    if problem.options.on_failure != "ignore" and not _all_converged(info):
        x = problem.layout.unpack(outcome.x) if problem.batch_dims == problem.layout.batch_dims else outcome.x
        certify.enforce(problem.options.on_failure, problem.phase, x, info)
    return outcome


def _all_converged(info: SolveInfo) -> bool:
    converged = info.converged
    return bool(converged.all()) if isinstance(converged, Tensor) else bool(converged)


def run(
    problem: Problem,
    b: Tensor,
    x0: Tensor | None,
    given: Sequence[Tensor],
    kept: tuple[Tensor, ...] = (),
    unroll: bool = False,
) -> Outcome:
    """Run the problem's method to its end: the loop that every solve goes through.

    Each cycle solves the correction equation `A d = r / |r|` for the true residual `r = b - A x`, adds `|r| d` to `x`,
    recomputes the residual, and lets `certify` decide.
    """
    options, batch_dims = problem.options, problem.batch_dims
    space: Space
    if batch_dims == 0 and b.device.type == "cpu" and not unroll and not is_wrapped(b):
        space = HostSpace()
    else:
        space = TensorSpace(batch_dims, in_place=not unroll)
    parts = problem.split(given)
    A, M = _operators(problem, b, parts)
    matrix = problem.operator.matrix(parts[0])
    if matrix is not None and problem.transposed:
        matrix = matrix.mH

    norm_b = precise_norm(b.detach(), batch_dims)
    threshold = torch.clamp(options.rtol * norm_b, min=0.0 if problem.derived else options.atol)
    finite = torch.isfinite(norm_b)
    if space.any(~finite):
        b = torch.where(_spread(finite, b), b, 0.0)
    x = None if x0 is None else torch.where(_spread(norm_b > 0, x0), x0, 0.0)  # a copy; zero solves a zero b exactly
    r = b if x is None else b - A(x)
    norm_r = precise_norm(r.detach(), batch_dims)
    status = certify.opening(norm_b, norm_r, threshold)
    iterations: Scalar = space.full(0, b)
    history = [norm_r] if problem.history else []
    method, steps = options.method, 0
    watch = _Watch(problem)
    first_cycle, direction = True, None

    while space.any(status == RUNNING):
        spent = torch.as_tensor(iterations >= options.maxiter, device=b.device)
        status = torch.where((status == RUNNING) & spent, int(Status.MAXITER), status)
        if not space.any(status == RUNNING):
            break
        scale = torch.where(status == RUNNING, norm_r, 0.0)
        equation = _correction(problem, space, A, M, r, scale, threshold, options.maxiter, matrix, kept)
        state = method.init(equation)
        while True:
            running = state.running
            if not space.any(running):
                break
            state = method.step(state)
            steps, iterations = steps + 1, iterations + running
            state.stop(Status.NONFINITE, space.nonfinite(state.residual_norm))
            state.stop(CLAIMED, state.residual_norm <= equation.target)
            if watch.wanted:
                norm = torch.as_tensor(state.residual_norm, dtype=torch.float64, device=b.device).detach() * scale
                norm = torch.where(status == RUNNING, norm, norm_r)
                if problem.history:
                    history.append(norm)
                if watch.stops(steps, norm):
                    state.stop(Status.STOPPED, state.running)
            state.stop(Status.MAXITER, iterations >= options.maxiter)
        kept, direction = kept or method.keep(state), method.direction(state)
        d = method.solution(state)
        ended = torch.as_tensor(state.status, device=b.device)
        correction = _rescaled(d, scale)
        x_new = correction if x is None else x + correction
        r_new = b - A(x_new)
        norm_new = precise_norm(r_new.detach(), batch_dims)
        verdict = certify.verdict(status, ended, norm_r, norm_new, threshold, equation.epsilon)
        # a correction that is not finite, or that made a system worse instead of better, is not taken; but the iterate of
        # an unfinished first cycle is the method's own, whose residual may rise before it falls
        unfinished = (verdict == Status.MAXITER) | (verdict == Status.STOPPED)
        worse = (norm_new > norm_r) & ~(unfinished & first_cycle)
        bad = ~torch.isfinite(norm_new) | (worse & (status == RUNNING))
        if space.any(bad):
            keep = _spread(~bad, x_new)
            x_new = torch.where(keep, x_new, torch.zeros_like(x_new) if x is None else x)
            r_new, norm_new = torch.where(keep, r_new, r), torch.where(bad, norm_r, norm_new)
        first_cycle = False
        x, r, norm_r, status = x_new, r_new, norm_new, verdict
    watch.close()

    if x is None:
        x = torch.zeros_like(b, memory_format=torch.contiguous_format)
        if unroll:
            x = x + 0 * b
    hermitian = problem.hermitian or method.hermitian
    definite = problem.positive_definite or method.positive_definite
    if steps > 0 and space.any(certify.unexplained(status)):
        with torch.no_grad():
            status = certify.diagnose(space, A, b, x, r, direction, status, hermitian, definite)
    if problem.transposed and (hermitian or problem.operator_adjoint is not None):
        status, norm_r = _check_claimed_adjoint(problem, b, x, parts[0], status, norm_r, threshold)
    matvecs, rmatvecs = _counts(problem, A)
    relative = torch.where(norm_b > 0, norm_r / torch.where(norm_b > 0, norm_b, 1.0), norm_r)
    columns = (status, iterations, norm_r, relative, matvecs, rmatvecs)
    report = torch.stack([torch.as_tensor(c, device=b.device).to(norm_b).expand_as(norm_b) for c in columns], dim=-1)
    past = torch.stack(history, dim=-1) if history else norm_b.new_empty((*norm_b.shape, 0))
    return Outcome(x, report, past, kept)


def _correction(
    problem: Problem,
    space: Space,
    A: _Operator,
    M: Callable[[Tensor], Tensor] | None,
    r: Tensor,
    scale: Tensor,
    threshold: Tensor,
    steps: int,
    matrix: Tensor | None,
    kept: tuple[Tensor, ...],
) -> Correction:
    """The equation `A d = r / scale`, with a zero right-hand side for the systems whose scale is zero."""
    safe = torch.where(scale > 0, scale, 1.0)
    rhs = torch.where(_spread(scale > 0, r), _divide(r, safe), 0.0)
    target = threshold / safe
    return Correction(
        space=space,
        apply=A,
        preconditioner=M,
        rhs=rhs.contiguous(),
        target=target.item() if isinstance(space, HostSpace) else target.to(rhs.real.dtype),
        steps=steps,
        matrix=matrix,
        kept=kept,
        adjoint_of_kept=problem.transposed,
    )


def _spread(a: Tensor, x: Tensor) -> Tensor:
    """A tensor of the batch shape, shaped to multiply the vector `x`."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def _divide(x: Tensor, by: Tensor) -> Tensor:
    """`x / by`, computed in float64 where a narrow dtype could overflow or underflow on the way."""
    return (x / _spread(by, x)).to(x.dtype)


def _rescaled(d: Tensor, scale: Tensor) -> Tensor:
    """`scale d`, zero where the scale is zero."""
    factor = _spread(scale, d)
    return torch.where(factor != 0, d * factor, 0.0).to(d.dtype)


def _check_claimed_adjoint(
    problem: Problem, b: Tensor, x: Tensor, given: Sequence[Tensor], status: Tensor, norm_r: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """Certify an adjoint solve that trusted a claim (Hermitian, or the user's adjoint) with the adjoint of autograd.

    So a false claim is a failed solve, never a wrong gradient. Where autograd cannot derive the adjoint, the claim stands.
    """
    try:
        true_residual = b - Transpose(lambda v: problem.operator.apply(v, given), b)(x)
    except (RuntimeError, TypeError):  # opaque code: what its author claims is all there is
        return status, norm_r
    true_norm = precise_norm(true_residual, problem.batch_dims)
    false_claim = (status == Status.CONVERGED) & ~(true_norm <= CLAIM_SLACK * torch.maximum(threshold, norm_r))
    return torch.where(false_claim, int(Status.NOT_HERMITIAN), status), torch.where(false_claim, true_norm, norm_r)


def _operators(
    problem: Problem, like: Tensor, parts: Sequence[tuple[Tensor, ...]]
) -> tuple[_Operator, Callable[[Tensor], Tensor] | None]:
    """`A` and `M` (or, for the transposed problem, `A^H` and the preconditioner of that side) as functions."""

    def with_given(index: int) -> Callable[[Tensor], Tensor]:
        closure = problem.closures[index]
        assert closure is not None
        return lambda v: closure.apply(v, parts[index])

    hermitian = problem.hermitian or problem.options.method.hermitian
    A: Callable[[Tensor], Tensor] = with_given(0)
    if problem.transposed and not hermitian:
        A = with_given(1) if problem.operator_adjoint is not None else Transpose(A, like)
    M: Callable[[Tensor], Tensor] | None = None
    if problem.transposed and problem.adjoint_preconditioner is not None:
        M = with_given(4)
    elif problem.preconditioner is not None:
        M = with_given(2)
        if problem.transposed and not hermitian:
            M = with_given(3) if problem.preconditioner_adjoint is not None else Transpose(M, like)
    return _Operator("A", A), None if M is None else _Operator("M", M)


def _counts(problem: Problem, A: _Operator) -> tuple[int, int]:
    """Applications of `A` and of `A^H`."""
    if not problem.transposed or problem.hermitian or problem.options.method.hermitian:
        return A.count + (0 if problem.derived else problem.recordings), 0
    return int(problem.operator_adjoint is None), A.count


class _Watch:
    """Callback and progress bar, off unless asked for."""

    def __init__(self, problem: Problem) -> None:
        self.callback, self.phase = problem.callback, problem.phase
        self.bar = None
        if problem.progress:
            try:
                from tqdm.auto import tqdm
            except ImportError as error:
                raise ImportError("progress=True needs tqdm: pip install 'nablasolve[demo]' or pip install tqdm") from error
            self.bar = tqdm(desc=f"{problem.options.method.name} ({self.phase})", unit="it", leave=False)
        self.wanted = self.callback is not None or self.bar is not None or problem.history

    def stops(self, steps: int, norm: Tensor) -> bool:
        """Show and call back; whether to stop."""
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix(residual=f"{norm.max().item():.2e}" if norm.numel() else "-", refresh=False)
        if self.callback is None:
            return False
        value: Scalar = norm if norm.ndim or is_wrapped(norm) else norm.item()
        return bool(self.callback(IterationState(steps, value, self.phase)))

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
