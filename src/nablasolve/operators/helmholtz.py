"""The Helmholtz equation on regular grids of one to three dimensions, with an absorbing layer at the border."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice, check_tolerance
from .base import LinearOperator, StructuredOperator
from .diffusion import (
    add_neighbours,
    check_boundary,
    check_field,
    check_spacing,
    describe_boundary,
    factorise_line,
    lower,
    pairs,
    upper,
)
from .factorisation import Factorisation
from .in_place import with_conjugate
from .spaces import any_batch


class Helmholtz(StructuredOperator):
    r"""`u -> -laplacian(u) - k^2 u` with an absorbing layer at the border, on cells: complex, and not Hermitian.

    The time dependence is `exp(-i w t)`: an outgoing wave is `exp(+i k r)`. Second-order centred differences; beyond the
    layer the boundary condition holds on the border's faces, half a cell from the centres. Let `q` be the depth in the
    layer, 0 where it begins and 1 at the border, and `g = strength * q^2` in each dimension. The layer is one of

    - `"pml"`, a perfectly matched layer: the coordinate is stretched by `s = 1 + i g`. Each row is multiplied by the product
      of the stretches of its cell, which keeps the matrix symmetric; in two dimensions
      `-d/dx (s_y / s_x du/dx) - d/dy (s_x / s_y du/dy) - s_x s_y k^2 u`. Outside of the layer that product is 1. A wave of
      normal incidence comes back with amplitude `exp(-2/3 k L strength)`, for a layer of thickness `L = width * spacing`,
      but for what the discretisation adds;
    - `"damping"`, a sponge: `k^2 (1 + i (g_x + g_y))`. It reflects more, and needs to be several wavelengths thick.

    Either way the matrix is complex symmetric, `A^T = A`, so that `A^H` is the conjugate of `A`.

    Args:
        wavenumber: `k`, a floating-point or complex tensor of shape `(*batch, *grid)`, in radians for each unit of length.
            A medium that absorbs has a positive imaginary part.
        spacing: the size of a cell, or one for each dimension, in that unit of length.
        absorbing: the width of the layer in cells: one number; or one for each dimension, where a pair stands for the lower
            and the upper end of it. 0 is no layer.
        strength: of the layer, without unit.
        layer: `"pml"` or `"damping"`.
        boundary: at the border, beyond the layer: `"dirichlet"`, `"neumann"` or `"periodic"`; or one of them for each
            dimension, where a pair stands for its two ends. A periodic dimension has a layer at both ends, or none.
        ndim: the number of dimensions of the grid, 1 to 3; by default all those of `wavenumber`. Those before are batch
            dimensions.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if it has the wrong shape, dtype or value.

    Source: Bérenger 1994 and Chew & Weedon 1994 (the layer as a stretched coordinate); Turkel & Yefet 1998 (its symmetric
    form in the frequency domain); Israeli & Orszag 1981 (sponge layers). The quadratic profile is that of Collino & Monk 1998.
    """

    def __init__(
        self,
        wavenumber: Tensor,
        *,
        absorbing: int | Sequence[Any],
        spacing: float | Sequence[float] = 1.0,
        strength: float = 2.0,
        layer: str = "pml",
        boundary: Any = "dirichlet",
        ndim: int | None = None,
    ) -> None:
        self.grid = check_field("wavenumber", wavenumber, ndim)
        self.boundary = check_boundary(boundary, len(self.grid), ("dirichlet", "neumann", "periodic"))
        self.spacing = check_spacing(spacing, len(self.grid))
        self.layer = check_choice("layer", layer, ("pml", "damping"))
        self.absorbing = pairs("absorbing", absorbing, len(self.grid), int, "a number of cells")
        if any(width < 0 for ends in self.absorbing for width in ends):
            raise ValueError(f"absorbing: expected widths of at least 0 cells, got {absorbing!r}")
        for n, widths, ends in zip(self.grid, self.absorbing, self.boundary, strict=True):
            if sum(widths) > n:
                raise ValueError(f"absorbing: expected layers that fit into {n} cells, got widths {widths}")
            if ends[0] == "periodic" and (widths[0] == 0) != (widths[1] == 0):  # the border would have two stretches
                raise ValueError(f"absorbing: expected a layer at both ends of a periodic dimension, or none, got {widths}")
        self.strength = check_tolerance("strength", strength)
        self.wavenumber = wavenumber
        self.cells: Tensor | None = None
        dtype = wavenumber.dtype.to_complex()
        super().__init__(any_batch(self.grid, wavenumber, dtype))
        faces, mass = self._coefficients()
        self.faces = tuple(face.to(wavenumber.device, dtype) for face in faces)
        self.mass = mass.to(wavenumber.device, dtype)

    def _coefficients(self) -> tuple[list[Tensor], Tensor]:
        """What stands before the differences across the faces of each dimension, and before `k^2`, in double precision."""
        ndim = len(self.grid)
        along = [[1] * d + [-1] + [1] * (ndim - 1 - d) for d in range(ndim)]
        centres = [self._profile(d, torch.arange(n, dtype=torch.float64) + 0.5) for d, n in enumerate(self.grid)]
        borders = [self._profile(d, torch.arange(n + 1, dtype=torch.float64)) for d, n in enumerate(self.grid)]
        cells = [1 + 1j * g.reshape(shape) for g, shape in zip(centres, along, strict=True)]
        faces = []
        for d, (ends, h) in enumerate(zip(self.boundary, self.spacing, strict=True)):
            face = torch.ones(self.grid[d] + 1, dtype=torch.complex128)
            if ends[0] != "periodic":  # half a cell from the centre, or closed
                face[0], face[-1] = ({"dirichlet": 2.0, "neumann": 0.0}[end] for end in ends)
            elif self.grid[d] == 1:  # a cell that is its own neighbour
                face = torch.zeros_like(face)
            if self.layer == "pml":
                face = face / (1 + 1j * borders[d])
            face = face.reshape(along[d]) / h**2
            if self.layer == "pml":
                face = math.prod((cell for e, cell in enumerate(cells) if e != d), start=face)
            faces.append(face)
        mass: Tensor = math.prod(cells[1:], start=cells[0]) if self.layer == "pml" else sum(cells[1:], cells[0]) - (ndim - 1)
        return faces, mass

    def _profile(self, d: int, position: Tensor) -> Tensor:
        """`strength * q^2` at positions along a dimension, counted in cells from its lower end."""
        first, last = self.absorbing[d]
        depth = torch.zeros_like(position)
        if first:
            depth = depth + (1 - position / first).clamp(min=0) ** 2
        if last:
            depth = depth + (1 - (self.grid[d] - position) / last).clamp(min=0) ** 2
        return self.strength * depth

    def apply(self, x: Tensor) -> Tensor:
        result = self.exact_diagonal() * x
        for d, (face, ends) in enumerate(zip(self.faces, self.boundary, strict=True)):
            add_neighbours(result, x, d - len(self.grid), ends, (face, -1), (face, -1))
        return result

    def apply_adjoint(self, y: Tensor) -> Tensor:
        adjoint: Tensor = with_conjugate(self.apply, y)  # A^T = A, so the adjoint has conjugated coefficients
        return adjoint

    def for_one_solve(self) -> Helmholtz:
        result = copy.copy(self)
        result.cells = self.exact_diagonal()
        return result

    @property
    def T(self) -> LinearOperator:
        return self

    def exact_diagonal(self) -> Tensor:
        if self.cells is not None:
            return self.cells
        result = -self.mass * self.wavenumber.square()
        for d, face in enumerate(self.faces):
            result = result + lower(face, d - len(self.grid)) + upper(face, d - len(self.grid))
        return result

    def factorise(self) -> Factorisation | None:
        return factorise_line(-self.faces[-1], self.exact_diagonal(), -self.faces[-1], self.grid, self.boundary)

    def _label(self) -> str:
        return f"Helmholtz({describe_boundary(self.boundary)}, {self.layer})"
