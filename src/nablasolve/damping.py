"""How much to damp: the λ of `min |A x - b|^2 + λ^2 |x|^2`, when `A` is only a function.

The bidiagonalisation of Golub and Kahan, `A V = U B` with `b = |b| u_1`, takes one product with `A` and one with `A^H` a step.
On its subspace `x = V y` the problem is `min |B y - |b| e_1|^2 + λ^2 |y|^2`, and with `B = P S Q^T` and `c = |b| P^T e_1`

    r_i = λ^2 / (s_i^2 + λ^2) c_i,        (Q^T y)_i = s_i / (s_i^2 + λ^2) c_i,

so that one bidiagonalisation answers for every λ, each at the cost of a few numbers for each of its steps.

Source: Golub & Kahan 1965; O'Leary & Simmons 1981 (the projected problem); Hansen 1998, chapter 7 (the choices).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import check_integer, check_tolerance, names_options
from .closure import transforms_active
from .info import ConvergenceWarning
from .plot import new_axes, plot_criterion, plot_lcurve
from .pose import Tree
from .projection import DAMPS, Process, Products, Projection, new_vector
from .vectors import own_precision

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = 100
USEFUL = 16  # a singular value below this many roundings of the largest is noise, as in Hansen's l_curve
SETTLED = 0.01  # how far the choice may move when the last quarter of the steps is left out
ZOOM_POINTS, ZOOMS = 33, 6  # each zoom narrows the bracket 16 times: from a step of the default grid to 1e-8 of λ
FLAT = 1e-6  # a function that varies less, relatively, has no maximum: GCV with a unitary A, say
AT_THE_END = 1e-6  # how close to an end of the range, relatively, a choice is there and not inside


@dataclass(frozen=True, repr=False, eq=False)
class DampingChoice:
    """A chosen λ, and the curve that it was chosen on. Nothing here carries a gradient.

    Attributes:
        damp: the chosen λ, for `lstsq(A, b, damp=...)`.
        damps: the λ of the curve, ascending; float64 on the CPU, as all curves are.
        residual_norms: `|A x - b|` for each of them.
        solution_norms: `|x|` for each of them.
        criterion: what the choice rests on, for each of them.
        residual_norm: `|A x - b|` for the chosen λ.
        solution_norm: `|x|` for the chosen λ.
        x: the solution for the chosen λ, in the subspace of the bidiagonalisation.
        steps: of the bidiagonalisation.
        exhausted: whether it ended by itself, so that the norms are those of the whole problem, to rounding.
        converged: whether the choice lies inside of the range of `damps`, and stays within 1 % when the last quarter of the
            steps is left out; a bidiagonalisation that ended by itself needs no such test.
        matvecs: products with `A`; where the adjoint is derived, the recording run is one of them.
        rmatvecs: products with the adjoint.
    """

    damp: float
    damps: Tensor
    residual_norms: Tensor
    solution_norms: Tensor
    criterion: Tensor
    residual_norm: float
    solution_norm: float
    x: Tree
    steps: int
    exhausted: bool
    converged: bool
    matvecs: int
    rmatvecs: int

    def __repr__(self) -> str:
        ended = ", exhausted" if self.exhausted else ""
        return (
            f"{type(self).__name__}(damp={self.damp:.6g}, {'converged' if self.converged else 'NOT converged'}, "
            f"residual_norm={self.residual_norm:.6g}, solution_norm={self.solution_norm:.6g}, steps={self.steps}{ended}, "
            f"matvecs={self.matvecs}, rmatvecs={self.rmatvecs})"
        )


@dataclass(frozen=True, repr=False, eq=False)
class LCurve(DampingChoice):
    """The L-curve and its corner; `criterion` is the curvature of `(log |A x - b|, log |x|)`, positive where it is convex."""

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the curve and its corner, on new axes unless some are given.

        Raises:
            ImportError: if there is no matplotlib.
        """
        ax = new_axes() if ax is None else ax
        plot_lcurve(ax, self.residual_norms, self.solution_norms, (self.residual_norm, self.solution_norm), self.damp)
        return ax


@dataclass(frozen=True, repr=False, eq=False)
class Discrepancy(DampingChoice):
    """The λ of the discrepancy principle; `criterion` is `|A x - b| / (tau * noise)`, which is 1 at the chosen λ.

    Attributes:
        noise: the norm of the noise, as it was given.
        tau: the safety factor, as it was given.
    """

    noise: float
    tau: float

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the residual norm against λ, with the level that is asked, on new axes unless some are given.

        Raises:
            ImportError: if there is no matplotlib.
        """
        ax = new_axes() if ax is None else ax
        level = ("tau · noise", self.tau * self.noise)
        plot_criterion(ax, self.damps, self.residual_norms, self.damp, ylabel="residual norm", level=level)
        return ax


@dataclass(frozen=True, repr=False, eq=False)
class GCV(DampingChoice):
    """The minimiser of generalised cross-validation; `criterion` is the GCV function.

    Attributes:
        exact_trace: whether the trace in it is exact; else it is an estimate by random probes.
    """

    exact_trace: bool

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the GCV function and its minimum, on new axes unless some are given.

        Raises:
            ImportError: if there is no matplotlib.
        """
        ax = new_axes() if ax is None else ax
        plot_criterion(ax, self.damps, self.criterion, self.damp, ylabel="GCV function")
        return ax


# -- the three choices -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _as_constants() -> Iterator[None]:
    """Nothing here is differentiated, whatever is computed around it.

    Raises:
        RuntimeError: under a transform of `torch.func`, which hides the values that a choice rests on.
    """
    if transforms_active():
        raise RuntimeError("the choice of damp is not differentiated or mapped: make it outside of torch.func transforms")
    with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(False), own_precision():
        yield


@names_options
@_as_constants()
def lcurve(A: Any, b: Tree, *, damps: Any = None, steps: int | None = None, domain: Tree = None) -> LCurve:
    """Choose the λ of `min |A x - b|^2 + λ^2 |x|^2` at the corner of the L-curve, where `(log |A x - b|, log |x|)` bends most.

    It needs no knowledge of the noise. It is a heuristic: for a solution that is very smooth it damps too little, and it
    does not become exact as the noise vanishes. The choice is not differentiated, and its λ and its `x` carry no gradient:
    derivatives to λ itself are those of `lstsq`.

    Args:
        A: a callable, an `nn.Module`, a dense or sparse Tensor of shape `(m, n)`, or a `LinearOperator`. Where it has no
            adjoint written down, autograd derives it.
        b: the data, float32, float64 or complex, a tensor of any shape or a pytree; all of it is one vector.
        damps: the λ of the curve, positive numbers; the choice lies between the smallest and the largest, and need not be one
            of them. By default a logarithmic grid over the singular values of the projected problem that stand out of rounding,
            so that with few steps a better choice below these is not seen.
        steps: of the bidiagonalisation, by default 100, and never more than `min(m, n)`: one product with `A` and one with
            `A^H` each, however many `damps`. It keeps `2 steps` vectors.
        domain: an example of `x` (tensor or pytree), where `A` is a bare function; only its structure is read.

    Returns:
        An `LCurve`.

    Raises:
        TypeError: for an argument of the wrong type or an unknown option.
        ValueError: for a wrong shape, dtype, device or value, a domain that cannot be known, NaN or Inf in `b` or in what `A`
            returns, an `A` that is not linear or not that of its adjoint, or a `b` for which every λ gives `x = 0`.
        RuntimeError: if the adjoint of `A` cannot be derived, or under a transform of `torch.func`.

    Warns:
        ConvergenceWarning: if there is no corner inside of the range, or it still moves with the number of steps.

    Source: Hansen & O'Leary 1993; Calvetti, Golub & Reichel 1999 (by bidiagonalisation).
    """
    sweep = _Sweep.over(A, b, damps, steps, domain)
    damp, inside = _maximiser(sweep.whole.curvature, sweep.damps)
    other = None if sweep.part is None else _maximiser(sweep.part.curvature, sweep.damps)[0]
    converged = sweep.judge("lcurve", "corner", damp, inside, other)
    return LCurve(criterion=sweep.whole.curvature(sweep.damps), converged=converged, **sweep.report(damp))


@names_options
@_as_constants()
def discrepancy(
    A: Any,
    b: Tree,
    *,
    noise: Any,
    tau: Any = 1.0,
    damps: Any = None,
    steps: int | None = None,
    domain: Tree = None,
) -> Discrepancy:
    """Choose the λ of `min |A x - b|^2 + λ^2 |x|^2` that fits the data as well as the noise allows: `|A x - b| = tau * noise`.

    The choice is not differentiated, and its λ and its `x` carry no gradient: derivatives to λ itself are those of `lstsq`.

    Args:
        A: as for `lcurve`.
        b: the data, as for `lcurve`.
        noise: the norm of the noise in `b`, `sigma * sqrt(m)` for `m` numbers of standard deviation `sigma`.
        tau: a safety factor, at least 1 where `noise` is no more than an estimate.
        damps: the λ of the curve that is returned. The choice does not depend on them.
        steps: of the bidiagonalisation, as for `lcurve`.
        domain: an example of `x`, as for `lcurve`.

    Returns:
        A `Discrepancy`.

    Raises:
        TypeError: for an argument of the wrong type or an unknown option.
        ValueError: as for `lcurve`; and if `tau * noise` is not below `|b|`, which `x = 0` fits, or not above the residual
            norm that the steps, or least squares without damping, reach.
        RuntimeError: as for `lcurve`.

    Warns:
        ConvergenceWarning: if λ still moves with the number of steps.

    Source: Morozov 1966; Hansen 1998, chapter 7.
    """
    noise, tau = check_tolerance("noise", noise), check_tolerance("tau", tau)
    sweep = _Sweep.over(A, b, damps, steps, domain)
    level = tau * noise
    norm_b = sweep.whole.norm_b
    if not level < norm_b:
        raise ValueError(f"noise: expected tau * noise below {norm_b:.6g}, the norm of b, which x = 0 fits, got {level:.6g}")
    if not level > sweep.whole.floor:
        by, remedy = "least squares without damping reaches", ""
        if not sweep.process.exhausted:
            by, remedy = f"{sweep.process.steps} steps reach", "; raise steps"
        reached = f"{sweep.whole.floor:.6g}, the residual norm that {by}"
        raise ValueError(f"noise: expected tau * noise above {reached}, got {level:.6g}{remedy}")
    damp = sweep.whole.damp_of_residual(level)
    part = sweep.part
    other = None if part is None else part.damp_of_residual(level) if level > part.floor else 0.0
    converged = sweep.judge("discrepancy", "λ", damp, True, other)
    report = sweep.report(damp)
    return Discrepancy(criterion=report["residual_norms"] / level, converged=converged, noise=noise, tau=tau, **report)


@names_options
@_as_constants()
def gcv(
    A: Any,
    b: Tree,
    *,
    damps: Any = None,
    steps: int | None = None,
    probes: int = 1,
    seed: int = 0,
    domain: Tree = None,
) -> GCV:
    """Choose the λ of `min |A x - b|^2 + λ^2 |x|^2` by generalised cross-validation: it predicts left-out data best.

    It needs no knowledge of the noise, which has to be white: of one variance, and uncorrelated. What is minimised is

        V(λ) = (1/m) |A x - b|^2 / ((1/m) trace(I - T))^2,        T = A (A^H A + λ^2)^{-1} A^H,

    with the number `m` of data, whatever the number of steps. The trace is exact where `min(m, n) <= steps`: from the
    bidiagonalisation where it takes all of its steps, and from the columns or rows of `A` where it ends before by itself. A
    shorter one knows of `T` only what `b` excites, `k` of perhaps thousands of degrees of freedom, and with that alone λ would
    come out far too small. There the trace is that of the projected problem on the subspace of `b`, plus an estimate of what is
    left by random probes orthogonal to it, each with a bidiagonalisation of its own. The choice is not differentiated; λ and
    `x` carry no gradient, and derivatives to λ itself are those of `lstsq`.

    Args:
        A: as for `lcurve`.
        b: the data, as for `lcurve`.
        damps: the range that is searched, as for `lcurve`.
        steps: of each bidiagonalisation, as for `lcurve`; a probe keeps as many vectors again while it runs.
        probes: how many random vectors, where the trace is estimated. With one the products are twice as many as the steps.
        seed: of the random vectors; the global random state is neither read nor changed.
        domain: an example of `x`, as for `lcurve`.

    Returns:
        A `GCV`.

    Raises:
        TypeError: for an argument of the wrong type or an unknown option.
        ValueError: as for `lcurve`; and for less than one probe.
        RuntimeError: as for `lcurve`.

    Warns:
        ConvergenceWarning: if there is no minimum inside of the range, or it still moves with the number of steps. How far it
            moves with the `seed` is not looked at.

    Source: Golub, Heath & Wahba 1979; Golub & von Matt 1997 (the trace by bidiagonalisation from a random vector).
    """
    probes, seed = check_integer("probes", probes), check_integer("seed", seed)
    if probes < 1:
        raise ValueError(f"probes: expected at least 1, got {probes}")
    sweep = _Sweep.over(A, b, damps, steps, domain)
    trace = _Trace.of(sweep, probes, seed)
    if damps is None and trace.resolved > float(sweep.damps[0]):
        sweep = replace(sweep, damps=sweep.whole.grid(trace.resolved))
    m = sweep.products.m

    def score(projection: Projection, trace: _Trace) -> Callable[[Tensor], Tensor]:
        return lambda damps: m * (projection.residual_norms(damps) / trace(damps)) ** 2

    function = score(sweep.whole, trace)
    damp, inside = _maximiser(lambda damps: -function(damps), sweep.damps)
    other = None
    if sweep.part is not None or trace.part is not None:
        coarse = score(sweep.part or sweep.whole, trace.part or trace)
        other = _maximiser(lambda damps: -coarse(damps), sweep.damps)[0]
    converged = sweep.judge("gcv", "minimum", damp, inside, other, trace.part is not None)
    return GCV(criterion=function(sweep.damps), converged=converged, exact_trace=trace.exact, **sweep.report(damp))


# -- the sweep ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sweep:
    """One bidiagonalisation, the projected problem of all of its steps and of three quarters of them, and the λ to sweep over.

    `part` is None where the bidiagonalisation ended by itself, so that nothing depends on the number of its steps.
    """

    products: Products
    process: Process
    whole: Projection
    part: Projection | None
    damps: Tensor

    @classmethod
    def over(cls, A: Any, b: Tree, damps: Any, steps: int | None, domain: Tree) -> _Sweep:
        steps = STEPS if steps is None else check_integer("steps", steps)
        if steps < 2:  # one of them is left out in the test of convergence
            raise ValueError(f"steps: expected at least 2, got {steps}")
        damps = None if damps is None else _check_damps(damps)
        products, start = Products.of(A, b, domain)
        process = Process.run(products, start, steps)
        if process is None:
            raise ValueError("b: it is orthogonal to the range of A (A^H b = 0), so that every damp gives x = 0")
        whole, part = process.projections()
        if damps is None:
            # a decade below the smallest singular value nothing is damped; but a projection that can still grow has smaller
            # ones to come, and is not yet the problem below its smallest
            smallest = float(whole.sigma[-1]) / (10 if process.exhausted else 1)
            damps = whole.grid(whole.norm_A * max(smallest, USEFUL * process.eps))
        return cls(products, process, whole, part, damps)

    def judge(
        self, name: str, what: str, damp: float, inside: bool, other: float | None, probes_can_grow: bool = False
    ) -> bool:
        """Whether the choice can be relied on; a warning says why not. `other` is the choice from fewer steps."""
        complaint = ""
        if other is not None and not abs(other - damp) <= SETTLED * damp:
            moved = f"the {what} moved from {other:.3g} to {damp:.3g}"
            complaint = f"{moved} with the last quarter of the {self.process.allowed} steps: raise steps"
        if not inside:
            low, high = float(self.damps[0]), float(self.damps[-1])
            can_grow = probes_can_grow or not self.process.exhausted
            remedy = "give damps of a wider range" + (", or raise steps" if can_grow else "")
            complaint = f"there is no {what} inside of the range of λ, {low:.3g} to {high:.3g}: {remedy}"
        if complaint:
            # 5: past this method, the function, its context and its check of options
            warnings.warn(f"nablasolve.{name}: {complaint}", ConvergenceWarning, stacklevel=5)
        return not complaint

    def report(self, damp: float) -> dict[str, Any]:
        """The fields that all choices have in common."""
        chosen = torch.tensor(damp, dtype=torch.float64)
        coefficients = self.whole.coefficients(chosen)
        x = self.process.V.combine(coefficients.to(self.process.V[0]))
        return {
            "damp": damp,
            "damps": self.damps,
            "residual_norms": self.whole.residual_norms(self.damps),
            "solution_norms": self.whole.solution_norms(self.damps),
            "residual_norm": float(self.whole.residual_norms(chosen)),
            "solution_norm": float(self.whole.solution_norms(chosen)),
            "x": self.products.domain.tree(x),
            "steps": self.process.steps,
            "exhausted": self.process.exhausted,
            "matvecs": self.products.matvecs,
            "rmatvecs": self.products.rmatvecs,
        }


def _check_damps(damps: Any) -> Tensor:
    """The λ as an ascending float64 tensor."""
    try:
        values = damps if isinstance(damps, Tensor) else torch.as_tensor(damps, dtype=torch.float64)
        if values.is_complex() or values.ndim != 1:
            raise TypeError
        values = values.detach().cpu().to(torch.float64)
    except (TypeError, ValueError, RuntimeError):
        got = f"a tensor of shape {tuple(damps.shape)} and dtype {damps.dtype}" if isinstance(damps, Tensor) else repr(damps)
        raise TypeError(f"damps: expected a sequence or 1-d tensor of real numbers, got {got}") from None
    if len(values) < 2:
        raise ValueError(f"damps: expected at least 2 numbers, got {len(values)}")
    wrong = values[~((values > 0) & torch.isfinite(values))].tolist()
    if wrong:
        raise ValueError(f"damps: expected positive finite numbers, got {wrong[0]}")
    return values.sort().values


def _maximiser(function: Callable[[Tensor], Tensor], damps: Tensor) -> tuple[float, bool]:
    """Where a function of λ is largest, and whether that is inside of the range: the best of a grid, then zooms on it."""
    first, last = math.log(damps[0]), math.log(damps[-1])
    logs = torch.linspace(first, last, max(DAMPS, len(damps)), dtype=torch.float64)
    values = torch.nan_to_num(function(logs.exp()), nan=-math.inf)
    flat = float(values.max() - values.min()) <= FLAT * float(values.max().abs())
    for _ in range(ZOOMS):
        index = int(values.argmax())
        low, high = logs[max(index - 1, 0)], logs[min(index + 1, len(logs) - 1)]
        logs = torch.linspace(float(low), float(high), ZOOM_POINTS, dtype=torch.float64)
        values = torch.nan_to_num(function(logs.exp()), nan=-math.inf)
    best = float(logs[int(values.argmax())])
    return math.exp(best), not flat and first + AT_THE_END < best < last - AT_THE_END


# -- the projected problem ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Trace:
    """`trace(I - T)` as a function of λ: that of the projected problem on the subspace of `b`, and an estimate of the rest.

    Attributes:
        sigma: the singular values on the subspace.
        ones: its further dimensions, which `T` maps to zero.
        outside: the number of all other dimensions.
        probes: the problems projected from unit vectors in these; None for one that `A^H` maps to zero.
        part: the same with fewer steps for the probes, where they can still grow.
        resolved: the smallest λ that these resolve, 0 where they cannot grow.
        exact: whether nothing is estimated.
    """

    sigma: Tensor
    ones: int
    outside: int
    probes: tuple[Projection | None, ...] = ()
    part: _Trace | None = None
    resolved: float = 0.0
    exact: bool = False

    @classmethod
    def of(cls, sweep: _Sweep, probes: int, seed: int) -> _Trace:
        """The exact trace where the number of steps allows it, else an estimate."""
        products, process = sweep.products, sweep.process
        m, smaller = products.m, min(products.m, products.n)
        sigma = sweep.whole.norm_A * sweep.whole.sigma
        if process.steps < smaller <= process.allowed:  # some singular values are repeated, or not excited by b, or rounding
            sigma = products.singular_values()
        if len(sigma) == smaller:
            return cls(sigma, m - smaller, 0, exact=True)
        generator = torch.Generator().manual_seed(seed)
        ones, outside = process.U.count - len(sigma), m - process.U.count
        pairs: list[tuple[Projection | None, Projection | None]] = []
        for _ in range(probes if outside else 0):
            signs = 2 * torch.randint(0, 2, (m,), generator=generator) - 1
            run = Process.run(products, new_vector(process.U, signs.to(process.U[0]))[0], process.allowed)
            pairs.append((None, None) if run is None else run.projections())
        growing = [whole for whole, shorter in pairs if whole is not None and shorter is not None]
        resolved = max((float(whole.norm_A * whole.sigma[-1]) for whole in growing), default=0.0)
        part = cls(sigma, ones, outside, tuple(shorter or whole for whole, shorter in pairs)) if growing else None
        return cls(sigma, ones, outside, tuple(whole for whole, _ in pairs), part, resolved)

    def __call__(self, damps: Tensor) -> Tensor:
        left = 1 / (1 + (self.sigma / damps.unsqueeze(-1)) ** 2)
        trace: Tensor = self.ones + left.sum(-1)
        if self.probes:
            means = [torch.ones_like(damps) if probe is None else probe.mean_left(damps) for probe in self.probes]
            trace = trace + self.outside * torch.stack(means).mean(0)
        return trace


# -- the bidiagonalisation ---------------------------------------------------------------------------------------------
