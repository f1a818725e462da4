"""Stokes' equations of slow viscous flow on a staggered grid of two or three dimensions."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice, check_integer, check_tolerance
from .base import StructuredOperator
from .claims import Claims
from .diffusion import (
    MEANS,
    check_boundary,
    check_spacing,
    describe_boundary,
    first,
    inside,
    last,
    lower,
    upper,
)
from .in_place import multiplied, subtract, with_conjugate, zeros_for
from .nullspace import Nullspace
from .spaces import any_batch

# what the slope at a wall is multiplied by: 2 where it is half a cell away, 0 where it takes no shear stress
SLIP = {"no-slip": 2.0, "free-slip": 0.0}


class Stokes(StructuredOperator):
    r"""`(u, v, p) -> (-div(2 eta e) + grad p, -div(u, v))`, a Hermitian indefinite saddle point.

    `e = (grad u + grad u^T) / 2` is the rate of strain, and the viscosity `eta` may vary. The grid is the marker-and-cell
    one: the pressure and the viscosity stand for cells, and each velocity component for the faces that it crosses; in two
    dimensions with cells `(nx, ny)` between walls `u` has shape `(nx - 1, ny)`, `v` has `(nx, ny - 1)` and `p` has
    `(nx, ny)`; in three dimensions the unknowns are `(u, v, w, p)`. The faces in the walls are no unknowns: nothing flows
    through a wall. In a periodic dimension the component across it has as many faces as there are cells, face `i` below
    cell `i`. Second order in the spacing.

    Between walls the pressure is determined up to a constant only. The last row is `-div(u, v) - gauge * mean(p)`: for a
    right-hand side whose last part sums to zero, as it must, the mean pressure is then zero, and nothing else changes,
    so `gauge` (any positive number) is no approximation. With `gauge=0` the operator is singular with the constants of
    `p` as its null space; MINRES then solves consistent systems. Where no wall holds a velocity component (all dimensions
    periodic, or slipping along a periodic one), constants of that component are a null space, too, which `gauge`
    does not remove. `nullspace` lists them all, as it is for a positive viscosity (or one of positive real part).

    Args:
        shape: the number of cells in each of two or three dimensions, each at least 2.
        viscosity: `eta`, a number, a 0-d tensor or a tensor of shape `(*batch, *shape)`, positive.
        boundary: `"no-slip"` (the fluid sticks to the wall), `"free-slip"` (no shear stress at the wall) or `"periodic"`;
            or one of them for each dimension, where a pair stands for its two ends. A wall at the end of dimension
            `e` that moves with velocity `U` along `d` adds `2 eta U / h_e^2` to the `d` part of `b`, at the faces beside it.
        spacing: the size `h` of a cell, or one for each dimension.
        gauge: the weight of the mean pressure in the last row, in units of 1 / viscosity.
        mean: of the viscosities around an edge, `"arithmetic"` or `"harmonic"`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if it has the wrong shape, dtype or value.

    Source: Harlow & Welch 1965 (the grid); Gerya 2010, *Introduction to Numerical Geodynamic Modelling*, ch. 7 (variable
    viscosity on it).
    """

    def __init__(
        self,
        shape: Sequence[int],
        viscosity: Tensor | float,
        *,
        boundary: Any = "no-slip",
        spacing: float | Sequence[float] = 1.0,
        gauge: float = 1.0,
        mean: str = "arithmetic",
    ) -> None:
        if not isinstance(shape, Sequence):
            raise TypeError(f"shape: expected the number of cells in each dimension, got {type(shape).__name__}")
        self.grid = tuple(check_integer("shape", n) for n in shape)
        if len(self.grid) not in (2, 3) or min(self.grid) < 2:
            raise ValueError(f"shape: expected two or three dimensions of at least 2 cells, got {tuple(shape)}")
        self.viscosity = _check_viscosity(viscosity, self.grid)
        self.boundary = check_boundary(boundary, len(self.grid), ("no-slip", "free-slip", "periodic"))
        self.spacing = check_spacing(spacing, len(self.grid))
        self.gauge = check_tolerance("gauge", gauge)
        self.mean = check_choice("mean", mean, MEANS)
        self.edges: tuple[Tensor, ...] | None = None
        like = self.viscosity
        self.slip = tuple(
            torch.tensor(
                [1.0] * n if ends[0] == "periodic" else [SLIP[ends[0]], *[1.0] * (n - 1), SLIP[ends[1]]],
                dtype=like.dtype,
                device=like.device,
            ).reshape([-1] + [1] * (len(self.grid) - 1 - d))
            for d, (n, ends) in enumerate(zip(self.grid, self.boundary, strict=True))
        )
        components = [
            any_batch([n - (e == d and not self._periodic(d)) for e, n in enumerate(self.grid)], like)
            for d in range(len(self.grid))
        ]
        domain = (*components, any_batch(self.grid, like))
        super().__init__(domain, claims=Claims(hermitian=not like.is_complex()))

    def apply(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        edges = self._edges()
        divergence = zeros_for(self.grid, *x)
        batch = divergence.shape[: -len(self.grid)]
        *velocity, p = (part.expand(*batch, *part.shape[-len(self.grid) :]) for part in x)
        forces = [zeros_for(part.shape[-len(self.grid) :], *x, edges[0]) for part in velocity]
        for d, component in enumerate(velocity):
            rate = self._to_cells(component, d)
            divergence.sub_(rate)
            self._write_on_faces(forces[d], torch.addcmul(p, self.viscosity, rate, value=-2), d)
        for (d, e), edge in zip(self._pairs(), edges, strict=True):
            sizes = [n + (a in (d, e) and not self._periodic(a)) for a, n in enumerate(self.grid)]
            rate = zeros_for(sizes, velocity[d], velocity[e])  # of a component that crosses a wall, zero in the wall
            self._write_slope(self._inside(rate, d), velocity[d], e)
            slope = torch.empty_like(self._inside(rate, e))
            self._write_slope(slope, velocity[e], d)
            self._inside(rate, e).add_(slope)
            stress = multiplied(rate, edge)
            self._add_outflow(forces[d], self._inside(stress, d), e)
            self._add_outflow(forces[e], self._inside(stress, e), d)
        if self.gauge:
            divergence.sub_(p.mean(tuple(range(-len(self.grid), 0)), keepdim=True), alpha=self.gauge)
        return (*forces, divergence)

    def apply_adjoint(self, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # the matrix is symmetric, so its adjoint has conjugated coefficients
        conjugate: tuple[Tensor, ...] = with_conjugate(self.apply, y) if self.viscosity.is_complex() else self.apply(y)
        return conjugate

    def known_nullspace(self) -> Nullspace:
        # without strain each component is constant: zero where a wall stops or holds it; and then the pressure is constant
        held = any("no-slip" in ends for ends in self.boundary)
        free = [] if held else [d for d in range(len(self.grid)) if self._periodic(d)]
        if not self.gauge:
            free.append(len(self.grid))
        like = self.viscosity
        return tuple(
            tuple(
                torch.full((), float(i == part), dtype=like.dtype, device=like.device).expand(space.example.shape)
                for i, space in enumerate(self.domain)
            )
            for part in free
        )

    def known_left_nullspace(self) -> Nullspace:
        return self.known_nullspace()  # the matrix is symmetric, and the vectors are real

    def exact_diagonal(self) -> tuple[Tensor, ...]:
        ndim = len(self.grid)
        edges = dict(zip(self._pairs(), self._edges(), strict=True))
        viscosity = self.viscosity.expand(torch.broadcast_shapes(self.viscosity.shape, self.grid))
        diagonals = []
        for d in range(ndim):
            entries = 2 * self._around(viscosity, d) / self.spacing[d] ** 2
            for e in range(ndim):
                if e != d:
                    stress = self.slip[e] * self._inside(edges[min(d, e), max(d, e)], d)
                    dim = e - ndim
                    both = stress + stress.roll(-1, dim) if self._periodic(e) else lower(stress, dim) + upper(stress, dim)
                    entries = entries + both / self.spacing[e] ** 2
            diagonals.append(entries)
        return (*diagonals, torch.full_like(viscosity, -self.gauge / math.prod(self.grid)))

    # -- between cells, faces and edges --------------------------------------------------------------------------------

    def _periodic(self, d: int) -> bool:
        return self.boundary[d][0] == "periodic"

    def _to_cells(self, faces: Tensor, d: int) -> Tensor:
        """The derivative along a dimension, from the faces that are unknowns to cells."""
        dim = d - len(self.grid)
        sizes = list(faces.shape)
        sizes[dim] = self.grid[d]
        cells = faces.new_empty(sizes)
        if self._periodic(d):
            subtract(upper(faces, dim), lower(faces, dim), out=lower(cells, dim))
            last(cells, dim).copy_(first(faces, dim) - last(faces, dim))
        else:
            subtract(upper(faces, dim), lower(faces, dim), out=inside(cells, dim))
            first(cells, dim).copy_(first(faces, dim))
            last(cells, dim).copy_(-last(faces, dim))
        return multiplied(cells, 1 / self.spacing[d])

    def _write_on_faces(self, faces: Tensor, cells: Tensor, d: int) -> None:
        """Write the derivative along a dimension, from cells to the faces that are unknowns: minus `_to_cells`'s adjoint."""
        dim = d - len(self.grid)
        subtract(upper(cells, dim), lower(cells, dim), out=upper(faces, dim) if self._periodic(d) else faces)
        if self._periodic(d):
            first(faces, dim).copy_(first(cells, dim) - last(cells, dim))
        multiplied(faces, 1 / self.spacing[d])

    def _inside(self, edges: Tensor, d: int) -> Tensor:
        """Of all positions between cells along a dimension, those that are unknowns."""
        return edges if self._periodic(d) else inside(edges, d - len(self.grid))

    def _write_slope(self, edges: Tensor, cells: Tensor, e: int) -> None:
        """Write the derivative along a dimension at all positions between cells; at a wall over half a cell, or zero."""
        dim = e - len(self.grid)
        self._write_on_faces(self._inside(edges, e), cells, e)
        if not self._periodic(e):
            at_first, at_last = (SLIP[end] / self.spacing[e] for end in self.boundary[e])
            first(edges, dim).copy_(first(cells, dim) * at_first)
            last(edges, dim).copy_(last(cells, dim) * -at_last)

    def _add_outflow(self, cells: Tensor, edges: Tensor, e: int) -> None:
        """Subtract the derivative along a dimension, from all positions between cells to cells."""
        dim, scale = e - len(self.grid), 1 / self.spacing[e]
        if self._periodic(e):
            cells.add_(edges, alpha=scale)
            lower(cells, dim).sub_(upper(edges, dim), alpha=scale)
            last(cells, dim).sub_(first(edges, dim), alpha=scale)
        else:
            cells.add_(lower(edges, dim), alpha=scale).sub_(upper(edges, dim), alpha=scale)

    def _around(self, cells: Tensor, d: int) -> Tensor:
        """The sum of the two cells beside each face that is an unknown."""
        dim = d - len(self.grid)
        return cells + cells.roll(1, dim) if self._periodic(d) else lower(cells, dim) + upper(cells, dim)

    def _pairs(self) -> list[tuple[int, int]]:
        """The pairs of dimensions in which there is shear."""
        return list(combinations(range(len(self.grid)), 2))

    def _edges(self) -> tuple[Tensor, ...]:
        """For each pair of dimensions, the viscosity at each position that is between cells along both."""
        return self.edges if self.edges is not None else tuple(self._on_edges(d, e) for d, e in self._pairs())

    def for_one_solve(self) -> Stokes:
        """The same operator, whose coefficients are computed once: tensors that gradients pass through."""
        result = copy.copy(self)
        result.edges = self._edges()
        return result

    def _on_edges(self, d: int, e: int) -> Tensor:
        viscosity = self.viscosity.expand(torch.broadcast_shapes(self.viscosity.shape, self.grid))
        cells = 1 / viscosity if self.mean == "harmonic" else viscosity
        for dim, periodic in ((d - len(self.grid), self._periodic(d)), (e - len(self.grid), self._periodic(e))):
            if periodic:
                cells = (cells + cells.roll(1, dim)) / 2
            else:
                n = cells.shape[dim]
                cells = torch.cat([cells.narrow(dim, 0, 1), cells, cells.narrow(dim, n - 1, 1)], dim)
                cells = (lower(cells, dim) + upper(cells, dim)) / 2
        return 1 / cells if self.mean == "harmonic" else cells

    def _label(self) -> str:
        return f"Stokes({describe_boundary(self.boundary)}, {self.mean}, gauge={self.gauge:g})"


def _check_viscosity(viscosity: Any, grid: tuple[int, ...]) -> Tensor:
    """The viscosity as a tensor.

    Raises:
        TypeError: if it is no number or Tensor.
        ValueError: if it has an integer dtype, or a shape that is not the grid's.
    """
    if isinstance(viscosity, int | float):
        return torch.tensor(float(viscosity))
    if not isinstance(viscosity, Tensor):
        raise TypeError(f"viscosity: expected a number or a Tensor, got {type(viscosity).__name__}")
    if not (viscosity.is_floating_point() or viscosity.is_complex()):
        raise ValueError(f"viscosity: expected a floating-point or complex dtype, got {viscosity.dtype}")
    if viscosity.ndim and tuple(viscosity.shape[-len(grid) :]) != grid:
        expected = ", ".join(["...", *map(str, grid)])
        raise ValueError(f"viscosity: expected a number or shape ({expected}), got {tuple(viscosity.shape)}")
    return viscosity
