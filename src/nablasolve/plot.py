"""Small plots: residual and memory against iterations, and the curves that a damping is chosen on.

Each draws on a matplotlib `Axes` that the caller made, so that it fits into any figure and sets nothing globally.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .info import SolveInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1f6fb4", "#d9661f", "#3b8f5a", "#7d5ba6", "#8a8a8a")
MIB = 2**20


def plot_residuals(
    axes: Axes, curves: Mapping[str, SolveInfo | Tensor | Sequence[float]], *, rtol: float | None = None
) -> None:
    """Draw relative residuals against the iteration, on a logarithmic scale.

    Args:
        axes: where to draw.
        curves: a label for each record that was made with `history=True`, or for the residual norms themselves, initial one
            first. Norms of a batch, of shape `(iterations + 1, *batch)`, are drawn as one line for each system.
        rtol: a tolerance to mark by a horizontal line.

    Raises:
        ValueError: if a record has no history.
    """
    for (label, curve), color in zip(curves.items(), _colors(len(curves)), strict=True):
        norms = curve.history if isinstance(curve, SolveInfo) else curve
        if norms is None:
            raise ValueError(f"curves[{label!r}]: the record has no history; solve with history=True")
        columns = torch.as_tensor(norms, dtype=torch.float64).detach().cpu()
        columns = columns.reshape(columns.shape[0], -1)
        # NaN, which is not drawn, where a system begins with nothing to solve
        relative = columns / torch.where(columns[:1] > 0, columns[:1], torch.nan)
        lines = axes.semilogy(relative.numpy(), color=color, linewidth=1.8 if relative.shape[1] == 1 else 1.0)
        lines[0].set_label(label)
    if rtol is not None:
        axes.axhline(rtol, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)), label="tolerance")
    axes.set_xlabel("iteration")
    axes.set_ylabel("relative residual")
    _finish(axes)


def plot_memory(axes: Axes, iterations: Sequence[int], memory: Mapping[str, Sequence[float]]) -> None:
    """Draw memory in bytes against the number of iterations, on logarithmic scales.

    Args:
        axes: where to draw.
        iterations: the numbers of iterations.
        memory: for each label, the bytes at each number of iterations.

    Raises:
        ValueError: if a label has not one value for each number of iterations.
    """
    for (label, values), color in zip(memory.items(), _colors(len(memory)), strict=True):
        if len(values) != len(iterations):
            raise ValueError(f"memory[{label!r}]: expected {len(iterations)} values, got {len(values)}")
        mebibytes = [value / MIB for value in values]
        axes.loglog(iterations, mebibytes, color=color, linewidth=1.8, marker="o", markersize=5.5, label=label)
        for count, value in zip(iterations, mebibytes, strict=True):
            axes.annotate(
                f"{value:.1f}" if value < 10 else f"{value:.0f}",
                (count, value),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=color,
            )
    axes.set_xticks(list(iterations), [str(count) for count in iterations], minor=False)
    axes.minorticks_off()
    axes.margins(x=0.12, y=0.16)
    axes.set_xlabel("iterations")
    axes.set_ylabel("peak memory (MiB)")
    _finish(axes)


def plot_lcurve(axes: Axes, residual_norms: Tensor, solution_norms: Tensor, corner: tuple[float, float], damp: float) -> None:
    """Draw an L-curve, on logarithmic scales, with its corner.

    Args:
        axes: where to draw.
        residual_norms: `|A x - b|` along the curve.
        solution_norms: `|x|` along the curve.
        corner: both at the corner.
        damp: the λ of the corner.
    """
    axes.loglog(residual_norms.numpy(), solution_norms.numpy(), color=COLORS[0], linewidth=1.8)
    axes.loglog(*([value] for value in corner), color=COLORS[1], marker="o", linestyle="none", label=f"λ = {damp:.3g}")
    axes.set_xlabel("residual norm")
    axes.set_ylabel("solution norm")
    _finish(axes)


def plot_criterion(
    axes: Axes, damps: Tensor, values: Tensor, damp: float, *, ylabel: str, level: tuple[str, float] | None = None
) -> None:
    """Draw a function of λ, on logarithmic scales, and mark the λ that was chosen by it.

    Args:
        axes: where to draw.
        damps: the λ.
        values: of the function.
        damp: the chosen λ.
        ylabel: the name of the function.
        level: a name and a value to mark by a horizontal line.
    """
    axes.loglog(damps.numpy(), values.numpy(), color=COLORS[0], linewidth=1.8)
    if level is not None:
        axes.axhline(level[1], color="#555555", linewidth=0.9, linestyle=(0, (4, 3)), label=level[0])
    axes.axvline(damp, color=COLORS[1], linewidth=1.2, label=f"λ = {damp:.3g}")
    axes.set_xlabel("λ")
    axes.set_ylabel(ylabel)
    _finish(axes)


def new_axes() -> Axes:
    """The axes of a new figure.

    Raises:
        ImportError: if there is no matplotlib.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install 'nablasolve[demo]'") from error
    return plt.subplots()[1]


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _finish(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
