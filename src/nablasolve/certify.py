"""Recompute, decide, say so: the only place that may write CONVERGED, and the one policy for failure.

A method's own residual drifts away from the true one in floating point. So when a method claims convergence, the loop
recomputes `b - A x`, and what is decided here rests on that residual alone.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .closure import is_wrapped
from .info import ConvergenceError, ConvergenceWarning, SolveInfo, Status
from .methods.base import CLAIMED, CYCLE_END, RUNNING
from .vectors import Space, any_true, divide, flatten, precise_norm, probe, times

# A restart from the true residual is worth its price while it gains at least this factor.
WORTHWHILE_GAIN = 0.5
# Rounding that a symmetry test must tolerate, in units of the roundoff of the products.
SYMMETRY_SLACK = 1e3
# The same for what ought to vanish: a singular value, or a part of `b`.
NULL_SLACK = 10.0
# A failed system of so few unknowns is worth one product for each of them, and its singular values.
SMALL = 64
# How many steps, of two products each, the search for a null vector of a larger one may take, and may take at least: beyond
# that it takes no more products than the solve itself has taken.
PROJECTION_STEPS, FEWEST_STEPS = 50, 32


def opening(valid: Tensor, residual_norm: Tensor, threshold: Tensor) -> Tensor:
    """The status before the first step: NONFINITE, CONVERGED (zero `b`, exact `x0`) or RUNNING; one a system."""
    status = torch.where(residual_norm <= threshold, int(Status.CONVERGED), RUNNING)
    return torch.where(valid & torch.isfinite(residual_norm), status, int(Status.NONFINITE))


def opening_normal(
    status: Tensor,
    A_adjoint: Callable[[Tensor], Tensor],
    r: Tensor,
    Ax: Tensor,
    x: Tensor,
    norm_r: Tensor,
    rtol: float,
    batch_dims: int,
) -> Tensor:
    """The status before the first step where the guess is a least-squares solution already, with `|A|` from below."""
    with torch.no_grad():
        norm_x = precise_norm(x, batch_dims)
        norm_A = precise_norm(Ax, batch_dims) / torch.where(norm_x > 0, norm_x, 1.0)
        met = precise_norm(A_adjoint(r.detach()), batch_dims) <= rtol * norm_A * norm_r
        return torch.where((status == RUNNING) & (norm_x > 0) & met, int(Status.LEAST_SQUARES), status)


def verdict(
    status: Tensor, ended: Tensor, before: Tensor, after: Tensor, threshold: Tensor, eps: float, normal: Normal | None = None
) -> Tensor:
    """The status of each system after a cycle of its method.

    Args:
        status: the status before the cycle; only RUNNING systems are judged.
        ended: how the cycle ended, a status of `methods/base.py` or a public one.
        before: the true residual norm before the cycle.
        after: the recomputed one after it.
        threshold: `max(rtol |b|, atol)`.
        eps: the roundoff of the vectors.
        normal: for a least-squares method, what became of `|A^H r|`.

    Returns:
        RUNNING where the method is to restart from the recomputed residual, else a final `Status`.
    """
    gained = after <= WORTHWHILE_GAIN * before
    crept = after < (1 - eps**0.5) * before
    code = torch.where(ended >= 0, ended, int(Status.STAGNATED))
    restart = (ended == CLAIMED) & gained
    restart |= ((ended == CYCLE_END) | (ended == Status.BREAKDOWN) | (ended == Status.STAGNATED)) & crept
    final = (ended == Status.STOPPED) | (ended == Status.NONFINITE) | (ended == Status.ILL_CONDITIONED)
    if normal is not None:
        restart |= (ended == CLAIMED) & (normal.after <= WORTHWHILE_GAIN * normal.before)
    code = torch.where(restart, RUNNING, code)
    if normal is not None:
        code = torch.where((normal.after <= normal.limit) & ~final, int(normal.meaning), code)
    code = torch.where((after <= threshold) & ~final, int(Status.CONVERGED), code)
    return torch.where(status == RUNNING, code, status)


@dataclass(frozen=True)
class Normal:
    """The recomputed residual of the normal equations, `|A^H (b - A x)|`, of each system.

    Attributes:
        before: before the cycle.
        after: after it.
        limit: what it is to come below (Paige & Saunders 1982, §6: `rtol |A| |r|`).
        meaning: the status of a system where it does: LEAST_SQUARES, or INCONSISTENT where `A x = b` was asked.
    """

    before: Tensor
    after: Tensor
    limit: Tensor
    meaning: Status


def useless(
    status: Tensor, before: Tensor, after: Tensor, first_cycle: bool, eps: float, least_squares: bool = False
) -> Tensor:
    """Where the correction of a cycle is not to be taken: it is not finite, or made the residual larger.

    The residual of an unfinished first cycle may well rise before it falls, and its iterate is the method's own; but what
    has grown by half the digits of the dtype is rounding.
    """
    unfinished = ((status == Status.MAXITER) | (status == Status.STOPPED)) & first_cycle
    # a least-squares residual that cannot fall may well rise by its rounding
    rounding = torch.full_like(after, 1 + eps**0.5 if least_squares else 1.0)  # in 64 bits: in 32 it is 1
    growth = torch.where(unfinished, eps**-0.5, rounding)
    return ~torch.isfinite(after) | (after > before * growth)


def may_be_solved_otherwise(status: Tensor) -> Tensor:
    """The systems that failed for a reason of the method, rather than a limit, a callback or the data."""
    return torch.stack([status == code for code in (Status.STAGNATED, Status.BREAKDOWN, Status.INDEFINITE)]).any(0)


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
    threshold: Tensor,
    exhausted: Tensor,
    products: int,
    hermitian: bool,
    definite: bool,
) -> Tensor:
    """Say more exactly why a solve failed. Everything is measured beside `|A|`, as the products show it.

    NOT_HERMITIAN: with `v = A b / |A b|`, `v^H A b` differs from `b^H A v`, where the two are claimed to be conjugate.
    INDEFINITE: `q^H A q <= 0` for the residual `r` or the last `direction`, where definiteness is claimed.
    INCONSISTENT: `A^H q = 0` and `q^H b != 0` for some `q`, so that `A` is singular and no `x` reaches `b`. A small system is
    searched for every such `q`, a large one near `r` and near `direction`, along which the iterates of a singular system grow.
    `exhausted` says where the method has had as many steps as it can need: less is no reason to spend many products.
    """
    batch_dims, eps = space.batch_dims, torch.finfo(b.dtype).eps
    failed, small = unexplained(status), dimension(b, batch_dims) <= SMALL
    suspects = [suspect for suspect in (r, direction) if suspect is not None]
    steps = min(PROJECTION_STEPS, max(FEWEST_STEPS, products // (2 * len(suspects))))
    u, norm_b = _unit(b, batch_dims)
    norm_A, asymmetric = _symmetry(space, A, u)
    # how large a part of u may be the rounding of b = A x (a larger x has exploded, and no longer tells), or is tolerated
    growth = torch.clamp(norm_A * precise_norm(x, batch_dims) / norm_b, max=eps**-0.5)
    rounding = NULL_SLACK * eps * (1 + growth)
    goal = threshold / norm_b
    if hermitian:
        status = torch.where(failed & asymmetric, int(Status.NOT_HERMITIAN), status)
    for suspect in suspects if definite else ():
        q, _ = _unit(suspect, batch_dims)
        Aq = A(q)
        curvature = _wide(space.real_dot(q, Aq), b)
        # a semidefinite A has |A q|^2 <= |A| q^H A q and, for b = A y, |q^H b|^2 <= (q^H A q) (y^H b)
        null = precise_norm(Aq, batch_dims) <= (NULL_SLACK * eps) ** 0.5 * norm_A
        indefinite = ~null & (curvature <= 0) & (status != Status.MAXITER)
        status = torch.where(unexplained(status) & indefinite, int(Status.INDEFINITE), status)
        flat = null & (curvature.abs() <= NULL_SLACK * eps * norm_A)
        outside = flat & (_wide(abs(space.dot(q, u)), b) > torch.maximum(goal, rounding.sqrt()))
        if not small:
            status = torch.where(unexplained(status) & outside, int(Status.INCONSISTENT), status)
    doubtful = unexplained(status)
    if small:
        if space.any(doubtful & exhausted):
            outside = _outside_range_of_small(A, b, threshold, doubtful & exhausted, batch_dims)
            status = torch.where(outside, int(Status.INCONSISTENT), status)
        return status
    if A_adjoint is None:
        return status
    for suspect in suspects:
        if not space.any(doubtful):
            break
        try:
            outside = _outside_range(
                space, A, A_adjoint, u, suspect, norm_A, torch.maximum(goal, rounding), doubtful, exhausted, steps
            )
        except RuntimeError:  # code whose backward pass torch does not have
            break
        status = torch.where(outside, int(Status.INCONSISTENT), status)
        doubtful = doubtful & ~outside
    return status


def _symmetry(space: Space, A: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """An estimate of `|A|`, and where `A` is not Hermitian: with `v = A u / |A u|`, `v^H A u` differs from `u^H A v`."""
    v, norm_Au = _unit(A(u), space.batch_dims)
    Av = A(v)
    norm_A = torch.maximum(norm_Au, precise_norm(Av, space.batch_dims))
    difference = (norm_Au - _wide(space.real_dot(u, Av), u)).abs()
    return norm_A, difference > SYMMETRY_SLACK * torch.finfo(u.dtype).eps * norm_A


def asymmetric(space: Space, A: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Where two products show that `A` is not Hermitian."""
    return _symmetry(space, A, _unit(b, space.batch_dims)[0])[1]


def check_nullspaces(
    A: Callable[[Tensor], Tensor],
    off_left: Callable[[Tensor], Tensor],
    off_right: Callable[[Tensor], Tensor],
    like: Tensor,
    batch_dims: int,
) -> None:
    """Raise unless, for a general `z`, `A` maps its part in the nullspace to 0, and `A z` has no part in that of `A^H`.

    Raises:
        ValueError: naming the argument. What was solved would not be `A x = b`.
    """
    with torch.no_grad():
        z = probe(like)
        n, Az = z - off_right(z), A(z)
        norm_z, norm_n, norm_Az = (precise_norm(v, batch_dims) for v in (z, n, Az))
        tolerance = torch.finfo(like.dtype).eps ** 0.5 * norm_Az
        if any_true(precise_norm(A(n), batch_dims) * norm_z > tolerance * norm_n):
            raise ValueError("nullspace: expected vectors n with A n = 0, got some for which it is not")
        if any_true(precise_norm(Az - off_left(Az), batch_dims) > tolerance):
            raise ValueError("left_nullspace: expected vectors y with A^H y = 0, got some for which it is not")
        for name, off in (("nullspace", off_right), ("left_nullspace", off_left)):
            once = off(z)
            if any_true(precise_norm(off(once) - once, batch_dims) > torch.finfo(like.dtype).eps ** 0.5 * norm_z):
                raise ValueError(f"{name}: expected a projection P with P P = P, got a function that is none")


def mismatched(
    space: Space, A: Callable[[Tensor], Tensor], A_adjoint: Callable[[Tensor], Tensor], x: Tensor, r: Tensor
) -> Tensor:
    """Where `A_adjoint` is not the adjoint of `A`, because `r^H A x` differs from `(A^H r)^H x`."""
    Ax, s = A(x), A_adjoint(r)
    error = (_wide(space.real_dot(r, Ax), r) - _wide(space.real_dot(s, x), r)).abs()
    k = space.batch_dims
    size = precise_norm(r, k) * precise_norm(Ax, k) + precise_norm(s, k) * precise_norm(x, k)
    return error > SYMMETRY_SLACK * torch.finfo(r.dtype).eps * size


def _outside_range_of_small(
    A: Callable[[Tensor], Tensor], b: Tensor, threshold: Tensor, failed: Tensor, batch_dims: int
) -> Tensor:
    """Where a failed system has a part of `b` outside the range of `A`, from the singular values of its `n` columns.

    `A = U S V^H`, and the columns `U_0` of `U` whose singular values vanish beside the largest span the null space of `A^H`.
    `|U_0^H b|` tells, where it exceeds the tolerance and the rounding of `b = A y` for the shortest `y` that fits the rest.
    """
    eps, flat = torch.finfo(b.dtype).eps, flatten(b, batch_dims)
    chosen: Any = ... if is_wrapped(failed) else failed  # under torch.vmap nothing can be selected
    wide = torch.complex128 if b.is_complex() else torch.float64
    eye = torch.eye(flat.shape[-1], dtype=b.dtype, device=b.device)
    units = ((torch.zeros_like(flat) + e).reshape(b.shape) for e in eye)
    matrix = torch.stack([flatten(A(unit), batch_dims)[chosen] for unit in units], dim=-1).to(wide)
    finite = torch.isfinite(matrix).all(-1).all(-1)
    U, sigma, _ = torch.linalg.svd(torch.where(finite[..., None, None], matrix, eye.to(wide)))
    parts = (U.mH @ flat[chosen].to(wide).unsqueeze(-1)).squeeze(-1).abs()
    null = sigma <= NULL_SLACK * eps * sigma[..., :1]
    norm_y = torch.where(null, 0.0, parts / torch.where(null, 1.0, sigma)).norm(dim=-1)
    noise = NULL_SLACK * eps * (parts.norm(dim=-1) + sigma[..., 0] * norm_y)
    outside = torch.where(null, parts, 0.0).norm(dim=-1) > torch.maximum(threshold[chosen], noise)
    found = torch.zeros_like(failed)
    found[chosen] = outside & finite
    return found & failed


def _outside_range(
    space: Space,
    A: Callable[[Tensor], Tensor],
    A_adjoint: Callable[[Tensor], Tensor],
    u: Tensor,
    r: Tensor,
    norm_A: Tensor,
    noise: Tensor,
    failed: Tensor,
    exhausted: Tensor,
    steps: int,
) -> Tensor:
    """Where a failed system has a part of `u = b / |b|`, larger than `noise`, outside the range of `A`.

    A least-squares solution has a residual `q` with `A^H q = 0`, and `A^H q = 0` with `q^H u != 0` is the proof. So some
    steps of conjugate gradients on the normal equations (Hestenes & Stiefel 1952; Björck 1996, section 7.4), begun at
    `q = r`, take from `q` what `A` can reach; of the solution nothing is kept. Every vector is near 1 in size:

        s = A^H q,   p = s / |s| + (|s| / |s_old|) p,   w = A p / |A p|,   q = q - (w^H q) w
    """
    batch_dims, eps = space.batch_dims, torch.finfo(u.dtype).eps
    q, _ = _unit(r, batch_dims)
    p, norm_old, found = torch.zeros_like(q), torch.ones_like(norm_A), torch.zeros_like(failed)
    for step in range(steps + 1):
        s, norm_s = _unit(A_adjoint(q), batch_dims)
        norm_q = precise_norm(q, batch_dims)
        null = norm_s <= NULL_SLACK * eps * norm_A * norm_q
        found = found | (failed & null & (_wide(abs(space.dot(q, u)), u) > noise * norm_q))
        if step == steps or not space.any(failed & exhausted & ~null & (norm_q > eps)):
            return found
        p = s + times(norm_s / norm_old, p)
        w, norm_w = _unit(A(p), batch_dims)
        norm_A = torch.maximum(norm_A, norm_w / precise_norm(p, batch_dims))
        q, norm_old = space.axpy(-space.dot(w, q), w, q), norm_s
    return found


def dimension(b: Tensor, batch_dims: int) -> int:
    """The number of unknowns of each system."""
    return math.prod(b.shape[batch_dims:])


def _wide(scalar: Any, like: Tensor) -> Tensor:
    """A scalar of either space as a float64 tensor on the device of `like`."""
    return torch.as_tensor(scalar, dtype=torch.float64, device=like.device)


def _unit(x: Tensor, batch_dims: int) -> tuple[Tensor, Tensor]:
    """`x / |x|`, zero for a zero `x`, and `|x|`."""
    norm = precise_norm(x, batch_dims)
    size = torch.where(norm > 0, norm, 1.0)
    return divide(x, size), norm


def enforce(on_failure: str, phase: str, x: Any, info: SolveInfo) -> None:
    """Apply the failure policy to a solve of which some system has not converged.

    Raises:
        ConvergenceError: for `on_failure="raise"`.
    """
    if on_failure == "ignore":
        return
    text = _describe(phase, info)
    if on_failure == "warn":
        warnings.warn(text, ConvergenceWarning, stacklevel=outside())
        return
    raise ConvergenceError(text, x, info)


def outside() -> int:
    """The `stacklevel` at which a warning of the function that asks names the line that called the library, or autograd."""
    within, level = (__name__.split(".")[0], "torch", "contextlib"), 2
    frame = sys._getframe(level)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] in within:
        frame, level = frame.f_back, level + 1
    return level


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
