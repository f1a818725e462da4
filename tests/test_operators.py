"""Operators are values: every composition equals the dense one, and its claims follow the algebra and never go further."""

from __future__ import annotations

import copy
import functools
import gc
import operator as python
import pickle
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import nablasolve as ns
from nablasolve import LinearOperator, aslinearoperator
from nablasolve.check import check_operator
from nablasolve.operators import DenseOperator, SparseOperator

F64, C128 = torch.float64, torch.complex128
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse_coo,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
    "bsr": lambda m: m.to_sparse_bsr((2, 2)),
    "bsc": lambda m: m.to_sparse_bsc((2, 2)),
}


def draw(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=F64)


def patterned(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    """A matrix with zeros, an empty row and an empty block among them."""
    result = draw(*shape, dtype=dtype, seed=seed)
    result[0] = 0
    result[:2, :2] = 0
    return result


def close(value: Tensor, expected: Tensor) -> bool:
    return value.shape == expected.shape and torch.allclose(value, expected.to(value.dtype), rtol=1e-12, atol=1e-12)


def times(M: Tensor, v: Tensor) -> Tensor:
    """The product of a matrix and a vector, of which either may be real."""
    dtype = torch.promote_types(M.dtype, v.dtype)
    return M.to(dtype) @ v.to(dtype)


def plain(M: Tensor, **claims: bool) -> LinearOperator:
    """A function without a written adjoint."""
    m, n = M.shape
    domain, codomain = torch.zeros(n, dtype=M.dtype), torch.zeros(m, dtype=M.dtype)
    return LinearOperator(lambda v: times(M, v), domain=domain, codomain=codomain, **claims)


def written(M: Tensor, **claims: bool) -> LinearOperator:
    """A function with its adjoint."""
    m, n = M.shape
    domain, codomain = torch.zeros(n, dtype=M.dtype), torch.zeros(m, dtype=M.dtype)
    return LinearOperator(lambda v: times(M, v), adjoint=lambda y: times(M.mH, y), domain=domain, codomain=codomain, **claims)


KINDS: dict[str, Callable[..., LinearOperator]] = {
    "plain": plain,
    "written": written,
    "dense": aslinearoperator,
    **{name: lambda M, to=to, **claims: aslinearoperator(to(M), **claims) for name, to in LAYOUTS.items()},
}


# -- every composition equals the dense one ----------------------------------------------------------------------------

# each takes three operators, A and B of one shape and C that can be multiplied from the right, and a 0-d tensor
COMPOSITIONS: dict[str, tuple[Callable, Callable]] = {
    "A": (lambda A, B, C, t: A, lambda A, B, C, t: A),
    "+": (lambda A, B, C, t: A + B, lambda A, B, C, t: A + B),
    "-": (lambda A, B, C, t: A - B, lambda A, B, C, t: A - B),
    "negative": (lambda A, B, C, t: -A, lambda A, B, C, t: -A),
    "number *": (lambda A, B, C, t: 2.5 * A, lambda A, B, C, t: 2.5 * A),
    "* number": (lambda A, B, C, t: A * -2, lambda A, B, C, t: A * -2),
    "/ number": (lambda A, B, C, t: A / 4, lambda A, B, C, t: A / 4),
    "complex *": (lambda A, B, C, t: (1 - 2j) * A, lambda A, B, C, t: (1 - 2j) * A),
    "tensor *": (lambda A, B, C, t: t * A, lambda A, B, C, t: t * A),
    "* tensor": (lambda A, B, C, t: A * t, lambda A, B, C, t: A * t),
    "/ tensor": (lambda A, B, C, t: A / t, lambda A, B, C, t: A / t),
    "@": (lambda A, B, C, t: A @ C, lambda A, B, C, t: A @ C),
    "H": (lambda A, B, C, t: A.H, lambda A, B, C, t: A.mH),
    "T": (lambda A, B, C, t: A.T, lambda A, B, C, t: A.mT),
    "conj": (lambda A, B, C, t: A.conj(), lambda A, B, C, t: A.conj()),
    "H of T": (lambda A, B, C, t: A.T.H, lambda A, B, C, t: A.conj()),
    "H of H": (lambda A, B, C, t: A.H.H, lambda A, B, C, t: A),
    "T of T": (lambda A, B, C, t: A.T.T, lambda A, B, C, t: A),
    "conj of conj": (lambda A, B, C, t: A.conj().conj(), lambda A, B, C, t: A),
    "H of @": (lambda A, B, C, t: (A @ C).H, lambda A, B, C, t: (A @ C).mH),
    "T of complex *": (lambda A, B, C, t: ((1 - 2j) * A).T, lambda A, B, C, t: (1 - 2j) * A.mT),
    "H of tensor *": (lambda A, B, C, t: (t * A).H, lambda A, B, C, t: t.conj() * A.mH),
    "gram": (lambda A, B, C, t: A.gram(), lambda A, B, C, t: A.mH @ A),
    "gram, damped": (lambda A, B, C, t: A.gram(0.7), lambda A, B, C, t: A.mH @ A + 0.49 * eye(A.shape[1])),
    "gram, damped by a tensor": (
        lambda A, B, C, t: A.gram(abs(t)),
        lambda A, B, C, t: A.mH @ A + abs(t) ** 2 * eye(A.shape[1]),
    ),
    "gram of H": (lambda A, B, C, t: A.H.gram(0.5), lambda A, B, C, t: A @ A.mH + 0.25 * eye(A.shape[0])),
    "all": (
        lambda A, B, C, t: (2 * A - B / t).H @ (A.conj() + B) @ C - C.gram(0.1) @ C,
        lambda A, B, C, t: (2 * A - B / t).mH @ (A.conj() + B) @ C - (C.mH @ C + 0.01 * eye(C.shape[1])) @ C,
    ),
}


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("kind", ["plain", "written", "dense", "csr"])
@pytest.mark.parametrize(("build", "expected"), COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_a_composition_equals_the_dense_one(build, expected, kind, dtype):
    check_composition(build, expected, kind, (6, 4), dtype)


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("shape", [(4, 4), (2, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_operators_of_every_kind_and_shape_equal_the_dense_ones(kind, shape, dtype):
    for name in ("A", "all"):
        check_composition(*COMPOSITIONS[name], kind, shape, dtype)


def check_composition(build: Callable, expected: Callable, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    m, n = shape
    matrices = patterned(m, n, dtype=dtype, seed=1), patterned(m, n, dtype=dtype, seed=2), patterned(n, n, dtype=dtype, seed=3)
    t = draw(dtype=dtype, seed=4)
    op, M = build(*map(KINDS[kind], matrices), t), expected(*matrices, t)
    # a real operator acts on complex vectors, so that one that has become complex does as well
    x, y = draw(M.shape[1], dtype=M.dtype, seed=5), draw(M.shape[0], dtype=M.dtype, seed=6)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert close(op(x), M @ x)
            assert close(op @ x, M @ x)
            assert close(op.H(y), M.mH @ y)
            assert close(op.T(y), M.mT @ y)
            assert close(op.conj()(x), M.conj() @ x)
    assert close(op.to_dense(like=x), M)
    assert close(op.H.to_dense(like=y), M.mH)


@pytest.mark.parametrize("kind", [plain, aslinearoperator])
@pytest.mark.parametrize(("build", "expected"), COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_a_composition_knows_its_own_spaces(build, expected, kind):
    matrices = patterned(6, 4, seed=1), patterned(6, 4, seed=2), patterned(4, 4, seed=3)
    op, M = build(*map(kind, matrices), torch.tensor(2.0, dtype=F64)), expected(*matrices, torch.tensor(2.0, dtype=F64))
    if not M.is_complex():  # a complex factor leaves the declared, real, domain as it is
        assert close(op.to_dense(), M)
    with pytest.raises(ValueError, match=rf"x: expected shape .*{M.shape[1]}.*got \({M.shape[1] + 1},\)"):
        op(torch.zeros(M.shape[1] + 1, dtype=F64))


MIXED = [(F64, C128), (C128, F64), (C128, C128), (F64, F64)]


@pytest.mark.parametrize("conjugated", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize(("matrix_dtype", "vector_dtype"), MIXED)
@pytest.mark.parametrize("kind", ["dense", *LAYOUTS])
def test_a_matrix_acts_on_batches_of_either_dtype_and_of_every_stride(kind, matrix_dtype, vector_dtype, batch, conjugated):
    M = patterned(6, 4, dtype=matrix_dtype)
    op = KINDS[kind](M)
    common = torch.promote_types(matrix_dtype, vector_dtype)

    def vector(n: int) -> Tensor:
        x = draw(n, *reversed(batch), dtype=vector_dtype, seed=n).permute(*reversed(range(len(batch) + 1)))
        return x.conj() if conjugated else x

    x, y = vector(4), vector(6)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert close(op(x), x.to(common) @ M.to(common).mT)
            assert close(op.H(y), y.to(common) @ M.to(common).conj())


def test_a_batch_of_matrices_acts_on_a_batch_of_vectors_and_broadcasts():
    M = draw(2, 5, 3, dtype=C128)
    op = aslinearoperator(M)
    for x in (draw(3, dtype=C128), draw(2, 3, dtype=C128), draw(4, 2, 3, dtype=C128), draw(4, 1, 3, dtype=C128)):
        assert close(
            op(x), torch.einsum("bij,...bj->...bi", M, x.expand(*x.shape[:-2], 2, 3) if x.ndim > 1 else x.expand(2, 3))
        )
        y = draw(*x.shape[:-1], 5, dtype=C128)
        assert close(
            op.H(y), torch.einsum("bij,...bi->...bj", M.conj(), y.expand(*y.shape[:-2], 2, 5) if y.ndim > 1 else y.expand(2, 5))
        )
    assert close(op.gram(0.5).to_dense(like=torch.zeros(2, 3, dtype=C128)), torch.block_diag(*(M.mH @ M + 0.25 * eye(3))))


def test_uncoalesced_entries_are_summed():
    indices = torch.tensor([[0, 0, 1], [1, 1, 0]])
    values = draw(3, dtype=C128)
    op = aslinearoperator(torch.sparse_coo_tensor(indices, values, (2, 3), check_invariants=True))
    M = torch.zeros(2, 3, dtype=C128)
    M.index_put_(tuple(indices), values, accumulate=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert close(op.to_dense(), M)
            assert close(op(draw(3, dtype=C128)), M @ draw(3, dtype=C128))
            assert close(op.H(draw(2, dtype=C128)), M.mH @ draw(2, dtype=C128))


# -- trees, images, rectangular maps -----------------------------------------------------------------------------------


def tree_operator(dtype: torch.dtype = F64, **options: object) -> tuple[LinearOperator, Tensor]:
    """A rectangular operator from a dictionary to a tuple, and its matrix."""
    M = draw(6, 7, dtype=dtype)
    domain = {"u": torch.zeros(2, 2, dtype=dtype), "w": torch.zeros(3, dtype=dtype)}
    codomain = torch.zeros(4, dtype=dtype), torch.zeros(1, 2, dtype=dtype)

    def forward(d: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y = M @ torch.cat([d["u"].reshape(-1), d["w"]])
        return y[:4], y[4:].reshape(1, 2)

    return LinearOperator(forward, domain=domain, codomain=codomain, **options), M


def flat(tree: object) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in torch.utils._pytree.tree_leaves(tree)])


def filled(v: Tensor) -> dict[str, Tensor]:
    return {"u": v[:4].reshape(2, 2), "w": v[4:]}


@pytest.mark.parametrize("dtype", [F64, C128])
def test_a_rectangular_operator_on_trees_composes(dtype):
    op, M = tree_operator(dtype)
    x, y = draw(7, dtype=dtype, seed=1), draw(6, dtype=dtype, seed=2)
    image = (y[:4], y[4:].reshape(1, 2))
    assert close(flat(op(filled(x))), M @ x)
    adjoint = op.H(image)
    assert {name: leaf.shape for name, leaf in adjoint.items()} == {"u": (2, 2), "w": (3,)}
    assert close(flat(adjoint), M.mH @ y)
    assert close(op.to_dense(), M)
    assert close(op.H.to_dense(), M.mH)
    assert close(op.T.to_dense(), M.mT)
    assert close(op.gram(0.3).to_dense(), M.mH @ M + 0.09 * eye(7))
    assert close((op.H @ op - 2 * op.gram()).to_dense(), -M.mH @ M)
    assert check_operator(op.gram(0.3), filled(x)).ok


@pytest.mark.parametrize("tree", [False, True])
def test_the_derived_adjoint_of_a_real_operator_acts_on_complex_vectors(tree):
    M = draw(3, 3)
    y = draw(3, dtype=C128)
    if tree:
        op = LinearOperator(lambda d: {"a": M.to(d["a"].dtype) @ d["a"]}, domain={"a": torch.zeros(3, dtype=F64)})
        assert close(op.H({"a": y})["a"], M.mH.to(C128) @ y)
    else:
        op = LinearOperator(lambda v: M.to(v.dtype) @ v, domain=torch.zeros(3, dtype=F64))
        assert close(op.H(y), M.mH.to(C128) @ y)


def test_an_operator_from_a_real_into_a_complex_space_has_a_real_adjoint():
    op = LinearOperator(torch.fft.rfft, domain=torch.zeros(8, dtype=F64), codomain=torch.zeros(5, dtype=C128))
    F = torch.fft.rfft(eye(8), dim=0)
    y = draw(5, dtype=C128)
    assert close(op.H(y), (F.mH @ y).real)
    assert close(op.gram().to_dense(), (F.mH @ F).real)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (2, 3)], ids=str)
def test_vectors_of_every_shape_have_a_matrix(shape):
    op = LinearOperator(lambda v: 3 * v, domain=torch.zeros(shape, dtype=F64))
    n = torch.Size(shape).numel()
    assert close(op.to_dense(), 3 * eye(n))
    assert close(op.gram(1.0).to_dense(), 10 * eye(n))
    assert close(op.H.to_dense(), 3 * eye(n))


def test_an_operator_that_knows_no_domain_asks_for_an_example():
    op = LinearOperator(lambda v: v.flip(0))
    with pytest.raises(ValueError, match="like"):
        op.to_dense()
    assert close(op.to_dense(like=torch.zeros(3, dtype=F64)), eye(3).flip(0))


def test_only_the_structure_of_an_example_is_kept():
    example = torch.zeros(1000, dtype=F64)
    reference = weakref.ref(example)
    op = LinearOperator(lambda v: v, domain=example)
    del example
    assert reference() is None
    assert op.domain.shape == (1000,)
    assert op.domain.untyped_storage().nbytes() < 100


# -- derivatives through operators -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("kind", ["plain", "dense"])
@pytest.mark.parametrize(("build", "expected"), COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_gradients_reach_the_parts_and_the_scalars_of_a_composition(build, expected, kind, dtype):
    leaves = [draw(4, 4, dtype=dtype, seed=i).requires_grad_() for i in range(3)] + [draw(dtype=dtype, seed=9).requires_grad_()]
    x = draw(4, dtype=C128, seed=5).requires_grad_()
    forms = [LinearOperator(lambda v, M=M: M.to(v.dtype) @ v) if kind == "plain" else aslinearoperator(M) for M in leaves[:3]]

    def loss(y: Tensor) -> Tensor:
        return (y * draw(4, dtype=C128, seed=6)).sum().abs()

    M = expected(*leaves)
    for adjoint in (False, True):
        op = build(*forms, leaves[3])
        value = loss(op.H(x) if adjoint else op(x))
        reference = loss((M.mH if adjoint else M).to(C128) @ x)
        assert close(value, reference)
        got = torch.autograd.grad(value, [*leaves, x], allow_unused=True)
        wanted = torch.autograd.grad(reference, [*leaves, x], allow_unused=True, retain_graph=True)
        for g, w in zip(got, wanted, strict=True):
            assert (g is None) == (w is None)
            assert g is None or close(g, w)


def with_values(S: Tensor, values: Tensor) -> Tensor:
    """The sparse matrix with the pattern of `S` and other values."""
    if S.layout == torch.sparse_coo:
        return torch.sparse_coo_tensor(S.indices(), values, S.shape, is_coalesced=True, check_invariants=True)
    by_rows = S.layout in (torch.sparse_csr, torch.sparse_bsr)
    indices = (S.crow_indices(), S.col_indices()) if by_rows else (S.ccol_indices(), S.row_indices())
    return torch.sparse_compressed_tensor(*indices, values, S.shape, layout=S.layout, check_invariants=True)


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sparse_matrix_gets_a_gradient_on_its_own_pattern(name, dtype):
    """Through the leaf where torch can sum gradients of its layout or there is one only, and through real values always."""
    dense = patterned(4, 4, dtype=dtype).requires_grad_()
    S = LAYOUTS[name](dense.detach())
    S = S.coalesce() if name == "coo" else S
    leaf, values = S.clone().requires_grad_(), S.values().clone().requires_grad_()
    pattern = with_values(S, torch.ones_like(values)).to_dense() != 0
    x, weights = draw(4, dtype=dtype), draw(4, dtype=dtype, seed=3)

    def gradient(A: LinearOperator | Tensor, wrt: Tensor, build: Callable) -> Tensor:
        (result,) = torch.autograd.grad(((build(A) @ x) * weights).sum().abs(), wrt)
        return result

    cases = [
        (lambda A: A, lambda M: M, 1),
        (lambda A: A.H, lambda M: M.mH, 1),
        (lambda A: A.gram(0.5), lambda M: M.mH @ M + 0.25 * eye(4), 2),
    ]
    op = aslinearoperator(leaf)  # kept over several backward passes
    for build, expected, uses in cases:
        wanted = gradient(dense, dense, expected)[pattern]
        if name == "coo" or not dtype.is_complex:  # torch builds no other complex matrix differentiably
            got = gradient(aslinearoperator(with_values(S, values)), values, build)
            assert got.shape == values.shape
            assert close(with_values(S, got).to_dense()[pattern], wanted)
        if name in ("coo", "csr") or uses == 1:
            got = gradient(op, leaf, build)
            assert got.layout == leaf.layout
            assert close(got.to_dense()[pattern], wanted)
            assert not got.to_dense()[~pattern].any()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_dense_form_is_differentiable(name):
    dense = patterned(4, 4)
    S = LAYOUTS[name](dense).requires_grad_()
    weights = draw(4, 4, seed=2)
    (grad,) = torch.autograd.grad((aslinearoperator(S).to_dense() * weights).sum(), S)
    assert close(grad.to_dense()[dense != 0], weights[dense != 0])


def test_no_graph_is_built_without_grad_mode():
    W = draw(3, 3).requires_grad_()
    op = LinearOperator(lambda v: W @ v, domain=torch.zeros(3, dtype=F64))
    with torch.no_grad():
        for result in (op(draw(3)), op.H(draw(3)), op.gram(0.5)(draw(3)), op.H.to_dense()):
            assert not result.requires_grad
    assert op.H(draw(3)).requires_grad


def test_an_operator_that_autograd_cannot_follow_says_what_to_do():
    op = LinearOperator(lambda v: torch.from_numpy(2 * v.detach().numpy()))
    with pytest.raises(RuntimeError, match="adjoint="):
        op.H(draw(3))
    assert close(LinearOperator(op.fn, hermitian=True).H(draw(3)), 2 * draw(3))
    assert close(LinearOperator(op.fn, adjoint=op.fn).H(draw(3)), 2 * draw(3))


def test_operators_work_inside_transforms():
    W = draw(3, 3)
    x = draw(5, 3)

    def apply(W: Tensor, x: Tensor) -> Tensor:
        op = LinearOperator(lambda v: W @ v)
        return (op.gram(0.5) + 2 * aslinearoperator(W) @ op.H)(x)

    expected = (W.mT @ W + 0.25 * eye(3) + 2 * W @ W.mT).to(F64)
    assert close(torch.vmap(apply, in_dims=(None, 0))(W, x), x @ expected.mT)
    assert close(torch.func.jacrev(apply, argnums=1)(W, x[0]), expected)
    assert close(torch.func.jacfwd(apply, argnums=1)(W, x[0]), expected)
    dense = torch.func.jacrev(lambda W: (W.mT @ W + 2 * W @ W.mT) @ x[0])(W)
    assert close(torch.func.jacrev(apply)(W, x[0]), dense)


# -- claims ------------------------------------------------------------------------------------------------------------

NONE, HERMITIAN, DEFINITE = (False, False), (True, False), (True, True)
D, H, G = (
    aslinearoperator(torch.eye(3), positive_definite=True),
    aslinearoperator(torch.eye(3), hermitian=True),
    aslinearoperator(torch.eye(3)),
)
T = torch.tensor(2.0)

CLAIMS = {
    "definite": (lambda: D, DEFINITE),
    "hermitian": (lambda: H, HERMITIAN),
    "nothing": (lambda: G, NONE),
    "both": (lambda: aslinearoperator(torch.eye(3), hermitian=True, positive_definite=True), DEFINITE),
    "definite, not hermitian": (lambda: LinearOperator(abs, hermitian=False, positive_definite=True), DEFINITE),
    "definite + definite": (lambda: D + D, DEFINITE),
    "definite + hermitian": (lambda: D + H, HERMITIAN),
    "definite + nothing": (lambda: D + G, NONE),
    "hermitian + tensor": (lambda: H + torch.eye(3), NONE),
    "tensor + hermitian": (lambda: torch.eye(3) + H, NONE),
    "sum()": (lambda: sum([D, D, D]), DEFINITE),
    "definite - definite": (lambda: D - D, HERMITIAN),
    "definite - nothing": (lambda: D - G, NONE),
    "tensor - definite": (lambda: torch.eye(3) - D, NONE),
    "-definite": (lambda: -D, HERMITIAN),
    "-(-definite)": (lambda: -(D * -1), HERMITIAN),
    "2 definite": (lambda: 2 * D, DEFINITE),
    "definite / 2": (lambda: D / 2, DEFINITE),
    "0 definite": (lambda: 0 * D, HERMITIAN),
    "-2 definite": (lambda: D * -2.0, HERMITIAN),
    "definite / -2": (lambda: D / -2, HERMITIAN),
    "nan definite": (lambda: float("nan") * D, HERMITIAN),
    "i hermitian": (lambda: 1j * H, NONE),
    "i definite": (lambda: D * 1j, NONE),
    "definite / i": (lambda: D / 1j, NONE),
    "tensor definite": (lambda: T * D, HERMITIAN),
    "definite / tensor": (lambda: D / T, HERMITIAN),
    "negative tensor definite": (lambda: -T * D, HERMITIAN),
    "complex tensor definite": (lambda: torch.tensor(2 + 0j) * D, NONE),
    "float64 of NumPy": (lambda: np.float64(2.0) * D, DEFINITE),
    "float32 of NumPy": (lambda: D * np.float32(-2.0), HERMITIAN),
    "int of NumPy": (lambda: np.int64(2) * D, DEFINITE),
    "complex64 of NumPy": (lambda: np.complex64(1j) * D, NONE),
    "complex128 of NumPy": (lambda: np.complex128(1j) * D, NONE),
    "definite @ definite": (lambda: D @ D, NONE),
    "hermitian @ hermitian": (lambda: H @ H, NONE),
    "nothing.H @ nothing": (lambda: G.H @ G, NONE),
    "H of definite": (lambda: D.H, DEFINITE),
    "T of definite": (lambda: D.T, DEFINITE),
    "conj of definite": (lambda: D.conj(), DEFINITE),
    "T of hermitian": (lambda: H.T, HERMITIAN),
    "H of nothing": (lambda: G.H, NONE),
    "H of a sum": (lambda: (D + D).H, DEFINITE),
    "conj of a function": (lambda: LinearOperator(abs, positive_definite=True).conj(), DEFINITE),
    "H of i hermitian": (lambda: (1j * H).H, NONE),
    "gram": (lambda: G.gram(), HERMITIAN),
    "gram of definite": (lambda: D.gram(), DEFINITE),
    "gram, damped": (lambda: G.gram(0.1), DEFINITE),
    "gram, damped by less than 0": (lambda: G.gram(-0.1), DEFINITE),
    "gram, damped by NumPy": (lambda: G.gram(np.float64(0.1)), DEFINITE),
    "gram, damped by NaN": (lambda: G.gram(float("nan")), HERMITIAN),
    "gram, damped by a tensor": (lambda: G.gram(T), HERMITIAN),
    "gram + definite": (lambda: G.gram(0.1) + D, DEFINITE),
    "2 gram - definite": (lambda: 2 * G.gram(0.1) - D, HERMITIAN),
    "a claim added": (lambda: aslinearoperator(G, hermitian=True), HERMITIAN),
    "a claim added to another": (lambda: aslinearoperator(H, positive_definite=True), DEFINITE),
    "a claim added to a sum": (lambda: aslinearoperator(G + G, positive_definite=True), DEFINITE),
    "a claim kept": (lambda: aslinearoperator(D, hermitian=True), DEFINITE),
    "a hermitian claim not taken away": (lambda: aslinearoperator(H, hermitian=False), HERMITIAN),
    "a claim not taken away": (lambda: aslinearoperator(D, hermitian=False), DEFINITE),
    "H of a claim added to a sum": (lambda: aslinearoperator(G + G, hermitian=True).H, HERMITIAN),
}  # fmt: skip


@pytest.mark.parametrize(("build", "expected"), CLAIMS.values(), ids=CLAIMS)
def test_claims_follow_the_algebra_and_never_go_further(build, expected):
    op = build()
    assert (op.hermitian, op.positive_definite) == expected
    assert isinstance(op.hermitian, bool)
    assert isinstance(op.positive_definite, bool)


def test_a_claim_is_added_to_a_copy():
    op = G + G
    claimed = aslinearoperator(op, positive_definite=True)
    assert not op.hermitian
    assert close(claimed(torch.ones(3)), 2 * torch.ones(3))
    assert claimed.H is claimed
    assert not G.hermitian


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize(
    "name", [name for name, (_, (hermitian, _)) in CLAIMS.items() if hermitian and "nan" not in name.lower()]
)
def test_what_the_algebra_claims_is_true(name, dtype):
    """The cases of the table again, on matrices that are as claimed and otherwise random."""
    W = draw(3, 3, dtype=dtype)
    cases = {
        "D": aslinearoperator(W @ W.mH + torch.eye(3), positive_definite=True),
        "H": aslinearoperator(W + W.mH, hermitian=True),
        "G": aslinearoperator(W),
    }
    if "added" in name or "not hermitian" in name or "function" in name:
        return  # these claim what the user says
    build = CLAIMS[name][0]
    old = {key: globals()[key] for key in cases}
    try:
        globals().update(cases)
        op = build()
    finally:
        globals().update(old)
    M = op.to_dense(like=torch.zeros(3, dtype=dtype))
    assert close(M, M.mH)
    if op.positive_definite:
        assert torch.linalg.eigvalsh(M).min() > 0


# -- solve uses the claims ---------------------------------------------------------------------------------------------


def definite(M: Tensor) -> LinearOperator:
    return aslinearoperator(M, positive_definite=True)


CHOSEN = {
    "definite function": (lambda M: LinearOperator(lambda v: M @ v, positive_definite=True), "cg"),
    "hermitian function": (lambda M: LinearOperator(lambda v: M @ v, hermitian=True), "minres"),
    "function": (lambda M: lambda v: M @ v, "gmres"),
    "dense": (lambda M: M, "direct"),
    "definite dense": (lambda M: aslinearoperator(M, positive_definite=True), "direct"),
    "sparse": (lambda M: M.to_sparse_csr(), "gmres"),
    "definite sparse": (lambda M: aslinearoperator(M.to_sparse_coo(), positive_definite=True), "cg"),
    "function @ function": (lambda M: LinearOperator(lambda v: M @ v) @ LinearOperator(lambda v: M @ v), "gmres"),
    "gram of a function, undamped": (lambda M: LinearOperator(lambda v: M @ v).gram(), "minres"),
    "definite + definite": (lambda M: 2 * definite(M) + definite(M), "cg"),
    "definite - definite": (lambda M: definite(M) - 0.1 * definite(M), "minres"),
    "definite * tensor": (lambda M: definite(M) * T, "direct"),
    "definite @ definite": (lambda M: definite(M) @ definite(M), "direct"),
    "gram": (lambda M: aslinearoperator(M).gram(), "direct"),
    "gram, damped": (lambda M: aslinearoperator(M).gram(0.1), "cg"),
    "gram of a function": (lambda M: LinearOperator(lambda v: M @ v).gram(0.1), "cg"),
    "H": (lambda M: LinearOperator(lambda v: M @ v).H, "gmres"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "method"), CHOSEN.values(), ids=CHOSEN)
def test_solve_chooses_the_method_from_the_claims(build, method):
    W = draw(5, 5)
    M = W @ W.mT + torch.eye(5)
    b = draw(5, seed=1)
    A = build(M)
    x, info = ns.solve_ex(A, b, rtol=1e-12)
    assert info.method == method
    assert info.converged
    assert torch.allclose(aslinearoperator(A).to_dense(like=b) @ x, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [None, "gmres"])
@pytest.mark.parametrize("kind", ["plain", "dense"])
def test_a_composition_is_solved_and_differentiated_as_the_dense_one(kind, method):
    W, t, s = draw(8, 5).requires_grad_(), torch.tensor(0.7, dtype=F64, requires_grad=True), draw(5, seed=2).requires_grad_()
    b = draw(5, seed=3).requires_grad_()
    part = LinearOperator(lambda v: W @ v, domain=torch.zeros(5, dtype=F64), codomain=torch.zeros(8, dtype=F64))
    op = (part if kind == "plain" else aslinearoperator(W)).gram(t) + LinearOperator(lambda v: s.exp() * v, hermitian=True)
    x, info = ns.solve_ex(op, b, method=method, rtol=1e-12)
    assert info.method == (method or "minres")
    expected = torch.linalg.inv(W.mT @ W + t**2 * torch.eye(5) + s.exp().diag()) @ b
    assert torch.allclose(x, expected, rtol=1e-9)
    weights = draw(5, seed=4)
    got = torch.autograd.grad(x @ weights, [W, t, s, b])
    for g, w in zip(got, torch.autograd.grad(expected @ weights, [W, t, s, b]), strict=True):
        assert torch.allclose(g, w, rtol=1e-7, atol=1e-9)


# -- aslinearoperator of everything ------------------------------------------------------------------------------------


class Doubler(torch.nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return 2 * v

    def method(self, v: Tensor) -> Tensor:
        return 2 * v


ACCEPTED = {
    "function": (lambda v: 2 * v, LinearOperator),
    "module": (Doubler(), LinearOperator),
    "bound method": (Doubler().method, LinearOperator),
    "partial": (functools.partial(torch.mul, 2), LinearOperator),
    "parameter": (torch.nn.Parameter(2 * torch.eye(4)), DenseOperator),
    "dense": (2 * torch.eye(4), DenseOperator),
    "batch of dense": (2 * torch.eye(4).expand(3, 4, 4), DenseOperator),
    **{name: (to(2 * torch.eye(4)), SparseOperator) for name, to in LAYOUTS.items()},
    "operator": (LinearOperator(lambda v: 2 * v), LinearOperator),
    "composition": (2 * aslinearoperator(torch.eye(4)), LinearOperator),
}


@pytest.mark.parametrize(("A", "kind"), ACCEPTED.values(), ids=ACCEPTED)
def test_everything_becomes_an_operator(A, kind):
    op = aslinearoperator(A)
    assert isinstance(op, kind)
    x = torch.arange(4.0) if "batch" not in str(A) else torch.ones(3, 4)
    assert torch.equal(op(x).reshape(-1, 4)[0], 2 * x)
    assert aslinearoperator(op) is op
    assert aslinearoperator(A, positive_definite=True).positive_definite
    combined = A + op if isinstance(A, LinearOperator) else op + A
    assert torch.equal(combined(x).reshape(-1, 4)[0], 4 * x)


REJECTED = {
    "number": (2.0, TypeError, "A: expected.*float"),
    "array": (np.eye(3), TypeError, "A: expected.*ndarray"),
    "list": ([[1.0]], TypeError, "A: expected.*list"),
    "None": (None, TypeError, "A: expected.*NoneType"),
    "vector": (torch.ones(3), ValueError, r"A: expected a matrix.*\(3,\)"),
    "0-d": (torch.ones(()), ValueError, "A: expected a matrix"),
    "integers": (torch.ones(3, 3, dtype=torch.int64), ValueError, "A: expected.*int64"),
    "bools": (torch.ones(3, 3, dtype=torch.bool), ValueError, "A: expected.*bool"),
    "sparse integers": (torch.eye(3, dtype=torch.int64).to_sparse(), ValueError, "A: expected.*int64"),
    "sparse vector": (torch.ones(3).to_sparse(), ValueError, r"A: expected a sparse matrix.*\(3,\)"),
    "batch of sparse": (torch.eye(2).expand(3, 2, 2).to_sparse_csr(), ValueError, "A: expected a sparse matrix"),
    "hybrid": (torch.ones(3, 3, 2).to_sparse(2), ValueError, "A: expected a sparse matrix"),
}


@pytest.mark.parametrize(("A", "error", "words"), REJECTED.values(), ids=REJECTED)
def test_what_is_no_operator_is_refused_by_name(A, error, words):
    with pytest.raises(error, match=words):
        aslinearoperator(A)


ILL_FORMED = {
    "fn": (lambda: LinearOperator(3), TypeError, "fn: expected a callable, got int"),
    "adjoint": (lambda: LinearOperator(abs, adjoint=3), TypeError, "adjoint: expected a callable or None, got int"),
    "domain": (lambda: LinearOperator(abs, domain=(3, 3)), TypeError, "domain: expected"),
    "codomain": (lambda: LinearOperator(abs, codomain="x"), TypeError, "codomain: expected"),
    "like": (lambda: LinearOperator(abs).to_dense(like=3), TypeError, "like: expected"),
    "hermitian": (lambda: LinearOperator(abs, hermitian=1), TypeError, "hermitian: expected a bool, got int"),
    "claim on a tensor": (lambda: aslinearoperator(torch.eye(3), hermitian="yes"), TypeError, "hermitian: expected a bool"),
    "claim on an operator": (lambda: aslinearoperator(G, hermitian=None), TypeError, "hermitian: expected a bool"),
    "unknown claim": (lambda: aslinearoperator(torch.eye(3), hermitan=True), TypeError, "hermitan.*did you mean 'hermitian'"),
    "unknown claim on an operator": (lambda: aslinearoperator(G, positive=True), TypeError, "did you mean 'positive_definite'"),
    "damp": (lambda: G.gram("x"), TypeError, "damp"),
    "complex damp": (lambda: G.gram(1j), TypeError, "damp: expected a real"),
    "complex tensor damp": (lambda: G.gram(torch.tensor(1j)), TypeError, "damp: expected a real"),
    "vector damp": (lambda: G.gram(torch.ones(3)), TypeError, "damp"),
    "vector": (lambda: G([1.0, 2.0, 3.0]), TypeError, "x: expected"),
}


@pytest.mark.parametrize(("build", "error", "words"), ILL_FORMED.values(), ids=ILL_FORMED)
def test_misuse_names_the_argument(build, error, words):
    with pytest.raises(error, match=words):
        build()


# -- compositions that have no meaning ---------------------------------------------------------------------------------

NARROW, WIDE = torch.ones(3, 4), torch.ones(6, 5)
SIDES = {
    "dense": (aslinearoperator(NARROW), aslinearoperator(WIDE)),
    "sparse": (aslinearoperator(NARROW.to_sparse_csr()), aslinearoperator(WIDE.to_sparse_coo())),
    "functions": (plain(NARROW), plain(WIDE)),
    "dense and function": (aslinearoperator(NARROW), plain(WIDE)),
    "composition and sparse": (2 * aslinearoperator(NARROW), aslinearoperator(WIDE.to_sparse_csr())),
    "derived adjoints": (plain(NARROW.mT).H, plain(WIDE.mT).T),
}


@pytest.mark.parametrize("combine", [python.add, python.sub, python.matmul])
@pytest.mark.parametrize(("A", "B"), SIDES.values(), ids=SIDES)
def test_shapes_that_do_not_fit_raise_at_construction_and_are_both_named(A, B, combine):
    with pytest.raises(ValueError, match=r"4\D.*(5|6)\D|(5|6)\D.*4\D"):
        combine(A, B)
    with pytest.raises(ValueError, match=r"domain|inner space"):
        combine(B, A)


def test_sizes_of_one_do_not_broadcast():
    with pytest.raises(ValueError, match="codomain"):
        aslinearoperator(torch.ones(3, 3)) + torch.ones(1, 3)
    loose = LinearOperator(lambda v: v) + (lambda v: v.sum(0, keepdim=True))
    with pytest.raises(ValueError, match=r"\(3,\).*\(1,\)"):
        loose(torch.ones(3))


def test_trees_that_differ_raise_at_construction():
    u = torch.zeros(2)
    with pytest.raises(ValueError, match="domain"):
        LinearOperator(abs, domain={"u": u}) + LinearOperator(abs, domain=[u])
    with pytest.raises(ValueError, match="codomain of the right"):
        LinearOperator(abs, domain={"u": u}) @ LinearOperator(abs, domain={"u": torch.zeros(3)})


MEANINGLESS = {
    "A + number": lambda: G + 1.0,
    "number + A": lambda: 1.0 + G,
    "A - number": lambda: G - 1,
    "A + vector": lambda: G + torch.ones(3),
    "vector + A": lambda: torch.ones(3) + G,
    "A * vector": lambda: G * torch.ones(3),
    "vector * A": lambda: torch.ones(3) * G,
    "A * operator": lambda: G * G,
    "A / vector": lambda: G / torch.ones(3),
    "number / A": lambda: 1 / G,
    "tensor / A": lambda: T / G,
    "matrix @ A": lambda: torch.eye(3) @ G,
    "A ** 2": lambda: G**2,
    "array + A": lambda: np.eye(3) + G,
    "array * A": lambda: np.ones(3) * G,
    "torch.add with alpha": lambda: torch.add(torch.eye(3), G, alpha=2.0),
    "torch.sub with alpha": lambda: torch.sub(torch.eye(3), G, alpha=2.0),
    "torch.exp": lambda: torch.exp(G),
    "A + None": lambda: G + None,
}


@pytest.mark.parametrize("combine", MEANINGLESS.values(), ids=MEANINGLESS)
def test_what_has_no_meaning_is_a_type_error(combine):
    with pytest.raises(TypeError):
        combine()


LEFT = {
    "tensor scalar": lambda: T * G,
    "tensor matrix +": lambda: torch.eye(3) + G,
    "tensor matrix -": lambda: 3 * torch.eye(3) - G,
    "sparse matrix +": lambda: torch.eye(3).to_sparse() + G,
    "function +": lambda: (lambda v: v) + G,
    "function -": lambda: (lambda v: 3 * v) - G,
    "module +": lambda: torch.nn.Identity() + G,
    "0 +": lambda: 0 + 2 * G,
    "NumPy float *": lambda: np.float64(2.0) * G,
    "NumPy float32 *": lambda: np.float32(2.0) * G,
}


@pytest.mark.parametrize("build", LEFT.values(), ids=LEFT)
def test_the_left_side_may_be_what_becomes_an_operator(build):
    op = build()
    assert isinstance(op, LinearOperator)
    assert torch.equal(op(torch.ones(3)), 2 * torch.ones(3))


# -- operators are values ----------------------------------------------------------------------------------------------


def reversing(v: Tensor) -> Tensor:
    return v.flip(0)


COPIED = {
    "dense": lambda M: aslinearoperator(M, positive_definite=True),
    **{name: lambda M, to=to: aslinearoperator(to(M), hermitian=True) for name, to in LAYOUTS.items()},
    "function": lambda M: LinearOperator(reversing, domain=torch.zeros(4, dtype=F64), hermitian=True),
    "sum": lambda M: aslinearoperator(M) + M.to_sparse_csr(),
    "product": lambda M: aslinearoperator(M.to_sparse_coo()) @ aslinearoperator(M),
    "scaled": lambda M: torch.tensor(2.0, dtype=F64) * aslinearoperator(M) / 3,
    "gram": lambda M: (aslinearoperator(M) + LinearOperator(reversing)).gram(0.5),
    "transposes": lambda M: (aslinearoperator(M.to_sparse_csc()).H + 2 * LinearOperator(reversing).T).conj(),
    "claimed": lambda M: aslinearoperator(aslinearoperator(M) + M, positive_definite=True),
}  # fmt: skip


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda op: pickle.loads(pickle.dumps(op))], ids=["deepcopy", "copy", "pickle"]
)
@pytest.mark.parametrize("build", COPIED.values(), ids=COPIED)
def test_a_copy_is_the_same_operator(build, copied):
    M = draw(4, 4)
    op = build(M)
    again = copied(op)
    x = draw(4, seed=1)
    assert type(again) is type(op)
    assert again.claims == op.claims
    assert repr(again) == repr(op)
    assert close(again(x), op(x))
    assert close(again.H(x), op.H(x))
    assert close(again.to_dense(like=x), op.to_dense(like=x))
    if copied is not copy.copy:
        M.zero_()  # a deep copy has its own matrix
        assert again(x).any()


def test_an_operator_frees_its_matrix_without_the_garbage_collector():
    builds = {
        "dense": lambda M: aslinearoperator(M),
        "claimed": lambda M: aslinearoperator(aslinearoperator(M), hermitian=True),
        "composition": lambda M: (2 * aslinearoperator(M) + M).gram(0.1).H.conj(),
        "function": lambda M: LinearOperator(lambda v: M @ v).H @ LinearOperator(lambda v: M @ v),
    }
    for name, build in builds.items():
        M = draw(4, 4)
        reference = weakref.ref(M)
        gc.collect()
        gc.disable()
        try:
            op = build(M)
            op.H(op(draw(4)))
            del M, op
            assert reference() is None, name
        finally:
            gc.enable()


def test_composing_leaves_the_parts_as_they_were():
    A, B = aslinearoperator(draw(4, 4)), plain(draw(4, 4, seed=1))
    before = [(dict(vars(op)), op.to_dense()) for op in (A, B)]
    (2 * A - B.H @ A).gram(0.5)
    aslinearoperator(A, positive_definite=True)
    for op, (attributes, matrix) in zip((A, B), before, strict=True):
        assert dict(vars(op)).keys() == attributes.keys()
        assert all(vars(op)[key] is value for key, value in attributes.items())
        assert torch.equal(op.to_dense(), matrix)


def test_applying_writes_into_neither_argument_nor_result():
    M = draw(4, 4, dtype=C128)
    for name, kind in KINDS.items():
        op = (2 * kind(M) + kind(M).H @ kind(M)).gram(0.5) - kind(M).T
        report = check_operator(op, torch.zeros(4, dtype=C128))
        assert report.ok, f"{name}: {report}"


REPRS = {
    "LinearOperator(reversing)": lambda: LinearOperator(reversing),
    "LinearOperator(reversing) [hermitian]": lambda: LinearOperator(reversing, hermitian=True),
    "LinearOperator(Doubler) [positive_definite]": lambda: LinearOperator(Doubler(), positive_definite=True),
    "LinearOperator(reversing): (2, 3) float64 -> (6,) float64": lambda: LinearOperator(
        reversing, domain=draw(2, 3), codomain=draw(6)
    ),
    "LinearOperator(reversing): {a: (2,), b: (3,)} float64": lambda: LinearOperator(
        reversing, domain={"a": draw(2), "b": draw(3)}
    ),
    "DenseOperator: (..., 4) float64 -> (..., 3) float64": lambda: aslinearoperator(draw(3, 4)),
    "DenseOperator: (..., 3) complex128 -> (..., 4) complex128": lambda: aslinearoperator(draw(3, 4, dtype=C128)).H,
    "SparseOperator(BSR): (..., 4) float64 [hermitian]": lambda: aslinearoperator(
        torch.eye(4, dtype=F64).to_sparse_bsr((2, 2)), hermitian=True
    ),
    """\
Gram(damp=0.5): (2,) float64 [positive_definite]
└─ Sum: (2,) float64
   ├─ Product: (2,) float64
   │  ├─ Adjoint: (2,) float64
   │  │  └─ LinearOperator(reversing): (2,) float64
   │  └─ LinearOperator(reversing): (2,) float64
   └─ 2 *: (2,) float64
      └─ tensor *: (2,) float64
         └─ Conjugate: (2,) float64
            └─ LinearOperator(reversing): (2,) float64""": lambda: tree_of(LinearOperator(reversing, domain=draw(2))),
}


def tree_of(A: LinearOperator) -> LinearOperator:
    return (A.H @ LinearOperator(reversing, domain=draw(2)) + 2 * (T * A.conj())).gram(0.5)


def test_the_expression_of_an_operator_is_one_line():
    A = LinearOperator(reversing, domain=draw(2))
    name = "LinearOperator(reversing)"
    assert tree_of(A).expression == f"(({name}.H @ {name}) + 2 * tensor * {name}.conj()).gram(0.5)"


@pytest.mark.parametrize(("text", "build"), REPRS.items(), ids=REPRS)
def test_the_repr_tells_kind_structure_and_claims(text, build):
    assert repr(build()) == text
