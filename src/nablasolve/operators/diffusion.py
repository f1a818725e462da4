"""Diffusion and convection-diffusion by finite volumes on regular grids of one to three dimensions.

An unknown stands for a cell. What passes a face is a flux between the two cells beside it, and a cell's equation is what
leaves it: so what leaves one cell enters another, exactly. The faces of a dimension of `n` cells are numbered from 0 to
`n`; face `i` has cell `i - 1` below and cell `i` above it, and faces 0 and `n` are the boundary (one and the same face in
a periodic dimension).
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice, check_integer
from .banded import Tridiagonal
from .base import StructuredOperator
from .claims import Claims
from .factorisation import Factorisation, safe_divide
from .in_place import add_product, with_conjugate, zeros_for
from .nullspace import Nullspace, constants
from .spaces import any_batch, is_complex

MEANS = ("harmonic", "arithmetic")


class Diffusion(StructuredOperator):
    r"""`x -> -div(k grad x) + c x`, on cells.

    The flux through a face is `k (x_above - x_below) / h` with a mean of the conductivities of the two cells. On a
    Dirichlet boundary `x = 0` holds on the face, half a cell from the centre, where the flux is `2 k x / h` with the
    conductivity of the cell (cell-centred scheme; second order in `h`). On a Neumann boundary the flux is zero. Other
    values go into `b`, in the cells at the boundary: a Dirichlet value `g` adds `2 k g / h^2`, an outward derivative
    `dx/dn = g` adds `k g / h`.

    Real coefficients make a real symmetric operator, which is claimed. Whether it is definite depends on their signs,
    which are data: say `positive_definite=True` for a positive conductivity with some Dirichlet boundary, or with a
    positive reaction; `positive_semidefinite=True` for Neumann and periodic boundaries alone. There, and without a
    reaction, the constants are taken for the nullspace, on both sides. That is so where the real parts of all conductivities
    have one sign, and the cells that conduct are connected; where they are not, say `nullspace=` (`aslinearoperator`).

    Args:
        conductivity: `k`, a floating-point or complex tensor of shape `(*batch, *grid)`, in any unit.
        boundary: `"dirichlet"`, `"neumann"` or `"periodic"`; or one of them for each dimension, where a pair stands for the
            lower and the upper end of it: `("periodic", ("dirichlet", "neumann"))`.
        spacing: the size `h` of a cell, or one for each dimension, in a unit of length that `k` and `b` share.
        reaction: `c`, a number or a tensor that broadcasts against `k`.
        mean: of the conductivities on a face: `"harmonic"`, which is exact for layers across a flow, or `"arithmetic"`.
        ndim: the number of dimensions of the grid, 1 to 3; by default all those of `conductivity`. Those before are batch
            dimensions.
        claims: `positive_definite=True`, `positive_semidefinite=True`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if it has the wrong shape, dtype, device or value.

    Source: Patankar 1980, *Numerical Heat Transfer and Fluid Flow*, §4.2 (the harmonic mean: eq. 4.9).
    """

    def __init__(
        self,
        conductivity: Tensor,
        *,
        boundary: Any = "dirichlet",
        spacing: float | Sequence[float] = 1.0,
        reaction: Tensor | float | None = None,
        mean: str = "harmonic",
        ndim: int | None = None,
        **claims: Any,
    ) -> None:
        self.grid = check_field("conductivity", conductivity, ndim)
        self.boundary = check_boundary(boundary, len(self.grid), ("dirichlet", "neumann", "periodic"))
        self.spacing = check_spacing(spacing, len(self.grid))
        self.mean = check_choice("mean", mean, MEANS)
        self.conductivity = conductivity
        self.reaction = check_reaction(reaction, conductivity, self.grid)
        self.faces: tuple[Tensor, ...] | None = None
        dtype = _common_dtype(conductivity, self.reaction)
        symmetric = Claims(hermitian=not dtype.is_complex)
        super().__init__(any_batch(self.grid, conductivity, dtype), claims=Claims.named(claims) | symmetric)

    def apply(self, x: Tensor) -> Tensor:
        faces = self._faces()
        reaction = [] if self.reaction is None else [self.reaction]
        result = zeros_for(self.grid, x, self.conductivity, *reaction)
        for factor in reaction:
            add_product(result, factor, x)
        for d, (face, ends) in enumerate(zip(faces, self.boundary, strict=True)):
            dim = d - len(self.grid)
            # differences before products, so that constants leave nothing, and what varies slowly keeps its digits
            difference, between = lower(x, dim) - upper(x, dim), inside(face, dim)
            lower(result, dim).addcmul_(between, difference)
            upper(result, dim).addcmul_(between, difference, value=-1)
            if ends[0] == "periodic":
                around = first(face, dim) * (last(x, dim) - first(x, dim))
                first(result, dim).sub_(around)
                last(result, dim).add_(around)
            for end, at in zip(ends, (first, last), strict=True):
                if end == "dirichlet":
                    at(result, dim).addcmul_(at(face, dim), at(x, dim))
        return result

    def apply_adjoint(self, y: Tensor) -> Tensor:
        # the matrix is symmetric, so its adjoint has conjugated coefficients
        return with_conjugate(self.apply, y) if is_complex(self.domain) else self.apply(y)

    def _faces(self) -> tuple[Tensor, ...]:
        """The conductivities of the faces of each dimension, divided by `h^2`."""
        if self.faces is not None:
            return self.faces
        return tuple(
            transmissibility(self.conductivity, d - len(self.grid), ends, h, self.mean)
            for d, (ends, h) in enumerate(zip(self.boundary, self.spacing, strict=True))
        )

    def for_one_solve(self) -> Diffusion:
        """The same operator, whose coefficients are computed once: tensors that gradients pass through."""
        result = copy.copy(self)
        result.faces = self._faces()
        return result

    def exact_diagonal(self) -> Tensor:
        terms = [] if self.reaction is None else [self.reaction * torch.ones_like(self.conductivity)]
        for d, face in enumerate(self._faces()):
            dim = d - len(self.grid)
            terms.append(lower(face, dim) + upper(face, dim))
        return sum(terms[1:], terms[0])

    def known_nullspace(self) -> Nullspace | None:
        closed = all(end != "dirichlet" for ends in self.boundary for end in ends)
        return constants(self.domain) if closed and self.reaction is None else None

    def known_left_nullspace(self) -> Nullspace | None:
        return self.known_nullspace()  # the matrix is symmetric, and the constants are real

    def factorise(self) -> Factorisation | None:
        face = self._faces()[-1]
        return factorise_line(-face, self.exact_diagonal(), -face, self.grid, self.boundary)

    def _label(self) -> str:
        return f"Diffusion({describe_boundary(self.boundary)}, {self.mean})"


class ConvectionDiffusion(StructuredOperator):
    r"""`x -> -div(k grad x) + div(v x) + c x`, on cells.

    Diffusion is that of `Diffusion`. Convection carries the value of a face with the velocity of the face, the mean of the
    velocities of the two cells. Upwind differences take the value of the cell where the flow comes from: first order in
    `h`, and free of oscillations. Central ones take the mean of the two cells: second order, and wiggling where the cell
    Péclet number `|v| h / k` exceeds 2.

    At a boundary the velocity of the face is that of the cell. The face has the value 0 where Dirichlet's condition
    holds (upwind differences carry the cell's value out, and nothing in), and the cell's value where Neumann's does, so
    that the flow carries it through the boundary. `"closed"` lets nothing through, neither by diffusion nor by
    convection: the sum over the grid is then conserved, as it is with `"periodic"`.

    Where the sum is conserved, and there is no reaction, the constants are taken for the nullspace of the adjoint. They are all
    of it for positive conductivities with upwind differences; and with central ones as well, but for exceptional velocities
    of cell Péclet numbers of 2 and more.

    The operator is not symmetric, and nothing is claimed. Its derivative with respect to `v` is exact wherever no
    velocity of a face is zero; there the upwind difference has a kink, and gets the mean of its two derivatives.

    Args:
        conductivity: `k`, a floating-point or complex tensor of shape `(*batch, *grid)`.
        velocity: `v`, a real floating-point tensor of shape `(*batch, d, *grid)` for `d` dimensions, in units of
            `k` / `spacing`.
        boundary: `"dirichlet"`, `"neumann"`, `"closed"` or `"periodic"`; or one of them for each dimension, where a pair
            stands for the lower and the upper end of it.
        spacing: the size `h` of a cell, or one for each dimension.
        reaction: `c`, a number or a tensor that broadcasts against `k`.
        scheme: `"upwind"` or `"central"`.
        mean: of the conductivities on a face, `"harmonic"` or `"arithmetic"`.
        ndim: the number of dimensions of the grid, 1 to 3; by default all those of `conductivity`. Those before are batch
            dimensions.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if it has the wrong shape, dtype, device or value.

    Source: Patankar 1980, *Numerical Heat Transfer and Fluid Flow*, §5.2.
    """

    def __init__(
        self,
        conductivity: Tensor,
        velocity: Tensor,
        *,
        boundary: Any = "dirichlet",
        spacing: float | Sequence[float] = 1.0,
        reaction: Tensor | float | None = None,
        scheme: str = "upwind",
        mean: str = "harmonic",
        ndim: int | None = None,
    ) -> None:
        self.grid = check_field("conductivity", conductivity, ndim)
        n = len(self.grid)
        _check_tensor("velocity", velocity)
        if velocity.is_complex():
            raise ValueError(f"velocity: expected a real dtype, got {velocity.dtype}")
        if tuple(velocity.shape[-n - 1 :]) != (n, *self.grid):
            raise ValueError(
                f"velocity: expected shape {('...', n, *self.grid)} for a conductivity of shape {tuple(conductivity.shape)}, "
                f"got {tuple(velocity.shape)}".replace("'...'", "...")
            )
        _check_device("velocity", velocity, conductivity)
        self.boundary = check_boundary(boundary, n, ("dirichlet", "neumann", "closed", "periodic"))
        self.spacing = check_spacing(spacing, n)
        self.scheme = check_choice("scheme", scheme, ("upwind", "central"))
        self.mean = check_choice("mean", mean, MEANS)
        self.conductivity = conductivity
        self.velocity = velocity
        self.reaction = check_reaction(reaction, conductivity, self.grid)
        self.coefficients: tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]] | None = None
        super().__init__(any_batch(self.grid, conductivity, _common_dtype(conductivity, self.reaction, velocity)))

    def apply(self, x: Tensor) -> Tensor:
        cells, fluxes = self._coefficients()
        result = cells * x
        for d, ((below, above), ends) in enumerate(zip(fluxes, self.boundary, strict=True)):
            add_neighbours(result, x, d - len(self.grid), ends, (below, -1), (above, 1))
        return result

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return with_conjugate(self._apply_transpose, y) if is_complex(self.domain) else self._apply_transpose(y)

    def _apply_transpose(self, y: Tensor) -> Tensor:
        cells, fluxes = self._coefficients()
        result = cells * y
        for d, ((below, above), ends) in enumerate(zip(fluxes, self.boundary, strict=True)):
            add_neighbours(result, y, d - len(self.grid), ends, (above, 1), (below, -1))
        return result

    def _coefficients(self) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
        """The diagonal, and `_flux` of each dimension."""
        if self.coefficients is not None:
            return self.coefficients
        fluxes = tuple(self._flux(d) for d in range(len(self.grid)))
        cells = [] if self.reaction is None else [self.reaction * torch.ones_like(self.conductivity)]
        for d, (below, above) in enumerate(fluxes):
            cells.append(upper(below, d - len(self.grid)) - lower(above, d - len(self.grid)))
        return sum(cells[1:], cells[0]), fluxes

    def for_one_solve(self) -> ConvectionDiffusion:
        """The same operator, whose coefficients are computed once: tensors that gradients pass through."""
        result = copy.copy(self)
        result.coefficients = self._coefficients()
        return result

    def _flux(self, d: int) -> tuple[Tensor, Tensor]:
        """What the cells below and above a face contribute to the flux through it, divided by `h`."""
        dim, ends, h = d - len(self.grid), self.boundary[d], self.spacing[d]
        conduction = transmissibility(self.conductivity, dim, ends, h, self.mean)
        v = self.velocity.select(-len(self.grid) - 1, d) / h
        first, last = v.narrow(dim, 0, 1), v.narrow(dim, v.shape[dim] - 1, 1)
        below, above = self._carried((lower(v, dim) + upper(v, dim)) / 2)
        zero = torch.zeros_like(first)
        if ends[0] == "periodic":
            around = self._carried((last + first) / 2) if v.shape[dim] > 1 else (zero, zero)
            at_first = at_last = around
        else:
            at_first = zero, self._carried_through(ends[0], first)[1]
            at_last = self._carried_through(ends[1], last)[0], zero
        below = torch.cat([at_first[0], below, at_last[0]], dim)
        above = torch.cat([at_first[1], above, at_last[1]], dim)
        return conduction + below, above - conduction

    def _carried(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the cells below and above in the flux through a face of velocity `v`."""
        if self.scheme == "central":
            return v / 2, v / 2
        return (v + v.abs()) / 2, (v - v.abs()) / 2

    def _carried_through(self, end: str, v: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of a cell in the flux through its face in the boundary, as its upper and as its lower face."""
        if end == "neumann":
            return v, v
        if end == "closed" or self.scheme == "central":
            return torch.zeros_like(v), torch.zeros_like(v)
        return self._carried(v)

    def exact_diagonal(self) -> Tensor:
        return self._coefficients()[0]

    def known_left_nullspace(self) -> Nullspace | None:
        conserved = all(end in ("closed", "periodic") for ends in self.boundary for end in ends)
        return constants(self.domain) if conserved and self.reaction is None else None

    def factorise(self) -> Factorisation | None:
        cells, fluxes = self._coefficients()
        below, above = fluxes[-1]
        return factorise_line(-below, cells, above, self.grid, self.boundary)

    def _label(self) -> str:
        return f"ConvectionDiffusion({describe_boundary(self.boundary)}, {self.scheme}, {self.mean})"


# -- stencils on a grid, shared with the operators of the neighbouring files -------------------------------------------


def add_neighbours(
    result: Tensor, x: Tensor, dim: int, ends: tuple[str, str], below: tuple[Tensor, int], above: tuple[Tensor, int]
) -> None:
    """Add to each cell what its two neighbours along a dimension contribute.

    Args:
        result: of the cells.
        x: the cells.
        dim: the dimension, counted from the end.
        ends: the names of the boundary conditions.
        below: a number for each face, and its sign: the entry in the row of the cell above the face, and the column of the
            cell below.
        above: that in the row of the cell below, and the column of the cell above.
    """
    (into_upper, sign_upper), (into_lower, sign_lower) = below, above
    upper(result, dim).addcmul_(inside(into_upper, dim), lower(x, dim), value=sign_upper)
    lower(result, dim).addcmul_(inside(into_lower, dim), upper(x, dim), value=sign_lower)
    if ends[0] == "periodic":
        first(result, dim).addcmul_(first(into_upper, dim), last(x, dim), value=sign_upper)
        last(result, dim).addcmul_(last(into_lower, dim), first(x, dim), value=sign_lower)


def first(x: Tensor, dim: int) -> Tensor:
    """The first entry of a dimension."""
    return x.narrow(dim, 0, 1)


def last(x: Tensor, dim: int) -> Tensor:
    """The last entry of a dimension."""
    return x.narrow(dim, x.shape[dim] - 1, 1)


def inside(x: Tensor, dim: int) -> Tensor:
    """All entries of a dimension but the first and the last."""
    return x.narrow(dim, 1, x.shape[dim] - 2)


def lower(x: Tensor, dim: int) -> Tensor:
    """All entries of a dimension but the last."""
    return x.narrow(dim, 0, x.shape[dim] - 1)


def upper(x: Tensor, dim: int) -> Tensor:
    """All entries of a dimension but the first."""
    return x.narrow(dim, 1, x.shape[dim] - 1)


def transmissibility(k: Tensor, dim: int, ends: tuple[str, str], h: float, mean: str) -> Tensor:
    """The conductivity of each face of a dimension, divided by `h^2`, for `k` on cells.

    A face of a Dirichlet boundary is half a cell from the centre: twice the conductivity. Nothing passes any other boundary.
    """
    first, last = k.narrow(dim, 0, 1), k.narrow(dim, k.shape[dim] - 1, 1)
    if ends[0] == "periodic":
        # a cell that is its own neighbour exchanges nothing
        around = _mean(last, first, mean) if k.shape[dim] > 1 else torch.zeros_like(first)
        at_ends = [around, around]
    else:
        at_ends = [
            2 * cell if end == "dirichlet" else torch.zeros_like(cell) for end, cell in zip(ends, (first, last), strict=True)
        ]
    return torch.cat([at_ends[0], _mean(lower(k, dim), upper(k, dim), mean), at_ends[1]], dim) / h**2


def factorise_line(
    below: Tensor, cells: Tensor, above: Tensor, grid: tuple[int, ...], boundary: tuple[tuple[str, str], ...]
) -> Factorisation | None:
    """A direct solve in one dimension that is not periodic, where the matrix is tridiagonal; None elsewhere.

    Args:
        below: for each face, the entry in the row of the cell above it, and the column of the cell below.
        cells: the diagonal.
        above: for each face, the entry in the row of the cell below it, and the column of the cell above.
        grid: the number of cells in each dimension.
        boundary: the names of the conditions at the ends of each dimension.
    """
    if len(grid) > 1 or grid[0] == 1 or boundary[0][0] == "periodic":
        return None
    dtype = torch.promote_types(torch.promote_types(below.dtype, cells.dtype), above.dtype)
    return Tridiagonal(below[..., 1:-1].to(dtype), cells.to(dtype), above[..., 1:-1].to(dtype)).factorise()


def _mean(a: Tensor, b: Tensor, kind: str) -> Tensor:
    if kind == "arithmetic":
        return (a + b) / 2
    return 2 * a * safe_divide(b, a + b)  # 0 between cells that do not conduct


# -- arguments ---------------------------------------------------------------------------------------------------------


def check_field(name: str, field: Any, ndim: int | None) -> tuple[int, ...]:
    """The grid of a field on cells: its last `ndim` dimensions.

    Raises:
        TypeError: if it is no Tensor, or `ndim` no integer.
        ValueError: if it has an integer dtype, or not one to three dimensions of at least one cell.
    """
    _check_tensor(name, field)
    n = field.ndim if ndim is None else check_integer("ndim", ndim)
    if ndim is not None and not 1 <= n <= 3:
        raise ValueError(f"ndim: expected 1, 2 or 3, got {n}")
    if not 1 <= n <= 3:
        remedy = "; give ndim= where the first dimensions are batch dimensions"
        raise ValueError(f"{name}: expected a grid of 1 to 3 dimensions, got shape {tuple(field.shape)}{remedy if n else ''}")
    if field.ndim < n:
        raise ValueError(f"{name}: expected at least the {n} dimensions of the grid, got shape {tuple(field.shape)}")
    grid = tuple(field.shape[field.ndim - n :])
    if 0 in grid:
        raise ValueError(f"{name}: expected at least one cell in each dimension, got shape {tuple(field.shape)}")
    return grid


def check_spacing(spacing: Any, ndim: int) -> tuple[float, ...]:
    """The size of a cell in each dimension.

    Raises:
        TypeError: if it is no number, nor a sequence of numbers.
        ValueError: if it is not one positive number, or one for each dimension.
    """
    sizes = [spacing] * ndim if isinstance(spacing, numbers.Real) else spacing
    if not isinstance(sizes, Sequence) or not all(isinstance(h, numbers.Real) for h in sizes):
        raise TypeError(f"spacing: expected a number, or one for each dimension, got {spacing!r}")
    result = tuple(float(h) for h in sizes)
    if len(result) != ndim or not all(0 < h < math.inf for h in result):
        raise ValueError(f"spacing: expected a positive number, or one for each of the {ndim} dimensions, got {spacing!r}")
    return result


def pairs(name: str, value: Any, ndim: int, kind: type, what: str) -> tuple[tuple[Any, Any], ...]:
    """What is given once, for each dimension, or for both ends of each dimension, as a pair for each dimension.

    Args:
        name: of the argument.
        value: one of a type, or a sequence whose entries are one, or two, of it.
        ndim: the number of dimensions.
        kind: the type.
        what: it is, in words.

    Raises:
        ValueError: if it is none of these.
    """
    entries = [value] * ndim if isinstance(value, kind) else value
    result = [
        (entry, entry) if isinstance(entry, kind) else tuple(entry) if isinstance(entry, Sequence) else ()
        for entry in (entries if isinstance(entries, Sequence) else ())
    ]
    if len(result) != ndim or not all(len(pair) == 2 and all(isinstance(end, kind) for end in pair) for pair in result):
        raise ValueError(f"{name}: expected {what}, or one (or a pair) for each of the {ndim} dimensions, got {value!r}")
    return tuple((pair[0], pair[1]) for pair in result)


def check_boundary(boundary: Any, ndim: int, known: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The names of the conditions at the lower and upper end of each dimension.

    Raises:
        ValueError: for an unknown name, a wrong number of them, or a dimension that is periodic at one end only.
    """
    result = pairs("boundary", boundary, ndim, str, "a name")
    for ends in result:
        for end in ends:
            check_choice("boundary", end, known)
        if "periodic" in ends and ends[0] != ends[1]:
            raise ValueError(f"boundary: expected both ends of a dimension to be periodic, or none, got {ends!r}")
    return result


def describe_boundary(boundary: tuple[tuple[str, str], ...]) -> str:
    """The names, as short as they can be."""
    names = [ends[0] if ends[0] == ends[1] else f"{ends[0]}|{ends[1]}" for ends in boundary]
    return names[0] if len(set(names)) == 1 else " x ".join(names)


def check_reaction(reaction: Any, conductivity: Tensor, grid: tuple[int, ...]) -> Tensor | complex | None:
    """The coefficient of `x`.

    Raises:
        TypeError: if it is no number, Tensor or None.
        ValueError: if it has an integer dtype, another device, or a shape that does not broadcast against the grid.
    """
    if reaction is None or isinstance(reaction, int | float | complex):
        return reaction or None  # none of it leaves the constants in the nullspace
    if not isinstance(reaction, Tensor):
        raise TypeError(f"reaction: expected a number, a Tensor or None, got {type(reaction).__name__}")
    _check_tensor("reaction", reaction)
    _check_device("reaction", reaction, conductivity)
    trailing = tuple(reaction.shape[max(0, reaction.ndim - len(grid)) :])
    if any(size not in (1, n) for size, n in zip(trailing[::-1], grid[::-1], strict=False)):
        raise ValueError(f"reaction: expected a shape that broadcasts against the grid {grid}, got {tuple(reaction.shape)}")
    return reaction


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if not (value.is_floating_point() or value.is_complex()):
        raise ValueError(f"{name}: expected a floating-point or complex dtype, got {value.dtype}")


def _check_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.ndim and value.device != like.device:
        raise ValueError(f"{name}: expected the device {like.device} of the conductivity, got {value.device}")


def _common_dtype(conductivity: Tensor, reaction: Any, *others: Tensor) -> torch.dtype:
    dtype = conductivity.dtype
    for other in (*others, reaction):
        if isinstance(other, Tensor):
            dtype = torch.promote_types(dtype, other.dtype)
        elif isinstance(other, complex):
            dtype = dtype.to_complex()
    return dtype


def _conj(value: Any) -> Any:
    return value if value is None else value.conj() if isinstance(value, Tensor) else value.conjugate()
