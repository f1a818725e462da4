"""Least squares: every method finds `A^+ b` for every shape, rank and form of `A`, and says truthfully how it ended."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nablasolve as ns
from nablasolve import Status
from nablasolve.methods import METHODS
from nablasolve.methods.base import CLAIMED, RUNNING, Correction
from nablasolve.vectors import HostSpace, TensorSpace

KRYLOV = ("lsmr", "lsqr", "cgls")
ANY_RANK = (*KRYLOV, "svd")
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
WIDE = (torch.float64, torch.complex128)
SHAPES = {"tall": (9, 5), "wide": (5, 9), "square": (6, 6)}
RANKS = ("full", "zero rows", "zero columns", "product")
RTOL = {torch.float32: 1e-6, torch.complex64: 1e-6, torch.float64: 1e-13, torch.complex128: 1e-13}
ERROR = {torch.float32: 1e-4, torch.complex64: 1e-4, torch.float64: 1e-9, torch.complex128: 1e-9}
SOLVED = (Status.CONVERGED, Status.LEAST_SQUARES)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def times(A: Tensor, v: Tensor) -> Tensor:
    return (A @ v.unsqueeze(-1)).squeeze(-1)


def with_singular_values(m: int, n: int, values: Tensor, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    U, V = (torch.linalg.qr(randn(k, k, dtype=dtype, seed=seed + i))[0] for i, k in enumerate((m, n)))
    return U[:, : len(values)] * values.to(dtype) @ V[:, : len(values)].mH


def with_eigenvalues(values: Tensor, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    Q, _ = torch.linalg.qr(randn(len(values), len(values), dtype=dtype, seed=seed))
    A = Q * values.to(dtype) @ Q.mH
    return (A + A.mH) / 2


def matrix(shape: tuple[int, int], rank: str = "full", dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A matrix of condition number 4 on its range, of full rank or of rank `min(m, n) - 2`."""
    m, n = shape
    if rank == "zero rows":
        return torch.cat([matrix((m - 2, n), "full", dtype, seed), torch.zeros(2, n, dtype=dtype)])[torch.arange(m).roll(3)]
    if rank == "zero columns":
        return matrix((n, m), "zero rows", dtype, seed).mT.contiguous()
    count = min(m, n) - (2 if rank == "product" else 0)
    return with_singular_values(m, n, torch.linspace(0.5, 2, count, dtype=torch.float64), dtype, seed)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def pseudo_inverse_solution(A: Tensor, b: Tensor, damp: Any = 0.0) -> Tensor:
    """`A^+ b`, or that of the matrix with `damp I` below, in 64 bits."""
    A, b, n = wide(A), wide(b), A.shape[-1]
    if isinstance(damp, Tensor) or damp != 0:
        below = torch.as_tensor(damp, dtype=A.dtype)[..., None, None] * torch.eye(n, dtype=A.dtype)
        batch = torch.broadcast_shapes(A.shape[:-2], below.shape[:-2], b.shape[:-1])
        A = torch.cat([part.expand(*batch, *part.shape[-2:]) for part in (A, below)], dim=-2)
        b = torch.cat([b.expand(*batch, b.shape[-1]), b.new_zeros(*batch, n)], dim=-1)
    return times(torch.linalg.pinv(A, rtol=1e-5 if A.shape[-1] < 50 else 1e-12), b)


def error(x: Tensor, expected: Tensor) -> float:
    x, expected = x.detach(), expected.detach()
    return float(torch.linalg.vector_norm(wide(x) - expected) / torch.linalg.vector_norm(expected))


def consistent_side(A: Tensor, seed: int = 1) -> Tensor:
    return times(A, randn(*A.shape[:-2], A.shape[-1], dtype=A.dtype, seed=seed))


def any_side(A: Tensor, seed: int = 1) -> Tensor:
    return randn(*A.shape[:-2], A.shape[-2], dtype=A.dtype, seed=seed)


def solved(info: ns.SolveInfo) -> bool:
    return bool(torch.as_tensor(info.converged).all())


# -- the solution ------------------------------------------------------------------------------------------------------


def full_column_rank(shape: str, rank: str) -> bool:
    return (shape, rank) in (("tall", "full"), ("tall", "zero rows"), ("square", "full"))


def full_row_rank(shape: str, rank: str) -> bool:
    return (shape, rank) in (("wide", "full"), ("wide", "zero columns"), ("square", "full"))


@pytest.mark.parametrize("consistent", [True, False], ids=["consistent", "inconsistent"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [*ANY_RANK, "craig", "qr"])
def test_every_method_finds_the_pseudo_inverse_solution(method, shape, rank, consistent):
    full = full_column_rank(shape, rank) or full_row_rank(shape, rank)
    reached = consistent or full_row_rank(shape, rank)
    for dtype in WIDE:
        A = matrix(SHAPES[shape], rank, dtype)
        b = consistent_side(A) if consistent else any_side(A)
        x, info = ns.lstsq_ex(A, b, method=method, rtol=1e-13)
        if method == "qr" and not full:
            assert info.status is Status.ILL_CONDITIONED
        elif method == "craig" and not reached:
            assert info.status is Status.INCONSISTENT
        else:
            assert error(x, pseudo_inverse_solution(A, b)) <= 1e-9
            assert info.status is (Status.CONVERGED if reached else Status.LEAST_SQUARES)
        assert info.method == method
        assert info.converged == (info.status in SOLVED)


@pytest.mark.parametrize("rank", ["full", "product"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", [*ANY_RANK, "qr"])
def test_every_dtype_and_every_damping(method, dtype, shape, rank):
    A = matrix(SHAPES[shape], rank, dtype)
    b = any_side(A)
    for damp in (0.0, 0.3, torch.tensor(0.3, dtype=torch.float64)):
        if method == "qr" and rank != "full" and not isinstance(damp, Tensor) and damp == 0:
            continue
        x, info = ns.lstsq_ex(A, b, method=method, damp=damp, rtol=RTOL[dtype])
        assert solved(info)
        assert x.dtype == dtype
        assert error(x, pseudo_inverse_solution(A, b, damp)) <= ERROR[dtype]


class Product(nn.Module):
    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(A, requires_grad=False)

    def forward(self, v: Tensor) -> Tensor:
        return self.weight @ v


def sparse(A: Tensor, layout: torch.layout) -> Tensor:
    return A.to_sparse_coo() if layout == torch.sparse_coo else A.to_sparse(layout=layout)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "dense": lambda A: A,
    "function": lambda A: lambda v: A @ v,
    "operator": lambda A: ns.LinearOperator(lambda v: A @ v, domain=A[0], codomain=A[:, 0]),
    "operator with adjoint": lambda A: ns.LinearOperator(
        lambda v: A @ v, adjoint=lambda u: A.mH @ u, domain=A[0], codomain=A[:, 0]
    ),
    "COO": functools.partial(sparse, layout=torch.sparse_coo),
    "CSR": functools.partial(sparse, layout=torch.sparse_csr),
    "CSC": functools.partial(sparse, layout=torch.sparse_csc),
    "module": lambda A: Product(A),
    "adjoint of an operator": lambda A: ns.aslinearoperator(A.mH.contiguous()).H,
    "sum": lambda A: ns.aslinearoperator(A / 2) + ns.LinearOperator(lambda v: A @ v / 2, domain=A[0], codomain=A[:, 0]),
}


@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", [*KRYLOV, None])
def test_every_form_of_the_operator(method, form, damp):
    for shape, dtype in (("tall", torch.float64), ("wide", torch.complex128)):
        A = matrix(SHAPES[shape], "product", dtype)
        b = any_side(A)
        domain = A[0] if form in ("function", "module") else None
        x, info = ns.lstsq_ex(FORMS[form](A), b, method=method, damp=damp, domain=domain, rtol=1e-13)
        assert solved(info)
        assert error(x, pseudo_inverse_solution(A, b, damp)) <= 1e-9
        assert info.method == (method or ("svd" if form in ("dense", "adjoint of an operator") else "lsmr"))


@pytest.mark.parametrize("method", KRYLOV)
def test_a_given_adjoint_serves_the_solve(method):
    A, calls = matrix((9, 5)), []

    def adjoint(u: Tensor) -> Tensor:
        calls.append(1)
        return A.mT @ u

    operator = ns.LinearOperator(lambda v: A @ v, adjoint=adjoint, domain=A[0], codomain=A[:, 0])
    with torch.no_grad():
        _, info = ns.lstsq_ex(operator, any_side(A), method=method)
    assert info.rmatvecs == len(calls) > info.iterations


@pytest.mark.parametrize("recorded", [False, True], ids=["without grad", "with grad"])
@pytest.mark.parametrize("given", [False, True], ids=["derived adjoint", "given adjoint"])
@pytest.mark.parametrize("method", KRYLOV)
def test_products_are_counted_and_none_is_wasted(method, given, recorded):
    A, count = with_singular_values(60, 40, torch.logspace(0, -1, 40)), [0, 0]

    def apply(v: Tensor) -> Tensor:
        count[0] += 1
        return A @ v

    def adjoint(u: Tensor) -> Tensor:
        count[1] += 1
        return A.mT @ u

    operator = ns.LinearOperator(apply, adjoint=adjoint if given else None, domain=A[0], codomain=A[:, 0])
    with torch.set_grad_enabled(recorded):
        _, info = ns.lstsq_ex(operator, any_side(A), method=method)
    assert info.converged
    assert info.iterations > 10
    assert info.rmatvecs == info.iterations + 2  # the start, the steps and the certificate
    # the steps, the certificate and the recording run; and one from which autograd derives the adjoint, to solve or to confirm
    assert info.iterations + 1 + recorded <= info.matvecs <= count[0] == info.iterations + 2 + recorded
    assert count[1] == (info.rmatvecs if given else 0)


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damp", [0.0, 0.3, "one each"])
@pytest.mark.parametrize("method", KRYLOV)
def test_a_batch_of_right_hand_sides_shares_a_function(method, damp):
    for shape, dtype in (("tall", torch.float64), ("wide", torch.complex128)):
        A = matrix(SHAPES[shape], "product", dtype)
        b = torch.stack([any_side(A, 1), consistent_side(A, 2), 1e3 * any_side(A, 3)])
        lam = torch.tensor([0.0, 0.3, 2.0], dtype=torch.float64) if damp == "one each" else damp
        x, info = ns.lstsq_ex(
            lambda v, A=A: times(A, v), b, damp=lam, domain=b.new_zeros(3, A.shape[1]), batch_dims=1, method=method, rtol=1e-13
        )
        assert info.converged.tolist() == [True] * 3
        assert info.norm_x.shape == (3,)
        for k in range(3):
            expected = pseudo_inverse_solution(A, b[k], float(lam[k]) if isinstance(lam, Tensor) else lam)
            assert error(x[k], expected) <= 1e-9


@pytest.mark.parametrize("damp", [0.0, "one each"])
@pytest.mark.parametrize("method", [*ANY_RANK, "qr"])
def test_a_batch_of_matrices_of_different_ranks(method, damp):
    for shape in SHAPES:
        ranks = ("full", "full") if method == "qr" else ("full", "product", "zero rows", "zero columns")
        A = torch.stack([matrix(SHAPES[shape], rank, torch.complex128, seed) for seed, rank in enumerate(ranks)])
        b = any_side(A)
        lam = torch.linspace(0.1, 2, len(A), dtype=torch.float64) if damp == "one each" else damp
        x, info = ns.lstsq_ex(A, b, damp=lam, method=method, rtol=1e-13)
        assert solved(info)
        for k in range(len(A)):
            expected = pseudo_inverse_solution(A[k], b[k], float(lam[k]) if isinstance(lam, Tensor) else lam)
            assert error(x[k], expected) <= 1e-9


@pytest.mark.parametrize("method", [*ANY_RANK, "qr", "craig"])
def test_dense_matrices_and_right_hand_sides_broadcast(method):
    A = matrix((5, 9))
    b = randn(2, 3, 5, seed=1)
    x, info = ns.lstsq_ex(A, b, method=method, rtol=1e-13)
    assert x.shape == (2, 3, 9)
    assert info.status.shape == (2, 3)
    assert error(x, pseudo_inverse_solution(A, b)) <= 1e-9
    many = torch.stack([matrix((5, 9), seed=s) for s in (1, 2, 3)])
    x, info = ns.lstsq_ex(many, b[0, 0], method=method, rtol=1e-13)
    assert x.shape == (3, 9)
    assert error(x, pseudo_inverse_solution(many, b[0, 0])) <= 1e-9


@pytest.mark.parametrize("method", [*ANY_RANK, "qr", "craig"])
def test_no_system_of_a_batch_changes_another(method):
    """One right-hand side is zero, one is huge, one is tiny, one is NaN: each gives what it gives alone."""
    A = matrix((6, 6)) if method in ("qr", "craig") else matrix((9, 5), "product")
    b = torch.stack([any_side(A, s) for s in range(6)])
    b[1], b[2], b[3], b[4, 0] = 0, 1e30 * b[2], 1e-30 * b[3], torch.nan
    x, info = ns.lstsq_ex(A, b, method=method, rtol=1e-12)
    assert info.status[4] == Status.NONFINITE
    assert info.converged.tolist() == [True, True, True, True, False, True]
    assert torch.equal(x[1], torch.zeros_like(x[1]))
    assert info.iterations[1] == 0
    for k in (0, 2, 3, 5):
        alone, record = ns.lstsq_ex(A, b[k], method=method, rtol=1e-12)
        assert info.iterations[k] == record.iterations
        assert error(x[k], wide(alone)) <= 1e-11
        assert error(x[k], pseudo_inverse_solution(A, b[k])) <= 1e-9


# -- trees, shapes and edges -------------------------------------------------------------------------------------------


def split(x: Tensor) -> dict[str, Any]:
    return {"low": x[:1], "high": (x[1:3].reshape(2, 1), x[3:])}


def join(x: dict[str, Any]) -> Tensor:
    return torch.cat([x["low"], x["high"][0].reshape(-1), x["high"][1]])


@pytest.mark.parametrize("method", KRYLOV)
def test_trees_on_both_sides(method):
    A = matrix((9, 5), "product", torch.complex128)
    b = any_side(A)
    right = (b[:4].reshape(2, 2), [b[4:]])
    x = ns.lstsq(
        lambda v: ((A @ join(v))[:4].reshape(2, 2), [(A @ join(v))[4:]]), right, domain=split(A[0]), method=method, rtol=1e-13
    )
    assert x.keys() == {"low", "high"}
    assert error(join(x), pseudo_inverse_solution(A, b)) <= 1e-9
    # a tree to a tensor, and a tensor to a tree, with batches
    many = torch.stack([b, 2j * b])
    x = ns.lstsq(
        lambda v: v["a"] @ A[:, :2].mT + v["b"] @ A[:, 2:].mT, many, batch_dims=1, method=method, rtol=1e-13,
        domain={"a": many.new_zeros(2, 2), "b": many.new_zeros(2, 3)},
    )  # fmt: skip
    assert error(torch.cat([x["a"], x["b"]], dim=-1), pseudo_inverse_solution(A, many)) <= 1e-9
    x = ns.lstsq(
        lambda v: [v @ A[:3].mT, v @ A[3:].mT], [many[:, :3], many[:, 3:]], batch_dims=1, method=method, rtol=1e-13,
        domain=many.new_zeros(2, 5),
    )  # fmt: skip
    assert error(x, pseudo_inverse_solution(A, many)) <= 1e-9


@pytest.mark.parametrize("method", KRYLOV)
def test_vectors_of_any_shape(method):
    A = matrix((12, 6))
    b = any_side(A).reshape(3, 1, 4)
    x = ns.lstsq(lambda v: (A @ v.reshape(-1)).reshape(3, 1, 4), b, domain=b.new_zeros(2, 3), method=method, rtol=1e-13)
    assert x.shape == (2, 3)
    assert error(x.reshape(-1), pseudo_inverse_solution(A, b.reshape(-1))) <= 1e-9
    # vectors without a dimension
    number = torch.tensor(3.0, dtype=torch.float64)
    x = ns.lstsq(lambda v: 2 * v, number, domain=number, method=method)
    assert x.shape == ()
    assert x.item() == pytest.approx(1.5)
    x = ns.lstsq(lambda v: torch.stack([v, v]), torch.tensor([1.0, 3.0], dtype=torch.float64), domain=number, method=method)
    assert x.item() == pytest.approx(2)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("method", [*ANY_RANK, "qr", "craig"])
def test_empty_sides_give_the_zero_solution(method, shape):
    A = torch.zeros(shape, dtype=torch.float64)
    for b in (torch.zeros(shape[0], dtype=torch.float64), torch.zeros(2, shape[0], dtype=torch.float64)):
        x, info = ns.lstsq_ex(A, b, method=method)
        assert solved(info)
        assert torch.equal(x, torch.zeros(*b.shape[:-1], shape[1], dtype=torch.float64))


@pytest.mark.parametrize("method", [*ANY_RANK, "qr", "craig"])
@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_a_zero_right_hand_side_has_the_zero_solution_without_a_step(method, damp):
    A = matrix((9, 5))
    x0 = randn(5, seed=2)
    for guess in (None, x0):
        x, info = ns.lstsq_ex(A, torch.zeros(9, dtype=torch.float64), method=method, damp=damp, x0=guess)
        assert torch.equal(x, torch.zeros(5, dtype=torch.float64))
        assert info.iterations == 0
        assert info.status is Status.CONVERGED
    assert torch.equal(x0, randn(5, seed=2))


@pytest.mark.parametrize("method", [*ANY_RANK, "qr"])
@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_a_right_hand_side_orthogonal_to_the_range_has_the_zero_solution(method, damp):
    A = torch.cat([matrix((5, 5)), torch.zeros(2, 5, dtype=torch.float64)])
    b = torch.tensor([0.0, 0, 0, 0, 0, 3, 4], dtype=torch.float64)
    x, info = ns.lstsq_ex(A, b, method=method, damp=damp)
    assert torch.linalg.vector_norm(x) <= 1e-14
    assert info.status is Status.LEAST_SQUARES
    assert info.residual_norm == pytest.approx(5)


@pytest.mark.parametrize("method", [*ANY_RANK, "qr"])
@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_the_exact_solution_as_a_guess_needs_no_step(method, damp):
    A = matrix((9, 5), dtype=torch.complex128)
    for b, status in ((any_side(A), Status.LEAST_SQUARES), (consistent_side(A), Status.CONVERGED)):
        if damp:
            status = Status.LEAST_SQUARES
        x0 = pseudo_inverse_solution(A, b, damp)
        x, info = ns.lstsq_ex(A, b, method=method, damp=damp, x0=x0)
        assert info.iterations == 0
        assert info.status is status
        assert error(x, x0) <= 1e-14
        near, _ = ns.lstsq_ex(A, b, method=method, damp=damp, x0=x0 + 1e-6 * randn(5, dtype=torch.complex128), rtol=1e-13)
        assert error(near, x0) <= 1e-9


@pytest.mark.parametrize("method", [*ANY_RANK, "minres_qlp"])
def test_a_guess_does_not_change_the_solution_of_minimum_norm(method):
    A = with_eigenvalues(torch.tensor([-1.0, 2, 3, 4]).double()) if method == "minres_qlp" else matrix((9, 5))
    b, x0 = any_side(A), randn(A.shape[1], seed=5)
    x = ns.lstsq(A, b, method=method, x0=x0, rtol=1e-13)
    assert error(x, pseudo_inverse_solution(A, b)) <= 1e-9
    wide_one = matrix((5, 9))  # of many minimisers the guess must not choose
    if method != "minres_qlp":
        b = any_side(wide_one)
        x = ns.lstsq(wide_one, b, method=method, x0=randn(9, seed=5), rtol=1e-13)
        assert error(x, pseudo_inverse_solution(wide_one, b)) <= 1e-9


@pytest.mark.parametrize("method", [*ANY_RANK, "qr", "craig"])
def test_the_scales_of_b_and_of_the_operator_change_nothing(method):
    for dtype in (torch.float64, torch.float32):
        A = matrix((12, 12) if method == "craig" else (12, 8), dtype=dtype)
        b = any_side(A)
        rtol = 1e-4 if dtype == torch.float32 else 1e-8
        reference, info = ns.lstsq_ex(A, b, method=method, rtol=rtol)
        exponents = (30, -30) if dtype == torch.float64 else (15, -15)
        for right, left in [*((10.0**e, 1.0) for e in exponents), *((1.0, 10.0**e) for e in (12, -12))]:
            x, record = ns.lstsq_ex(left * A, right * b, method=method, rtol=rtol)
            assert record.status is info.status
            assert abs(record.iterations - info.iterations) <= (left != 1.0)  # the estimates of |A| are rounded otherwise
            assert error(wide(x) * (left / right), wide(reference)) <= 100 * rtol
            assert record.norm_A == pytest.approx(left * info.norm_A, rel=1e-2)
            assert record.norm_x == pytest.approx(right / left * info.norm_x, rel=1e-2)
            assert record.norm_r == pytest.approx(right * info.norm_r, rel=1e-2, abs=2 * right * rtol)


@pytest.mark.parametrize("method", [*ANY_RANK, "qr", "craig", "minres_qlp"])
def test_nothing_that_is_given_is_changed(method):
    A = with_eigenvalues(torch.tensor([-1.0, 2, 3, 4, 0.5]).double())
    b, x0, lam = any_side(A), randn(5, seed=3), torch.tensor(0.2, dtype=torch.float64)
    copies = [t.clone() for t in (A, b, x0, lam)]
    random = torch.random.get_rng_state()
    ns.lstsq(A, b, method=method, x0=x0)
    if method not in ("minres_qlp", "craig"):
        ns.lstsq(A, b, method=method, x0=x0, damp=lam)
    x = ns.lstsq(A, torch.zeros_like(b), method=method)
    x += 1
    assert all(torch.equal(t, copy) for t, copy in zip((A, b, x0, lam), copies, strict=True))
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("method", [*ANY_RANK, "qr"])
def test_the_result_of_a_function_is_not_written_to(method):
    """`A` returns its argument, or the same buffer each time."""
    b = randn(6, seed=1)
    if method in KRYLOV:
        x = ns.lstsq(lambda v: v, b, domain=b, method=method)
        torch.testing.assert_close(x, b)
        store = torch.zeros(6, dtype=torch.float64)
        operator = ns.LinearOperator(lambda v: v.expand(6), adjoint=lambda u: store.copy_(u), domain=b, codomain=b)
        torch.testing.assert_close(ns.lstsq(operator, b, method=method), b)
    noncontiguous = randn(7, 12).mT[::2].mT[:, :4]
    b = randn(14, seed=1)[::2]
    x0 = randn(8, seed=2)[::2]
    x = ns.lstsq(noncontiguous, b, method=method, x0=x0, rtol=1e-13)
    assert error(x, pseudo_inverse_solution(noncontiguous, b)) <= 1e-9
    if method in KRYLOV:
        y = ns.lstsq(lambda v: noncontiguous @ v, b, method=method, x0=x0, rtol=1e-13)
        assert error(y, wide(x)) <= 1e-9


# -- MINRES-QLP --------------------------------------------------------------------------------------------------------

SPECTRA = {
    "indefinite": torch.cat([-torch.linspace(1, 3, 8), torch.linspace(0.5, 4, 12)]),
    "negative definite": -torch.linspace(0.5, 4, 20),
    "singular indefinite": torch.cat([torch.zeros(5), -torch.linspace(1, 3, 6), torch.linspace(0.5, 4, 9)]),
    "singular semidefinite": torch.cat([torch.zeros(3), torch.linspace(0.5, 4, 17)]),
    "of rank one": torch.cat([torch.zeros(19), torch.ones(1)]),
    "with plus and minus pairs": torch.cat([torch.zeros(4), torch.linspace(1, 3, 8), -torch.linspace(1, 3, 8)]),
}


@pytest.mark.parametrize("consistent", [True, False], ids=["consistent", "inconsistent"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minres_qlp_finds_the_pseudo_inverse_solution_of_every_hermitian_system(dtype, spectrum, consistent):
    values = SPECTRA[spectrum].double()
    singular = bool((values == 0).any())
    A = with_eigenvalues(values, wide(torch.zeros(0, dtype=dtype)).dtype)
    b = torch.stack([consistent_side(A, s) if consistent else any_side(A, s) for s in (1, 2, 3)])
    expected = pseudo_inverse_solution(A, b)
    A, b = A.to(dtype), b.to(dtype)
    reached = Status.CONVERGED if consistent or not singular else Status.LEAST_SQUARES
    rtol, bound = 1e-12 if dtype in WIDE else 1e-5, ERROR[dtype]
    x, info = ns.lstsq_ex(lambda v: times(A, v), b, domain=b, batch_dims=1, method="minres_qlp", rtol=rtol, maxiter=200)
    assert info.status.tolist() == [reached] * 3
    assert error(x, expected) <= bound
    for k in range(3):
        alone, record = ns.lstsq_ex(A, b[k], method="minres_qlp", rtol=rtol)
        assert record.status is reached
        assert error(alone, expected[k]) <= bound
        assert record.rmatvecs == 0


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_minres_qlp_solves_systems_of_a_batch_that_end_at_different_steps_and_for_different_reasons(dtype):
    spectra = [
        torch.cat([torch.zeros(zeros), -torch.linspace(1, 3, 4), torch.linspace(1, 2, few).repeat(1 + 13 // few)])[:17]
        for zeros, few in ((0, 13), (3, 2), (5, 12), (1, 1), (13, 3), (2, 9))
    ]
    A = torch.stack([with_eigenvalues(values.double(), dtype, seed) for seed, values in enumerate(spectra)])
    b = torch.stack([any_side(A[0], 5), any_side(A[1], 6), consistent_side(A[2]), *(any_side(A[k], k) for k in (3, 4, 5))])
    b[3] = 0
    x, info = ns.lstsq_ex(A, b, method="minres_qlp", rtol=1e-12)
    assert len(set(info.iterations.tolist())) >= 5
    assert solved(info)
    for k in range(6):
        if k != 3:
            assert error(x[k], pseudo_inverse_solution(A[k], b[k])) <= 1e-9
    assert torch.equal(x[3], torch.zeros_like(x[3]))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 12])
def test_minres_qlp_has_the_iterates_of_minres_where_the_system_is_not_singular(steps, dtype):
    A = with_eigenvalues(SPECTRA["indefinite"].double(), dtype)
    b = torch.stack([any_side(A, 1), any_side(A, 2)])
    expected, _ = ns.solve_ex(lambda v: times(A, v), b, batch_dims=1, method="minres", rtol=0.0, maxiter=steps)
    x, info = ns.lstsq_ex(
        lambda v: times(A, v), b, domain=b, batch_dims=1, method="minres_qlp", rtol=0.0, maxiter=steps, history=True
    )
    assert info.status.tolist() == [Status.MAXITER] * 2
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(info.history[-1], torch.linalg.vector_norm(b - times(A, x), dim=-1), rtol=1e-9, atol=0)
    for k in range(2):
        alone, _ = ns.lstsq_ex(A, b[k], method="minres_qlp", rtol=0.0, maxiter=steps)
        torch.testing.assert_close(alone, expected[k], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_minres_qlp_needs_the_steps_of_minres(condition):
    steps, steps_of_minres = 0, 0  # of one system alone they move by several in a hundred with the rounding
    for seed in range(4):
        signs = torch.sign(randn(80, seed=seed))
        A = with_eigenvalues(signs * torch.logspace(0, -math.log10(condition), 80, dtype=torch.float64), seed=seed)
        b = consistent_side(A, seed)
        _, minres = ns.solve_ex(lambda v, A=A: A @ v, b, method="minres", maxiter=4000)
        with torch.no_grad():
            _, info = ns.solve_ex(lambda v, A=A: A @ v, b, method="minres_qlp", maxiter=4000)
        assert info.converged
        assert info.matvecs == info.iterations + 2 or condition > 1e1  # one a step, and A x and A r for the certificate
        steps, steps_of_minres = steps + info.iterations, steps_of_minres + minres.iterations
    assert steps <= 1.03 * steps_of_minres + 4


@pytest.mark.parametrize("consistent", [True, False], ids=["consistent", "inconsistent"])
def test_minres_qlp_on_an_ill_conditioned_singular_system(consistent):
    """The error is about the tolerance times the condition number on the range, and no part of it is in the nullspace."""
    for seed in range(4):
        values = torch.cat([torch.zeros(4).double(), torch.logspace(0, -4, 26).double() * torch.sign(randn(26, seed=seed))])
        A = with_eigenvalues(values, seed=seed)
        b = consistent_side(A, seed) if consistent else any_side(A, seed)
        expected = pseudo_inverse_solution(A, b)
        for rtol, bound in ((1e-8, 1e-4), (1e-12, 1e-8 if consistent else 1e-7)):
            x, info = ns.lstsq_ex(ns.aslinearoperator(A, hermitian=True), b, method="minres_qlp", rtol=rtol, maxiter=1000)
            assert info.status is (Status.CONVERGED if consistent else Status.LEAST_SQUARES)
            assert error(x, expected) <= bound


def inconsistent(seed: int, dtype: torch.dtype = torch.float64, signs: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A Hermitian `A` of size 105 with the eigenvalues 1 to 3, or those and their negatives, and 0 five times; `b`; `A^+ b`."""
    values = torch.linspace(1, 3, 100, dtype=torch.float64) * (torch.sign(randn(100, seed=seed)) if signs else 1)
    A = with_eigenvalues(
        torch.cat([values, torch.zeros(5, dtype=torch.float64)]), wide(torch.zeros(0, dtype=dtype)).dtype, seed
    )
    b = any_side(A, seed + 1)
    return A.to(dtype), b.to(dtype), pseudo_inverse_solution(A, b)


@pytest.mark.parametrize("signs", [False, True], ids=["semidefinite", "indefinite"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minres_qlp_finds_all_digits_where_the_system_is_inconsistent(dtype, signs):
    """A first cycle finds half of them; what it leaves is nearly a null vector, from which MR-II goes on."""
    products, products_of_lsmr = 0, 0
    for seed in range(20):
        A, b, expected = inconsistent(seed, dtype, signs)
        operator = ns.LinearOperator(lambda v, A=A: A @ v, hermitian=True)
        x, info = ns.lstsq_ex(operator, b, method="minres_qlp")
        _, lsmr = ns.lstsq_ex(operator, b, method="lsmr")
        assert info.status is Status.LEAST_SQUARES
        assert error(x, expected) <= (5e-8 if dtype in WIDE else 1e-4)  # the tolerance itself, and a factor
        assert info.matvecs <= 1.2 * (lsmr.matvecs + lsmr.rmatvecs) or dtype not in WIDE
        if dtype in WIDE:
            tight, record = ns.lstsq_ex(operator, b, method="minres_qlp", rtol=1e-10)
            assert record.status is Status.LEAST_SQUARES
            assert error(tight, expected) <= 1e-9
            best, last = ns.lstsq_ex(operator, b, method="minres_qlp", rtol=0.0)
            assert last.status is Status.LEAST_SQUARES
            assert error(best, expected) <= 1e-10
            _, lsmr = ns.lstsq_ex(operator, b, method="lsmr", rtol=1e-10)
            products, products_of_lsmr = products + record.matvecs, products_of_lsmr + lsmr.matvecs + lsmr.rmatvecs
    assert products <= (1.2 if signs else 0.65) * products_of_lsmr


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_minres_qlp_in_a_batch_treats_each_system_as_it_would_alone(dtype):
    """Of which one is consistent, one inconsistent, one nearly a null vector from the beginning, and one zero."""
    A, b, _ = inconsistent(2, dtype, signs=True)
    null = b - times(A, pseudo_inverse_solution(A, b))
    side = torch.stack([times(A, b), b, null + 1e-7 * times(A, b), torch.zeros_like(b), times(A, null + b)])
    for rtol in (1e-6, 1e-12):
        x, info = ns.lstsq_ex(lambda v: times(A, v), side, domain=side, batch_dims=1, method="minres_qlp", rtol=rtol)
        assert info.status.tolist() == [Status.CONVERGED, Status.LEAST_SQUARES, Status.LEAST_SQUARES, *[Status.CONVERGED] * 2]
        for k in (0, 1, 2, 4):
            alone, record = ns.lstsq_ex(A, side[k], method="minres_qlp", rtol=rtol)
            assert abs(info.iterations[k] - record.iterations) <= 2 + 0.1 * record.iterations  # rounding is another in a batch
            assert error(x[k], wide(alone)) <= 10 * rtol * (1e7 if k == 2 else 1)
            assert error(x[k], pseudo_inverse_solution(A, side[k])) <= 100 * rtol * (1e7 if k == 2 else 1)
        assert torch.equal(x[3], torch.zeros_like(x[3]))
        assert info.iterations[2] < info.iterations[1]


def test_minres_qlp_keeps_what_the_first_step_has_solved_where_another_system_goes_on_from_a_null_vector():
    values = torch.cat([torch.zeros(3), torch.linspace(1, 3, 17)]).double()
    A = with_eigenvalues(values)
    vectors = torch.linalg.eigh(A)[1]
    side = torch.stack([vectors[:, 9], vectors[:, 0] + 1e-7 * vectors[:, 5:].sum(1)])
    x, info = ns.lstsq_ex(lambda v: times(A, v), side, domain=side, batch_dims=1, method="minres_qlp", rtol=1e-12)
    assert info.status.tolist() == [Status.CONVERGED, Status.LEAST_SQUARES]
    assert info.iterations[0] == 1
    assert error(x[0], side[0] / values[9]) <= 1e-12
    assert error(x[1], times(torch.linalg.pinv(A, rtol=1e-5), side[1])) <= 1e-4


def test_minres_qlp_freezes_a_stopped_system_of_either_kind_in_a_batch():
    A, b, _ = inconsistent(2)
    null = b - times(A, pseudo_inverse_solution(A, b)) + 1e-8 * times(A, b)
    sides = torch.stack([times(A, b), times(A, b.flip(0)), null, null - 1e-8 * b])
    sides = sides / torch.linalg.vector_norm(sides, dim=-1, keepdim=True)
    method, state = state_of("minres_qlp", TensorSpace(1), A, sides)
    for _ in range(4):
        state = method.step(state)
    assert state.null.tolist() == [False, False, True, True]
    before, norms = method.solution(state).clone(), state.normal_norm.clone()
    state.stop(Status.STOPPED, torch.tensor([True, False, True, False]))
    for _ in range(3):
        state = method.step(state)
    after = method.solution(state)
    for index, frozen in enumerate((True, False, True, False)):
        assert torch.allclose(after[index], before[index], rtol=0, atol=1e-14) is frozen
        assert (state.normal_norm[index] == norms[index]).item() is frozen
    assert (state.status == RUNNING).tolist() == [False, True, False, True]


def test_minres_qlp_waits_for_the_device_once_a_step(monkeypatch):
    A, b, _ = inconsistent(0)
    waits, plain = [], TensorSpace.any
    monkeypatch.setattr(TensorSpace, "any", lambda self, condition: waits.append(1) or plain(self, condition))
    for side in (times(A, b), b):
        counts = []
        for rtol in (1e-3, 1e-7):  # in one cycle each
            waits.clear()
            _, info = ns.lstsq_ex(
                lambda v: times(A, v), side[None], domain=side[None], batch_dims=1, method="minres_qlp", rtol=rtol
            )
            counts.append((len(waits), int(info.iterations)))
        (few, first), (many, last) = counts
        assert last >= first + 5
        assert many - few == last - first


@pytest.mark.parametrize("rtol", [None, 0.0])
def test_minres_qlp_takes_no_null_vector_for_a_part_of_the_solution(rtol):
    """With small integers the process ends exactly, or with rounding in the place of a zero, which must not be divided by."""
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        n = int(torch.randint(2, 7, (1,), generator=draw))
        k = int(torch.randint(1, n, (1,), generator=draw))
        V = torch.randint(-1, 2, (n, k), generator=draw).double()
        A = V @ torch.diag(torch.randint(-2, 3, (k,), generator=draw).double()) @ V.mT
        b = torch.randint(-2, 3, (n,), generator=draw).double()
        expected = pseudo_inverse_solution(A, b)
        x, info = ns.lstsq_ex(ns.aslinearoperator(A, hermitian=True), b, method="minres_qlp", rtol=rtol)
        assert torch.linalg.vector_norm(x - expected) <= 1e-9 * (1 + torch.linalg.vector_norm(expected))
        assert info.converged or rtol == 0.0


@pytest.mark.parametrize("method", ["minres_qlp", "lsmr", "lsqr", "cgls", "craig", "svd", "qr"])
def test_solve_takes_a_least_squares_method_and_does_not_call_a_least_squares_solution_converged(method):
    dtype = torch.complex128
    regular = with_eigenvalues(SPECTRA["indefinite"].double(), dtype)
    singular = with_eigenvalues(SPECTRA["singular indefinite"].double(), dtype)
    x, info = ns.solve_ex(regular, any_side(regular), method=method, rtol=1e-12)
    assert info.status is Status.CONVERGED
    assert error(x, pseudo_inverse_solution(regular, any_side(regular))) <= 1e-9
    if method != "qr":
        b = consistent_side(singular)
        x, info = ns.solve_ex(singular, b, method=method, rtol=1e-12)
        assert info.status is Status.CONVERGED
        assert error(x, pseudo_inverse_solution(singular, b)) <= 1e-9
    b = any_side(singular)
    x, info = ns.solve_ex(singular, b, method=method)
    assert not info.converged
    expected = {"qr": (Status.ILL_CONDITIONED,), "minres_qlp": (Status.INCONSISTENT, Status.STAGNATED)}
    assert info.status in expected.get(method, (Status.INCONSISTENT,))
    assert info.iterations <= 60
    with pytest.raises(ns.ConvergenceError):
        ns.solve(singular, b, method=method)


def test_minres_qlp_finds_a_false_claim():
    A = matrix((30, 30)) + torch.eye(30, dtype=torch.float64)
    for b in (any_side(A), any_side(A, 2)):
        x, info = ns.lstsq_ex(lambda v: A @ v, b, domain=b, method="minres_qlp")
        assert not info.converged
        assert torch.isfinite(x).all()


def test_minres_qlp_takes_no_preconditioner():
    A = with_eigenvalues(SPECTRA["indefinite"].double())
    with pytest.raises(ValueError, match=r"^M: 'minres_qlp'"):
        ns.lstsq(ns.aslinearoperator(A, full_rank=True), any_side(A), method="minres_qlp", M=lambda r: r)
    with pytest.raises(ValueError, match=r"^M: 'minres_qlp'"):
        ns.solve(A, any_side(A), method="minres_qlp", M=lambda r: r)


# -- how a solve ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", KRYLOV)
def test_an_inconsistent_problem_ends_by_the_residual_of_the_normal_equations(method):
    for dtype in DTYPES:
        A = with_singular_values(50, 12, torch.linspace(1, 2, 12), dtype)
        b = any_side(A)
        _, info = ns.lstsq_ex(A, b, method=method, maxiter=500)
        assert info.status is Status.LEAST_SQUARES
        assert info.converged
        assert info.iterations <= 13
        rtol = 1e-8 if dtype in WIDE else 1e-5
        assert info.norm_Ar <= rtol * info.norm_A * info.norm_r
        assert info.relative_residual > 0.5
        assert "least-squares" in info.message


@pytest.mark.parametrize("method", KRYLOV)
def test_the_limit_of_iterations_is_a_failure_that_carries_the_iterate(method):
    A = with_singular_values(60, 40, torch.logspace(0, -2, 40, dtype=torch.float64))
    b = any_side(A)
    x, info = ns.lstsq_ex(A, b, method=method, maxiter=3)
    assert info.status is Status.MAXITER
    assert not info.converged
    assert info.iterations == 3
    with pytest.raises(ns.ConvergenceError, match="MAXITER after 3 iterations") as caught:
        ns.lstsq(A, b, method=method, maxiter=3)
    torch.testing.assert_close(caught.value.x, x)
    assert caught.value.info.status is Status.MAXITER
    with pytest.warns(ns.ConvergenceWarning, match="MAXITER"):
        warned = ns.lstsq(A, b, method=method, maxiter=3, on_failure="warn")
    torch.testing.assert_close(warned, x)
    torch.testing.assert_close(ns.lstsq(A, b, method=method, maxiter=3, on_failure="ignore"), x)
    zero, info = ns.lstsq_ex(A, b, method=method, maxiter=0)
    assert info.status is Status.MAXITER
    assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("method", KRYLOV)
def test_to_converge_at_the_limit_of_iterations_is_to_converge(method):
    A = with_singular_values(60, 40, torch.linspace(1, 3, 40, dtype=torch.float64))
    for b in (any_side(A), consistent_side(A)):
        _, info = ns.lstsq_ex(A, b, method=method, rtol=1e-6)
        assert info.converged
        _, at = ns.lstsq_ex(A, b, method=method, rtol=1e-6, maxiter=info.iterations)
        assert at.status is info.status
        _, below = ns.lstsq_ex(A, b, method=method, rtol=1e-6, maxiter=info.iterations - 1)
        assert below.status is Status.MAXITER


@pytest.mark.parametrize("method", [*ANY_RANK, "qr", "craig", "minres_qlp"])
def test_a_matrix_with_nan_or_inf_is_nonfinite_and_leaves_the_others_of_its_batch_alone(method):
    shape = (6, 6) if method in ("craig", "minres_qlp") else (9, 5)
    good = with_eigenvalues(torch.tensor([-1.0, 2, 3, 4, 0.5, -2]).double()) if shape == (6, 6) else matrix(shape)
    for wrong in (torch.nan, torch.inf):
        A = good.expand(3, *shape).clone()
        A[1, 2, 2] = wrong
        b = any_side(A)
        x, info = ns.lstsq_ex(A, b, method=method, rtol=1e-12)
        assert info.status[1] == Status.NONFINITE
        assert info.converged.tolist() == [True, False, True]
        for k in (0, 2):
            assert error(x[k], pseudo_inverse_solution(good, b[k])) <= 1e-9
        assert torch.isfinite(x).all()
        _, alone = ns.lstsq_ex(A[1], b[1], method=method)
        assert alone.status is Status.NONFINITE


@pytest.mark.parametrize("method", [*ANY_RANK, "qr", "craig"])
def test_a_matrix_without_full_rank_in_floating_point_gives_no_huge_solution(method):
    """A singular value of 1e-17 is the rounding of a zero: a solution of size 1e16 is wrong, and is never called solved."""
    for dtype, tiny in ((torch.float64, 1e-17), (torch.float32, 1e-9)):
        for shape in SHAPES.values():
            values = torch.cat([torch.linspace(0.5, 2, min(shape) - 1), torch.tensor([tiny])]).double()
            A = with_singular_values(*shape, values).to(dtype)
            b = any_side(A)
            rtol = RTOL[dtype]
            expected = pseudo_inverse_solution(A, b)
            for tolerance in (None, rtol, 0.0):
                x, info = ns.lstsq_ex(A, b, method=method, rtol=tolerance)
                assert torch.linalg.vector_norm(x) <= 100 * torch.linalg.vector_norm(expected)
                if info.converged:
                    assert error(x, expected) <= 1e-3
                if method == "qr":
                    assert info.status is Status.ILL_CONDITIONED
                    assert info.cond_A > 0.01 / torch.finfo(dtype).eps
                if method in ("lsmr", "lsqr", "cgls", "svd") and tolerance is None:
                    assert info.converged


def test_a_condition_number_that_leaves_no_digit_is_said():
    ended = []
    for seed in range(12):
        A = with_singular_values(9, 6, torch.logspace(0, -10, 6, dtype=torch.float64), seed=seed).float()
        x, info = ns.lstsq_ex(A, consistent_side(A, seed), method="lsmr", rtol=0.0, maxiter=200)
        assert torch.isfinite(x).all()
        ended.append(info.status)
        if info.status is Status.ILL_CONDITIONED:
            assert not info.converged
            assert info.cond_A > 0.01 / torch.finfo(torch.float32).eps
            assert "damp" in info.message
    assert Status.ILL_CONDITIONED in ended


@pytest.mark.parametrize("kind", ["copied", "zero", "product", "graded", "upper"])
def test_qr_sees_every_matrix_without_full_rank(kind):
    eps = torch.finfo(torch.float64).eps
    for seed in range(6):
        n = 4 + 3 * seed
        A = randn(n + 3, n, seed=seed)
        if kind == "copied":
            A[:, -1] = A[:, 0]
        elif kind == "zero":
            A[:, n // 2] = 0
        elif kind == "product":
            A = randn(n + 3, n - 1, seed=seed) @ randn(n - 1, n, seed=seed + 1)
        elif kind == "graded":
            A = with_singular_values(n + 3, n, torch.logspace(0, -17, n, dtype=torch.float64), seed=seed)
        else:  # no small entry on the diagonal tells
            n = 80
            A = torch.eye(n, dtype=torch.float64) - torch.triu(torch.ones(n, n, dtype=torch.float64), 1)
        for matrix_ in (A, A.mT):
            for scale in (1.0, 1e-200, 1e200):
                x, info = ns.lstsq_ex(scale * matrix_, any_side(matrix_), method="qr")
                assert info.status is Status.ILL_CONDITIONED
                assert torch.equal(x, torch.zeros_like(x))
    for condition in (1e3, 1e8, 1e12):  # and calls none so that has full rank
        A = with_singular_values(30, 20, torch.logspace(0, -math.log10(condition), 20, dtype=torch.float64))
        x, info = ns.lstsq_ex(A, consistent_side(A), method="qr", rtol=1e-12)
        assert info.converged
        assert 0.5 * condition <= info.cond_A <= condition * (1 + condition * 100 * eps)


@pytest.mark.parametrize("damp", [0.0, 0.5])
@pytest.mark.parametrize("method", [*KRYLOV, None])
def test_nothing_unknown_is_solved_by_nothing(method, damp):
    for b in (randn(5), randn(3, 5)):
        x, info = ns.lstsq_ex(torch.zeros(5, 0, dtype=torch.float64), b, damp=damp, method=method)
        assert x.shape == (*b.shape[:-1], 0)
        assert torch.as_tensor(info.converged).all()


@pytest.mark.parametrize("method", ["svd", "qr"])
def test_a_direct_method_that_cannot_reach_the_tolerance_stops_refining(method):
    A = with_singular_values(30, 30, torch.logspace(0, -9, 30, dtype=torch.float64))
    _, info = ns.solve_ex(A, any_side(A), method=method, rtol=1e-15)
    assert info.status is Status.STAGNATED
    assert info.iterations <= 5


def test_singular_values_below_rcond_are_taken_for_zero():
    A = with_singular_values(9, 5, torch.tensor([2.0, 1, 0.5, 1e-9, 1e-10]).double())
    b = any_side(A)
    x, info = ns.lstsq_ex(A, b, method=ns.SVD(rcond=1e-6))
    assert info.status is Status.LEAST_SQUARES
    assert info.cond_A == pytest.approx(4)
    assert error(x, times(torch.linalg.pinv(A, rtol=1e-6), b)) <= 1e-12
    assert error(ns.lstsq(A, b), times(torch.linalg.pinv(A), b)) <= 1e-5
    for wrong in (-1.0, 1.0, "small", torch.tensor(0.1)):
        with pytest.raises(ValueError, match=r"^rcond"):
            ns.SVD(rcond=wrong)


@pytest.mark.parametrize("method", KRYLOV)
def test_a_callback_sees_the_residual_and_may_stop(method):
    A = with_singular_values(60, 40, torch.logspace(0, -2, 40, dtype=torch.float64))
    b, seen = any_side(A), []

    def callback(state: Any) -> bool:
        seen.append((state.iteration, state.residual_norm, state.phase))
        return state.iteration == 4

    x, info = ns.lstsq_ex(A, b, method=method, callback=callback)
    assert info.status is Status.STOPPED
    assert not info.converged
    assert [s[0] for s in seen] == [1, 2, 3, 4]
    assert seen[-1][1] == pytest.approx(torch.linalg.vector_norm(b - A @ x).item())
    assert seen[-1][2] == "forward"


@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("method", KRYLOV)
def test_the_residual_norms_of_the_history_are_the_true_ones(method, preconditioned, damp):
    A = with_singular_values(40, 30, torch.logspace(0, -2, 30, dtype=torch.float64))
    b = 5 * any_side(A)
    M = torch.diag(1 / (A**2).sum(0)) if preconditioned else None
    options = dict(method=method, rtol=0.0, damp=damp, M=M)
    operator = ns.aslinearoperator(A, full_rank=True)
    _, info = ns.lstsq_ex(operator, b, maxiter=10, history=True, **options)
    assert info.history.shape == (11,)
    for k in range(11):
        x, record = ns.lstsq_ex(operator, b, maxiter=k, **options)
        whole = math.hypot(torch.linalg.vector_norm(b - A @ x).item(), damp * torch.linalg.vector_norm(x).item())
        assert info.history[k].item() == pytest.approx(whole, rel=1e-8), k
        assert record.norm_r == pytest.approx(whole, rel=1e-8)
    if method == "lsqr":
        assert (info.history.diff() <= 1e-12).all()


# -- the record --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize("method", [*ANY_RANK, "qr", "craig", "minres_qlp"])
def test_the_norms_of_the_record_are_those_of_dense_algebra(method, damp):
    if method in ("craig", "minres_qlp") and damp:
        return
    scale = 7.0
    if method == "minres_qlp":
        A = with_eigenvalues(torch.linspace(1, 3, 60).double() * torch.sign(randn(60)), torch.complex128)
    else:
        A = with_singular_values(60, 40, torch.linspace(1, 3, 40), torch.complex128)
    A = scale * A
    b = consistent_side(A) if method == "craig" else any_side(A)
    x, info = ns.lstsq_ex(A, b, method=method, damp=damp, rtol=1e-3)
    assert info.converged
    norm = torch.linalg.vector_norm
    r = b - A @ x
    assert info.norm_x == pytest.approx(norm(x).item(), rel=1e-12)
    assert info.norm_r == pytest.approx(math.hypot(norm(r).item(), damp * norm(x).item()), rel=1e-12)
    assert info.residual_norm == pytest.approx(norm(r).item(), rel=1e-12)
    assert info.relative_residual == pytest.approx((norm(r) / norm(b)).item(), rel=1e-12)
    assert info.norm_Ar == pytest.approx(norm(A.mH @ r - damp**2 * x).item(), rel=1e-6, abs=1e-12 * scale)
    whole = torch.cat([A, damp * torch.eye(A.shape[1], dtype=A.dtype)])
    if method != "svd":
        assert torch.linalg.matrix_norm(whole, ord=2) / 2 <= info.norm_A <= torch.linalg.matrix_norm(whole) * (1 + 1e-10)
    else:
        assert info.norm_A == pytest.approx(torch.linalg.matrix_norm(whole, ord=2).item())
    condition = torch.linalg.cond(whole).item()
    assert info.cond_A <= condition * (1 + 1e-6)
    if method == "svd":
        assert info.cond_A == pytest.approx(condition)
    elif method != "craig":
        assert info.cond_A >= 1.2
    _, plain = ns.solve_ex(with_eigenvalues(torch.ones(3).double()), torch.ones(3).double(), method="cg")
    assert plain.norm_r is None
    assert plain.cond_A is None


@pytest.mark.parametrize("method", KRYLOV)
def test_the_condition_number_is_found_also_where_the_smallest_singular_value_comes_first(method):
    A = torch.diag(torch.tensor([1.0, 1000.0], dtype=torch.float64))
    _, info = ns.lstsq_ex(A, torch.tensor([1.0, 1e-10], dtype=torch.float64), method=method, rtol=1e-13)
    assert info.converged
    assert 900 <= info.cond_A <= 1000 * (1 + 1e-6)


def state_of(method: str, space: Any, A: Tensor, rhs: Tensor, **options: Any) -> tuple[Any, Any]:
    problem = Correction(
        space=space, apply=lambda v: times(A, v), preconditioner=None, rhs=rhs.clone(), steps=100, **options,
        target=torch.zeros(rhs.shape[:-1], dtype=torch.float64) if rhs.ndim > 1 else 0.0,
        adjoint=lambda u: times(A.mH, u), matrix=A.reshape((1,) * (rhs.ndim - 1) + A.shape),
    )  # fmt: skip
    return METHODS[method](), METHODS[method]().init(problem)


def unit_side(A: Tensor, *seeds: int) -> Tensor:
    b = torch.stack([any_side(A, s) for s in seeds])
    return b / torch.linalg.vector_norm(b, dim=-1, keepdim=True)


@pytest.mark.parametrize("name", [*KRYLOV, "minres_qlp"])
def test_the_estimates_of_a_step_are_the_true_norms(name):
    A = with_singular_values(30, 20, torch.logspace(0, -1.5, 20, dtype=torch.float64), torch.complex128)
    if name == "minres_qlp":
        A = with_eigenvalues(torch.logspace(0, -1.5, 20).double() * torch.sign(randn(20)), torch.complex128)
    b = unit_side(A, 1)[0]
    method, state = state_of(name, HostSpace(b), A, b)
    norm_A, condition, before = torch.linalg.matrix_norm(A), torch.linalg.cond(A), 0.0
    for _ in range(10):
        r = b - times(A, method.solution(state))
        normal = torch.linalg.vector_norm(times(A.mH, r)).item()
        assert state.residual_norm == pytest.approx(torch.linalg.vector_norm(r).item(), rel=1e-9)
        if name == "minres_qlp":  # which counts what shortening the solution would add
            assert normal * (1 - 1e-9) <= state.normal_norm
        else:
            assert state.normal_norm == pytest.approx(normal, rel=1e-9)
        assert state.norm_A <= norm_A * (1 + 1e-10)
        assert before <= state.cond_A <= condition * (1 + 1e-6)
        before, state = state.cond_A, method.step(state)
    assert before > 3


@pytest.mark.parametrize("name", ["lsmr", "lsqr", "craig"])
def test_a_preconditioner_on_the_left_measures_the_residual(name):
    """As the adjoint solve of a preconditioned problem has it: in its norm, scaled to begin with that of the side."""
    A, D = matrix((9, 9), dtype=torch.complex128), torch.linspace(0.2, 3, 9, dtype=torch.float64)
    b = unit_side(A, 1)[0]
    method, state = state_of(name, HostSpace(b), A, b, left_preconditioner=lambda u: D * u)
    first = torch.linalg.vector_norm(D.sqrt() * b)
    for step in range(5):
        r = b - A @ method.solution(state)
        assert state.residual_norm == pytest.approx((torch.linalg.vector_norm(D.sqrt() * r) / first).item(), rel=1e-9), step
        state = method.step(state)


@pytest.mark.parametrize("name", [*ANY_RANK, "craig", "qr"])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_the_dual_of_every_step_gives_the_iterate(name, dtype):
    for shape in ("tall", "wide"):
        A = matrix(SHAPES[shape], "full", dtype)
        b = unit_side(A, 1, 2)
        method, state = state_of(name, TensorSpace(1), A, b, dual=True)
        _, alone = state_of(name, HostSpace(b), A, b[0], dual=True)
        for _ in range(1 if name in ("svd", "qr") else 3):
            state, alone = method.step(state), method.step(alone)
            d, q = method.solution(state), method.dual(state)
            assert torch.linalg.vector_norm(d, dim=-1).min() > 0.01
            torch.testing.assert_close(times(A.mH, q), d, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(method.dual(alone), q[0], rtol=1e-10, atol=1e-12)
    assert ns.MINRESQLP().dual(None) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("name", [*KRYLOV, "craig", "minres_qlp", "svd", "qr"])
def test_a_stopped_system_is_frozen_while_the_others_go_on(name, dtype):
    A = matrix((12, 12), dtype=dtype)
    A = A + A.mH if name == "minres_qlp" else A
    b = unit_side(A, 1, 2, 3)
    method, state = state_of(name, TensorSpace(1), A, b)
    steps = 0 if METHODS[name].direct else 3
    for _ in range(steps):
        state = method.step(state)
    before, norms = method.solution(state).clone(), state.residual_norm.clone()
    state.stop(Status.STOPPED, torch.tensor([False, True, False]))
    for _ in range(3 if steps else 1):
        state = method.step(state)
    after = method.solution(state)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=tolerance)
    torch.testing.assert_close(method.solution(state), after, rtol=0, atol=0)  # to ask for it changes nothing
    assert state.residual_norm[1] == norms[1]
    assert state.status[1] == Status.STOPPED
    for index in (0, 2):  # the others are where they would be alone
        _, alone = state_of(name, HostSpace(b), A, b[index])
        for _ in range(2 * steps or 1):
            alone = method.step(alone)
        torch.testing.assert_close(after[index], method.solution(alone), rtol=0, atol=100 * tolerance)
        assert not torch.allclose(after[index], before[index], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", [*KRYLOV, "craig", "minres_qlp", "svd", "qr"])
def test_a_zero_system_of_a_batch_never_runs(name):
    A = with_eigenvalues(torch.tensor([1.0, 2, -3, 4]).double())
    b = torch.stack([torch.zeros(4, dtype=torch.float64), *unit_side(A, 1)])
    method, state = state_of(name, TensorSpace(1), A, b)
    assert (state.status == RUNNING).tolist() == [False, True]
    for _ in range(1 if METHODS[name].direct else 3):
        state = method.step(state)
    assert torch.equal(method.solution(state)[0], torch.zeros(4, dtype=torch.float64))
    assert torch.isfinite(method.solution(state)).all()
    assert state.status[0] == CLAIMED


# -- damping, weights and a prior centre ---------------------------------------------------------------------------------


def stacked_solution(
    A: Tensor, b: Tensor, lam: Any, L: Tensor, w: Tensor | None = None, centre: Tensor | None = None
) -> Tensor:
    """The minimiser of `sum w |A x - b|^2 + lam^2 |L (x - centre)|^2`, of several the one that is nearest to the centre."""
    centre = A.new_zeros(A.shape[-1]) if centre is None else centre
    root = torch.ones_like(b.real) if w is None else w.expand(b.shape).sqrt()
    whole = torch.cat([root[:, None] * A, torch.as_tensor(lam, dtype=torch.float64) * L])
    right = torch.cat([root * (b - A @ centre), b.new_zeros(len(L))])
    return centre + torch.linalg.pinv(whole, rtol=1e-10) @ right


def differences(n: int, dtype: torch.dtype) -> Tensor:
    return torch.eye(n, dtype=dtype).diff(dim=0)


PENALTIES: dict[str, Callable[[Tensor], Any]] = {
    "matrix": lambda L: L,
    "operator": lambda L: ns.aslinearoperator(L),
    "function": lambda L: lambda v: v.diff(),
    "operator with adjoint": lambda L: ns.LinearOperator(
        lambda v: L @ v, adjoint=lambda u: L.mH @ u, domain=L[0], codomain=L[:, 0]
    ),
    "sparse": lambda L: L.to_sparse_coo(),
}


@pytest.mark.parametrize("form", ["dense", "function", "operator with adjoint"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("method", [*KRYLOV, None])
def test_a_penalty_of_its_own_operator(method, penalty, form):
    for shape, dtype, lam in (((9, 6), torch.float64, 0.7), ((4, 6), torch.complex128, torch.tensor(0.7, dtype=torch.float64))):
        A, L = matrix(shape, "full", dtype), differences(6, dtype)
        b = any_side(A)
        x, info = ns.lstsq_ex(
            FORMS[form](A), b, damp=(lam, PENALTIES[penalty](L)), domain=A[0] if form == "function" else None,
            method=method, rtol=1e-13,
        )  # fmt: skip
        assert info.converged
        assert error(x, stacked_solution(A, b, lam, L)) <= 1e-9
        assert info.residual_norm == pytest.approx(torch.linalg.vector_norm(b - A @ x).item())
        assert info.norm_r == pytest.approx(math.hypot(info.residual_norm, 0.7 * torch.linalg.vector_norm(L @ x).item()))


@pytest.mark.parametrize("method", [*KRYLOV, None])
def test_a_penalty_that_maps_to_a_tree_and_a_batch_of_numbers(method):
    A = matrix((4, 6))
    b = torch.stack([any_side(A, s) for s in (1, 2)])
    lam = torch.tensor([0.5, 2.0], dtype=torch.float64)
    L = torch.cat([differences(6, A.dtype), torch.eye(6, dtype=A.dtype)[:1]])
    x = ns.lstsq(
        lambda v: times(A, v), b, damp=(lam, lambda v: {"slopes": v.diff(), "first": v[:, 0]}), domain=b.new_zeros(2, 6),
        batch_dims=1, method=method, rtol=1e-13,
    )  # fmt: skip
    for k in range(2):
        assert error(x[k], stacked_solution(A, b[k], lam[k], L)) <= 1e-9


@pytest.mark.parametrize("method", [*ANY_RANK, "qr"])
def test_a_large_damping_gives_a_small_solution_and_a_zero_one_none(method):
    A = matrix((9, 5))
    b = any_side(A)
    x = ns.lstsq(A, b, damp=1e6, method=method, rtol=1e-13)
    assert error(x, 1e-12 * (A.mT @ b)) <= 1e-6
    none = torch.tensor(0.0, dtype=torch.float64)
    assert error(ns.lstsq(A, b, damp=none, method=method, rtol=1e-13), pseudo_inverse_solution(A, b)) <= 1e-9
    assert error(ns.lstsq(A, b, damp=-0.3, method=method, rtol=1e-13), pseudo_inverse_solution(A, b, 0.3)) <= 1e-9


@pytest.mark.parametrize("form", ["dense", "function", "operator with adjoint", "CSR"])
@pytest.mark.parametrize("method", [*KRYLOV, None])
def test_weights(method, form):
    for shape, dtype in (((9, 5), torch.complex128), ((5, 9), torch.float64)):
        A = matrix(shape, "full", dtype)
        b, weight = any_side(A), torch.linspace(0.2, 3, shape[0], dtype=torch.float64)
        zeros = weight.clone()
        zeros[:2] = 0
        operator, domain = FORMS[form](A), A[0] if form == "function" else None
        for w in (weight, zeros, torch.tensor(4.0, dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)):
            for damp in (0.0, 0.3):
                x, info = ns.lstsq_ex(operator, b, weight=w, damp=damp, domain=domain, method=method, rtol=1e-13)
                assert info.converged
                expected = stacked_solution(A, b, damp, torch.eye(shape[1], dtype=dtype), w)
                assert error(x, expected) <= 1e-9
        root = weight.sqrt()
        x, info = ns.lstsq_ex(operator, b, weight=weight, domain=domain, method=method)
        assert info.residual_norm == pytest.approx(torch.linalg.vector_norm(root * (b - A @ x)).item(), abs=1e-12)


@pytest.mark.parametrize("method", KRYLOV)
def test_weights_of_trees_and_of_batches(method):
    A = matrix((9, 5))
    b, weight = any_side(A), torch.linspace(0.2, 3, 9, dtype=torch.float64)
    x = ns.lstsq(
        lambda v: {"a": A[:4] @ v, "b": A[4:] @ v}, {"a": b[:4], "b": b[4:]}, weight={"b": weight[4:], "a": weight[:4]},
        domain=A[0], method=method, rtol=1e-13,
    )  # fmt: skip
    assert error(x, stacked_solution(A, b, 0.0, torch.eye(5, dtype=A.dtype), weight)) <= 1e-9
    many, each = torch.stack([b, 2 * b + 1]), torch.stack([weight, weight.flip(0)])
    for w in (each, weight):
        x = ns.lstsq(
            lambda v: times(A, v), many, weight=w, domain=many.new_zeros(2, 5), batch_dims=1, method=method, rtol=1e-13
        )
        for k in range(2):
            expected = stacked_solution(A, many[k], 0.0, torch.eye(5, dtype=A.dtype), w[k] if w.ndim == 2 else w)
            assert error(x[k], expected) <= 1e-9


@pytest.mark.parametrize("form", ["dense", "function"])
@pytest.mark.parametrize("method", [*KRYLOV, None])
def test_a_prior_centre(method, form):
    for shape, rank in (((9, 5), "full"), ((5, 9), "full"), ((9, 5), "product")):
        A = matrix(shape, rank, torch.complex128)
        b, centre = any_side(A), randn(shape[1], dtype=torch.complex128, seed=9)
        eye, weight = torch.eye(shape[1], dtype=A.dtype), torch.linspace(1, 2, shape[0], dtype=torch.float64)
        for damp in (0.0, 0.5):
            for w in (None, weight):
                x, info = ns.lstsq_ex(FORMS[form](A), b, damp=damp, weight=w, x_ref=centre, method=method, rtol=1e-13)
                assert info.converged
                assert error(x, stacked_solution(A, b, damp, eye, w, centre)) <= 1e-9
        x = ns.lstsq(FORMS[form](A), b, x_ref=centre, x0=centre, method=method, rtol=1e-13)
        assert error(x, stacked_solution(A, b, 0.0, eye, None, centre)) <= 1e-9
        x = ns.lstsq(FORMS[form](A), b, x_ref=centre, damp=(0.5, differences(shape[1], A.dtype)), method=method, rtol=1e-13)
        assert error(x, stacked_solution(A, b, 0.5, differences(shape[1], A.dtype), None, centre)) <= 1e-9
        x, info = ns.lstsq_ex(FORMS[form](A), A @ centre, x_ref=centre, method=method)
        assert info.converged
        torch.testing.assert_close(x, centre)


# -- SciPy -------------------------------------------------------------------------------------------------------------


def scipy_iterate(method: str, A: Tensor, b: Tensor, damp: float, steps: int) -> Tensor:
    """SciPy's iterate after exactly `steps` steps; of a complex problem that of the real one of twice the size."""
    if A.is_complex():
        both = torch.cat([torch.cat([A.real, -A.imag], dim=1), torch.cat([A.imag, A.real], dim=1)])
        x = scipy_iterate(method, both, torch.cat([b.real, b.imag]), damp, steps)
        return torch.complex(x[: A.shape[1]], x[A.shape[1] :])
    limit = "maxiter" if method == "lsmr" else "iter_lim"
    options = {"damp": damp, "atol": 0.0, "btol": 0.0, "conlim": 0.0, limit: steps}
    x, *_ = getattr(scipy.sparse.linalg, method)(A.numpy(), b.numpy(), **options)
    return torch.from_numpy(np.asarray(x))


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("damp", [0.0, 0.5])
@pytest.mark.parametrize("method", ["lsmr", "lsqr", "cgls"])
def test_iterates_are_those_of_scipy(method, damp, steps):
    for shape, dtype in (((20, 12), torch.float64), ((12, 20), torch.float64), ((15, 12), torch.complex128)):
        A = with_singular_values(*shape, torch.logspace(0, -1.5, 12, dtype=torch.float64), dtype)
        b = torch.stack([any_side(A, 1), any_side(A, 2)])
        batch, record = ns.lstsq_ex(
            lambda v, A=A: times(A, v), b, damp=damp, domain=b.new_zeros(2, shape[1]), batch_dims=1, method=method, rtol=0.0,
            maxiter=steps,
        )  # fmt: skip
        assert record.iterations.tolist() == [steps, steps]
        for k in range(2):
            expected = scipy_iterate("lsqr" if method == "cgls" else method, A, b[k], damp, steps)
            x, info = ns.lstsq_ex(A, b[k], damp=damp, method=method, rtol=0.0, maxiter=steps)
            assert info.iterations == steps
            assert info.status is Status.MAXITER
            torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(batch[k], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("method", ["lsmr", "lsqr", "cgls"])
def test_preconditioned_iterates_are_those_of_the_scaled_problem(method, steps):
    """With `M = D^2` the method is that of `A D`, for `x = D y`."""
    A = with_singular_values(20, 12, torch.logspace(0, -1.5, 12, dtype=torch.float64))
    D = torch.linspace(0.5, 3, 12, dtype=torch.float64)
    b = any_side(A)
    operator = ns.aslinearoperator(A, full_rank=True)
    x, info = ns.lstsq_ex(operator, b, method=method, M=lambda s: D * D * s, rtol=0.0, maxiter=steps)
    assert info.iterations == steps
    expected = D * scipy_iterate("lsqr" if method == "cgls" else method, A * D, b, 0.0, steps)
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["lsmr", "lsqr", "cgls"])
def test_the_functions_with_the_names_of_scipy(name):
    A = matrix((9, 5))
    b, x0 = any_side(A), randn(5, seed=4)
    x, info = getattr(ns, name)(A, b)
    assert info.method == name
    assert info.norm_Ar <= 1e-5 * info.norm_A * info.norm_r
    x, info = getattr(ns, name)(lambda v: A @ v, b, x0, damp=0.3, rtol=1e-13, maxiter=50)
    assert error(x, pseudo_inverse_solution(A, b, 0.3)) <= 1e-9
    x, info = getattr(ns, name)(lambda v: A @ v, b, domain=A[0], maxiter=1, rtol=1e-13)
    assert info.status is Status.MAXITER


# -- preconditioners -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damp", [0.0, 1e-3])
@pytest.mark.parametrize("method", KRYLOV)
def test_a_preconditioner_saves_iterations_and_keeps_the_solution(method, damp):
    for dtype in WIDE:
        A = with_singular_values(60, 40, torch.linspace(1, 3, 40), dtype) * torch.logspace(0, 3, 40, dtype=torch.float64)
        b = any_side(A)
        scale = 1 / (A.abs() ** 2).sum(0)
        operator = A if damp else ns.aslinearoperator(A, full_rank=True)
        for M in (lambda s, scale=scale: scale * s, torch.diag(scale).to(dtype)):
            _, plain = ns.lstsq_ex(operator, b, damp=damp, method=method)
            x, info = ns.lstsq_ex(operator, b, damp=damp, method=method, M=M, rtol=1e-12)
            assert info.converged
            assert info.iterations < 60 < plain.iterations / 2
            assert error(x, pseudo_inverse_solution(A, b, damp)) <= 1e-9


@pytest.mark.parametrize("method", KRYLOV)
def test_the_inverse_of_the_gram_matrix_needs_one_step(method):
    A = matrix((9, 5), dtype=torch.complex128)
    b = torch.stack([any_side(A, 1), consistent_side(A, 2)])
    M = torch.linalg.inv(A.mH @ A)
    x, info = ns.lstsq_ex(ns.aslinearoperator(A, full_rank=True), b, method=method, M=(M + M.mH) / 2, rtol=1e-12)
    assert info.converged.all()
    assert info.iterations.max() <= 2
    assert error(x, pseudo_inverse_solution(A, b)) <= 1e-9


@pytest.mark.parametrize("method", KRYLOV)
def test_a_preconditioner_of_the_wrong_sign_is_indefinite(method):
    A = ns.aslinearoperator(matrix((9, 5)), full_rank=True)
    _, info = ns.lstsq_ex(A, any_side(A.matrix), method=method, M=lambda s: -s)
    assert info.status is Status.INDEFINITE


@pytest.mark.parametrize("method", KRYLOV)
def test_a_preconditioner_that_returns_nan_is_nonfinite(method):
    A = ns.aslinearoperator(matrix((9, 5)), full_rank=True)
    _, info = ns.lstsq_ex(A, any_side(A.matrix), method=method, M=lambda s: s * torch.nan)
    assert info.status is Status.NONFINITE


# -- gradients of the two methods that are tested here only --------------------------------------------------------------


def first_and_second(solution: Callable[[Tensor, Tensor], Tensor], A: Tensor, b: Tensor) -> list[Tensor]:
    """The gradient of a loss of the solution, and that of a function of this gradient."""
    first = torch.autograd.grad((solution(A, b).abs() ** 2).sum(), (A, b), create_graph=True)
    return [*first, *torch.autograd.grad(sum((part.abs() ** 2).sum() for part in first), (A, b))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_the_factors_of_qr_serve_the_adjoint_solve_and_the_second_order(shape, dtype):
    A = matrix(SHAPES[shape], dtype=dtype)
    A, b, names = A.requires_grad_(), any_side(A).requires_grad_(), []

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Called():
        got = first_and_second(lambda A, b: ns.lstsq(A, b, method="qr", rtol=1e-13), A, b)
    assert names.count("linalg_qr") == 1
    for part, expected in zip(got, first_and_second(lambda A, b: torch.linalg.pinv(A) @ b, A, b), strict=True):
        assert error(part, expected) <= 1e-9


@pytest.mark.parametrize("damped", [False, True])
def test_the_gradient_of_minres_qlp_is_that_of_the_pseudo_inverse(damped):
    V, b = randn(6, 3).requires_grad_(), randn(6, seed=1).requires_grad_()
    middle = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    more = 0.5 * torch.eye(6, dtype=torch.float64) if damped else 0.0  # then A is not singular, and solve takes it

    def ours(V: Tensor, b: Tensor) -> Tensor:
        A = V @ middle @ V.mT + more
        return ns.solve(A, b, method="minres_qlp", rtol=1e-11) if damped else ns.lstsq(A, b, method="minres_qlp", rtol=1e-10)

    def reference(V: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.pinv(V @ middle @ V.mT + more, rtol=1e-10) @ b

    got = torch.autograd.grad((ours(V, b) ** 2).sum(), (V, b))
    for part, expected in zip(got, torch.autograd.grad((reference(V, b) ** 2).sum(), (V, b)), strict=True):
        assert error(part, expected) <= 1e-7


# -- unrolling -----------------------------------------------------------------------------------------------------------


def cgls_by_hand(A: Tensor, b: Tensor, steps: int) -> Tensor:
    x, r = A.new_zeros(A.shape[1]), b
    s = A.mT @ r
    p, gamma = s, s @ s
    for _ in range(steps):
        q = A @ p
        alpha = gamma / (q @ q)
        x, r = x + alpha * p, r - alpha * q
        s = A.mT @ r
        new = s @ s
        p, gamma = s + new / gamma * p, new
    return x


def bidiagonalisation(A: Tensor, b: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """`V`, the lower bidiagonal `B` of shape `(steps + 1, steps)`, and `beta_1`; `V` has one vector more."""
    beta = beta_1 = b.norm()
    u = b / beta
    v = A.mT @ u
    alpha = v.norm()
    v = v / alpha
    V, entries = [v], []
    for _ in range(steps):
        u = A @ v - alpha * u
        beta = u.norm()
        u = u / beta
        entries.append((alpha, beta))
        v = A.mT @ u - beta * v
        alpha = v.norm()
        v = v / alpha
        V.append(v)
    entries.append((alpha, alpha * 0))
    columns = []
    for k, (a, c) in enumerate(entries):
        columns.append(torch.stack([a if i == k else c if i == k + 1 else a * 0 for i in range(steps + 1)]))
    return torch.stack(V, dim=1), torch.stack(columns, dim=1), beta_1


def lsqr_by_hand(A: Tensor, b: Tensor, steps: int) -> Tensor:
    """`V y` with `min |B y - beta_1 e_1|`."""
    V, B, beta_1 = bidiagonalisation(A, b, steps)
    B, e = B[:, :steps], torch.eye(steps + 1, dtype=A.dtype)[0]
    return V[:, :steps] @ (torch.linalg.inv(B.mT @ B) @ (B.mT @ (beta_1 * e)))


def lsmr_by_hand(A: Tensor, b: Tensor, steps: int) -> Tensor:
    """`V y` with the smallest `|A^T (b - A V y)| = |B^T (beta_1 e_1 - B y)|` over all of `V`."""
    V, whole, beta_1 = bidiagonalisation(A, b, steps)
    G, e = whole.mT @ whole[:, :steps], torch.eye(steps + 1, dtype=A.dtype)[0]
    return V[:, :steps] @ (torch.linalg.inv(G.mT @ G) @ (G.mT @ (whole.mT @ (beta_1 * e))))


@pytest.mark.parametrize("form", ["dense", "function", "operator with adjoint"])
@pytest.mark.parametrize("method", KRYLOV)
def test_the_unrolled_gradient_is_that_of_a_loop_written_by_hand(method, form):
    by_hand = {"cgls": cgls_by_hand, "lsqr": lsqr_by_hand, "lsmr": lsmr_by_hand}[method]
    for shape in SHAPES.values():
        A, c = matrix(shape).requires_grad_(), randn(shape[1], seed=8)
        b = any_side(A.detach()).requires_grad_()
        expected = by_hand(A, b, 3)
        operator = FORMS[form](A)
        domain = c if form == "function" else None
        x = ns.lstsq(operator, b, domain=domain, method=method, maxiter=3, rtol=1e-13, grad="unroll", on_failure="ignore")
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-10)
        truth = torch.autograd.grad(expected @ c, (A, b))
        for got, wanted in zip(torch.autograd.grad(x @ c, (A, b)), truth, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)


# -- the front door ------------------------------------------------------------------------------------------------------

A, B, X = matrix((9, 5)), any_side(matrix((9, 5))), torch.zeros(5, dtype=torch.float64)


def function(v: Tensor) -> Tensor:
    return A @ v


EYE = torch.eye(5, dtype=torch.float64)
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "no domain": (ValueError, "^domain: ", lambda: ns.lstsq(function, B)),
    "a domain that is no tensor": (TypeError, "^domain: ", lambda: ns.lstsq(function, B, domain=5)),
    "a domain of another shape": (ValueError, "^domain: ", lambda: ns.lstsq(A, B, domain=B)),
    "a domain of another batch": (
        ValueError, "^domain: expected the batch dimensions",
        lambda: ns.lstsq(function, B.expand(2, 9), domain=X.expand(3, 5), batch_dims=1),
    ),
    "a domain that the function does not take": (RuntimeError, "mat", lambda: ns.lstsq(function, B, domain=X[:4])),
    "b of another shape": (ValueError, r"^b: expected shape \(\.\.\., 9\)", lambda: ns.lstsq(A, X)),
    "b of another dtype": (ValueError, "^b: expected a dtype", lambda: ns.lstsq(A, B.float())),
    "b of integers": (ValueError, "^b: expected a floating-point", lambda: ns.lstsq(A, torch.ones(9, dtype=torch.int64))),
    "b of numpy": (TypeError, "^b: .*torch.from_numpy", lambda: ns.lstsq(A, B.numpy())),
    "A of no kind": (TypeError, "^A: ", lambda: ns.lstsq("A", B)),
    "A that returns another shape": (ValueError, "^A: expected A", lambda: ns.lstsq(lambda v: v, B, domain=X)),
    "an unknown option": (TypeError, "unknown option 'dampp'; did you mean 'damp'", lambda: ns.lstsq(A, B, dampp=1.0)),
    "an unknown option of a function": (TypeError, "did you mean 'damp'", lambda: ns.lsmr(A, B, damping=1.0)),
    "an unknown option of a method": (TypeError, "SVD: unknown option 'rcon'", lambda: ns.SVD(rcon=0.1)),
    "an unknown method": (ValueError, "did you mean 'lsmr'", lambda: ns.lstsq(A, B, method="lsmrr")),
    "a method for square systems": (ValueError, "^method: expected a least-squares", lambda: ns.lstsq(A, B, method="cg")),
    "a method object for those": (ValueError, "^method: expected a least", lambda: ns.lstsq(A, B, method=ns.GMRES())),
    "a class": (TypeError, r"write LSMR\(\)", lambda: ns.lstsq(A, B, method=ns.LSMR)),
    "SVD for a function": (ValueError, "^method: 'svd' needs", lambda: ns.lstsq(function, B, domain=X, method="svd")),
    "QR for a function": (ValueError, "^method: 'qr' needs", lambda: ns.lstsq(function, B, domain=X, method="qr")),
    "a Hermitian method for a tall A": (ValueError, "^method: 'minres_qlp'", lambda: ns.lstsq(A, B, method="minres_qlp")),
    "a Hermitian method with an operator in damp": (
        ValueError, "^method: 'minres_qlp'",
        lambda: ns.lstsq(EYE, X + 1, damp=(0.1, EYE), method="minres_qlp"),
    ),
    "a Hermitian method with weights": (
        ValueError, "^weight: ",
        lambda: ns.lstsq(EYE, X + 1, weight=EYE[0], method="minres_qlp"),
    ),
    "complex damping": (TypeError, "^damp: expected a real", lambda: ns.lstsq(A, B, damp=1j)),
    "a complex tensor of damping": (TypeError, "^damp: ", lambda: ns.lstsq(A, B, damp=torch.tensor(1j))),
    "damping by an integer tensor": (TypeError, "^damp: ", lambda: ns.lstsq(A, B, damp=torch.tensor(1))),
    "NaN for damping": (ValueError, "^damp: expected a finite", lambda: ns.lstsq(A, B, damp=math.nan)),
    "a NaN tensor of damping": (ValueError, "^damp: expected finite", lambda: ns.lstsq(A, B, damp=torch.tensor(math.inf))),
    "damping of a wrong shape": (ValueError, "^damp: expected a 0-d", lambda: ns.lstsq(A, B, damp=torch.ones(5))),
    "a truth value for damping": (TypeError, "^damp: ", lambda: ns.lstsq(A, B, damp=True)),
    "three parts of damping": (TypeError, "^damp: .*got 3 items", lambda: ns.lstsq(A, B, damp=(1, 2, 3))),
    "a penalty of another domain": (
        ValueError, "^damp: ", lambda: ns.lstsq(A, B, damp=(1.0, torch.eye(4, dtype=torch.float64))),
    ),
    "a negative weight": (ValueError, "^weight: .*at least 0", lambda: ns.lstsq(A, B, weight=-torch.ones_like(B))),
    "a NaN weight": (ValueError, "^weight: ", lambda: ns.lstsq(A, B, weight=torch.full_like(B, math.nan))),
    "an infinite weight": (ValueError, "^weight: ", lambda: ns.lstsq(A, B, weight=torch.full_like(B, math.inf))),
    "a weight of another shape": (ValueError, "^weight: expected a shape", lambda: ns.lstsq(A, B, weight=X)),
    "a weight of another dtype": (ValueError, "^weight: expected dtype", lambda: ns.lstsq(A, B, weight=torch.ones(9))),
    "a number for a weight": (TypeError, "^weight: ", lambda: ns.lstsq(A, B, weight=2.0)),
    "a weight of another structure": (TypeError, "^weight: ", lambda: ns.lstsq(A, B, weight=[B, B])),
    "a zero weight with a gradient": (
        ValueError, "^weight: its gradient", lambda: ns.lstsq(A, B, weight=torch.zeros_like(B).requires_grad_()),
    ),
    "a preconditioner without full rank": (ValueError, "^M: .*full_rank=True", lambda: ns.lstsq(A, B, M=lambda s: s)),
    "a preconditioner where weights of zero take the rank away": (
        ValueError, "^M: .*full_rank=True",
        lambda: ns.lstsq(ns.aslinearoperator(A, full_rank=True), B, M=lambda s: s, weight=torch.zeros_like(B)),
    ),
    "a preconditioner of a direct method": (
        ValueError, "^M: a direct method",
        lambda: ns.lstsq(ns.aslinearoperator(A, full_rank=True), B, M=lambda s: s, method="svd"),
    ),
    "a preconditioner of another size": (
        ValueError, "^M: expected a matrix", lambda: ns.lstsq(A, B, damp=0.1, M=torch.eye(9, dtype=torch.float64)),
    ),
    "a preconditioner in solve": (
        ValueError, "^M: 'lsmr' takes no M",
        lambda: ns.solve(torch.eye(5, dtype=torch.float64), X, method="lsmr", M=lambda s: s),
    ),
    "a guess of another shape": (ValueError, "^x0: expected shape", lambda: ns.lstsq(A, B, x0=B)),
    "a centre of another shape": (ValueError, "^x_ref: expected shape", lambda: ns.lstsq(A, B, x_ref=B)),
    "a negative tolerance": (ValueError, "^rtol: ", lambda: ns.lstsq(A, B, rtol=-1.0)),
    "a limit that is no integer": (TypeError, "^maxiter: ", lambda: ns.lstsq(A, B, maxiter=2.5)),
    "an unknown mode": (ValueError, "^grad: ", lambda: ns.lstsq(A, B, grad="explicit")),
    "an unknown policy": (ValueError, "^on_failure: ", lambda: ns.lstsq(A, B, on_failure="shout")),
    "a tall A in solve": (ValueError, "^A: expected a square", lambda: ns.solve(A, B, method="lsmr")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_in_words_that_name_the_argument(name):
    kind, pattern, call = REFUSED[name]
    with pytest.raises(kind, match=pattern):
        call()


def test_a_hermitian_method_or_claim_makes_the_domain_known():
    A = with_eigenvalues(torch.tensor([0.0, 1, -2, 3]).double())
    b = any_side(A)
    expected = pseudo_inverse_solution(A, b)
    operator = ns.LinearOperator(lambda v: A @ v, hermitian=True)
    for method in ("minres_qlp", "lsmr", None):
        assert error(ns.lstsq(operator, b, method=method), expected) <= 1e-6
    assert error(ns.lstsq(lambda v: A @ v, b, method="minres_qlp"), expected) <= 1e-6
