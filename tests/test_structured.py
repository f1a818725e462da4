"""Structured matrices: what the grid of operators cannot say of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import torch
from operator_cases import draw
from torch import Tensor

import nablasolve as ns
from nablasolve import LinearOperator, aslinearoperator
from nablasolve.operators import (
    Banded,
    Circulant,
    Diagonal,
    Hankel,
    Identity,
    LowRank,
    Permutation,
    Toeplitz,
    Triangular,
    Tridiagonal,
)

F32, F64, C128 = torch.float32, torch.float64, torch.complex128


def close(value: Tensor, expected: Tensor, tolerance: float = 1e-11) -> bool:
    return value.shape == expected.shape and float((value - expected).abs().max()) <= tolerance * float(expected.abs().max())


def column_aligned(below: int, above: int, n: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    """Bands as `scipy.linalg.solve_banded` takes them, with NaN outside of the matrix."""
    bands = draw(below + above + 1, n, dtype=dtype, seed=seed)
    for row, offset in enumerate(range(above, -below - 1, -1)):
        bands[row, : max(offset, 0)] = torch.nan
        bands[row, n + min(offset, 0) :] = torch.nan
    return bands


# -- banded ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
@pytest.mark.parametrize(("below", "above"), [(1, 1), (0, 1), (3, 0), (2, 5), (7, 1)])
@pytest.mark.parametrize("n", [8, 9, 61, 200])
def test_a_banded_solve_is_as_accurate_as_that_of_lapack(n: int, below: int, above: int, dtype: torch.dtype) -> None:
    """No dominance: LAPACK pivots, and the residual of either is rounding of `|B| |x|`."""
    bands = column_aligned(below, above, n, dtype, seed=n)
    b = draw(n, dtype=dtype, seed=1)
    B = Banded(bands, range(above, -below - 1, -1))
    factors = B.factorise()
    assert factors is not None
    matrix = scipy.sparse.dia_array((bands.nan_to_num().numpy(), list(range(above, -below - 1, -1))), shape=(n, n)).toarray()
    assert np.array_equal(B.to_dense().numpy(), matrix)
    norm = np.linalg.norm(matrix)
    for x, M in ((factors.solve(b), matrix), (factors.solve_adjoint(b), matrix.conj().T)):
        error = np.linalg.norm(M @ x.numpy() - b.numpy()) / (norm * np.linalg.norm(x.numpy()))
        assert error < 1e-15
    if below == above == 1:
        assert np.linalg.cond(matrix) < 1e6
        assert close(
            ns.solve(B, b), torch.from_numpy(scipy.linalg.solve_banded((1, 1), bands.nan_to_num().numpy(), b.numpy())), 1e-9
        )


def test_bands_stand_where_scipy_puts_them() -> None:
    diagonals, offsets = [draw(6), draw(4, seed=1), draw(5, seed=2)], [0, 2, -1]
    expected = scipy.sparse.diags_array([d.numpy() for d in diagonals], offsets=offsets).toarray()
    assert np.array_equal(Banded(diagonals, offsets).to_dense().numpy(), expected)
    stored = scipy.sparse.dia_array(expected)
    assert np.array_equal(Banded(torch.from_numpy(stored.data), stored.offsets).to_dense().numpy(), expected)


@pytest.mark.parametrize("dtype", [F32, F64, C128], ids=str)
@pytest.mark.parametrize("first", [0.0, 1e-20, 1.0])
def test_a_tridiagonal_system_that_needs_pivoting_is_solved(first: float, dtype: torch.dtype) -> None:
    """Elimination without pivoting divides by the first entry of the diagonal."""
    n = 1000
    diagonal = torch.zeros(n, dtype=dtype)
    diagonal[0] = first
    off = torch.ones(n - 1, dtype=dtype)
    x = draw(n, dtype=dtype)
    T = Tridiagonal(off, diagonal, off)
    solution, info = ns.solve_ex(T, T(x))
    assert (info.method, info.converged) == ("direct", True)
    assert close(solution, x, 1e-3 if dtype == F32 else 1e-11)


def test_gradients_reach_all_three_bands_of_two_thousand_unknowns() -> None:
    n = 2000
    lower, diagonal, upper = draw(n - 1, seed=1), 2 * draw(n, seed=2), draw(n - 1, seed=3)
    bands = [t.requires_grad_() for t in (lower, diagonal, upper)]
    b, weights = draw(n, seed=4), draw(n, seed=5)
    b.requires_grad_()
    x, info = ns.solve_ex(Tridiagonal(*bands), b)
    assert (info.method, info.converged) == ("direct", True)
    got = torch.autograd.grad(weights @ x, [*bands, b])
    ab = np.zeros((3, n))
    ab[0, 1:], ab[1], ab[2, :-1] = (t.detach().numpy() for t in (upper, diagonal, lower))
    at = np.zeros((3, n))
    at[0, 1:], at[1], at[2, :-1] = (t.detach().numpy() for t in (lower, diagonal, upper))
    y = torch.from_numpy(scipy.linalg.solve_banded((1, 1), ab, b.detach().numpy()))
    z = torch.from_numpy(scipy.linalg.solve_banded((1, 1), at, weights.numpy()))
    for value, expected in zip(got, (-z[1:] * y[:-1], -z * y, -z[:-1] * y[1:], z), strict=True):
        assert close(value, expected, 1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_size_of_a_matrix_does_not_matter(scale: float) -> None:
    lower, diagonal, upper, b = (draw(n, dtype=F32, seed=i) for i, n in enumerate((49, 50, 49, 50)))
    diagonal = diagonal + 3
    x = ns.solve(Tridiagonal(lower * scale, diagonal * scale, upper * scale), b)
    assert close(x * scale, ns.solve(Tridiagonal(lower, diagonal, upper), b), 1e-5)


def powers_of_ten(reach: float, n: int, seed: int) -> Tensor:
    return 10 ** (reach * (2 * torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(seed)) - 1))


@pytest.mark.parametrize("what", ["rows", "rows and columns", "two columns"])
def test_rows_and_columns_of_different_sizes_do_not_matter(what: str) -> None:
    n = 60
    rows, columns = {
        "rows": (powers_of_ten(15, n, 1), torch.ones(n, dtype=F64)),
        "rows and columns": (powers_of_ten(6, n, 1), powers_of_ten(6, n, 2)),
        "two columns": (torch.ones(n, dtype=F64), 1e-20 ** (torch.arange(n) % 30 == 7).double()),
    }[what]
    bands = column_aligned(1, 1, n).nan_to_num()
    bands[1] += 3
    plain = Banded(bands, (1, 0, -1))
    M = rows[:, None] * plain.to_dense() * columns
    scaled = Tridiagonal(M.diagonal(-1), M.diagonal(), M.diagonal(1))
    x, b = draw(n, seed=4), draw(n, seed=5)
    factors = scaled.factorise()
    assert factors is not None
    expected = torch.linalg.inv(plain.to_dense())
    assert close(factors.solve(rows * b) * columns, expected @ b)
    assert close(factors.solve_adjoint(columns * x) * rows, expected.mT @ x)


def test_a_singular_band_is_solved_where_it_can_be_and_refused_elsewhere() -> None:
    n = 300
    diagonal = torch.full((n,), 2.0, dtype=F64)
    diagonal[0] = diagonal[-1] = 1  # the Laplacian of a path, which maps constants to zero
    path = Tridiagonal.symmetric(diagonal, -torch.ones(n - 1, dtype=F64))
    x = draw(n)
    solution, info = ns.solve_ex(path, path(x), rtol=1e-9)
    assert info.converged
    assert close(solution - solution.mean(), x - x.mean(), 1e-7)
    with pytest.raises(ns.ConvergenceError):
        ns.solve(path, torch.ones(n, dtype=F64))
    factors = Tridiagonal.symmetric(diagonal * 0, diagonal[1:] * 0).factorise()
    assert factors is not None
    assert factors.solve(x).isfinite().all()
    assert factors.solve_adjoint(x).isfinite().all()


def test_a_batch_of_matrices_solves_a_batch_of_systems() -> None:
    lower, diagonal, upper = draw(3, 6, seed=1), draw(3, 7, seed=2) + 4, draw(1, 6, seed=3)
    T = Tridiagonal(lower, diagonal, upper)
    b = draw(3, 7, seed=4)
    each = [Tridiagonal(lower[i], diagonal[i], upper[0]) for i in range(3)]
    x, info = ns.solve_ex(T, b, batch_dims=1)
    assert info.method == "direct"
    assert info.converged.all()
    assert close(x, torch.stack([ns.solve(A, row) for A, row in zip(each, b, strict=True)]))
    assert close(ns.solve(T, b), x)  # as one system
    assert close(T.diagonal(), diagonal)
    assert close(T.trace(), diagonal.sum(-1))


ROW, THIN = draw(5, seed=11), draw(5, 2, seed=12)
BATCHED: dict[str, Callable[[Tensor], LinearOperator]] = {
    "triangular": lambda t: Triangular(t + 4 * torch.eye(5)),
    "Toeplitz": lambda t: Toeplitz(t[..., 0], t[..., 1]),
    "Toeplitz with one row": lambda t: Toeplitz(t[..., 0], ROW),
    "circulant": lambda t: Circulant(t[..., 0]),
    "Hankel with one row": lambda t: Hankel(t[..., 0], ROW),
    "low rank": lambda t: LowRank(t[..., :2], THIN),
    "Woodbury": lambda t: Tridiagonal(ROW[1:], 4 + t[..., 0], ROW[:-1]) + LowRank(t[..., :2], THIN),
}


@pytest.mark.parametrize("name", BATCHED)
def test_operators_broadcast_their_own_batch(name: str) -> None:
    entries = draw(3, 5, 5)
    A, each = BATCHED[name](entries), [BATCHED[name](entries[i]) for i in range(3)]
    for op, singles in ((A, each), (A.H, [a.H for a in each])):
        for x in (draw(5, seed=1), draw(3, 5, seed=1), draw(2, 3, 5, seed=1)):
            rows = x.expand(*torch.broadcast_shapes(x.shape[:-1], (3,)), 5)
            assert close(op(x), torch.stack([single(rows[..., i, :]) for i, single in enumerate(singles)], dim=-2))
    factors = A.factorise()
    if factors is not None:
        b = draw(2, 3, 5, seed=2)
        assert close(A(factors.solve(b)), b, 1e-9)
        assert close(A.H(factors.solve_adjoint(b)), b, 1e-9)


def test_a_real_band_solves_for_complex_right_hand_sides() -> None:
    T = Tridiagonal(draw(6), draw(7, seed=1) + 4, draw(6, seed=2))
    b = draw(2, 7, dtype=C128, seed=3)
    x, info = ns.solve_ex(T, b, batch_dims=1)
    assert info.method == "direct"
    assert close(x, torch.linalg.solve(T.to_dense().to(C128), b.mT).mT)


def test_a_wide_band_is_solved_by_iteration() -> None:
    n = 140
    A = Banded.symmetric([torch.full((n,), 4.0, dtype=F64), draw(n - 70)], [0, 70], positive_definite=True)
    assert A.factorise() is None
    x, info = ns.solve_ex(A, draw(n, seed=1))
    assert (info.method, info.converged) == ("cg", True)
    assert Banded([torch.ones(n), torch.ones(n - 64), torch.ones(n - 64)], [0, -64, 64]).factorise() is not None
    assert close(A(x), draw(n, seed=1), 1e-7)


def test_symmetric_constructors_make_hermitian_matrices() -> None:
    diagonal, off = draw(6, dtype=C128), draw(5, dtype=C128, seed=1)
    for A in (
        Tridiagonal.symmetric(diagonal.real, off),
        Tridiagonal.symmetric(diagonal, off),
        Banded.symmetric([off, diagonal], [-1, 0]),
        Banded.symmetric([off.conj(), diagonal], [1, 0]),
    ):
        assert A.hermitian
        assert A.H is A
        M = A.to_dense()
        assert torch.equal(M, M.mH)
        assert torch.equal(M.diagonal(-1), off)
        assert torch.equal(A.diagonal(), diagonal.real.to(C128))
    assert Tridiagonal.symmetric(diagonal.real, off.real, positive_definite=True).positive_definite
    assert not Tridiagonal(off.real, diagonal.real, off.real).hermitian


# -- triangular --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("upper", [False, True])
def test_one_triangle_is_read(upper: bool, unit: bool) -> None:
    M = draw(6, 6) + 4 * torch.eye(6)
    read = M.triu() if upper else M.tril()
    unread = (read == 0) | (torch.eye(6, dtype=torch.bool) if unit else torch.tensor(False))
    spoilt = torch.where(unread, torch.nan, M).requires_grad_()
    b = draw(6, seed=1)
    x = ns.solve(Triangular(spoilt, upper, unit), b)
    expected = scipy.linalg.solve_triangular(read.numpy(), b.numpy(), lower=not upper, unit_diagonal=unit)
    assert close(x.detach(), torch.from_numpy(expected))
    (gradient,) = torch.autograd.grad(x.sum(), spoilt)
    assert torch.equal(gradient != 0, ~unread)


def test_a_zero_on_the_diagonal_is_a_failed_solve() -> None:
    M = torch.tril(draw(5, 5)) + 4 * torch.eye(5)
    M[2, 2] = 0
    for A in (Triangular(M), Triangular(M).H):
        x, info = ns.solve_ex(A, draw(5, seed=1))
        assert not info.converged
        assert x.isfinite().all()
        consistent = A(draw(5, seed=1) * (torch.arange(5) != 2))
        assert ns.solve_ex(A, consistent)[1].converged


# -- permutations ------------------------------------------------------------------------------------------------


def test_a_permutation_takes_entries_as_indexing_does() -> None:
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    P, x = Permutation(order.to(torch.int32), dtype=F64), draw(2, 11)
    assert torch.equal(P(x), x[:, order])
    assert torch.equal(P.H(P(x)), x)
    assert close(ns.solve(P, x), P.H(x), 1e-15)
    assert P.unitary
    assert P.to(F32)(x.float()).dtype == F32
    image = Permutation(torch.arange(6).flip(0).reshape(2, 3), dtype=F64)
    y = draw(4, 2, 3)
    assert torch.equal(image(y), y.flip(1, 2))


# -- low rank ----------------------------------------------------------------------------------------------------


U, V = 0.4 * draw(40, 3, seed=1), 0.4 * draw(40, 3, seed=2)
SCALAR = torch.tensor(0.5, dtype=F64)
WHOLES = {
    "diagonal": Diagonal(2 + draw(40, seed=3).abs()),
    "multiple of a diagonal": 2 * Diagonal(2 + draw(40, seed=3).abs()),
    "identity": Identity(torch.zeros(40, dtype=F64)),
    "tridiagonal": Tridiagonal(draw(39, seed=4), draw(40, seed=5) + 4, draw(39, seed=6)),
    "adjoint": Tridiagonal(draw(39, seed=4), draw(40, seed=5) + 4, draw(39, seed=6)).H,
    "triangular": Triangular(draw(40, 40, seed=7) / 6 + 3 * torch.eye(40)),
    "circulant": Circulant(draw(40, seed=8) / 6 + 4 * (torch.arange(40) == 0)),
    "dense": aslinearoperator(draw(40, 40, seed=9) / 6 + 4 * torch.eye(40)),
    "low rank already added": Diagonal(2 + draw(40, seed=3).abs()) + LowRank(U, V),
    "a user's unitary function": LinearOperator(
        lambda v: v.roll(1), adjoint=lambda v: v.roll(-1), domain=torch.zeros(40, dtype=F64), unitary=True
    ),
}
UPDATES = {
    "U V^H": LowRank(U, V),
    "U U^H": LowRank(U),
    "c U V^H": 0.5 * LowRank(U, V),
    "U V^H c": LowRank(U, V) * SCALAR,
    "c U U^H / d": SCALAR * LowRank(U) / 2,
    "-U V^H": -LowRank(U, V),
    "V U^H": LowRank(U, V).H,
    "conj": LowRank(U, V).conj(),
    "U V^H - c V U^H": LowRank(U, V) - 0.3 * LowRank(V, U),
}


@pytest.mark.parametrize("whole", WHOLES)
@pytest.mark.parametrize("update", UPDATES)
def test_an_update_of_low_rank_is_solved_directly_in_either_order(update: str, whole: str) -> None:
    W, L = WHOLES[whole], UPDATES[update]
    assert isinstance(L, LowRank)
    M, b = W.to_dense() + L.to_dense(), draw(40, seed=10)
    for A, matrix in ((W + L, M), (L + W, M), (W - L, 2 * W.to_dense() - M), ((W + L).H, M.mT)):
        x, info = ns.solve_ex(A, b, rtol=1e-12)
        assert (info.method, info.converged) == ("direct", True)
        assert close(x, torch.linalg.inv(matrix) @ b, 1e-10)


def test_an_update_of_what_has_no_direct_solve_is_still_solved() -> None:
    T = Toeplitz(4.0 * (torch.arange(40) == 0) + draw(40, seed=1) / 20)
    A = T + LowRank(U, V)
    assert A.factorise() is None
    x, info = ns.solve_ex(A, draw(40, seed=2), rtol=1e-10)
    assert info.method == "gmres"
    assert close(A.to_dense() @ x, draw(40, seed=2), 1e-8)


def test_an_update_of_a_singular_operator_is_never_a_wrong_answer() -> None:
    """Woodbury's identity needs the inverse of what is updated, though the sum has one without; a Krylov method goes on."""
    A = Diagonal(torch.arange(4, dtype=F64)) + LowRank(torch.eye(4, dtype=F64)[:, :1])
    b = draw(4).requires_grad_()
    x, info = ns.solve_ex(A, b, rtol=1e-12)
    assert (info.converged, info.method) == (True, "minres")
    assert close(x.detach(), b.detach() / torch.tensor([1, 1, 2, 3]))
    (g,) = torch.autograd.grad(x.sum(), b)
    assert close(g, 1 / torch.tensor([1, 1, 2, 3], dtype=F64))
    assert info.adjoint.method == "minres"
    x, info = ns.solve_ex(A, b, method="direct")
    assert (info.converged, info.method) == (False, "direct")
    assert x.isfinite().all()


def test_multiples_and_sums_of_low_rank_keep_what_is_known() -> None:
    G = LowRank(U)
    assert G.claims.positive_semidefinite
    assert (2 * G).claims.positive_semidefinite
    assert (G + G / 3).claims.positive_semidefinite
    assert (-G).hermitian
    assert not (-G).claims.positive_semidefinite
    assert (SCALAR * G).hermitian
    assert not (SCALAR * G).claims.positive_semidefinite
    assert not (2j * G).hermitian
    assert not LowRank(U, V).hermitian
    assert (Identity(U[:, 0]) + G).positive_definite
    assert (G + LowRank(V)).rank == 6
    assert repr(2 * G).startswith("2 * LowRank(rank 3): (..., 40) float64 [positive_semidefinite]")


def test_an_operator_that_is_made_once_serves_many_backward_passes() -> None:
    u, c = U.clone().requires_grad_(), torch.tensor(0.3, dtype=F64, requires_grad=True)
    d, off = (2 + draw(40).abs()).requires_grad_(), draw(39, seed=1).requires_grad_()
    A = Tridiagonal.symmetric(d, off) + c * LowRank(u)
    gradients = [torch.autograd.grad(ns.solve(A, b).sum(), (u, c, d, off)) for b in (draw(40, seed=2),) * 2]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    assert all(g.abs().max() > 0 for g in gradients[0])


# -- by Fourier transforms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 1), (1, 2), (6, 6), (7, 4), (4, 9), (33, 16)])
def test_matrices_are_those_of_scipy(m: int, n: int, dtype: torch.dtype) -> None:
    c, r = draw(m, dtype=dtype), draw(n, dtype=dtype, seed=1)
    for operator, expected in (
        (Circulant(c), scipy.linalg.circulant(c.numpy())),
        (Toeplitz(c), scipy.linalg.toeplitz(c.numpy())),
        (Toeplitz(c, r), scipy.linalg.toeplitz(c.numpy(), r.numpy())),
        (Hankel(c), scipy.linalg.hankel(c.numpy())),
        (Hankel(c, r), scipy.linalg.hankel(c.numpy(), r.numpy())),
    ):
        assert close(operator.to_dense(), torch.from_numpy(np.ascontiguousarray(expected)), 1e-14)


def test_a_toeplitz_system_has_the_solution_of_scipy() -> None:
    c, r, b = draw(80) / 12 + 3.0 * (torch.arange(80) == 0), draw(80, seed=1) / 12, draw(80, seed=2)
    expected = torch.from_numpy(scipy.linalg.solve_toeplitz((c.numpy(), r.numpy()), b.numpy()))
    assert close(ns.solve(Toeplitz(c, r), b, rtol=1e-12), expected, 1e-10)
    symmetric, info = ns.solve_ex(Toeplitz(c), b, rtol=1e-12)
    assert info.method == "minres"
    assert close(symmetric, torch.from_numpy(scipy.linalg.solve_toeplitz(c.numpy(), b.numpy())), 1e-10)


def test_a_shortcut_is_taken_only_where_it_holds() -> None:
    """∇-Prox took `x + conv(x)` for diagonal among the pixels (PEERS.md, defect 46)."""
    n = 12
    C, D, one = Circulant(draw(n) / 4 + 2.0 * (torch.arange(n) == 0)), Diagonal(3 + draw(n, seed=1)), Identity(draw(n))
    T, P = Toeplitz(draw(n) / 8), Permutation(torch.randperm(n, generator=torch.Generator().manual_seed(1)), dtype=F64)
    b = draw(n, seed=2)
    for A, direct in (
        (one + C, True),  # diagonal in the Fourier basis
        (C + C.H @ C - one / 3, True),
        (C @ D, True),  # diagonal in no basis that is known, and one after the other
        (D + C, False),
        (C + T, False),
        (one + T, False),
        (D + P, False),
        (D.gram(0.5) + C.gram(0.5), False),
    ):
        assert (A.spectrum() is not None) == (direct and A.parts[1] is not D)
        x, info = ns.solve_ex(A, b, rtol=1e-10)
        assert (info.method == "direct") == direct
        assert close(x, torch.linalg.inv(A.to_dense()) @ b, 1e-7)


def test_what_only_data_could_tell_is_not_claimed() -> None:
    real, complex_ = draw(5), draw(5, dtype=C128)
    assert Toeplitz(real).hermitian
    assert not Toeplitz(complex_).hermitian  # its diagonal is complex
    assert Toeplitz(complex_, hermitian=True).hermitian
    assert not Toeplitz(real, real).hermitian
    assert Hankel(real, real).hermitian
    assert not Hankel(complex_).hermitian
    assert not Hankel(real, real[:4]).hermitian
    assert not Circulant(real).hermitian
    assert Circulant(real, positive_definite=True).positive_definite
    assert not Triangular(torch.eye(3)).hermitian


# -- derivatives -------------------------------------------------------------------------------------------------


UNROLLED: dict[str, Callable[[Tensor, Tensor], LinearOperator]] = {
    "tridiagonal": lambda a, b: Tridiagonal(a[:-1], b, a[1:]),
    "symmetric": lambda a, b: Tridiagonal.symmetric(b, a[1:]),
    "banded": lambda a, b: Banded([b, a[2:]], [0, -2]),
    "triangular": lambda a, b: Triangular(torch.diag(b) + a[:, None]),
    "Woodbury": lambda a, b: Diagonal(b) + LowRank(a[:, None], b[:, None] / 4),
    "circulant": lambda a, b: Circulant(a + b),
}


@pytest.mark.parametrize("name", UNROLLED)
def test_a_direct_solve_can_be_unrolled_to_any_order(name: str) -> None:
    a, b, rhs = draw(6) / 4, 3 + draw(6, seed=1) / 4, draw(6, seed=2)

    def loss(a: Tensor, b: Tensor, unroll: bool) -> Tensor:
        A = UNROLLED[name](a, b)
        return (ns.solve(A, rhs, grad="unroll") if unroll else torch.linalg.inv(A.to_dense()) @ rhs).square().sum()

    for derivative in (torch.func.grad, torch.func.hessian):
        got, expected = (derivative(lambda a, unroll=unroll: loss(a, b, unroll))(a) for unroll in (True, False))
        assert close(got, expected, 1e-9)
    a.requires_grad_()
    (got,) = torch.autograd.grad(loss(a, b, True), a)
    assert close(got, torch.autograd.grad(loss(a, b, False), a)[0], 1e-10)


# -- errors ------------------------------------------------------------------------------------------------------

d5, d4, I5 = torch.ones(5), torch.ones(4), torch.arange(5)
ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Triangular([[1.0]]), TypeError, "matrix: expected a Tensor .* got list"),
    (lambda: Triangular(torch.ones(2, 3)), ValueError, r"matrix: expected a square matrix .* got shape \(2, 3\)"),
    (lambda: Triangular(I5.outer(I5)), ValueError, "matrix: expected a floating-point or complex dtype, got torch.int64"),
    (lambda: Triangular(torch.eye(3), upper="yes"), TypeError, "upper: expected a bool, got str"),
    (lambda: Triangular(torch.eye(3), hermitan=True), TypeError, "unknown claim 'hermitan'.*hermitian"),
    (lambda: Tridiagonal(d5, d5, d4), ValueError, r"lower: expected shape \(..., 4\) for a diagonal of length 5, got \(5,\)"),
    (lambda: Tridiagonal(d4, d5, d5), ValueError, r"upper: expected shape \(..., 4\)"),
    (lambda: Tridiagonal(d4, None, d4), TypeError, "diagonal: expected a Tensor of shape .*, got NoneType"),
    (lambda: Tridiagonal(d4, d5.double(), d4), ValueError, r"bands\[1\]: expected torch.float32 .* got torch.float64"),
    (lambda: Tridiagonal(torch.ones(2, 4), torch.ones(3, 5), d4), ValueError, "batch dimensions .* do not broadcast"),
    (lambda: Tridiagonal.symmetric(d5, d5), ValueError, r"lower: expected shape \(..., 4\)"),
    (lambda: Banded([d5, d5], [0, 1]), ValueError, r"bands\[1\]: expected shape \(..., 4\) for offset 1 of a matrix of size 5"),
    (lambda: Banded([d5], [0, 1]), ValueError, "bands: expected one for each of 2 offsets, got 1"),
    (lambda: Banded([d5, d5], [0, 0]), ValueError, r"offsets: expected at least one, and each of them once, got \[0, 0\]"),
    (lambda: Banded([], []), ValueError, "offsets: expected at least one"),
    (lambda: Banded([d5], 0), TypeError, "offsets: expected a sequence of integers, got 0"),
    (lambda: Banded([d5], [0.0]), TypeError, "offsets: expected a sequence of integers, got .0.0"),
    (lambda: Banded(3, [0]), TypeError, "bands: expected a sequence of Tensors or one Tensor, got int"),
    (lambda: Banded(torch.ones(2, 5), [0]), ValueError, r"bands: expected shape \(..., 1, n\) for the offsets, got \(2, 5\)"),
    (
        lambda: Banded(torch.ones(1, 5), [5]),
        ValueError,
        "offsets: expected offsets between -4 and 4 for a matrix of size 5, got 5",
    ),
    (lambda: Banded.symmetric([d4, d4], [1, -1]), ValueError, r"offsets: expected diagonals on one side .* got \[1, -1\]"),
    (lambda: Permutation([0, 1]), TypeError, "indices: expected a Tensor of integers, got list"),
    (lambda: Permutation(d5), ValueError, r"indices: expected integers of shape \(n,\), got torch.float32"),
    (lambda: Permutation(I5 + 1), ValueError, "indices: expected each of 0 ... 4 once, got indices from 1 to 5"),
    (lambda: Permutation(I5 // 2), ValueError, "indices: expected each of 0 ... 4 once, got 0 more than once"),
    (
        lambda: Permutation(I5, dtype=torch.int64),
        TypeError,
        "dtype: expected a floating-point or complex dtype, got torch.int64",
    ),
    (lambda: LowRank(d5), ValueError, r"U: expected shape \(..., m, k\), got shape \(5,\)"),
    (
        lambda: LowRank(U, V[:, :2]),
        ValueError,
        r"V: expected shape \(..., n, 3\) for U of shape \(40, 3\), got shape \(40, 2\)",
    ),
    (lambda: LowRank(U, V.float()), ValueError, "V: expected torch.float64 on cpu like U, got torch.float32"),
    (lambda: LowRank(U.expand(2, 40, 3), V.expand(3, 40, 3)), ValueError, "V: its batch dimensions .* do not broadcast"),
    (lambda: LowRank(U) + LowRank(V[:5]), ValueError, r"domain of the left has shape \(..., 40\) and the domain .* \(..., 5\)"),
    (lambda: Circulant(torch.ones(())), ValueError, r"column: expected shape \(..., n\), got shape \(\)"),
    (lambda: Circulant(torch.ones(0)), ValueError, "column: expected at least one entry"),
    (lambda: Toeplitz(d5, d5.double()), ValueError, "row: expected torch.float32 on cpu like column, got torch.float64"),
    (lambda: Toeplitz(d5, 3), TypeError, "row: expected a Tensor of shape .*, got int"),
    (lambda: Hankel(d5.expand(2, 5), d5.expand(3, 5)), ValueError, r"row: its batch dimensions \(3,\) do not broadcast"),
    (lambda: Hankel(I5), ValueError, "column: expected a floating-point or complex dtype, got torch.int64"),
    (lambda: Toeplitz(d5)(d4), ValueError, r"x: expected shape \(..., 5\), got \(4,\)"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_a_wrong_argument_is_named(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
