"""Least squares with matrices of other people's problems: no worse than SciPy after as many steps, and honest about the end."""

from __future__ import annotations

import bisect
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

INDEX = {entry["name"]: entry for entry in json.loads((FOLDER / "index.json").read_text())}
RECTANGULAR = [name for name, entry in INDEX.items() if entry["m"] != entry["n"]]
CLASSES = ("spd", "sym", "symindef", "symindef(saddle)")
HERMITIAN = [name for name, entry in INDEX.items() if entry["klass"] in CLASSES and entry["n"] <= 1000]
TOLERANCE = 1e-8  # SciPy's atol and btol, and our default
LIMIT = 20  # the most steps, in multiples of the longer side
ROUNDING = 1e-6  # of a residual norm at its minimum
DENSE_LIMIT = 500  # the largest rank that the singular value decomposition is tried on


@functools.cache
def load(name: str) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """The matrix and a right-hand side: the one that came with it, or a random one, in the range of a wide matrix."""
    A = scipy.sparse.csr_array(scipy.io.mmread(FOLDER / f"{name}.mtx.gz"))
    A = A.astype(np.complex128 if np.iscomplexobj(A) else np.float64)
    if INDEX[name]["has_b"]:
        b = scipy.io.mmread(FOLDER / f"{name}_b.mtx.gz")
        return A, np.asarray(b.todense() if scipy.sparse.issparse(b) else b).reshape(-1).astype(A.dtype)
    random = np.random.default_rng(0)
    if A.shape[0] > A.shape[1]:
        return A, random.standard_normal(A.shape[0]).astype(A.dtype)
    return A, A @ random.standard_normal(A.shape[1]).astype(A.dtype)


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


@functools.cache
def shortest_minimiser(name: str) -> np.ndarray:
    A, b = load(name)
    x: np.ndarray = np.linalg.lstsq(A.toarray(), b, rcond=1e-10)[0]
    return x


def norms(A: scipy.sparse.csr_array, x: np.ndarray, b: np.ndarray, damp: float = 0.0) -> tuple[float, float]:
    """`|r|` and `|A^H r|`, with the damping."""
    r = b - A @ x
    size = float(np.hypot(np.linalg.norm(r), damp * np.linalg.norm(x)))
    return size, float(np.linalg.norm(A.conj().T @ r - damp**2 * x))


def check_record(name: str, x: Tensor, info: ns.SolveInfo, rtol: float) -> None:
    """The record says what is recomputed here, and what is called solved meets one of the two tests."""
    A, b = load(name)
    assert torch.isfinite(x).all()
    r, Ar = norms(A, x.numpy(), b)
    frobenius = scipy.sparse.linalg.norm(A)
    rounding = 1e-15 * (frobenius * np.linalg.norm(x.numpy()) + np.linalg.norm(b))
    assert info.norm_r == pytest.approx(r, rel=1e-6, abs=rounding)
    assert info.norm_Ar == pytest.approx(Ar, rel=1e-6, abs=10 * frobenius * rounding)
    assert info.norm_x == pytest.approx(np.linalg.norm(x.numpy()))
    assert info.converged == (info.status in (Status.CONVERGED, Status.LEAST_SQUARES))
    if info.status is Status.CONVERGED:
        assert r <= rtol * np.linalg.norm(b) + rounding
    if info.status is Status.LEAST_SQUARES:
        assert Ar <= rtol * info.norm_A * r + 10 * frobenius * rounding


def scipy_solution(method: str, A: scipy.sparse.csr_array, b: np.ndarray, damp: float) -> tuple[int, float, float]:
    """SciPy's steps, and its `|r|` and `|A^H r|`; of LSQR also for CGLS, which has the same iterates."""
    solve, limit = (scipy.sparse.linalg.lsmr, "maxiter") if method == "lsmr" else (scipy.sparse.linalg.lsqr, "iter_lim")
    options = {"damp": damp, "atol": TOLERANCE, "btol": TOLERANCE, "conlim": 0.0, limit: LIMIT * max(A.shape)}
    x, _, steps, *_ = solve(A, b, **options)
    return steps, *norms(A, x, b, damp)


def hold_the_steps(method: str, A: scipy.sparse.csr_array, b: np.ndarray, damp: float) -> None:
    """Compare SciPy's steps with those after which we are as near, with rows and columns in several orders.

    Long recurrences amplify rounding, and the iterates for the same problem in another order differ by nothing else. Both norms
    fall in every step of LSMR; in LSQR and CGLS `|r|` does.
    """
    ours, theirs = np.empty(DRAWS), np.empty(DRAWS)
    for seed in range(DRAWS):
        rows, columns = (np.random.default_rng(seed).permutation(n) for n in A.shape)
        system = A[rows][:, columns], b[rows]
        steps, *reached = scipy_solution(method, *system, damp)
        S, right = tensor(system[0]), torch.from_numpy(system[1])

        def as_near(steps: int, system=system, S=S, right=right, reached=reached) -> bool:
            x, _ = ns.lstsq_ex(S, right, damp=damp, method=method, rtol=TOLERANCE, maxiter=steps)
            sizes = norms(system[0], x.numpy(), system[1], damp)
            kinds = 2 if method == "lsmr" else 1
            return all(mine <= its * (1 + ROUNDING) for mine, its in zip(sizes[:kinds], reached[:kinds], strict=True))

        theirs[seed] = steps
        needed = bisect.bisect_left(range(1, 2 * steps), True, key=as_near) + 1
        ours[seed] = needed if needed < 2 * steps else np.inf
    hold(ours, theirs, 5)


@pytest.mark.parametrize("damp", [0.0, 0.1])
@pytest.mark.parametrize("method", ["lsmr", "lsqr", "cgls"])
@pytest.mark.parametrize("name", RECTANGULAR)
def test_the_residuals_are_those_of_scipy_or_better(name, method, damp):
    A, b = load(name)
    S, right = tensors(name)
    steps, r_scipy, Ar_scipy = scipy_solution(method, A, b, damp)
    x, info = ns.lstsq_ex(S, right, damp=damp, method=method, rtol=TOLERANCE, maxiter=steps + 5)
    assert info.iterations <= steps + 5
    r, Ar = norms(A, x.numpy(), b, damp)
    if info.status is Status.CONVERGED:  # where both are at the tolerance, rounding decides
        assert r <= TOLERANCE * np.linalg.norm(b) * (1 + ROUNDING)
        return
    if info.status is Status.LEAST_SQUARES:
        assert r <= r_scipy * (1 + ROUNDING)
        assert Ar <= TOLERANCE * info.norm_A * r * (1 + ROUNDING)
    elif r > r_scipy * (1 + ROUNDING) or (method == "lsmr" and Ar > Ar_scipy):
        hold_the_steps(method, A, b, damp)


@pytest.mark.parametrize("method", [None, "lsqr", "cgls"])
@pytest.mark.parametrize("name", RECTANGULAR)
def test_the_defaults_find_the_shortest_minimiser_or_say_why_not(name, method):
    S, b = tensors(name)
    x, info = ns.lstsq_ex(S, b, method=method)
    check_record(name, x, info, 1e-8)
    assert info.method == (method or "lsmr")
    assert info.converged
    expected = shortest_minimiser(name)
    condition = INDEX[name]["cond"] if INDEX[name]["cond"] < 1e10 else 100
    # Wedin's bound: the condition number, and its square where the residual is large
    assert np.linalg.norm(x.numpy() - expected) <= 1e-8 * condition * (10 + condition) * np.linalg.norm(expected)
    tight, info = ns.lstsq_ex(S, b, method=method, rtol=1e-13, maxiter=20000)
    check_record(name, tight, info, 1e-13)
    assert np.linalg.norm(tight.numpy() - expected) <= 1e-8 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", RECTANGULAR)
def test_the_limit_of_iterations_is_reported(name):
    S, b = tensors(name)
    for method in ("lsmr", "lsqr", "cgls"):
        x, info = ns.lstsq_ex(S, b, method=method, maxiter=4)
        check_record(name, x, info, 1e-8)
        assert info.status is Status.MAXITER
        assert info.iterations == 4


@pytest.mark.parametrize("name", RECTANGULAR)
def test_the_dense_methods(name):
    A, b = load(name)
    matrix, right = torch.from_numpy(A.toarray()), torch.from_numpy(b)
    expected = shortest_minimiser(name)
    x, info = ns.lstsq_ex(matrix, right, method="qr")
    if "rankdef" in INDEX[name]["klass"]:
        assert info.status is Status.ILL_CONDITIONED
    else:
        check_record(name, x, info, 1e-8)
        assert info.converged
        assert np.linalg.norm(x.numpy() - expected) <= 1e-9 * np.linalg.norm(expected)
        assert 0.1 * INDEX[name]["cond"] <= info.cond_A <= INDEX[name]["cond"] * (1 + 1e-6)
    if min(A.shape) <= DENSE_LIMIT:
        x, info = ns.lstsq_ex(matrix, right)
        assert info.method == "svd"
        check_record(name, x, info, 1e-8)
        assert info.converged
        assert np.linalg.norm(x.numpy() - expected) <= 1e-9 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", HERMITIAN)
def test_minres_qlp_is_honest_and_needs_the_steps_of_minres(name):
    S, b = tensors(name)
    x, info = ns.lstsq_ex(S, b, method="minres_qlp", rtol=1e-6, maxiter=300)
    check_record(name, x, info, 1e-6)
    _, minres = ns.solve_ex(S, b, method="minres", rtol=1e-6, maxiter=300)
    if minres.converged:
        assert info.converged
        assert info.iterations <= 1.05 * minres.iterations + 2
