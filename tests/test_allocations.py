"""What one product with a stencil, a difference or a convolution allocates, in units of the field that it acts on.

The result is one unit, and is always needed: a product that wrote into a buffer of its own would change results that the
user keeps. What comes on top is stated with each operator. Coefficients and transforms that depend on the parameters only are
computed before, by `for_one_solve()`, as they are in a solve.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from operator_cases import away_from_zero, draw
from torch import Tensor
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from nablasolve import LinearOperator
from nablasolve.operators import (
    Banded,
    Circulant,
    ConvectionDiffusion,
    Convolution,
    Diffusion,
    FiniteDifference,
    FourierFilter,
    Gradient,
    GraphLaplacian,
    Hankel,
    Helmholtz,
    Laplacian,
    Stokes,
    Toeplitz,
    Tridiagonal,
    VaryingBlur,
)

N = 128
GRID = (N, N)
SIZE = N * N
LINES = 0.15  # of a unit, for what is as large as a few lines of the field: edges, margins, one frequency more

DOUBLE, COMPLEX = torch.float64, torch.complex128


def allocated(operator: LinearOperator, x: Any) -> int:
    """The bytes that torch's allocator gave out during one product, temporary copies inside of its functions included."""
    with torch.no_grad():
        operator.apply(x)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            operator.apply(x)
    events = run.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)


def conductivity(dtype: torch.dtype = DOUBLE) -> Tensor:
    return 2 + torch.sigmoid(draw(*GRID).to(DOUBLE)) + (0.5j if dtype.is_complex else 0)


def lattice() -> Tensor:
    """The edges of a grid, two for each node."""
    node = torch.arange(SIZE).reshape(GRID).roll
    here = torch.arange(SIZE)
    return torch.stack([here.repeat(2), torch.cat([node(1, 0).flatten(), node(1, 1).flatten()])])


def field(*batch: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return draw(*batch, *GRID, dtype=dtype, seed=3)


def line(dtype: torch.dtype = DOUBLE) -> Tensor:
    return draw(SIZE, dtype=dtype, seed=3)


def cases() -> dict[str, tuple[LinearOperator, Any, float]]:
    """Operators, what they act on, and how many units of the smaller of vector and result a product may allocate."""
    found: dict[str, tuple[LinearOperator, Any, float]] = {}

    def both(name: str, A: LinearOperator, x: Any, y: Any, units: float, of_adjoint: float) -> None:
        found[name] = A, x, units
        found[f"{name}, adjoint"] = A.H, y, of_adjoint

    double = {"dtype": DOUBLE}
    for boundary in ("circular", "zero", "neumann"):
        for kind in ("forward", "central"):
            # differences are written where they belong; a gradient has two components
            A = FiniteDifference(GRID, 0, boundary=boundary, kind=kind, spacing=0.3, **double)
            both(f"difference, {boundary}, {kind}", A, field(), field(), 1, 1)
            A = Gradient(GRID, boundary=boundary, kind=kind, spacing=(0.3, 0.7), **double)
            both(f"gradient, {boundary}, {kind}", A, field(), field(2), 2, 1)
        # neighbours are added to the result
        for spacing in (1.0, (0.3, 0.7)):
            A = -Laplacian(GRID, boundary=boundary, spacing=spacing, **double)
            found[f"Laplacian, {boundary}, {spacing}"] = A, field(), 1
    # spacings that are tensors: the components are stacked, and the adjoint's are summed up, since one may be mapped over alone
    h = (torch.tensor(0.3, **double), torch.tensor(0.7, **double))
    found["Laplacian of spacings that are tensors"] = Laplacian(GRID, spacing=h, **double), field(), 1
    both("gradient of spacings that are tensors", Gradient(GRID, spacing=h, **double), field(), field(2), 4, 3)
    for boundary in ("dirichlet", "neumann", "periodic"):
        # the differences along each of two dimensions: they come before the products, so that constants give exact zeros
        found[f"diffusion, {boundary}"] = Diffusion(conductivity(), boundary=boundary, reaction=conductivity()), field(), 3
        # a diagonal and neighbours
        A = ConvectionDiffusion(conductivity(), field(2), boundary=boundary, reaction=2.0)
        both(f"convection, {boundary}", A, field(), field(), 1, 1)
        # the adjoint conjugates a copy of the vector, and not its coefficients
        A = Helmholtz(conductivity(), absorbing=0 if boundary == "periodic" else 8, boundary=boundary)
        both(f"Helmholtz, {boundary}", A, field(dtype=COMPLEX), field(dtype=COMPLEX), 1, 2)
    both("diffusion, complex", Diffusion(conductivity(COMPLEX)), field(dtype=COMPLEX), field(dtype=COMPLEX), 3, 4)
    for boundary, less in (("no-slip", 1), ("periodic", 0)):
        # three results; in the cells a rate of strain and a stress for each dimension; at the edges the rate and one slope
        x = tuple(draw(*(n - less * (e == d) for e, n in enumerate(GRID)), seed=d) for d in range(2))
        found[f"Stokes, {boundary}"] = Stokes(GRID, conductivity(), boundary=boundary), (*x, field()), 9
    for dtype, of_adjoint in ((DOUBLE, 1), (COMPLEX, 2)):
        below, diagonal, above = draw(SIZE - 1, dtype=dtype), line(dtype), draw(SIZE - 1, dtype=dtype, seed=1)
        both(f"tridiagonal, {dtype}", Tridiagonal(below, diagonal, above), line(dtype), line(dtype), 1, of_adjoint)
        both(f"banded, {dtype}", Banded([below, above], [-1, 1]), line(dtype), line(dtype), 1, of_adjoint)
    # the two ends of twice as many edges as nodes
    found["graph"] = GraphLaplacian(lattice(), draw(2 * SIZE).abs()), line(), 5
    for boundary in ("circular", "zero", "reflect", "symmetric", "replicate"):
        # the extended image, of which each entry of a kernel meets a part; the adjoint adds to a part of the result's
        A = Convolution(draw(3, 3), GRID, boundary=boundary, method="spatial")
        both(f"convolution, spatial, {boundary}", A, field(), field(), 2, 1)
        both(f"varying blur, {boundary}", VaryingBlur(draw(*GRID, 3, 3), boundary=boundary), field(), field(), 2, 1)
        # two half spectra, since an inverse transform of two dimensions has one of its own; all on the torus of the transforms,
        # to which an image is first filled up or extended unless it is as large
        A = Convolution(draw(5, 5), GRID, boundary=boundary, method="fft")
        torus = math.prod(A.grid) / SIZE
        units = 3 if boundary == "circular" else 4 * torus
        both(f"convolution, fft, {boundary}", A, field(), field(), units, units)
    complex_kernel = Convolution(draw(9, 9, dtype=COMPLEX), GRID, method="fft")
    both("convolution, fft, complex", complex_kernel, field(dtype=COMPLEX), field(dtype=COMPLEX), 2, 2)
    otf = torch.fft.fftn(field())
    both("Fourier filter, real", FourierFilter(otf, real=True), field(), field(), 3, 3)
    both("Fourier filter", FourierFilter(otf), field(dtype=COMPLEX), field(dtype=COMPLEX), 2, 2)
    both("circulant", Circulant(line()), line(), line(), 2, 2)
    # vector, half spectrum and result on a circle twice as long; a Hankel matrix reverses the vector
    both("Toeplitz", Toeplitz(line(), away_from_zero(SIZE)), line(), line(), 6, 6)
    both("Hankel", Hankel(line(), away_from_zero(SIZE)), line(), line(), 7, 7)
    return found


CASES = cases()


def applied(operator: LinearOperator, x: Any) -> tuple[Tensor, ...]:
    return tuple(pytree.tree_leaves(operator.apply(x)))


@pytest.mark.parametrize("name", CASES)
def test_a_product_allocates_no_more_than_it_needs(name: str) -> None:
    A, x, units = CASES[name]
    x = pytree.tree_leaves(x)[-1] if isinstance(x, tuple) else x
    unit = SIZE * x.element_size()
    assert allocated(A.for_one_solve(), CASES[name][1]) <= (units + LINES) * unit


@pytest.mark.parametrize("name", CASES)
def test_a_result_is_its_own(name: str) -> None:
    A, x, _ = CASES[name]
    A = A.for_one_solve()
    kept = pytree.tree_map(torch.clone, x)
    y = applied(A, x)
    copies = [part.clone() for part in y]
    applied(A, pytree.tree_map(lambda leaf: 2 * leaf + 1, x))
    assert all(torch.equal(*pair) for pair in zip(y, copies, strict=True))  # no later product writes into it
    for part in y:
        part.fill_(math.nan)  # nor does it share memory with the vector or a coefficient
    assert all(torch.equal(*pair) for pair in zip(pytree.tree_leaves(x), pytree.tree_leaves(kept), strict=True))
    assert all(torch.equal(*pair) for pair in zip(applied(A, x), copies, strict=True))


def test_constants_leave_exactly_nothing() -> None:
    one = torch.full(GRID, 0.1, dtype=DOUBLE)
    for A in (
        Diffusion(conductivity(), boundary=("neumann", "periodic"), spacing=(0.3, 0.7)),
        Laplacian(GRID, boundary="neumann", spacing=(0.3, 0.7), dtype=DOUBLE),
        Laplacian(GRID, boundary="circular", spacing=(0.3, 0.7), dtype=DOUBLE),
        Gradient(GRID, boundary="neumann", spacing=(0.3, 0.7), dtype=DOUBLE),
    ):
        assert bool((A.apply(one) == 0).all())


# -- transforms that map over some of the factors of a product only ----------------------------------------------------------


def velocity() -> Tensor:
    return draw(2, 3, 4, seed=1)


MAPPED: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "difference": (lambda h, x: FiniteDifference((3, 4), 0, spacing=h).apply(x), (draw().exp(), draw(3, 4))),
    "gradient": (lambda h, k, x: Gradient((3, 4), spacing=(h, k)).apply(x), (*draw(2).exp(), draw(3, 4))),
    "gradient, adjoint": (
        lambda h, k, x: Gradient((3, 4), spacing=(h, k)).apply_adjoint(x),
        (*draw(2).exp(), draw(2, 3, 4)),
    ),
    "Laplacian": (lambda h, k, x: Laplacian((3, 4), spacing=(h, k)).apply(x), (*draw(2).exp(), draw(3, 4))),
    "diffusion": (
        lambda k, c, x: Diffusion(k, boundary=("dirichlet", "periodic"), reaction=c).apply(x),
        (away_from_zero(3, 4).abs(), draw(3, 4), draw(3, 4, seed=1)),
    ),
    "convection": (
        lambda k, v, c, x: ConvectionDiffusion(k, v, reaction=c).apply(x),
        (away_from_zero(3, 4).abs(), velocity(), draw(4), draw(3, 4, seed=1)),
    ),
    "convection, adjoint": (
        lambda k, v, c, x: ConvectionDiffusion(k, v, boundary="periodic", reaction=c).apply_adjoint(x),
        (away_from_zero(3, 4).abs(), velocity(), draw(4), draw(3, 4, seed=1)),
    ),
    "Helmholtz": (lambda k, x: Helmholtz(k, absorbing=1).apply_adjoint(x), (draw(3, 4), draw(3, 4, dtype=COMPLEX))),
    "Stokes": (
        lambda eta, u, v, p: Stokes((3, 4), eta).apply((u, v, p)),
        (away_from_zero(3, 4).abs(), draw(2, 4), draw(3, 3), draw(3, 4)),
    ),
    "Stokes, periodic": (
        lambda eta, u, v, p: Stokes((3, 4), eta, boundary="periodic").apply((u, v, p)),
        (away_from_zero(3, 4).abs(), draw(3, 4), draw(3, 4, seed=1), draw(3, 4, seed=2)),
    ),
    "tridiagonal": (lambda a, b, c, x: Tridiagonal(a, b, c).apply_adjoint(x), (draw(3), draw(4), draw(3, seed=1), draw(4))),
    "graph": (
        lambda w, x: GraphLaplacian(torch.tensor([[0, 1, 2], [1, 2, 0]]), w).apply(x),
        (away_from_zero(3).abs(), draw(3)),
    ),
    "convolution": (lambda k, x: Convolution(k, (4, 5), boundary="reflect").apply(x), (draw(3, 3), draw(4, 5))),
    "convolution, adjoint": (
        lambda k, x: Convolution(k, (4, 5), boundary="replicate").apply_adjoint(x),
        (draw(3, 3), draw(4, 5)),
    ),
    "convolution, fft": (lambda k, x: Convolution(k, (4, 5), method="fft").apply_adjoint(x), (draw(3, 3), draw(4, 5))),
    "varying blur": (lambda k, x: VaryingBlur(k).apply_adjoint(x), (draw(4, 5, 3, 2), draw(4, 5))),
    "Fourier filter": (lambda k, x: FourierFilter(k, real=True).apply_adjoint(x), (draw(4, 5), draw(4, 5, seed=1))),
    "Toeplitz": (lambda a, b, x: Toeplitz(a, b).apply_adjoint(x), (draw(4), draw(3), draw(4, seed=1))),
}


@pytest.mark.parametrize("name", MAPPED)
def test_each_factor_can_be_mapped_over_and_differentiated_alone(name: str) -> None:
    product, factors = MAPPED[name]

    def leaves(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(pytree.tree_leaves(product(*values)))

    for i, factor in enumerate(factors):
        others = [*factors]

        def of_one(value: Tensor, i: int = i, others: list[Tensor] = others) -> tuple[Tensor, ...]:
            return leaves(*others[:i], value, *others[i + 1 :])

        stack = torch.stack([factor, 1.3 * factor])
        each = [of_one(value) for value in stack]
        direction = torch.ones_like(factor)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                mapped = torch.vmap(of_one)(stack)
                for got, *expected in zip(mapped, *each, strict=True):
                    torch.testing.assert_close(got, torch.stack(expected).expand_as(got), rtol=1e-11, atol=1e-11)
                _, expected = torch.func.jvp(of_one, (factor,), (direction,))
                with forward_ad.dual_level():
                    dual = of_one(forward_ad.make_dual(factor, direction))
                    got = [forward_ad.unpack_dual(part).tangent for part in dual]
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-11, atol=1e-11)
        assert torch.autograd.gradcheck(of_one, factor.clone().requires_grad_(), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(of_one, factor.clone().requires_grad_())
