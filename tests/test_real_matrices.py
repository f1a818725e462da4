"""Matrices of other people's problems: whatever the outcome it is honest, and where SciPy converges, so do we."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import scipy.sparse.linalg
import torch
from counts import DRAWS, hold
from torch import Tensor

import nablasolve as ns
from nablasolve import Status

FOLDER = Path(__file__).parents[2] / "shared" / "matrices"
if not (FOLDER / "index.json").exists():
    pytest.skip("the folder of real matrices is not here", allow_module_level=True)

INDEX = {entry["name"]: entry for entry in json.loads((FOLDER / "index.json").read_text()) if entry["m"] == entry["n"]}
HERMITIAN = ("cg", "minres")
METHODS = {"spd": HERMITIAN, "sym": HERMITIAN, "symindef": ("minres",), "symindef(saddle)": ("minres",)}
RTOL = 1e-6
MAXITER = 200
RESTART = 20
MORE = 2  # the certificate, and the run that finds what A depends on
DENSE_LIMIT = 1300  # the largest order that the direct method is tried on


@functools.cache
def load(name: str) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """The matrix and a right-hand side: the one that came with it, or one that has a random solution."""
    A = scipy.sparse.csr_array(scipy.io.mmread(FOLDER / f"{name}.mtx.gz"))
    A = A.astype(np.complex128 if np.iscomplexobj(A) else np.float64)
    if INDEX[name]["has_b"]:
        b = scipy.io.mmread(FOLDER / f"{name}_b.mtx.gz")
        return A, np.asarray(b.todense() if scipy.sparse.issparse(b) else b).reshape(-1).astype(A.dtype)
    random = np.random.default_rng(0)
    x = random.standard_normal(A.shape[0]) + (1j * random.standard_normal(A.shape[0]) if A.dtype == np.complex128 else 0)
    return A, A @ x


def tensor(A: scipy.sparse.csr_array) -> Tensor:
    indices = (torch.from_numpy(part.astype(np.int64)) for part in (A.indptr, A.indices))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse layout a beta feature
        return torch.sparse_csr_tensor(*indices, torch.from_numpy(A.data), A.shape)


@functools.cache
def tensors(name: str) -> tuple[Tensor, Tensor]:
    """The matrix as a sparse Tensor, and the right-hand side."""
    A, b = load(name)
    return tensor(A), torch.from_numpy(b)


def jacobi(A: scipy.sparse.csr_array, hermitian: bool) -> np.ndarray:
    """The inverse of the diagonal, positive where a Hermitian method needs it, one where the diagonal is zero."""
    diagonal = A.diagonal()
    diagonal = np.abs(diagonal) if hermitian else diagonal
    return np.divide(1, diagonal, out=np.ones_like(diagonal), where=diagonal != 0)


def relative_residual(A: scipy.sparse.csr_array, x: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(b - A @ x) / np.linalg.norm(b))


def scipy_solution(method: str, A, b: np.ndarray, scaling: np.ndarray | None) -> float:
    """The products that SciPy spends: infinitely many where the true relative residual stays above the tolerance."""
    if method == "minres" and np.iscomplexobj(A):  # the real equations of twice the size have the same iterates
        A = scipy.sparse.csr_array(scipy.sparse.block_array([[A.real, -A.imag], [A.imag, A.real]]))
        b, scaling = np.concatenate([b.real, b.imag]), None if scaling is None else np.concatenate([scaling.real] * 2)
    count, n = 0, len(b)

    def product(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return A @ v

    def operator(function) -> scipy.sparse.linalg.LinearOperator:
        return scipy.sparse.linalg.LinearOperator((n, n), matvec=function, dtype=A.dtype)

    def spent(x: np.ndarray) -> float:
        return count if relative_residual(A, x, b) <= RTOL else np.inf

    M = None if scaling is None else operator(lambda r: scaling * r)
    if method == "gmres":  # preconditioned on the right, as ours is
        right = product if scaling is None else (lambda v: product(scaling * v))
        u, _ = scipy.sparse.linalg.gmres(operator(right), b, rtol=RTOL, restart=RESTART, maxiter=MAXITER // RESTART)
        return spent(u if scaling is None else scaling * u)
    if method == "minres":  # its own test is another one, so that we watch the residual

        class Reached(Exception):
            pass

        def watch(x: np.ndarray) -> None:
            if relative_residual(A, x, b) <= RTOL:
                raise Reached

        try:
            scipy.sparse.linalg.minres(operator(product), b, rtol=1e-300, maxiter=MAXITER, M=M, callback=watch)
        except Reached:
            return count
        return np.inf
    x, _ = getattr(scipy.sparse.linalg, method)(operator(product), b, rtol=RTOL, maxiter=MAXITER, M=M)
    return spent(x)


def check_record(A, x: Tensor, b: np.ndarray, info: ns.SolveInfo, rtol: float) -> None:
    """The record says what is recomputed here."""
    assert torch.isfinite(x.abs()).all()
    true = relative_residual(A, x.numpy(), b)
    rounding = 1e-15 * scipy.sparse.linalg.norm(A, 1) * np.linalg.norm(x.numpy()) / np.linalg.norm(b)
    assert abs(info.relative_residual - true) <= rounding + 1e-6 * true
    assert info.converged == (info.status is Status.CONVERGED)
    assert info.converged == (info.relative_residual <= rtol)
    if info.converged:
        assert true <= rtol + rounding


CASES = [
    (name, method, scaled)
    for name, entry in INDEX.items()
    for method in METHODS.get(entry["klass"], ("gmres", "bicgstab"))
    for scaled in (False, True)
]


def check_solution(method: str, A, b: np.ndarray, scaling: np.ndarray | None) -> float:
    """Solve, check the record, and return the products that were spent: infinitely many where the solve failed."""
    S, diagonal = tensor(A), None if scaling is None else torch.from_numpy(scaling)
    count = 0

    def apply(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return S @ v

    option = ns.GMRES(restart=RESTART) if method == "gmres" else method
    M = None if diagonal is None else lambda r: diagonal * r
    x, info = ns.solve_ex(apply, torch.from_numpy(b), method=option, rtol=RTOL, maxiter=MAXITER, M=M)
    check_record(A, x, b, info, RTOL)
    assert info.matvecs == count
    return count if info.converged else np.inf


@pytest.mark.parametrize(("name", "method", "scaled"), CASES, ids=lambda part: {True: "jacobi", False: "plain"}.get(part, part))
def test_the_outcome_is_honest_and_no_worse_than_that_of_scipy(name, method, scaled):
    A, b = load(name)
    scaling = jacobi(A, method in HERMITIAN) if scaled else None
    ours, theirs = [check_solution(method, A, b, scaling)], [scipy_solution(method, A, b, scaling)]
    if ours[0] > theirs[0] + MORE:  # by rounding? For the equations in another order the iterates differ by nothing else
        for seed in range(1, DRAWS):
            order = np.random.default_rng(seed).permutation(len(b))
            system = A[order][:, order], b[order], None if scaling is None else scaling[order]
            ours.append(check_solution(method, *system))
            theirs.append(scipy_solution(method, *system))
        if np.isfinite(theirs).all():
            hold(ours, theirs, MORE)


@pytest.mark.parametrize("name", [name for name, entry in INDEX.items() if entry["n"] <= DENSE_LIMIT])
def test_the_direct_method_is_honest_and_solves_what_is_well_conditioned(name):
    A, b = load(name)
    matrix = torch.from_numpy(A.toarray())
    definite = INDEX[name]["klass"] == "spd" and INDEX[name]["sym"] != "general"
    x, info = ns.solve_ex(ns.aslinearoperator(matrix, positive_definite=definite), torch.from_numpy(b), rtol=1e-8)
    assert info.method == "direct"
    check_record(A, x, b, info, 1e-8)
    if INDEX[name]["cond"] < 1e10:
        assert info.converged


# -- gradients ---------------------------------------------------------------------------------------------------------

GRADIENT_CASES = [
    ("Trefethen_500", "cg"), ("bcsstk01", "cg"), ("bcsstk02", "minres"), ("pyamg_airfoil", "minres"),
    ("pyamg_local_disc_galerkin_diffusion", "cg"), ("sherman1", "minres"), ("add32", "gmres"), ("steam2", "gmres"),
    ("pde225", "bicgstab"), ("pde900", "gmres"), ("arc130", "gmres"), ("sherman4", "bicgstab"), ("orsreg_1", "bicgstab"),
    ("qc324", "gmres"), ("kkt_AUG3DC", "minres"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "method"), GRADIENT_CASES)
def test_the_two_modes_satisfy_the_adjoint_identity(name, method):
    """`<x̄, dx> = <b̄, db> + <θ̄, dθ>`, but for the residuals of the two solves that the derivatives need."""
    rtol = 1e-9
    A, _ = load(name)
    S, b = tensors(name)
    sparse = ns.aslinearoperator(S.to_sparse_coo() if S.is_complex() else S)  # torch differentiates no complex CSR
    n, hermitian = len(b), method in HERMITIAN
    diagonal = torch.from_numpy(jacobi(A, hermitian))
    option = ns.GMRES(restart=min(n, 400)) if method == "gmres" else method

    def apply(theta: Tensor, v: Tensor) -> Tensor:
        return theta * sparse(theta * v) if hermitian else sparse(theta * v)

    def solve(theta: Tensor, b: Tensor) -> Tensor:
        M = lambda r: diagonal * r  # noqa: E731
        return ns.solve(lambda v: apply(theta, v), b, method=option, rtol=rtol, M=M, maxiter=3000, on_failure="raise")

    generator = torch.Generator().manual_seed(0)
    theta = 1 + 0.1 * torch.rand(n, generator=generator, dtype=torch.float64)
    d_theta, d_b = torch.randn(n, generator=generator, dtype=torch.float64), torch.randn(n, generator=generator, dtype=b.dtype)
    theta, d_theta = theta.to(b.dtype), d_theta.to(b.dtype)
    x, dx = torch.func.jvp(solve, (theta, b), (d_theta, d_b))
    theta.requires_grad_()
    right = b.clone().requires_grad_()
    theta_bar, b_bar = torch.autograd.grad(solve(theta, right), (theta, right), dx)

    theta = theta.detach()
    change = d_theta * sparse(theta * x) + theta * sparse(d_theta * x) if hermitian else sparse(d_theta * x)
    forward = torch.vdot(dx, dx).real
    reverse = torch.vdot(b_bar, d_b).real + torch.vdot(theta_bar, d_theta).real
    norm = torch.linalg.vector_norm
    # x̄^H dx = λ^H (A dx) + s^H dx, with the residuals |db - dA x - A dx| and |s| within the tolerance
    allowed = rtol * (norm(b_bar) * norm(d_b - change) + norm(dx) ** 2)
    assert (forward - reverse).abs() <= 1.01 * allowed
    assert allowed <= 1e-3 * forward, "the bound says nothing"
