"""Checks of a user's operator and of its gradient, by products with random vectors and by finite differences.

`check_operator` asks whether `A` is what a solve takes it for, `check_gradient` whether the implicit gradient is the
derivative of the solution. Both return a `CheckReport`. The random vectors come from a generator of their own: the global
random state is neither read nor changed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .arguments import names_options, nearest
from .closure import Closure, is_differentiable
from .derivative import _Cut
from .operators import LinearOperator, SparseOperator, aslinearoperator
from .operators.base import derived_adjoint
from .operators.claims import Claims
from .operators.spaces import AnyBatch, agree
from .pose import DEFAULT_RTOL, right_hand_side, square_operator, with_flat_params
from .solve import solve_ex
from .vectors import Layout, real_dtype

Tree = Any  # a tensor, or a pytree of tensors

# A product sums up to n terms of random sign. Rounding then adds about eps sqrt(n/2) to it, relative to its size; the factor
# leaves room for an A of several such steps, and the offset for the steps of a small one.
ROUNDING = 4.0
ROUNDING_OFFSET = 64

# However large n is, an error above this cannot be rounding in the dtype itself: it is the size that arithmetic in the next
# narrower format leaves (float32 inside float64: 3e-8; TF32 or float16 inside float32: 2e-4), or that of a nonlinearity.
CEILING = {torch.float64: 2.0**-30, torch.float32: 2.0**-13, torch.float16: 2.0**-5, torch.bfloat16: 2.0**-3}

# Above this no narrower format is to blame: bfloat16 leaves 4e-3.
NARROW_ARITHMETIC = 2.0**-6

# A negative factor finds `abs` and `relu`, a large one `clamp` and `tanh`, and a small one, of the size that residuals
# have towards the end of a solve, thresholds and absolute epsilons. None is a power of two, by which scaling is exact.
FACTORS = (-0.7, 23.0, 1.3e-6)

LANCZOS_STEPS = 30  # enough for the extreme eigenvalues to show their signs, where they are not tiny


# -- reports -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckItem:
    """One line of a report.

    Attributes:
        name: what was checked.
        ok: whether it holds.
        measured: the relative error that was found; None where nothing was measured.
        tolerance: the largest one that passes.
        message: what it means, and what to do where it does not hold.
        required: whether the report fails when it does not hold. A property that was not claimed is reported, not required.
    """

    name: str
    ok: bool
    measured: float | None = None
    tolerance: float | None = None
    message: str = ""
    required: bool = True

    def __str__(self) -> str:
        mark = ("ok" if self.ok else "FAIL") if self.required else ("yes" if self.ok else "no")
        numbers = ""
        if self.measured is not None and self.tolerance is not None:
            numbers = f"{self.measured:.1e} {'<=' if self.measured <= self.tolerance else '> '} {self.tolerance:.1e}"
        return f"  {mark:<4}  {self.name:<20}  {numbers:<18}  {self.message}".rstrip()


@dataclass(frozen=True)
class CheckReport:
    """What a check found: its items in the order of the checks. `report["adjoint"]` is the item of that name.

    Attributes:
        subject: what was checked.
        items: the findings.
    """

    subject: str
    items: tuple[CheckItem, ...]

    @property
    def ok(self) -> bool:
        """Whether everything that is required holds."""
        return all(item.ok for item in self.items if item.required)

    def __bool__(self) -> bool:
        return self.ok

    def __getitem__(self, name: str) -> CheckItem:
        for item in self.items:
            if item.name == name:
                return item
        raise KeyError(f"{name!r}; the report has {', '.join(repr(item.name) for item in self.items)}")

    def __contains__(self, name: str) -> bool:
        return any(item.name == name for item in self.items)

    def __str__(self) -> str:
        failed = [item.name for item in self.items if item.required and not item.ok]
        verdict = f"FAILED: {', '.join(failed)}" if failed else "ok"
        return "\n".join([f"{self.subject}: {verdict}", *map(str, self.items)])


class CheckError(RuntimeError):
    """A check failed under `raise_on_error=True`. The message is the report.

    Attributes:
        report: the `CheckReport`.
    """

    def __init__(self, report: CheckReport) -> None:
        super().__init__(str(report))
        self.report = report


def _reported(report: CheckReport, raise_on_error: bool) -> CheckReport:
    if raise_on_error and not report.ok:
        raise CheckError(report)
    return report


# -- check_operator ----------------------------------------------------------------------------------------------------


@names_options
def check_operator(
    A: Any,
    like: Tree,
    *,
    adjoint: Callable[..., Any] | None = None,
    hermitian: bool = False,
    positive_definite: bool = False,
    params: Sequence[Any] = (),
    batch_dims: int = 0,
    samples: int = 2,
    seed: int = 0,
    tolerance: float | None = None,
    raise_on_error: bool = False,
) -> CheckReport:
    """Check by products with random vectors that `A` is what a solve takes it for.

    Items of the report: `result` (structure, shape, dtype and finite values), `repeatable` (the same result for the same
    vector), `input kept` (`A` does not write into its argument), `result kept` (nor later into its result), `additivity` and
    `homogeneity`, `complex homogeneity` for a complex vector (`A(iv) = i A(v)`), `adjoint` (the dot test
    `<A x, y> = <x, A^H y>`, for the written adjoint or else for the one that autograd derives), `autograd` (the derivative of a
    given adjoint's `A` is `A`), `hermitian`, `positive definite` (the signs of Ritz values of a Lanczos process) and, with
    `batch_dims`, `batch` (systems do not mix). The last two properties of a square operator are required where they are
    claimed, and information where they are not.

    What holds for a few random vectors holds for almost all vectors, but a fault that touches a tiny part of the result, or
    an eigenvalue that is negative and very small, can go unnoticed.

    Args:
        A: a callable, `nn.Module`, Tensor, sparse Tensor or `LinearOperator`, as for `solve`; rectangular ones as well.
        like: an example of `v` (tensor or pytree). Only its structure, shapes, dtypes and devices are read.
        adjoint: `y -> A^H y`, to be checked together with `A`.
        hermitian: the claim that `A = A^H`, to be checked beside those that `A` makes itself.
        positive_definite: the claim that `A` is Hermitian positive definite.
        params: `A` is called as `A(v, *params)`.
        batch_dims: how many leading dimensions count independent systems.
        samples: how many random vectors each check takes.
        seed: of the random vectors.
        tolerance: the relative error that passes. By default the rounding error of a sum of n random terms in the
            vector's dtype, `4 eps sqrt(n + 64)`, but never more than what arithmetic in the next narrower format would
            leave. An `A` that is itself inexact, such as an inner solve, needs more.
        raise_on_error: raise instead of returning a report that is not ok.

    Returns:
        The report: `.ok`, `.items`, `report["adjoint"]`, and `print(report)`.

    Raises:
        CheckError: if something required does not hold, under `raise_on_error=True`.
        TypeError: for an argument of the wrong type or an unknown option.
        ValueError: if `like` has no floating-point or complex dtype, or `batch_dims` or `samples` is out of range.
    """
    leaves = pytree.tree_leaves(like)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(f"like: expected a Tensor or a pytree of Tensors, got {type(like).__name__}")
    for leaf in leaves:
        if not is_differentiable(leaf):
            raise ValueError(f"like: expected a floating-point or complex dtype, got {leaf.dtype}")
        if not 0 <= batch_dims <= leaf.ndim:
            raise ValueError(f"batch_dims: expected 0 to {leaf.ndim} for shape {tuple(leaf.shape)}, got {batch_dims}")
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    operator = aslinearoperator((lambda v: A(v, *params)) if params else A)
    if hermitian or positive_definite:
        operator = aslinearoperator(operator, hermitian=hermitian, positive_definite=positive_definite)
    if adjoint is not None:
        claims, inner = operator.claims, operator
        operator = LinearOperator(inner.apply, adjoint=adjoint, domain=inner.domain, codomain=inner.codomain)
        operator.claims = claims
    probe = _Probe(operator, like, batch_dims, samples, torch.Generator().manual_seed(seed), tolerance)
    items = tuple(probe.items())
    subject = f"check_operator: {getattr(A, '__qualname__', None) or operator.expression} on {_describe(like)}"
    return _reported(CheckReport(subject, items), raise_on_error)


class _Probe:
    """The checks of one operator, each a method that returns its item."""

    def __init__(
        self,
        operator: LinearOperator,
        like: Tree,
        batch_dims: int,
        samples: int,
        generator: torch.Generator,
        tolerance: float | None,
    ) -> None:
        self.operator, self.like, self.batch_dims = operator, like, batch_dims
        self.samples, self.generator, self.given_tolerance = samples, generator, tolerance
        self.hinted = False
        # what the operator has written down, without what follows from a claim that is itself to be checked
        self.bare = copy.copy(operator)
        self.bare.claims = Claims()

    def A(self, v: Tree) -> Tree:
        with torch.no_grad():
            return self.operator(_map(torch.clone, v))  # what A does to its argument is checked in one place only

    def random(self, like: Tree) -> Tree:
        return _random(like, self.generator)

    def items(self) -> Iterator[CheckItem]:
        first = self._guarded("result", self.result)
        yield first
        if not first.ok:  # nothing else can be measured
            return
        self.image = self.A(self.random(self.like))
        self.square = _describe(self.image) == _describe(self.like)
        size = max(_wide(self.like).numel(), _wide(self.image).numel())
        if not size:
            return
        dtypes = [leaf.dtype for leaf in pytree.tree_leaves((self.like, self.image))]
        self.tolerance = _rounding(dtypes, size) if self.given_tolerance is None else self.given_tolerance
        repeatable = self._guarded("repeatable", self.repeatable)
        yield repeatable
        if not repeatable.ok:
            return
        yield self._guarded("input kept", self.input_kept)
        yield self._guarded("result kept", self.result_kept)
        linearity = [self._guarded("additivity", self.additivity), self._guarded("homogeneity", self.homogeneity)]
        if any(leaf.is_complex() for leaf in pytree.tree_leaves(self.like)):
            linearity.append(self._guarded("complex homogeneity", self.complex_homogeneity))
        yield from linearity
        if not all(item.ok for item in linearity):  # what has no matrix has no adjoint either
            return
        if self.batch_dims:
            yield self._guarded("batch", self.batch)
        yield self._guarded("adjoint", self.adjoint)
        if self.bare.has_adjoint:
            yield self._guarded("autograd", self.autograd)
        if self.square:
            hermitian = self._guarded("hermitian", self.hermitian)
            yield hermitian
            if hermitian.ok:
                yield self._guarded("positive definite", self.positive_definite)

    @staticmethod
    def _guarded(name: str, check: Callable[[], CheckItem]) -> CheckItem:
        try:
            return check()
        except Exception as error:  # whatever the user's function raises is what the check has found
            return CheckItem(name, False, message=f"{type(error).__name__}: {error}")

    def _item(self, name: str, measured: float, holds: str, fails: str, required: bool = True) -> CheckItem:
        ok = measured <= self.tolerance
        return CheckItem(name, ok, measured, self.tolerance, holds if ok else fails + self._precision_hint(measured), required)

    def _precision_hint(self, measured: float) -> str:
        """Rounding is exact under scaling by a power of two, and a nonlinearity is not: that tells them apart."""
        if self.hinted or not measured <= NARROW_ARITHMETIC:
            return ""
        v = self.random(self.like)
        Av, scaled = _wide(self.A(v)), _wide(self.A(_map(lambda t: t * 8, v)))
        eps = max(torch.finfo(leaf.dtype).eps for leaf in pytree.tree_leaves(v))
        if not _relative(scaled - 8 * Av, 8 * Av) <= 8 * eps:
            return ""
        self.hinted = True
        return (
            f". The error, {measured:.1e}, looks like rounding in a narrower format inside A (a cast, or TF32: see "
            "torch.set_float32_matmul_precision); relative residuals much below it cannot be reached"
        )

    # -- what A returns ------------------------------------------------------------------------------------------------

    def result(self) -> CheckItem:
        declared = self.operator.codomain
        if any(isinstance(leaf, AnyBatch) for leaf in pytree.tree_leaves(declared)):  # batch dimensions are free
            declared = None
        y = self.A(self.random(self.like))
        fault = "" if self.operator.codomain is None or agree(self.operator.codomain, y) else "A(v) is not in the codomain"
        for leaf in pytree.tree_leaves(y):
            if not isinstance(leaf, Tensor):
                return CheckItem("result", False, message=f"expected A(v) to be made of Tensors, got {type(leaf).__name__}")
            if not leaf.isfinite().all():
                fault = "A(v) holds NaN or Inf for a random v"
        expected, got = _describe(self.like), _describe(y)
        if declared is not None and _shapes(declared) != _shapes(y):
            fault = f"A(v) is {got}, where the codomain is {_describe(declared)}"
        elif declared is not None and got == _describe(declared):
            pass
        elif _shapes(y) == _shapes(self.like) and got != expected:
            fault = f"A(v) is {got} for v {expected}: a solve needs the dtype and device of v"
            if any(leaf.is_complex() for leaf in pytree.tree_leaves(y)):
                fault += "; if the operator is complex, give a complex vector"
        if self.operator.hermitian and _shapes(y) != _shapes(self.like):
            fault = f"A is claimed Hermitian, but maps {expected} to {got}"
        return CheckItem("result", not fault, message=fault or f"{expected} -> {got}")

    def repeatable(self) -> CheckItem:
        v = self.random(self.like)
        first, *others = (_wide(self.A(v)) for _ in range(4))
        measured = max(_relative(first - other, first) for other in others)
        fails = "A gives different results for the same v: does it draw random numbers (dropout), or update a state?"
        return self._item("repeatable", measured, "the same result for the same vector", fails)

    def input_kept(self) -> CheckItem:
        v = self.random(self.like)
        before = _map(torch.clone, v)
        with torch.no_grad():
            self.operator(v)
        ok = _equal(v, before)
        fails = "A writes into its argument: begin with v = v.clone(), or use operations without a trailing underscore"
        return CheckItem("input kept", ok, message="the argument is not written to" if ok else fails)

    def result_kept(self) -> CheckItem:
        first = self.A(self.random(self.like))
        before = _map(torch.clone, first)
        self.A(self.random(self.like))
        ok = _equal(first, before)
        fails = "A(u) changed when A(v) was computed: A returns a buffer that it writes to again; return a new tensor"
        return CheckItem("result kept", ok, message="a result is not written to later" if ok else fails)

    # -- linearity -----------------------------------------------------------------------------------------------------

    def additivity(self) -> CheckItem:
        def measure() -> float:
            u, v = self.random(self.like), self.random(self.like)
            Au, Av, both = _wide(self.A(u)), _wide(self.A(v)), _wide(self.A(_map(torch.add, u, v)))
            return _relative(both - Au - Av, Au, Av)

        measured = self._worst(measure)
        fails = "A(u + v) is not A(u) + A(v): A is not linear"
        if not measured <= self.tolerance:
            at_zero = _wide(self.A(_map(torch.zeros_like, self.like)))
            if at_zero.norm() > 0:
                fails = "A(0) is not 0: A is affine (a bias?); solve with v -> A(v) - A(0) and the right-hand side b - A(0)"
        return self._item("additivity", measured, "A(u + v) = A(u) + A(v)", fails)

    def homogeneity(self) -> CheckItem:
        narrow = any(leaf.dtype in (torch.float16, torch.bfloat16) for leaf in pytree.tree_leaves(self.like))
        factors = FACTORS[:1] if narrow else FACTORS  # 16 bits have no room for the others
        measured = self._worst(lambda: max(self._scaling_error(c) for c in factors))
        return self._item("homogeneity", measured, "A(c v) = c A(v)", "A(c v) is not c A(v): A is not linear")

    def complex_homogeneity(self) -> CheckItem:
        measured = self._worst(lambda: self._scaling_error(0.6 + 0.8j))
        fails = (
            "A(i v) is not i A(v): A is linear over the reals only (it takes a real part, a modulus or a conjugate); solve on "
            "torch.view_as_real(v)"
        )
        return self._item("complex homogeneity", measured, "A(i v) = i A(v)", fails)

    def _scaling_error(self, c: complex) -> float:
        v = self.random(self.like)
        # the scaled vector is rounded, so that the factor that was applied is known for each entry only to eps
        scaled = _map(lambda t: t * (c if t.is_complex() else c.real), v)
        Av = _wide(self.A(v))
        return _relative(_wide(self.A(scaled)) - c * Av, c * Av)

    # -- the adjoint ---------------------------------------------------------------------------------------------------

    def adjoint(self) -> CheckItem:
        how = "as it is written" if self.bare.has_adjoint else "as autograd derives it"
        # a claim gives a solve its adjoint, and so makes up for code that autograd cannot follow
        required = self.bare.has_adjoint or not self.operator.hermitian
        try:
            measured = self._worst(lambda: self._dot_test(self._adjoint))
        except RuntimeError as error:
            return CheckItem("adjoint", False, message=str(error), required=required)
        if self.bare.has_adjoint:
            fails = "<A x, y> is not <x, A^H y>: the given adjoint is not the adjoint of A (transposed, but not conjugated?)"
        else:
            fails = "the derivative of A(v) in v, which autograd sees, is not A: look for detach(), .data or a custom backward"
        return self._item("adjoint", measured, f"<A x, y> = <x, A^H y>, {how}", fails)

    def autograd(self) -> CheckItem:
        """The given adjoint against the derived one: second derivatives rest on the latter."""
        y = self.random(self.image)
        try:
            derived = _wide(self._derived(y))
        except RuntimeError:
            message = "autograd cannot follow A, so that the gradient rests on the given adjoint, and second derivatives fail"
            return CheckItem("autograd", False, message=message, required=False)
        with torch.no_grad():
            given = _wide(self.bare.apply_adjoint(y))
        fails = "the adjoint that autograd derives from A differs from the given one: one of them is wrong"
        return self._item("autograd", _relative(given - derived, given, derived), "autograd derives the same adjoint", fails)

    def _adjoint(self, y: Tree) -> Tree:
        if not self.bare.has_adjoint:
            return self._derived(y)
        with torch.no_grad():
            return self.bare.apply_adjoint(y)

    def _derived(self, y: Tree) -> Tree:
        def apply(v: Tree) -> Tree:
            return self.operator.apply(_map(torch.clone, v))

        return derived_adjoint(apply, y, _map(torch.zeros_like, self.like), _map(torch.zeros_like, self.image))

    def _dot_test(self, adjoint: Callable[[Tree], Tree]) -> float:
        x = self.random(self.like)
        Ax = self.A(x)
        # a random y tells a wrong adjoint by 1/sqrt(n) only, which y = A x does not
        errors = []
        for y in (self.random(self.image), Ax):
            Ahy = adjoint(y)
            if _shapes(Ahy) != _shapes(x):
                raise ValueError(f"expected A^H y to be {_describe(x)}, got {_describe(Ahy)}")
            pairs = (_wide(y), _wide(Ax)), (_wide(Ahy), _wide(x))
            difference = _inner(*pairs[0]) - _inner(*pairs[1])
            if not pairs[1][1].is_complex():  # from a real into a complex space the inner products are real
                difference = difference.real
            scale = sum(float(a.norm()) * float(b.norm()) for a, b in pairs)
            errors.append(_quotient(abs(difference), scale))
        return max(errors)

    # -- claims --------------------------------------------------------------------------------------------------------

    def hermitian(self) -> CheckItem:
        claimed = self.operator.hermitian
        measured = self._worst(lambda: self._dot_test(self.A))
        holds = "A = A^H" if claimed else "A = A^H as far as can be seen: claim hermitian=True for shorter solves"
        fails = "A is not A^H" + (": drop the claim, or parametrise A as B + B^H" if claimed else "")
        return self._item("hermitian", measured, holds, fails, required=claimed)

    def positive_definite(self) -> CheckItem:
        claimed = self.operator.positive_definite
        smallest, largest, steps = self._ritz_values()
        measured = _quotient(max(0.0, -smallest), max(abs(smallest), abs(largest)))
        spread = f"Ritz values from {smallest:.2e} to {largest:.2e} ({steps} products)"
        holds = spread if claimed else f"{spread}: claim positive_definite=True to solve by CG"
        if smallest <= self.tolerance * largest:
            holds = f"{spread}: no definite operator to rounding, semidefinite at best"
        fails = spread + (": A is not positive definite; drop the claim" if claimed else "")
        if largest <= 0:
            fails = f"{spread}: A is negative definite; solve with -A and -b"
        item = self._item("positive definite", measured, holds, fails, required=claimed)
        if claimed or smallest > self.tolerance * largest:
            return item
        return CheckItem(item.name, False, message=item.message, required=False)

    def _ritz_values(self) -> tuple[float, float, int]:
        """Extreme eigenvalues of the Lanczos tridiagonal (Golub & Van Loan §10.1).

        Without re-orthogonalisation they still lie between the extreme eigenvalues of `A`, to rounding (Paige 1980).
        """
        layout = Layout.of(self.like, 0)
        q, previous = layout.pack(self.random(self.like)), None
        norm = _wide(q).norm().item()
        diagonal: list[float] = []
        beside: list[float] = []
        for _ in range(min(q.numel(), LANCZOS_STEPS)):
            q = q / norm
            w = layout.pack(self.A(layout.unpack(q)))
            diagonal.append(_inner(_wide(q), _wide(w)).real)
            w = w - diagonal[-1] * q - (0 if previous is None else norm * previous)
            norm = _wide(w).norm().item()
            scale = max(map(abs, [*diagonal, *beside]))
            if not norm > self.tolerance * scale:
                break
            beside.append(norm)
            previous, q = q, w
        steps = len(diagonal)
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        for i, value in enumerate(beside[: steps - 1]):
            tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = value
        values = torch.linalg.eigvalsh(tridiagonal)
        return values[0].item(), values[-1].item(), steps

    def batch(self) -> CheckItem:
        v, other = self.random(self.like), self.random(self.like)

        def replace_first(t: Tensor, by: Tensor) -> Tensor:
            result = t.clone()
            first = (0,) * self.batch_dims
            result[first] = by[first]
            return result

        def rest(y: Tree) -> Tensor:
            return _wide(_map(lambda t: t.flatten(0, self.batch_dims - 1)[1:], y))

        before, after = rest(self.A(v)), rest(self.A(_map(replace_first, v, other)))
        fails = "changing the first system of the batch changes the results of others: they are not independent systems"
        return self._item("batch", _relative(before - after, before), "systems of the batch do not mix", fails)

    def _worst(self, measure: Callable[[], float]) -> float:
        values = [measure() for _ in range(self.samples)]
        return max(values, key=lambda value: math.inf if math.isnan(value) else value)


# -- check_gradient ----------------------------------------------------------------------------------------------------

# An error of rtol in the residual is one of up to cond(A) rtol in the solution and in the gradient; the factor stands for
# a moderate condition number. A dependency that is lost, or a wrong adjoint, leaves errors far above.
CONDITIONING = 1e3
DIFFERENCES = 1e2  # and one of central differences, eps^(2/3), likewise
COARSEST = 0.1


def check_gradient(
    A: Any,
    b: Tree,
    *,
    params: Sequence[Any] = (),
    batch_dims: int = 0,
    directions: int = 2,
    seed: int = 0,
    tolerance: float | None = None,
    raise_on_error: bool = False,
    **options: Any,
) -> CheckReport:
    """Compare the gradient of `solve(A, b, ...)` with central differences of the solution.

    The loss is the inner product of the solution with a random vector. For `b`, and for every tensor that needs a gradient and
    that `A` depends on, its derivative along random directions is set against the difference of two solves with that tensor
    moved either way. The gradient is that of the solve with the given options; the solves of the differences go on to
    the accuracy of the dtype. Each tensor is moved alone, also where one depends on another, and is put back, bit for
    bit; no `.grad` is touched.

    Items of the report: `dependencies` if a tensor cannot be found, `solve` and `adjoint solve` (both converged), and one
    for each tensor, under its name where it has one. An error that does not go away with a smaller `rtol` is a wrong derivative
    of `A`: a `detach()`, an `.item()` or a wrong custom backward inside.

    Args:
        A: `v -> A v`, in any of the forms that `solve` takes.
        b: the right-hand side, a tensor or a pytree of tensors.
        params: tensors that `A` is called with, `A(v, *params)`.
        batch_dims: how many leading dimensions of `b` count independent systems.
        directions: how many random directions each tensor is moved along.
        seed: of the random directions.
        tolerance: the relative error that passes; by default the larger of `1000 rtol` and `100 eps^(2/3)`, where `eps^(2/3)`
            is the error of central differences and the factors stand for the condition number.
        raise_on_error: raise instead of returning a report that is not ok.
        options: options of `solve`. Solves that fail are reported, whatever `on_failure` says.

    Returns:
        The report: `.ok`, `.items`, `report["b"]`, and `print(report)`.

    Raises:
        CheckError: if the gradient is not the derivative, under `raise_on_error=True`.
        TypeError: for an argument of the wrong type or an unknown option.
        ValueError: for a wrong shape, dtype, device or value, or `grad="none"`.
    """
    known = {**inspect.signature(check_gradient).parameters, **inspect.signature(solve_ex).parameters}
    for name in options:
        if name not in known:
            raise TypeError(f"check_gradient: unknown option {name!r}{nearest(name, tuple(known))}")
    if options.get("grad") == "none":
        raise ValueError("grad: expected 'implicit' or 'unroll', since with 'none' there is no gradient to check")
    if directions < 1:
        raise ValueError(f"directions: expected at least 1, got {directions}")
    generator = torch.Generator().manual_seed(seed)
    function, flat_params = with_flat_params(A, params)
    operator = square_operator(function, flat_params)
    rhs, dims = right_hand_side(operator, b, batch_dims)
    layout = Layout.of(rhs, dims)
    subject = f"check_gradient: {getattr(A, '__qualname__', None) or operator.expression} on {_describe(b)}"

    def packed(v: Tensor, *params: Tensor) -> Tensor:
        apply = operator.fn if params else operator.apply
        return layout.pack(apply(layout.unpack(v), *params))

    recorded: Sequence[Tensor]
    if isinstance(operator, SparseOperator):  # each solve takes the values out of it anew
        recorded = (operator.source,)
    else:
        try:
            recorded = Closure.record(packed, layout.pack(rhs), flat_params).recorded
        except RuntimeError as error:
            return _reported(CheckReport(subject, (CheckItem("dependencies", False, message=str(error)),)), raise_on_error)
    recorded = [tensor for tensor in recorded if tensor.requires_grad]

    b = _map(lambda t: t.detach().clone().requires_grad_(), b)
    options = {**options, "params": params, "batch_dims": batch_dims, "on_failure": "ignore"}
    with torch.enable_grad():
        x, info = solve_ex(A if params else operator, b, **options)
    cotangent = _random(x, generator)
    names = {f"b{_path(path)}": leaf for path, leaf in pytree.tree_flatten_with_path(b)[0]}
    names.update(_named(recorded, A, operator, params))
    tensors = list(names.values())
    outputs = list(zip(pytree.tree_leaves(x), pytree.tree_leaves(cotangent), strict=True))
    with _Cut(recorded):
        # the graph behind a non-leaf tensor is the user's, and is not freed here
        grads = torch.autograd.grad(
            [y for y, _ in outputs], tensors, [c for _, c in outputs], retain_graph=True, allow_unused=True
        )

    items = [_solve_item("solve", info, "the forward solve")]
    if info.adjoint is not None:
        items.append(_solve_item("adjoint solve", info.adjoint, "the adjoint solve"))
    solved = all(item.ok for item in items)
    differences = _Differences(A if params else operator, b, names, options, _wide(cotangent), directions, generator, solved)
    for (name, tensor), grad in zip(names.items(), grads, strict=True):
        items.append(differences.item(name, tensor, grad, tolerance))
    return _reported(CheckReport(subject, tuple(items)), raise_on_error)


def _solve_item(name: str, info: Any, which: str) -> CheckItem:
    ok = bool(torch.as_tensor(info.converged).all())
    residuals = torch.as_tensor(info.relative_residual).reshape(-1).tolist()
    message = f"{which} has a relative residual of {max(residuals, default=0.0):.1e}"
    return CheckItem(name, ok, message=message if ok else f"{message}. {info.message}")


class _Differences:
    """Central differences of `Re <c, x>` in one tensor at a time."""

    def __init__(
        self,
        A: Any,
        b: Tree,
        tensors: dict[str, Tensor],
        options: dict[str, Any],
        cotangent: Tensor,
        directions: int,
        generator: torch.Generator,
        solved: bool,
    ) -> None:
        self.A, self.b, self.cotangent, self.solved = A, b, cotangent, solved
        dense = [t.untyped_storage().data_ptr() for t in tensors.values() if t.layout == torch.strided]
        self.shared = {pointer for pointer in dense if dense.count(pointer) > 1}
        self.directions, self.generator = directions, generator
        dtype = real_dtype(pytree.tree_leaves(b)[0].dtype)
        self.eps = torch.finfo(dtype).eps
        rtols = (options.get("rtol"), (options.get("adjoint") or {}).get("rtol"))
        self.rtol = max(DEFAULT_RTOL[dtype] if rtol is None else rtol for rtol in rtols)
        self.options = {key: value for key, value in options.items() if key not in ("callback", "progress", "history")}
        if options.get("grad") != "unroll":  # an unrolled gradient is that of the iteration as it was asked for
            self.options.update(grad="none", rtol=4 * self.eps, atol=0.0, maxiter=None)
        self.x = self.solution()

    def solution(self) -> Tensor:
        with torch.no_grad():
            return _wide(solve_ex(self.A, self.b, **self.options)[0])

    def item(self, name: str, tensor: Tensor, grad: Tensor | None, tolerance: float | None) -> CheckItem:
        """The line for one tensor."""
        eps = max(self.eps, torch.finfo(tensor.dtype).eps)
        if tolerance is None:
            tolerance = min(max(CONDITIONING * self.rtol, DIFFERENCES * eps ** (2 / 3)), COARSEST)
        worst, spread = 0.0, 0.0
        for _ in range(self.directions):
            direction = _direction(tensor, self.generator)
            step = self._step(tensor, direction, eps ** (1 / 3))
            error = self._error(tensor, grad, direction, step, eps, tolerance)
            if not error <= tolerance:
                spread = max(spread, abs(error - self._error(tensor, grad, direction, 4 * step, eps, tolerance)))
            worst = error if not error <= worst else worst
        ok = worst <= tolerance
        shape = f"shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"
        fault = ""
        if not ok and not self.solved:
            fault = ": the solves above did not converge"
        elif not ok and not spread <= worst / 2:
            fault = ": inconclusive, since the differences depend on their step; try float64, or a smaller condition number"
        elif not ok and not _pairing(grad, tensor, torch.ones(_stored(tensor).numel()))[1]:
            fault = ": no gradient reaches it, though the solution depends on it; is there a detach() or .item() in A?"
        elif not ok:
            fault = ": the gradient is not the derivative; is there a detach() or a custom backward in A, or is rtol too large?"
        return CheckItem(name, ok, worst, tolerance, shape + fault)

    def _step(self, tensor: Tensor, direction: Tensor, change: float) -> float:
        """The step at which the solution changes by the relative `change`, at most `change` times the size of the tensor."""
        values = _stored(tensor)
        size = values.abs().double().square().mean().sqrt().item() if values.numel() else 0.0
        step = change * (size if size > 0 else 1.0)
        scale = self.x.norm().item()
        for _ in range(8):
            moved = _quotient((self._moved(tensor, direction, step)[1] - self.x).norm().item(), scale)
            if moved <= 2 * change or scale == 0:
                break
            step *= max(change / moved, 1e-4) if math.isfinite(moved) else 1e-2
        return step

    def _moved(self, tensor: Tensor, direction: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """The stored values of the tensor moved along a direction, and the solution there."""
        moved = ((_double(_stored(tensor)) + step * direction).to(tensor.dtype)).resolve_conj()
        dense = tensor.layout == torch.strided
        # in place, so that whatever else shares the memory follows; but not where other tensors of the report do, or where
        # elements of the tensor share it among themselves
        swap = dense and (not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() in self.shared)
        saved = tensor.data if swap else _stored(tensor).clone()
        try:
            if swap:
                tensor.data = moved
            else:
                _stored(tensor).copy_(moved)
            return _wide(moved), self.solution()
        finally:
            if swap:
                tensor.data = saved
            else:
                _stored(tensor).copy_(saved)

    def _error(
        self, tensor: Tensor, grad: Tensor | None, direction: Tensor, step: float, eps: float, tolerance: float
    ) -> float:
        after, x_after = self._moved(tensor, direction, step)
        before, x_before = self._moved(tensor, direction, -step)
        difference = _inner(self.cotangent, x_after - x_before).real
        # the step as it was rounded to the tensor's dtype, so that this rounding is no error
        predicted, typical = _pairing(grad, tensor, after - before)
        noise = 10 * eps * self.cotangent.norm().item() * self.x.norm().item() / math.sqrt(max(1, self.x.numel()))
        error = abs(difference - predicted)
        if not math.isfinite(error):
            return math.inf
        return _quotient(error, max(abs(difference), abs(predicted), typical, noise / tolerance))


def _stored(tensor: Tensor) -> Tensor:
    """The stored values: an alias that autograd and the tensor's version counter know nothing of."""
    tensor = tensor.data
    if tensor.layout == torch.strided:
        return tensor
    return (tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()).data


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _pairing(grad: Tensor | None, tensor: Tensor, way: Tensor) -> tuple[float, float]:
    """`Re <grad, way>` for a change of the stored values, and the size that it typically has along a random way."""
    if grad is None:
        return 0.0, 0.0
    if tensor.layout == torch.strided:
        slope = _wide(grad.to_dense())
        product = _inner(slope, way).real
    else:  # the gradient may store its entries in another layout or order
        change = tensor.detach().clone()
        _stored(change).copy_(way.reshape(_stored(change).shape))
        entries = grad.detach().to_sparse_coo().coalesce()
        slope = _wide(entries.values())
        product = _wide((entries.conj_physical() * change.to_sparse_coo().coalesce()).coalesce().values()).sum().real.item()
    return product, float(slope.norm()) * float(way.norm()) / math.sqrt(max(1, way.numel()))


def _direction(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction of unit mean square."""
    direction = _double(_random(_stored(tensor), generator))
    size = direction.abs().square().mean().sqrt()
    return direction / torch.where(size > 0, size, 1.0)


# -- names of tensors --------------------------------------------------------------------------------------------------


def _named(recorded: Sequence[Tensor], A: Any, operator: LinearOperator, params: Sequence[Any]) -> dict[str, Tensor]:
    """The recorded tensors under the names by which the user knows them, where they can be found."""
    found: dict[int, str] = {}
    _visit("params", list(params), found, set())
    _visit("", A, found, set())
    _visit("A", operator, found, set())
    names: dict[str, Tensor] = {}
    for tensor in recorded:
        name = found.get(id(tensor), "tensor")
        count = 2
        while name in names or name == "b":
            name, count = f"{name.split(' #')[0]} #{count}", count + 1
        names[name] = tensor
    return names


def _visit(name: str, value: Any, found: dict[int, str], visited: set[int], depth: int = 8) -> None:
    """Note the names of the tensors that a value holds: in its closure, its attributes, its items."""

    def join(part: str) -> str:
        return f"{name}.{part}" if name else part

    if isinstance(value, Tensor):
        found.setdefault(id(value), name or "A")
        return
    if depth == 0 or id(value) in visited:
        return
    visited.add(id(value))
    inner: list[tuple[str, Any]] = []
    if isinstance(value, torch.nn.Module):
        inner = [(join(n), t) for n, t in [*value.named_parameters(), *value.named_buffers(), *vars(value).items()]]
    elif isinstance(value, list | tuple):
        inner = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    elif isinstance(value, dict):
        inner = [(f"{name}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, functools.partial):
        inner = [(name, value.func), (name, value.args), (name, value.keywords)]
    elif inspect.ismethod(value):
        inner = [(name, value.__self__)]
    elif inspect.isfunction(value):
        with contextlib.suppress(ValueError):  # a cell that is still empty
            variables = inspect.getclosurevars(value)
            inner = [*variables.nonlocals.items(), *variables.globals.items()]
    elif hasattr(value, "__dict__") and not inspect.ismodule(value) and not isinstance(value, type):
        inner = [(name if n == "fn" else join(n), item) for n, item in vars(value).items()]
    for inner_name, item in inner:
        _visit(inner_name, item, found, visited, depth - 1)


def _path(path: Any) -> str:
    return pytree.keystr(path)


# -- trees and measures ------------------------------------------------------------------------------------------------


def _map(function: Callable[..., Any], *trees: Tree) -> Tree:
    return pytree.tree_map(function, *trees)


def _random(like: Tree, generator: torch.Generator) -> Tree:
    """A normal random vector; drawn on the CPU, so that every device gets the same one."""

    def draw(t: Tensor) -> Tensor:
        dtype = torch.complex128 if t.is_complex() else torch.float64
        return torch.randn(t.shape, dtype=dtype, generator=generator).to(dtype=t.dtype, device=t.device)

    return _map(draw, like)


def _wide(tree: Tree) -> Tensor:
    """All entries as one vector in double precision, so that measuring adds no rounding of its own; always a copy."""
    leaves = [leaf.detach().reshape(-1).cpu() for leaf in pytree.tree_leaves(tree)]
    return torch.cat([_double(leaf) for leaf in leaves])


def _inner(x: Tensor, y: Tensor) -> complex:
    """`x^H y`."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return complex(torch.vdot(x.to(dtype), y.to(dtype)).item())


def _relative(error: Tensor, *against: Tensor) -> float:
    return _quotient(error.norm().item(), sum(vector.norm().item() for vector in against))


def _quotient(error: float, scale: float) -> float:
    """`error / scale`, with 0 / 0 = 0."""
    return error / scale if scale > 0 else (0.0 if error == 0 else math.inf)


def _equal(x: Tree, y: Tree) -> bool:
    return all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(x), pytree.tree_leaves(y), strict=True))


def _rounding(dtypes: Sequence[torch.dtype], n: int) -> float:
    real = map(real_dtype, dtypes)
    return max(min(ROUNDING * torch.finfo(dtype).eps * math.sqrt(n + ROUNDING_OFFSET), CEILING[dtype]) for dtype in real)


def _shapes(tree: Tree) -> str:
    return str(_map(lambda t: tuple(t.shape), tree))


def _describe(tree: Tree) -> str:
    """Shapes, dtypes and devices other than the CPU, as text that is equal for equal spaces."""

    def leaf(t: Tensor) -> str:
        device = "" if t.device.type == "cpu" else f" on {t.device}"
        return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}{device}"

    described = _map(leaf, tree)
    return described if isinstance(described, str) else str(described).replace('"', "").replace("'", "")
