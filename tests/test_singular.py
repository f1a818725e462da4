"""Singular square systems whose nullspaces are given: values, gauges, and derivatives, of a nullspace that moves too."""

from __future__ import annotations

import pytest
import torch
from references import draw, relative_error
from torch import Tensor

import nablasolve as ns

F64 = torch.float64
N = 8
ONE = torch.ones(N, dtype=F64)
TIGHT = 1e-13


def pinv(A: Tensor) -> Tensor:
    """Differentiable in reverse mode for a locally constant rank."""
    return torch.linalg.pinv(A, rtol=1e-10)


def path(k: Tensor) -> Tensor:
    """The Laplacian of a path of `n` nodes with edge weights `k`."""
    D = torch.eye(k.shape[-1] + 1, dtype=k.dtype).diff(dim=0)
    return D.T @ (k[:, None] * D)


def system(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Edge weights, and a right-hand side in the range."""
    k, b = draw(N - 1, dtype=F64).abs() + 0.5, draw(N, dtype=dtype, seed=1)
    return k.requires_grad_(), (b - b.mean()).requires_grad_()


def loss(x: Tensor) -> Tensor:
    """With a cotangent that has a part in the nullspace."""
    return ((x - (1 + torch.arange(x.numel(), dtype=F64)).cos().reshape(x.shape)).abs() ** 2).sum()


BOTH = {"nullspace": ONE, "left_nullspace": ONE}
WAYS = {
    "cg": {"method": "cg", "nullspace": ONE},
    "minres": {"method": "minres", "nullspace": ONE},
    "gmres": {"method": "gmres", **BOTH},
    "bicgstab": {"method": "bicgstab", **BOTH},
    "lsmr": {"method": "lsmr", **BOTH},
    "one side is enough for a Hermitian one": {"method": "cg", "left_nullspace": ONE},
    "vectors of any length": {"method": "cg", "nullspace": -3e5 * ONE},
    "a list": {"method": "cg", "nullspace": [ONE, 2 * ONE]},
    "a projection": {"method": "minres", "nullspace": lambda v: v.mean() + torch.zeros_like(v)},
    "an operator that projects": {"method": "minres", "nullspace": ns.aslinearoperator(torch.full((N, N), 1 / N, dtype=F64))},
    "preconditioned": {"method": "cg", "nullspace": ONE, "M": torch.diag(torch.linspace(1, 2, N, dtype=F64))},
}


@pytest.mark.parametrize("dtype", (F64, torch.complex128), ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_shortest_solution_and_its_gradient(way, dtype):
    k, b = system(dtype)
    x, info = ns.solve_ex(lambda v: path(k).to(dtype) @ v, b, rtol=TIGHT, **WAYS[way])
    reference = pinv(path(k)).to(dtype) @ b
    assert info.converged
    assert relative_error(x, reference) <= 1e-9
    for one, other in zip(*(torch.autograd.grad(loss(y), (k, b)) for y in (x, reference)), strict=True):
        assert relative_error(one, other) <= 1e-7


def test_dense_matrix_needs_no_method():
    k, b = system()
    x, info = ns.solve_ex(path(k), b, rtol=TIGHT, **BOTH)
    reference = pinv(path(k)) @ b
    assert info.method == "svd"
    assert relative_error(x, reference) <= 1e-9
    for one, other in zip(*(torch.autograd.grad(loss(y), (k, b)) for y in (x, reference)), strict=True):
        assert relative_error(one, other) <= 1e-7


def test_left_and_right_nullspaces_that_differ():
    """A nonsymmetric matrix, for which LSMR is chosen, since GMRES may fail there."""
    L, R = draw(N, N - 2, dtype=F64, seed=2).requires_grad_(), draw(N - 2, N, dtype=F64, seed=3).requires_grad_()
    right, left = (torch.linalg.svd(t)[2][N - 2 :] for t in (R.detach(), L.detach().T))
    c = draw(N - 2, dtype=F64, seed=4)

    def by(solve):
        return lambda L, R: loss(solve(L, R, L @ (L.T @ (L @ c))))

    def ours(L, R, b):
        return ns.solve(lambda v: L @ (R @ v), b, nullspace=list(right), left_nullspace=list(left), rtol=TIGHT)

    def reference(L, R, b):
        return pinv(L @ R) @ b

    x, info = ns.solve_ex(lambda v: L @ (R @ v), L @ c, nullspace=right, left_nullspace=left, rtol=TIGHT)
    assert info.method == "lsmr"
    assert relative_error(x, reference(L, R, L @ c)) <= 1e-9
    for one, other in zip(*(torch.autograd.grad(by(f)(L, R), (L, R)) for f in (ours, reference)), strict=True):
        assert relative_error(one, other) <= 1e-7


@pytest.mark.parametrize("method", ("cg", "minres", "svd"))
def test_nullspace_that_moves_with_the_operator(method):
    """`A = W W^T`: the term `<q, dA p>` is needed (0.136 in the place of 0.337 without it, for one such case)."""
    W, z = draw(6, 4, dtype=F64).requires_grad_(), draw(4, dtype=F64, seed=1).requires_grad_()
    null = torch.linalg.svd(W.detach())[0][:, 4:].T

    def ours(W, z):
        A = W @ W.T if method == "svd" else lambda v: W @ (W.T @ v)
        return loss(ns.solve(A, W @ z, nullspace=list(null), left_nullspace=list(null), method=method, rtol=TIGHT))

    def reference(W, z):
        inverse = torch.linalg.inv(W.T @ W)
        return loss(W @ (inverse @ z))  # (W W^T)^+ = W (W^T W)^-2 W^T

    for one, other in zip(*(torch.autograd.grad(f(W, z), (W, z)) for f in (ours, reference)), strict=True):
        assert relative_error(one, other) <= 1e-7
    # second order, and forward over reverse
    step = draw(6, 4, dtype=F64, seed=5)
    ours_2, reference_2 = (
        torch.func.jvp(torch.func.grad(f), (W.detach(), z.detach()), (step, torch.ones_like(z)))[1] for f in (ours, reference)
    )
    assert relative_error(ours_2, reference_2) <= 1e-6


def test_second_derivatives_with_a_fixed_nullspace():
    k, b = (t.detach() for t in system())

    def by(solve):
        f = lambda k, b: loss(solve(k, b))  # noqa: E731
        steps = (draw(N - 1, dtype=F64, seed=5), draw(N, dtype=F64, seed=6))
        return torch.func.jvp(torch.func.grad(f, (0, 1)), (k, b), steps)[1]

    def reference(k, b):
        shift = torch.ones(N, N, dtype=F64) / N
        return (torch.linalg.inv(path(k) + shift) - shift) @ b

    ours = by(lambda k, b: ns.solve(lambda v: path(k) @ v, b - b.mean(), nullspace=ONE, method="cg", rtol=TIGHT))
    for one, other in zip(ours, by(reference), strict=True):
        assert relative_error(one, other) <= 1e-6


def test_nullspace_that_stays_costs_one_adjoint_solve():
    k, b = system()
    counted = [0]

    def A(v):
        counted[0] += 1
        return path(k) @ v

    x, info = ns.solve_ex(A, b, nullspace=ONE, method="cg", rtol=TIGHT)
    before = counted[0]
    loss(x).backward()
    assert counted[0] - before <= info.adjoint.iterations + 7


def test_right_hand_side_out_of_range_is_inconsistent():
    k, b = system()
    for method in ("cg", "minres", "gmres", "lsmr"):
        x, info = ns.solve_ex(lambda v: path(k) @ v, b + 0.1, method=method, **BOTH)
        assert info.status == ns.Status.INCONSISTENT
        assert not info.converged
        with pytest.raises(ns.ConvergenceError):
            ns.solve(lambda v: path(k) @ v, b + 0.1, method=method, **BOTH)
        assert info.residual_norm == pytest.approx(torch.linalg.vector_norm(b + 0.1 - path(k) @ x).item(), rel=1e-6)
        # the part in the range is solved
        assert relative_error(x, pinv(path(k)) @ b) <= 1e-6


def test_batch_with_nullspaces_of_its_own():
    k = torch.stack([system()[0].detach(), torch.ones(N - 1, dtype=F64)])
    phase = torch.stack([ONE, draw(N, dtype=F64, seed=7).sign()])  # D A D has the nullspace D 1
    A = torch.stack([phase[i][:, None] * path(k[i]) * phase[i] for i in range(2)])
    b = (A @ draw(2, N, 1, dtype=F64, seed=3))[..., 0].requires_grad_()
    for method in ("cg", "minres"):
        x = ns.solve(lambda v: (A @ v[..., None])[..., 0], b, nullspace=phase, method=method, batch_dims=1, rtol=TIGHT)
        assert relative_error(x, (pinv(A) @ b[..., None])[..., 0]) <= 1e-9
    assert (
        relative_error(torch.autograd.grad(loss(x), b)[0], torch.autograd.grad(loss((pinv(A) @ b[..., None])[..., 0]), b)[0])
        <= 1e-7
    )


def test_tree_with_a_nullspace():
    k, b = system()

    def split(v):
        return {"a": v[:3], "b": v[3:]}

    def A(x):
        return split(path(k) @ torch.cat([x["a"], x["b"]]))

    x = ns.solve(A, split(b), nullspace=split(ONE), method="cg", rtol=TIGHT)
    assert relative_error(torch.cat([x["a"], x["b"]]), pinv(path(k)) @ b) <= 1e-9


# -- gauges --------------------------------------------------------------------------------------------------------


def test_gauge_picks_the_solution_and_differentiates():
    k, b = system()
    c, g = draw(N, dtype=F64, seed=4).requires_grad_(), torch.tensor(0.7, dtype=F64, requires_grad=True)
    x = ns.solve(lambda v: path(k) @ v, b, nullspace=ONE, method="cg", gauge=(c, g), rtol=TIGHT)
    shortest = pinv(path(k)) @ b
    reference = shortest + ONE * (g - c @ shortest) / (c @ ONE)
    assert relative_error(c @ x, g) <= 1e-10
    assert relative_error(x, reference) <= 1e-9
    for one, other in zip(*(torch.autograd.grad(loss(y), (k, b, c, g)) for y in (x, reference)), strict=True):
        assert relative_error(one, other) <= 1e-7


def test_gauge_with_a_nullspace_that_moves():
    W, z = draw(6, 4, dtype=F64), draw(4, dtype=F64, seed=1)
    C, g = draw(2, 6, dtype=F64, seed=2), torch.tensor([1.0, 2.0], dtype=F64)
    null = torch.linalg.svd(W)[0][:, 4:].T

    def ours(W):
        return loss(ns.solve(lambda v: W @ (W.T @ v), W @ z, nullspace=null, method="cg", gauge=(list(C), g), rtol=TIGHT))

    def reference(W):
        inverse = torch.linalg.inv(W.T @ W)
        shortest, moved = W @ (inverse @ z), null.T - W @ (inverse @ (W.T @ null.T))
        return loss(shortest + moved @ torch.linalg.solve(C @ moved, g - C @ shortest))

    assert relative_error(torch.func.grad(ours)(W), torch.func.grad(reference)(W)) <= 1e-7
    step = draw(6, 4, dtype=F64, seed=5)
    twice = (torch.func.jvp(torch.func.grad(f), (W,), (step,))[1] for f in (ours, reference))
    assert relative_error(*twice) <= 1e-6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"nullspace": ONE}, ValueError, r"left_nullspace: needed"),
        ({"nullspace": ONE[:3], "method": "cg"}, ValueError, r"nullspace: expected shape \(8,\) like x, got \(3,\)"),
        ({"nullspace": "constants", "method": "cg"}, TypeError, r"nullspace: expected a vector"),
        ({"nullspace": ONE.cumsum(0), "method": "cg"}, ValueError, r"nullspace: expected vectors n with A n = 0"),
        ({"nullspace": ONE, "left_nullspace": [ONE, ONE.cumsum(0)]}, ValueError, r"left_nullspace: expected vectors y"),
        ({"gauge": (ONE, 0.0), "method": "cg"}, ValueError, r"gauge: needs nullspace="),
        ({"gauge": ONE, "nullspace": ONE, "method": "cg"}, TypeError, r"gauge: expected a pair"),
        ({"gauge": ([ONE, ONE], 0.0), "nullspace": ONE, "method": "cg"}, ValueError, r"gauge: expected 1 vectors c"),
        ({"gauge": (ONE.cumsum(0) - 4.5, 0.0), "nullspace": ONE, "method": "cg"}, ValueError, r"gauge: c\^H x says nothing"),
        ({"gauge": (ONE, torch.zeros(3)), "nullspace": ONE, "method": "cg"}, ValueError, r"gauge: expected g of shape \(1,\)"),
    ),
)
def test_errors_name_the_argument(options, error, message):
    k, b = system()
    with pytest.raises(error, match=message):
        ns.solve(lambda v: path(k) @ v, b, **options)


# -- operators that know -------------------------------------------------------------------------------------------


def test_neumann_poisson_problem_has_the_gradient_of_its_coefficients():
    """Against finite differences: nothing is said but the boundary condition and the sign."""
    conductivity = (draw(6, 5, dtype=F64).abs() + 0.5).requires_grad_()
    b = draw(6, 5, dtype=F64, seed=1)
    b = b - b.mean()

    def value(k):
        A = ns.Diffusion(k, boundary="neumann", positive_semidefinite=True)
        x, info = ns.solve_ex(A, b, rtol=TIGHT)
        assert info.converged
        assert abs(x.mean()) <= 1e-12
        return loss(x)

    value(conductivity).backward()
    for index in ((0, 0), (2, 3), (5, 4)):
        step = torch.zeros(6, 5, dtype=F64)
        step[index] = 1e-5
        difference = (value(conductivity.detach() + step) - value(conductivity.detach() - step)) / 2e-5
        assert abs(conductivity.grad[index] - difference) <= 1e-6 * abs(difference)


@pytest.mark.parametrize("boundary", ("neumann", "circular"))
def test_laplacian_is_solved_out_of_the_box(boundary):
    A = -ns.Laplacian((6, 8), boundary=boundary, dtype=F64)
    b = draw(6, 8, dtype=F64, seed=1)
    x, info = ns.solve_ex(A, b - b.mean(), rtol=1e-11)
    assert info.converged
    assert abs(x.mean()) <= 1e-12
    assert relative_error(A @ x, b - b.mean()) <= 1e-10
    assert ns.solve_ex(A, b)[1].status == ns.Status.INCONSISTENT


def test_graph_of_two_parts():
    edges = torch.tensor([[0, 1, 2, 4, 5, 4], [1, 2, 3, 5, 6, 6]])
    weights = (draw(6, dtype=F64).abs() + 0.5).requires_grad_()
    b = draw(7, dtype=F64, seed=1)
    b = torch.cat([b[:4] - b[:4].mean(), b[4:] - b[4:].mean()])
    x = ns.solve(ns.GraphLaplacian(edges, weights), b, rtol=TIGHT)
    dense = ns.GraphLaplacian(edges, weights).to_dense()
    reference = pinv(dense) @ b
    assert relative_error(x, reference) <= 1e-9
    ours, theirs = (torch.autograd.grad(loss(y), weights)[0] for y in (x, reference))
    assert relative_error(ours, theirs) <= 1e-7


def test_second_order_and_batches_of_cotangents_through_a_given_nullspace():
    conductivity, b = (draw(3, 4, dtype=F64).abs() + 0.5).requires_grad_(), draw(3, 4, dtype=F64, seed=1).requires_grad_()

    def f(k, b):
        return ns.solve(ns.Diffusion(k, boundary="neumann"), b - b.mean(), rtol=TIGHT)

    assert torch.autograd.gradcheck(f, (conductivity, b), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (conductivity, b))
    one, other = torch.func.jacrev(f)(conductivity, b), torch.func.jacfwd(f)(conductivity, b)
    assert relative_error(one, other) <= 1e-8


def test_second_derivative_of_a_moving_nullspace_that_is_not_differentiated_again():
    W, z = draw(6, 4, dtype=F64).requires_grad_(), draw(4, dtype=F64, seed=1)
    null = torch.linalg.svd(W.detach())[0][:, 4:].T
    functions = (
        lambda W: loss(ns.solve(lambda v: W @ (W.T @ v), W @ z, nullspace=null, method="cg", rtol=TIGHT)),
        lambda W: loss(W @ (torch.linalg.inv(W.T @ W) @ z)),
    )
    slopes = (torch.autograd.grad(f(W), W, create_graph=True)[0] for f in functions)
    ours, theirs = (torch.autograd.grad((slope * draw(6, 4, dtype=F64, seed=2)).sum(), W)[0] for slope in slopes)
    assert relative_error(ours, theirs) <= 1e-6


def test_gauge_in_forward_mode_over_forward_mode():
    k, b = (t.detach() for t in system())
    c = draw(N, dtype=F64, seed=4)

    def f(k):
        return loss(ns.solve(lambda v: path(k) @ v, b, nullspace=ONE, method="cg", gauge=(c, 0.7), rtol=TIGHT))

    assert relative_error(torch.func.jacfwd(torch.func.jacfwd(f))(k), torch.func.hessian(f)(k)) <= 1e-6


@pytest.mark.parametrize(
    ("nullspace", "message"),
    (
        (torch.zeros(N, dtype=F64), r"nullspace: expected vectors other than zero"),
        (1j * ONE, r"nullspace: expected real vectors"),
        (lambda v: 2 * v.mean() + torch.zeros_like(v), r"nullspace: expected a projection"),
    ),
)
def test_what_is_no_nullspace_is_refused(nullspace, message):
    k, b = system()
    with pytest.raises(ValueError, match=message):
        ns.solve(lambda v: path(k) @ v, b, nullspace=nullspace, method="cg")
