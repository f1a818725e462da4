"""What is asked: operator, right-hand side, preconditioner, tolerances. Validated once, here."""

from __future__ import annotations

import difflib
import numbers
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .closure import Closure, transforms_active, transparent
from .info import SolveInfo
from .methods.base import Method
from .vectors import Layout

DEFAULT_RTOL = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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


def pull_back(apply: Callable[[Tensor], Tensor], v: Tensor, zero: Tensor | None = None) -> Tensor:
    """`A^H v` of a linear `apply`, itself differentiable: the vector-Jacobian product at `zero`, by default like `v`."""
    zero = torch.zeros_like(v) if zero is None else zero
    if transforms_active():
        result: Tensor = torch.func.vjp(apply, zero)[1](v)[0]
        return result
    again = torch.is_grad_enabled()
    with torch.enable_grad(), transparent():
        zero.requires_grad_()
        return _vjp(apply(zero), zero, v, create_graph=again)


def _vjp(y: Tensor, x: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    if not y.requires_grad:
        raise RuntimeError(NO_ADJOINT)
    (result,) = torch.autograd.grad(y, x, v, create_graph=create_graph, retain_graph=True, allow_unused=True)
    if result is None:
        raise RuntimeError(NO_ADJOINT)
    return result


NO_ADJOINT = (
    "The adjoint of A is needed, and autograd cannot derive it because A(v) does not depend differentiably on v. Give it: "
    "nablasolve.LinearOperator(A, adjoint=...), or claim hermitian=True if A is."
)


class Transpose:
    """`v -> A^H v`, from one recorded application of `A` and one backward pass through it a product."""

    def __init__(self, apply: Callable[[Tensor], Tensor], like: Tensor) -> None:
        with torch.enable_grad(), transparent():
            self.input = torch.zeros_like(like).requires_grad_()
            self.output = apply(self.input)

    def __call__(self, v: Tensor) -> Tensor:
        """`A^H v`."""
        return _vjp(self.output, self.input, v)


# -- validation ------------------------------------------------------------------------------------------------------


def nearest(name: str, known: Sequence[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or the list of all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def check_tolerance(name: str, value: object) -> float:
    """A tolerance as a float.

    Raises:
        TypeError: if it is not a real number.
        ValueError: if it is negative or not finite.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a non-negative number, got {type(value).__name__}")
    if not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name}: expected a non-negative number, got {value!r}")
    return float(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """One of a few strings.

    Raises:
        ValueError: naming the nearest choice.
    """
    if not isinstance(value, str) or value not in choices:
        hint = nearest(value, choices) if isinstance(value, str) else ""
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}{hint}")
    return value


def check_maxiter(name: str, value: object, default: int) -> int:
    """An iteration limit; `default` for None.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is negative.
    """
    if value is None:
        return default
    number = check_integer(name, value)
    if number < 0:
        raise ValueError(f"{name}: expected at least 0, got {number}")
    return number


def check_integer(name: str, value: object) -> int:
    """An integer of any library as an int.

    Raises:
        TypeError: if it is none.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
