"""What a solve reports: `SolveInfo`, its `Status`, and the error and the warning that carry them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Status(IntEnum):
    """Why a solve ended. Each member's `message` says in one sentence what happened and what to try."""

    CONVERGED = 0
    LEAST_SQUARES = 1
    MAXITER = 2
    STAGNATED = 3
    BREAKDOWN = 4
    INDEFINITE = 5
    NOT_HERMITIAN = 6
    INCONSISTENT = 7
    NONFINITE = 8
    STOPPED = 9
    ILL_CONDITIONED = 10

    @property
    def message(self) -> str:
        """One sentence: what happened, and what to try."""
        return _MESSAGES[self]

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return format(int(self), spec) if spec[-1:] in ("d", "x", "b") else format(self.name, spec)


_MESSAGES = {
    Status.CONVERGED: "The recomputed residual meets the tolerance.",
    Status.LEAST_SQUARES: "The residual cannot become smaller, and a least-squares solution was found.",
    Status.MAXITER: "The iteration limit was reached before the tolerance: raise maxiter, loosen rtol, or give a "
    "preconditioner M.",
    Status.STAGNATED: "The true residual stopped falling above the tolerance: loosen rtol, use a wider dtype, or give "
    "a preconditioner M; and if A may not be linear (a bias, an in-place operation, noise), look at "
    "check_operator(A, b).",
    Status.BREAKDOWN: "The method met a zero denominator that a restart did not remove: the operator may be singular; "
    "try method='gmres', or method='minres' if it is Hermitian, give its nullspace=, or ask for the shortest least-squares "
    "solution (lstsq).",
    Status.INDEFINITE: "A direction of non-positive curvature was met, so the operator or the preconditioner M is not "
    "positive definite: try method='minres' (Hermitian) or 'gmres', and check the sign of M.",
    Status.NOT_HERMITIAN: "The operator is not Hermitian as the method or the claim requires, or the adjoint= that was given "
    "is not its adjoint: try method='gmres' or 'bicgstab' without the claim, leave adjoint= out, or look at "
    "check_operator(A, b).",
    Status.INCONSISTENT: "The operator is singular and its right-hand side has a part outside its range, so that no "
    "solution exists: take that part away, give the nullspaces (nullspace=), or solve the least-squares problem (lstsq).",
    Status.NONFINITE: "NaN or Inf was met in b, in x0, or in what A or M returned: look at the inputs and at A.",
    Status.STOPPED: "The callback asked to stop before the tolerance was met.",
    Status.ILL_CONDITIONED: "The condition number of A has reached the reciprocal of the roundoff, beyond which no digit of a "
    "least-squares solution is right: give damp, use a wider dtype, or a preconditioner M.",
}


class Column:
    """What stands where in a report, a float64 tensor of shape `(*batch, Column.COUNT)`."""

    STATUS, ITERATIONS, RESIDUAL, RELATIVE, MATVECS, RMATVECS, NORM_R, NORM_AR, NORM_A, COND_A, NORM_X, DUAL = range(12)
    COUNT = 12


@dataclass(repr=False, eq=False)
class SolveInfo:
    """The record of one solve.

    For a single system the fields are Python numbers. For a batch (`batch_dims`, leading dimensions of a Tensor `A`,
    or `torch.vmap`) they are tensors of the batch shape.

    Attributes:
        converged: whether the recomputed residual meets `max(rtol |b|, atol)`; in `lstsq` also where `LEAST_SQUARES` was met.
        status: a `Status`; for a batch an integer tensor of `Status` values.
        iterations: steps of the method (GMRES counts inner steps).
        residual_norm: the recomputed `|b - A x|`.
        relative_residual: `residual_norm / |b|`; 0 where `b` and the residual are both zero.
        matvecs: applications of `A` in this solve, the recording run and the certificate included.
        rmatvecs: applications of the adjoint of `A` in this solve.
        method: the method's lower-case name.
        history: with `history=True`, the method's residual norms, a float64 tensor of shape
            `(iterations + 1, *batch)` that begins with the initial one; else None.
        norm_r: of a least-squares solve, the recomputed norm of all that is minimised, `sqrt(|b - A x|^2 + damp^2 |x|^2)`.
            Where there are weights every norm of a residual has them, and the damping is of `x - x_ref`.
        norm_Ar: the recomputed `|A^H (b - A x) - damp^2 x|`, which vanishes at the solution.
        norm_A: an estimate of `|A|` (with its damping), near the Frobenius norm.
        cond_A: an estimate of the condition number from below; 0 where the method makes none.
        norm_x: `|x|`. These five are None for a solve that is no least-squares solve.
    """

    converged: Any
    status: Any
    iterations: Any
    residual_norm: Any
    relative_residual: Any
    matvecs: Any
    rmatvecs: Any
    method: str
    history: Tensor | None = None
    norm_r: Any = None
    norm_Ar: Any = None
    norm_A: Any = None
    cond_A: Any = None
    norm_x: Any = None
    _adjoint: list[SolveInfo] = field(default_factory=list)

    @property
    def adjoint(self) -> SolveInfo | None:
        """The record of the latest adjoint solve; None until a backward pass has run."""
        return self._adjoint[-1] if self._adjoint else None

    @property
    def message(self) -> str:
        """What happened and what to try; for a batch, one line for each status that occurs."""
        if not isinstance(self.status, Tensor):
            return str(self.status.message)
        counts = torch.bincount(self.status.reshape(-1), minlength=len(Status)).tolist()
        return "\n".join(f"{n} x {s.name}: {s.message}" for s, n in zip(Status, counts, strict=True) if n)

    def __repr__(self) -> str:
        if isinstance(self.status, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(self.status):
            return f"SolveInfo(method={self.method!r}, of a batch of torch.vmap)"  # its tensors do not outlive the transform
        if isinstance(self.status, Tensor):
            return f"SolveInfo(method={self.method!r}, converged={self.converged}, status={self.status})"
        return (
            f"SolveInfo({self.status.name}, method={self.method!r}, iterations={self.iterations}, "
            f"relative_residual={self.relative_residual:.3e}, matvecs={self.matvecs}, rmatvecs={self.rmatvecs})"
        )


def converged(status: Any, least_squares: bool) -> Any:
    """Where a solve has reached what was asked; a least-squares solution counts where one was."""
    return (status == Status.CONVERGED) | (least_squares & (status == Status.LEAST_SQUARES))


def read_report(
    report: Tensor, history: Tensor | None, method: str, adjoint: list[SolveInfo], mapped: bool, least_squares: bool = False
) -> SolveInfo:
    """The `SolveInfo` of a report tensor of shape `(*batch, Column.COUNT)`; `mapped` says that `torch.vmap` owns the batch."""
    fields: dict[str, Any] = {"method": method, "history": history, "_adjoint": adjoint}
    single = report.ndim == 1 and not mapped
    columns = report.tolist() if single else report.unbind(-1)
    code, iterations, norm, relative, matvecs, rmatvecs, *norms, _ = columns
    status: Any = Status(int(code)) if single else code.long()
    iterations, matvecs, rmatvecs = (int(c) if single else c.long() for c in (iterations, matvecs, rmatvecs))
    if least_squares:
        fields |= dict(zip(("norm_r", "norm_Ar", "norm_A", "cond_A", "norm_x"), norms, strict=True))
    return SolveInfo(converged(status, least_squares), status, iterations, norm, relative, matvecs, rmatvecs, **fields)


class ConvergenceError(torch.linalg.LinAlgError):  # type: ignore[name-defined]
    """A solve did not reach its tolerance.

    Attributes:
        x: the iterate that was reached, with the shape and structure of the solution, detached.
        info: the `SolveInfo`.
    """

    def __init__(self, message: str, x: Any = None, info: SolveInfo | None = None) -> None:
        super().__init__(message)
        self.x = x
        self.info = info


class CompileWarning(UserWarning):
    """A solve that was to be compiled, `compile=True`, runs eagerly; the text says why."""


class ConvergenceWarning(UserWarning):
    """A solve did not reach its tolerance, and `on_failure="warn"` asked to go on."""
