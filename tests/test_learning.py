"""Derivatives as operators and matrices of covariance functions: what the grid of operators cannot say of them."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_cases import draw
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import nablasolve as ns
from nablasolve.operators import Fisher, GaussNewton, Hessian, Jacobian, KernelMatrix

W, X0, B, THETA = draw(5, 4), draw(4, seed=1), draw(4, seed=2), draw(5, seed=3)


def apart(got: Any, expected: Any) -> float:
    """The largest difference between two trees, relative to the largest entry."""
    pairs = list(zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    scale = max(float(b.detach().abs().max()) for _, b in pairs)
    return max(float((a - b).detach().abs().max()) for a, b in pairs) / scale


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def network(*sizes: int, seed: int = 0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (m, n) in enumerate(itertools.pairwise(sizes)):
        layer = nn.Linear(m, n, dtype=torch.float64)
        layer.weight.data, layer.bias.data = draw(n, m, seed=seed + 2 * i) / m**0.5, draw(n, seed=seed + 2 * i + 1) / 4
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def dense_of(f: Callable[[Tensor], Tensor], module: nn.Module) -> Callable[[Tensor], Any]:
    """`f(module)` as a function of the flat parameters."""
    names, shapes = zip(*((name, p.shape) for name, p in module.named_parameters()), strict=True)

    def of_flat(v: Tensor) -> Any:
        parts = v.split([shape.numel() for shape in shapes])
        parameters = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return f(lambda x: torch.func.functional_call(module, parameters, (x,)))

    return of_flat


# -- against torch's own transforms -----------------------------------------------------------------------------------


def test_operators_of_a_module_equal_the_dense_matrices_of_torch_func() -> None:
    module, inputs, labels = network(3, 4, 3), draw(6, 3, seed=9), torch.tensor([0, 2, 1, 1, 0, 2])

    def loss(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels)

    point = flat(dict(module.named_parameters())).detach()
    outputs = dense_of(lambda net: net(inputs), module)
    J = torch.func.jacrev(outputs)(point)
    H_loss = torch.func.hessian(loss)(outputs(point))
    gauss_newton = torch.einsum("iap,iajb,jbq->pq", J, H_loss, J)
    assert apart(Jacobian.of_module(module, inputs).to_dense(), J.reshape(18, -1)) < 1e-13
    hessian = torch.func.hessian(dense_of(lambda net: loss(net(inputs)), module))(point)
    assert apart(Hessian.of_module(module, inputs, loss).to_dense(), hessian) < 1e-12
    assert apart(GaussNewton.of_module(module, inputs, loss).to_dense(), gauss_newton) < 1e-13
    # for this likelihood the two are the same (Martens 2020, section 9)
    assert apart(Fisher.of_module(module, inputs).to_dense(), gauss_newton) < 1e-13


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_fisher_is_the_mean_outer_product_of_the_score(likelihood: str) -> None:
    sigma, outputs = 0.7, lambda x: (W @ x).sin().reshape(-1, 5) if likelihood == "categorical" else (W @ x).sin()

    def score(draw: Tensor) -> Tensor:
        def log_density(x: Tensor) -> Tensor:
            y = outputs(x)
            if likelihood == "categorical":
                return torch.log_softmax(y, -1)[0, draw]
            return -((draw - y) ** 2).sum() / (2 * sigma**2)

        return torch.func.grad(log_density)(X0)

    if likelihood == "categorical":
        p = torch.softmax(outputs(X0), -1)[0]
        expected = sum(p[k] * torch.outer(score(k), score(k)) for k in range(5))
    else:  # y + sigma e with e = +-sqrt(5) e_i, of probability 1/10 each, has the covariance of the noise
        noise = sigma * 5**0.5 * torch.cat([torch.eye(5), -torch.eye(5)]).double()
        expected = sum(torch.outer(score(outputs(X0) + e), score(outputs(X0) + e)) for e in noise) / 10
        expected = expected / 5  # one sample for each of the five outputs
    fisher = Fisher(outputs, X0, likelihood=likelihood, sigma=sigma)
    assert apart(fisher.to_dense(), expected) < 1e-13


def test_for_a_linear_model_gauss_newton_is_the_hessian() -> None:
    def loss(y: Tensor) -> Tensor:
        return (y**4).sum() + y.logsumexp(0)

    gauss_newton = GaussNewton(lambda x: W @ x, loss, X0)
    assert apart(gauss_newton.to_dense(), Hessian(lambda x: loss(W @ x), X0).to_dense()) < 1e-13


def test_the_hessian_of_a_linear_function_is_its_damping() -> None:
    assert apart(Hessian(lambda x: (W @ x).sum(), X0, damping=2.0).to_dense(), 2 * torch.eye(4, dtype=torch.float64)) == 0


def test_the_jacobian_of_a_holomorphic_function_is_its_complex_derivative() -> None:
    z, A = draw(3, dtype=torch.complex128), draw(4, 3, dtype=torch.complex128, seed=1)
    J = Jacobian(lambda z: torch.exp(A @ z) * z.sum(), z)
    expected = torch.exp(A @ z)[:, None] * (A * z.sum() + 1)
    assert apart(J.to_dense(), expected) < 1e-14
    assert apart(J.H.to_dense(), expected.mH) < 1e-14
    assert ns.check_operator(J, z).ok


def test_the_check_finds_a_function_that_is_not_holomorphic() -> None:
    z = draw(3, dtype=torch.complex128)
    assert not ns.check_operator(Jacobian(lambda z: z * z.abs(), z), z).ok


# -- modules ----------------------------------------------------------------------------------------------------------


def squares(y: Tensor) -> Tensor:
    return (y - 1).square().mean()


KINDS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "Hessian": lambda m, x: Hessian.of_module(m, x, squares, damping=3.0),
    "Gauss-Newton": lambda m, x: GaussNewton.of_module(m, x, squares, damping=0.3, positive_semidefinite=True),
    "Fisher": lambda m, x: Fisher.of_module(m, (x,), likelihood="gaussian", damping=0.3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_solution_is_a_dictionary_and_gradients_reach_the_parameters(kind: str) -> None:
    module, inputs = network(2, 3, 2), draw(5, 2, seed=9).requires_grad_()
    b = {name: draw(*p.shape, seed=20 + i) for i, (name, p) in enumerate(module.named_parameters())}
    x = ns.solve(KINDS[kind](module, inputs), b, rtol=1e-12)
    assert {name: t.shape for name, t in x.items()} == {name: p.shape for name, p in module.named_parameters()}
    got = torch.autograd.grad(flat(x).square().sum(), [*module.parameters(), inputs], materialize_grads=True)

    point = flat(dict(module.named_parameters())).detach()

    def loss(point: Tensor, inputs: Tensor) -> Tensor:
        outputs = dense_of(lambda net: net(inputs), module)
        if kind == "Hessian":
            M = torch.func.hessian(lambda v: squares(outputs(v)))(point)
        else:
            J = torch.func.jacrev(outputs)(point).reshape(10, -1)
            M = J.mT @ J / 5
        M = M + (3.0 if kind == "Hessian" else 0.3) * torch.eye(len(point), dtype=M.dtype)
        return (torch.linalg.inv(M) @ flat(b)).square().sum()

    by_point, by_inputs = torch.func.grad(loss, (0, 1))(point, inputs.detach())
    assert apart([flat(got[:-1]), got[-1]], [by_point, by_inputs]) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_parameters_that_functional_call_puts_into_a_module(kind: str) -> None:
    class Step(nn.Module):
        """A module that solves with the curvature of a part of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.net = network(2, 2, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            b = {name: torch.ones_like(p) for name, p in self.net.named_parameters()}
            return flat(ns.solve(KINDS[kind](self.net, inputs), b, rtol=1e-12)).square().sum()

    step, inputs = Step(), draw(5, 2, seed=9)
    expected = torch.autograd.grad(step(inputs), list(step.parameters()), materialize_grads=True)
    parameters = {name: p.detach() for name, p in step.named_parameters()}
    got = torch.func.grad(lambda p: torch.func.functional_call(step, p, (inputs,)))(parameters)
    assert apart(tuple(got.values()), expected) < 1e-9
    again = {name: p.detach().requires_grad_() for name, p in step.named_parameters()}
    value = torch.func.functional_call(step, again, (inputs,))  # whose backward pass sees the old parameters in the module
    assert apart(torch.autograd.grad(value, list(again.values()), materialize_grads=True), expected) < 1e-9


def test_params_choose_the_unknowns_and_leave_the_others_as_they_are() -> None:
    module, inputs = network(2, 3, 2), draw(5, 2, seed=9)
    last = {name: p for name, p in module.named_parameters() if name.startswith("2.")}
    whole = Hessian.of_module(module, inputs, squares).to_dense()
    assert apart(Hessian.of_module(module, inputs, squares, params=last).to_dense(), whole[-8:, -8:]) < 1e-13
    b = {name: torch.ones_like(p) for name, p in last.items()}
    x = ns.solve(GaussNewton.of_module(module, inputs, squares, params=last, damping=0.1), b)
    assert list(x) == ["2.weight", "2.bias"]
    gradients = torch.autograd.grad(flat(x).sum(), list(module.parameters()))
    assert all(g.abs().max() > 0 for g in gradients[:2])  # the frozen part still matters


def test_an_operator_of_a_module_and_a_named_loss_can_be_pickled() -> None:
    A = GaussNewton.of_module(network(2, 2), draw(5, 2, seed=9), squares)
    assert torch.equal(pickle.loads(pickle.dumps(A)).to_dense(), A.to_dense())


# -- claims and damping -------------------------------------------------------------------------------------------------


def claimed(A: ns.LinearOperator) -> str:
    return str(A.claims)


def test_claims_follow_the_damping_where_it_is_a_number() -> None:
    def f(x: Tensor) -> Tensor:
        return (W @ x).sin()

    a_tensor = torch.tensor(0.1)
    cases = {
        Hessian(quartic, X0): "hermitian",
        Hessian(quartic, X0, damping=1.0): "hermitian",
        Hessian(quartic, X0, positive_semidefinite=True): "positive_semidefinite",
        Hessian(quartic, X0, positive_semidefinite=True, damping=0.1): "positive_definite",
        Hessian(quartic, X0, positive_semidefinite=True, damping=-0.1): "hermitian",
        Hessian(quartic, X0, positive_semidefinite=True, damping=a_tensor): "hermitian",
        Hessian(quartic, X0, positive_definite=True, damping=a_tensor): "positive_definite",
        GaussNewton(f, quartic_loss, X0, damping=0.1): "hermitian",
        GaussNewton(f, quartic_loss, X0, damping=0.1, positive_semidefinite=True): "positive_definite",
        Fisher(f, X0): "positive_semidefinite",
        Fisher(f, X0, likelihood="gaussian", sigma=a_tensor): "positive_semidefinite",
        Fisher(f, X0, damping=0.1): "positive_definite",
        Fisher(f, X0, damping=a_tensor): "hermitian",
        Jacobian(f, X0): "",
        KernelMatrix(gaussian(1.0), W): "hermitian",
        KernelMatrix(gaussian(1.0), W, noise=0.1): "hermitian",
        KernelMatrix(gaussian(1.0), W, noise=0.1, positive_semidefinite=True): "positive_definite",
        KernelMatrix(gaussian(1.0), W, W[:2]): "",
    }
    for A, expected in cases.items():
        assert claimed(A) == expected, A


def test_a_definite_operator_is_solved_by_conjugate_gradients() -> None:
    _, info = ns.solve_ex(Fisher(lambda x: (W @ x).sin(), X0, damping=0.1), B)
    assert (info.method, info.converged) == ("cg", True)


def test_the_derivative_by_the_damping() -> None:
    damping = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss = ns.solve(Hessian(quartic, X0, damping=damping, positive_definite=True), B, rtol=1e-13).sum()
    (got,) = torch.autograd.grad(loss, damping)
    M = torch.linalg.inv(torch.func.hessian(quartic)(X0) + 0.7 * torch.eye(4, dtype=torch.float64))
    assert apart(got, -(M @ M @ B).sum()) < 1e-11


# -- derivatives to any order, in every mode -----------------------------------------------------------------------------


def quartic(x: Tensor) -> Tensor:
    return ((W @ x) ** 4).sum() / 12 + x.square().sum()


def quartic_loss(y: Tensor) -> Tensor:
    return (y**4).sum() / 12 + y.square().sum()


def gaussian(scale: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: torch.exp(-(a[:, None] - b[None]).square().sum(-1) / (2 * scale**2))


def by_hessian(theta: Tensor, x: Tensor) -> Tensor:
    return ns.solve(Hessian(lambda x: (theta * (W @ x) ** 4).sum() ** 2 / 50 + x.square().sum(), x), B, rtol=1e-13).sin().sum()


def by_dense_hessian(theta: Tensor, x: Tensor) -> Tensor:
    """Written out: with `s = sum(theta z^4)` and `z = W x`, `H = (2 g g^T + 2 s W^T diag(12 theta z^2) W) / 50 + 2 I`."""
    z = W @ x
    g = W.mT @ (4 * theta * z**3)
    second = W.mT @ ((12 * theta * z**2)[:, None] * W)
    H = (2 * torch.outer(g, g) + 2 * (theta * z**4).sum() * second) / 50 + 2 * torch.eye(4, dtype=x.dtype)
    return (torch.linalg.inv(H) @ B).sin().sum()


def by_gauss_newton(theta: Tensor, x: Tensor) -> Tensor:
    A = GaussNewton(lambda x: theta * (W @ x).sin(), quartic_loss, x, damping=0.5, positive_semidefinite=True)
    return ns.solve(A, B, rtol=1e-13).sin().sum()


def by_dense_gauss_newton(theta: Tensor, x: Tensor) -> Tensor:
    J = (theta * (W @ x).cos())[:, None] * W
    M = J.mT @ (((theta * (W @ x).sin()) ** 2 + 2)[:, None] * J) + 0.5 * torch.eye(4, dtype=x.dtype)
    return (torch.linalg.inv(M) @ B).sin().sum()


def by_jacobian(theta: Tensor, x: Tensor) -> Tensor:
    return ns.solve(Jacobian(lambda x: 3 * x + (theta[:4] * x).sin() * x.sum() / 9, x), B, rtol=1e-13).sin().sum()


def by_dense_jacobian(theta: Tensor, x: Tensor) -> Tensor:
    t = theta[:4]
    J = 3 * torch.eye(4, dtype=x.dtype) + torch.diag(t * (t * x).cos() * x.sum() / 9) + (t * x).sin()[:, None] / 9
    return (torch.linalg.inv(J) @ B).sin().sum()


def by_fisher(theta: Tensor, x: Tensor) -> Tensor:
    return ns.solve(Fisher(lambda x: theta * (W @ x).sin(), x, damping=0.5), B, rtol=1e-13).sin().sum()


def by_dense_fisher(theta: Tensor, x: Tensor) -> Tensor:
    J, p = (theta * (W @ x).cos())[:, None] * W, torch.softmax(theta * (W @ x).sin(), -1)
    M = J.mT @ (torch.diag(p) - torch.outer(p, p)) @ J + 0.5 * torch.eye(4, dtype=x.dtype)
    return (torch.linalg.inv(M) @ B).sin().sum()


def by_kernel(theta: Tensor, x: Tensor) -> Tensor:
    X, scale, noise = x[:, None] * theta[:2], theta[2:].square().sum().sqrt(), theta[3] ** 2 + 0.5
    A = KernelMatrix(gaussian(scale), X, noise=noise, block_size=3, positive_definite=True)
    return ns.solve(A, B, rtol=1e-13).sin().sum()


def by_dense_kernel(theta: Tensor, x: Tensor) -> Tensor:
    X, scale, noise = x[:, None] * theta[:2], theta[2:].square().sum().sqrt(), theta[3] ** 2 + 0.5
    D = torch.stack([torch.stack([(a - b).square().sum() for b in X]) for a in X])
    return (torch.linalg.inv(torch.exp(-D / (2 * scale**2)) + noise * torch.eye(4, dtype=x.dtype)) @ B).sin().sum()


def applied_kernel(theta: Tensor, x: Tensor) -> Tensor:
    K = KernelMatrix(gaussian(theta[0]), x[:, None], theta[:, None], block_size=3)
    return K.H(K(theta).sin()).sin().sum()


def applied_dense_kernel(theta: Tensor, x: Tensor) -> Tensor:
    K = torch.exp(-((x[:, None] - theta[None]) ** 2) / (2 * theta[0] ** 2))
    return (K.mT @ (K @ theta).sin()).sin().sum()


PAIRS = {
    "Jacobian": (by_jacobian, by_dense_jacobian),
    "Hessian": (by_hessian, by_dense_hessian),
    "Gauss-Newton": (by_gauss_newton, by_dense_gauss_newton),
    "Fisher": (by_fisher, by_dense_fisher),
    "kernel matrix": (by_kernel, by_dense_kernel),
    "kernel matrix, applied": (applied_kernel, applied_dense_kernel),
}

Loss = Callable[[Tensor, Tensor], Tensor]
F, BOTH = torch.func, (0, 1)


def by_autograd_twice(f: Loss) -> Any:
    inputs = THETA.clone().requires_grad_(), X0.clone().requires_grad_()
    first = torch.autograd.grad(f(*inputs), inputs, create_graph=True)
    return first, torch.autograd.grad(flat(first).sin().sum(), inputs)


def by_dual_numbers(f: Loss) -> Any:
    tangents = []
    for theta_moves, x_moves in ((True, False), (False, True), (True, True)):  # one moves while the other is a constant
        with forward_ad.dual_level():
            theta = forward_ad.make_dual(THETA, THETA.cos()) if theta_moves else THETA
            x = forward_ad.make_dual(X0, X0.sin()) if x_moves else X0
            tangents.append(forward_ad.unpack_dual(f(theta, x)).tangent)
    return tangents


def by_dual_numbers_over_autograd(f: Loss) -> Any:
    with forward_ad.dual_level():
        theta = forward_ad.make_dual(THETA.clone().requires_grad_(), THETA.cos())
        x = forward_ad.make_dual(X0.clone().requires_grad_(), X0.sin())
        gradients = torch.autograd.grad(f(theta, x), (theta, x))
        return tuple(forward_ad.unpack_dual(g).tangent for g in gradients)


def over_a_batch(f: Loss, mode: Callable[[Loss], Any]) -> Any:
    return mode(f)(torch.stack([THETA, 1.1 * THETA]), torch.stack([X0, -X0]))


MODES: dict[str, Callable[[Loss], Any]] = {
    "grad": lambda f: F.grad(f, BOTH)(THETA, X0),
    "jacfwd": lambda f: F.jacfwd(f, BOTH)(THETA, X0),
    "pull-back, used after its transform": lambda f: F.vjp(f, THETA, X0)[1](torch.ones((), dtype=THETA.dtype)),
    "forward over reverse": lambda f: F.jacfwd(F.grad(f, BOTH), BOTH)(THETA, X0),
    "reverse over reverse": lambda f: F.jacrev(F.grad(f, BOTH), BOTH)(THETA, X0),
    "forward over forward": lambda f: F.jacfwd(F.jacfwd(f, BOTH), BOTH)(THETA, X0),
    "reverse over forward": lambda f: F.jacrev(F.jacfwd(f, BOTH), BOTH)(THETA, X0),
    "vmap of grad": lambda f: over_a_batch(f, lambda f: torch.vmap(F.grad(f, BOTH))),
    "grad of vmap": lambda f: over_a_batch(f, lambda f: F.grad(lambda *z: torch.vmap(f)(*z).sum(), BOTH)),
    "vmap over one": lambda f: torch.vmap(f, in_dims=(0, None))(torch.stack([THETA, 1.1 * THETA]), X0),
    "autograd twice": by_autograd_twice,
    "dual numbers": by_dual_numbers,
    "dual numbers over autograd": by_dual_numbers_over_autograd,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pair", PAIRS)
def test_derivatives_are_those_of_the_dense_matrix_in_every_mode(pair: str, mode: str) -> None:
    ours, dense = PAIRS[pair]
    assert apart(MODES[mode](ours), MODES[mode](dense)) < 1e-9


@pytest.mark.parametrize("pair", PAIRS)
def test_gradcheck_and_gradgradcheck(pair: str) -> None:
    def inputs() -> tuple[Tensor, ...]:
        return THETA.clone().requires_grad_(), X0.clone().requires_grad_()

    f = PAIRS[pair][0]
    assert torch.autograd.gradcheck(f, inputs(), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, inputs(), check_fwd_over_rev=True, fast_mode=True)


def test_second_derivative_of_a_bilevel_problem_against_finite_differences() -> None:
    """The inner problem is a ridge regression with one weight a feature; the outer loss is that of held-out data."""
    A, y, A_val, y_val = draw(8, 3), draw(8, seed=1), draw(6, 3, seed=2), draw(6, seed=3)

    def outer(log_weights: Tensor) -> Tensor:
        def inner(w: Tensor) -> Tensor:
            return (A @ w - y).square().sum() / 2 + (log_weights.exp() * w.cosh()).sum()

        w = torch.zeros(3, dtype=torch.float64)
        for _ in range(12):  # Newton's method; its last steps leave a fixed point, whose derivative is implicit
            gradient = torch.func.grad(inner)(w)
            w = w - ns.solve(Hessian(inner, w, positive_definite=True), gradient, rtol=1e-13)
        return (A_val @ w - y_val).square().mean()

    at = torch.tensor([0.1, -0.5, 0.7], dtype=torch.float64)
    h, steps = 1e-4, torch.eye(3, dtype=torch.float64)
    point = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(outer(point), point, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, point, retain_graph=True)[0] for g in gradient])
    by_differences = torch.stack([(outer(at + h * e) - outer(at - h * e)) / (2 * h) for e in steps])
    assert apart(gradient, by_differences) < 1e-7

    def gradient_at(p: Tensor) -> Tensor:
        p = p.clone().requires_grad_()
        return torch.autograd.grad(outer(p), p)[0]

    second = torch.stack([(gradient_at(at + h * e) - gradient_at(at - h * e)) / (2 * h) for e in steps])
    assert apart(hessian, second) < 1e-7


class OldCube(torch.autograd.Function):
    """A function of the old style, which `torch.func` does not support."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


def test_functions_of_the_old_style_work_outside_of_transforms() -> None:
    x = X0.clone().requires_grad_()
    H = Hessian(lambda x: OldCube.apply(x).sum() + 9 * x.square().sum(), x)
    (got,) = torch.autograd.grad(ns.solve(H, B, rtol=1e-13).sum(), x)
    assert apart(got, -6 * B / (6 * X0 + 18) ** 2) < 1e-10


def test_a_product_that_nothing_asks_a_derivative_of_keeps_no_graph() -> None:
    def f(x: Tensor) -> Tensor:
        return (W @ x).sin()

    X = W.clone()
    operators = [
        Jacobian(f, X0),
        Jacobian(f, X0).H,
        Hessian(quartic, X0),
        GaussNewton(f, quartic_loss, X0),
        Fisher(f, X0),
        KernelMatrix(gaussian(1.0), X),
    ]
    for A in operators:
        assert not A(draw(A.domain.example.numel())).requires_grad, A
    leaf = X0.clone().requires_grad_()
    for A in (Jacobian(f, leaf), Hessian(quartic, leaf), GaussNewton(f, quartic_loss, leaf), Fisher(f, leaf)):
        assert A(B).requires_grad, A
    assert Hessian(quartic, X0)(B.clone().requires_grad_()).requires_grad


def test_vectors_of_a_batch_are_solved_at_once() -> None:
    module, inputs = network(2, 3, 2), draw(5, 2, seed=9)
    A = Fisher.of_module(module, inputs, damping=0.2)
    b = {name: draw(2, 3, *p.shape, seed=i) for i, (name, p) in enumerate(module.named_parameters())}
    x = ns.solve(A, b, batch_dims=2, rtol=1e-12)
    vectors = torch.cat([leaf.reshape(6, -1) for leaf in b.values()], dim=1)
    expected = vectors @ torch.linalg.inv(A.to_dense())
    assert apart(torch.cat([leaf.reshape(6, -1) for leaf in x.values()], dim=1), expected) < 1e-10


# -- kernel matrices -----------------------------------------------------------------------------------------------------


def saved_bytes(make: Callable[[], Tensor]) -> int:
    """The bytes that autograd keeps for the derivative, each memory counted once."""
    memory: dict[int, int] = {}
    kept = []

    def pack(t: Tensor) -> Tensor:
        memory[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        make()
    return sum(memory.values())


class Peak(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


def points_and_kernel(n: int) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    X, scale = draw(n, 1).requires_grad_(), torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    return X, scale, lambda a, b: torch.exp(-((a - b.mT) ** 2) / scale)


def test_what_is_kept_for_the_derivative_grows_like_n_and_not_like_its_square() -> None:
    def kept(n: int, **options: Any) -> int:
        X, _, kernel = points_and_kernel(n)
        v = draw(n, seed=1)
        return saved_bytes(lambda: KernelMatrix(kernel, X, noise=0.1, block_size=8, **options)(v))

    assert kept(400) < 8 * 400 * 20  # a few vectors
    assert kept(400) / kept(100) < 4.5
    assert kept(400, checkpoint=False) > 8 * 400**2  # what it would be


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("transform", [False, True], ids=["autograd", "torch.func"])
def test_the_peak_of_a_solve_and_its_derivatives_grows_like_n_and_not_like_its_square(transform: bool, order: int) -> None:
    def peak(n: int, **options: Any) -> int:
        X, _, kernel = points_and_kernel(n)
        b = draw(n, seed=1)

        def loss(X: Tensor) -> Tensor:
            A = KernelMatrix(kernel, X, noise=100.0, block_size=4, positive_definite=True, **options)
            return ns.solve(A, b, rtol=1e-6).square().sum()

        with Peak() as peak:
            if transform:
                first = torch.func.grad(loss)
                (first if order == 1 else torch.func.grad(lambda X: first(X).square().sum()))(X.detach())
            else:
                (gradient,) = torch.autograd.grad(loss(X), X, create_graph=order == 2)
                if order == 2:
                    torch.autograd.grad(gradient.square().sum(), X)
        return peak.most

    assert peak(64) / peak(32) < 2.3
    assert peak(64, checkpoint=False) / peak(32, checkpoint=False) > 3


def test_a_covariance_that_is_a_module_learns() -> None:
    class Covariance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(-0.3, dtype=torch.float64))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return gaussian(self.log_scale.exp())(a, b)

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.covariance = Covariance()

        def forward(self, X: Tensor) -> Tensor:
            A = KernelMatrix(self.covariance, X, noise=0.3, block_size=2, positive_semidefinite=True)
            return ns.solve(A, draw(7, seed=1), rtol=1e-13).square().sum()

    model, X = Regression(), draw(7, 2)
    parameter = model.covariance.log_scale

    def dense(log_scale: Tensor) -> Tensor:
        M = gaussian(log_scale.exp())(X, X) + 0.3 * torch.eye(7, dtype=torch.float64)
        return (torch.linalg.inv(M) @ draw(7, seed=1)).square().sum()

    for value in (-0.3, 0.2):
        expected = torch.func.grad(dense)(torch.tensor(value, dtype=torch.float64))
        # the parameter of the module stays at -0.3, and the backward pass has to evaluate the blocks with the other one
        other = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        loss = torch.func.functional_call(model, {"covariance.log_scale": other}, (X,))
        assert apart(torch.autograd.grad(loss, other)[0], expected) < 1e-10
    (got,) = torch.autograd.grad(model(X), parameter)
    assert apart(got, torch.func.grad(dense)(parameter.detach())) < 1e-10


def test_a_length_scale_that_is_changed_in_place_before_the_derivative_raises() -> None:
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    y = KernelMatrix(gaussian(scale), W, block_size=2)(draw(5))
    with torch.no_grad():
        scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_tensor_of_the_shape_of_the_points_is_not_taken_for_them() -> None:
    """It enters before the points of the columns do, unless these enter first whether or not a derivative is wanted."""
    X, Y, Z, b = draw(4, 1), draw(5, 1, seed=1), draw(5, 1, seed=2).requires_grad_(), draw(5, seed=3)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-Z.square().mean() * (a - b.mT) ** 2)

    loss = ns.solve(KernelMatrix(kernel, X, Y, block_size=2).gram(1.0), b, rtol=1e-13).square().sum()
    M = kernel(X, Y)
    expected = (torch.linalg.inv(M.mT @ M + torch.eye(5, dtype=M.dtype)) @ b).square().sum()
    assert apart(torch.autograd.grad(loss, Z), torch.autograd.grad(expected, Z)) < 1e-10


@pytest.mark.parametrize("block_size", [1, 3, 7, 100])
def test_the_size_of_a_block_changes_nothing(block_size: int) -> None:
    X, Y, v = draw(7, 2), draw(5, 2, seed=1), draw(3, 5, seed=2)
    K = KernelMatrix(gaussian(0.8), X, Y, block_size=block_size)
    assert apart(K(v), v @ gaussian(0.8)(X, Y).mT) < 1e-14
    assert apart(K.H(K(v)), v @ gaussian(0.8)(X, Y).mT @ gaussian(0.8)(X, Y)) < 1e-14


def test_no_block_is_larger_than_asked_for() -> None:
    seen = []

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        seen.append((len(a), len(b)))
        return gaussian(0.8)(a, b)

    K = KernelMatrix(kernel, draw(50, 2), block_size=8, noise=0.1)
    K(draw(50))
    assert max(p for p, _ in seen) == 8
    seen.clear()
    assert apart(K.diagonal(), torch.full((50,), 1.1, dtype=torch.float64)) < 1e-15
    assert max(p * q for p, q in seen) <= 8 * 50


# -- the front door --------------------------------------------------------------------------------------------------------


def identity(x: Any) -> Any:
    return x


INTEGERS = torch.arange(3)

ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Jacobian(3, X0), TypeError, "f: expected a callable, got int"),
    (lambda: Jacobian(identity, 3.0), TypeError, "x: expected a tensor or a pytree of tensors, got float"),
    (lambda: Jacobian(identity, INTEGERS), ValueError, "x: expected a floating-point or complex dtype, got torch.int64"),
    (lambda: Jacobian(lambda x: None, X0), TypeError, r"f\(x\): expected a tensor or a pytree of tensors, got NoneType"),
    (lambda: Jacobian(lambda x: x.argsort(), X0), ValueError, r"f\(x\): expected a floating-point or complex dtype"),
    (lambda: Jacobian(torch.detach, X0), ValueError, r"f: f\(x\) does not depend differentiably on x"),
    (lambda: Jacobian(identity, X0, positive=True), TypeError, "unknown claim 'positive'"),
    (lambda: Hessian(identity, X0), ValueError, r"f\(x\): expected a real 0-d tensor, got torch.float64 of shape \(4,\)"),
    (lambda: Hessian(torch.sum, X0 + 0j), ValueError, "x: expected real tensors, got dtype torch.complex128"),
    (lambda: Hessian(torch.sum, X0, damping="1"), TypeError, "damping: expected a number or a 0-d tensor, got str"),
    (lambda: Hessian(torch.sum, X0, damping=1j), TypeError, "damping: expected a real number or 0-d tensor"),
    (lambda: Hessian(torch.sum, X0, damping=X0), TypeError, "damping: expected a number or a 0-d tensor, got Tensor"),
    (lambda: GaussNewton(identity, 3, X0), TypeError, "loss: expected a callable, got int"),
    (lambda: GaussNewton(identity, identity, X0), ValueError, r"loss\(f\(x\)\): expected a real 0-d tensor"),
    (lambda: GaussNewton(lambda x: x + 0j, torch.sum, X0), ValueError, r"f\(x\): expected real tensors"),
    (lambda: Fisher(identity, X0, likelihood="gausian"), ValueError, "likelihood: .*gausian"),
    (lambda: Fisher(torch.sum, X0), ValueError, r"f\(x\): expected logits of shape \(..., classes\), got shape \(\)"),
    (lambda: Fisher(lambda x: (x, x), X0), TypeError, r"f\(x\): expected one tensor of outputs, got tuple"),
    (
        lambda: Fisher(identity, X0, likelihood="gaussian", sigma=0),
        ValueError,
        "sigma: expected a standard deviation that is not",
    ),
    (lambda: Fisher(identity, X0, sigma=1j), TypeError, "sigma: expected a real number"),
    (lambda: Jacobian.of_module(identity, X0), TypeError, "module: expected an nn.Module, got function"),
    (lambda: Jacobian.of_module(nn.Linear(2, 2), X0, params=[X0]), TypeError, "params: expected a dict of tensors"),
    (
        lambda: Jacobian.of_module(nn.Linear(2, 2), X0, params={"wait": X0}),
        ValueError,
        "params: Linear has no parameter 'wait'",
    ),
    (lambda: Hessian.of_module(nn.Linear(2, 2), X0, 3), TypeError, "loss: expected a callable, got int"),
    (lambda: KernelMatrix(3, W), TypeError, "kernel: expected a callable, got int"),
    (lambda: KernelMatrix(gaussian(1), [1.0]), TypeError, "X: expected a Tensor of points, got list"),
    (lambda: KernelMatrix(gaussian(1), X0), ValueError, r"X: expected points of shape \(n, d\), got shape \(4,\)"),
    (lambda: KernelMatrix(gaussian(1), INTEGERS[:, None]), ValueError, "X: expected a floating-point or complex dtype"),
    (lambda: KernelMatrix(gaussian(1), W, W[:, :2]), ValueError, r"Y: expected points of shape \(m, 4\) like X, got \(5, 2\)"),
    (lambda: KernelMatrix(gaussian(1), W, W, noise=1.0), ValueError, "noise: there is none between two sets of points"),
    (lambda: KernelMatrix(gaussian(1), W, noise="1"), TypeError, "noise: expected a real number or a real tensor, got str"),
    (lambda: KernelMatrix(gaussian(1), W, noise=X0), ValueError, r"noise: expected shape \(\) or \(5,\), one variance a point"),
    (lambda: KernelMatrix(gaussian(1), W, block_size=0), ValueError, "block_size: expected"),
    (lambda: KernelMatrix(gaussian(1), W, checkpoint=1), TypeError, "checkpoint: expected a bool, got int"),
    (lambda: KernelMatrix(lambda a, b: a @ a.mT, W), ValueError, r"kernel: expected values of shape \(2, 3\) for points of"),
    (lambda: KernelMatrix(lambda a, b: a @ b.mT > 0, W), ValueError, "kernel: expected values of a floating-point or complex"),
    (lambda: KernelMatrix(lambda a, b: 1.0, W), TypeError, "kernel: expected values in a Tensor, got float"),
]


@pytest.mark.parametrize("i", range(len(ERRORS)))
def test_a_wrong_argument_is_named(i: int) -> None:
    make, error, message = ERRORS[i]
    with pytest.raises(error, match=message):
        make()


def test_labels_name_the_options() -> None:
    def rbf(a: Tensor, b: Tensor) -> Tensor:
        return gaussian(1.0)(a, b)

    labels = {
        "Jacobian: (..., 4) float64 -> (..., 5) float64": Jacobian(lambda x: W @ x, X0),
        "Hessian(damping=0.5): (..., 4) float64 [hermitian]": Hessian(quartic, X0, damping=0.5),
        "GaussNewton(damping=tensor): (..., 4) float64 [hermitian]": GaussNewton(
            identity, quartic_loss, X0, damping=torch.tensor(1.0)
        ),
        "Fisher(gaussian): (..., 4) float64 [positive_semidefinite]": Fisher(identity, X0, likelihood="gaussian"),
        "KernelMatrix(rbf): (..., 5) float64 [hermitian]": KernelMatrix(rbf, W),
    }
    for label, A in labels.items():
        assert repr(A) == label


def test_a_tensor_that_only_the_loss_reads_has_its_gradient() -> None:
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x, v = draw(3), draw(3, seed=1)
    G = GaussNewton(lambda x: x**2, lambda y: w * (y**2).sum(), x, damping=1.0)
    (g,) = torch.autograd.grad((G @ v).sum(), w)
    assert torch.allclose(g, (8 * x**2 * v).sum())
