"""The methods are the textbook's: iterate for iterate SciPy's, with no more products and with the storage that they state."""

from __future__ import annotations

import math
import re
import weakref

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import nablasolve as ns
from nablasolve import Status
from nablasolve.methods.base import RUNNING, Correction
from nablasolve.vectors import HostSpace, TensorSpace

KRYLOV = ("cg", "minres", "gmres", "bicgstab")
HERMITIAN = ("cg", "minres")
RESTART = 3  # short, so that the five steps compared below run over a restart


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def matvec(A: Tensor, v: Tensor) -> Tensor:
    return (A @ v.unsqueeze(-1)).squeeze(-1)


def definite(n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    G = randn(n, n, dtype=dtype, seed=seed)
    return G @ G.mH / n + 0.1 * torch.eye(n, dtype=dtype)


def general(n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.eye(n, dtype=dtype) + 0.5 * randn(n, n, dtype=dtype, seed=seed) / n**0.5


def suitable(method: str, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    if method == "minres":  # indefinite
        G = randn(n, n, dtype=dtype, seed=seed)
        return G + G.mH
    return definite(n, dtype, seed) if method == "cg" else general(n, dtype, seed)


def with_eigenvalues(values: Tensor, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A Hermitian matrix."""
    Q, _ = torch.linalg.qr(randn(len(values), len(values), dtype=dtype, seed=seed))
    return Q * values.to(dtype) @ Q.mH


def relative_residual(A: Tensor, x: Tensor, b: Tensor) -> float:
    return (torch.linalg.vector_norm(b - A @ x) / torch.linalg.vector_norm(b)).item()


class Counted:
    """An operator that counts its products."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.count = A, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        return matvec(self.A, v) if self.A.layout == torch.strided else self.A @ v


# -- iterates ----------------------------------------------------------------------------------------------------------


def scipy_iterate(method: str, A: np.ndarray, b: np.ndarray, steps: int, M: np.ndarray | None) -> np.ndarray:
    """SciPy's iterate after exactly `steps` steps."""
    if method == "gmres":  # SciPy preconditions on the left and we on the right, where A M u = b and x = M u
        product = A if M is None else A @ M
        u, _ = scipy.sparse.linalg.gmres(
            product, b, rtol=0.0, restart=RESTART, maxiter=steps, callback=lambda _: None, callback_type="legacy"
        )
        return u if M is None else M @ u
    if method == "minres" and np.iscomplexobj(A):  # real equations of twice the size have the same iterates
        embed = lambda K: np.block([[K.real, -K.imag], [K.imag, K.real]])  # noqa: E731
        both = scipy_iterate(method, embed(A), np.concatenate([b.real, b.imag]), steps, None if M is None else embed(M))
        return both[: len(b)] + 1j * both[len(b) :]
    options = dict(rtol=1e-300) if method == "minres" else dict(rtol=0.0, atol=0.0)
    x, _ = getattr(scipy.sparse.linalg, method)(A, b, M=M, maxiter=steps, **options)
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("method", KRYLOV)
def test_iterates_are_those_of_scipy(method, dtype, preconditioned, steps):
    n = 20
    A, b = suitable(method, n, dtype), torch.stack([randn(n, dtype=dtype, seed=s) for s in (1, 2)])
    M = definite(n, dtype, seed=7) if preconditioned else None
    options = dict(method=ns.GMRES(restart=RESTART) if method == "gmres" else method, maxiter=steps, rtol=0.0)
    options["M"] = None if M is None else lambda r: matvec(M, r)
    batch, record = ns.solve_ex(lambda v: matvec(A, v), b, batch_dims=1, **options)
    assert record.iterations.tolist() == [steps, steps]
    for i in range(2):
        expected = torch.from_numpy(scipy_iterate(method, A.numpy(), b[i].numpy(), steps, None if M is None else M.numpy()))
        x, info = ns.solve_ex(lambda v: matvec(A, v), b[i], **options)
        assert info.iterations == steps
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(batch[i], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("method", KRYLOV)
def test_the_residual_norms_of_the_history_are_the_true_ones(method, preconditioned):
    # for GMRES over restarts, which must therefore begin from the true residual
    n = 30
    A, b = suitable(method, n), 5.0 * randn(n, seed=1)
    M = definite(n, seed=7) + torch.eye(n, dtype=torch.float64)
    options = dict(method=ns.GMRES(restart=4) if method == "gmres" else method, M=M if preconditioned else None, rtol=0.0)
    _, info = ns.solve_ex(lambda v: A @ v, b, maxiter=10, history=True, **options)
    assert info.history.shape == (11,)
    for k in range(11):
        x, _ = ns.solve_ex(lambda v: A @ v, b, maxiter=k, **options)
        assert info.history[k].item() == pytest.approx(torch.linalg.vector_norm(b - A @ x).item(), rel=1e-8), k


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True], ids=["without grad", "with grad"])
@pytest.mark.parametrize("method", KRYLOV)
def test_products_are_counted_and_none_is_wasted(method, requires_grad):
    A, b = suitable(method, 40), randn(40, seed=1).requires_grad_(requires_grad)
    operator = Counted(A)
    _, info = ns.solve_ex(operator, b, method=method)
    assert info.converged
    assert info.iterations > 10
    assert info.matvecs == operator.count
    assert info.rmatvecs == 0
    per_step = 2 if method == "bicgstab" else 1
    restarts = math.ceil(info.iterations / 20) if method == "gmres" else 1
    # beside the steps: one for each certificate, one to record what the operator depends on
    assert operator.count <= per_step * info.iterations + restarts + 1
    assert operator.count >= per_step * (info.iterations - 1)
    silent = Counted(A)
    with torch.no_grad():
        _, info = ns.solve_ex(silent, b, method=method)
    assert info.matvecs == silent.count == operator.count - 1  # nothing to record


def second_difference(n: int) -> Tensor:
    eye, off = torch.eye(n, dtype=torch.float64), torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    return 2 * eye - off - off.mT


def convection_diffusion(n: int, wind: float) -> Tensor:
    """Upwind convection and diffusion on an n x n grid, with the wind along both axes."""
    eye, off = torch.eye(n, dtype=torch.float64), torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
    line = second_difference(n) + wind * (eye - off)
    return torch.kron(line, eye) + torch.kron(eye, line)


def systems() -> dict[str, tuple[Tensor, Tensor]]:
    result = {f"random {seed}": (general(60, seed=seed), randn(60, seed=seed + 50)) for seed in range(4)}
    for wind in (0.0, 0.2, 2.0, 20.0):
        A = convection_diffusion(12, wind)
        result[f"convection {wind} random"] = (A, randn(len(A), seed=3))
        result[f"convection {wind} smooth"] = (A, torch.ones(len(A), dtype=torch.float64))
    stretched = torch.diag(torch.linspace(1, 50, 80, dtype=torch.float64)) + 0.2 * randn(80, 80, seed=9) / 80**0.5
    result["stretched"] = (stretched, randn(80, seed=4))
    return result


def scipy_products(method: str, A: Tensor, b: Tensor, rtol: float, restart: int) -> tuple[int, bool]:
    """The products that SciPy needs, and whether its solution meets the tolerance."""
    count = 0

    def apply(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return A.numpy() @ v

    n = len(b)
    operator = scipy.sparse.linalg.LinearOperator((n, n), matvec=apply, dtype=np.float64)
    options = dict(restart=restart, maxiter=40) if method == "gmres" else dict(maxiter=600)
    x, info = getattr(scipy.sparse.linalg, method)(operator, b.numpy(), rtol=rtol, **options)
    return count, info == 0 and relative_residual(A, torch.from_numpy(x), b) <= rtol


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize(("method", "restart"), [("gmres", 8), ("gmres", 20), ("bicgstab", 0)])
@pytest.mark.parametrize("name", systems())
def test_no_more_products_than_scipy_needs(name, method, restart, rtol):
    A, b = systems()[name]
    limit, converged = scipy_products(method, A, b, rtol, restart)
    if not converged:  # nothing to compare with
        assert method == "gmres" or rtol < 1e-8
        return
    option = ns.GMRES(restart=restart) if method == "gmres" else method
    for requires_grad in (False, True):
        operator = Counted(A)
        x, info = ns.solve_ex(operator, b.clone().requires_grad_(requires_grad), method=option, rtol=rtol, maxiter=2000)
        assert info.converged
        assert relative_residual(A, x.detach(), b) <= rtol * (1 + 1e-9)
        assert operator.count <= limit + 2, (operator.count, limit, requires_grad)


# -- CG ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
def test_cg_needs_as_many_steps_as_there_are_distinct_eigenvalues(dtype):
    values = torch.tensor([1.0, 2.0, 5.0, 9.0]).repeat(8)
    A, b = with_eigenvalues(values, dtype), randn(32, dtype=dtype, seed=1)
    _, info = ns.solve_ex(lambda v: A @ v, b, method="cg", rtol=1e-4)
    assert info.converged
    assert info.iterations == 4


@pytest.mark.parametrize("method", ["cg", "gmres", "bicgstab"])
def test_a_large_well_conditioned_single_precision_system_is_easy(method):
    diagonal = torch.linspace(1, 3, 50_000)
    b = torch.ones(50_000)
    for scale in (1.0, 0.01):
        x, info = ns.solve_ex(lambda v: diagonal * v, scale * b, method=method)
        assert info.converged
        assert info.iterations < 15
        torch.testing.assert_close(x, scale * b / diagonal, rtol=1e-4, atol=0)


# -- MINRES ------------------------------------------------------------------------------------------------------------

SPECTRA = {
    "indefinite": torch.cat([-torch.linspace(1, 3, 8), torch.linspace(0.5, 4, 12)]),
    "negative definite": -torch.linspace(0.5, 4, 20),
    "singular indefinite": torch.cat([torch.zeros(5), -torch.linspace(1, 3, 6), torch.linspace(0.5, 4, 9)]),
    "singular semidefinite": torch.cat([torch.zeros(3), torch.linspace(0.5, 4, 17)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
def test_minres_finds_the_minimum_norm_solution_of_every_consistent_hermitian_system(spectrum, dtype, batched):
    A = with_eigenvalues(SPECTRA[spectrum].double(), dtype)
    b = matvec(A, torch.stack([randn(20, dtype=dtype, seed=s) for s in (1, 2, 3)]))
    b = b if batched else b[0]
    x, info = ns.solve_ex(lambda v: matvec(A, v), b, method="minres", rtol=1e-10, batch_dims=int(batched))
    assert torch.as_tensor(info.converged).all()
    torch.testing.assert_close(x, matvec(torch.linalg.pinv(A, hermitian=True, rtol=1e-10), b), rtol=0, atol=1e-8)


def test_the_residual_of_minres_never_rises():
    A, b = suitable("minres", 40), randn(40, seed=1)
    _, info = ns.solve_ex(lambda v: A @ v, b, method="minres", history=True)
    assert info.converged
    assert (info.history.diff() <= 1e-12 * info.history[0]).all()


# -- GMRES -------------------------------------------------------------------------------------------------------------


def gmres_without_a_second_projection(A: Tensor, b: Tensor, steps: int) -> Tensor:
    """Classical Gram-Schmidt, once: the textbook's warning."""
    V, H = [b / torch.linalg.vector_norm(b)], torch.zeros(steps + 1, steps, dtype=b.dtype)
    for j in range(steps):
        w = A @ V[-1]
        h = torch.stack(V) @ w
        w = w - h @ torch.stack(V)
        H[: j + 1, j], H[j + 1, j] = h, torch.linalg.vector_norm(w)
        V.append(w / H[j + 1, j])
    e = torch.zeros(steps + 1, dtype=b.dtype)
    e[0] = torch.linalg.vector_norm(b)
    y = torch.linalg.lstsq(H, e[:, None], driver="gelsd").solution[:, 0]
    return y @ torch.stack(V[:-1])


@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
def test_gmres_projects_twice_and_converges_at_a_condition_number_of_1e10(batched):
    n = 60
    Q, P = (torch.linalg.qr(randn(n, n, seed=s))[0] for s in (0, 1))
    A = Q * torch.logspace(0, -10, n, dtype=torch.float64) @ P.mH
    b = A @ randn(n, seed=2)
    rtol = 1e-10
    assert relative_residual(A, gmres_without_a_second_projection(A, b, n), b) > 10 * rtol
    right = b.expand(2, n) if batched else b
    x, info = ns.solve_ex(
        lambda v: matvec(A, v), right, method=ns.GMRES(restart=n), rtol=rtol, maxiter=n, batch_dims=int(batched)
    )
    assert torch.as_tensor(info.converged).all()
    assert relative_residual(A, x[0] if batched else x, b) <= rtol


@pytest.mark.parametrize("restart", [10, 50])
def test_gmres_stops_inside_a_cycle(restart):
    values = torch.tensor([1.0, 3.0, 4.0, 7.0], dtype=torch.float64).repeat(20)
    S = torch.eye(80, dtype=torch.float64) + 0.3 * randn(80, 80) / 80**0.5
    A = S * values @ torch.linalg.inv(S)  # diagonalisable, with four distinct eigenvalues
    operator = Counted(A)
    _, info = ns.solve_ex(operator, randn(80, seed=1), method=ns.GMRES(restart=restart))
    assert info.converged
    assert info.iterations == 4
    assert operator.count <= 6


@pytest.mark.parametrize("method", KRYLOV)
def test_wrong_products_at_the_beginning_are_made_good_by_the_true_residual(method):
    n, calls = 30, []
    A, b = suitable(method, n), randn(n, seed=1)
    E = suitable(method, n, seed=8)

    def apply(v: Tensor) -> Tensor:
        calls.append(1)
        return A @ v + (1e-4 * (E @ v) if len(calls) <= 8 else 0)

    option = ns.GMRES(restart=10) if method == "gmres" else method
    x, info = ns.solve_ex(apply, b, method=option, grad="none")
    assert info.converged
    assert relative_residual(A, x, b) <= 1e-8


def test_gmres_counts_inner_steps_in_iterations_and_in_maxiter():
    A, b = convection_diffusion(8, 1.0), torch.ones(64, dtype=torch.float64)
    for maxiter in (3, 5, 8, 11):
        _, info = ns.solve_ex(lambda v: A @ v, b, method=ns.GMRES(restart=4), maxiter=maxiter, rtol=1e-12)
        assert info.status is Status.MAXITER
        assert info.iterations == maxiter


def test_a_restart_longer_than_the_system_is_full_gmres():
    A, b = general(7), randn(7, seed=1)
    x, info = ns.solve_ex(lambda v: A @ v, b, method=ns.GMRES(restart=1000), rtol=1e-12)
    assert info.converged
    assert info.iterations <= 7
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("restart", [0, -1, 2.0, True, "3", None])
def test_a_restart_that_is_no_positive_integer_is_refused(restart):
    with pytest.raises(ValueError, match="restart"):
        ns.GMRES(restart=restart)


# -- BiCGStab ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
def test_bicgstab_solves_fifty_random_single_precision_systems(n, batched):
    A = torch.eye(n) + 0.3 * torch.randn(50, n, n, generator=generator(0)) / n**0.5
    b = torch.randn(50, n, generator=generator(1))
    if batched:
        _, info = ns.solve_ex(lambda v: matvec(A, v), b, method="bicgstab", batch_dims=1)
        assert info.converged.all()
    else:
        for matrix, right in zip(A, b, strict=True):
            _, info = ns.solve_ex(lambda v, matrix=matrix: matrix @ v, right, method="bicgstab")
            assert info.converged


BREAKDOWN = [[-2, -1, 0], [0, 0, -2], [-2, -2, -2]]


def test_bicgstab_restarts_where_scipy_breaks_down():
    # small integers, so that the shadow is exactly orthogonal to the residual after one step
    A = torch.tensor(BREAKDOWN, dtype=torch.float64)
    b = torch.eye(len(A), dtype=torch.float64)[0]
    _, code = scipy.sparse.linalg.bicgstab(A.numpy(), b.numpy(), rtol=1e-10)
    assert code == -10  # rho = 0
    x, info = ns.solve_ex(lambda v: A @ v, b, method="bicgstab", rtol=1e-10)
    assert info.converged
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-8)


# -- preconditioners ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("method", KRYLOV)
def test_a_good_preconditioner_saves_iterations(method, dtype):
    n = 100
    diagonal = torch.logspace(0, 3, n, dtype=torch.float64)
    A = (torch.diag(diagonal).to(dtype) + 0.3 * suitable("cg", n, dtype)).contiguous()
    if method in ("gmres", "bicgstab"):
        A = A + 0.1 * torch.triu(randn(n, n, dtype=dtype, seed=5), 1) / n**0.5
    b = randn(n, dtype=dtype, seed=1)
    inverse = 1 / A.diagonal().real
    _, plain = ns.solve_ex(lambda v: A @ v, b, method=method, rtol=1e-4)
    x, info = ns.solve_ex(lambda v: A @ v, b, method=method, rtol=1e-4, M=lambda r: inverse * r)
    assert info.converged
    assert relative_residual(A, x, b) <= 1.01e-4
    assert info.iterations < plain.iterations / 2


@pytest.mark.parametrize("method", KRYLOV)
def test_the_exact_inverse_as_preconditioner_needs_one_or_two_steps(method):
    A, b = definite(25), randn(25, seed=1)
    inverse = torch.linalg.inv(A)
    inverse = (inverse + inverse.mT) / 2
    x, info = ns.solve_ex(lambda v: A @ v, b, method=method, M=inverse)
    assert info.converged
    assert info.iterations <= 2
    torch.testing.assert_close(x, inverse @ b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", KRYLOV)
def test_one_application_of_the_preconditioner_a_product(method):
    A, b = definite(40), randn(40, seed=1)
    operator, M = Counted(A), Counted(torch.diag(1 / A.diagonal()))
    _, info = ns.solve_ex(operator, b, method=method, M=M)
    assert info.converged
    assert abs(M.count - operator.count) <= 3


def nonsymmetric_preconditioning() -> tuple[Tensor, Tensor, Tensor]:
    """A, a preconditioner whose adjoint is far from itself, and b."""
    n = 40
    A = torch.eye(n, dtype=torch.float64) + torch.triu(randn(n, n, seed=3), 1) / 4
    A = A * torch.logspace(0, 2, n, dtype=torch.float64)[:, None]
    M = torch.linalg.inv(A + 0.02 * randn(n, n, seed=4))
    return A, M, randn(n, seed=1)


@pytest.mark.parametrize("method", ["gmres", "bicgstab"])
@pytest.mark.parametrize("form", ["function", "matrix", "operator with its adjoint"])
def test_the_adjoint_solve_uses_the_adjoint_of_the_preconditioner(method, form):
    A, M, b = nonsymmetric_preconditioning()
    weights = randn(len(b), seed=2)
    _, reference = ns.solve_ex(lambda v: A.mT @ v, weights, method=method, M=lambda r: M.mT @ r)
    assert reference.converged
    _, wrong = ns.solve_ex(lambda v: A.mT @ v, weights, method=method, M=lambda r: M @ r)
    assert not wrong.converged or wrong.iterations > 3 * reference.iterations  # so that the test can tell them apart

    forward, adjoint = Counted(M), Counted(M.mT)
    given = {"function": forward, "matrix": M, "operator with its adjoint": ns.LinearOperator(forward, adjoint=adjoint)}[form]
    b.requires_grad_()
    x, info = ns.solve_ex(lambda v: A @ v, b, method=method, M=given)
    assert info.converged
    before = forward.count
    (grad,) = torch.autograd.grad(x @ weights, b)
    assert info.adjoint.converged
    assert abs(info.adjoint.iterations - reference.iterations) <= 1
    torch.testing.assert_close(grad, torch.linalg.solve(A.mT, weights), rtol=1e-5, atol=1e-7)
    if form == "operator with its adjoint":
        assert forward.count == before
        assert adjoint.count >= info.adjoint.iterations
    elif form == "function":  # derived from one application by autograd
        assert forward.count - before <= 1


@pytest.mark.parametrize("method", ["gmres", "bicgstab"])
def test_the_adjoint_may_have_a_preconditioner_of_its_own(method):
    A, M, b = nonsymmetric_preconditioning()
    given = Counted(M.mT)
    b.requires_grad_()
    x, info = ns.solve_ex(lambda v: A @ v, b, method="gmres", adjoint=dict(M=given, method=method), rtol=1e-9, maxiter=2000)
    assert info.converged
    assert given.count == 0
    x.sum().backward()
    assert info.adjoint.converged
    assert info.adjoint.method == method
    assert given.count >= info.adjoint.iterations
    assert info.adjoint.iterations < info.iterations / 2


# -- direct ------------------------------------------------------------------------------------------------------------


class Called(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        return sum(part in name for name in self.names)


@pytest.mark.parametrize("claimed", [False, True], ids=["general", "positive definite"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_the_direct_method_factorises_once_for_both_passes_and_the_second_order(claimed, dtype):
    matrix = definite(8, dtype).requires_grad_()
    b = randn(8, dtype=dtype, seed=1).requires_grad_()
    A = ns.aslinearoperator(matrix, positive_definite=True) if claimed else matrix
    with Called() as called:
        x, info = ns.solve_ex(A, b)
        grad_b, grad_A = torch.autograd.grad((x * x.conj()).real.sum(), (b, matrix), create_graph=True)
        torch.autograd.grad((grad_b.abs() ** 2).sum() + (grad_A.abs() ** 2).sum(), (b, matrix))
    assert info.method == "direct"
    assert called.count("cholesky_ex") == int(claimed)
    assert called.count("lu_factor") == int(not claimed)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-9)


def test_the_direct_method_refines_where_pivoting_loses_digits():
    # the matrix of maximal growth: elimination with partial pivoting loses a factor of 2^(n-1)
    n = 40
    A = torch.eye(n, dtype=torch.float64) - torch.tril(torch.ones(n, n, dtype=torch.float64), -1)
    A[:, -1] = 1
    b = randn(n, seed=1)
    plain = torch.linalg.lu_solve(*torch.linalg.lu_factor(A), b[:, None])[:, 0]
    assert relative_residual(A, plain, b) > 1e-8
    x, info = ns.solve_ex(A, b, rtol=1e-12)
    assert info.converged
    assert info.iterations > 1
    assert relative_residual(A, x, b) <= 1e-12


def test_the_direct_method_reaches_the_default_tolerance_in_one_step():
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        _, info = ns.solve_ex(general(30, dtype), randn(30, dtype=dtype, seed=1))
        assert info.converged
        assert info.iterations == 1


# -- storage -----------------------------------------------------------------------------------------------------------


class LiveVectors(TorchDispatchMode):
    """How many vectors' worth of storage is alive after each operation, of what was allocated inside."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.unit = vector.numel() * vector.element_size()
        self.alive: dict[int, float] = {}
        self.now = 0.0
        self.counts: list[float] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if storage.nbytes() >= self.unit and key not in given and key not in self.alive:
                    self.alive[key] = storage.nbytes() / self.unit
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.now = sum(self.alive.values())
        self.counts.append(self.now)
        return result


METHOD_CLASSES = {"cg": ns.CG(), "minres": ns.MINRES(), "gmres": ns.GMRES(restart=10), "bicgstab": ns.BiCGStab()}


def stated_storage(method, preconditioned: bool) -> int:
    """The number of vectors that the docstring of a method states, with those that `A` and `M` return."""
    text = " ".join(type(method).__doc__.split())
    plain = re.search(r"Storage: (?:(\d+)|`restart \+ (\d+)`) vectors", text)
    assert plain, "the docstring states no storage"
    number = int(plain[1]) if plain[1] else method.restart + int(plain[2])
    more = re.search(r"(one|two|three) more with a preconditioner", text)
    number += {"one": 1, "two": 2, "three": 3}[more[1]] if more and preconditioned else 0
    return number if "return included" in text else number + 1 + int(preconditioned)


def measured_storage(
    method, preconditioned: bool, requires_grad: bool, rtol: float, n: int, maxiter: int | None = None, spread: float = 30
):
    """The peak inside the first cycle, the peak of the whole solve, what is left of it, and the record."""
    diagonal = torch.linspace(1, spread, n, dtype=torch.float64)
    b = torch.ones(n, dtype=torch.float64, requires_grad=requires_grad)
    marks = []
    with LiveVectors(b) as live:

        def apply(v: Tensor) -> Tensor:
            marks.append(len(live.counts))
            return diagonal * v

        M = (lambda r: 0.9 * r) if preconditioned else None
        x, info = ns.solve_ex(apply, b, method=method, rtol=rtol, M=M, maxiter=maxiter)
    inside = max(live.counts[marks[2] : marks[8]])
    return inside, max(live.counts), sum(live.alive.values()), info, x


@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["without grad", "with grad"])
@pytest.mark.parametrize("name", METHOD_CLASSES)
def test_storage_is_what_the_docstring_states(name, requires_grad, preconditioned):
    method = METHOD_CLASSES[name]
    stated = stated_storage(method, preconditioned)
    whole = set()
    for rtol, n in ((1e-6, 4000), (1e-9, 4000), (1e-6, 9000)):
        inside, peak, left, info, _ = measured_storage(method, preconditioned, requires_grad, rtol, n)
        assert info.converged
        assert inside == stated
        assert left == 1, "only the solution stays"
        # beside what the method holds there are at the end the solution and the residual that certifies it, and in a
        # restarted cycle the two from which it started
        assert peak <= stated + 2 + (name == "gmres") * (1 + int(preconditioned))
        whole.add(peak)
    assert len(whole) == 1


@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("name", METHOD_CLASSES)
def test_storage_does_not_grow_with_the_iterations_of_a_solve_that_fails(name, preconditioned):
    peaks = set()
    for maxiter in (25, 50, 100):
        _, peak, left, info, x = measured_storage(METHOD_CLASSES[name], preconditioned, False, 1e-9, 4000, maxiter, 3000.0)
        assert info.status is Status.MAXITER
        assert left == 1
        assert torch.isfinite(x).all()
        peaks.add(peak)
    assert len(peaks) == 1


# -- frozen systems ----------------------------------------------------------------------------------------------------


def correction(space, A: Tensor, rhs: Tensor, M: Tensor | None, target) -> Correction:
    return Correction(
        space=space, apply=lambda v: matvec(A, v), preconditioner=None if M is None else lambda r: matvec(M, r),
        rhs=rhs, target=target, steps=100, matrix=A.reshape((1,) * (rhs.ndim - 1) + A.shape),
    )  # fmt: skip


FROZEN = {**METHOD_CLASSES, "direct": ns.Direct()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize(
    ("name", "preconditioned"), [*((name, True) for name in METHOD_CLASSES), *((name, False) for name in FROZEN)]
)
def test_a_stopped_system_is_frozen_while_the_others_go_on(name, dtype, preconditioned):
    method, n = FROZEN[name], 12
    A = suitable(name, n, dtype)
    M = definite(n, dtype, seed=7) if preconditioned else None
    rhs = torch.stack([randn(n, dtype=dtype, seed=s) for s in (1, 2, 3)])
    rhs = rhs / torch.linalg.vector_norm(rhs, dim=-1, keepdim=True)
    target = torch.zeros(3, dtype=rhs.real.dtype)
    state = method.init(correction(TensorSpace(1), A, rhs.clone(), M, target))
    steps = 0 if name == "direct" else 3
    for _ in range(steps):
        state = method.step(state)
    before, norms = method.solution(state).clone(), state.residual_norm.clone()
    stopped = torch.tensor([False, True, False])
    state.stop(Status.STOPPED, stopped)
    for _ in range(1 if name == "direct" else 3):
        state = method.step(state)
    after = method.solution(state)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=tolerance)
    assert state.residual_norm[1] == norms[1] or name == "direct"
    assert state.status[1] == Status.STOPPED
    # the others are where they would be alone
    for index in (0, 2):
        alone = method.init(correction(HostSpace(rhs), A, rhs[index].clone(), M, 0.0))
        for _ in range(steps + (1 if name == "direct" else 3)):
            alone = method.step(alone)
        torch.testing.assert_close(after[index], method.solution(alone), rtol=0, atol=100 * tolerance)
        assert not torch.allclose(after[index], before[index], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", METHOD_CLASSES)
def test_a_zero_system_of_a_batch_never_runs(name):
    method, A = METHOD_CLASSES[name], suitable(name, 8)
    rhs = torch.stack([torch.zeros(8, dtype=torch.float64), randn(8, seed=1)])
    state = method.init(correction(TensorSpace(1), A, rhs.clone(), None, torch.zeros(2, dtype=torch.float64)))
    assert (state.status != RUNNING).tolist() == [True, False]
    for _ in range(3):
        state = method.step(state)
    assert torch.equal(method.solution(state)[0], torch.zeros(8, dtype=torch.float64))
    assert torch.isfinite(method.solution(state)).all()
