"""∇-Prox as a client: `install()` lets an unmodified `dprox` solve its linear systems here.

Needs dprox, `pip install --no-deps dprox`, with SciPy below 1.12 and NumPy below 2.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice
from ..certify import enforce
from ..closure import transforms_active
from ..info import SolveInfo, Status
from ..methods import CG, GMRES, MINRES, BiCGStab, Method
from ..methods.base import Correction
from ..methods.cg import CGState
from ..solve import solve_ex
from ..vectors import Scalar, precise_norm

ON_FAILURE = ("raise", "warn", "ignore")

# The residual that CG carries along drifts away from the recomputed one, by a percent or so in float32, and the recomputed one
# has to meet the tolerance: CG aims a little below it, so that rounding does not cost a restart.
MARGIN = 1.02
# From which multiple of its target on a residual is worth smoothing.
NEAR = 10.0
# How far a vector may be from a multiple of another one, in units of roundoff, to count as one.
PARALLEL = 8.0

_installed: _Client | None = None


def install(
    *,
    warm_start: bool = False,
    on_failure: str = "warn",
    on_adjoint_failure: str = "warn",
    record: Callable[[SolveInfo], Any] | None = None,
) -> None:
    """Let dprox solve its linear systems with this library: exact gradients to everything its operators depend on.

    Replaced are `dprox.linalg.linear_solve`, `dprox.linalg.custom.pcg`, the solvers of `dprox.linalg.solve` (`cg`, `cg2`,
    `pcg`, `minres`, `plss`, `plssw`) with their entries in its table `SOLVERS`, and so the x-update of every algorithm.
    `LinearSolveConfig` keeps its meaning, and two more values of `solver_type` are known, `"gmres"` and `"bicgstab"`, for
    operators that are not symmetric. `max_iters` may be small on purpose: to reach it is no failure of the forward solve.

    Call it before `from dprox.linalg.solve import ...`, since names that were imported earlier keep the old functions.
    A second call replaces the options of the first.

    Args:
        warm_start: begin the linear solve of an x-update at the algorithm's current iterate instead of zero.
        on_failure: `"raise"`, `"warn"` or `"ignore"`: what becomes of a forward solve that ends for any other reason than
            `max_iters`: an operator that is not symmetric or not definite, NaN, a residual that stagnates.
        on_adjoint_failure: the same for the adjoint solve of a backward pass, where `max_iters` counts as a failure, since
            the gradient is then inexact.
        record: called with the `SolveInfo` of every forward solve.

    Raises:
        ImportError: if dprox cannot be imported.
        ValueError: for an unknown failure policy.
    """
    check_choice("on_failure", on_failure, ON_FAILURE)
    check_choice("on_adjoint_failure", on_adjoint_failure, ON_FAILURE)
    try:
        import dprox.linalg.custom
        import dprox.linalg.solve
        import dprox.proxfn.sum_square
    except ImportError as error:
        raise ImportError(
            f"install() needs dprox and what it imports ({error}): pip install --no-deps dprox 'numpy<2' 'scipy<1.12'"
        ) from error
    global _installed
    uninstall()
    client = _Client(dprox, warm_start, on_failure, on_adjoint_failure, record)
    client.replace()
    _installed = client


def uninstall() -> None:
    """Give dprox its own functions back; nothing happens where they are in place."""
    global _installed
    if _installed is not None:
        _installed.restore()
        _installed = None


@dataclass(frozen=True)
class _Equation:
    """What the arguments of one of dprox's solvers come to: stop at `|r| <= max(rtol |b|, atol)` or after `max_iters` steps."""

    method: Method[Any]
    rtol: float
    max_iters: int
    atol: float = 0.0
    adjoint_rtol: float | None = None
    batched: bool = False
    M: Callable[[Tensor], Tensor] | None = None
    verbose: bool = False


def _absolute(
    b: Tensor, atol: float, adjoint_rtol: float, max_iters: int, verbose: bool, M: Callable[[Tensor], Tensor] | None = None
) -> _Equation:
    """Conjugate gradients to an absolute tolerance, as far as the dtype allows it."""
    attainable = 10 * torch.finfo(b.dtype).eps
    return _Equation(_CG(), attainable, max_iters, atol, max(adjoint_rtol, attainable), M=M, verbose=verbose)


class _Client:
    """The functions that take the place of dprox's, and how to put them there."""

    def __init__(
        self,
        dprox: Any,
        warm_start: bool,
        on_failure: str,
        on_adjoint_failure: str,
        record: Callable[[SolveInfo], Any] | None,
    ) -> None:
        self.custom, self.least_squares = dprox.linalg.custom, dprox.proxfn.sum_square.least_squares
        self.table: dict[str, Any] = dprox.linalg.solve.SOLVERS
        self.warm_start, self.on_failure, self.on_adjoint_failure = warm_start, on_failure, on_adjoint_failure
        self.record = record
        self.grad: ContextVar[str] = ContextVar("grad", default="implicit")
        self.guess: ContextVar[Tensor | None] = ContextVar("guess", default=None)
        self.solvers = {
            "cg": self.cg, "cg2": self.cg2, "pcg": self.pcg, "minres": self.minres, "plss": self.plss, "plssw": self.plssw,
            "gmres": self.gmres, "bicgstab": self.bicgstab,
        }  # fmt: skip
        self.undo: list[Callable[[], None]] = []

    # -- in the place of dprox's functions -------------------------------------------------------------------------

    def replace(self) -> None:
        """Put every function in its place, wherever a module of dprox holds the old one."""
        originals: dict[Any, Any] = {self.custom.linear_solve: self.linear_solve, self.custom.pcg: self.preconditioned}
        # earlier imports of the functions above by a user's module look up this name when they run
        originals[self.custom.LinearSolve] = _Applied(self.linear_solve)
        originals |= {self.table[name]: function for name, function in self.solvers.items() if name in self.table}
        for module in [m for name, m in sys.modules.items() if name == "dprox" or name.startswith("dprox.")]:
            for name, value in list(vars(module).items()):
                if isinstance(value, type | type(install)) and value in originals:
                    self._set(vars(module), name, originals[value])
        for name, function in self.solvers.items():
            self._set(self.table, name, function)
        original = self.least_squares.solve_cg

        @functools.wraps(original)
        def solve_cg(fn: Any, *args: Any, **kwargs: Any) -> Tensor:
            with self._beginning_at(_iterate(fn) if self.warm_start else None):
                x: Tensor = original(fn, *args, **kwargs)
                return x

        self.least_squares.solve_cg = solve_cg
        self.undo.append(lambda: setattr(self.least_squares, "solve_cg", original))

    def restore(self) -> None:
        """Undo `replace`."""
        while self.undo:
            self.undo.pop()()

    def _set(self, names: dict[str, Any], name: str, value: Any) -> None:
        if name in names:
            self.undo.append(functools.partial(names.__setitem__, name, names[name]))
        else:
            self.undo.append(functools.partial(names.pop, name))
        names[name] = value

    @contextmanager
    def _beginning_at(self, guess: Tensor | None) -> Iterator[None]:
        token = self.guess.set(guess)
        try:
            yield
        finally:
            self.guess.reset(token)

    def linear_solve(self, A: Any, b: Tensor, config: Any = None) -> Tensor:
        """`A^{-1} b` as a `LinearSolveConfig` asks; a solver that somebody added to the table `SOLVERS` runs as it is."""
        config = self.custom.LinearSolveConfig() if config is None else config
        solver, options = self.table[config.solver_type], dict(config.solver_kwargs)
        guess = self.guess.get()
        if guess is not None and guess.shape == b.shape and guess.dtype == b.dtype and guess.device == b.device:
            options.setdefault("x0", guess)
        grad = self.grad.set("implicit" if getattr(config, "use_analytic_grad", True) else "unroll")
        try:
            with self._beginning_at(None):  # of this equation, and of none that A may solve itself
                x: Tensor = solver(A, b, rtol=config.rtol, max_iters=config.max_iters, verbose=config.verbose, **options)
                return x
        finally:
            self.grad.reset(grad)

    def preconditioned(
        self, A: Any, b: Tensor, rtol: float = 1e-6, max_iters: int = 100, verbose: bool = False, **kwargs: Any
    ) -> Tensor:
        """`dprox.linalg.custom.pcg`."""
        return self.pcg(A, b, rtol=rtol, max_iters=max_iters, verbose=verbose, **kwargs)

    # -- the solvers, with dprox's arguments -----------------------------------------------------------------------

    def cg(
        self, A: Any, b: Tensor, x0: Tensor | None = None, rtol: float = 1e-6, max_iters: int = 100, verbose: bool = False
    ) -> Tensor:
        """Conjugate gradients; dimension 0 of an N-d `b` counts systems."""
        return self._solve(A, b, x0, _Equation(_CG(), rtol, max_iters, batched=b.ndim > 1, verbose=verbose))

    def cg2(
        self, A: Any, b: Tensor, x0: Tensor | None = None, rtol: float = 1e-6, max_iters: int = 500, verbose: bool = False
    ) -> Tensor:
        """Conjugate gradients for all of `b` as one vector, until `|r|^2 < rtol`, which is absolute."""
        return self._solve(A, b, x0, _absolute(b, rtol**0.5, rtol, max_iters, verbose))

    def pcg(
        self, A: Any, b: Tensor, x0: Tensor | None = None, rtol: float = 1e-6, max_iters: int = 100, verbose: bool = False,
        Minv: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Preconditioned conjugate gradients for all of `b` as one vector, until `|r| < rtol`, which is absolute."""
        return self._solve(A, b, x0, _absolute(b, rtol, rtol, max_iters, verbose, Minv))

    def minres(
        self, A: Any, b: Tensor, x0: Tensor | None = None, rtol: float = 1e-6, max_iters: int = 100, verbose: bool = False,
        Minv: Callable[[Tensor], Tensor] | None = None, eps: float = 1e-25, shifts: Tensor | None = None,
        value: float | None = None,
    ) -> Tensor:  # fmt: skip
        """MINRES for `(value A + shift I) x = b`, for each of the shifts.

        A matrix `b` is one vector, since its columns may be the systems; of more dimensions, the first counts systems.
        `eps` has no use here: no zero denominator needs it.
        """
        equation = _Equation(MINRES(), rtol, max_iters, batched=b.ndim > 2, M=Minv, verbose=verbose)
        if shifts is None and value is None:
            return self._solve(A, b, x0, equation)
        factor, flat = 1.0 if value is None else value, b.new_zeros(1) if shifts is None else shifts.reshape(-1)

        def shifted(shift: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda v: factor * A(v) + shift * v

        solutions = [self._solve(shifted(shift), b, x0, equation) for shift in flat]
        return solutions[0] if len(solutions) == 1 else torch.stack(solutions)

    def plss(
        self, A: Any, b: Tensor, x0: Tensor | None = None, rtol: float = 1e-6, max_iters: int = 100, verbose: bool = False
    ) -> Tensor:
        """The solution nearest to `x0`, for `A` with an `adjoint`, square or wide; all of `b` is one vector."""
        return self.plssw(A, b, None, x0, rtol, max_iters, verbose)

    def plssw(
        self, A: Any, b: Tensor, Wh: Tensor | None, x0: Tensor | None = None, rtol: float = 1e-6, max_iters: int = 100,
        verbose: bool = False,
    ) -> Tensor:  # fmt: skip
        """The solution whose distance from `x0` is least after multiplication with `Wh`.

        In exact arithmetic the projections of PLSS give the iterates of Craig's method, which is CG for `A W A^H y = b - A x0`
        with `x = x0 + W A^H y`; here `W = Wh^{-2}`, zero where `Wh` is.
        """
        W = 1.0 if Wh is None else torch.where(Wh == 0, 0.0, 1 / torch.where(Wh == 0, 1.0, Wh) ** 2)
        r = b if x0 is None else b - A(x0)
        how = _absolute(b, rtol * precise_norm(b.detach(), 0).item(), rtol, max_iters, verbose)
        y = self._solve(lambda v: A(W * A.adjoint(v)), r, None, how)
        x: Tensor = W * A.adjoint(y)
        return x if x0 is None else x0 + x

    def gmres(
        self, A: Any, b: Tensor, x0: Tensor | None = None, rtol: float = 1e-6, max_iters: int = 100, verbose: bool = False,
        restart: int = 20,
    ) -> Tensor:  # fmt: skip
        """GMRES; dimension 0 of an N-d `b` counts systems."""
        method = GMRES(restart=restart)
        return self._solve(A, b, x0, _Equation(method, rtol, max_iters, batched=b.ndim > 1, verbose=verbose))

    def bicgstab(
        self, A: Any, b: Tensor, x0: Tensor | None = None, rtol: float = 1e-6, max_iters: int = 100, verbose: bool = False
    ) -> Tensor:
        """BiCGStab; dimension 0 of an N-d `b` counts systems."""
        return self._solve(A, b, x0, _Equation(BiCGStab(), rtol, max_iters, batched=b.ndim > 1, verbose=verbose))

    # -- the one solve ---------------------------------------------------------------------------------------------

    def _solve(self, A: Any, b: Tensor, x0: Tensor | None, how: _Equation) -> Tensor:
        """Solve, with a gradient where one is asked for.

        A guess makes the equation one for the correction, `A d = b - A x0`, whose right-hand side depends on `A` too: both
        derivatives together are that of `A^{-1} b`. So the product `A x0` is the only one that a guess costs.
        """
        grad = self.grad.get() if torch.is_grad_enabled() else "none"
        batch_dims = int(how.batched and b.shape[0] != 1)  # one system is faster without a batch
        product = _Product(A, batch_dims)
        rhs, start, unit, norm_b = b, None, None, precise_norm(b.detach(), batch_dims)
        rtol, atol = how.rtol, how.atol
        if x0 is not None:
            start = x0 if grad == "unroll" else x0.detach()
            r = b - product(start)
            useful = _spread(precise_norm(r.detach(), batch_dims) < norm_b, b)  # a guess that is worse than zero is dropped
            size = torch.where(norm_b > 0, norm_b, 1.0)
            unit = _spread(size, b).to(b.dtype)
            start, rhs = torch.where(useful, start, 0.0), torch.where(useful, r, b) / unit
            # relative to the norm of b, not to that of the residual, which is the smaller one
            rtol, atol = min(rtol, torch.finfo(b.dtype).eps), rtol if atol == 0 else max(rtol, atol / size.item())
        x, info = solve_ex(
            product, rhs, method=how.method, M=how.M, rtol=rtol, atol=atol, maxiter=max(1, how.max_iters), grad=grad,
            batch_dims=batch_dims, adjoint=dict(rtol=how.rtol if how.adjoint_rtol is None else how.adjoint_rtol),
            on_failure=self.on_adjoint_failure, callback=_Budget(how.max_iters),
        )  # fmt: skip
        if start is not None:
            x = start + unit * x
        info = _in_units_of(info, product.count, None if start is None else size)
        if how.verbose:
            print(info)
        if self.record is not None:
            self.record(info)
        if not _ended_well(info.status):
            enforce(self.on_failure, "forward", x.detach(), info)
        solution: Tensor = x
        return solution


def _in_units_of(info: SolveInfo, count: int, size: Tensor | None) -> SolveInfo:
    """The record with the products that were computed, and of an equation that was divided by `size`, the norm of `b`."""
    if not isinstance(info.matvecs, Tensor):
        norm = info.residual_norm
        scaled = dict() if size is None else dict(residual_norm=norm * size.item(), relative_residual=norm)
        return replace(info, matvecs=count, **scaled)
    norm = info.residual_norm
    scaled = dict() if size is None else dict(residual_norm=norm * size, relative_residual=norm)
    return replace(info, matvecs=torch.full_like(info.matvecs, count), **scaled)


class _Applied:
    """`LinearSolve` with dprox's `apply`, for functions of dprox that hold the name."""

    def __init__(self, linear_solve: Callable[..., Tensor]) -> None:
        self.linear_solve = linear_solve

    def apply(self, A: Any, b: Tensor, config: Any, *_: Tensor) -> Tensor:
        """What dprox calls; the parameters that it lists are found anyway."""
        return self.linear_solve(A, b, config)


class _Product:
    """`v -> A v` in the dtype of `v`, for one solve, which remembers the product of the run that records what `A` depends on.

    `A` is linear, and the first vector that a method multiplies is a multiple of the one that was recorded with: of the
    right-hand side.
    """

    def __init__(self, A: Any, batch_dims: int) -> None:
        self.A, self.batch_dims = A, batch_dims
        self.kept: tuple[Tensor, Tensor] | None = None
        self.count = 0

    def __call__(self, v: Tensor) -> Tensor:
        recording = torch.is_grad_enabled()
        if self.kept is not None and not recording:
            product = self._multiple(v, *self.kept)
            self.kept = None
            if product is not None:
                return product
        self.count += 1
        y: Tensor = self.A(v)
        y = y.to(v.dtype)  # the convolutions of dprox return float32 whatever they get
        plain = not transforms_active() and torch.autograd.forward_ad._current_level < 0
        self.kept = (v.detach(), y.detach()) if recording and plain else None
        return y

    def _multiple(self, v: Tensor, known: Tensor, product: Tensor) -> Tensor | None:
        if v.shape != known.shape:
            return None
        norm = precise_norm(known, self.batch_dims)
        ratio = _spread(precise_norm(v, self.batch_dims) / torch.where(norm > 0, norm, 1.0), v).to(v.dtype)
        slack = PARALLEL * torch.finfo(v.dtype).eps
        same = (v - ratio * known).abs() <= slack * v.abs()
        return ratio * product if bool(same.all()) else None


class _Budget:
    """A callback that stops a forward solve at `max_iters` steps: it is STOPPED, and no products go into asking why."""

    def __init__(self, max_iters: int) -> None:
        self.max_iters = max_iters

    def __call__(self, state: Any) -> bool:
        return bool(state.phase == "forward" and state.iteration >= self.max_iters)


@dataclass(eq=False)
class _SmoothedState(CGState):
    """Beside the iterate of CG the smoothed one, its residual and that one's norm."""

    smooth: Tensor | None = None
    smooth_r: Tensor | None = None
    smooth_norm: Scalar = None
    reached: Scalar = None


@dataclass(frozen=True)
class _CG(CG):
    """Conjugate gradients that end with minimal residual smoothing (Schönauer 1987; Weiss 1994; Zhou & Walker 1994).

    The residual of CG oscillates about a falling line, while the best combination of its last iterates,
    `y = y + w (x - y)` with the `w` that makes the residual least, reaches the tolerance at the same step or an earlier one,
    without a product. That is done near the end only, where it decides. An iterate that `max_iters` cuts off is CG's own.
    """

    def init(self, problem: Correction) -> _SmoothedState:
        return _SmoothedState(**vars(super().init(problem)))

    def step(self, s: CGState) -> CGState:
        assert isinstance(s, _SmoothedState)
        super().step(s)
        problem, space = s.problem, s.problem.space
        s.residual_norm = norm = s.residual_norm * MARGIN
        if not space.any(s.running & (norm <= NEAR * problem.target)):
            return s
        if s.smooth is None or s.smooth_r is None:
            s.smooth, s.smooth_r = s.x.clone(), s.r.clone()
            return s
        change = s.r - s.smooth_r
        weight = s.ratio(-space.real_dot(s.smooth_r, change), space.real_dot(change, change))
        s.smooth = space.axpy(weight, s.x - s.smooth, s.smooth)
        s.smooth_r = space.axpy(weight, change, s.smooth_r)
        smoothed = space.norm(s.smooth_r) * MARGIN
        s.reached = smoothed <= problem.target
        s.residual_norm = space.where(s.running & s.reached, smoothed, norm)
        return s

    def solution(self, s: CGState) -> Tensor:
        assert isinstance(s, _SmoothedState)
        space = s.problem.space
        if s.smooth is None or s.reached is None or not space.any(s.reached):
            return s.x
        return space.axpy(space.where(s.reached, 1.0, 0.0), s.smooth - s.x, s.x)


def _iterate(fn: Any) -> Tensor | None:
    """The current iterate of the algorithm that a `least_squares` belongs to: dprox keeps it as the value of its variable."""
    variables: Sequence[Any] = fn.linop.variables
    if len(variables) != 1 or variables[0]._value is None:
        return None
    value = variables[0].value
    return value if isinstance(value, Tensor) else None


def _ended_well(status: Any) -> bool:
    """Whether all systems have converged or used their steps up."""
    fine = (Status.CONVERGED, Status.STOPPED, Status.MAXITER)
    if not isinstance(status, Tensor):
        return status in fine
    return bool(torch.stack([status == code for code in fine]).any(0).all())


def _spread(a: Tensor, x: Tensor) -> Tensor:
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))
