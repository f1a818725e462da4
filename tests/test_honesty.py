"""Never a silently wrong answer: what the record says is what anybody can recompute, in both passes.

The project's settings make every warning an error, so that a pass that must be silent is tested by running it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import nablasolve as ns
from nablasolve import Status

KRYLOV = ("cg", "minres", "gmres", "bicgstab")
ALL = (*KRYLOV, "direct")
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
GENERAL = ("gmres", "bicgstab", "direct")  # methods for operators of any kind
HERMITIAN = ("cg", "minres")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matvec(A: Tensor, v: Tensor) -> Tensor:
    return (A @ v.unsqueeze(-1)).squeeze(-1)


def operand(A: Tensor, method: str):
    """The matrix for the direct method, a closure for the others."""
    return A if method == "direct" else lambda v: matvec(A, v)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def default_rtol(dtype: torch.dtype) -> float:
    return 1e-5 if dtype in (torch.float32, torch.complex64) else 1e-8


def definite(n: int = 12, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A Hermitian positive definite matrix with a condition number of about 10."""
    G = torch.randn(n, n, generator=generator(seed), dtype=wide(dtype))
    return (G @ G.mH / n + 0.5 * torch.eye(n, dtype=G.dtype)).to(dtype)


def general(n: int = 12, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A nonsymmetric matrix, well conditioned."""
    G = torch.randn(n, n, generator=generator(seed), dtype=wide(dtype))
    return (torch.eye(n, dtype=G.dtype) + 0.4 * G / n**0.5).to(dtype)


def suitable(method: str, n: int = 12, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A matrix for which the method is made."""
    return definite(n, dtype, seed) if method in HERMITIAN else general(n, dtype, seed)


def vector(n: int = 12, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(n, generator=generator(seed), dtype=wide(dtype)).to(dtype)


# -- converged means converged -----------------------------------------------------------------------------------------


def with_singular_values(values: Tensor, hermitian: bool, like: Tensor, g: torch.Generator) -> Tensor:
    n = len(values)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=like.dtype))
    P, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=like.dtype))
    return Q * values.to(like.dtype) @ (Q if hermitian else P).mH


def random_matrix(kind: str, n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    G = torch.randn(n, n, generator=g, dtype=wide(dtype))
    eye = torch.eye(n, dtype=G.dtype)
    decay = torch.logspace(0, -16 * torch.rand((), generator=g).item(), n, dtype=torch.float64)
    deficient = torch.linspace(1, 2, n, dtype=torch.float64)
    deficient[: max(1, n // 4)] = 0
    makers: dict[str, Callable[[], Tensor]] = {
        "near identity": lambda: eye + 0.3 * G / n**0.5,
        "definite": lambda: G @ G.mH / n + 0.1 * eye,
        "ill-conditioned definite": lambda: with_singular_values(decay, True, G, g),
        "ill-conditioned general": lambda: with_singular_values(decay, False, G, g),
        "indefinite": lambda: G + G.mH,
        "singular Hermitian": lambda: with_singular_values(deficient, True, G, g),
        "singular general": lambda: with_singular_values(deficient, False, G, g),
        "skew-Hermitian": lambda: G - G.mH,
        "nilpotent": lambda: torch.triu(G, 1),
        "general": lambda: G,
        "with NaN": lambda: torch.where(torch.arange(n)[:, None] * n + torch.arange(n) == n * n // 2, math.nan, G),
    }
    return makers[kind]().to(dtype)


KINDS = (
    "near identity", "definite", "ill-conditioned definite", "ill-conditioned general", "indefinite", "singular Hermitian",
    "singular general", "skew-Hermitian", "nilpotent", "general", "with NaN",
)  # fmt: skip
SYSTEMS_PER_CASE = 55  # times 4 dtypes and 5 methods: 1100 calls, a fifth of them batches of three


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ALL)
def test_converged_is_true_exactly_where_the_recomputed_residual_meets_the_tolerance(method, dtype):
    converged = failed = 0
    for k in range(SYSTEMS_PER_CASE):
        g = generator(1000 * k + 7)
        kind = KINDS[k % len(KINDS)]
        n = int(torch.randint(1, 12, (), generator=g))
        batched = k % 5 == 2
        A = random_matrix(kind, n, dtype, g)
        b = torch.randn(*((3, n) if batched else (n,)), generator=g, dtype=wide(dtype)).to(dtype)
        if batched:
            b[1] = 0
        if "singular" in kind and k % 2:
            b = matvec(A, b)
        rtol = (None, 1e-3, 1e-6)[k // 2 % 3]
        atol = (0.0, 1e-4)[k // 5 % 2]
        x0 = torch.randn(b.shape, generator=g, dtype=wide(dtype)).to(dtype) if k % 4 == 3 else None
        options = dict(method=method, rtol=rtol, atol=atol, x0=x0, maxiter=40, batch_dims=int(batched), grad="none")
        x, info = ns.solve_ex(operand(A, method), b, **options)

        assert torch.isfinite(x.abs()).all(), (kind, k)
        # nothing of the working precision takes part in what follows
        residual = b.to(wide(dtype)) - matvec(A.to(wide(dtype)), x.to(wide(dtype)))
        norm_b = torch.linalg.vector_norm(b.to(wide(dtype)), dim=-1)
        residual_norm = torch.linalg.vector_norm(residual, dim=-1)
        residual_norm = torch.where(norm_b == 0, 0.0, residual_norm)  # zero solves it, whatever A is
        threshold = torch.clamp((default_rtol(dtype) if rtol is None else rtol) * norm_b, min=atol)
        size = torch.linalg.matrix_norm(torch.nan_to_num(A).to(wide(dtype)), 2) * torch.linalg.vector_norm(
            x.to(wide(dtype)), dim=-1
        )
        last_bit = torch.finfo(dtype).eps / 2 * size  # what rounding x once to its dtype can change
        claimed = torch.as_tensor(info.converged)
        assert (residual_norm <= threshold + last_bit)[claimed].all(), (kind, k)
        reported = torch.as_tensor(info.residual_norm, dtype=torch.float64)
        known = ~torch.isnan(residual_norm)
        assert ((reported - residual_norm).abs() <= 8 * last_bit + 1e-6 * residual_norm)[known].all(), (kind, k)
        assert torch.equal(claimed, (reported <= threshold) & known), (kind, k)
        converged, failed = converged + int(claimed.sum()), failed + int((~claimed).sum())
    assert converged > 15
    assert failed > 15


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ALL)
def test_no_failed_solve_is_labelled_converged_with_a_huge_solution(method, dtype):
    for seed in range(10):
        g = generator(seed)
        values = torch.linspace(1, 2, 9, dtype=torch.float64)
        values[0] = 0
        A = with_singular_values(values, True, torch.zeros(1, dtype=wide(dtype)), g).to(dtype)
        b = torch.randn(9, generator=g, dtype=wide(dtype)).to(dtype)
        x, info = ns.solve_ex(operand(A, method), b, method=method, maxiter=100)
        assert not info.converged
        assert info.status not in (Status.CONVERGED, Status.LEAST_SQUARES)
        assert torch.isfinite(x.abs()).all()
        if method in ("minres", "gmres", "direct"):  # the residual of these never rises
            assert info.relative_residual <= 1 + 1e-5


@pytest.mark.parametrize("method", KRYLOV)
def test_a_residual_that_drifted_from_the_true_one_is_not_believed(method):
    # float32 and a condition number of 1e5: the recursive residual goes on falling where the true one has stopped
    g = generator(3)
    values = torch.logspace(0, -5, 60, dtype=torch.float64)
    A = with_singular_values(values, True, torch.zeros(1, dtype=torch.float64), g).float()
    b = torch.randn(60, generator=g)
    x, info = ns.solve_ex(operand(A, method), b, method=method, rtol=1e-7, maxiter=2000)
    true = torch.linalg.vector_norm(b.double() - A.double() @ x.double()) / torch.linalg.vector_norm(b.double())
    assert not info.converged
    assert true > 1e-7
    assert true / 3 < info.relative_residual < 3 * true  # both are rounding, but of one size


# -- failure is visible in both passes ---------------------------------------------------------------------------------


def hard(method: str) -> tuple[Tensor, Tensor]:
    """A system that needs more than three steps."""
    return suitable(method, 30), vector(30)


@pytest.mark.parametrize("method", KRYLOV)
def test_a_forward_failure_raises_and_carries_the_iterate(method):
    A, b = hard(method)
    with pytest.raises(ns.ConvergenceError, match="MAXITER after 3 iterations") as caught:
        ns.solve(operand(A, method), b, method=method, maxiter=3)
    error = caught.value
    assert isinstance(error, torch.linalg.LinAlgError)
    assert "adjoint" not in str(error)
    assert error.info.status is Status.MAXITER
    assert error.info.iterations == 3
    assert not error.info.converged
    assert error.x.shape == b.shape
    true = torch.linalg.vector_norm(b - A @ error.x).item()
    assert error.info.residual_norm == pytest.approx(true, rel=1e-10)
    assert error.info.relative_residual == pytest.approx(true / torch.linalg.vector_norm(b).item(), rel=1e-10)


@pytest.mark.parametrize("method", KRYLOV)
def test_a_forward_failure_warns_under_warn_and_is_silent_under_ignore(method):
    A, b = hard(method)
    with pytest.warns(ns.ConvergenceWarning, match="MAXITER") as record:
        warned = ns.solve(operand(A, method), b, method=method, maxiter=3, on_failure="warn")
    assert len(record) == 1
    ignored = ns.solve(operand(A, method), b, method=method, maxiter=3, on_failure="ignore")
    assert torch.equal(warned, ignored)


@pytest.mark.parametrize("method", KRYLOV)
@pytest.mark.parametrize("on_failure", ["raise", "warn", "ignore"])
def test_solve_ex_neither_raises_nor_warns_in_the_forward_pass(method, on_failure):
    A, b = hard(method)
    _, info = ns.solve_ex(operand(A, method), b, method=method, maxiter=3, on_failure=on_failure)
    assert info.status is Status.MAXITER
    assert info.iterations == 3


def failing_adjoint(method: str, **options):
    """A solve whose forward pass converges and whose adjoint solve is allowed three steps."""
    A, b = hard(method)
    b.requires_grad_()
    x, info = ns.solve_ex(operand(A, method), b, method=method, adjoint=dict(maxiter=3), **options)
    assert info.converged
    assert info.adjoint is None
    return b, x, info


@pytest.mark.parametrize("method", KRYLOV)
def test_an_adjoint_failure_raises_and_says_that_it_was_the_adjoint(method):
    b, x, info = failing_adjoint(method, on_failure="raise")
    with pytest.raises(ns.ConvergenceError, match="adjoint") as caught:
        x.sum().backward()
    assert "MAXITER after 3 iterations" in str(caught.value)
    assert b.grad is None
    assert info.adjoint is not None
    assert info.adjoint.status is Status.MAXITER
    assert info.adjoint.iterations == 3
    assert not info.adjoint.converged
    assert info.converged


@pytest.mark.parametrize("method", KRYLOV)
@pytest.mark.parametrize("options", [{}, {"on_failure": "warn"}], ids=["default", "warn"])
def test_an_adjoint_failure_of_solve_ex_warns_by_default(method, options):
    b, x, info = failing_adjoint(method, **options)
    with pytest.warns(ns.ConvergenceWarning, match="adjoint"):
        x.sum().backward()
    assert info.adjoint.status is Status.MAXITER
    assert torch.isfinite(b.grad).all()


@pytest.mark.parametrize("method", KRYLOV)
def test_an_adjoint_failure_is_silent_under_ignore_and_recorded_all_the_same(method):
    b, x, info = failing_adjoint(method, on_failure="ignore")
    x.sum().backward()
    assert info.adjoint.status is Status.MAXITER
    assert torch.isfinite(b.grad).all()


@pytest.mark.parametrize("method", KRYLOV)
@pytest.mark.parametrize("on_failure", ["raise", "warn", "ignore"])
def test_solve_applies_its_policy_to_the_adjoint_as_well(method, on_failure):
    A, b = hard(method)
    b.requires_grad_()
    x = ns.solve(operand(A, method), b, method=method, adjoint=dict(maxiter=3), on_failure=on_failure)
    if on_failure == "raise":
        with pytest.raises(ns.ConvergenceError, match="adjoint"):
            x.sum().backward()
    elif on_failure == "warn":
        with pytest.warns(ns.ConvergenceWarning, match="adjoint"):
            x.sum().backward()
    else:
        x.sum().backward()
        assert torch.isfinite(b.grad).all()


@pytest.mark.parametrize("method", KRYLOV)
def test_the_functions_with_scipy_names_return_the_record_and_warn_in_the_adjoint(method):
    A, b = hard(method)
    b.requires_grad_()
    x, info = getattr(ns, method)(operand(A, method), b, maxiter=3)
    assert info.status is Status.MAXITER
    with pytest.warns(ns.ConvergenceWarning, match="adjoint"):
        x.sum().backward()
    assert info.adjoint.status is Status.MAXITER


@pytest.mark.parametrize("method", KRYLOV)
def test_a_failed_system_of_a_batch_fails_the_solve_and_names_the_count(method):
    A = suitable(method, 30)
    b = torch.stack([vector(30), torch.zeros(30, dtype=torch.float64), vector(30, seed=2)])
    with pytest.raises(ns.ConvergenceError, match=r"2 of 3 systems") as caught:
        ns.solve(operand(A, method), b, method=method, maxiter=3, batch_dims=1)
    assert caught.value.info.status.tolist() == [Status.MAXITER, Status.CONVERGED, Status.MAXITER]
    assert caught.value.info.iterations.tolist() == [3, 0, 3]
    assert caught.value.x.shape == b.shape


@pytest.mark.parametrize("method", KRYLOV)
@pytest.mark.parametrize("rtol", [1e-3, 1e-8])
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
def test_converging_at_exactly_maxiter_is_converging(method, rtol, batched):
    A, b = hard(method)
    b = b.expand(2, -1) if batched else b
    options = dict(method=method, rtol=rtol, batch_dims=int(batched))
    x, info = ns.solve_ex(operand(A, method), b, **options)
    needed = int(torch.as_tensor(info.iterations).max())
    assert needed > 3
    again, exact = ns.solve_ex(operand(A, method), b, maxiter=needed, **options)
    assert torch.as_tensor(exact.converged).all()
    assert torch.equal(x, again)
    _, short = ns.solve_ex(operand(A, method), b, maxiter=needed - 1, **options)
    assert (torch.as_tensor(short.status) == Status.MAXITER).all()


@pytest.mark.parametrize("method", ALL)
def test_no_steps_allowed_is_a_failure_unless_nothing_is_to_be_done(method):
    A, b = suitable(method), vector()
    _, info = ns.solve_ex(operand(A, method), b, method=method, maxiter=0)
    assert info.status is Status.MAXITER
    assert info.iterations == 0
    assert info.relative_residual == pytest.approx(1.0)
    _, info = ns.solve_ex(operand(A, method), 0 * b, method=method, maxiter=0)
    assert info.converged


# -- nothing depends on a scale ----------------------------------------------------------------------------------------


def assert_scaled(x: Tensor, reference: Tensor, factor: float, rtol: float) -> None:
    assert torch.isfinite(x.abs()).all()
    torch.testing.assert_close(x / factor, reference, rtol=0, atol=rtol * reference.abs().max().item())


SCALES = (1e-150, 1e-30, 1e30, 1e150)


@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("method", ALL)
def test_scaling_b_scales_x_and_changes_nothing_else(method, dtype, batched):
    A, b = suitable(method, dtype=dtype), vector(dtype=dtype)
    b = torch.stack([b, vector(dtype=dtype, seed=5)]) if batched else b
    options = dict(method=method, batch_dims=int(batched))
    x, info = ns.solve_ex(operand(A, method), b, **options)
    assert torch.as_tensor(info.converged).all()
    for scale in SCALES:
        scaled, record = ns.solve_ex(operand(A, method), b * scale, **options)
        assert torch.as_tensor(record.converged).all(), scale
        assert torch.equal(torch.as_tensor(record.iterations), torch.as_tensor(info.iterations)), scale
        assert_scaled(scaled, x, scale, 1e-9)


@pytest.mark.parametrize("method", ALL)
def test_scaling_b_by_a_power_of_two_scales_x_to_the_last_bit(method):
    A, b = suitable(method), vector()
    x = ns.solve(operand(A, method), b, method=method)
    for exponent in (-480, -100, 100, 480):
        assert torch.equal(ns.solve(operand(A, method), b * 2.0**exponent, method=method), x * 2.0**exponent)


@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("method", ALL)
def test_a_tiny_or_huge_right_hand_side_is_solved_in_single_precision(method, dtype, batched):
    A, b = suitable(method, dtype=dtype), vector(dtype=dtype)
    b = torch.stack([b, vector(dtype=dtype, seed=5)]) if batched else b
    options = dict(method=method, batch_dims=int(batched))
    x, info = ns.solve_ex(operand(A, method), b, **options)
    assert torch.as_tensor(info.converged).all()
    for scale in (1e-30, 1e-12, 1e30):
        scaled, record = ns.solve_ex(operand(A, method), b * scale, **options)
        assert torch.as_tensor(record.converged).all(), scale
        assert_scaled(scaled, x, scale, 1e-4)
    for scale in (2.0**-100, 2.0**-40, 2.0**100):  # these scale without rounding
        scaled, record = ns.solve_ex(operand(A, method), b * scale, **options)
        assert torch.equal(torch.as_tensor(record.iterations), torch.as_tensor(info.iterations)), scale
        assert torch.equal(scaled, x * scale)


@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
@pytest.mark.parametrize(("dtype", "scales"), [(torch.float64, SCALES), (torch.float32, (1e-30, 1e-12, 1e12, 1e30))], ids=str)
@pytest.mark.parametrize("method", ALL)
def test_scaling_the_operator_scales_x_back(method, dtype, scales, batched):
    A, b = suitable(method, dtype=dtype), vector(dtype=dtype)
    b = torch.stack([b, vector(dtype=dtype, seed=5)]) if batched else b
    options = dict(method=method, batch_dims=int(batched))
    x, info = ns.solve_ex(operand(A, method), b, **options)
    for scale in scales:
        scaled, record = ns.solve_ex(operand(A * scale, method), b, **options)
        assert torch.as_tensor(record.converged).all(), scale
        change = torch.as_tensor(record.iterations) - torch.as_tensor(info.iterations)
        assert (change.abs() <= (dtype == torch.float32)).all(), scale  # rounding may cost one step in single precision
        assert_scaled(scaled, x, 1 / scale, 1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("method", KRYLOV)
def test_scaling_the_preconditioner_changes_nothing(method):
    A, b = suitable(method), vector()
    diagonal = A.diagonal().clone()
    x, info = ns.solve_ex(operand(A, method), b, method=method, M=lambda r: r / diagonal)
    for scale in (1e-100, 1e-30, 1e30, 1e100):
        scaled, record = ns.solve_ex(operand(A, method), b, method=method, M=lambda r, scale=scale: r / diagonal * scale)
        assert record.converged, scale
        assert record.iterations == info.iterations, scale
        assert_scaled(scaled, x, 1.0, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ALL)
def test_scaling_the_loss_scales_the_gradient_and_changes_nothing_else(method, dtype):
    A, b = suitable(method, dtype=dtype).requires_grad_(), vector(dtype=dtype).requires_grad_()
    weights = vector(dtype=dtype, seed=2)
    x, info = ns.solve_ex(operand(A, method), b, method=method)
    reference = torch.autograd.grad(x @ weights, (A, b), retain_graph=True)
    iterations = info.adjoint.iterations
    for scale in (1e-12, 1e-30, 1e30) if dtype == torch.float64 else (1e-8, 1e-30, 1e30):
        grads = torch.autograd.grad(x @ (weights * scale), (A, b), retain_graph=True)
        assert info.adjoint.converged
        assert info.adjoint.iterations == iterations
        for grad, expected in zip(grads, reference, strict=True):
            assert_scaled(grad, expected, scale, 1e-9 if dtype == torch.float64 else 1e-5)


# -- tolerances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", KRYLOV)
def test_the_larger_of_the_two_tolerances_holds(method):
    A, b = hard(method)
    norm_b = torch.linalg.vector_norm(b).item()
    cases = [(1e-3, 0.0), (0.0, 1e-3 * norm_b), (1e-9, 1e-3 * norm_b), (1e-3, 1e-9 * norm_b)]
    records = [ns.solve_ex(operand(A, method), b, method=method, rtol=rtol, atol=atol)[1] for rtol, atol in cases]
    assert all(record.converged for record in records)
    assert len({record.iterations for record in records}) == 1
    _, finer = ns.solve_ex(operand(A, method), b, method=method, rtol=1e-9)
    assert finer.iterations > records[0].iterations


@pytest.mark.parametrize("method", ALL)
def test_an_absolute_tolerance_above_b_is_met_by_zero(method):
    A, b = suitable(method), vector()
    norm_b = torch.linalg.vector_norm(b).item()
    x, info = ns.solve_ex(operand(A, method), b, method=method, atol=norm_b * (1 + 1e-12))
    assert info.converged
    assert info.iterations == 0
    assert torch.equal(x, torch.zeros_like(b))
    assert info.relative_residual == pytest.approx(1.0)


@pytest.mark.parametrize("method", ALL)
def test_the_adjoint_never_uses_the_absolute_tolerance(method):
    A, b = suitable(method).requires_grad_(), vector().requires_grad_()
    x, info = ns.solve_ex(operand(A, method), b, method=method, rtol=1e-10, atol=1e-9)
    weights = 1e-8 * vector(seed=2)  # far below atol: with it, a zero gradient would do
    (grad,) = torch.autograd.grad(x @ weights, b)
    assert info.adjoint.converged
    assert info.adjoint.relative_residual <= 1e-10
    expected = torch.linalg.solve(A.detach().mH, weights)
    torch.testing.assert_close(grad, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("method", ALL)
def test_the_solves_of_other_derivatives_never_use_the_absolute_tolerance_either(method):
    A, b, tangent = suitable(method), vector(), 1e-8 * vector(seed=2)

    def solve(b: Tensor) -> Tensor:
        return ns.solve(operand(A, method), b, method=method, rtol=1e-10, atol=1e-9)

    expected = torch.linalg.solve(A, tangent)
    _, forward = torch.func.jvp(solve, (b,), (tangent,))
    torch.testing.assert_close(forward, expected, rtol=1e-7, atol=0)
    # the second derivative of |x|^2 / 2 along the tangent is A^{-H} A^{-1} tangent
    _, second = torch.func.jvp(torch.func.grad(lambda b: solve(b).square().sum() / 2), (b,), (tangent,))
    torch.testing.assert_close(second, torch.linalg.solve(A.mH, expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", KRYLOV)
@pytest.mark.parametrize("rtol", [1e-2, 1e-9])
def test_the_adjoint_has_the_relative_tolerance_of_the_forward_solve(method, rtol):
    A, b = hard(method)
    b.requires_grad_()
    x, info = ns.solve_ex(operand(A, method), b, method=method, rtol=rtol)
    (grad,) = torch.autograd.grad(x.sum(), b)
    ones = torch.ones_like(b)
    true = (torch.linalg.vector_norm(ones - A.mH @ grad) / torch.linalg.vector_norm(ones)).item()
    assert true <= rtol
    assert info.adjoint.relative_residual == pytest.approx(true, rel=1e-3)
    _, reference = ns.solve_ex(operand(A.mH, method), ones, method=method, rtol=rtol)
    assert abs(info.adjoint.iterations - reference.iterations) <= 1  # rounding may cost one


@pytest.mark.parametrize("method", KRYLOV)
def test_the_adjoint_may_have_a_tolerance_of_its_own(method):
    A, b = hard(method)
    b.requires_grad_()
    x, info = ns.solve_ex(operand(A, method), b, method=method, rtol=0.0, atol=1e-6, adjoint=dict(rtol=1e-11))
    assert info.converged
    (grad,) = torch.autograd.grad(x.sum(), b)
    assert info.adjoint.converged
    torch.testing.assert_close(grad, torch.linalg.solve(A.mH, torch.ones_like(b)), rtol=1e-8, atol=1e-8)


# -- zero, exact, aliased ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("guess", [False, True], ids=["cold", "with x0"])
def test_a_zero_right_hand_side_has_the_zero_solution_after_no_iterations(method, dtype, guess):
    A, b = suitable(method, dtype=dtype), torch.zeros(12, dtype=dtype)
    x, info = ns.solve_ex(operand(A, method), b, method=method, x0=vector(dtype=dtype) if guess else None)
    assert info.converged
    assert info.iterations == 0
    assert info.residual_norm == 0
    assert info.relative_residual == 0
    assert torch.equal(x, torch.zeros_like(b))
    assert x.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ALL)
def test_an_exact_guess_needs_no_iterations_and_is_returned_as_a_copy(method, dtype):
    # small integers, so that b - A x0 is exactly zero
    A = torch.diag(torch.arange(1, 13)).to(dtype)
    x0 = torch.arange(-6, 6).to(dtype)
    b = matvec(A, x0)
    x, info = ns.solve_ex(operand(A, method), b, method=method, x0=x0, rtol=0.0)
    assert info.converged
    assert info.iterations == 0
    assert torch.equal(x, x0)
    assert x.untyped_storage().data_ptr() != x0.untyped_storage().data_ptr()


@pytest.mark.parametrize("method", ALL)
def test_a_guess_within_the_tolerance_needs_no_iterations(method):
    A, b = suitable(method), vector()
    x = torch.linalg.solve(A, b)
    _, info = ns.solve_ex(operand(A, method), b, method=method, x0=x + 1e-12)
    assert info.converged
    assert info.iterations == 0


@pytest.mark.parametrize("method", ALL)
def test_b_and_x0_are_never_changed(method):
    A, b, x0 = suitable(method), vector(), vector(seed=3)
    copies = [t.clone() for t in (A, b, x0)]
    ns.solve(operand(A, method), b, method=method, x0=x0)
    for kept, copy in zip((A, b, x0), copies, strict=True):
        assert torch.equal(kept, copy)


# -- every status, from a case made for it -----------------------------------------------------------------------------


def counting(A: Tensor, poison_at: int, value: float):
    """A closure that returns `value` in one component from its `poison_at`-th call on."""
    calls = []

    def apply(v: Tensor) -> Tensor:
        calls.append(1)
        y = matvec(A, v)
        if len(calls) >= poison_at:
            y = y.clone()
            y[..., 0] = value
        return y

    return apply


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("method", ALL)
def test_nonfinite_b_is_reported_before_the_first_step(method, dtype, value):
    A, b = suitable(method, dtype=dtype), vector(dtype=dtype)
    b[3] = value
    x, info = ns.solve_ex(operand(A, method), b, method=method)
    assert info.status is Status.NONFINITE
    assert info.iterations == 0
    assert torch.isfinite(x.abs()).all()


@pytest.mark.parametrize("method", ALL)
def test_a_nonfinite_guess_is_reported_before_the_first_step(method):
    A, b = suitable(method), vector()
    x, info = ns.solve_ex(operand(A, method), b, method=method, x0=torch.full_like(b, math.nan))
    assert info.status is Status.NONFINITE
    assert info.iterations == 0
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", KRYLOV)
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
def test_a_nonfinite_product_is_reported_at_once(method, value, batched):
    A, b = hard(method)
    b = b.expand(2, -1) if batched else b
    for poison_at in (1, 2, 4, 6):
        x, info = ns.solve_ex(counting(A, poison_at, value), b, method=method, rtol=1e-12, grad="none", batch_dims=int(batched))
        assert (torch.as_tensor(info.status) == Status.NONFINITE).all(), poison_at
        assert (torch.as_tensor(info.iterations) <= poison_at).all(), poison_at
        assert torch.isfinite(x).all(), poison_at


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", KRYLOV)
def test_a_nonfinite_preconditioner_is_reported_at_once(method, value):
    A, b = hard(method)
    for poison_at in (1, 2, 4):
        x, info = ns.solve_ex(
            operand(A, method), b, method=method, M=counting(torch.eye(30).double(), poison_at, value), rtol=1e-12, grad="none"
        )
        assert info.status is Status.NONFINITE, poison_at
        assert info.iterations <= poison_at, poison_at
        assert torch.isfinite(x).all(), poison_at


def test_a_nonfinite_matrix_is_reported_by_the_direct_method():
    for value in (math.nan, math.inf):
        A, b = general(), vector()
        A[2, 3] = value
        x, info = ns.solve_ex(A, b)
        assert info.status is Status.NONFINITE
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("method", KRYLOV)
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
def test_a_callback_that_returns_true_stops_a_solve_that_has_not_converged(method, batched):
    A, b = hard(method)
    b = b.expand(2, -1) if batched else b
    seen = []

    def callback(state) -> bool:
        seen.append((state.iteration, state.phase))
        return state.iteration == 4

    _, info = ns.solve_ex(operand(A, method), b, method=method, rtol=1e-12, callback=callback, batch_dims=int(batched))
    assert (torch.as_tensor(info.status) == Status.STOPPED).all()
    assert (torch.as_tensor(info.iterations) == 4).all()
    assert not torch.as_tensor(info.converged).any()
    assert seen == [(k, "forward") for k in (1, 2, 3, 4)]
    with pytest.raises(ns.ConvergenceError, match="STOPPED"):
        ns.solve(operand(A, method), b, method=method, rtol=1e-12, callback=callback, batch_dims=int(batched))


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
def test_a_tolerance_beyond_the_precision_stagnates_long_before_the_limit(method, dtype, batched):
    A, b = suitable(method, 20, dtype=dtype), vector(20, dtype=dtype)
    b = torch.stack([b, vector(20, dtype=dtype, seed=9)]) if batched else b
    x, info = ns.solve_ex(operand(A, method), b, method=method, rtol=1e-12, batch_dims=int(batched), maxiter=5000)
    assert (torch.as_tensor(info.status) == Status.STAGNATED).all()
    assert (torch.as_tensor(info.iterations) < 500).all()
    assert (torch.as_tensor(info.relative_residual) < 1e-5).all()  # and yet as good as the precision allows
    assert torch.isfinite(x.abs()).all()


def rotated(values: list[float], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A Hermitian matrix with these eigenvalues."""
    return with_singular_values(
        torch.tensor(values, dtype=torch.float64), True, torch.zeros(1, dtype=wide(dtype)), generator(seed)
    ).to(dtype)


INDEFINITE_MATRICES = {
    "negative definite": lambda dtype: -definite(dtype=dtype),
    "one negative eigenvalue": lambda dtype: rotated([-1.0, *(1.0 + k / 10 for k in range(11))], dtype),
    "as many of each sign": lambda dtype: rotated([s * (1.0 + k) for k in range(6) for s in (1, -1)], dtype),
    "zero first curvature": lambda dtype: torch.block_diag(*[torch.tensor([[0.0, 1.0], [1.0, 0.0]])] * 6).to(dtype),
}


@pytest.mark.parametrize("case", INDEFINITE_MATRICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
def test_cg_reports_an_indefinite_operator(case, dtype, batched):
    A = INDEFINITE_MATRICES[case](dtype)
    b = torch.eye(12, dtype=dtype)[0] if case == "zero first curvature" else vector(dtype=dtype)
    b = b.expand(2, -1) if batched else b
    x, info = ns.solve_ex(operand(A, "cg"), b, method="cg", batch_dims=int(batched))
    assert (torch.as_tensor(info.status) == Status.INDEFINITE).all()
    assert torch.isfinite(x.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_false_claim_of_definiteness_is_reported_by_the_direct_method(dtype):
    A = rotated([-1.0, *(1.0 + k / 10 for k in range(11))], dtype)
    _, info = ns.solve_ex(ns.aslinearoperator(A, positive_definite=True), vector(dtype=dtype))
    assert info.method == "direct"
    assert info.status is Status.INDEFINITE


@pytest.mark.parametrize("method", HERMITIAN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
def test_a_preconditioner_of_the_wrong_sign_is_reported(method, dtype, batched):
    A, b = definite(dtype=dtype), vector(dtype=dtype)
    b = b.expand(2, -1) if batched else b
    x, info = ns.solve_ex(operand(A, method), b, method=method, M=lambda r: -r, batch_dims=int(batched))
    assert (torch.as_tensor(info.status) == Status.INDEFINITE).all()
    assert not torch.as_tensor(info.converged).any()
    assert torch.isfinite(x.abs()).all()


@pytest.mark.parametrize("method", HERMITIAN)
def test_an_indefinite_preconditioner_is_reported_or_harmless(method):
    A = definite()
    M = torch.linspace(1, 2, 12, dtype=torch.float64)
    M[::3] *= -1
    for seed in range(10):
        b = vector(seed=seed)
        x, info = ns.solve_ex(operand(A, method), b, method=method, M=lambda r: M * r)
        assert info.status in (Status.INDEFINITE, Status.CONVERGED)
        if info.converged:
            assert torch.linalg.vector_norm(b - A @ x) <= 1e-8 * torch.linalg.vector_norm(b)


NONSYMMETRIC_MATRICES = {
    "general": lambda dtype: general(dtype=dtype),
    "random": lambda dtype: torch.randn(12, 12, generator=generator(0), dtype=wide(dtype)).to(dtype),
    "shifted skew": lambda dtype: (lambda G: torch.eye(12, dtype=dtype) + (G - G.mH))(
        torch.randn(12, 12, generator=generator(0), dtype=wide(dtype)).to(dtype)
    ),
    "upper triangular": lambda dtype: torch.triu(general(dtype=dtype)),
}


@pytest.mark.parametrize("case", NONSYMMETRIC_MATRICES)
@pytest.mark.parametrize("method", HERMITIAN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_operator_that_is_not_hermitian_is_reported(case, method, dtype):
    A, b = NONSYMMETRIC_MATRICES[case](dtype), vector(dtype=dtype)
    x, info = ns.solve_ex(operand(A, method), b, method=method)
    assert info.status is Status.NOT_HERMITIAN
    assert torch.isfinite(x.abs()).all()


@pytest.mark.parametrize("method", HERMITIAN)
def test_a_complex_symmetric_operator_is_not_taken_for_a_hermitian_one(method):
    G = torch.randn(12, 12, generator=generator(0), dtype=torch.complex128)
    A = 8 * torch.eye(12, dtype=torch.complex128) + G + G.mT
    _, info = ns.solve_ex(operand(A, method), vector(dtype=torch.complex128), method=method)
    assert info.status is Status.NOT_HERMITIAN


@pytest.mark.parametrize("method", ALL)
def test_a_false_claim_of_symmetry_fails_the_adjoint_and_never_gives_a_wrong_gradient(method):
    A, b = general(), vector().requires_grad_()
    claimed = ns.aslinearoperator(A if method == "direct" else (lambda v: A @ v), hermitian=True)
    # with the exact solution as the guess the forward pass has nothing to notice
    x0 = torch.linalg.solve(A, b.detach())
    x, info = ns.solve_ex(claimed, b, method=method, x0=x0, on_failure="raise")
    assert info.converged
    with pytest.raises(ns.ConvergenceError, match="adjoint"):
        x.sum().backward()
    assert info.adjoint.status is Status.NOT_HERMITIAN
    assert b.grad is None


@pytest.mark.parametrize("method", ["gmres", "bicgstab"])
def test_a_wrong_adjoint_given_by_the_user_never_gives_a_wrong_gradient(method):
    A, b = general(), vector().requires_grad_()
    claimed = ns.LinearOperator(lambda v: A @ v, adjoint=lambda v: A @ v)
    x, info = ns.solve_ex(claimed, b, method=method, on_failure="raise")
    with pytest.raises(ns.ConvergenceError, match="adjoint"):
        x.sum().backward()
    assert not info.adjoint.converged


def neumann(n: int, dtype: torch.dtype) -> Tensor:
    """The singular second difference with reflecting ends; its null space holds the constants."""
    A = (
        2 * torch.eye(n, dtype=dtype)
        - torch.diag(torch.ones(n - 1, dtype=dtype), 1)
        - torch.diag(torch.ones(n - 1, dtype=dtype), -1)
    )
    A[0, 0] = A[-1, -1] = 1
    return A


def status_of(A: Tensor, b: Tensor, method, **options) -> Status:
    x, info = ns.solve_ex(operand(A, method), b, method=method, **options)
    assert torch.isfinite(x.abs()).all()
    return info.status


@pytest.mark.parametrize("n", [6, 50, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["cg", "minres", "gmres"])
def test_an_inconsistent_singular_hermitian_system_is_reported(method, n, dtype):
    A = neumann(n, dtype)
    for seed in range(3):
        b = torch.rand(n, generator=generator(seed), dtype=torch.float64).to(dtype)  # of mean one half
        option = ns.GMRES(restart=n) if method == "gmres" else method
        claimed = ns.LinearOperator(lambda v: A @ v, hermitian=True)
        x, info = ns.solve_ex(claimed, b, method=option)
        if method == "minres" and n == 300:  # a condition of 4e4, whose iterates bury the residual in rounding
            assert info.status in (Status.INCONSISTENT, Status.STAGNATED, Status.MAXITER), seed
        else:
            assert info.status is Status.INCONSISTENT, seed
        assert torch.isfinite(x).all()
        assert torch.linalg.vector_norm(x) < 1e6 * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("n", [6, 50, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["cg", "minres", "gmres"])
def test_a_consistent_singular_hermitian_system_is_solved(method, n, dtype):
    A = neumann(n, dtype)
    b = torch.rand(n, generator=generator(0), dtype=torch.float64)
    b = (b - b.mean()).to(dtype)
    option = ns.GMRES(restart=n) if method == "gmres" else method
    # float32 cannot hold the mean of b at zero better than to its roundoff, nor A x better than to eps |A| |x|
    rtol = 1e-8 if dtype == torch.float64 else max(1e-5, 1e-7 * n**2 / 10)
    x, info = ns.solve_ex(operand(A, method), b, method=option, rtol=rtol)
    assert info.converged
    true = torch.linalg.vector_norm(b.double() - A.double() @ x.double())
    assert true <= 1.1 * rtol * torch.linalg.vector_norm(b.double())


SINGULAR_KINDS = {
    "semidefinite": ALL,
    "Hermitian": ("minres", *GENERAL),
    "range-symmetric": GENERAL,
    "general": GENERAL,
    "a product of rectangular ones": GENERAL,
}


def singular(kind: str, n: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A singular matrix, a vector in its range, and one of unit norm in the null space of its adjoint."""
    g, like = generator(1000 * n + seed), torch.zeros(1, dtype=wide(dtype))
    nullity = 1 + seed % min(3, n - 1)
    Q, P = (torch.linalg.qr(torch.randn(n, n, generator=g, dtype=like.dtype))[0] for _ in range(2))
    values = torch.logspace(0, -2 * (seed % 2), n - nullity, dtype=torch.float64).to(like.dtype)
    range_, null = Q[:, nullity:], Q[:, :nullity]
    signs = torch.where(torch.arange(n - nullity) % 2 == 0, 1.0, -1.0)
    G = torch.eye(n - nullity) + 0.3 * torch.randn(n - nullity, n - nullity, generator=g, dtype=like.dtype) / n**0.5
    B, C = (torch.randn(n, n - nullity, generator=g, dtype=like.dtype) for _ in range(2))
    if kind == "a product of rectangular ones":
        null = torch.linalg.qr(B, mode="complete").Q[:, n - nullity :]
    A = {
        "semidefinite": range_ * values @ range_.mH,
        "Hermitian": range_ * (signs * values) @ range_.mH,
        "range-symmetric": range_ * values @ G @ range_.mH,
        "general": range_ * values @ P[:, nullity:].mH,
        "a product of rectangular ones": B @ C.mH,
    }[kind]
    reached, missed = (M @ torch.randn(M.shape[1], generator=g, dtype=like.dtype) for M in (A, null))
    return A.to(dtype), reached / torch.linalg.vector_norm(reached), missed / torch.linalg.vector_norm(missed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "method"), [(kind, method) for kind in SINGULAR_KINDS for method in SINGULAR_KINDS[kind]])
def test_a_part_of_b_outside_the_range_is_reported_by_every_method(kind, method, dtype):
    for n in (2, 3, 7, 20, 50):
        for seed, part in enumerate((1.0, 0.1, 1e-2, 1e-3)):
            A, reached, missed = singular(kind, n, dtype, seed)
            status = status_of(A, (reached + part * missed).to(dtype), method)
            assert status is Status.INCONSISTENT, (n, seed, status)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "method"), [(kind, method) for kind in SINGULAR_KINDS for method in SINGULAR_KINDS[kind]])
def test_a_consistent_singular_system_is_never_called_inconsistent(kind, method, dtype):
    for n in (2, 7, 30, 70):
        for seed in range(2):
            A, reached, _ = singular(kind, n, dtype, seed)
            for rtol in (None, 1e-14):  # the second one cannot be reached
                assert status_of(A, reached.to(dtype), method, rtol=rtol) is not Status.INCONSISTENT, (n, seed, rtol)
                b = matvec(A, vector(n, dtype, seed))
                assert status_of(A, b, method, rtol=rtol) is not Status.INCONSISTENT, (n, seed, rtol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ALL)
def test_a_nonsingular_system_is_never_called_inconsistent_however_ill_conditioned(method, dtype):
    failed = 0
    for digits in (4, 8, 12) if torch.finfo(dtype).eps < 1e-10 else (2, 4, 5):
        for n in (2, 7, 30, 70):
            for seed, exponents in enumerate((torch.linspace(0, 1, n), (torch.arange(n) == 0).double())):
                values = 10.0 ** (-digits * exponents.double())
                like = torch.zeros(1, dtype=wide(dtype))
                A = with_singular_values(values, method in HERMITIAN, like, generator(seed)).to(dtype)
                for rtol in (None, 1e-14):
                    status = status_of(A, vector(n, dtype, seed), method, rtol=rtol)
                    failed += status is not Status.CONVERGED
                    assert status in (Status.CONVERGED, Status.MAXITER, Status.STAGNATED, Status.BREAKDOWN), (digits, n, seed)
    assert failed > 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["minres", "gmres", "bicgstab"])
def test_a_large_inconsistent_system_is_diagnosed_in_a_fixed_number_of_products(method, dtype):
    n, seed = 200, 3
    values = torch.linspace(1, 2, n, dtype=torch.float64)
    values[0] = 0
    A = with_singular_values(values, method in HERMITIAN, torch.zeros(1, dtype=wide(dtype)), generator(seed)).to(dtype)
    calls = []

    def apply(v: Tensor) -> Tensor:
        calls.append(1)
        return matvec(A, v)

    _, info = ns.solve_ex(apply, vector(n, dtype), method=method, maxiter=2 * n)
    assert info.status is Status.INCONSISTENT
    assert info.matvecs == len(calls)
    assert info.rmatvecs <= 2 * 51
    spent = info.iterations * (2 if method == "bicgstab" else 1)
    # the certificates of the restarts, the recording, the two products of the symmetry test, the search from two vectors
    assert info.matvecs <= spent + info.iterations // 10 + 5 + 2 * 51 * (2 if method == "minres" else 1)


@pytest.mark.parametrize("method", KRYLOV)
def test_a_solve_that_was_cut_short_is_not_searched_for_null_vectors(method):
    A, b = hard(method)
    _, info = ns.solve_ex(operand(A, method), b, method=method, maxiter=3)
    assert info.status is Status.MAXITER
    assert info.matvecs <= 3 * (2 if method == "bicgstab" else 1) + 6
    assert info.rmatvecs == 0


def test_the_inconsistent_systems_of_a_batch_are_told_from_the_others():
    A, reached, missed = singular("semidefinite", 9, torch.float64, 0)
    b = torch.stack([reached, reached + missed, 0 * missed, missed])
    for method in ("minres", "gmres"):
        _, info = ns.solve_ex(lambda v: matvec(A, v), b, method=method, batch_dims=1)
        assert [Status(code) is Status.INCONSISTENT for code in info.status.tolist()] == [False, True, False, True]
        assert info.converged.tolist() == [True, False, True, False]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("method", ["gmres", "bicgstab", "minres"])
def test_the_scale_of_the_operator_does_not_change_the_diagnosis(method, scale):
    for n in (20, 100):
        for smallest, expected in ((0.0, True), (1e-5, False)):
            values = torch.linspace(1, 2, n, dtype=torch.float64)
            values[: n // 10] = smallest
            A = with_singular_values(values, True, torch.zeros(1, dtype=torch.float64), generator(0)).float() * scale
            status = status_of(A, vector(n, torch.float32), method, rtol=1e-14)
            assert (status is Status.INCONSISTENT) == expected, (n, smallest, status)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_singular_matrix_breaks_the_direct_method_down(dtype):
    A = general(dtype=dtype)
    A[:, 4] = A[:, 2]
    A[4], A[2] = A[2].clone(), A[2].clone()
    A[5] = 0
    with pytest.raises(ns.ConvergenceError):
        ns.solve(A, vector(dtype=dtype))
    assert status_of(A, vector(dtype=dtype), "direct") is Status.INCONSISTENT
    assert status_of(A, matvec(A, vector(dtype=dtype)), "direct") is Status.BREAKDOWN  # solvable, but not by elimination


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
def test_bicgstab_breaks_down_on_a_skew_operator_and_says_so(dtype, batched):
    # r^H A r = 0 for every r, so that every restart breaks down as well
    A = torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]])] * 6).to(dtype)
    b = torch.eye(12, dtype=dtype)[0]
    b = b.expand(2, -1) if batched else b
    x, info = ns.solve_ex(operand(A, "bicgstab"), b, method="bicgstab", batch_dims=int(batched))
    assert (torch.as_tensor(info.status) == Status.BREAKDOWN).all()
    assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
def test_gmres_breaks_down_where_its_krylov_space_closes_without_the_solution(dtype, batched):
    # A nilpotent: A e_1 = 0, and the solution e_2 is outside the space that e_1 spans
    A = torch.diag(torch.ones(5), 1).to(dtype)
    b = torch.eye(6, dtype=dtype)[0]
    b = b.expand(2, -1) if batched else b
    x, info = ns.solve_ex(operand(A, "gmres"), b, method="gmres", batch_dims=int(batched))
    assert (torch.as_tensor(info.status) == Status.BREAKDOWN).all()
    assert torch.isfinite(x.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", KRYLOV)
def test_the_zero_operator_is_singular_for_every_method(method, dtype):
    x, info = ns.solve_ex(lambda v: 0 * v, vector(dtype=dtype), method=method)
    assert info.status is Status.INCONSISTENT
    assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["gmres", "bicgstab"])
def test_a_finite_system_is_never_called_nonfinite(method, dtype):
    for seed in range(20):
        A = torch.triu(torch.randn(9, 9, generator=generator(seed), dtype=wide(dtype)), 1).to(dtype)
        x, info = ns.solve_ex(operand(A, method), vector(9, dtype, seed), method=method)
        assert info.status is not Status.NONFINITE, seed  # though in single precision BiCGStab itself overflows
        assert not info.converged
        assert torch.isfinite(x.abs()).all()


@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
@pytest.mark.parametrize("method", KRYLOV)
def test_an_overflow_of_the_method_is_a_breakdown_and_one_of_the_operator_is_not(method, batched, monkeypatch):
    # a solution, and then the scalar of a step, that leave the range of the dtype though A does not
    kind = {"cg": ns.CG, "minres": ns.MINRES, "gmres": ns.GMRES, "bicgstab": ns.BiCGStab}[method]
    step, solution, count = kind.step, kind.solution, []

    def overflowing(self, state):
        state = step(self, state)
        count.append(1)
        if len(count) == 3:
            state.residual_norm = state.residual_norm * math.nan
        return state

    def outcome(operator) -> tuple[int, ...]:
        count.clear()
        x, info = ns.solve_ex(operator, b, method=method, grad="none", batch_dims=int(batched))
        assert torch.isfinite(x).all()
        return tuple({Status(code) for code in torch.as_tensor(info.status).reshape(-1).tolist()})

    A, b = hard(method)
    b = b.expand(2, -1) if batched else b
    with monkeypatch.context() as patch:
        patch.setattr(kind, "solution", lambda self, state: solution(self, state) * math.inf)
        assert outcome(operand(A, method)) == (Status.BREAKDOWN,)
        assert outcome(counting(A, 3, math.nan)) == (Status.NONFINITE,)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "step", overflowing)
        assert outcome(operand(A, method)) == (Status.CONVERGED,)  # a breakdown is answered by a restart
        assert outcome(counting(A, 3, math.nan)) == (Status.NONFINITE,)


def test_every_status_has_one_sentence_that_says_what_to_try():
    messages = [status.message for status in Status]
    assert len(set(messages)) == len(Status)
    for message in messages:
        assert re.fullmatch(r"[A-Z][^.]*\.", message.replace("...", "")), message


def test_the_error_repeats_the_message_of_its_status():
    A, b = hard("cg")
    with pytest.raises(ns.ConvergenceError) as caught:
        ns.solve(operand(A, "cg"), b, method="cg", maxiter=3)
    assert Status.MAXITER.message in str(caught.value)
    assert caught.value.info.message == Status.MAXITER.message


def test_a_batch_has_one_status_a_system():
    A = definite()
    bad = vector(seed=4)
    bad[0] = math.nan
    b = torch.stack([vector(), torch.zeros_like(bad), bad, 1e-20 * vector(seed=6)])
    x, info = ns.solve_ex(operand(A, "cg"), b, method="cg", batch_dims=1)
    assert info.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert info.iterations[1] == info.iterations[2] == 0
    for index in (0, 1, 3):
        solo, record = ns.solve_ex(operand(A, "cg"), b[index], method="cg")
        torch.testing.assert_close(x[index], solo, rtol=0, atol=1e-8 * solo.abs().max().item())
        assert abs(record.iterations - info.iterations[index]) <= 1  # rounding may cost one
    assert torch.isfinite(x).all()


# -- what is not linear --------------------------------------------------------------------------------------------

NONLINEAR = {
    "relu": lambda v: torch.relu(v) + 0.5 * v,
    "tanh": lambda v: 2 * v + 0.3 * torch.tanh(v),
    "square": lambda v: 2 * v + 1e-3 * v * v,
    "norm": lambda v: 2 * v + 0.1 * v / (1 + v.norm()),
}


@pytest.mark.parametrize("within", ["autograd", "torch.func"])
@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize("name", NONLINEAR)
def test_a_function_that_is_not_linear_has_no_gradient_though_it_may_have_a_solution(name, parameter, within):
    b = vector(12, torch.float64, 1)
    scale = torch.tensor(1.5, dtype=torch.float64)

    def loss(b, scale):
        factor = scale if parameter else 1.5
        return ns.solve(lambda v: factor * NONLINEAR[name](v), b, rtol=1e-6, on_failure="ignore").sum()

    def differentiate():
        if within == "torch.func":
            return torch.func.grad(loss, argnums=(0, 1))(b, scale)
        return loss(b.requires_grad_(), scale.requires_grad_()).backward()

    with pytest.raises(RuntimeError, match="A is not linear"):
        differentiate()


def test_a_status_is_printed_by_its_name():
    assert f"{Status.MAXITER}" == str(Status.MAXITER) == "MAXITER"
    assert f"{Status.MAXITER:>9}" == "  MAXITER"
    assert f"{Status.MAXITER:d}" == "2"


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", ["cg", "minres"])
def test_an_operator_that_is_not_hermitian_is_called_so_long_before_the_iteration_limit(method, batched):
    n = 5000
    d = torch.linspace(1, 100, n, dtype=torch.float64)
    skew = torch.tensor([0.0, 30.0], dtype=torch.float64)[:, None] if batched else 30.0
    b = vector(2 * n, torch.float64).reshape(2, n) if batched else vector(n, torch.float64)
    _, info = ns.solve_ex(lambda v: d * v + skew * (v - v.roll(1, -1)), b, method=method, batch_dims=int(batched))
    status = info.status.tolist() if batched else [Status.CONVERGED, info.status]
    assert status == [Status.CONVERGED, Status.NOT_HERMITIAN]
    assert torch.as_tensor(info.iterations).max() <= 2048


def test_slow_convergence_of_a_hermitian_operator_is_left_alone():
    d = torch.logspace(0, 5, 2000, dtype=torch.float64)
    calls = []
    _, info = ns.solve_ex(lambda v: calls.append(1) or d * v, torch.ones(2000, dtype=torch.float64), method="cg", grad="none")
    assert info.converged
    assert info.iterations > 512
    assert len(calls) == info.matvecs <= info.iterations + 10
