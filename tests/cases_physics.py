"""Differential operators on grids and graphs. Their matrices are summed up entry by entry, in loops over cells and faces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import torch
from operator_cases import OperatorCase, draw
from torch import Tensor

from nablasolve.operators import ConvectionDiffusion, Diffusion, GraphLaplacian, Helmholtz, Stokes

REAL = (torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)


class Entries:
    """A matrix as a list of row, column and value; repeated places add up."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []
        self.values: list[Tensor] = []

    def add(self, row: int, column: int, value: Tensor) -> None:
        self.places.append((row, column))
        self.values.append(value)

    def matrix(self, n: int, dtype: torch.dtype) -> Tensor:
        values = torch.stack([value.to(dtype) for value in self.values])
        where = torch.zeros(n * n, len(values), dtype=dtype)
        for column, (i, j) in enumerate(self.places):
            where[i * n + j, column] = 1
        return (where @ values).reshape(n, n)


def number(grid: Sequence[int], cell: Sequence[int]) -> int:
    """The place of a cell in the flattened grid."""
    result = 0
    for n, i in zip(grid, cell, strict=True):
        result = result * n + i
    return result


def mean(a: Tensor, b: Tensor, kind: str) -> Tensor:
    return 2 / (1 / a + 1 / b) if kind == "harmonic" else (a + b) / 2


def moved(cell: Sequence[int], d: int, by: int) -> tuple[int, ...]:
    return tuple(i + by * (e == d) for e, i in enumerate(cell))


def finite_volumes(
    k: Tensor,
    boundary: Sequence[tuple[str, str]],
    spacing: Sequence[float],
    v: Tensor | None = None,
    reaction: Any = None,
    kind: str = "harmonic",
    scheme: str = "upwind",
) -> Tensor:
    """For each cell, what leaves it through its two faces in each dimension."""
    grid = k.shape
    entries = Entries()
    for cell in product(*map(range, grid)):
        i = number(grid, cell)
        if reaction is not None:
            entries.add(i, i, reaction.expand(grid)[cell] if isinstance(reaction, Tensor) else torch.tensor(reaction))
        for d, h in enumerate(spacing):
            for sign in (-1, 1):  # of the outward normal
                end = boundary[d][(sign + 1) // 2]
                other = moved(cell, d, sign)
                inside = 0 <= other[d] < grid[d]
                if not inside and end == "periodic":
                    other, inside = tuple(o % n for o, n in zip(other, grid, strict=True)), True
                if inside:
                    if other == cell:
                        continue
                    j = number(grid, other)
                    conduction = mean(k[cell], k[other], kind) / h**2
                    entries.add(i, i, conduction)
                    entries.add(i, j, -conduction)
                    if v is not None:
                        outward = sign * (v[(d, *cell)] + v[(d, *other)]) / 2 / h
                        if scheme == "central":
                            entries.add(i, i, outward / 2)
                            entries.add(i, j, outward / 2)
                        else:
                            entries.add(i, i, outward.clamp(min=0))
                            entries.add(i, j, outward.clamp(max=0))
                    continue
                if end == "dirichlet":
                    entries.add(i, i, k[cell] / (h / 2) / h)
                if v is not None and (end == "neumann" or (end == "dirichlet" and scheme == "upwind")):
                    outward = sign * v[(d, *cell)] / h
                    entries.add(i, i, outward if end == "neumann" else outward.clamp(min=0))
    dtype = k.dtype if v is None else torch.promote_types(k.dtype, v.dtype)
    if isinstance(reaction, Tensor):
        dtype = torch.promote_types(dtype, reaction.dtype)
    return entries.matrix(math.prod(grid), dtype)


def helmholtz(
    k: Tensor, layers: Sequence[tuple[int, int]], strength: float, layer: str, spacing: Sequence[float], boundary: str
) -> Tensor:
    grid = k.shape

    def g(d: int, position: float) -> float:
        """`strength q^2` at a distance of so many cells from the lower end."""
        depths = [1 - position / layers[d][0] if layers[d][0] else 0, 0]
        depths[1] = 1 - (grid[d] - position) / layers[d][1] if layers[d][1] else 0
        return strength * (max(0, depths[0]) ** 2 + max(0, depths[1]) ** 2)

    entries = Entries()
    for cell in product(*map(range, grid)):
        i = number(grid, cell)
        here = [g(d, cell[d] + 0.5) for d in range(len(grid))]
        pml = layer == "pml"
        mass = math.prod(1 + 1j * s for s in here) if pml else 1 + 1j * sum(here)
        entries.add(i, i, -mass * k[cell] ** 2)
        for d, h in enumerate(spacing):
            for sign in (-1, 1):
                factor = 1 / h**2
                if pml:
                    factor = factor / (1 + 1j * g(d, cell[d] + 0.5 + sign / 2))
                    factor *= math.prod(1 + 1j * s for e, s in enumerate(here) if e != d)
                other = moved(cell, d, sign)
                if not 0 <= other[d] < grid[d]:
                    if boundary == "dirichlet":
                        entries.add(i, i, torch.tensor(2 * factor, dtype=torch.complex128))
                    if boundary != "periodic":
                        continue
                    other = tuple(o % n for o, n in zip(other, grid, strict=True))
                entries.add(i, i, torch.tensor(factor, dtype=torch.complex128))
                entries.add(i, number(grid, other), torch.tensor(-factor, dtype=torch.complex128))
    return entries.matrix(math.prod(grid), k.dtype.to_complex())


def stokes(grid: Sequence[int], eta: Tensor, boundary: Sequence[tuple[str, str]], spacing: Sequence[float],
           gauge: float, kind: str = "arithmetic") -> Tensor:  # fmt: skip
    """`[[E^T W E, -D^T], [-D, -gauge/n]]`: the dissipation is a sum over strain rates `E` with weights `W`."""
    eta, ndim = eta.expand(tuple(grid)), len(grid)
    periodic = [ends[0] == "periodic" for ends in boundary]
    shapes = [[n - (e == d and not periodic[d]) for e, n in enumerate(grid)] for d in range(ndim)]
    starts = [sum(math.prod(s) for s in shapes[:d]) for d in range(ndim + 1)]
    n = starts[-1] + math.prod(grid)

    def velocity(d: int, place: Sequence[int]) -> tuple[int, float] | None:
        """The unknown of component `d` at face `place[d]` and cell `place[e]`, with its weight; None where it is zero.

        Beyond a wall the fluid moves backwards where it sticks, so that the mean with the cell inside is zero, and the
        same where it slips.
        """
        place, weight = list(place), 1.0
        for e in range(ndim):
            if periodic[e]:
                place[e] %= grid[e]
            elif e == d:
                place[e] -= 1
                if not 0 <= place[e] < grid[e] - 1:
                    return None
            elif not 0 <= place[e] < grid[e]:
                upper_end = place[e] >= grid[e]
                weight *= -1.0 if boundary[e][upper_end] == "no-slip" else 1.0
                place[e] = grid[e] - 1 if upper_end else 0
        return starts[d] + number(shapes[d], place), weight

    def row(terms: Sequence[tuple[int, Sequence[int], float]]) -> Tensor:
        result = torch.zeros(n, dtype=torch.float64)
        for d, place, factor in terms:
            found = velocity(d, place)
            if found is not None:
                result[found[0]] += factor * found[1]
        return result

    rates, weights, divergences = [], [], []
    for cell in product(*map(range, grid)):
        total = torch.zeros(n, dtype=torch.float64)
        for d, h in enumerate(spacing):
            rate = row([(d, moved(cell, d, 1), 1 / h), (d, cell, -1 / h)])
            rates.append(rate)
            weights.append(2 * eta[cell])
            total += rate
        divergences.append(total)
    for d, e in combinations(range(ndim), 2):
        ranges = [range(m + (a in (d, e) and not periodic[a])) for a, m in enumerate(grid)]
        for corner in product(*ranges):
            around = []
            for a, b in product((-1, 0), repeat=2):
                cell = moved(moved(corner, d, a), e, b)
                if all(periodic[x] or 0 <= cell[x] < grid[x] for x in (d, e)):
                    around.append(eta[tuple(c % m for c, m in zip(cell, grid, strict=True))])
            around = torch.stack(around)
            # a position in a wall has half a cell around it
            share = math.prod(0.5 if not periodic[x] and corner[x] in (0, grid[x]) else 1.0 for x in (d, e))
            rates.append(
                row([
                    (d, corner, 1 / spacing[e]), (d, moved(corner, e, -1), -1 / spacing[e]),
                    (e, corner, 1 / spacing[d]), (e, moved(corner, d, -1), -1 / spacing[d]),
                ])
            )  # fmt: skip
            weights.append(share * (around.mean() if kind == "arithmetic" else 1 / (1 / around).mean()))
    E = torch.stack(rates).to(eta.dtype)
    D = torch.stack(divergences).to(eta.dtype)
    viscous = E.mT @ (torch.stack(weights)[:, None] * E)
    pressure = torch.nn.functional.pad(torch.eye(math.prod(grid), dtype=eta.dtype), (starts[-1], 0))
    ones = pressure.sum(0, keepdim=True)
    return viscous - D.mT @ pressure - pressure.mT @ D - gauge / math.prod(grid) * ones.mT @ ones


def graph_laplacian(edges: Sequence[tuple[int, int]], weights: Tensor, nodes: int) -> Tensor:
    entries = Entries()
    for (i, j), w in zip(edges, weights, strict=True):
        for row, column in ((i, j), (j, i)):
            entries.add(row, row, w)
            entries.add(row, column, -w)
    return entries.matrix(nodes, weights.dtype)


def positive(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers between 1 and 2, and some phase where the dtype has one."""
    x = draw(*shape, dtype=dtype, seed=seed)
    return 1 + torch.sigmoid(x.real) + 0.5j * torch.tanh(x.imag) if dtype.is_complex else 1 + torch.sigmoid(x)


def diffusion_case(
    name: str, grid: tuple[int, ...], boundary: Any, pairs: Sequence[tuple[str, str]], spacing: Any = 1.0,
    kind: str = "harmonic", with_reaction: bool = True, claims: dict[str, bool] | None = None, **options: Any,
) -> OperatorCase:  # fmt: skip
    sizes = spacing if isinstance(spacing, tuple) else (spacing,) * len(grid)

    def parameters(dtype: torch.dtype) -> dict[str, Tensor]:
        k = {"k": positive(*grid, dtype=dtype)}
        return k | ({"c": 0.5 + positive(*grid, dtype=dtype, seed=1)} if with_reaction else {})

    return OperatorCase(
        name,
        parameters=parameters,
        build=lambda k, c=None: Diffusion(
            k, boundary=boundary, spacing=spacing, reaction=c, mean=kind, **({} if k.is_complex() else claims or {})
        ),
        dense=lambda k, c=None: finite_volumes(k, pairs, sizes, reaction=c, kind=kind),
        **options,
    )


def convection_case(
    name: str, grid: tuple[int, ...], boundary: Any, pairs: Sequence[tuple[str, str]], scheme: str, **options: Any
) -> OperatorCase:
    spacing = (0.8, 1.1, 1.3)[: len(grid)]
    return OperatorCase(
        name,
        parameters=lambda dtype: {
            "k": positive(*grid, dtype=dtype),
            "v": draw(len(grid), *grid, dtype=torch.float32 if dtype in (torch.float32, torch.complex64) else torch.float64),
            "c": 2 + positive(*grid, dtype=dtype, seed=1),
        },
        build=lambda k, v, c: ConvectionDiffusion(k, v, boundary=boundary, spacing=spacing, reaction=c, scheme=scheme),
        dense=lambda k, v, c: finite_volumes(k, pairs, spacing, v, c, scheme=scheme),
        **options,
    )


def helmholtz_case(
    name: str, grid: tuple[int, ...], absorbing: Any, layers: Sequence[tuple[int, int]], layer: str, boundary: str,
    lossy: bool = False, **options: Any,
) -> OperatorCase:  # fmt: skip
    spacing = (0.9, 1.2, 1.0)[: len(grid)]
    return OperatorCase(
        name,
        parameters=lambda dtype: {"k": positive(*grid, dtype=dtype if lossy else dtype.to_real())},
        build=lambda k: Helmholtz(k, spacing=spacing, absorbing=absorbing, strength=1.5, layer=layer, boundary=boundary),
        dense=lambda k: helmholtz(k, layers, 1.5, layer, spacing, boundary),
        dtypes=COMPLEX,
        **options,
    )


def stokes_case(
    name: str, grid: tuple[int, ...], boundary: Any, pairs: Sequence[tuple[str, str]], kind: str = "arithmetic",
    gauge: float = 1.0, scalar: bool = False, dtypes: tuple[torch.dtype, ...] = REAL, **options: Any,
) -> OperatorCase:  # fmt: skip
    spacing = (0.9, 1.2, 1.0)[: len(grid)]
    return OperatorCase(
        name,
        parameters=lambda dtype: {"eta": positive(*(() if scalar else grid), dtype=dtype)},
        build=lambda eta: Stokes(grid, eta, boundary=boundary, spacing=spacing, gauge=gauge, mean=kind),
        dense=lambda eta: stokes(grid, eta, pairs, spacing, gauge, kind),
        dtypes=dtypes,
        **options,
    )


def graph_case(name: str, edges: Sequence[tuple[int, int]], nodes: int | None, count: int) -> OperatorCase:
    return OperatorCase(
        name,
        parameters=lambda dtype: {"w": positive(len(edges), dtype=dtype)},
        build=lambda w: GraphLaplacian(torch.tensor(edges, device=w.device).mT, w, nodes),
        dense=lambda w: graph_laplacian(edges, w, count),
        dtypes=REAL,
        solvable=False,
    )


DIRICHLET, NEUMANN, PERIODIC, CLOSED = ((end, end) for end in ("dirichlet", "neumann", "periodic", "closed"))
STICK, SLIP = ("no-slip",) * 2, ("free-slip",) * 2

CASES = [
    diffusion_case("diffusion in 1-D", (6,), "dirichlet", [DIRICHLET], 0.7, with_reaction=False, direct=True),
    diffusion_case(
        "diffusion, claimed definite", (3, 4), "dirichlet", [DIRICHLET] * 2, with_reaction=False,
        claims={"positive_definite": True},
    ),
    diffusion_case("diffusion, Neumann", (3, 4), "neumann", [NEUMANN] * 2, (0.8, 1.2)),
    diffusion_case("diffusion, periodic", (4, 3), "periodic", [PERIODIC] * 2, kind="arithmetic"),
    diffusion_case("diffusion, a period of two cells and of one", (2, 1, 3), "periodic", [PERIODIC] * 3),
    diffusion_case(
        "diffusion, pure Neumann", (3, 4), "neumann", [NEUMANN] * 2, with_reaction=False, solvable=False,
        claims={"positive_semidefinite": True},
    ),
    diffusion_case(
        "diffusion in 3-D, mixed", (2, 3, 3), ("neumann", ("dirichlet", "neumann"), "periodic"),
        [NEUMANN, ("dirichlet", "neumann"), PERIODIC], (1.0, 0.8, 1.2),
    ),
    OperatorCase(
        "diffusion, a number for a reaction",
        parameters=lambda dtype: {"k": positive(3, 4, dtype=dtype)},
        build=lambda k: Diffusion(k, boundary="neumann", reaction=1.5),
        dense=lambda k: finite_volumes(k, [NEUMANN] * 2, (1.0, 1.0), reaction=1.5),
    ),
    OperatorCase(
        "diffusion, a complex reaction",
        parameters=lambda dtype: {"k": positive(3, 4, dtype=dtype.to_real()), "c": draw(4, dtype=dtype) + 2j},
        build=lambda k, c: Diffusion(k, boundary="neumann", reaction=c),
        dense=lambda k, c: finite_volumes(k, [NEUMANN] * 2, (1.0, 1.0), reaction=c),
        dtypes=COMPLEX,
    ),
    convection_case("upwind in 1-D", (6,), "dirichlet", [DIRICHLET], "upwind", direct=True),
    convection_case("upwind, Dirichlet and Neumann", (3, 4), ("dirichlet", "neumann"), [DIRICHLET, NEUMANN], "upwind"),
    convection_case("upwind, closed", (3, 4), "closed", [CLOSED] * 2, "upwind", dtypes=REAL),
    convection_case(
        "upwind in 3-D, mixed", (2, 3, 3), (("closed", "neumann"), "dirichlet", "periodic"),
        [("closed", "neumann"), DIRICHLET, PERIODIC], "upwind", dtypes=REAL,
    ),
    convection_case("upwind, a period of two cells and of one", (2, 1, 3), "periodic", [PERIODIC] * 3, "upwind", dtypes=REAL),
    convection_case(
        "central, mixed", (3, 4), (("dirichlet", "neumann"), "periodic"), [("dirichlet", "neumann"), PERIODIC], "central",
    ),
    convection_case("central, Dirichlet", (3, 4), "dirichlet", [DIRICHLET] * 2, "central", dtypes=REAL),
    helmholtz_case("matched layer in 1-D", (8,), 3, [(3, 3)], "pml", "dirichlet", direct=True),
    helmholtz_case("matched layer", (4, 5), (1, (2, 0)), [(1, 1), (2, 0)], "pml", "neumann", lossy=True),
    helmholtz_case("matched layer in 3-D", (3, 3, 2), (1, (0, 2), 0), [(1, 1), (0, 2), (0, 0)], "pml", "dirichlet"),
    helmholtz_case("matched layer around a period", (4, 5), ((1, 2), 0), [(1, 2), (0, 0)], "pml", "periodic"),
    helmholtz_case("damping layer", (4, 5), (1, 2), [(1, 1), (2, 2)], "damping", "dirichlet"),
    helmholtz_case("damping layer in a lossy medium", (4, 5), (1, (2, 0)), [(1, 1), (2, 0)], "damping", "neumann", lossy=True),
    stokes_case("Stokes, sticking", (3, 4), "no-slip", [STICK] * 2),
    stokes_case("Stokes of a complex viscosity", (3, 3), "no-slip", [STICK] * 2, dtypes=COMPLEX),
    stokes_case("Stokes, one viscosity", (3, 3), "no-slip", [STICK] * 2, scalar=True),
    stokes_case(
        "Stokes, slipping", (3, 3), ("no-slip", ("free-slip", "no-slip")), [STICK, ("free-slip", "no-slip")], "harmonic",
    ),
    stokes_case("Stokes in a channel", (3, 4), ("periodic", "no-slip"), [PERIODIC, STICK], "harmonic"),
    stokes_case("Stokes in a period of two cells", (2, 3), ("periodic", "no-slip"), [PERIODIC, STICK]),
    stokes_case("Stokes without gauge", (3, 3), "no-slip", [STICK] * 2, gauge=0.0, solvable=False),
    stokes_case(
        "Stokes in 3-D", (2, 3, 2), ("no-slip", "periodic", ("no-slip", "free-slip")),
        [STICK, PERIODIC, ("no-slip", "free-slip")],
    ),
    graph_case("graph", [(0, 1), (1, 2), (2, 3), (3, 0), (1, 3), (4, 2)], None, 5),
    graph_case("graph of four components, an edge given twice and a loop", [(4, 3), (3, 4), (0, 2), (2, 2), (2, 5)], 7, 7),
]  # fmt: skip
