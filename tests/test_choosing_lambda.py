"""The λ that `lcurve`, `discrepancy` and `gcv` choose, against the formulas of a dense singular value decomposition."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import warnings
from statistics import median

import pytest
import torch
from torch import Tensor

import nablasolve as ns
from nablasolve import GCV, Discrepancy, LCurve, discrepancy, gcv, lcurve
from nablasolve.operators import DFT, Convolution, Subsample

F32, F64, C64, C128 = torch.float32, torch.float64, torch.complex64, torch.complex128
KINDS = {"lcurve": LCurve, "discrepancy": Discrepancy, "gcv": GCV}
FUNCTIONS = {"lcurve": lcurve, "discrepancy": discrepancy, "gcv": gcv}


def draw(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


# -- problems ----------------------------------------------------------------------------------------------------------


def shaw(n: int) -> tuple[Tensor, Tensor]:
    """Image restoration in one dimension (Shaw 1972), by the midpoint rule as in Hansen's Regularization Tools."""
    t = (torch.arange(n, dtype=F64) + 0.5) * math.pi / n - math.pi / 2
    S, T = t[:, None], t[None, :]
    A = (S.cos() + T.cos()) ** 2 * torch.sinc(S.sin() + T.sin()) ** 2 * math.pi / n
    return A, 2 * torch.exp(-6 * (t - 0.8) ** 2) + torch.exp(-2 * (t + 0.5) ** 2)


def deriv2(n: int) -> tuple[Tensor, Tensor]:
    """The second derivative, by Green's function; the solution of example 2 of Regularization Tools."""
    t = (torch.arange(n, dtype=F64) + 0.5) / n
    S, T = t[:, None], t[None, :]
    return torch.where(S < T, S * (T - 1), T * (S - 1)) / n, t.exp()


def heat(n: int) -> tuple[Tensor, Tensor]:
    """The inverse heat equation (Carasso 1982), a Volterra equation of the first kind."""
    t = (torch.arange(n, dtype=F64) + 0.5) / n
    kernel = t**-1.5 / (2 * n * math.sqrt(math.pi)) * torch.exp(-1 / (4 * t))
    lag = torch.arange(n)[:, None] - torch.arange(n)
    z = 20 * (torch.arange(n, dtype=F64) + 1) / n
    x = torch.where(z < 2, 0.75 * z**2 / 4, torch.where(z < 3, 0.75 + (z - 2) * (3 - z), 0.75 * torch.exp(-2 * (z - 3))))
    return torch.where(lag >= 0, kernel[lag.clamp(min=0)], 0.0), torch.where(torch.arange(n) < n // 2, x, 0.0)


def noisy(A: Tensor, x: Tensor, level: float, seed: int = 0) -> tuple[Tensor, float]:
    """`A x` with noise of a relative norm, and the norm of the noise."""
    exact = A @ x
    e = draw(*exact.shape, dtype=exact.dtype, seed=seed)
    e = e * level * norm(exact) / norm(e)
    return exact + e, norm(e)


def graded(m: int, n: int, dtype: torch.dtype = F64, smallest: float = 1e-5, seed: int = 0) -> Tensor:
    """A matrix with singular values from 1 down to `smallest`."""
    k = min(m, n)
    U, V = (torch.linalg.qr(draw(size, k, dtype=dtype, seed=seed + i))[0] for i, size in enumerate((m, n)))
    return (U * torch.logspace(0, math.log10(smallest), k, dtype=F64).to(dtype)) @ V.mH


class Dense:
    """The formulas of the problem by the singular value decomposition of a dense matrix."""

    def __init__(self, A: Tensor, b: Tensor) -> None:
        self.b = b
        U, self.s, self.Vh = torch.linalg.svd(A, full_matrices=False)
        self.m = len(b)
        self.c = U.mH @ b
        self.outside2 = (norm(b - U @ self.c)) ** 2

    def x(self, damp: float) -> Tensor:
        return self.Vh.mH @ (self.s * self.c / (self.s**2 + damp**2))

    def squares(self, damps: Tensor) -> tuple[Tensor, Tensor]:
        """`|A x - b|^2` and `|x|^2`."""
        d = self.s**2 + damps[:, None] ** 2
        c2 = self.c.abs() ** 2
        return ((damps[:, None] ** 2 / d) ** 2 * c2).sum(1) + self.outside2, ((self.s / d) ** 2 * c2).sum(1)

    def trace(self, damps: Tensor) -> Tensor:
        return self.m - (self.s**2 / (self.s**2 + damps[:, None] ** 2)).sum(1)

    def gcv(self, damps: Tensor) -> Tensor:
        return self.squares(damps)[0] / self.m / (self.trace(damps) / self.m) ** 2

    def curvature(self, damps: Tensor) -> Tensor:
        """From the derivatives of the logarithms by autograd."""
        logs = damps.log().requires_grad_()
        firsts, seconds = [], []
        for square in self.squares(logs.exp()):
            (first,) = torch.autograd.grad((square.log() / 2).sum(), logs, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), logs, retain_graph=True)
            firsts.append(first.detach())
            seconds.append(second)
        (r1, x1), (r2, x2) = firsts, seconds
        return (r1 * x2 - r2 * x1) / (r1**2 + x1**2) ** 1.5

    def best(self, function, low: float, high: float) -> float:
        """The maximiser of a function of λ, by ever finer grids."""
        for _ in range(6):
            damps = torch.logspace(math.log10(low), math.log10(high), 1001, dtype=F64)
            i = int(function(damps).argmax())
            low, high = float(damps[max(i - 1, 0)]), float(damps[min(i + 1, 1000)])
        return float(damps[500])

    def error(self, damp: float, x: Tensor) -> float:
        return norm(self.x(damp) - x)

    def smallest_error(self, x: Tensor) -> float:
        return min(self.error(float(s), x) for s in self.s[0] * torch.logspace(-8, 1, 300, dtype=F64))


def choose(name: str, A, b, noise: float, **options):
    """One of the three choices."""
    return FUNCTIONS[name](A, b, **({"noise": noise} if name == "discrepancy" else {}), **options)


SHAPES = ((40, 30), (30, 40), (30, 30))


def case(m: int, n: int, dtype: torch.dtype = F64, level: float = 1e-2) -> tuple[Tensor, Tensor, float]:
    A = graded(m, n, dtype)
    x = A.mH @ draw(m, dtype=dtype, seed=7)  # smooth, so that damping pays
    return A, *noisy(A, x, level, seed=5)


# -- against the dense formulas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F64, C128))
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_norms_along_the_curve_are_those_of_the_dense_problem(name, m, n, dtype):
    A, b, noise = case(m, n, dtype)
    choice, dense = choose(name, A, b, noise), Dense(A, b)
    assert isinstance(choice, KINDS[name])
    assert choice.exhausted
    assert choice.converged
    assert choice.damps.shape == choice.residual_norms.shape == choice.solution_norms.shape == choice.criterion.shape
    for got, square in zip((choice.residual_norms, choice.solution_norms), dense.squares(choice.damps), strict=True):
        assert got.dtype == F64
        torch.testing.assert_close(got, square.sqrt(), rtol=1e-9, atol=0)
    x = dense.x(choice.damp)
    torch.testing.assert_close(choice.x, x, rtol=0, atol=1e-9 * norm(x))
    assert choice.residual_norm == pytest.approx(norm(A @ x - b), rel=1e-9)
    assert choice.solution_norm == pytest.approx(norm(x), rel=1e-9)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_default_damps_span_the_range_in_which_damping_changes_something(m, n):
    A, b, _ = case(m, n)
    choice, s = lcurve(A, b), torch.linalg.svdvals(A)
    assert bool((choice.damps.diff() > 0).all())
    assert float(choice.damps[0]) == pytest.approx(0.1 * float(s[-1]), rel=1e-6)
    assert float(choice.damps[-1]) == pytest.approx(10 * float(s[0]), rel=1e-9)


def test_the_default_damps_of_few_steps_end_at_what_these_resolve():
    """The smallest singular value of `A` on the Krylov space of `A^H A` and `A^H b`."""
    A, b, noise = case(40, 30)
    krylov = [A.mT @ b]
    for _ in range(3):
        krylov.append(A.mT @ (A @ krylov[-1]))
    on_it = torch.linalg.svdvals(A @ torch.linalg.qr(torch.stack(krylov, dim=1))[0])
    with pytest.warns(ns.ConvergenceWarning):
        choice = discrepancy(A, b, noise=3 * noise, steps=4)
    assert float(choice.damps[0]) == pytest.approx(float(on_it[-1]), rel=1e-6)


@pytest.mark.parametrize("dtype", (F64, C128))
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_curvature_and_the_corner_are_those_of_the_dense_curve(m, n, dtype):
    A, b, _ = case(m, n, dtype)
    choice, dense = lcurve(A, b), Dense(A, b)
    expected = dense.curvature(choice.damps)
    # (autograd's second derivatives of the dense formulas lose digits where the curve is straight)
    torch.testing.assert_close(choice.criterion, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
    assert choice.damp == pytest.approx(dense.best(dense.curvature, float(choice.damps[0]), float(choice.damps[-1])), rel=1e-5)


@pytest.mark.parametrize("dtype", (F64, C128))
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_gcv_of_a_whole_bidiagonalisation_is_exact(m, n, dtype):
    A, b, _ = case(m, n, dtype)
    choice, dense = gcv(A, b), Dense(A, b)
    assert choice.exact_trace
    torch.testing.assert_close(choice.criterion, dense.gcv(choice.damps), rtol=1e-9, atol=0)
    assert choice.damp == pytest.approx(dense.best(lambda d: -dense.gcv(d), float(choice.damps[0]), 10.0), rel=1e-5)


@pytest.mark.parametrize("tau", (1.0, 1.3))
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_discrepancy_is_met(m, n, tau):
    A, b, noise = case(m, n)
    choice = discrepancy(A, b, noise=noise, tau=tau)
    assert norm(A @ Dense(A, b).x(choice.damp) - b) == pytest.approx(tau * noise, rel=1e-8)
    assert (choice.noise, choice.tau) == (noise, tau)
    torch.testing.assert_close(choice.criterion, choice.residual_norms / (tau * noise))


@pytest.mark.parametrize("fraction", (1e-4, 0.3, 0.999999))
def test_the_root_of_the_discrepancy_is_found_over_the_whole_range(fraction):
    A, b, _ = case(40, 30)
    dense = Dense(A, b)
    least, most = math.sqrt(dense.outside2), norm(b)
    level = least + fraction * (most - least)
    damp = discrepancy(A, b, noise=torch.tensor(level, dtype=F64)).damp  # noise may be a 0-d tensor
    # the residual hardly depends on λ near both ends, so that λ itself is compared with a root by bisection
    low, high = 1e-12, 1e12
    for _ in range(200):
        middle = math.sqrt(low * high)
        below = float(dense.squares(torch.tensor([middle], dtype=F64))[0]) < level**2
        low, high = (middle, high) if below else (low, middle)
    assert damp == pytest.approx(low, rel=1e-8)


def test_a_part_of_the_bidiagonalisation_gives_what_the_whole_would():
    A, x = heat(120)
    b, noise = noisy(A, x, 1e-2)
    dense = Dense(A, b)
    for name in ("lcurve", "discrepancy"):
        part, whole = choose(name, A, b, noise, steps=60), choose(name, A, b, noise, steps=120)
        assert part.converged
        assert not part.exhausted
        assert (part.steps, whole.steps) == (60, 120) or whole.exhausted
        assert part.damp == pytest.approx(whole.damp, rel=1e-4)
        assert norm(part.x - dense.x(part.damp)) < 1e-6 * norm(part.x)


# -- the trace in GCV ----------------------------------------------------------------------------------------------------


def deblurring(size: int = 32, level: float = 0.05) -> tuple[ns.LinearOperator, Tensor]:
    t = torch.arange(-4, 5, dtype=F64)
    kernel = torch.exp(-(t[:, None] ** 2 + t**2) / 4)
    H = Convolution(kernel / kernel.sum(), (size, size))
    image = torch.zeros(size, size, dtype=F64)
    image[8:20, 6:24] = 1.0
    b = H(image)
    e = draw(size, size, seed=3)
    return H, b + e * level * norm(b) / norm(e)


def test_the_trace_of_a_problem_with_many_degrees_of_freedom_is_not_that_of_the_subspace():
    """A blur of 1024 pixels has hundreds of them, of which 60 steps see 60: with those alone λ would be 30 times too small."""
    H, b = deblurring()
    exact = Dense(H.to_dense(), b.reshape(-1))
    choice = gcv(H, b, steps=60)
    assert not choice.exact_trace
    assert choice.converged
    best = exact.best(lambda d: -exact.gcv(d), float(choice.damps[0]), float(choice.damps[-1]))
    assert choice.damp == pytest.approx(best, rel=0.05)
    # the function is that of the proper dimension of the data, and not of the number of steps
    usual = choice.damps > best / 3
    torch.testing.assert_close(choice.criterion[usual], exact.gcv(choice.damps[usual]), rtol=0.05, atol=0)


def test_more_probes_scatter_less():
    A, x = deriv2(150)
    b, _ = noisy(A, x, 1e-2)
    dense = Dense(A, b)

    def scatter(probes: int) -> float:
        errors = []
        for seed in range(6):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ns.ConvergenceWarning)
                choice = gcv(A, b, steps=8, probes=probes, seed=seed)
            errors.append(float(((choice.criterion - dense.gcv(choice.damps)) / choice.criterion)[30].abs()))
        return sum(errors)

    assert scatter(16) < 0.7 * scatter(1)


def test_a_seed_makes_the_choice_and_leaves_the_global_random_state():
    H, b = deblurring()
    state = torch.random.get_rng_state()
    first, again, other = (gcv(H, b, steps=60, seed=seed).damp for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_trace_counts_singular_values_that_are_repeated_or_not_excited():
    """The bidiagonalisation sees each distinct one once, and ends after two steps here; the trace has all eight."""
    A = torch.diag(torch.tensor([1.0] * 4 + [0.1] * 4, dtype=F64))
    b = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.2, -0.1, 0.05, 0.1], dtype=F64)
    choice, dense = gcv(A, b), Dense(A, b)
    assert choice.steps == 2
    assert choice.exact_trace
    torch.testing.assert_close(choice.criterion, dense.gcv(choice.damps), rtol=1e-9, atol=0)
    wide = torch.cat([A, torch.zeros(8, 3, dtype=F64)], dim=1)  # by rows where they are fewer than the columns
    by_rows = gcv(wide, b, damps=choice.damps)
    torch.testing.assert_close(by_rows.criterion, dense.gcv(choice.damps), rtol=1e-9, atol=0)
    assert ((choice.matvecs, choice.rmatvecs), (by_rows.matvecs, by_rows.rmatvecs)) == ((10, 2), (2, 10))


def test_a_trace_that_the_steps_do_not_resolve_is_not_silent():
    """`b` is in an invariant subspace of three dimensions, beside 397 others with singular values of their own."""
    A = torch.diag(torch.logspace(0, -3, 400, dtype=F64))
    b = torch.zeros(400, dtype=F64)
    b[0], b[200], b[399] = 1.0, 0.3, 0.1
    dense = Dense(A, b)
    for steps, what in ((60, "there is no minimum inside .* or raise steps"), (80, "the minimum moved .* of the 80 steps")):
        with pytest.warns(ns.ConvergenceWarning, match=what):
            choice = gcv(A, b, steps=steps)
        assert choice.exhausted
        assert not choice.converged
    choice = gcv(A, b, steps=150)
    assert choice.converged
    assert not choice.exact_trace
    assert choice.damp == pytest.approx(dense.best(lambda d: -dense.gcv(d), 1e-4, 10.0), rel=1e-3)


def test_a_probe_that_the_adjoint_maps_to_zero_counts_as_one_that_nothing_is_fitted_to():
    """An `A` of rank 3 whose whole range `b` excites: outside of it `T` is zero."""
    A = graded(200, 3, smallest=1e-2) @ graded(3, 150, smallest=0.3, seed=9)
    b = A @ draw(150, seed=1) + 1e-3 * draw(200, seed=2)
    choice, dense = gcv(A, b), Dense(A, b)
    assert choice.steps == 3
    assert not choice.exact_trace
    torch.testing.assert_close(choice.criterion, dense.gcv(choice.damps), rtol=1e-6, atol=0)


# -- ill-posed problems ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("problem", (shaw, deriv2, heat))
def test_the_error_is_near_the_smallest_that_any_damping_reaches(problem, name):
    A, x = problem(100)
    ratios = []
    for seed in range(5):
        b, noise = noisy(A, x, 1e-2, seed)
        dense, choice = Dense(A, b), choose(name, A, b, noise)
        assert choice.converged
        ratios.append(dense.error(choice.damp, x) / dense.smallest_error(x))
    assert median(ratios) < 2
    assert dense.error(1e-3 * choice.damp, x) > 3 * dense.smallest_error(x)  # so it matters


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_bidiagonalisation_of_a_severely_ill_posed_problem_ends_early(name):
    A, x = shaw(300)
    b, noise = noisy(A, x, 1e-2)
    choice = choose(name, A, b, noise)
    assert choice.exhausted
    assert choice.steps < 30


# -- what goes in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F32, C64))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_single_precision_chooses_the_same(name, dtype):
    wide = C128 if dtype.is_complex else F64
    A, b, noise = case(40, 30, wide)
    narrow, reference = choose(name, A.to(dtype), b.to(dtype), noise), choose(name, A, b, noise)
    assert narrow.damp == pytest.approx(reference.damp, rel=1e-2)
    assert narrow.x.dtype == dtype
    assert narrow.residual_norms.dtype == F64
    assert float(narrow.damps[0]) >= 16 * torch.finfo(dtype).eps  # below is rounding


@pytest.mark.parametrize("dtype", (F32, F64))
@pytest.mark.parametrize(("of_A", "of_b"), ((1e12, 1.0), (1e-12, 1.0), (1.0, 1e12), (1.0, 1e-12), (1e-12, 1e-12)))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_scaling_the_operator_scales_the_choice_and_scaling_the_data_does_not(name, of_A, of_b, dtype):
    A, b, noise = case(30, 20)
    A, b = A.to(dtype), b.to(dtype)
    plain, scaled = choose(name, A, b, noise), choose(name, of_A * A, of_b * b, of_b * noise)
    close = 1e-3 if dtype == F32 else 1e-6
    assert scaled.damp == pytest.approx(of_A * plain.damp, rel=close)
    assert scaled.residual_norm == pytest.approx(of_b * plain.residual_norm, rel=close)
    assert scaled.solution_norm == pytest.approx(of_b / of_A * plain.solution_norm, rel=close)
    assert (scaled.steps, scaled.converged) == (plain.steps, plain.converged)


def test_tiny_and_huge_double_precision_is_scaled():
    A, b, _ = case(30, 20)
    assert lcurve(1e-160 * A, 1e-200 * b).damp == pytest.approx(1e-160 * lcurve(A, b).damp, rel=1e-6)


class Pair(torch.nn.Module):
    """From `{"p": (3, 4), "q": (5,)}` to a tuple of `(2, 6)` and `(10,)`."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(graded(22, 17))

    def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y = self.matrix @ torch.cat([x["p"].reshape(-1), x["q"]])
        return y[:12].reshape(2, 6), y[12:]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_trees_of_any_shape_are_one_vector(name):
    module = Pair()
    A = module.matrix.detach()
    b, noise = noisy(A, A.mT @ draw(22, seed=7), 1e-2)
    example = {"q": torch.zeros(5, dtype=F64), "p": torch.zeros(3, 4, dtype=F64)}
    choice = choose(name, module, (b[:12].reshape(2, 6), b[12:]), noise, domain=example)
    reference = choose(name, A, b, noise)
    assert choice.damp == pytest.approx(reference.damp, rel=1e-6)
    assert set(choice.x) == {"p", "q"}
    packed = torch.cat([choice.x["p"].reshape(-1), choice.x["q"]])
    torch.testing.assert_close(packed, reference.x, rtol=0, atol=1e-7 * norm(packed))


def test_dictionaries_are_read_by_key():
    A, b, _ = case(12, 8)

    def function(v: dict[str, Tensor]) -> dict[str, Tensor]:
        y = A @ torch.cat([v["p"], v["q"]])
        return {"s": y[5:], "r": y[:5]}

    def adjoint(y: dict[str, Tensor]) -> dict[str, Tensor]:
        x = A.mT @ torch.cat([y["r"], y["s"]])
        return {"q": x[3:], "p": x[:3]}

    data, example = {"r": b[:5], "s": b[5:]}, {"p": A[0, :3], "q": A[0, 3:]}
    operator = ns.LinearOperator(function, adjoint=adjoint, domain=example, codomain=data)
    assert lcurve(operator, data).damp == pytest.approx(lcurve(A, b).damp, rel=1e-6)


FORMS = {
    "dense": lambda A: A,
    "coo": Tensor.to_sparse_coo,
    "csr": Tensor.to_sparse_csr,
    "function": lambda A: lambda v: A @ v,
    "operator": lambda A: ns.LinearOperator(lambda v: A @ v, domain=A[0], codomain=A[:, 0]),
    "with adjoint": lambda A: ns.LinearOperator(lambda v: A @ v, adjoint=lambda y: A.mH @ y, domain=A[0], codomain=A[:, 0]),
    "composition": lambda A: 2 * ns.aslinearoperator(A / 4) @ ns.Identity(A[0]) + A / 2,
}


@pytest.mark.parametrize("dtype", (F64, C128))
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_operator_is_taken(form, dtype):
    A, b, _ = case(12, 8, dtype)
    operator = FORMS[form](A)
    options = {"domain": A[0]} if form == "function" else {}
    choice, reference = lcurve(operator, b, **options), lcurve(A, b)
    assert choice.damp == pytest.approx(reference.damp, rel=1e-6)
    torch.testing.assert_close(choice.x, reference.x, rtol=0, atol=1e-8 * norm(reference.x))


def test_a_real_operator_acts_on_complex_data_and_a_complex_matrix_on_real_data():
    A, b, _ = case(12, 8)
    z = torch.complex(b, 0.5 * b.flip(0))
    assert lcurve(A, z).damp == pytest.approx(lcurve(A.to(C128), z).damp, rel=1e-6)
    C = A + 1j * graded(12, 8, seed=5)
    b = (C @ (C.mH @ draw(12, seed=7).to(C128))).real + 1e-2 * draw(12, seed=8)
    assert lcurve(C, b).damp == pytest.approx(lcurve(C, b.to(C128)).damp, rel=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_from_real_to_complex_the_problem_is_the_real_one(name):
    """A real `x` and complex data `A x`: real and imaginary parts are data of their own, 24 in number."""
    matrix = torch.complex(graded(12, 8), graded(12, 8, seed=4))
    operator = ns.LinearOperator(lambda v: matrix @ v.to(C128), domain=matrix[0].real, codomain=matrix[:, 0])
    b, noise = noisy(matrix, (matrix.mH @ draw(12, dtype=C128, seed=7)).real.to(C128), 1e-2)
    stacked, flat = torch.cat([matrix.real, matrix.imag]), torch.cat([b.real, b.imag])
    choice, reference = choose(name, operator, b, noise), choose(name, stacked, flat, noise)
    assert choice.damp == pytest.approx(reference.damp, rel=1e-5)
    assert choice.x.dtype == F64
    torch.testing.assert_close(choice.x, reference.x, rtol=0, atol=1e-6 * norm(reference.x))
    torch.testing.assert_close(choice.criterion, gcv(stacked, flat).criterion) if name == "gcv" else None


def test_an_operator_with_free_batch_dimensions_takes_the_whole_of_b_as_one_vector():
    H, _ = deblurring(8)
    images = draw(2, 8, 8, seed=1)
    choice = discrepancy(H, images, noise=0.5 * norm(images))
    assert choice.x.shape == (2, 8, 8)
    assert norm(H(choice.x) - images) == pytest.approx(0.5 * norm(images), rel=1e-6)
    S = Subsample((8, 8), step=(2, 2), like=images) @ H
    assert discrepancy(S, S(images), noise=0.5 * norm(S(images))).x.shape == (2, 8, 8)


def test_a_claim_of_symmetry_tells_the_domain():
    A, x = deriv2(20)
    b, _ = noisy(A, x, 1e-2)
    operator = ns.LinearOperator(lambda v: A @ v, hermitian=True)
    assert lcurve(operator, b).damp == pytest.approx(lcurve(A, b).damp, rel=1e-6)


# -- what it costs, and what it leaves -------------------------------------------------------------------------------------


class Counted:
    def __init__(self, A: Tensor) -> None:
        self.A, self.products, self.adjoints = A, 0, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.A @ v

    def adjoint(self, y: Tensor) -> Tensor:
        self.adjoints += 1
        return self.A.mH @ y


@pytest.mark.parametrize("written", (True, False))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_are_counted_and_do_not_depend_on_the_number_of_damps(name, written):
    A, x = heat(60)
    b, noise = noisy(A, x, 1e-2)
    bidiagonalisations = 2 if name == "gcv" else 1  # the second from the probe
    for count in (2, 500):
        counted = Counted(A)
        operator = ns.LinearOperator(counted, adjoint=counted.adjoint if written else None, domain=x)
        choice = choose(name, operator, b, noise, steps=40, damps=torch.logspace(-6, 1, count))
        recording = 0 if written else 1
        assert choice.steps == 40
        assert choice.matvecs == counted.products == 40 * bidiagonalisations + recording
        assert choice.rmatvecs == 40 * bidiagonalisations
        assert counted.adjoints == (choice.rmatvecs if written else 0)
        assert len(choice.damps) == len(choice.criterion) == count


@pytest.mark.parametrize("name", ("lcurve", "gcv"))
def test_the_choice_does_not_depend_on_how_finely_the_same_range_is_drawn(name):
    A, b, noise = case(40, 30)
    damps = (torch.logspace(-5, 1, count, dtype=F64) for count in (2, 1000))
    coarse, fine = (choose(name, A, b, noise, damps=d) for d in damps)
    assert coarse.damp == pytest.approx(fine.damp, rel=1e-5)


def test_damps_are_sorted_and_may_be_a_list():
    A, b, _ = case(40, 30)
    choice = lcurve(A, b, damps=[1.0, 1e-4, 1])
    assert choice.damps.tolist() == [1e-4, 1.0, 1.0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_carries_a_gradient_or_is_changed(name):
    A, b, noise = case(20, 10)
    leaf, data = A.clone().requires_grad_(), b.clone().requires_grad_()
    choice = choose(name, lambda v: leaf @ v, data, noise, domain=A[0])
    assert isinstance(choice.damp, float)
    for field in dataclasses.fields(choice):
        value = getattr(choice, field.name)
        assert not (isinstance(value, Tensor) and value.requires_grad)
    assert leaf.grad is None
    assert data.grad is None
    assert torch.equal(data, b)
    with torch.autograd.forward_ad.dual_level():
        matrix, dual = (torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) for t in (A, b))
        inside = choose(name, matrix, dual, noise)
        assert torch.autograd.forward_ad.unpack_dual(inside.x).tangent is None
    assert inside.damp == pytest.approx(choice.damp, rel=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_the_operator_returns_stays_its_own(name):
    A, b, noise = case(20, 10)
    returned = []

    def kept(y: Tensor) -> Tensor:
        returned.append((y, y.clone()))
        return y

    operator = ns.LinearOperator(lambda v: kept(A @ v), adjoint=lambda y: kept(A.mT @ y), domain=A[0], codomain=b)
    choose(name, operator, b, noise)
    assert len(returned) == 20
    assert all(torch.equal(y, copy) for y, copy in returned)


def test_an_operator_may_return_its_argument():
    A = ns.LinearOperator(lambda v: v, adjoint=lambda y: y, domain=torch.zeros(6, dtype=F64))
    b = draw(6)
    choice = discrepancy(A, b, noise=0.5 * norm(b))
    assert torch.equal(b, draw(6))
    torch.testing.assert_close(choice.x, 0.5 * b)  # of A = I, where the residual is half of b
    assert choice.damp == pytest.approx(1.0, rel=1e-9)


def test_autocast_changes_nothing():
    A, b, _ = case(30, 20)
    A, b = A.float(), b.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert lcurve(lambda v: A @ v, b, domain=A[0]).damp == lcurve(A, b).damp


# -- what is said of the answer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_too_few_steps_are_not_silent(name):
    A, x = deriv2(200)
    b, noise = noisy(A, x, 1e-3)
    with pytest.warns(ns.ConvergenceWarning, match=rf"nablasolve\.{name}: .*raise steps") as caught:
        choice = choose(name, A, b, 1.1 * noise, steps=9)
    assert not choice.converged
    assert not choice.exhausted
    assert "NOT converged" in repr(choice)
    assert caught[0].filename == __file__  # it names the line that called


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_choice_that_still_moves_says_from_where_to_where(name):
    A, x = heat(100)
    b, noise = noisy(A, x, 1e-2)
    steps = 11 if name == "discrepancy" else 20
    with pytest.warns(ns.ConvergenceWarning, match=rf"moved from \S+ to \S+ with the last quarter of the {steps} steps"):
        choice = choose(name, A, b, noise, steps=steps)
    assert not choice.converged
    if name != "discrepancy":  # whose λ does not depend on the range
        assert choice.damps[0] < choice.damp < choice.damps[-1]


@pytest.mark.parametrize("name", ("lcurve", "gcv"))
def test_an_optimum_at_the_end_of_the_range_is_not_silent(name):
    A, b, noise = case(40, 30)
    inside = choose(name, A, b, noise).damp
    for damps in ((2 * inside, 10.0), (1e-5, inside / 2)):
        with pytest.warns(ns.ConvergenceWarning, match="inside of the range of λ.*give damps of a wider range") as caught:
            choice = choose(name, A, b, noise, damps=damps)
        assert len(caught) == 1
        assert not choice.converged
        assert damps[0] * (1 - 1e-9) <= choice.damp <= damps[1] * (1 + 1e-9)


@pytest.mark.parametrize("name", ("lcurve", "gcv"))
def test_a_unitary_operator_gives_nothing_to_choose_by(name):
    """The L-curve bends the other way everywhere, and the GCV function is constant."""
    F = DFT((16,), like=torch.zeros(16, dtype=C128))
    with pytest.warns(ns.ConvergenceWarning, match="inside of the range"):
        assert not choose(name, F, draw(16, dtype=C128), 0.0).converged


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_choice_reads_as_one_line(name):
    A, b, noise = case(20, 10)
    choice = choose(name, A, b, noise)
    text = repr(choice)
    assert text.startswith(f"{KINDS[name].__name__}(damp={choice.damp:.6g}, converged, residual_norm=")
    assert "\n" not in text
    assert "steps=10, exhausted, matvecs=10, rmatvecs=10)" in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.damp = 1.0


# -- plots ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_choice_draws_its_curve_on_new_axes_or_on_given_ones(name, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    A, b, noise = case(20, 10)
    choice = choose(name, A, b, noise)
    _, given = plt.subplots()
    assert choice.plot(given) is given
    new = choice.plot()
    assert new is not given
    curve = given.lines[0]
    drawn = (choice.residual_norms, choice.solution_norms)
    if name != "lcurve":
        drawn = (choice.damps, choice.criterion if name == "gcv" else choice.residual_norms)
    for got, expected in zip((curve.get_xdata(), curve.get_ydata()), drawn, strict=True):
        assert got.tolist() == expected.tolist()
    marks = [list(line.get_xdata()) + list(line.get_ydata()) for line in given.lines[1:]]
    marked = choice.residual_norm if name == "lcurve" else choice.damp
    assert any(marked in mark for mark in marks)
    if name == "discrepancy":
        assert any(noise in mark for mark in marks)
    labels = [text.get_text() for text in given.get_legend().get_texts()]
    assert f"λ = {choice.damp:.3g}" in labels
    plt.close("all")


def test_a_missing_matplotlib_is_named(monkeypatch):
    A, b, _ = case(20, 10)
    choice = lcurve(A, b)
    for module in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"plot\(\) needs matplotlib: pip install 'nablasolve\[demo\]'"):
        choice.plot()


# -- the front door --------------------------------------------------------------------------------------------------------

M34, B3 = graded(3, 4), draw(3)

REFUSED = {
    "unknown option": (TypeError, "unknown option 'step'; did you mean 'steps'", {"step": 3}),
    "steps of a wrong type": (TypeError, "steps: expected an integer, got float", {"steps": 2.5}),
    "one step": (ValueError, "steps: expected at least 2, got 1", {"steps": 1}),
    "damps as a number": (TypeError, "damps: expected a sequence or 1-d tensor of real numbers, got 0.1", {"damps": 0.1}),
    "damps as words": (TypeError, "damps: expected a sequence", {"damps": ["a", "b"]}),
    "damps of two dimensions": (TypeError, r"damps: .* got a tensor of shape \(2, 2\)", {"damps": torch.ones(2, 2)}),
    "complex damps": (TypeError, "damps: .*complex64", {"damps": torch.ones(3, dtype=C64)}),
    "one damp": (ValueError, "damps: expected at least 2 numbers, got 1", {"damps": [0.1]}),
    "a damp of zero": (ValueError, "damps: expected positive finite numbers, got 0.0", {"damps": [0.0, 1.0]}),
    "an infinite damp": (ValueError, "damps: expected positive finite numbers, got inf", {"damps": [1.0, math.inf]}),
    "A of a wrong type": (TypeError, "A: expected a callable", {"A": 3}),
    "b as a list of numbers": (TypeError, "b: expected a Tensor or a pytree of Tensors, got float", {"b": [1.0]}),
    "b of a wrong shape": (ValueError, r"b: expected shape \(..., 3\).* got \(5,\)", {"b": draw(5)}),
    "b of integers": (ValueError, "b: expected a floating-point or complex dtype", {"b": torch.ones(3, dtype=torch.int64)}),
    "b of 16 bits": (ValueError, "b: expected 32 or 64 bits, got torch.float16", {"A": M34.half(), "b": B3.half()}),
    "b of zeros": (ValueError, "b: expected a vector that is not zero", {"b": torch.zeros(3, dtype=F64)}),
    "an empty b": (ValueError, "b: expected a vector that is not zero", {"A": M34[:0], "b": B3[:0]}),
    "NaN in b": (ValueError, "b: expected finite numbers, got NaN or Inf", {"b": B3 * math.nan}),
    "Inf in b": (ValueError, "b: expected finite numbers, got NaN or Inf", {"b": B3 * math.inf}),
    "a batch": (ValueError, r"b: expected one vector for a Tensor A, of shape \(3,\), got a batch", {"b": draw(2, 3)}),
    "matrices": (ValueError, r"b: expected one vector for a Tensor A, of shape \(3,\)", {"A": M34.expand(2, 3, 4)}),
    "NaN in A": (ValueError, "A: a product with A or with its adjoint holds NaN or Inf", {"A": M34 * math.nan}),
    "b outside of the range": (
        ValueError,
        r"b: it is orthogonal to the range of A \(A\^H b = 0\)",
        {"A": torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=F64), "b": torch.tensor([0.0, 1.0], dtype=F64)},
    ),
    "b outside of the range, to rounding": (
        ValueError,
        r"b: it is orthogonal to the range of A",
        {"A": graded(8, 3), "b": torch.linalg.qr(torch.cat([graded(8, 3), draw(8, 1)], dim=1))[0][:, 3]},
    ),
    "an operator of zeros": (ValueError, "b: it is orthogonal to the range of A", {"A": 0 * M34}),
    "a function of unknown domain": (ValueError, "domain: the shape of x cannot be known", {"A": lambda v: M34 @ v}),
    "a domain of a wrong type": (TypeError, "domain: expected an example", {"A": lambda v: M34 @ v, "domain": 4}),
    "a domain unlike that of A": (ValueError, r"domain: expected shape \(..., 4\).* got \(3,\)", {"domain": B3}),
    "A(v) of a wrong shape": (
        ValueError,
        r"A: expected it to return the shape \(3,\) of b, got \(4,\)",
        {"A": lambda v: v, "domain": M34[0]},
    ),
    "A(v) of a wrong dtype": (
        ValueError,
        "A: expected it to return the dtype torch.float64 of b, got torch.complex128; if the operator is complex, give b as",
        {"A": lambda v: M34.to(C128) @ v.to(C128), "domain": M34[0]},
    ),
    "A(v) of a wrong structure": (
        TypeError,
        "A: expected it to return Tensors with the structure of b",
        {"A": lambda v: (M34 @ v,), "domain": M34[0]},
    ),
    "A(v) that is no tensor": (
        TypeError,
        r"A: expected it to return Tensors with the structure of b, \*, got float",
        {"A": lambda v: 3.0, "domain": M34[0]},
    ),
    "an adjoint of a wrong shape": (
        ValueError,
        r"the adjoint of A: expected it to return the shape \(4,\) of x, got \(3,\)",
        {"A": ns.LinearOperator(lambda v: M34 @ v, adjoint=lambda y: y, domain=M34[0], codomain=B3)},
    ),
    "a bias": (ValueError, r"A: .* it is not linear \(a bias\?\)", {"A": lambda v: M34 @ v + 1, "domain": M34[0]}),
    "a wrong adjoint": (
        ValueError,
        "A: .* the adjoint that was given is not its adjoint",
        {"A": ns.LinearOperator(lambda v: M34 @ v, adjoint=lambda y: -M34.mT @ y, domain=M34[0], codomain=B3)},
    ),
    "no adjoint": (
        RuntimeError,
        "autograd cannot derive it",
        {"A": lambda v: torch.from_numpy(M34.numpy() @ v.detach().numpy()), "domain": M34[0]},
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_named(what, name):
    error, message, arguments = REFUSED[what]
    arguments = {"A": M34, "b": B3, **arguments}
    with pytest.raises(error, match=message), contextlib.suppress(ns.ConvergenceWarning):
        choose(name, arguments.pop("A"), arguments.pop("b"), 0.1, **arguments)


A_TALL, B_TALL, NOISE = case(40, 30)
NOISES = {
    "none": (TypeError, "noise: expected a non-negative number, got NoneType", {"noise": None}),
    "negative": (ValueError, "noise: expected a non-negative number, got -1.0", {"noise": -1.0}),
    "a tau of a wrong type": (TypeError, "tau: expected a non-negative number, got str", {"noise": 1.0, "tau": "1"}),
    "above b": (
        ValueError,
        rf"noise: expected tau \* noise below {norm(B_TALL):.6g}, the norm of b, .* got {2 * norm(B_TALL):.6g}",
        {"noise": norm(B_TALL), "tau": 2.0},
    ),
    "below the least-squares residual": (
        ValueError,
        rf"noise: expected tau \* noise above {math.sqrt(Dense(A_TALL, B_TALL).outside2):.6g}, the residual norm that least "
        rf"squares without damping reaches, got {0.1 * NOISE:.6g}$",
        {"noise": 0.1 * NOISE},
    ),
    "below what so few steps reach": (
        ValueError,
        r"noise: expected tau \* noise above \S+, the residual norm that 3 steps reach, got \S+; raise steps",
        {"noise": NOISE, "steps": 3},
    ),
}


@pytest.mark.parametrize("what", NOISES)
def test_a_noise_that_no_damping_meets_is_refused(what):
    error, message, options = NOISES[what]
    with pytest.raises(error, match=message):
        discrepancy(A_TALL, B_TALL, **options)


def test_a_square_problem_is_not_fitted_to_the_last_rounding():
    """Its least-squares residual is zero, but only with singular values of rounding."""
    A, x = shaw(40)
    b, noise = noisy(A, x, 1e-2)
    with pytest.raises(ValueError, match="noise: expected tau \\* noise above"):
        discrepancy(A, b, noise=1e-6 * noise)


def test_probes_and_seed_are_checked():
    with pytest.raises(ValueError, match="probes: expected at least 1, got 0"):
        gcv(M34, B3, probes=0)
    with pytest.raises(TypeError, match="seed: expected an integer, got str"):
        gcv(M34, B3, seed="1")


def test_a_transform_is_refused():
    with pytest.raises(RuntimeError, match=r"outside of torch\.func transforms"):
        torch.func.vmap(lambda b: lcurve(M34, b).x)(draw(2, 3))
