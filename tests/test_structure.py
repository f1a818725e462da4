"""Structure is used where it is there and only there: direct solves, estimates, restriction, inverse, errors of composition."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import nablasolve as ns
from nablasolve import LinearOperator, aslinearoperator
from nablasolve.operators import (
    Block,
    BlockDiagonal,
    Diagonal,
    HStack,
    Identity,
    Inverse,
    Kronecker,
    VStack,
    Zero,
)

F64, C128 = torch.float64, torch.complex128


def draw(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=F64)


def black_box(M: Tensor, **claims: bool) -> LinearOperator:
    return LinearOperator(lambda v: M @ v, domain=M[0], codomain=M[:, 0], **claims)


# -- direct solves -----------------------------------------------------------------------------------------------------

D = 2 + torch.rand(6, dtype=F64, generator=torch.Generator().manual_seed(3))
W = draw(6, 6) / 6 + 2 * eye(6)

STRUCTURED = {
    "diagonal": (lambda: Diagonal(D), lambda: torch.diag(D)),
    "multiple": (lambda: 3 * Diagonal(D), lambda: 3 * torch.diag(D)),
    "sum": (lambda: Diagonal(D) + Identity(D), lambda: torch.diag(D + 1)),
    "difference": (lambda: Diagonal(D) - 0.5 * Identity(D), lambda: torch.diag(D - 0.5)),
    "product": (lambda: aslinearoperator(W) @ Diagonal(D), lambda: W * D),
    "gram": (lambda: aslinearoperator(W).gram(), lambda: W.mT @ W),
    "damped gram of a diagonal": (lambda: Diagonal(D).gram(0.5), lambda: torch.diag(D * D + 0.25)),
    "inverse": (lambda: Inverse(W), lambda: torch.linalg.inv(W)),
    "restriction by a unitary": (lambda: Diagonal(D).restrict(orthogonal()), lambda: Q.mT @ torch.diag(D) @ Q),
    "damped gram of a product with a unitary": (
        lambda: (Diagonal(D) @ orthogonal()).gram(0.5),
        lambda: Q.mT @ torch.diag(D * D + 0.25) @ Q,
    ),
    "unitary": (lambda: LinearOperator(lambda v: v.flip(-1), unitary=True), lambda: eye(6).flip(0)),
    "adjoint": (lambda: (Diagonal(D) @ aslinearoperator(W)).H, lambda: W.mT * D),
}
Q = torch.linalg.qr(draw(6, 6, seed=8))[0]


def orthogonal() -> LinearOperator:
    return aslinearoperator(Q, unitary=True)


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize(("build", "dense"), STRUCTURED.values(), ids=STRUCTURED)
def test_a_known_structure_is_solved_directly_in_both_passes(build, dense, batch):
    b = draw(*batch, 6, seed=1).requires_grad_()
    x, info = ns.solve_ex(build(), b, batch_dims=len(batch))
    assert info.method == "direct"
    assert torch.as_tensor(info.iterations).max() <= 2
    expected = torch.linalg.solve(dense(), b.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(x, expected, rtol=1e-10, atol=1e-10)
    (g,) = torch.autograd.grad(x.square().sum(), b)
    (wanted,) = torch.autograd.grad(expected.square().sum(), b)
    assert torch.allclose(g, wanted, rtol=1e-9, atol=1e-9)
    assert torch.as_tensor(info.adjoint.iterations).max() <= 2


def test_a_diagonal_plus_a_function_is_not_taken_for_a_diagonal():
    """PEERS' shortcut `x + conv(x)`, which is no diagonal in any basis that is known."""
    K = draw(6, 6, seed=5) / 6
    A = Diagonal(D) + black_box(K)
    x, info = ns.solve_ex(A, D, rtol=1e-12)
    assert info.method == "gmres"
    assert torch.allclose(x, torch.linalg.solve(torch.diag(D) + K, D), rtol=1e-9)


def test_structure_is_left_alone_where_a_method_or_a_preconditioner_is_asked_for():
    A = Diagonal(D, positive_definite=True)
    assert ns.solve_ex(A, D, method="gmres")[1].method == "gmres"
    assert ns.solve_ex(A, D, M=lambda r: r / D)[1].method == "cg"
    with pytest.raises(ValueError, match=r"M: a direct method takes no preconditioner"):
        ns.solve(A, D, method="direct", M=lambda r: r)
    with pytest.raises(ValueError, match=r"'direct' needs A as a dense Tensor or an operator whose structure allows it"):
        ns.solve(black_box(W), D, method="direct")


def test_a_singular_structure_is_a_failed_solve():
    d = D.clone()
    d[2] = 0
    for A in (Diagonal(d), aslinearoperator(W) @ Diagonal(d), Diagonal(d).gram()):
        with pytest.raises(ns.ConvergenceError):
            ns.solve(A, D)
    consistent = D * (d != 0)
    assert torch.allclose(ns.solve(Diagonal(d), consistent), consistent / D)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_of_a_structured_system_do_not_matter(scale):
    x = ns.solve(scale * Diagonal(D), D * scale)
    assert torch.allclose(x, torch.ones(6, dtype=F64))


def test_a_tree_of_structured_blocks_is_solved_directly():
    A = BlockDiagonal(W, Diagonal(D[:3]))
    b = (draw(6, seed=1).requires_grad_(), draw(3, seed=2).requires_grad_())
    x, info = ns.solve_ex(A, b)
    assert info.method == "direct"
    assert torch.allclose(x[0], torch.linalg.solve(W, b[0]))
    assert torch.allclose(x[1], b[1] / D[:3])
    g = torch.autograd.grad(x[0].sum() + x[1].sum(), b)
    assert torch.allclose(g[0], torch.linalg.solve(W.mT, torch.ones(6, dtype=F64)))


def test_unrolling_through_a_direct_structure_keeps_the_gradient():
    d = D.clone().requires_grad_()
    x = ns.solve(Diagonal(d), D, grad="unroll", method="direct")
    (g,) = torch.autograd.grad(x.sum(), d)
    assert torch.allclose(g, -D / D**2)


@pytest.mark.parametrize("transform", ["hessian", "jacfwd of jacfwd", "vmap of hessian"])
def test_second_derivatives_go_through_a_structured_solve(transform):
    def loss(d: Tensor, dense: bool = False) -> Tensor:
        x = torch.linalg.inv(W @ torch.diag(d)) @ D if dense else ns.solve(aslinearoperator(W) @ Diagonal(d), D)
        return (x * weights).sum().square()

    weights = draw(6, seed=4)

    def second(f):
        if transform == "hessian":
            return torch.func.hessian(f)(D)
        if transform == "jacfwd of jacfwd":
            return torch.func.jacfwd(torch.func.jacfwd(f))(D)
        return torch.vmap(torch.func.hessian(f))(torch.stack([D, D + 0.1]))

    assert torch.allclose(second(loss), second(lambda d: loss(d, dense=True)), rtol=1e-7, atol=1e-9)


# -- sparse gradients --------------------------------------------------------------------------------------------------


def five_point(n: int) -> Tensor:
    """The five-point Laplacian on an n x n grid plus the identity, as COO."""
    index = torch.arange(n * n).reshape(n, n)
    pairs = [(index.reshape(-1), index.reshape(-1), 5.0)]
    for a, b in ((index[1:], index[:-1]), (index[:, 1:], index[:, :-1])):
        pairs += [(a.reshape(-1), b.reshape(-1), -1.0), (b.reshape(-1), a.reshape(-1), -1.0)]
    rows, columns = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
    values = torch.cat([torch.full((len(pair[0]),), pair[2], dtype=F64) for pair in pairs])
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (n * n, n * n), check_invariants=True).coalesce()


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_the_gradient_of_a_large_sparse_matrix_takes_memory_like_its_entries(layout):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                    self.entries = max(self.entries, leaf.untyped_storage().nbytes() // leaf.element_size())
            return result

    A = five_point(300)
    A = (A if layout == torch.sparse_coo else A.to_sparse_csr()).requires_grad_()
    b = torch.ones(90000, dtype=F64)
    with Largest() as seen:
        x = ns.solve(aslinearoperator(A, positive_definite=True), b, rtol=1e-6)
        (g,) = torch.autograd.grad(x.sum(), A)
    nnz = A.detach().values().numel()
    assert g.layout == layout
    assert (g.coalesce() if layout == torch.sparse_coo else g).values().numel() == nnz
    assert seen.entries <= 2 * nnz + 10  # indices come in pairs


# -- estimates ---------------------------------------------------------------------------------------------------------


def symmetric(n: int) -> Tensor:
    M = draw(n, n)
    return M @ M.mT / n + torch.diag(torch.linspace(1, 3, n, dtype=F64))


def test_estimates_say_how_they_came_about():
    n = 200
    A, structured = black_box(symmetric(n), hermitian=True), Diagonal(torch.linspace(1, 3, n, dtype=F64))
    for name in ("diagonal", "trace", "norm_estimate", "eigenvalue_bounds"):
        assert getattr(structured, name)(return_how=True)[1] == "exact"
        assert getattr(A, name)(return_how=True)[1] == (
            "Lanczos" if name in ("norm_estimate", "eigenvalue_bounds") else "stochastic"
        )


def test_estimates_are_near_the_truth():
    n = 200
    M = symmetric(n)
    A = black_box(M, hermitian=True)
    eigenvalues = torch.linalg.eigvalsh(M)
    assert abs(A.trace() / M.trace() - 1) < 0.02
    assert (A.diagonal(samples=150) - M.diagonal()).abs().max() < 0.5
    assert A.norm_estimate(steps=30) == pytest.approx(float(eigenvalues[-1]), rel=1e-3)
    low, high = A.eigenvalue_bounds(steps=60)
    assert low == pytest.approx(float(eigenvalues[0]), rel=0.05)
    assert high == pytest.approx(float(eigenvalues[-1]), rel=1e-3)
    assert A.norm_estimate() <= eigenvalues[-1] * (1 + 1e-12)


def test_few_unknowns_are_estimated_exactly():
    M = draw(7, 7, dtype=C128)
    A = black_box(M)
    for name, truth in (("diagonal", M.diagonal()), ("trace", M.trace())):
        value, how = getattr(A, name)(return_how=True)
        assert how == "exact"
        assert torch.allclose(value, truth)


def test_the_trace_of_a_dominant_low_rank_operator_is_found_by_few_products():
    """Hutch++ finds the dominant subspace, which plain random signs only meet by chance."""
    U = torch.linalg.qr(draw(300, 5))[0]
    M = U @ torch.diag(torch.tensor([1e4, 1e3, 500.0, 200.0, 100.0], dtype=F64)) @ U.mT + 1e-3 * eye(300)
    assert abs(black_box(M).trace(samples=60) / M.trace() - 1) < 1e-4


def test_estimates_leave_the_random_state_alone_and_are_repeatable():
    A = black_box(symmetric(200), hermitian=True)
    state = torch.random.get_rng_state()
    first = A.trace(), A.diagonal(), A.norm_estimate()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(3)
    again = A.trace(), A.diagonal(), A.norm_estimate()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_estimates_are_differentiable():
    M = symmetric(6).requires_grad_()
    (g,) = torch.autograd.grad(black_box(M).trace(), M)
    assert torch.allclose(g, eye(6))


def test_estimates_ask_for_what_they_need():
    with pytest.raises(ValueError, match="does not know its domain"):
        LinearOperator(lambda v: v).trace()
    with pytest.raises(ValueError, match="known to be Hermitian"):
        black_box(draw(4, 4)).eigenvalue_bounds()


# -- claims of what is made of others ------------------------------------------------------------------------------------


def test_semidefinite_plus_definite_is_definite():
    G = black_box(draw(4, 4)).gram()
    one = Identity(draw(4))
    assert str(G.claims) == "positive_semidefinite"
    assert (G + one).positive_definite
    assert (G + 0 * one).claims.positive_semidefinite
    assert not (G + 0 * one).positive_definite
    assert not (G - one).claims.positive_semidefinite
    assert ns.solve_ex(G + 0.1 * one, draw(4))[1].method == "cg"


def test_an_operator_times_its_adjoint_is_semidefinite():
    A, B = black_box(draw(4, 4)), black_box(draw(4, 4))
    for product in (A.H @ A, A @ A.H):
        assert product.claims.positive_semidefinite
    assert not (A.H @ B).hermitian


def test_unitary_operators_make_unitary_ones():
    U = orthogonal()
    for op in (U.H, U @ U, U.conj(), -U, Kronecker(U, U), BlockDiagonal(U, U), Inverse(U), U.gram()):
        assert op.unitary, op
    for op in (2 * U, U + U, U.gram(1.0), VStack(U, U), torch.tensor(1.0) * U):
        assert not op.unitary, op


def test_restriction_is_galerkins_projection_and_keeps_what_it_may():
    M, V = symmetric(6), draw(6, 3)
    A = black_box(M, positive_definite=True)
    R = A.restrict(V)
    assert torch.allclose(R.to_dense(), V.mT @ M @ V)
    assert R.claims.positive_semidefinite
    assert not R.positive_definite  # V may have dependent columns
    assert A.restrict(orthogonal()).positive_definite
    assert not black_box(M).restrict(V).hermitian


def test_gram_of_a_stack_is_the_sum_of_grams():
    A, B = Diagonal(D), aslinearoperator(W)
    G = VStack(A, B).gram(0.5)
    assert G.positive_definite
    assert torch.allclose(G.to_dense(), torch.diag(D * D) + W.mT @ W + 0.25 * eye(6))
    x, info = ns.solve_ex(VStack(Diagonal(D), 2 * Identity(D)).gram(), D)
    assert info.method == "direct"
    assert torch.allclose(x, D / (D * D + 4))


def test_inverse_of_the_inverse_is_the_operator():
    A = black_box(W)
    assert Inverse(A).inverse() is A
    assert torch.allclose((A.inverse(rtol=1e-13) @ A).to_dense(), eye(6))


# -- errors ------------------------------------------------------------------------------------------------------------

WRONG = {
    "A + B": (lambda: Diagonal(D) + aslinearoperator(draw(4, 4)), r"Diagonal \+ DenseOperator: .*SIX.*FOUR"),
    "A @ B": (lambda: Diagonal(D) @ aslinearoperator(draw(4, 6)), r"Diagonal @ DenseOperator: .*SIX.*FOUR"),
    "nested": (
        lambda: (Diagonal(D) @ Diagonal(D)).H @ Diagonal(D[:4]),
        r"Diagonal\)\.H @ Diagonal: .*SIX.*FOUR",
    ),
    "VStack": (lambda: VStack(Diagonal(D), Diagonal(D[:4])), r"VStack\(Diagonal, Diagonal\): .*SIX.*FOUR"),
    "HStack": (lambda: HStack(Diagonal(D), Diagonal(D[:4])), r"HStack\(Diagonal, Diagonal\): .*SIX.*FOUR"),
    "Block": (lambda: Block([[Diagonal(D), W], [W, Diagonal(D[:4])]]), r"Block\(\[.*\]\): .*SIX.*FOUR"),
    "restrict": (
        lambda: Diagonal(D).restrict(draw(4, 2)),
        r"Diagonal\.restrict\(DenseOperator\): .*SIX.*FOUR",
    ),
    "Inverse": (lambda: Inverse(draw(4, 6)), r"Inverse\(DenseOperator\): .*SIX.*FOUR"),
    "solve": (
        lambda: ns.solve(VStack(Diagonal(D)), (D,)),
        r"expected a square operator, got VStack\(Diagonal\) from SIX",
    ),
    "b": (lambda: ns.solve(Diagonal(D), draw(4)), r"b: expected shape \(\.\.\., 6\), got \(4,\)"),
    "x": (lambda: Diagonal(D)(draw(4)), r"x: expected shape \(\.\.\., 6\), got \(4,\)"),
    "tree": (
        lambda: BlockDiagonal(W, W)((D, D[:4])),
        r"x: expected shape \(SIX, SIX\), got \(\(6,\), \(4,\)\)",
    ),
    "precision": (
        lambda: ns.solve(Diagonal(D), D.float()),
        r"b: .* precision of A, torch.float64, got torch.float32",
    ),
    "empty rows": (lambda: Block([]), r"rows: expected rows of one length"),
    "ragged rows": (lambda: Block([[W], [W, W]]), r"rows: expected rows of one length, got lengths \[1, 2\]"),
    "unknown column": (lambda: Block([[W, None]]), r"rows: column 1 holds no operator that knows its domain"),
    "no blocks": (lambda: VStack(), r"blocks: expected at least one operator"),
    "unknown block": (lambda: VStack(lambda v: v), r"blocks\[0\]: .* does not know its domain"),
    "no factors": (lambda: Kronecker(), r"factors: expected at least one operator"),
    "factor": (lambda: Kronecker(black_box(W)), r"factors\[0\]: expected a matrix or an operator"),
    "integer diagonal": (lambda: Diagonal(torch.arange(3)), r"d: expected a floating-point or complex dtype, got torch.int64"),
    "diagonal of a list": (lambda: Diagonal([1.0]), r"d: expected a Tensor, got list"),
    "identity of a number": (lambda: Identity(3), r"like: expected an example tensor or a pytree of tensors, got int"),
    "claim": (
        lambda: Diagonal(D, positive_defnite=True),
        r"claim 'positive_defnite'; did you mean 'positive_definite'",
    ),
    "operator option": (lambda: LinearOperator(abs, hermitean=True), r"unknown option 'hermitean'; did you mean 'hermitian'"),
}


@pytest.mark.parametrize(("build", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_with_what_was_expected_and_what_came(build, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        build()
    words = words.replace("SIX", r"\(\.\.\., 6\)").replace("FOUR", r"\(\.\.\., 4\)")
    assert re.search(words, str(caught.value)), str(caught.value)


def test_a_function_cannot_be_moved():
    with pytest.raises(TypeError, match=r"to: the function .* may close over tensors"):
        black_box(W).to(torch.float32)


def test_a_module_moves_with_its_operator():
    module = torch.nn.Linear(4, 4, bias=False, dtype=F64)
    A = (2 * LinearOperator(module)).to(torch.float32)
    assert A(torch.ones(4)).dtype == torch.float32
    assert module.weight.dtype == F64
    assert torch.allclose(A(torch.ones(4)).double(), 2 * module.weight.sum(1), atol=1e-6)


def test_moving_is_differentiable_and_keeps_complex_numbers():
    d = D.clone().requires_grad_()
    (g,) = torch.autograd.grad(Diagonal(d).to(torch.float32)(torch.ones(6)).sum(), d)
    assert torch.equal(g, torch.ones(6, dtype=F64))
    assert Diagonal(D.to(C128)).to(torch.float32).d.dtype == torch.complex64


def test_a_real_right_hand_side_of_a_complex_operator_is_promoted():
    x = ns.solve(Diagonal(D * 1j), D)
    assert torch.allclose(x, torch.full((6,), -1j, dtype=C128))


@pytest.mark.parametrize("order", [1, -1])
def test_a_sum_of_a_real_and_a_complex_operator_is_complex(order):
    parts = [Diagonal(D), aslinearoperator(0.1j * W)][::order]
    x = ns.solve(parts[0] + parts[1], D)
    assert torch.allclose(x, torch.linalg.solve(torch.diag(D) + 0.1j * W, D.to(C128)))


def test_a_sum_broadcasts_the_batches_of_its_parts():
    many = draw(3, 6, 6, seed=9)
    assert torch.allclose((aslinearoperator(many) + aslinearoperator(W))(D), (many + W) @ D)


def test_zero_keeps_batches_and_trees():
    Z = Zero({"a": D, "b": D[:2]}, D[:3])
    y = Z({"a": draw(4, 6), "b": draw(4, 2)})
    assert y.shape == (4, 3)
    assert not y.any()


# -- what a review has found -------------------------------------------------------------------------------------------


def test_a_factor_with_batch_dimensions_of_its_own_is_refused_by_kronecker():
    with pytest.raises(ValueError, match=r"factors\[0\]: expected an operator without batch dimensions of its own"):
        Kronecker(draw(3, 2, 2), draw(3, 3))


def test_a_hermitian_product_of_factors_that_are_not_has_estimated_eigenvalues():
    A, B = (M - M.mT for M in (draw(3, 3), draw(4, 4, seed=1)))
    K = aslinearoperator(Kronecker(A, B), hermitian=True)
    (low, high), how = K.eigenvalue_bounds(return_how=True)
    truth = torch.linalg.eigvalsh(torch.kron(A, B))
    assert how == "Lanczos"
    assert abs(low - truth[0]) < 1e-8
    assert abs(high - truth[-1]) < 1e-8


@pytest.mark.parametrize(
    "build",
    [
        lambda lam: Diagonal(D).gram(lam),
        lambda lam: ns.Subsample(6, [0, 2], like=D).gram(lam),
        lambda lam: ns.CoilSensitivities(torch.stack([D, D])).gram(lam),
        lambda lam: ns.DFT(6, like=D.to(C128)).gram(lam),
        lambda lam: ns.Gradient(6, like=D).gram(lam),
        lambda lam: Diagonal(D) / lam,
        lambda lam: lam * Diagonal(D),
        lambda lam: (Diagonal(D) / lam).inverse(),
    ],
)
def test_a_tensor_is_read_where_the_operator_is_applied(build):
    lam = torch.tensor(0.5, dtype=F64, requires_grad=True)
    A, x = build(lam), torch.ones(6, dtype=C128)
    first = A(x).detach()
    for _ in range(2):  # each application has a graph of its own
        torch.autograd.grad(A(x).abs().sum(), lam)
    with torch.no_grad():
        lam.fill_(3.0)
    assert not torch.allclose(A(x), first)


def test_an_adjoint_method_that_is_asked_for_is_not_replaced():
    d = (D - 1.5).requires_grad_()
    x, info = ns.solve_ex(Diagonal(d), D, adjoint=dict(method="gmres", maxiter=2), on_failure="ignore")
    x.sum().backward()
    assert (info.adjoint.method, info.adjoint.iterations) == ("gmres", 2)


def test_a_callback_stops_a_direct_solve_for_good_and_the_history_is_whole():
    seen = []
    T = ns.Triangular(torch.tril(draw(40, 40)))
    _, info = ns.solve_ex(T, draw(40), callback=lambda state: seen.append(state.iteration) or True, rtol=1e-15)
    assert seen == [1]
    assert (info.iterations, info.status) == (1, ns.Status.STOPPED)
    _, info = ns.solve_ex(Diagonal(torch.tensor([1.0, 0, 2])), torch.ones(3), history=True)
    assert len(info.history) == info.iterations + 1


@pytest.mark.parametrize("method", ["direct", "qr", "svd"])
def test_the_history_of_a_direct_solve_is_of_recomputed_residuals(method):
    A, b = draw(30, 30), draw(30)
    x, info = ns.solve_ex(A, b, method=method, history=True)
    assert len(info.history) == 2
    assert info.history[0].item() == pytest.approx(b.norm().item())
    assert info.history[1].item() == pytest.approx(info.residual_norm)
    assert info.residual_norm == pytest.approx((b - A @ x).norm().item(), rel=1e-3)
    assert info.matvecs == 1  # for the certificate


@pytest.mark.parametrize(("method", "matrix"), [("direct", torch.diag(torch.tensor([1.0, 0, 2]))), ("qr", torch.zeros(3, 3))])
def test_a_direct_solve_without_a_step_calls_nobody(method, matrix):
    seen: list[int] = []
    _, info = ns.solve_ex(
        matrix, torch.ones(3), method=method, history=True, callback=lambda state: seen.append(state.iteration)
    )
    assert not info.converged
    assert (info.iterations, len(info.history), seen) == (0, 1, [])


def test_a_callback_stops_a_direct_solve_that_stagnates_and_no_other_method_goes_on():
    T = ns.Triangular(torch.tril(draw(40, 40)))
    seen: list[int] = []
    options = dict(rtol=1e-15, maxiter=60)
    steps = ns.solve_ex(T, draw(40), history=True, **options)[1].iterations
    assert steps > 2
    for last in range(1, 4):
        seen.clear()
        callback = lambda state, last=last: seen.append(state.iteration) or len(seen) == last  # noqa: E731
        _, info = ns.solve_ex(T, draw(40), callback=callback, **options)
        assert len(seen) == last
        assert info.status is ns.Status.STOPPED


@pytest.mark.parametrize("method", ["cg", "bicgstab", "direct"])
def test_a_callback_that_stops_where_the_method_claims_to_be_done_is_heard(method):
    """The claim may be false, and another cycle would follow."""
    Q = torch.linalg.qr(draw(12, 12))[0]
    A, b = (Q * torch.logspace(0, -4, 12, dtype=F64)) @ Q.mT, draw(12)
    seen: list[int] = []

    def at(step: int):
        seen.clear()
        return lambda state: seen.append(state.iteration) or state.iteration >= step

    options = dict(method=method, rtol=1e-14, maxiter=2000)
    ns.solve_ex(A, b, **options, callback=at(2001))
    for step in range(1, len(seen) + 1):
        ns.solve_ex(A, b, **options, callback=at(step))
        assert seen == list(range(1, step + 1))


def test_a_krylov_method_that_goes_on_does_not_begin_at_an_exploded_iterate():
    F = ns.FiniteDifference(8, kind="central", dtype=F64)
    b = F.gram()(draw(8))
    x, info = ns.solve_ex(F.gram(), b)
    assert info.converged
    assert torch.allclose(F.gram()(x), b)


def test_one_channel_does_not_make_another_singular():
    kernel = torch.stack([draw(3), 1e18 * draw(3, seed=1)])
    H, b = ns.Convolution(kernel, 16), draw(2, 16, seed=2)
    _, info = ns.solve_ex(H, b, batch_dims=1)
    assert info.method == "direct"
    assert info.converged.all()


@pytest.mark.parametrize("k", [2, 3])
def test_an_update_of_a_batch_of_matrices_is_solved(k):
    M, U, b = draw(3, 4, 4) + 5 * eye(4), draw(4, k), draw(3, 4)
    x, info = ns.solve_ex(aslinearoperator(M) + ns.LowRank(U), b, batch_dims=1)
    assert info.method == "direct"
    assert torch.as_tensor(info.iterations).max() == 1
    assert torch.allclose(x, torch.linalg.solve(M + U @ U.mT, b))


def test_a_complex_matrix_takes_a_real_update():
    M, U, b = draw(4, 4, dtype=C128) + 5 * eye(4), draw(4, 2), draw(4, dtype=C128)
    assert torch.allclose(ns.solve(aslinearoperator(M) + ns.LowRank(U), b), torch.linalg.solve(M + U @ U.mT, b))


def test_a_complex_reaction_is_solved_in_one_dimension():
    A = ns.Diffusion(D, reaction=torch.tensor(1j, dtype=C128))
    x = ns.solve(A, D)
    assert torch.allclose(A(x), D.to(C128))


def test_the_adjoint_of_an_inverse_takes_the_adjoint_preconditioner():
    n = 60
    M = 0.3 * draw(n, n) + torch.diag(torch.logspace(0, 4, n, dtype=F64)).roll(3, 0)
    inverse = Inverse(black_box(M), M=torch.linalg.inv(M), method="gmres", maxiter=5)
    b = draw(n, seed=1)
    assert torch.allclose(M @ inverse(b), b)
    assert torch.allclose(M.mT @ inverse.H(b), b, atol=1e-6)
    with pytest.raises(TypeError, match="option 'x0' belongs to one right-hand side"):
        Inverse(M, x0=b)


def test_products_and_multiples_that_are_complex_act_on_complex_vectors():
    E = ns.DFT(8, like=draw(1, dtype=C128)) @ ns.Convolution(draw(3), 8, boundary="zero")
    assert E.norm_estimate(steps=8) == pytest.approx(float(torch.linalg.matrix_norm(E.to_dense(), ord=2)), rel=1e-6)
    assert ns.solve(E.gram(0.1), draw(8)).is_complex()
    assert "complex128" in repr(1j * Diagonal(D))
    assert (1j * ns.Toeplitz(draw(100))).norm_estimate() > 0
    assert torch.allclose(
        ns.solve(1j * ns.LowRank(draw(4, 4)), draw(4)), ns.solve(1j * ns.LowRank(draw(4, 4)).to_dense(), draw(4))
    )
