"""What is asked: operator, right-hand side, preconditioner, tolerances, beside the tensors that travel on their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .adjoint import pull_back
from .closure import Closure
from .info import SolveInfo
from .methods.base import Method
from .vectors import Layout


@dataclass(frozen=True, eq=False)
class Options:
    """How one of the two solves, the forward or the adjoint one, is to be done."""

    method: Method[Any]
    rtol: float
    atol: float
    maxiter: int
    on_failure: str


@dataclass(frozen=True, eq=False)
class Problem:
    """A linear system without its numbers: everything that a solve needs beside the tensors.

    The tensors travel beside it, so that autograd and `torch.func` see them: `given` holds one tensor for each one
    recorded by the five closures, in their order.

    Attributes:
        operator: `v -> A v`.
        operator_adjoint: the user's `v -> A^H v`, or None to derive it.
        preconditioner: `r -> M r`, or None.
        preconditioner_adjoint: the user's `r -> M^H r`, or None to derive it.
        adjoint_preconditioner: the approximate inverse of `A^H` of `adjoint=dict(M=...)`, or None.
        hermitian: whether `A` is claimed Hermitian.
        positive_definite: whether it is claimed positive definite.
        batch_dims: the number of leading dimensions that count systems.
        forward, adjoint: how to solve with `A` and with `A^H`.
        transposed: whether this problem is one with `A^H`.
        recordings: products that recording the operator has cost already.
        derived: whether it comes from a derivative rather than from the user.
        known: whether the guess is the solution already, which only has to be attached to the graph.
        user_adjoint: whether the adjoint rests on a function of the user.
        layout: how the user's tree lies in a vector.
        records: where the record of the solve is left.
        adjoint_records: where the record of the adjoint solve will be left.
    """

    operator: Closure
    operator_adjoint: Closure | None
    preconditioner: Closure | None
    preconditioner_adjoint: Closure | None
    adjoint_preconditioner: Closure | None
    hermitian: bool
    positive_definite: bool
    batch_dims: int
    forward: Options
    adjoint: Options
    layout: Layout
    callback: Callable[[Any], Any] | None = None
    progress: bool = False
    history: bool = False
    transposed: bool = False
    derived: bool = False
    known: bool = False
    user_adjoint: bool = False
    recordings: int = 0
    records: list[SolveInfo] = field(default_factory=list)
    adjoint_records: list[SolveInfo] = field(default_factory=list)

    @property
    def options(self) -> Options:
        """The options of this solve."""
        return self.adjoint if self.transposed else self.forward

    @property
    def phase(self) -> str:
        """`"forward"` or `"adjoint"`."""
        return "adjoint" if self.transposed else "forward"

    @property
    def H(self) -> Problem:
        """The adjoint problem, `A^H y = c`."""
        records = [] if self.transposed else self.adjoint_records
        return replace(self, transposed=not self.transposed, derived=True, records=records, adjoint_records=[])

    @property
    def tangent(self) -> Problem:
        """The same problem for another right-hand side, as forward-mode derivatives ask it."""
        return replace(self, derived=True, history=False, records=[], adjoint_records=[])

    # -- the tensors -----------------------------------------------------------------------------------------------

    @property
    def closures(self) -> tuple[Closure | None, ...]:
        """The five closures, in the order of `given`; the first one alone has derivatives."""
        return (
            self.operator,
            self.operator_adjoint,
            self.preconditioner,
            self.preconditioner_adjoint,
            self.adjoint_preconditioner,
        )

    @property
    def recorded(self) -> tuple[Tensor, ...]:
        """The tensors of all closures, those of the operator first."""
        return tuple(t for closure in self.closures if closure is not None for t in closure.recorded)

    def split(self, given: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """The part of `given` that belongs to each closure."""
        parts, start = [], 0
        for closure in self.closures:
            count = 0 if closure is None else len(closure.recorded)
            parts.append(tuple(given[start : start + count]))
            start += count
        return parts

    def vmapped(self, in_dims: Sequence[int | None]) -> Problem:
        """The problem with one more, leading, batch dimension; `in_dims[i]` is 0 where `given[i]` has it, else None."""
        parts: list[Any] = []
        start = 0
        for closure in self.closures:
            count = 0 if closure is None else len(closure.recorded)
            parts.append(None if closure is None else closure.vmapped(in_dims[start : start + count]))
            start += count
        return replace(
            self,
            operator=parts[0],
            operator_adjoint=parts[1],
            preconditioner=parts[2],
            preconditioner_adjoint=parts[3],
            adjoint_preconditioner=parts[4],
            batch_dims=self.batch_dims + 1,
        )

    def differentiable_apply(self, v: Tensor, given: Sequence[Tensor]) -> Tensor:
        """`A v` (or `A^H v`, transposed) as a function that autograd can differentiate again.

        The adjoint is always derived from `A` itself here, whatever the user supplied or claimed for speed, so that the
        second derivative is right also along directions in which a claim no longer holds.
        """
        operator_given = self.split(given)[0]
        if not self.transposed:
            return self.operator.apply(v, operator_given)
        return pull_back(lambda z: self.operator.apply(z, operator_given), v)
