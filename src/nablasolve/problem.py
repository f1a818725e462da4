"""What is asked: operator, right-hand side, preconditioner, tolerances, beside the tensors that travel on their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from .adjoint import pull_back
from .closure import Closure
from .info import SolveInfo
from .methods.base import Method
from .vectors import Layout

T = TypeVar("T")

CLOSURES = (
    "operator",
    "operator_adjoint",
    "preconditioner",
    "preconditioner_adjoint",
    "adjoint_preconditioner",
    "inverse",
    "inverse_adjoint",
    "nullspace",
    "left_nullspace",
)


@dataclass(frozen=True, eq=False)
class Options:
    """How one of the two solves, the forward or the adjoint one, is to be done."""

    method: Method[Any]
    rtol: float
    atol: float
    maxiter: int
    on_failure: str
    fallback: Method[Any] | None = None  # for a direct method that was chosen, not asked for: what goes on where it fails


@dataclass(frozen=True, eq=False)
class Problem:
    """A linear system or least-squares problem without its numbers: everything that a solve needs beside the tensors.

    The tensors travel beside it, so that autograd and `torch.func` see them: `given` holds one tensor for each one
    recorded by the closures, in their order.

    Attributes:
        operator: `v -> A v`.
        operator_adjoint: the user's `v -> A^H v`, or None to derive it.
        preconditioner: `r -> M r`, or None.
        preconditioner_adjoint: the user's `r -> M^H r`, or None to derive it.
        adjoint_preconditioner: the approximate inverse of `A^H` of `adjoint=dict(M=...)`, or None.
        inverse, inverse_adjoint: `r -> A^{-1} r` and `r -> A^{-H} r` to rounding, where a structure gives them, or None.
        nullspace, left_nullspace: the orthogonal projections onto the nullspaces of `A` and of `A^H`, of a square singular
            system whose nullspaces are given; else None.
        least_squares: whether `min |A x - b|` is asked, with the minimum-norm `x`, rather than `A x = b`.
        injective: whether `A x = 0` is known to hold for `x = 0` only, near the given tensors too.
        onto: whether `A` is known to reach every `b`, likewise.
        data: how many entries of `b`, the first ones, are data; those after them belong to a damping.
        dual: whether the `q` with `x = A^H q` is wanted, where the method finds it on its way.
        guessed: whether the solution of a least-squares problem may have kept a part of a guess in the nullspace of `A`.
        hermitian: whether `A` is claimed Hermitian.
        positive_definite: whether it is claimed positive definite.
        batch_dims: the number of leading dimensions that count systems.
        forward, adjoint: how to solve with `A` and with `A^H`.
        transposed: whether this problem is one with `A^H`.
        recordings: products that recording the operator has cost already.
        derived: whether it comes from a derivative rather than from the user.
        known: whether the guess is the solution already, which only has to be attached to the graph.
        user_adjoint: whether the adjoint rests on a function of the user.
        linear: whether `A` is known to be linear, as it is not if it is a function of the user.
        layout: how the user's right-hand side lies in a vector.
        solution_layout: how the solution does.
        records: where the record of the solve is left.
        adjoint_records: where the record of the adjoint solve will be left.
    """

    operator: Closure
    operator_adjoint: Closure | None
    preconditioner: Closure | None
    preconditioner_adjoint: Closure | None
    adjoint_preconditioner: Closure | None
    inverse: Closure | None
    inverse_adjoint: Closure | None
    nullspace: Closure | None
    left_nullspace: Closure | None
    hermitian: bool
    positive_definite: bool
    batch_dims: int
    forward: Options
    adjoint: Options
    layout: Layout
    solution_layout: Layout
    least_squares: bool = False
    injective: bool = True
    onto: bool = True
    data: int | None = None
    dual: bool = False
    guessed: bool = False
    callback: Callable[[Any], Any] | None = None
    progress: bool = False
    history: bool = False
    check_every: int | None = None
    compile: bool = False
    transposed: bool = False
    derived: bool = False
    known: bool = False
    user_adjoint: bool = False
    linear: bool = False
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
        return replace(
            self,
            transposed=not self.transposed,
            derived=True,
            records=[] if self.transposed else self.adjoint_records,
            adjoint_records=[],
            layout=self.solution_layout,
            solution_layout=self.layout,
            injective=self.onto,
            onto=self.injective,
            data=None,
            dual=False,
        )

    def solved_by(self, method: Method[Any]) -> Problem:
        """The same problem for another method."""
        forward, adjoint = (replace(options, method=method, fallback=None) for options in (self.forward, self.adjoint))
        return replace(self, forward=forward, adjoint=adjoint, inverse=None, inverse_adjoint=None)

    @property
    def tangent(self) -> Problem:
        """The same problem for another right-hand side, as derivatives ask it: whose failure is that of a derivative."""
        forward = replace(self.forward, on_failure=self.adjoint.on_failure)
        return replace(self, forward=forward, derived=True, history=False, records=[], adjoint_records=[], dual=False)

    # -- the tensors -----------------------------------------------------------------------------------------------

    @property
    def closures(self) -> dict[str, Closure]:
        """The closures that there are, by name, in the order of `given`; the operator alone has derivatives."""
        named = {name: getattr(self, name) for name in CLOSURES}
        return {name: closure for name, closure in named.items() if closure is not None}

    @property
    def recorded(self) -> tuple[Tensor, ...]:
        """The tensors of all closures, those of the operator first."""
        return tuple(t for closure in self.closures.values() for t in closure.recorded)

    def split(self, given: Sequence[T]) -> dict[str, Sequence[T]]:
        """The part of `given` that belongs to each closure."""
        parts, start = {}, 0
        for name, closure in self.closures.items():
            parts[name] = given[start : start + len(closure.recorded)]
            start += len(closure.recorded)
        return parts

    def vmapped(self, in_dims: Sequence[int | None]) -> Problem:
        """The problem with one more, leading, batch dimension; `in_dims[i]` is 0 where `given[i]` has it, else None."""
        dims = self.split(in_dims)
        mapped: dict[str, Any] = {name: closure.vmapped(dims[name]) for name, closure in self.closures.items()}
        return replace(self, **mapped, batch_dims=self.batch_dims + 1)

    def differentiable_apply(self, v: Tensor, given: Sequence[Tensor]) -> Tensor:
        """`A v` (or `A^H v`, transposed) as a function that autograd can differentiate again.

        The adjoint is always derived from `A` itself here, whatever the user supplied or claimed for speed, so that the
        second derivative is right also along directions in which a claim no longer holds.
        """
        operator_given = self.split(given)["operator"]
        if not self.transposed:
            return self.operator.apply(v, operator_given)
        zero = self.layout.zero(v, self.batch_dims)  # of the domain of A, in which the right-hand side of this problem lies
        return pull_back(lambda z: self.operator.apply(z, operator_given), v, zero)
