"""What operators know of rank and nullspace is true of their matrices, and follows the algebra as far as mathematics does."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_cases import draw, flat, instances, random_like
from torch import Tensor
from torch.utils import _pytree as pytree

from nablasolve import LinearOperator, aslinearoperator
from nablasolve.operators import (
    BlockDiagonal,
    Circulant,
    ConvectionDiffusion,
    Diagonal,
    Diffusion,
    FiniteDifference,
    Gradient,
    GraphLaplacian,
    HStack,
    Identity,
    Inverse,
    Jacobian,
    KernelMatrix,
    Kronecker,
    Laplacian,
    LowRank,
    Permutation,
    Stokes,
    Subsample,
    Toeplitz,
    VStack,
    Wavelet,
    Zero,
)
from nablasolve.operators.claims import Claims
from nablasolve.operators.graph_laplacian import connected_components
from nablasolve.operators.spaces import dimension, zeros

F64, C128 = torch.float64, torch.complex128


def columns(vectors: Any, space: Any) -> Tensor:
    """Vectors, or a basis of the image of the projection, as the columns of a matrix."""
    if not isinstance(vectors, tuple):
        matrix = LinearOperator(vectors, domain=zeros(space)).to_dense()
        assert torch.allclose(matrix @ matrix, matrix)
        return torch.linalg.svd(matrix).U[:, : int(torch.linalg.matrix_rank(matrix))].to(C128)
    return torch.stack([flat(v).to(C128) for v in vectors], dim=1) if vectors else torch.zeros(dimension(space), 0, dtype=C128)


def spans(vectors: Any, M: Tensor, space: Any) -> bool:
    """Whether vectors are a basis of the nullspace of a matrix."""
    N = columns(vectors, space)
    size = float(M.abs().max()) or 1.0
    vanishes = bool((M @ N).abs().max() <= 1e-11 * size * float(N.abs().max())) if N.numel() else True
    independent = int(torch.linalg.matrix_rank(N)) == N.shape[1] if N.numel() else True
    return vanishes and independent and N.shape[1] == M.shape[1] - int(torch.linalg.matrix_rank(M, rtol=1e-10))


def true_of_the_matrix(A: LinearOperator, M: Tensor | None = None) -> None:
    """Whatever is known of rank and nullspaces."""
    M = (A.to_dense() if M is None else M).detach().to(C128)
    rank = int(torch.linalg.matrix_rank(M, rtol=1e-10))
    assert not A.claims.full_column_rank or rank == M.shape[1]
    assert not A.claims.full_row_rank or rank == M.shape[0]
    for vectors, matrix, space in ((A.nullspace, M, A.domain), (A.left_nullspace, M.mH, A.codomain)):
        if vectors is not None:
            assert spans(vectors, matrix, space)
        for vector in vectors if isinstance(vectors, tuple) else ():
            expected = pytree.tree_map(lambda t: t.shape, random_like(space))
            assert pytree.tree_map(lambda t: t.shape, vector) == expected
            assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(vector))
    assert (A.nullspace == ()) >= A.claims.full_column_rank
    assert (A.left_nullspace == ()) >= A.claims.full_row_rank


def matrix(m: int, n: int, rank: int, dtype: torch.dtype = C128, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix of a rank, with bases of its nullspace and of that of its adjoint, as rows."""
    M = draw(m, rank, dtype=dtype, seed=seed) @ draw(rank, n, dtype=dtype, seed=seed + 1)
    U, _, Vh = torch.linalg.svd(M)
    # neither normalised nor orthogonal
    mix = [torch.eye(k, dtype=dtype) * 3 + torch.ones(k, k, dtype=dtype) for k in (n - rank, m - rank)]
    return M, mix[0] @ Vh[rank:].conj(), mix[1] @ U[:, rank:].mT


# -- families ----------------------------------------------------------------------------------------------------------


def known(A: LinearOperator, nullspace: int | None, left_nullspace: int | None) -> None:
    """The nullspaces have these dimensions, or are not known, and are true."""
    for vectors, size in ((A.nullspace, nullspace), (A.left_nullspace, left_nullspace)):
        assert (vectors is None) == (size is None)
        assert vectors is None or len(vectors) == size
    true_of_the_matrix(A)


@pytest.mark.parametrize("dtype", [F64, C128], ids=["real", "complex"])
@pytest.mark.parametrize("mean", ["harmonic", "arithmetic"])
@pytest.mark.parametrize(
    ("grid", "boundary"),
    [
        ((5,), "neumann"), ((1,), "neumann"), ((1,), "periodic"), ((2,), "periodic"), ((5,), "periodic"), ((6,), "periodic"),
        ((3, 4), "neumann"), ((3, 4), "periodic"), ((4, 4), "periodic"), ((2, 1), "periodic"),
        ((3, 4), ("neumann", "periodic")), ((2, 3, 2), "neumann"), ((2, 3, 2), "periodic"),
        ((2, 1, 3), ("periodic", "neumann", "periodic")),
    ],
)  # fmt: skip
def test_diffusion_without_an_outlet_has_the_constants(grid: Any, boundary: Any, mean: str, dtype: torch.dtype) -> None:
    k = draw(*grid).exp().to(dtype)
    k = k * torch.exp(1j * torch.tanh(draw(*grid, seed=1))) if dtype.is_complex else k
    known(Diffusion(k, boundary=boundary, mean=mean, spacing=0.7), 1, 1)
    known(Diffusion(-k, boundary=boundary, mean=mean), 1, 1)
    known(Diffusion(k, boundary=boundary, mean=mean, reaction=1.0), None, None)
    batched = Diffusion(torch.stack([k, 2 * k]), boundary=boundary, mean=mean, ndim=len(grid))
    assert batched.nullspace[0].shape == grid
    assert not batched(batched.nullspace[0]).abs().max() > 1e-12


def test_diffusion_with_an_outlet_says_nothing() -> None:
    k = draw(3, 4).exp()
    for boundary in ("dirichlet", ("neumann", "dirichlet"), ("periodic", ("neumann", "dirichlet"))):
        known(Diffusion(k, boundary=boundary), None, None)
    known(Diffusion(k, boundary=("periodic", ("neumann", "dirichlet")), positive_definite=True), 0, 0)


@pytest.mark.parametrize("scheme", ["upwind", "central"])
@pytest.mark.parametrize(
    ("grid", "boundary"),
    [
        ((5,), "closed"), ((6,), "periodic"), ((2,), "periodic"), ((1,), "periodic"), ((3, 4), "closed"), ((4, 4), "periodic"),
        ((3, 4), ("closed", "periodic")), ((2, 3, 2), ("closed", "periodic", "periodic")),
    ],
)  # fmt: skip
def test_convection_that_conserves_the_sum_has_the_constants_on_the_left(grid: Any, boundary: Any, scheme: str) -> None:
    k, v = draw(*grid).exp(), 3 * draw(len(grid), *grid, seed=1)
    known(ConvectionDiffusion(k, v, boundary=boundary, scheme=scheme, spacing=0.7), None, 1)
    known(ConvectionDiffusion(k, v, boundary=boundary, scheme=scheme).H, 1, None)
    known(ConvectionDiffusion(k, v, boundary=boundary, scheme=scheme, reaction=0.5), None, None)


def test_convection_through_an_outlet_says_nothing() -> None:
    k, v = draw(3, 4).exp(), draw(2, 3, 4, seed=1)
    for boundary in ("dirichlet", "neumann", ("closed", ("closed", "neumann"))):
        known(ConvectionDiffusion(k, v, boundary=boundary), None, None)


SHAPES = ((1,), (2,), (5,), (6,), (1, 4), (3, 4), (4, 4), (3, 5), (3, 1, 3), (2, 3, 2), (4, 2, 2))


@pytest.mark.parametrize("channels", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("boundary", ["circular", "zero", "neumann"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_laplacian_has_the_constants_of_each_channel(shape: Any, boundary: str, channels: tuple[int, ...]) -> None:
    L = Laplacian(shape, boundary=boundary, channels=channels, dtype=F64)
    size = 0 if boundary == "zero" else max(1, int(torch.tensor(channels).prod()))
    positive = -L
    for A in (L, positive, -positive, -2 * L, L / 3):
        known(A, size, size)


@pytest.mark.parametrize("kind", ["forward", "backward", "central"])
@pytest.mark.parametrize("boundary", ["circular", "zero", "neumann"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_knows_all_that_it_does_not_see(shape: Any, boundary: str, kind: str) -> None:
    size = 1
    if kind == "central" and boundary == "circular":
        size = 2 ** sum(n % 2 == 0 for n in shape)
    elif boundary == "zero":
        size = int(kind == "central" and all(n % 2 for n in shape))
    D = Gradient(shape, boundary=boundary, kind=kind, dtype=F64, spacing=0.5)
    known(D, size, None)
    known(D.H, None, size)
    known(D.gram(), size, size)
    assert D.gram().positive_definite == (size == 0)
    known(Gradient(shape, boundary=boundary, kind=kind, dtype=C128, channels=(2,)), 2 * size, None)


@pytest.mark.parametrize("kind", ["forward", "backward", "central"])
@pytest.mark.parametrize("boundary", ["circular", "zero", "neumann"])
@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_differences_along_the_only_dimension_know_it_too(n: int, boundary: str, kind: str) -> None:
    size = 2 if kind == "central" and boundary == "circular" and n % 2 == 0 else 1
    if boundary == "zero":
        size = int(kind == "central" and n % 2 == 1)
    left = size if boundary == "circular" or size == 0 else None
    known(FiniteDifference(n, boundary=boundary, kind=kind, dtype=F64), size, left)
    known(FiniteDifference((1, n, 1), 1, boundary=boundary, kind=kind, dtype=F64), size, left)
    wide = FiniteDifference((n, 3), 0, boundary=boundary, kind=kind, dtype=F64)
    known(wide, 0 if size == 0 else None, 0 if size == 0 else None)


ENDS = ("no-slip", "free-slip", "periodic", ("free-slip", "no-slip"))


@pytest.mark.parametrize("gauge", [0.0, 0.7])
@pytest.mark.parametrize("ends", list(itertools.product(ENDS, repeat=2)), ids=str)
def test_stokes_knows_what_no_wall_holds(ends: Any, gauge: float) -> None:
    held = any("no-slip" in end for end in ends)
    size = (0 if held else ends.count("periodic")) + (gauge == 0)
    for grid in ((3, 4), (2, 2), (4, 3)):
        eta = draw(*grid).exp()
        known(Stokes(grid, eta, boundary=ends, gauge=gauge, spacing=(0.9, 1.2)), size, size)
    known(Stokes((3, 3), (eta[:3, :3] * (1 + 0.3j)), boundary=ends, gauge=gauge), size, size)


@pytest.mark.parametrize(
    ("ends", "size"),
    [
        (("periodic", "periodic", "periodic"), 3), (("periodic", "free-slip", "periodic"), 2), ("no-slip", 0), ("free-slip", 0),
        (("periodic", "no-slip", "periodic"), 0), (("free-slip", "free-slip", "periodic"), 1),
    ],
)  # fmt: skip
def test_stokes_in_three_dimensions_too(ends: Any, size: int) -> None:
    eta = draw(2, 3, 2).exp()
    known(Stokes((2, 3, 2), eta, boundary=ends), size, size)
    known(Stokes((2, 3, 2), eta, boundary=ends, gauge=0.0), size + 1, size + 1)


def test_zero_maps_everything_to_zero() -> None:
    A = Zero(draw(3), codomain=draw(4))
    true_of_the_matrix(A)
    assert torch.equal(A.nullspace(draw(3)), draw(3))
    assert torch.equal(A.left_nullspace(draw(2, 4)), draw(2, 4))
    assert torch.equal(A.H.nullspace(draw(4)), draw(4))
    assert Zero(draw(3)).left_nullspace is not None


@pytest.mark.parametrize("instance", instances(wide=True), ids=str)
def test_whatever_an_operator_of_the_grid_knows_is_true(instance: Any) -> None:
    A = instance.case.build(**instance.parameters)
    M = instance.case.dense(**instance.parameters)
    true_of_the_matrix(A, M)
    true_of_the_matrix(A.H, M.mH)


# -- graphs ------------------------------------------------------------------------------------------------------------

GRAPHS: dict[str, tuple[list[tuple[int, int]], int | None, int]] = {
    "connected": ([(0, 1), (1, 2), (2, 0), (3, 1)], None, 1),
    "two": ([(0, 1), (2, 3), (3, 4)], None, 2),
    "isolated nodes": ([(4, 1), (1, 4), (2, 2)], 6, 5),
    "a path": ([(i, i + 1) for i in range(30)], None, 1),
    "a path in a wild order": ([((7 * i) % 31, (7 * i + 7) % 31) for i in range(30)], None, 1),
    "a star, backwards": ([(9, i) for i in range(9)], None, 1),
    "two interleaved paths": ([(i, i + 2) for i in range(20)][::-1], None, 2),
    "no edges": ([], 3, 3),
    "one node": ([(0, 0)], None, 1),
}  # fmt: skip


def graph(edges: list[tuple[int, int]], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(edges, dtype=dtype).reshape(-1, 2).mT


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_has_one_vector_for_each_component(name: str) -> None:
    edges, nodes, count = GRAPHS[name]
    A = GraphLaplacian(graph(edges), draw(len(edges)).exp(), nodes)
    known(A, count, count)
    total = sum(A.nullspace)
    assert torch.equal(total, torch.ones_like(total))  # each node is in one
    assert torch.equal(A.exact_diagonal(), A.to_dense().diagonal())
    for dtype in (torch.int32, torch.int8):
        assert torch.equal(GraphLaplacian(graph(edges, dtype), draw(len(edges)).exp(), nodes).to_dense(), A.to_dense())


def test_components_of_random_graphs() -> None:
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        nodes, m = 40, int(torch.randint(1, 60, (), generator=generator))
        edges = torch.randint(0, nodes, (2, m), generator=generator)
        reach = torch.eye(nodes, dtype=torch.bool)
        reach[edges[0], edges[1]] = reach[edges[1], edges[0]] = True
        for _ in range(6):
            reach = (reach.float() @ reach.float()) > 0
        # the smallest node that can be reached
        assert torch.equal(connected_components(edges, nodes), reach.int().argmax(1))


def test_a_graph_laplacian_with_any_batch_and_in_any_transform() -> None:
    edges, x = graph(GRAPHS["two"][0]), draw(4, 5)
    w = draw(2, 1, 3).exp().requires_grad_()
    A = GraphLaplacian(edges, w)
    dense = torch.stack([GraphLaplacian(edges, one[0]).to_dense() for one in w])
    assert torch.allclose(A(x), torch.einsum("bij,kj->bki", dense, x))
    assert torch.allclose(A(x[0] + 1j * x[1])[:, 0], torch.einsum("bij,j->bi", dense.to(C128), x[0] + 1j * x[1]))
    assert A.nullspace[0].shape == (5,)

    def energy(w: Tensor) -> Tensor:
        return 0.5 * x[0] @ GraphLaplacian(edges, w)(x[0])

    expected = 0.5 * (x[0, edges[0]] - x[0, edges[1]]) ** 2
    one = w[0, 0].detach()
    assert torch.allclose(torch.func.grad(energy)(one), expected)
    assert torch.allclose(torch.func.jacfwd(energy)(one), expected)
    assert torch.allclose(torch.vmap(torch.func.grad(energy))(w[:, 0].detach()), expected.expand(2, 3))
    assert torch.allclose(torch.vmap(lambda v: GraphLaplacian(edges, one)(v))(x), GraphLaplacian(edges, one)(x))
    A(x).square().sum().backward()
    assert torch.autograd.gradcheck(lambda w, x: GraphLaplacian(edges, w)(x), (w.detach().requires_grad_(), x.requires_grad_()))
    assert float(w.grad.abs().min()) > 0


@pytest.mark.parametrize(
    ("edges", "weights", "nodes", "error", "message"),
    [
        ([(0, 1)], draw(1), None, TypeError, "edges: expected a Tensor of integers, got list"),
        (torch.zeros(2, 1), draw(1), None, ValueError, "edges: expected integers of shape (2, m), got torch.float32"),
        (torch.zeros(3, 2).long(), draw(2), None, ValueError, "edges: expected integers of shape (2, m), got torch.int64"),
        (graph([(0, 1)]), [1.0], None, TypeError, "weights: expected a Tensor, got list"),
        (graph([(0, 1)]), draw(1, dtype=C128), None, ValueError, "weights: expected a real floating-point dtype"),
        (graph([(0, 1)]), draw(2), None, ValueError, "weights: expected shape (..., 1) for 1 edges, got (2,)"),
        (graph([(0, 1)]), torch.tensor(1.0), None, ValueError, "weights: expected shape (..., 1) for 1 edges, got ()"),
        (graph([(0, 3)]), draw(1), 3, ValueError, "edges: expected nodes from 0 to 2, got 3"),
        (graph([(0, -1)]), draw(1), None, ValueError, "edges: expected nodes from 0 to 0, got -1"),
        (graph([(0, 1)]), draw(1), 2.0, TypeError, "nodes: expected an integer, got float"),
        (graph([]), draw(0), None, ValueError, "nodes: expected at least 1, got no edges"),
        (graph([(0, 1)]), draw(1).to("meta"), None, ValueError, "weights: expected the device cpu of the edges, got meta"),
    ],
)  # fmt: skip
def test_a_graph_that_is_none(edges: Any, weights: Any, nodes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        GraphLaplacian(edges, weights, nodes)


# -- the rank ----------------------------------------------------------------------------------------------------------

TALL, WIDE, SQUARE = draw(5, 3, dtype=C128), draw(3, 5, dtype=C128), draw(4, 4, dtype=C128)


def black_box(M: Tensor, **claims: Any) -> LinearOperator:
    return LinearOperator(lambda v: v.to(M.dtype) @ M.mT, domain=M[0], codomain=M[:, 0], **claims)


KINDS: dict[str, Callable[..., LinearOperator]] = {
    "dense": aslinearoperator,
    "sparse": lambda M, **claims: aslinearoperator(M.to_sparse_csr(), **claims),
    "function": black_box,
    "claimed later": lambda M, **claims: aslinearoperator(2 * aslinearoperator(M), **claims),
    "low rank": lambda M, **claims: aslinearoperator(LowRank(M, torch.eye(M.shape[1], dtype=M.dtype)), **claims),
}


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_is_of_the_smaller_side(kind: str) -> None:
    for M, column, row in ((TALL, True, False), (WIDE, False, True), (SQUARE, True, True)):
        A = KINDS[kind](M, full_rank=True)
        assert (A.claims.full_column_rank, A.claims.full_row_rank) == (column, row)
        assert A.claims.full_rank == (column and row)
        assert (A.nullspace, A.left_nullspace) == (() if column else None, () if row else None)
        B = KINDS[kind](M)
        assert B.claims == Claims()
        assert (B.nullspace, B.left_nullspace) == (None, None)


def test_full_rank_of_operators_that_are_given_by_less_than_a_matrix() -> None:
    x = draw(3)
    tall = {
        "low rank": LowRank(TALL, draw(3, 3, dtype=C128), full_rank=True),
        "toeplitz": Toeplitz(draw(5), draw(3), full_rank=True),
        "jacobian": Jacobian(lambda x: torch.cat([x, x**2]), x, full_rank=True),
        "kernel": KernelMatrix(lambda a, b: torch.exp(-torch.cdist(a, b)), draw(5, 1), draw(3, 1), full_rank=True),
    }
    for name, A in tall.items():
        assert A.claims == Claims(full_column_rank=True), name
        assert A.H.claims == Claims(full_row_rank=True), name
    for square in (Circulant(draw(4), full_rank=True), Jacobian(lambda x: x**2, x, full_rank=True)):
        assert square.claims == Claims(full_column_rank=True, full_row_rank=True)
    for domain, codomain in ((None, None), (draw(3), None), (draw(3), draw(3)), (draw(2, 3), draw(6))):
        assert LinearOperator(abs, domain=domain, codomain=codomain, full_rank=True).claims.full_rank
    tree = LinearOperator(abs, domain={"a": draw(2), "b": draw(3)}, codomain=draw(4), full_rank=True)
    assert tree.claims == Claims(full_row_rank=True)


def test_full_rank_between_real_and_complex_vectors() -> None:
    # real vectors do not reach all complex ones of their size, and complex ones do not stay apart in real ones
    for n, column in ((3, True), (5, False)):
        A = LinearOperator(abs, domain=draw(n), codomain=draw(4, dtype=C128), full_rank=True)
        assert A.claims == Claims(full_column_rank=column)
        assert A.H.claims == Claims(full_row_rank=column)
        B = LinearOperator(abs, domain=draw(4, dtype=C128), codomain=draw(n), full_rank=True)
        assert B.claims == Claims(full_row_rank=column)
    left, right = aslinearoperator(SQUARE, full_rank=True), LinearOperator(abs, domain=draw(4), full_rank=True)
    assert (left @ right).claims == Claims(full_column_rank=True)
    assert (left @ right).left_nullspace is None
    assert (left @ aslinearoperator(draw(4, 4), full_rank=True)).claims.full_rank
    real, whole = aslinearoperator(draw(3, 5), full_rank=True), aslinearoperator(WIDE, full_rank=True)
    assert HStack(real, aslinearoperator(WIDE)).claims == Claims()
    assert HStack(real, whole).claims == Claims(full_row_rank=True)


@pytest.mark.parametrize("claims", [{"full_rank": 1}, {"full_rank": None}])
def test_full_rank_is_a_bool(claims: Any) -> None:
    for kind in KINDS.values():
        with pytest.raises(TypeError, match="full_rank: expected a bool"):
            kind(SQUARE, **claims)


def test_full_rank_needs_both_sizes() -> None:
    with pytest.raises(ValueError, match="full_rank: where codomain= is given, it needs domain="):
        LinearOperator(abs, codomain=draw(3), full_rank=True)
    with pytest.raises(TypeError, match=re.escape("did you mean 'full_rank'?")):
        aslinearoperator(SQUARE, fullrank=True)
    with pytest.raises(TypeError, match=re.escape("aslinearoperator(A, nullspace=...)")):
        Diagonal(draw(3), nullspace=draw(3))


COLUMN, ROW, BOTH, NOTHING = (True, False), (False, True), (True, True), (False, False)
T, W, S = (aslinearoperator(M, full_rank=True) for M in (TALL, WIDE, SQUARE))
P = aslinearoperator(SQUARE @ SQUARE.mH, positive_definite=True)
ANY = aslinearoperator(SQUARE)
FACTOR = torch.tensor(2.0, dtype=F64)

RANKS: dict[str, tuple[Callable[[], LinearOperator], tuple[bool, bool]]] = {
    "tall": (lambda: T, COLUMN),
    "wide": (lambda: W, ROW),
    "square": (lambda: S, BOTH),
    "definite": (lambda: P, BOTH),
    "semidefinite": (lambda: aslinearoperator(SQUARE, positive_semidefinite=True), NOTHING),
    "unitary": (lambda: LinearOperator(abs, unitary=True), BOTH),
    "isometric": (lambda: Subsample(5, [1, 2]).H, COLUMN),
    "coisometric": (lambda: Subsample(5, [1, 2]), ROW),
    "permutation": (lambda: Permutation(torch.tensor([1, 0])), BOTH),
    "wavelet": (lambda: Wavelet((4, 4)), BOTH),
    "tall.H": (lambda: T.H, ROW),
    "wide.H": (lambda: W.H, COLUMN),
    "wide.T": (lambda: W.T, COLUMN),
    "function.H": (lambda: black_box(TALL, full_rank=True).H, ROW),
    "function.H.H": (lambda: black_box(TALL, full_rank=True).H.H, COLUMN),
    "conj": (lambda: T.conj(), COLUMN),
    "conj of a function": (lambda: black_box(WIDE, full_rank=True).conj(), ROW),
    "2j tall": (lambda: 2j * T, COLUMN),
    "tall / -3": (lambda: T / -3, COLUMN),
    "-tall": (lambda: -T, COLUMN),
    "-2 definite": (lambda: -2 * P, BOTH),
    "0 tall": (lambda: 0 * T, NOTHING),
    "nan tall": (lambda: float("nan") * T, NOTHING),
    "infinite": (lambda: float("inf") * T, NOTHING),
    "tensor tall": (lambda: FACTOR * T, NOTHING),
    "tall / tensor": (lambda: T / FACTOR, NOTHING),
    "tensor definite": (lambda: FACTOR * P, NOTHING),
    "tall @ wide": (lambda: T @ W, NOTHING),
    "wide @ tall": (lambda: W @ T, NOTHING),
    "square @ square": (lambda: S @ P, BOTH),
    "square @ nothing": (lambda: S @ ANY, NOTHING),
    "nothing @ square": (lambda: ANY @ S, NOTHING),
    "wide.H @ wide.H": (lambda: aslinearoperator(draw(6, 5, dtype=C128), full_rank=True) @ W.H, COLUMN),
    "wide @ wide": (lambda: W @ aslinearoperator(draw(5, 6, dtype=C128), full_rank=True), ROW),
    "tall.H @ tall": (lambda: T.H @ T, NOTHING),  # of a matrix, the adjoint is one of its own
    "function.H @ function": (lambda: (A := black_box(TALL, full_rank=True)).H @ A, BOTH),
    "function @ function.H": (lambda: (A := black_box(TALL, full_rank=True)) @ A.H, NOTHING),
    "wide @ wide.H, a function": (lambda: (A := black_box(WIDE, full_rank=True)) @ A.H, BOTH),
    "sum": (lambda: S + S, NOTHING),
    "sum of definite": (lambda: P + P, BOTH),
    "definite - definite": (lambda: P - P, NOTHING),
    "gram of tall": (lambda: T.gram(), BOTH),
    "gram of wide": (lambda: W.gram(), NOTHING),
    "gram of wide, damped": (lambda: W.gram(0.1), BOTH),
    "gram of wide, damped by a tensor": (lambda: W.gram(FACTOR), NOTHING),
    "gram of tall, damped by a tensor": (lambda: T.gram(FACTOR), BOTH),
    "gram of wide.H": (lambda: W.H.gram(), BOTH),
    "inverse": (lambda: Inverse(ANY), BOTH),
    "inverse of what is known to be singular": (lambda: Inverse(-Laplacian(4)), NOTHING),
    "VStack of a tall one": (lambda: VStack(draw(2, 3), T, draw(1, 3)), COLUMN),
    "VStack of others": (lambda: VStack(draw(2, 3), draw(4, 3)), NOTHING),
    "VStack of square ones": (lambda: VStack(S, S), COLUMN),
    "HStack of a wide one": (lambda: HStack(draw(3, 2, dtype=C128), W), ROW),
    "HStack of others": (lambda: HStack(draw(3, 2), draw(3, 7)), NOTHING),
    "gram of a VStack": (lambda: VStack(draw(2, 3), T).gram(), BOTH),
    "gram of a VStack of others": (lambda: VStack(draw(2, 3), draw(4, 3)).gram(), NOTHING),
    "gram of a claimed VStack": (lambda: aslinearoperator(VStack(draw(2, 3), draw(4, 3)), nullspace=[]).gram(), BOTH),
    "block diagonal, tall": (lambda: BlockDiagonal(T, S), COLUMN),
    "block diagonal, mixed": (lambda: BlockDiagonal(T, W), NOTHING),
    "Kronecker, wide": (lambda: Kronecker(W, S), ROW),
    "Kronecker, mixed": (lambda: Kronecker(W, T), NOTHING),
    "a claim of another": (lambda: aslinearoperator(ANY, full_rank=True), BOTH),
    "a claim of another tall": (lambda: aslinearoperator(black_box(TALL), full_rank=True), COLUMN),
    "a claim kept": (lambda: aslinearoperator(T, full_rank=False), COLUMN),
    "an empty nullspace": (lambda: aslinearoperator(TALL, nullspace=[]), COLUMN),
    "an empty nullspace of a hermitian": (lambda: aslinearoperator(SQUARE, hermitian=True, nullspace=[]), BOTH),
    "an empty left nullspace": (lambda: aslinearoperator(WIDE, left_nullspace=()), ROW),
    "a difference with zeros beyond": (lambda: FiniteDifference(5, boundary="zero"), BOTH),
    "a gradient with zeros beyond": (lambda: Gradient(5, boundary="zero"), COLUMN),
}


@pytest.mark.parametrize("name", RANKS)
def test_the_rank_follows_the_algebra_and_never_goes_further(name: str) -> None:
    build, expected = RANKS[name]
    A = build()
    assert (A.claims.full_column_rank, A.claims.full_row_rank) == expected
    assert A.nullspace == () or not expected[0]
    assert A.left_nullspace == () or not expected[1]
    if A.gram().positive_definite:
        assert expected[0]


@pytest.mark.parametrize(
    ("claims", "text"),
    [
        (Claims(full_column_rank=True), "full_column_rank"),
        (Claims(full_row_rank=True), "full_row_rank"),
        (Claims(full_column_rank=True, full_row_rank=True), "full_rank"),
        (Claims(hermitian=True, full_row_rank=True), "hermitian, full_rank"),
        (Claims(positive_semidefinite=True, full_column_rank=True), "positive_semidefinite, full_rank"),
        (Claims(positive_definite=True, full_column_rank=True), "positive_definite"),
        (Claims(positive_definite=True, isometric=True, coisometric=True), "positive_definite, unitary"),
        (Claims(isometric=True), "isometric"),
        (Claims(isometric=True, full_row_rank=True), "isometric, full_rank"),
        (Claims(coisometric=True, full_row_rank=True), "coisometric"),
        (Claims(), ""),
    ],
)
def test_the_rank_is_shown_where_it_does_not_follow(claims: Claims, text: str) -> None:
    assert str(claims) == text


# -- nullspaces that are claimed ----------------------------------------------------------------------------------------

M, NULL, LEFT = matrix(5, 4, 2)
BOTH_SIDES = {"nullspace": list(NULL), "left_nullspace": list(LEFT)}
FULL = draw(6, 5, dtype=C128, seed=7), draw(4, 6, dtype=C128, seed=8)

ALGEBRA: dict[str, tuple[Callable[[LinearOperator], LinearOperator], Callable[[], Tensor], str]] = {
    # what is known afterwards: of x, of the adjoint, or of both
    "itself": (lambda A: A, lambda: M, "both"),
    "H": (lambda A: A.H, lambda: M.mH, "both"),
    "H.H": (lambda A: A.H.H, lambda: M, "both"),
    "T": (lambda A: A.T, lambda: M.mT, "both"),
    "conj": (lambda A: A.conj(), lambda: M.conj(), "both"),
    "conj.conj": (lambda A: A.conj().conj(), lambda: M, "both"),
    "2j A": (lambda A: 2j * A, lambda: 2j * M, "both"),
    "A / 3": (lambda A: A / 3, lambda: M / 3, "both"),
    "-A": (lambda A: -A, lambda: -M, "both"),
    "-(2 A)": (lambda A: -(2 * A), lambda: -2 * M, "both"),
    "0 A": (lambda A: 0 * A, lambda: 0 * M, "none"),
    "tensor A": (lambda A: FACTOR * A, lambda: 2 * M, "none"),
    "A / tensor": (lambda A: A / FACTOR, lambda: M / 2, "none"),
    "A + A": (lambda A: A + A, lambda: 2 * M, "none"),
    "gram": (lambda A: A.gram(), lambda: M.mH @ M, "both"),
    "gram of H": (lambda A: A.H.gram(), lambda: M @ M.mH, "both"),
    "gram of gram": (lambda A: A.gram().gram(), lambda: M.mH @ M @ M.mH @ M, "both"),
    "damped gram": (lambda A: A.gram(0.5), lambda: M.mH @ M + 0.25 * torch.eye(4, dtype=C128), "both"),
    "gram, damped by a tensor": (lambda A: A.gram(FACTOR), lambda: M.mH @ M + 4 * torch.eye(4, dtype=C128), "none"),
    "full column rank @ A": (lambda A: aslinearoperator(FULL[0], full_rank=True) @ A, lambda: FULL[0] @ M, "nullspace"),
    "A @ full row rank": (lambda A: A @ aslinearoperator(FULL[1], full_rank=True), lambda: M @ FULL[1], "left"),
    "anything @ A": (lambda A: aslinearoperator(FULL[0]) @ A, lambda: FULL[0] @ M, "none"),
    "A @ anything": (lambda A: A @ aslinearoperator(FULL[1]), lambda: M @ FULL[1], "none"),
    "full row rank @ A": (lambda A: aslinearoperator(FULL[0][:3], full_rank=True) @ A, lambda: FULL[0][:3] @ M, "none"),
    "unitary @ A": (lambda A: Permutation(torch.arange(4, -1, -1), C128) @ A, lambda: M.flip(0), "nullspace"),
    "A @ unitary": (lambda A: A @ Permutation(torch.arange(3, -1, -1), C128), lambda: M.flip(1), "left"),
    "restriction": (lambda A: A.gram().restrict(FULL[1]), lambda: FULL[1].mH @ M.mH @ M @ FULL[1], "none"),
    "VStack": (lambda A: VStack(A, A), lambda: torch.cat([M, M]), "none"),
    "gram of a VStack": (
        lambda A: aslinearoperator(VStack(A, A), nullspace=list(NULL)).gram(), lambda: 2 * M.mH @ M, "both",
    ),
    "claimed of an adjoint": (
        lambda A: aslinearoperator(black_box(M.mH).H, nullspace=list(NULL), left_nullspace=list(LEFT)).H, lambda: M.mH, "both",
    ),
    "claimed of a conjugate": (
        lambda A: aslinearoperator(black_box(M.conj()).conj(), **BOTH_SIDES).conj(), lambda: M.conj(), "both",
    ),
    "minus what is claimed of 2 A": (lambda A: -aslinearoperator(2 * black_box(M), **BOTH_SIDES), lambda: -2 * M, "both"),
    "claimed of a product": (lambda A: aslinearoperator(Identity(LEFT[0]) @ black_box(M), **BOTH_SIDES), lambda: M, "both"),
    "for one solve": (lambda A: (2 * A).for_one_solve(), lambda: 2 * M, "both"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALGEBRA)
def test_nullspaces_follow_the_algebra_and_never_go_further(name: str, kind: str) -> None:
    compose, dense, sides = ALGEBRA[name]
    scale = 0.5 if kind == "claimed later" else 1.0  # which doubles its matrix
    A = compose(KINDS[kind](scale * M, **BOTH_SIDES))
    assert (A.nullspace is not None) == (sides in ("both", "nullspace"))
    assert (A.left_nullspace is not None) == (sides in ("both", "left"))
    true_of_the_matrix(A, dense())


def test_the_gram_operator_as_a_product_has_the_nullspace_of_either_side() -> None:
    A = black_box(M, **BOTH_SIDES)
    for product, matrix in ((A.H @ A, M.mH @ M), (A @ A.H, M @ M.mH)):
        assert product.nullspace is not None
        true_of_the_matrix(product, matrix)


def test_a_nullspace_of_a_hermitian_operator_serves_for_both_sides() -> None:
    S = M.mH @ M
    for claims in ({"nullspace": list(NULL)}, {"left_nullspace": list(NULL)}):
        for kind in KINDS.values():
            A = kind(S, hermitian=True, **claims)
            for op in (A, A.H, A.conj(), -A, A.gram()):
                assert op.nullspace is not None
                assert op.left_nullspace is op.nullspace or op.left_nullspace is not None
                true_of_the_matrix(op)
            B = kind(S, **claims)
            assert (B.nullspace is None) == ("nullspace" not in claims)
            assert (B.left_nullspace is None) == ("left_nullspace" not in claims)


def test_multiples_of_a_matrix_of_low_rank_know_what_remains() -> None:
    A = aslinearoperator(LowRank(M, torch.eye(4, dtype=C128)), **BOTH_SIDES)
    for kept in (A, 2 * A, -A, A / 3j):
        assert isinstance(kept, LowRank)
        assert kept.nullspace is not None
        true_of_the_matrix(kept)
    for lost in (0 * A, FACTOR * A, A + LowRank(draw(5, 1, dtype=C128), draw(4, 1, dtype=C128))):
        assert isinstance(lost, LowRank)
        assert (lost.nullspace, lost.left_nullspace) == (None, None)


def test_one_vector_a_list_and_a_tuple_of_vectors() -> None:
    one = torch.ones(3, dtype=F64)
    A = Laplacian(3, dtype=F64)
    for given in (one, [one], (one,)):
        (vector,) = aslinearoperator(A, nullspace=given).nullspace
        assert torch.equal(vector, one)
    again = aslinearoperator(draw(3, 3), nullspace=A.nullspace)  # what an operator knows can be said of another
    assert torch.equal(again.nullspace[0], one)
    pair = (draw(2), draw(3))
    B = LinearOperator(lambda x: x, domain=pair, nullspace=pair)
    assert len(B.nullspace) == 1
    assert all(torch.equal(a, b) for a, b in zip(B.nullspace[0], pair, strict=True))
    assert len(LinearOperator(lambda x: x, domain=pair, nullspace=(pair, pair)).nullspace) == 2
    assert len(LinearOperator(lambda x: x, domain=pair, nullspace=[pair]).nullspace) == 1
    tree = {"b": draw(3), "a": draw(2)}
    C = LinearOperator(lambda x: x, domain={"a": draw(2), "b": draw(3)}, left_nullspace=tree)
    assert list(C.left_nullspace[0]) == ["a", "b"]
    D = LinearOperator(lambda x: x, nullspace=[tree])  # nothing is known of the vectors
    assert torch.equal(D.nullspace[0]["b"], tree["b"])
    assert LinearOperator(lambda x: x, nullspace=()).nullspace == ()


def test_a_claimed_vector_is_not_differentiated() -> None:
    one = torch.ones(3, dtype=F64, requires_grad=True)
    assert not aslinearoperator(draw(3, 3), nullspace=2 * one).nullspace[0].requires_grad
    assert not LinearOperator(lambda x: x, left_nullspace=one).left_nullspace[0].requires_grad


def test_a_claim_is_made_of_a_copy() -> None:
    A = Diffusion(draw(3).exp(), boundary="neumann")
    B = aslinearoperator(A, nullspace=[draw(3)], positive_semidefinite=True)
    assert torch.equal(A.nullspace[0], torch.ones(3, dtype=F64))
    assert torch.equal(B.nullspace[0], draw(3))
    assert not A.claims.positive_semidefinite
    assert B.claims.positive_semidefinite
    assert torch.equal(aslinearoperator(B, hermitian=True).nullspace[0], draw(3))


def project(v: Tensor) -> Tensor:
    return v.mean(-1, keepdim=True).expand(v.shape)


def test_a_projection_is_kept_as_it_is() -> None:
    class Mean(torch.nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return project(v)

    S = -Laplacian(4, dtype=F64)
    for P in (project, Mean(), LinearOperator(project), LinearOperator(project, domain=draw(4), hermitian=True)):
        A = aslinearoperator(S.to_dense(), nullspace=P)
        assert A.nullspace is P
        assert A.left_nullspace is None
        assert A.H.left_nullspace is P
        assert A.gram().nullspace is A.gram().left_nullspace is P
        assert (A @ A).nullspace is None
        assert aslinearoperator(A, hermitian=True).left_nullspace is P
        assert LinearOperator(lambda x: x, left_nullspace=P).left_nullspace is P
        true_of_the_matrix(A)
    onto = draw(4, 2, dtype=C128)
    onto = torch.linalg.qr(onto).Q
    complex_one = aslinearoperator(torch.eye(4, dtype=C128) - onto @ onto.mH, nullspace=lambda v: onto @ (onto.mH @ v))
    operator = aslinearoperator(complex_one, nullspace=aslinearoperator(onto @ onto.mH))
    v = draw(4, dtype=C128, seed=3)
    for A in (complex_one, operator):
        assert torch.allclose(A.conj().nullspace(v), onto.conj() @ (onto.mT @ v))
        assert torch.allclose(A.conj().conj().nullspace(v), onto @ (onto.mH @ v))
    assert isinstance(operator.conj().nullspace, LinearOperator)


@pytest.mark.parametrize("side", ["nullspace", "left_nullspace"])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3.0, TypeError, ": expected a tensor or a pytree of tensors, or a callable that projects, got float"),
        ("constants", TypeError, ": expected a tensor or a pytree of tensors, or a callable that projects, got str"),
        ([draw(4), 1], TypeError, "[1]: expected a tensor or a pytree of tensors"),
        ({}, TypeError, ": expected a tensor or a pytree of tensors"),
        (draw(3), ValueError, ": expected one vector of shape (4,), got (3,)"),
        (draw(2, 4), ValueError, ": expected one vector of shape (4,), got (2, 4)"),
        ([draw(4), draw(4, 1)], ValueError, "[1]: expected one vector of shape (4,), got (4, 1)"),
        ((draw(4), draw(5)), ValueError, "[1]: expected one vector of shape (4,), got (5,)"),
        ({"a": draw(4)}, ValueError, ": expected one vector of shape (4,), got {a: (4,)}"),
        (torch.ones(4).int(), ValueError, ": expected a floating-point or complex dtype, got torch.int32"),
        (draw(4, dtype=C128), ValueError, ": expected a real dtype like torch.float64, got torch.complex128"),
        (torch.ones(4, device="meta"), ValueError, ": expected the device cpu, got meta"),
        (Identity(draw(3)), ValueError, ": expected a projection with domain"),
        (aslinearoperator(draw(3, 4)), ValueError, ": expected a projection with codomain"),
    ],
)
def test_what_is_no_nullspace(given: Any, error: type[Exception], message: str, side: str) -> None:
    for A in (draw(4, 4), draw(4, 4).to_sparse(), Diagonal(draw(4)), LinearOperator(lambda x: x, domain=draw(4))):
        with pytest.raises(error, match="^" + re.escape(side + message)):
            aslinearoperator(A, **{side: given})
    with pytest.raises(error, match="^" + re.escape(side + message)):
        LinearOperator(lambda x: x, domain=draw(4), **{side: given})


def test_each_side_has_vectors_of_its_own() -> None:
    with pytest.raises(ValueError, match=re.escape("left_nullspace: expected one vector of shape (5,), got (3,)")):
        aslinearoperator(TALL, left_nullspace=TALL[0])
    with pytest.raises(ValueError, match=re.escape("nullspace: expected one vector of shape (3,), got (5,)")):
        aslinearoperator(TALL, nullspace=TALL[:, 0])
    pair = (draw(2), draw(3))
    with pytest.raises(ValueError, match=re.escape("nullspace: expected one vector of shape ((2,), (3,)), got ((3,), (2,))")):
        LinearOperator(lambda x: x, domain=pair, nullspace=pair[::-1])
    with pytest.raises(ValueError, match=re.escape("nullspace: expected one vector of shape ((2,), (3,)), got (2,)")):
        LinearOperator(lambda x: x, domain=pair, nullspace=pair[0])
    with pytest.raises(TypeError, match="nullspace: a tuple may be one vector or several"):
        LinearOperator(lambda x: x, nullspace=pair)


@pytest.mark.parametrize(
    "claims",
    [
        {"full_rank": True, "nullspace": draw(4)},
        {"positive_definite": True, "nullspace": [draw(4)]},
        {"unitary": True, "left_nullspace": draw(4)},
        {"hermitian": True, "nullspace": draw(4), "left_nullspace": []},
    ],
)
def test_a_nullspace_contradicts_full_rank(claims: Any) -> None:
    for A in (draw(4, 4), draw(4, 4).to_sparse(), lambda x: x, LinearOperator(lambda x: x)):
        with pytest.raises(ValueError, match="nullspace: expected no vectors for an operator that is"):
            aslinearoperator(A, **claims)
    singular = aslinearoperator(draw(4, 4), nullspace=draw(4), left_nullspace=draw(4))
    with pytest.raises(ValueError, match="nullspace: expected no vectors"):
        aslinearoperator(singular, full_rank=True)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_know_what_the_operator_knows(kind: str) -> None:
    A = KINDS[kind](M, **BOTH_SIDES)
    copies = [copy.copy(A), copy.deepcopy(A), A.for_one_solve()]
    if kind != "function":
        copies += [pickle.loads(pickle.dumps(A)), A.to(C128)]
        assert A.to(torch.float32).nullspace[0].dtype == torch.complex64
        assert A.to("meta").left_nullspace[0].device.type == "meta"
    for again in copies:
        assert torch.equal(torch.stack(again.nullspace), NULL)
        assert torch.equal(torch.stack(again.left_nullspace), LEFT)
    assert copy.deepcopy(A).nullspace[0].data_ptr() != A.nullspace[0].data_ptr()


def test_a_projection_moves_only_where_it_can() -> None:
    A = aslinearoperator(draw(4, 4), nullspace=Identity(draw(4)))
    assert A.to(torch.float32).nullspace.domain.example.dtype == torch.float32
    with pytest.raises(TypeError, match="project may close over tensors"):
        aslinearoperator(draw(4, 4), nullspace=project).to(torch.float32)


def test_a_long_chain_is_asked_once() -> None:
    A = black_box(draw(3, 3))
    for _ in range(60):
        A = -(2 * A.conj()).H if _ % 2 else A.H @ black_box(draw(3, 3))
    B = aslinearoperator(draw(3, 3), hermitian=True)
    for _ in range(200):
        B = B.gram() * -3.0
    for op in (A, B):
        assert (op.nullspace, op.left_nullspace) == (None, None)
