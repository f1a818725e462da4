"""What a method is: `init`, `step` and `solution` on a correction equation, and nothing else.

A method never sees the user's problem. It solves the *correction equation* `A d = r` from `d = 0`, where `|r| = 1`
(or `r = 0`, for a system of a batch that is already solved), until `|r - A d| <= target`. The loop in `drive.py`
scales, restarts, certifies and stops; so every method is free of scales, of initial guesses and of policies.

A *least-squares* method solves `min |r - A d|` for an `A` of any shape, with the minimum-norm `d` where several do it. It is
given `A^H` as well, and its state estimates `|A^H (r - A d)|` and `|A|`, on which the loop stops where `r` cannot be reached.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from ..vectors import Scalar, Space

# The status of a system while the method runs; the public `Status` values are what ends it.
RUNNING = -1
CLAIMED = -2  # the method's own residual meets the target: to be certified
CYCLE_END = -3  # a restarted method has filled its basis


@dataclass(eq=False)
class Correction:
    """The equation `A d = rhs`, `|rhs| = 1`, that a method solves from `d = 0`.

    Attributes:
        space: kernels for the vectors.
        apply: `v -> A v`. Its result is read, never written to, and valid until the next call.
        preconditioner: `r -> M r ≈ A^{-1} r`, or None. The same holds for its result.
        rhs: the right-hand side; the method owns it.
        target: the method stops when its residual norm is this small; one scalar a system.
        steps: the largest number of steps that the loop will ask for.
        matrix: the dense matrix of `A`, where `A` is one; else None.
        kept: what an earlier solve with the same `A` or its adjoint left (`Method.keep`).
        adjoint_of_kept: whether `kept` belongs to the adjoint of `A`.
        inverse: `r -> A^{-1} r` to rounding, where the structure of `A` gives it; else None.
        adjoint: `u -> A^H u`, for a least-squares method; else None.
        left_preconditioner: for a consistent least-squares problem, `r -> M r`, in whose norm the residual is measured; else
            None. (Here `preconditioner` is one of the domain, `M s ≈ (A^H A)^{-1} s`. Both are Hermitian positive definite.)
        dual: whether a least-squares method is to find the `q` with `d = A^H q` as well.
        epsilon: the distance from 1 to the next number of the vectors' dtype.
        rounding: how far rounding moves a quantity of size 1 that a few operations on vectors have built.
    """

    space: Space
    apply: Callable[[Tensor], Tensor]
    preconditioner: Callable[[Tensor], Tensor] | None
    rhs: Tensor
    target: Scalar
    steps: int
    matrix: Tensor | None = None
    kept: tuple[Tensor, ...] = ()
    adjoint_of_kept: bool = False
    inverse: Callable[[Tensor], Tensor] | None = None
    adjoint: Callable[[Tensor], Tensor] | None = None
    left_preconditioner: Callable[[Tensor], Tensor] | None = None
    dual: bool = False
    epsilon: float = field(init=False)
    rounding: float = field(init=False)

    def precondition(self, r: Tensor) -> Tensor:
        """`M r`, or `r` itself where there is no preconditioner."""
        return r if self.preconditioner is None else self.preconditioner(r)

    def __post_init__(self) -> None:
        self.epsilon = torch.finfo(self.rhs.dtype).eps
        self.rounding = 10 * self.epsilon


@dataclass(eq=False)
class State:
    """What every method's state holds: its equation, its residual norm and the status of each system."""

    problem: Correction
    residual_norm: Scalar
    status: Scalar
    _asked: Scalar | None = field(default=None, init=False, repr=False)
    _running: Scalar = field(default=False, init=False, repr=False)

    @property
    def running(self) -> Scalar:
        """Which systems still run."""
        if self._asked is not self.status:  # it is asked often, and changes seldom
            self._asked, self._running = self.status, self.status == RUNNING
        return self._running

    def stop(self, status: int, condition: Scalar) -> None:
        """Give the systems that still run and meet the condition their status; their solution is frozen from here."""
        if condition is not False:  # as it mostly is for one system on the host
            self.status = self.problem.space.where(self.running & condition, status, self.status)

    def ratio(self, numerator: Scalar, denominator: Scalar) -> Scalar:
        """`numerator / denominator`; 0 for a zero denominator and for every system that has stopped."""
        return self.problem.space.ratio(numerator, denominator, self.running)


@dataclass(eq=False)
class LeastSquaresState(State):
    """What the state of every least-squares method holds beside: the estimates that its stopping rests on.

    Attributes:
        normal_norm: `|A^H (r - A d)|`; infinite for a method that solves consistent systems only.
        norm_A: `|A|`, from below in the Frobenius norm.
        cond_A: the condition number of `A` on the subspace that was searched, from below; 0 where the method has none.
    """

    normal_norm: Scalar
    norm_A: Scalar
    cond_A: Scalar


S = TypeVar("S", bound=State)


class Method(ABC, Generic[S]):
    """A Krylov or direct method: a frozen dataclass of its options.

    Class attributes:
        name: the lower-case public name.
        hermitian: whether asking for the method claims that `A` is Hermitian.
        positive_definite: whether it claims that `A` is Hermitian positive definite.
        least_squares: whether it solves least-squares problems, and its state is a `LeastSquaresState`.
        direct: whether it factorises rather than iterates.
        steady: whether every step is the same computation on vectors and scalars, so that it can be compiled as one.
    """

    name: ClassVar[str]
    hermitian: ClassVar[bool] = False
    positive_definite: ClassVar[bool] = False
    least_squares: ClassVar[bool] = False
    direct: ClassVar[bool] = False
    steady: ClassVar[bool] = True

    @abstractmethod
    def init(self, problem: Correction) -> S:
        """The state before the first step."""

    @abstractmethod
    def step(self, state: S) -> S:
        """One step; `state.residual_norm` is the method's own residual norm afterwards."""

    @abstractmethod
    def solution(self, state: S) -> Tensor:
        """The iterate `d` of the state, a tensor that the caller owns."""

    def direction(self, state: S) -> Tensor | None:
        """The direction in which the method met zero curvature, where it has one: perhaps a null vector of `A`."""
        return None

    def dual(self, state: S) -> Tensor | None:
        """The `q` with `d = A^H q`, a tensor that the caller owns; None where the method does not find it."""
        return None

    def keep(self, state: S) -> tuple[Tensor, ...]:
        """What this solve leaves for later ones with the same operator or its adjoint, such as a factorisation."""
        return ()


def zeros(like: Tensor) -> Tensor:
    """A zero vector that the method owns."""
    return torch.zeros_like(like, memory_format=torch.contiguous_format)


def initial_status(problem: Correction) -> tuple[Scalar, Scalar]:
    """The norm and the status of the right-hand side: a zero one is solved by zero."""
    space = problem.space
    norm = space.norm(problem.rhs)
    running = space.full(RUNNING, problem.rhs)
    return norm, space.where(norm > 0, running, CLAIMED)


def positive_integer(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
