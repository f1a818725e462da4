"""Recompute, decide, say so: the only place that may write CONVERGED, and the one policy for failure.

A method's own residual drifts away from the true one in floating point. So when a method claims convergence, the loop
recomputes `b - A x`, and what is decided here rests on that residual alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .closure import is_wrapped
from .info import ConvergenceError, ConvergenceWarning, SolveInfo, Status
from .methods.base import CLAIMED, CYCLE_END, RUNNING
from .vectors import Space

# A restart from the true residual is worth its price while it gains at least this factor.
WORTHWHILE_GAIN = 0.5
# Rounding that a symmetry test must tolerate, in units of the roundoff of the products.
SYMMETRY_SLACK = 1e3
# The same for a product that ought to vanish.
NULL_SLACK = 1e2


def opening(valid: Tensor, residual_norm: Tensor, threshold: Tensor) -> Tensor:
    """The status before the first step: NONFINITE, CONVERGED (zero `b`, exact `x0`) or RUNNING; one a system."""
    status = torch.where(residual_norm <= threshold, int(Status.CONVERGED), RUNNING)
    return torch.where(valid & torch.isfinite(residual_norm), status, int(Status.NONFINITE))


def verdict(status: Tensor, ended: Tensor, before: Tensor, after: Tensor, threshold: Tensor, eps: float) -> Tensor:
    """The status of each system after a cycle of its method.

    Args:
        status: the status before the cycle; only RUNNING systems are judged.
        ended: how the cycle ended, a status of `methods/base.py` or a public one.
        before: the true residual norm before the cycle.
        after: the recomputed one after it.
        threshold: `max(rtol |b|, atol)`.
        eps: the roundoff of the vectors.

    Returns:
        RUNNING where the method is to restart from the recomputed residual, else a final `Status`.
    """
    gained = after <= WORTHWHILE_GAIN * before
    crept = after < (1 - eps**0.5) * before
    code = torch.where(ended >= 0, ended, int(Status.STAGNATED))
    restart = (ended == CLAIMED) & gained
    restart |= ((ended == CYCLE_END) | (ended == Status.BREAKDOWN) | (ended == Status.STAGNATED)) & crept
    code = torch.where(restart, RUNNING, code)
    final = (ended == Status.STOPPED) | (ended == Status.NONFINITE)
    code = torch.where((after <= threshold) & ~final, int(Status.CONVERGED), code)
    code = torch.where(torch.isfinite(after), code, int(Status.NONFINITE))
    return torch.where(status == RUNNING, code, status)


def useless(status: Tensor, before: Tensor, after: Tensor, first_cycle: bool, eps: float) -> Tensor:
    """Where the correction of a cycle is not to be taken: it is not finite, or made the residual larger.

    The residual of an unfinished first cycle may well rise before it falls, and its iterate is the method's own; but what
    has grown by half the digits of the dtype is rounding.
    """
    unfinished = ((status == Status.MAXITER) | (status == Status.STOPPED)) & first_cycle
    return ~torch.isfinite(after) | (after > before * torch.where(unfinished, eps**-0.5, 1.0))


def unexplained(status: Tensor) -> Tensor:
    """The systems whose failure may have a more exact reason than the method could give."""
    vague = (Status.MAXITER, Status.STAGNATED, Status.BREAKDOWN, Status.INDEFINITE)
    return torch.stack([status == code for code in vague]).any(0)


def diagnose(
    space: Space,
    A: Callable[[Tensor], Tensor],
    A_adjoint: Callable[[Tensor], Tensor] | None,
    b: Tensor,
    x: Tensor,
    r: Tensor,
    direction: Tensor | None,
    status: Tensor,
    hermitian: bool,
    definite: bool,
) -> Tensor:
    """Say more exactly why a solve failed, by a few products with `u = b / |b|` and with unit vectors `q`.

    `(Au)^H (Au) != u^H A (Au)` shows an operator that is not Hermitian, though it is claimed to be. The final residual
    `r` and the last `direction` of zero curvature may show a singular operator that cannot reach `b`: `A^H q ~ 0` while
    `q^H b` is not small (INCONSISTENT); or, where definiteness is claimed, an operator that is not: `q^H A q <= 0`. All
    beside `|A|`, as these products show it.
    """
    failed = unexplained(status)

    def wide(scalar: Any) -> Tensor:
        return torch.as_tensor(scalar, dtype=torch.float64, device=b.device)

    def unit(t: Tensor) -> Tensor:
        norm = space.norm(t)
        return space.scale(space.ratio(1.0, norm, norm > 0), t)

    eps = torch.finfo(b.dtype).eps
    u = unit(b)
    Au = A(u).clone()
    AAu = A(Au)
    norm_Au, norm_AAu, mixed = wide(space.norm(Au)), wide(space.norm(AAu)), wide(space.real_dot(u, AAu))
    norm_A = torch.where(norm_Au > 0, norm_AAu / torch.where(norm_Au > 0, norm_Au, 1.0), norm_Au)
    if hermitian:
        asymmetric = (norm_Au * norm_Au - mixed).abs() > SYMMETRY_SLACK * eps * (norm_A * norm_Au + norm_AAu)
        status = torch.where(failed & asymmetric, int(Status.NOT_HERMITIAN), status)
    # The residual is known to eps |A| |x| only, and says nothing where that is all it is. A direction of zero curvature is
    # a null vector to the square root of rounding, and so may be a correction that has exploded.
    noise = NULL_SLACK / 10 * eps * (1 + norm_A * wide(space.norm(x)) / wide(space.norm(r)))
    genuine = (noise < eps**0.5) | ((noise < 0.1) & (status != Status.MAXITER))
    suspects = [(r, torch.where(genuine, noise, 0.0))]
    if direction is not None:
        suspects.append(
            (direction, (NULL_SLACK * noise.new_tensor(eps)).sqrt() if definite else noise.new_tensor(NULL_SLACK * eps))
        )
    for suspect, tolerance in suspects:
        if A_adjoint is None:
            break
        q = unit(suspect)
        try:
            Aq = A_adjoint(q)
        except RuntimeError:  # code whose backward pass torch does not have
            break
        null = wide(space.norm(Aq)) <= tolerance * norm_A
        touched = wide(abs(space.dot(q, u))) > tolerance
        undecided = failed & (status != Status.NOT_HERMITIAN)
        status = torch.where(undecided & null & touched, int(Status.INCONSISTENT), status)
        if definite:
            indefinite = ~null & (wide(space.real_dot(q, Aq)) <= 0) & (status != Status.MAXITER)
            status = torch.where(undecided & indefinite, int(Status.INDEFINITE), status)
    return status


def enforce(on_failure: str, phase: str, x: Any, info: SolveInfo) -> None:
    """Apply the failure policy to a solve of which some system has not converged.

    Raises:
        ConvergenceError: for `on_failure="raise"`.
    """
    if on_failure == "ignore":
        return
    text = _describe(phase, info)
    if on_failure == "warn":
        warnings.warn(text, ConvergenceWarning, stacklevel=2)
        return
    raise ConvergenceError(text, x, info)


def _describe(phase: str, info: SolveInfo) -> str:
    text = "The adjoint solve of the backward pass" if phase == "adjoint" else "The solve"
    text += f" ({info.method}) did not converge"
    if not isinstance(info.status, Tensor):
        return (
            f"{text}: {info.status.name} after {info.iterations} iterations, relative residual "
            f"{info.relative_residual:.2e}. {info.message}"
        )
    if is_wrapped(info.status):
        return f"{text} for some system of the vmapped batch."
    return f"{text} for {int((~info.converged).sum())} of {info.converged.numel()} systems:\n{info.message}"
