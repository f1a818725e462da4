"""SciPy's operators and sparse arrays become this library's and back, and nothing is lost on the way."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

import nablasolve as ns
from nablasolve.interop.scipy import from_scipy, to_scipy
from nablasolve.operators import BlockDiagonal, Diagonal

F64 = torch.float64
RNG = np.random.default_rng(0)
M = RNG.standard_normal((6, 4))
M[RNG.random((6, 4)) < 0.5] = 0
M[:, 0] = 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("kind", ["coo", "csr", "csc", "bsr", "dia", "lil", "dok"])
@pytest.mark.parametrize("family", ["array", "matrix"])
def test_a_sparse_array_becomes_a_sparse_tensor_and_comes_back(kind, family, dtype):
    entries = (M * (1 + 1j) if np.issubdtype(dtype, np.complexfloating) else M).astype(dtype)
    original = getattr(scipy.sparse, f"{kind}_{family}")(scipy.sparse.coo_array(entries))
    A = from_scipy(original)
    assert A.source.layout == getattr(torch, f"sparse_{kind}", torch.sparse_csr)
    assert np.array_equal(A.to_dense().numpy(), original.toarray())
    x = torch.ones(4, dtype=A.matrix.dtype)
    assert np.allclose(A(x).numpy(), original @ x.numpy())
    again = to_scipy(A)
    assert again.format == (kind if kind in ("coo", "csr", "csc", "bsr") else "csr")
    assert again.dtype == dtype
    assert np.array_equal(again.toarray(), original.toarray())


def test_the_tensor_shares_no_memory_with_the_array():
    original = scipy.sparse.csr_array(M)
    A = from_scipy(original)
    original.data[:] = 0
    assert A.to_dense().abs().sum() > 0


def test_a_block_sparse_column_layout_goes_to_scipy():
    S = torch.as_tensor(M).to_sparse_bsc((2, 2))
    assert np.array_equal(to_scipy(S).toarray(), M)


def test_integer_arrays_become_floating_point():
    assert from_scipy(scipy.sparse.csr_array(np.eye(3, dtype=np.int64))).matrix.dtype == torch.get_default_dtype()
    assert from_scipy(scipy.sparse.csr_array(np.eye(3)), dtype=torch.float32).matrix.dtype == torch.float32


def poisson(n: int) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array(
        scipy.sparse.diags_array([-np.ones(n - 1), 2.1 * np.ones(n), -np.ones(n - 1)], offsets=[-1, 0, 1])
    )


def test_a_scipy_operator_is_solved_and_differentiated():
    n = 30
    A = scipy.sparse.linalg.aslinearoperator(poisson(n))
    b = torch.linspace(0, 1, n, dtype=F64, requires_grad=True)
    x = ns.solve(from_scipy(A, positive_definite=True), b, rtol=1e-12)
    expected = scipy.sparse.linalg.spsolve(poisson(n).tocsc(), b.detach().numpy())
    assert np.allclose(x.detach().numpy(), expected)
    (g,) = torch.autograd.grad(x.square().sum(), b)
    assert np.allclose(g.numpy(), scipy.sparse.linalg.spsolve(poisson(n).tocsc(), 2 * expected))


def test_an_inverse_that_scipy_has_factorised_is_a_preconditioner():
    n = 200
    A = poisson(n)
    lu = scipy.sparse.linalg.splu(A.tocsc())
    M = from_scipy(
        scipy.sparse.linalg.LinearOperator((n, n), matvec=lu.solve, rmatvec=lambda r: lu.solve(r, "T"), dtype=A.dtype)
    )
    _, info = ns.solve_ex(from_scipy(A), torch.ones(n, dtype=F64), method="gmres", M=M)
    assert info.iterations <= 2


def test_derivatives_of_every_kind_go_through_a_scipy_operator():
    A = from_scipy(scipy.sparse.linalg.aslinearoperator(np.ascontiguousarray(M.T)))
    x = torch.linspace(1, 2, 6, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(A.apply, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(A.apply, x)
    assert torch.allclose(torch.func.jacfwd(A.apply)(x.detach()), torch.as_tensor(M.T))
    assert torch.allclose(torch.func.jacrev(A.apply)(x.detach()), torch.as_tensor(M.T))

    def loss(x):
        return A(x).square().sum()

    for hessian in (
        torch.func.hessian(loss),
        torch.func.jacrev(torch.func.jacrev(loss)),
        torch.func.jacfwd(torch.func.jacfwd(loss)),
    ):
        assert torch.allclose(hessian(x.detach()), torch.as_tensor(2 * M @ M.T))


@pytest.mark.parametrize("batch", [(0,), (2, 3)], ids=str)
def test_batches_are_applied_vector_by_vector(batch):
    A = from_scipy(scipy.sparse.linalg.aslinearoperator(M))
    x = torch.randn(*batch, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(A(x), x @ torch.as_tensor(M).mT)


def test_an_operator_of_ours_serves_scipy():
    d = torch.linspace(1, 2, 6, dtype=F64)
    A = Diagonal(d) + ns.aslinearoperator(torch.as_tensor(M @ M.T))
    S = to_scipy(A)
    assert S.shape == (6, 6)
    assert S.dtype == np.float64
    dense = A.to_dense().numpy()
    assert np.allclose(S @ np.eye(6), dense)
    assert np.allclose(S.H @ np.eye(6), dense.T)
    x, code = scipy.sparse.linalg.cg(S, np.ones(6), rtol=1e-12)
    assert code == 0
    assert np.allclose(dense @ x, np.ones(6))
    complex_result = S @ (1j * np.ones(6))
    assert np.allclose(complex_result, 1j * dense.sum(1))


def test_trees_and_images_are_flattened_for_scipy():
    d = torch.arange(1, 7, dtype=F64)
    S = to_scipy(BlockDiagonal(Diagonal(d.reshape(2, 3)), Diagonal(d[:2])))
    assert np.allclose(S @ np.ones(8), [1, 2, 3, 4, 5, 6, 1, 2])
    F = ns.LinearOperator(torch.fft.rfft, domain=d, codomain=torch.zeros(4, dtype=torch.complex128))
    assert np.allclose(to_scipy(F) @ np.ones(6), np.fft.rfft(np.ones(6)))
    assert to_scipy(F).shape == (4, 6)


def test_there_and_back_is_the_same_operator():
    A = scipy.sparse.linalg.aslinearoperator(M + 1j * M)
    assert np.allclose(to_scipy(from_scipy(A)) @ np.eye(4), M + 1j * M)


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match=r"like: the operator does not know its domain"):
        to_scipy(lambda v: v)
    assert to_scipy(lambda v: 2 * v, like=torch.ones(3)).shape == (3, 3)
    with pytest.raises(TypeError, match=r"nablasolve\.interop\.scipy\.from_scipy"):
        ns.solve(scipy.sparse.csr_array(M), torch.ones(4))
    with pytest.raises(TypeError, match=r"nablasolve\.interop\.scipy\.from_scipy"):
        ns.solve(scipy.sparse.linalg.aslinearoperator(M), torch.ones(4))


def test_a_complex_operator_keeps_the_imaginary_part_of_what_it_makes_of_a_real_vector():
    C = M.T @ M * (1 + 2j)
    A = from_scipy(scipy.sparse.linalg.aslinearoperator(C))
    x = torch.linspace(1, 2, 4, dtype=F64)
    assert np.allclose(A(x).numpy(), C @ x.numpy())
    assert np.allclose(
        from_scipy(scipy.sparse.linalg.aslinearoperator(M)).H(torch.as_tensor(M @ M.T[:, 0] * 1j).conj()).numpy(),
        M.T @ (-1j * (M @ M.T[:, 0])),
    )
