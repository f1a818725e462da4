"""What a solve applies: the functions of one problem, bound to its tensors, counted and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adjoint import Transpose, pull_back
from .arguments import check_result
from .closure import Bound
from .problem import Problem
from .vectors import Space, any_true, divide, largest_entry

Function = Callable[[Tensor], Tensor]


class Counted:
    """An application of `A`, `A^H` or `M` that counts itself and checks what the user's function returns."""

    def __init__(self, name: str, apply: Function, like: Tensor | None = None) -> None:
        self.name, self.function, self.like, self.count = name, apply, like, 0
        self.bound: Bound | Transpose | None = apply if isinstance(apply, Bound | Transpose) else None

    def __call__(self, v: Tensor) -> Tensor:
        """The image of `v`."""
        self.count += 1
        y, due = self.function(v), v if self.like is None else self.like
        if type(y) is not type(due) or y.shape != due.shape or y.dtype != due.dtype or y.device != due.device:
            check_result(self.name, v, y, due)
        if self.count == 1 and isinstance(self.bound, Bound):
            self.function = self.bound.alone() or self.function
        return y

    def alone(self) -> Function | None:
        """A function of the user's tensors themselves, where the first call has shown that nothing has to take their place."""
        return None if self.bound is None else self.bound.alone()


@dataclass(eq=False)
class Operands:
    """The functions of a problem, for one choice of its tensors; of a transposed problem, those of `A^H`.

    Attributes:
        A: `v -> A v`.
        adjoint: `u -> A^H u`, for a least-squares method; else None.
        M: the preconditioner of this side, or None.
        inverse: `r -> A^{-1} r` to rounding, where the structure of the operator gives it; else None.
        matrix: the dense matrix of `A`, where it is one; else None.
        off_left, off_right: of a singular system, the projections onto the complements of the nullspaces of `A^H` and of `A`;
            else the identity.
    """

    A: Counted
    adjoint: Counted | None
    M: Counted | None
    inverse: Counted | None
    matrix: Tensor | None
    off_left: Function
    off_right: Function

    @classmethod
    def of(cls, problem: Problem, b: Tensor, given: Sequence[Tensor], unroll: bool = False) -> Operands:
        """Bind the closures to the given tensors, for right-hand sides like `b`."""
        parts = problem.split(given)

        def bound(name: str) -> Function | None:
            return problem.closures[name].bind(parts[name]) if name in parts else None

        method, transposed = problem.options.method, problem.transposed
        hermitian = problem.hermitian or method.hermitian
        plain, zero = problem.operator.bind(parts["operator"]), domain_zero(problem, b)
        turned: Function | None = None
        if not hermitian and (transposed or method.least_squares):
            if unroll:  # so that autograd can follow it
                turned = lambda u: pull_back(plain, u, zero.clone())  # noqa: E731
            else:
                turned = bound("operator_adjoint") or Transpose(plain, zero)
        name = "A" if problem.operator_adjoint is None else "adjoint"
        A = Counted(
            name if transposed and turned is not None else "A", turned if transposed and turned is not None else plain, b
        )
        adjoint: Counted | None = None
        if method.least_squares:
            solution = problem.solution_layout.zero(b, problem.batch_dims)
            adjoint = A if turned is None else Counted("A" if transposed else name, plain if transposed else turned, solution)

        M = bound("preconditioner")
        if transposed and problem.adjoint_preconditioner is not None:
            M = bound("adjoint_preconditioner")
        elif M is not None and transposed and not hermitian:
            M = bound("preconditioner_adjoint") or Transpose(M, b)
        inverse = bound("inverse_adjoint" if transposed else "inverse")
        matrix = problem.operator.matrix(parts["operator"])
        left, right = _complement(bound("left_nullspace")), _complement(bound("nullspace"))
        return cls(
            A=A,
            adjoint=adjoint,
            M=None if M is None else Counted("M", M),
            inverse=None if inverse is None else Counted("A.factorise()", inverse),
            matrix=matrix.mH if matrix is not None and transposed else matrix,
            off_left=right if transposed else left,
            off_right=left if transposed else right,
        )

    def precondition_within(self, problem: Problem) -> Function | None:
        """The preconditioner, between the complements of the nullspaces."""
        M, left, right = self.M, self.off_left, self.off_right
        return M if M is None or problem.nullspace is None else lambda r: right(M(left(r)))

    def counts(self, problem: Problem, diagnosis: Counted | None) -> tuple[int, int]:
        """Applications of the user's `A` and of its adjoint, those of a diagnosis by the adjoint included."""
        recorded = 0 if problem.derived else problem.recordings
        other = self.adjoint or diagnosis
        if other is self.A or problem.hermitian or problem.options.method.hermitian:
            return self.A.count + recorded, 0
        transposes = int(problem.operator_adjoint is None)
        if problem.transposed:
            return transposes + (0 if other is None else other.count), self.A.count
        return self.A.count + recorded + (0 if other is None else transposes), 0 if other is None else other.count


def _complement(project: Function | None) -> Function:
    """`v -> v - P v`; the identity without a `P`."""
    return (lambda v: v) if project is None else lambda v: v - project(v)


def domain_zero(problem: Problem, b: Tensor) -> Tensor:
    """The zero vector of the domain of the user's `A`, for a right-hand side of this problem, whichever way it goes."""
    return torch.zeros_like(b) if problem.transposed else problem.solution_layout.zero(b, problem.batch_dims)


def adjoint_or_none(problem: Problem, like: Tensor, given: Sequence[Tensor]) -> Counted | None:
    """The adjoint of the operator that is being solved with, or None for code that autograd cannot see into."""
    try:
        return Operands.of(problem.H, problem.solution_layout.zero(like, problem.batch_dims), given).A
    except (RuntimeError, TypeError):
        return None


class Rescaled:
    """`v -> A v / s` with a power of two `s` near `|A|`, where products of squares would leave the range of the dtype.

    A Krylov method's iterates for `(A / s) d' = r` and for `A d = r` are the same but for `d = d' / s`; so an operator of
    size 1e-30 in float32 is solved as well as one of size 1. For ordinary sizes `s = 1`, and nothing is done.
    """

    def __init__(self, A: Function, adjoint: Function | None, space: Space) -> None:
        self.A, self.A_adjoint, self.batch_dims = A, adjoint, space.batch_dims
        self.size: Tensor | None = None
        self.ordinary = False

    def __call__(self, v: Tensor) -> Tensor:
        """`A v / s`."""
        y = self.A(v)
        return y if self.ordinary else self._divided(y, v)

    def adjoint(self, u: Tensor) -> Tensor:
        """`A^H u / s`."""
        assert self.A_adjoint is not None
        s = self.A_adjoint(u)
        return s if self.ordinary else self._divided(s, u)

    def _divided(self, y: Tensor, v: Tensor) -> Tensor:
        if self.size is None:
            image, entry = (largest_entry(t.detach(), self.batch_dims) for t in (y, v))
            ratio = image / entry
            # conjugate gradients on the normal equations square what has been multiplied by A twice
            limit = torch.finfo(v.dtype).tiny ** (-0.25 if self.A_adjoint is None else -0.125)
            extreme = torch.isfinite(ratio) & (ratio > 0) & ((ratio > limit) | (ratio < 1 / limit))
            self.size = torch.where(extreme, torch.exp2(torch.log2(torch.where(extreme, ratio, 1.0)).round()), 1.0)
            self.ordinary = not any_true(extreme)
        return y if self.ordinary else divide(y, self.size)

    def restore(self, d: Tensor) -> Tensor:
        """The correction for `A` of one for `A / s`."""
        return d if self.ordinary or self.size is None else divide(d, self.size)
