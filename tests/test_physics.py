"""Differential operators against the equations that they stand for, and what the grid of operators cannot ask."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.special
import torch
from operator_cases import draw
from torch import Tensor

import nablasolve as ns
from nablasolve.operators import ConvectionDiffusion, Diffusion, Helmholtz, Stokes

PI = math.pi


def centres(n: int, length: float = 1.0) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) * length / n


def faces(n: int) -> Tensor:
    """The inner ones, in the unit interval."""
    return torch.arange(1, n, dtype=torch.float64) / n


def orders(error: Callable[[int], float], sizes: tuple[int, ...]) -> list[float]:
    """The orders of convergence between grids, each twice as fine as the last."""
    errors = [error(n) for n in sizes]
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def rms(x: Tensor) -> float:
    return float(x.abs().square().mean().sqrt())


# -- diffusion ---------------------------------------------------------------------------------------------------------


def constant(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A conductivity and its derivatives."""
    return 2 + 0 * x * y, 0 * x * y, 0 * x * y


def smooth(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return 1 + x + torch.sin(3 * y) / 2, 1 + 0 * x * y, 1.5 * torch.cos(3 * y) + 0 * x


@pytest.mark.parametrize("mean", ["harmonic", "arithmetic"])
@pytest.mark.parametrize("conductivity", [constant, smooth])
@pytest.mark.parametrize("boundary", ["dirichlet", "neumann"])
def test_diffusion_converges_with_second_order(conductivity: Any, boundary: str, mean: str) -> None:
    def error(n: int) -> float:
        x, y = centres(n)[:, None], centres(n, 2.0)[None]
        k, k_x, k_y = conductivity(x, y)
        # sines vanish on the border of the 1 x 2 rectangle, and so do the derivatives of cosines
        a, b, s = (torch.sin, torch.cos, 1) if boundary == "dirichlet" else (torch.cos, torch.sin, -1)
        u, u_x, u_y = a(PI * x) * a(PI * y), s * PI * b(PI * x) * a(PI * y), s * PI * a(PI * x) * b(PI * y)
        f = 2 * PI**2 * k * u - k_x * u_x - k_y * u_y + 3 * u
        A = Diffusion(k, boundary=boundary, spacing=(1 / n, 2 / n), reaction=3.0, mean=mean, positive_definite=True)
        return rms(ns.solve(A, f, rtol=1e-11) - u)

    assert all(abs(order - 2) < 0.1 for order in orders(error, (12, 24, 48)))


def test_layers_across_a_flow_are_exact() -> None:
    # 8 cells of conductivity 1 before 8 of 1000, in the unit interval; pressures 1 and 0 at its ends
    n, k = 16, torch.tensor([1.0] * 8 + [1000.0] * 8, dtype=torch.float64)
    b = torch.zeros(n, dtype=torch.float64)
    b[0] = 2 * k[0] * n**2  # the Dirichlet value 1
    x = centres(n)
    flux = 1 / (0.5 / 1 + 0.5 / 1000)
    expected = torch.where(x < 0.5, 1 - flux * x, flux * (1 - x) / 1000)
    assert rms(ns.solve(Diffusion(k, spacing=1 / n, positive_definite=True), b) - expected) < 1e-12


def test_a_given_derivative_at_the_boundary_goes_into_the_right_hand_side() -> None:
    n, k, g = 10, 3.0, 1.7  # u(0) = 0, and u'(1) = g: u = g x
    b = torch.zeros(n, dtype=torch.float64)
    b[-1] = k * g * n
    A = Diffusion(torch.full((n,), k, dtype=torch.float64), boundary=(("dirichlet", "neumann"),), spacing=1 / n)
    assert rms(ns.solve(A, b) - g * centres(n)) < 1e-12


@pytest.mark.parametrize("boundary", ["dirichlet", "neumann", "periodic"])
def test_the_laplacian_is_that_of_scipy(boundary: str) -> None:
    grid, spacing = (3, 4, 5), (0.5, 1.0, 2.0)

    def laplacian(n: int, h: float) -> Any:
        L = scipy.sparse.diags_array([-np.ones(n - 1), 2 * np.ones(n), -np.ones(n - 1)], offsets=[-1, 0, 1]).tolil()
        L[0, 0] = L[n - 1, n - 1] = {"dirichlet": 3, "neumann": 1, "periodic": 2}[boundary]
        if boundary == "periodic":
            L[0, n - 1] = L[n - 1, 0] = -1
        return L / h**2

    lines = [laplacian(n, h) for n, h in zip(grid, spacing, strict=True)]
    eyes = [scipy.sparse.eye_array(n) for n in grid]
    total = sum(
        functools.reduce(scipy.sparse.kron, [line if e == d else eye for e, eye in enumerate(eyes)])
        for d, line in enumerate(lines)
    )
    A = Diffusion(torch.ones(grid, dtype=torch.float64), boundary=boundary, spacing=spacing)
    np.testing.assert_allclose(A.to_dense().numpy(), total.toarray(), atol=1e-12)


@pytest.mark.parametrize("boundary", ["neumann", "periodic", ("periodic", "neumann")])
def test_what_leaves_a_cell_enters_another(boundary: Any) -> None:
    k = draw(4, 5).exp()
    assert float(Diffusion(k, boundary=boundary).to_dense().sum(0).abs().max()) < 1e-13 * float(k.max())


def test_cells_that_do_not_conduct_are_closed_and_have_finite_gradients() -> None:
    k = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    x = draw(4)
    y = Diffusion(k, boundary="neumann")(x)
    assert torch.equal(y, torch.zeros(4, dtype=torch.float64))
    assert torch.isfinite(torch.autograd.grad((y * x).sum(), k)[0]).all()


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_the_mean_neither_overflows_nor_underflows(scale: float) -> None:
    k, x = draw(5).exp(), draw(5, seed=1)
    assert rms(Diffusion(scale * k)(x) / scale - Diffusion(k)(x)) < 1e-13 * rms(Diffusion(k)(x))


# -- convection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "order"), [("upwind", 1), ("central", 2)])
def test_convection_converges_with_the_order_of_its_scheme(scheme: str, order: int) -> None:
    def error(n: int) -> float:
        x, k = centres(n), 0.2
        u, u_x = torch.sin(PI * x), PI * torch.cos(PI * x)
        v, v_x = torch.cos(2 * x), -2 * torch.sin(2 * x)  # turns around within the interval
        A = ConvectionDiffusion(torch.full((n,), k, dtype=torch.float64), v[None], spacing=1 / n, scheme=scheme)
        return rms(ns.solve(A, PI**2 * k * u + v_x * u + v * u_x) - u)

    assert all(abs(measured - order) < 0.1 for measured in orders(error, (200, 400, 800)))


def test_central_convection_in_the_plane_converges_with_second_order() -> None:
    def error(n: int) -> float:
        x, y = centres(n)[:, None], centres(n)[None]
        u = torch.sin(PI * x) * torch.sin(PI * y)
        u_x, u_y = PI * torch.cos(PI * x) * torch.sin(PI * y), PI * torch.sin(PI * x) * torch.cos(PI * y)
        v = torch.stack([1 + y + 0 * x, x - 2 + 0 * y])  # without divergence
        A = ConvectionDiffusion(torch.full((n, n), 0.5, dtype=torch.float64), v, spacing=1 / n, scheme="central")
        return rms(ns.solve(A, PI**2 * u + v[0] * u_x + v[1] * u_y, rtol=1e-10) - u)

    assert abs(orders(error, (12, 24))[0] - 2) < 0.1


@pytest.mark.parametrize("scheme", ["upwind", "central"])
@pytest.mark.parametrize("boundary", ["closed", "periodic", ("periodic", "closed")])
def test_convection_moves_and_neither_makes_nor_takes(boundary: Any, scheme: str) -> None:
    A = ConvectionDiffusion(draw(4, 5).exp(), draw(2, 4, 5, seed=1), boundary=boundary, scheme=scheme)
    assert float(A.to_dense().sum(0).abs().max()) < 1e-13 * float(A.to_dense().abs().max())


def test_a_flow_leaves_through_a_neumann_boundary_and_enters_with_the_value_zero_of_a_dirichlet_one() -> None:
    # steady transport of a source by a fast flow: downstream the value is source / velocity
    n, speed = 50, 100.0
    v = torch.full((1, n), speed, dtype=torch.float64)
    b = torch.zeros(n, dtype=torch.float64)
    b[20] = 1.0
    A = ConvectionDiffusion(torch.full((n,), 0.01, dtype=torch.float64), v, boundary=(("dirichlet", "neumann"),))
    x = ns.solve(A, b)
    assert rms(x[25:] * speed - 1) < 1e-10
    assert rms(x[:15]) < 1e-10


def test_upwind_differences_keep_the_signs_that_central_ones_lose() -> None:
    k, v = torch.full((4, 5), 0.01, dtype=torch.float64), draw(2, 4, 5)
    for scheme, keeps in (("upwind", True), ("central", False)):
        M = ConvectionDiffusion(k, v, scheme=scheme, boundary="closed").to_dense()
        assert bool((M - M.diagonal().diag() <= 0).all()) == keeps


def test_the_derivative_at_rest_is_the_mean_of_both_sides() -> None:
    k, x, rest = torch.ones(5, dtype=torch.float64), draw(5), torch.zeros(1, 5, dtype=torch.float64)

    def J(v: Tensor) -> Tensor:
        return ConvectionDiffusion(k, v)(x).square().sum()

    step = torch.full_like(rest, 1e-7)
    derivative = (torch.func.grad(J)(rest) * step).sum()
    assert abs(derivative - (J(step) - J(-step)) / 2) < 1e-6 * abs(derivative)


# -- Helmholtz ---------------------------------------------------------------------------------------------------------


def line_source(n: int, cell: int, layer: str, width: int, strength: float, wavelengths: float) -> tuple[Tensor, Tensor, float]:
    """The field of a point source in the unit interval, where it is in free space, and the wave number."""
    k = 2 * PI * wavelengths
    A = Helmholtz(torch.full((n,), k, dtype=torch.float64), spacing=1 / n, absorbing=width, strength=strength, layer=layer)
    b = torch.zeros(n, dtype=torch.complex128)
    b[cell] = n
    free = 1j / (2 * k) * torch.exp(1j * k * (centres(n) - centres(n)[cell]).abs())
    return ns.solve(A, b), free, k


def on_a_line(n: int, layer: str, width: int) -> float:
    """The error of the field of a source in the middle, relative to it, outside of the layers."""
    u, free, _ = line_source(n, n // 2, layer, width, strength=4.0, wavelengths=9)
    inside = slice(width, n - width)
    return rms((u - free)[inside]) / rms(free[inside])


def test_a_point_source_on_a_line_radiates_as_in_free_space() -> None:
    assert all(abs(order - 2) < 0.1 for order in orders(lambda n: on_a_line(n, "pml", n // 5), (360, 720, 1440)))


def test_a_damping_layer_of_three_wavelengths_absorbs_all_but_a_little() -> None:
    assert on_a_line(1440, "damping", 480) < 0.005
    assert on_a_line(1440, "damping", 0) > 0.5  # a cavity


@pytest.mark.parametrize("strength", [0.2, 0.4, 0.8])
def test_a_matched_layer_reflects_as_much_as_it_says(strength: float) -> None:
    n, width = 4000, 800
    u, _, k = line_source(n, n // 2, "pml", width, strength, wavelengths=5)
    # to the right of the source, a wave that leaves and one that comes back
    x = centres(n)[n // 2 + 1 : n - width]
    waves = torch.stack([torch.exp(1j * k * x), torch.exp(-1j * k * x)], dim=1)
    away, back = torch.linalg.lstsq(waves, u[n // 2 + 1 : n - width, None]).solution[:, 0].abs()
    at_the_border = torch.exp(torch.tensor(-2 / 3 * k * width / n * strength, dtype=torch.float64))
    assert abs(back / away / at_the_border - 1) < 0.05


def test_a_point_source_in_the_plane_radiates_as_in_free_space() -> None:
    n, width, h, k = 41, 10, 1 / 12, 2 * PI  # 12 cells a wavelength
    A = Helmholtz(torch.full((n, n), k, dtype=torch.float64), spacing=h, absorbing=width, strength=3.0)
    b = torch.zeros(n, n, dtype=torch.complex128)
    b[20, 20] = 1 / h**2
    u = torch.linalg.solve(A.to_dense(), b.reshape(-1)).reshape(n, n)
    x = (torch.arange(n, dtype=torch.float64) - 20) * h
    r = torch.sqrt(x[:, None] ** 2 + x**2)
    clear = x.abs() < (20.5 - width) * h
    inside = clear[:, None] & clear & (r > 3 * h)
    free = torch.from_numpy(0.25j * scipy.special.hankel1(0, k * r[inside].numpy()))
    # the grid's wave number is off by k (k h)^2 / 24 at most, and so the phase at the distance of a wavelength
    assert rms(u[inside] - free) / rms(free) < k * (k * h) ** 2 / 24


@pytest.mark.parametrize("layer", ["pml", "damping"])
def test_helmholtz_is_complex_symmetric_and_not_hermitian(layer: str) -> None:
    k = draw(4, 5).exp()
    A = Helmholtz(k, absorbing=(1, 2), layer=layer)
    M = A.to_dense()
    assert A.T is A
    assert torch.allclose(M, M.mT, rtol=0, atol=1e-14)
    assert not torch.allclose(M, M.mH, rtol=0, atol=1e-3)
    assert not A.hermitian
    x = draw(4, 5, dtype=torch.complex128)
    assert torch.allclose(A.H(x), A.conj()(x), rtol=0, atol=1e-13)


# -- Stokes ------------------------------------------------------------------------------------------------------------


def staggered(n: int, field: Callable[[Tensor, Tensor], Tensor], d: int | None) -> Tensor:
    """A function at the places of a component, or of the pressure."""
    x, y = (faces(n) if d == e else centres(n) for e in (0, 1))
    return field(x[:, None], y[None])


@pytest.mark.parametrize("varying", [False, True])
def test_stokes_converges_with_second_order(varying: bool) -> None:
    def viscosity(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(x - 2 * y) if varying else 1 + 0 * x * y

    def velocity(x: Tensor, y: Tensor) -> Tensor:
        """Of the stream function (sin(pi x) sin(pi y))^2, which is zero on the walls with its derivatives."""
        return torch.stack([
            2 * PI * torch.sin(PI * x) ** 2 * torch.sin(PI * y) * torch.cos(PI * y),
            -2 * PI * torch.sin(PI * y) ** 2 * torch.sin(PI * x) * torch.cos(PI * x),
        ])  # fmt: skip

    def pressure(x: Tensor, y: Tensor) -> Tensor:
        return torch.cos(PI * x) * torch.sin(2 * PI * y)

    def force(x: Tensor, y: Tensor) -> Tensor:
        """`-div(2 eta e) + grad p`, by differentiating the functions above."""
        x, y = (t.expand(x.shape[0], y.shape[1]).clone().requires_grad_() for t in (x, y))

        def d(value: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(value.sum(), (x, y), create_graph=True)

        (u_x, u_y), (v_x, v_y) = map(d, velocity(x, y))
        eta, (p_x, p_y) = viscosity(x, y), d(pressure(x, y))
        shear = d(eta * (u_y + v_x))
        return torch.stack([p_x - d(2 * eta * u_x)[0] - shear[1], p_y - d(2 * eta * v_y)[1] - shear[0]]).detach()

    def error(n: int) -> float:
        A = Stokes((n, n), staggered(n, viscosity, None), spacing=1 / n)
        b = (staggered(n, force, 0)[0], staggered(n, force, 1)[1], torch.zeros(n, n, dtype=torch.float64))
        u, v, _ = ns.solve(A, b, rtol=1e-9, maxiter=20000)
        return math.hypot(rms(u - staggered(n, velocity, 0)[0]), rms(v - staggered(n, velocity, 1)[1]))

    assert all(abs(order - 2) < 0.15 for order in orders(error, (8, 16, 32)))


def test_a_moving_lid_drags_the_fluid_along() -> None:
    n, eta, speed, h = 6, 2.5, 3.0, 0.2
    A = Stokes((4, n), torch.tensor(eta, dtype=torch.float64), boundary=("periodic", "no-slip"), spacing=h)
    u, v, p = (torch.zeros(shape, dtype=torch.float64) for shape in ((4, n), (4, n - 1), (4, n)))
    u[:, -1] = 2 * eta * speed / h**2
    x = ns.solve(A, (u, v, p), rtol=1e-11)
    expected = speed * (torch.arange(n, dtype=torch.float64) + 0.5) / n  # Couette
    assert rms(x[0] - expected) < 1e-8
    assert max(rms(x[1]), rms(x[2])) < 1e-8


def test_a_slipping_wall_holds_a_fluid_less_than_a_sticking_one() -> None:
    n, h = 40, 1 / 40
    flows = []
    for wall in ("no-slip", "free-slip"):
        A = Stokes((2, n), torch.ones((), dtype=torch.float64), boundary=("periodic", ("no-slip", wall)), spacing=h)
        force = torch.ones(2, n, dtype=torch.float64)
        b = (force, torch.zeros(2, n - 1, dtype=torch.float64), torch.zeros(2, n, dtype=torch.float64))
        flows.append(ns.solve(A, b, rtol=1e-11)[0][0])
    y = centres(n)
    # the parabolas of Poiseuille, of which the second has its vertex at the wall; the error of the wall's cell is h^2 / 8
    for flow, expected in zip(flows, (y * (1 - y) / 2, y * (2 - y) / 2), strict=True):
        assert rms(flow - expected - h**2 / 8) < 1e-9


def test_the_constants_of_the_pressure_are_the_null_space_without_gauge() -> None:
    eta = draw(4, 3).exp()
    free, fixed = Stokes((4, 3), eta, gauge=0.0), Stokes((4, 3), eta, gauge=0.7)
    eigenvalues = torch.linalg.eigvalsh(free.to_dense()).abs().sort().values
    assert eigenvalues[0] < 1e-12
    assert eigenvalues[1] > 1e-3
    constant = (
        torch.zeros(3, 3, dtype=torch.float64),
        torch.zeros(4, 2, dtype=torch.float64),
        torch.ones(4, 3, dtype=torch.float64),
    )
    assert max(rms(part) for part in free(constant)) < 1e-14
    # of a consistent system both have the same solution, of mean pressure zero
    b = (draw(3, 3), draw(4, 2, seed=1), draw(4, 3, seed=2))
    b = (*b[:2], b[2] - b[2].mean())
    for x, y in zip(ns.solve(free, b, rtol=1e-12), ns.solve(fixed, b, rtol=1e-12), strict=True):
        assert rms(x - y) < 1e-9
    assert abs(float(ns.solve(fixed, b, rtol=1e-12)[2].mean())) < 1e-10


def test_stokes_is_symmetric_and_indefinite() -> None:
    A = Stokes((3, 4), draw(3, 4).exp())
    eigenvalues = torch.linalg.eigvalsh(A.to_dense())
    assert A.hermitian
    assert not A.claims.positive_semidefinite
    assert eigenvalues[0] < 0 < eigenvalues[-1]


# -- all of them -------------------------------------------------------------------------------------------------------


def parametrised(grid: tuple[int, ...]) -> list[tuple[Callable[..., ns.LinearOperator], list[Tensor]]]:
    """For each operator how it is built of tensors with three batch entries, and the tensors."""
    k, c, v = draw(3, *grid).exp(), draw(3, *grid, seed=1).exp(), draw(3, 2, *grid, seed=2)
    return [
        (lambda k, c: Diffusion(k, reaction=c, ndim=2, positive_definite=True), [k, c]),
        (lambda k, v, c: ConvectionDiffusion(k, v, reaction=c, ndim=2), [k, v, c]),
        (lambda k: Helmholtz(k, absorbing=1, ndim=2), [k]),
        (lambda eta: Stokes(grid, eta), [k]),
    ]


@pytest.mark.parametrize("which", range(4), ids=["diffusion", "convection", "helmholtz", "stokes"])
def test_a_batch_of_coefficients_is_a_batch_of_operators(which: int) -> None:
    build, tensors = parametrised((3, 4))[which]
    A = build(*tensors)
    dtype = torch.complex128 if which == 2 else torch.float64
    shapes = [(2, 4), (3, 3), (3, 4)] if which == 3 else [(3, 4)]
    b = tuple(draw(3, *shape, dtype=dtype, seed=5 + i) for i, shape in enumerate(shapes))

    def tree(leaves: Any) -> Any:
        return tuple(leaves) if which == 3 else next(iter(leaves))

    x = ns.solve(A, tree(b), batch_dims=1, rtol=1e-11)
    diagonal = A.diagonal()
    for i in range(3):
        one = build(*(t[i] for t in tensors))
        alone = ns.solve(one, tree(part[i] for part in b), rtol=1e-11)
        pick = (lambda t, i=i: tuple(part[i] for part in t)) if which == 3 else (lambda t, i=i: (t[i],))
        for got, expected in zip(pick(x), alone if which == 3 else (alone,), strict=True):
            assert rms(got - expected) < 1e-8 * rms(expected)
        for got, expected in zip(pick(diagonal), one.diagonal() if which == 3 else (one.diagonal(),), strict=True):
            assert torch.allclose(got, expected, rtol=1e-14)


@pytest.mark.parametrize("which", [0, 1, 3], ids=["diffusion", "convection", "stokes"])
def test_coefficients_computed_once_give_the_same_product_and_gradient(which: int) -> None:
    build, tensors = parametrised((3, 4))[which]
    tensors = [t[0].requires_grad_() for t in tensors]
    A = build(*tensors)
    once = A.for_one_solve()
    assert once is not A
    shapes = [(2, 4), (3, 3), (3, 4)] if which == 3 else [(3, 4)]
    x = tuple(draw(*shape, seed=5 + i) for i, shape in enumerate(shapes))
    for apply in ("apply", "apply_adjoint"):
        results = []
        for op in (A, once):
            y = getattr(op, apply)(x if which == 3 else x[0])
            total = sum(part.square().sum() for part in (y if which == 3 else (y,)))
            results.append((total, *torch.autograd.grad(total, tensors, retain_graph=True)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda k: Diffusion(2.0), TypeError, "conductivity: expected a Tensor, got float"),
        (lambda k: Diffusion(k.long()), ValueError, "conductivity: expected a floating-point or complex dtype"),
        (lambda k: Diffusion(k[0, 0]), ValueError, r"conductivity: expected a grid of 1 to 3 dimensions, got shape \(\)"),
        (lambda k: Diffusion(k.expand(2, 2, 3, 4)), ValueError, "expected a grid of 1 to 3 dimensions.*give ndim="),
        (lambda k: Diffusion(k, ndim=4), ValueError, "ndim: expected 1, 2 or 3, got 4"),
        (lambda k: Diffusion(k, ndim=3), ValueError, r"expected at least the 3 dimensions of the grid, got shape \(3, 4\)"),
        (lambda k: Diffusion(k[:0]), ValueError, "conductivity: expected at least one cell in each dimension"),
        (lambda k: Diffusion(k, boundary="dirichle"), ValueError, "boundary: .* got 'dirichle'; did you mean 'dirichlet'"),
        (lambda k: Diffusion(k, boundary=("neumann",) * 3), ValueError, "boundary: .* each of the 2 dimensions"),
        (lambda k: Diffusion(k, boundary=(("periodic", "neumann"), "neumann")), ValueError, "boundary: expected both ends"),
        (lambda k: Diffusion(k, spacing="1"), TypeError, "spacing: expected a number, or one for each dimension, got '1'"),
        (lambda k: Diffusion(k, spacing=(1.0, 0.0)), ValueError, "spacing: expected a positive number"),
        (lambda k: Diffusion(k, spacing=(1.0,)), ValueError, "spacing: expected .* one for each of the 2 dimensions"),
        (lambda k: Diffusion(k, mean="geometric"), ValueError, "mean: .* 'harmonic', 'arithmetic', got 'geometric'"),
        (lambda k: Diffusion(k, reaction="1"), TypeError, "reaction: expected a number, a Tensor or None, got str"),
        (lambda k: Diffusion(k, reaction=k.mT), ValueError, r"reaction: .* the grid \(3, 4\), got \(4, 3\)"),
        (lambda k: Diffusion(k, definite=True), TypeError, "unknown claim 'definite'"),
        (lambda k: ConvectionDiffusion(k, k), ValueError, r"velocity: expected shape \(..., 2, 3, 4\) .* got \(3, 4\)"),
        (lambda k: ConvectionDiffusion(k, k.expand(2, 3, 4) * 1j), ValueError, "velocity: expected a real dtype"),
        (lambda k: ConvectionDiffusion(k, k.expand(2, 3, 4), scheme="quick"), ValueError, "scheme: .* 'upwind', 'central'"),
        (lambda k: Helmholtz(k, absorbing=1.5), ValueError, "absorbing: expected a number of cells, or one .* got 1.5"),
        (lambda k: Helmholtz(k, absorbing=-1), ValueError, "absorbing: expected widths of at least 0 cells, got -1"),
        (lambda k: Helmholtz(k, absorbing=2), ValueError, r"absorbing: .* fit into 3 cells, got widths \(2, 2\)"),
        (lambda k: Helmholtz(k, absorbing=((0, 1), 1), boundary="periodic"), ValueError, "absorbing: .* at both ends"),
        (lambda k: Helmholtz(k, absorbing=1, strength=-1.0), ValueError, "strength: expected a non-negative number, got -1.0"),
        (lambda k: Helmholtz(k, absorbing=1, layer="mlp"), ValueError, "layer: expected one of 'pml', 'damping', got 'mlp'"),
        (lambda k: Stokes(3, k), TypeError, "shape: expected the number of cells in each dimension, got int"),
        (lambda k: Stokes((3,), k[:, 0]), ValueError, r"shape: .* two or three dimensions .* got \(3,\)"),
        (lambda k: Stokes((1, 4), k[:1]), ValueError, r"shape: .* at least 2 cells, got \(1, 4\)"),
        (lambda k: Stokes((4, 3), k), ValueError, r"viscosity: expected a number or shape \(..., 4, 3\), got \(3, 4\)"),
        (lambda k: Stokes((3, 4), "1"), TypeError, "viscosity: expected a number or a Tensor, got str"),
        (lambda k: Stokes((3, 4), k.long()), ValueError, "viscosity: expected a floating-point or complex dtype"),
        (lambda k: Stokes((3, 4), k, gauge="mean"), TypeError, "gauge: expected a non-negative number, got str"),
        (lambda k: Diffusion(k)(k.mT), ValueError, r"x: expected shape \(..., 3, 4\), got \(4, 3\)"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(build: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(torch.ones(3, 4))


def test_the_repr_names_the_options() -> None:
    k = torch.ones(3, 4)
    assert repr(Diffusion(k, boundary=("periodic", ("dirichlet", "neumann")), mean="arithmetic")) == (
        "Diffusion(periodic x dirichlet|neumann, arithmetic): (..., 3, 4) float32 [hermitian]"
    )
    assert (
        repr(ConvectionDiffusion(k, k.expand(2, 3, 4)))
        == "ConvectionDiffusion(dirichlet, upwind, harmonic): (..., 3, 4) float32"
    )
    assert repr(Helmholtz(k, absorbing=1)) == "Helmholtz(dirichlet, pml): (..., 3, 4) complex64"
    assert repr(Stokes((3, 4), 1.0)) == (
        "Stokes(no-slip, arithmetic, gauge=1): ((..., 2, 4), (..., 3, 3), (..., 3, 4)) float32 [hermitian]"
    )
