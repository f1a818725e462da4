"""`grad="unroll"` differentiates the iteration that was run, and `grad="none"` nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nablasolve as ns

N = 8
TOLERANCE = dict(atol=1e-10, rtol=1e-8)
Operator = Callable[[Tensor], Tensor]
Loop = Callable[[Operator, Tensor, int], Tensor]


# -- textbook loops, in plain differentiable torch; `k` steps from zero --------------------------------------------------


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.conj() * y).sum()


def textbook_cg(A: Operator, b: Tensor, k: int) -> Tensor:
    """Saad 2003, Algorithm 6.18."""
    x, r, p = torch.zeros_like(b), b, b
    for _ in range(k):
        q = A(p)
        alpha = dot(r, r) / dot(p, q)
        x, r_new = x + alpha * p, r - alpha * q
        p, r = r_new + dot(r_new, r_new) / dot(r, r) * p, r_new
    return x


def textbook_minres(A: Operator, b: Tensor, k: int) -> Tensor:
    """Lanczos vectors, and the small tridiagonal least-squares problem (Saad 2003, Algorithm 6.15 and section 6.5.3)."""
    beta = [dot(b, b).real.sqrt()]
    V, alpha, before = [b / beta[0]], [], torch.zeros_like(b)
    for j in range(k):
        w = A(V[j]) - (beta[j] * before if j else 0)
        alpha.append(dot(V[j], w).real)
        w = w - alpha[j] * V[j]
        beta.append(dot(w, w).real.sqrt())
        before = V[j]
        V.append(w / beta[j + 1])
    zero = torch.zeros_like(beta[0])
    entries = {(j, j): alpha[j] for j in range(k)}
    entries |= {(j + 1, j): beta[j + 1] for j in range(k)} | {(j, j + 1): beta[j + 1] for j in range(k - 1)}
    T = torch.stack([torch.stack([entries.get((i, j), zero) for j in range(k)]) for i in range(k + 1)])
    return combine(V[:k], least_squares(T.to(b.dtype), beta[0].to(b.dtype)))


def textbook_gmres(A: Operator, b: Tensor, k: int) -> Tensor:
    """Arnoldi with modified Gram-Schmidt and the small Hessenberg problem (Saad 2003, Algorithm 6.9)."""
    beta = dot(b, b).real.sqrt()
    V, columns = [b / beta], []
    for j in range(k):
        w, column = A(V[j]), []
        for v in V:
            column.append(dot(v, w))
            w = w - column[-1] * v
        column.append(dot(w, w).real.sqrt().to(b.dtype))
        V.append(w / column[-1])
        zeros = [torch.zeros_like(column[-1])] * (k - 1 - j)
        columns.append(torch.stack(column + zeros))
    return combine(V[:k], least_squares(torch.stack(columns, dim=1), beta.to(b.dtype)))


def least_squares(H: Tensor, beta: Tensor) -> Tensor:
    """`argmin |beta e_1 - H y|`, by the normal equations: the problems here are small and well conditioned."""
    return torch.linalg.inv(H.mH @ H) @ (H.mH[:, 0] * beta)


def combine(V: list[Tensor], y: Tensor) -> Tensor:
    return sum(v * c for v, c in zip(V, y.unbind(), strict=True))


def textbook_bicgstab(A: Operator, b: Tensor, k: int) -> Tensor:
    """Saad 2003, Algorithm 7.7."""
    x, r, p, shadow = torch.zeros_like(b), b, b, b
    for _ in range(k):
        v = A(p)
        alpha = dot(shadow, r) / dot(shadow, v)
        s = r - alpha * v
        t = A(s)
        omega = dot(t, s) / dot(t, t)
        x = x + alpha * p + omega * s
        r_new = s - omega * t
        beta = dot(shadow, r_new) / dot(shadow, r) * alpha / omega
        p, r = r_new + beta * (p - omega * v), r_new
    return x


LOOPS: dict[str, Loop] = {
    "cg": textbook_cg,
    "minres": textbook_minres,
    "gmres": textbook_gmres,
    "bicgstab": textbook_bicgstab,
}


def matrix_of(method: str, W: Tensor) -> Tensor:
    """A matrix that suits the method and that is a smooth function of `W`."""
    identity = torch.eye(W.shape[-1], dtype=W.dtype)
    if method == "cg":
        return W @ W.mH + identity
    if method == "minres":  # Hermitian and indefinite
        signs = torch.tensor([1.0, -1.0], dtype=W.dtype).repeat(W.shape[-1])[: W.shape[-1]]
        return (W + W.mH) / 2 + 3 * torch.diag(signs)
    return W + 3 * identity


def numbers(dtype: torch.dtype = torch.float64, batch: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`W`, `b` and the weights of the loss."""
    generator = torch.Generator().manual_seed(7)
    shape = (batch,) if batch else ()
    return tuple(torch.randn(*shape, *s, dtype=dtype, generator=generator) for s in ((N, N), (N,), (N,)))


def unrolled(method: str, W: Tensor, b: Tensor, k: int, **options: Any) -> Tensor:
    A = matrix_of(method, W)
    return ns.solve(lambda v: A @ v, b, method=method, maxiter=k, grad="unroll", on_failure="ignore", **options)


def textbook(method: str, W: Tensor, b: Tensor, k: int) -> Tensor:
    A = matrix_of(method, W)
    return LOOPS[method](lambda v: A @ v, b, k)


def loss_of(x: Tensor, weights: Tensor) -> Tensor:
    """Real and not linear, so that second derivatives do not vanish."""
    return (weights.conj() * x).sum().real + (x.abs() ** 2).sum() ** 2 / 10


# -- what the unrolled gradient is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grad", "expected"),
    [("implicit", (-1.0, 2.0, -0.375)), ("unroll", (-0.4, 1.4, -0.375))],
)
def test_the_unrolled_gradient_is_not_that_of_the_solution_when_cg_ends_early(grad: str, expected: tuple[float, ...]):
    diagonal = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    b, weights = torch.tensor([[1.0, 2.0, 3.0], [1.0, -1.0, 0.5]], dtype=torch.float64)
    x, info = ns.solve_ex(lambda v: diagonal * v, b, method="cg", grad=grad)
    assert info.iterations == 2
    torch.testing.assert_close(x.detach(), b / diagonal.detach())
    (x @ weights).backward()
    torch.testing.assert_close(diagonal.grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("method", LOOPS)
def test_unrolling_k_steps_is_the_autograd_of_the_textbook_loop(method: str, k: int, dtype: torch.dtype):
    W, b, weights = numbers(dtype)
    W.requires_grad_(), b.requires_grad_()
    x, expected = unrolled(method, W, b, k), textbook(method, W, b, k)
    torch.testing.assert_close(x, expected, **TOLERANCE)
    gradients = torch.autograd.grad(loss_of(x, weights), (W, b))
    references = torch.autograd.grad(loss_of(expected, weights), (W, b))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, **TOLERANCE)


@pytest.mark.parametrize("method", LOOPS)
def test_unrolling_to_the_end_approaches_the_gradient_of_the_solution(method: str):
    W, b, weights = numbers()
    W.requires_grad_(), b.requires_grad_()
    A = matrix_of(method, W)
    x = ns.solve(lambda v: A @ v, b, method=method, grad="unroll", rtol=1e-12)
    gradients = torch.autograd.grad(loss_of(x, weights), (W, b))
    references = torch.autograd.grad(loss_of(torch.linalg.inv(matrix_of(method, W)) @ b, weights), (W, b))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-7, rtol=1e-7)


def test_unrolling_restarted_gmres_differentiates_every_cycle():
    W, b, weights = numbers()
    W.requires_grad_(), b.requires_grad_()
    A = matrix_of("gmres", W)

    def apply(v: Tensor) -> Tensor:
        return A @ v

    x = ns.solve(apply, b, method=ns.GMRES(restart=2), maxiter=4, grad="unroll", on_failure="ignore")
    first = textbook_gmres(apply, b, 2)
    expected = first + textbook_gmres(apply, b - A @ first, 2)
    torch.testing.assert_close(x, expected, **TOLERANCE)
    gradients = torch.autograd.grad(loss_of(x, weights), (W, b))
    references = torch.autograd.grad(loss_of(expected, weights), (W, b))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, **TOLERANCE)


def test_unrolling_a_direct_solve_gives_the_gradient_of_the_solution():
    W, b, weights = numbers()
    W.requires_grad_(), b.requires_grad_()
    x = ns.solve(matrix_of("gmres", W), b, grad="unroll")
    gradients = torch.autograd.grad(loss_of(x, weights), (W, b))
    references = torch.autograd.grad(loss_of(torch.linalg.inv(matrix_of("gmres", W)) @ b, weights), (W, b))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, **TOLERANCE)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scaling_b_scales_the_unrolled_gradient(scale: float):
    W, b, weights = numbers()
    W.requires_grad_()
    (small,) = torch.autograd.grad(weights @ unrolled("cg", W, b * scale, 3), W)
    (plain,) = torch.autograd.grad(weights @ unrolled("cg", W, b, 3), W)
    torch.testing.assert_close(small / scale, plain, **TOLERANCE)


# -- unrolling under transforms, in batches, with trees ------------------------------------------------------------------


@pytest.mark.parametrize("method", LOOPS)
def test_torch_func_grad_and_jvp_follow_the_loop(method: str):
    W, b, weights = numbers()
    dW, db, _ = (torch.randn_like(t, generator=torch.Generator().manual_seed(3)) for t in (W, b, b))

    def ours(W: Tensor, b: Tensor) -> Tensor:
        return loss_of(unrolled(method, W, b, 3), weights)

    def reference(W: Tensor, b: Tensor) -> Tensor:
        return loss_of(textbook(method, W, b, 3), weights)

    for argnums in (0, 1):
        actual, expected = torch.func.grad(ours, argnums)(W, b), torch.func.grad(reference, argnums)(W, b)
        torch.testing.assert_close(actual, expected, **TOLERANCE)
    _, actual = torch.func.jvp(ours, (W, b), (dW, db))
    _, expected = torch.func.jvp(reference, (W, b), (dW, db))
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    with torch.autograd.forward_ad.dual_level():
        value = ours(torch.autograd.forward_ad.make_dual(W, dW), torch.autograd.forward_ad.make_dual(b, db))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(value).tangent, expected, **TOLERANCE)


@pytest.mark.parametrize("method", LOOPS)
def test_second_derivatives_follow_the_loop(method: str):
    W, b, weights = numbers()
    actual = torch.func.hessian(lambda b: loss_of(unrolled(method, W, b, 3), weights))(b)
    expected = torch.func.hessian(lambda b: loss_of(textbook(method, W, b, 3), weights))(b)
    torch.testing.assert_close(actual, expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("method", LOOPS)
def test_vmap_unrolls_each_system_by_itself(method: str):
    W, b, weights = numbers(batch=3)

    def gradients(solution: Callable[..., Tensor]) -> Callable[..., Any]:
        return torch.func.grad(lambda W, b, w: loss_of(solution(method, W, b, 3), w), argnums=(0, 1))

    together = torch.vmap(gradients(unrolled))(W, b, weights)
    alone = [gradients(textbook)(*case) for case in zip(W, b, weights, strict=True)]
    for actual, expected in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(expected), **TOLERANCE)


@pytest.mark.parametrize("method", LOOPS)
def test_a_batch_is_unrolled_system_by_system(method: str):
    W, b, weights = numbers(batch=3)
    W.requires_grad_(), b.requires_grad_()
    A = torch.stack([matrix_of(method, w) for w in W])
    x = ns.solve(
        lambda v: torch.einsum("bij,bj->bi", A, v),
        b,
        method=method,
        maxiter=3,
        batch_dims=1,
        grad="unroll",
        on_failure="ignore",
    )
    expected = torch.stack([textbook(method, *case, 3) for case in zip(W, b, strict=True)])
    torch.testing.assert_close(x, expected, **TOLERANCE)
    gradients = torch.autograd.grad(sum(map(loss_of, x, weights)), (W, b))
    references = torch.autograd.grad(sum(map(loss_of, expected, weights)), (W, b))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, **TOLERANCE)


def test_a_system_that_has_stopped_adds_nothing_finite_or_not_to_the_gradient():
    """One system ends after a step, one starts at its solution, and the third runs on: no gradient becomes NaN."""
    d = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [1.0, 2.0, 4.0]], dtype=torch.float64, requires_grad=True)
    x, info = ns.solve_ex(lambda v: d * v, b, method="cg", batch_dims=1, grad="unroll")
    assert info.iterations.tolist() == [1, 0, 3]
    d_grad, b_grad = torch.autograd.grad(x.sum(), (d, b))
    # one step of CG on the identity: x = b (b^T b) / (b^T d b), and d/dd = -x_i^2 sum(x) / |x|^2
    expected = -(b[0] ** 2) * b[0].sum() / b[0].square().sum()
    torch.testing.assert_close(d_grad[0], expected.detach(), **TOLERANCE)
    torch.testing.assert_close(d_grad[1:], torch.stack([torch.zeros(3), -b[2] / d[2] ** 2]).double().detach(), **TOLERANCE)
    torch.testing.assert_close(b_grad[2], 1 / d[2].detach(), **TOLERANCE)


@pytest.mark.parametrize("method", LOOPS)
def test_a_tree_is_unrolled_as_the_vector_it_holds(method: str):
    W, b, weights = numbers()
    W.requires_grad_(), b.requires_grad_()
    A = matrix_of(method, W)

    def apply(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        return split(A @ join(tree))

    x = ns.solve(apply, split(b), method=method, maxiter=3, grad="unroll", on_failure="ignore")
    assert x["image"].shape == (2, 3)
    expected = textbook(method, W, b, 3)
    gradients = torch.autograd.grad(loss_of(join(x), weights), (W, b))
    references = torch.autograd.grad(loss_of(expected, weights), (W, b))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, **TOLERANCE)


def split(v: Tensor) -> dict[str, Tensor]:
    return {"image": v[:6].reshape(2, 3), "rest": v[6:]}


def join(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([tree["image"].reshape(-1), tree["rest"]])


# -- unrolling to the initial guess and to the preconditioner, which the implicit gradient ignores -------------------------


def preconditioned_cg(A: Operator, b: Tensor, k: int, x0: Tensor, M: Operator) -> Tensor:
    """Saad 2003, Algorithm 9.1."""
    x, r = x0, b - A(x0)
    p = z = M(r)
    for _ in range(k):
        q = A(p)
        alpha = dot(r, z) / dot(p, q)
        x, r_new = x + alpha * p, r - alpha * q
        z_new = M(r_new)
        p, r, z = z_new + dot(r_new, z_new) / dot(r, z) * p, r_new, z_new
    return x


def learned(grad: str, k: int | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a preconditioned CG as a function of its initial guess and its diagonal preconditioner."""
    W, b, weights = numbers()
    A = matrix_of("cg", W)

    def loss(x0: Tensor, log_m: Tensor) -> Tensor:
        options = dict(method="cg", x0=x0, M=lambda r: log_m.exp() * r, grad=grad, maxiter=k, on_failure="ignore")
        return loss_of(ns.solve(lambda v: A @ v, b, **options), weights)

    return loss


def textbook_learned(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    W, b, weights = numbers()
    A = matrix_of("cg", W)
    return lambda x0, log_m: loss_of(preconditioned_cg(lambda v: A @ v, b, k, x0, lambda r: log_m.exp() * r), weights)


def start() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return tuple(torch.randn(2, N, dtype=torch.float64, generator=generator).unbind())


def test_the_unrolled_gradient_reaches_the_initial_guess_and_the_preconditioner():
    x0, log_m = (t.requires_grad_() for t in start())
    gradients = torch.autograd.grad(learned("unroll", 3)(x0, log_m), (x0, log_m), allow_unused=True)
    references = torch.autograd.grad(textbook_learned(3)(x0, log_m), (x0, log_m))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, **TOLERANCE)


def test_the_unrolled_gradient_reaches_them_inside_torch_func():
    gradients = torch.func.grad(learned("unroll", 3), argnums=(0, 1))(*start())
    references = torch.func.grad(textbook_learned(3), argnums=(0, 1))(*start())
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, **TOLERANCE)


def test_the_unrolled_gradient_reaches_a_preconditioner_that_is_a_module():
    W, b, weights = numbers()
    A, (x0, _) = matrix_of("cg", W), start()
    M = nn.Linear(N, N, bias=False, dtype=torch.float64)
    with torch.no_grad():
        M.weight.copy_(torch.diag(torch.linspace(0.5, 2, N, dtype=torch.float64)))
    x = ns.solve(lambda v: A @ v, b, method="cg", x0=x0, M=M, grad="unroll", maxiter=3, on_failure="ignore")
    (gradient,) = torch.autograd.grad(loss_of(x, weights), M.weight)
    expected = preconditioned_cg(lambda v: A @ v, b, 3, x0, M)
    (reference,) = torch.autograd.grad(loss_of(expected, weights), M.weight)
    torch.testing.assert_close(gradient, reference, **TOLERANCE)


def test_the_implicit_gradient_to_the_initial_guess_and_the_preconditioner_is_zero():
    gradients = torch.func.grad(learned("implicit", None), argnums=(0, 1))(*start())
    assert all(torch.equal(gradient, torch.zeros(N, dtype=torch.float64)) for gradient in gradients)


# -- failures while unrolling --------------------------------------------------------------------------------------------


def test_unrolling_raises_on_failure_and_carries_the_iterate():
    W, b, _ = numbers()
    W.requires_grad_()
    A = matrix_of("cg", W)
    with pytest.raises(ns.ConvergenceError, match="MAXITER") as caught:
        ns.solve(lambda v: A @ v, b, method="cg", maxiter=2, grad="unroll")
    assert caught.value.info.status == ns.Status.MAXITER
    assert caught.value.info.iterations == 2
    assert not caught.value.x.requires_grad
    torch.testing.assert_close(caught.value.x, textbook("cg", W, b, 2).detach(), **TOLERANCE)


def test_unrolling_warns_on_failure_and_keeps_the_gradient():
    W, b, weights = numbers()
    W.requires_grad_()
    A = matrix_of("cg", W)
    with pytest.warns(ns.ConvergenceWarning, match="MAXITER"):
        x = ns.solve(lambda v: A @ v, b, method="cg", maxiter=2, grad="unroll", on_failure="warn")
    (gradient,) = torch.autograd.grad(loss_of(x, weights), W)
    (reference,) = torch.autograd.grad(loss_of(textbook("cg", W, b, 2), weights), W)
    torch.testing.assert_close(gradient, reference, **TOLERANCE)


@pytest.mark.filterwarnings("error")
def test_solve_ex_unrolls_without_a_word_and_has_no_adjoint_solve():
    W, b, weights = numbers()
    W.requires_grad_()
    A = matrix_of("cg", W)
    x, info = ns.solve_ex(lambda v: A @ v, b, method="cg", maxiter=2, grad="unroll")
    loss_of(x, weights).backward()
    assert info.status == ns.Status.MAXITER
    assert not info.converged
    assert info.adjoint is None


def test_a_failure_while_unrolling_raises_inside_transforms_as_well():
    W, b, weights = numbers(batch=3)

    def loss(W: Tensor, b: Tensor, w: Tensor) -> Tensor:
        A = matrix_of("cg", W)
        return loss_of(ns.solve(lambda v: A @ v, b, method="cg", maxiter=2, grad="unroll"), w)

    with pytest.raises(ns.ConvergenceError):
        torch.func.grad(loss)(W[0], b[0], weights[0])
    with pytest.raises(ns.ConvergenceError):
        torch.vmap(torch.func.grad(loss))(W, b, weights)


# -- no gradient at all --------------------------------------------------------------------------------------------------


def test_grad_none_detaches_everything():
    W, b, _ = numbers()
    W.requires_grad_(), b.requires_grad_()
    A = matrix_of("cg", W)
    for operator in (lambda v: A @ v, A, ns.LinearOperator(lambda v: A @ v, hermitian=True)):
        x = ns.solve(operator, b, method="cg", grad="none")
        assert not x.requires_grad
        assert x.grad_fn is None
        torch.testing.assert_close(x, torch.linalg.solve(A, b).detach(), atol=1e-7, rtol=1e-7)


def test_grad_none_is_a_constant_inside_transforms():
    W, b, weights = numbers()

    def loss(W: Tensor, b: Tensor) -> Tensor:
        A = matrix_of("cg", W)
        return weights @ ns.solve(lambda v: A @ v, b, method="cg", grad="none") + W.sum() + b.sum()

    for gradient, like in zip(torch.func.grad(loss, argnums=(0, 1))(W, b), (W, b), strict=True):
        torch.testing.assert_close(gradient, torch.ones_like(like))
    _, tangent = torch.func.jvp(loss, (W, b), (W, b))
    torch.testing.assert_close(tangent, W.sum() + b.sum())
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(W, W), torch.autograd.forward_ad.make_dual(b, b))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, W.sum() + b.sum())


def test_grad_none_is_a_constant_for_a_closed_over_dual_tensor():
    _, b, weights = numbers()
    d = torch.linspace(1, 2, N, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(d, d)
        x = ns.solve(lambda v: dual * v, b, method="cg", grad="none")
        tangent = torch.autograd.forward_ad.unpack_dual(weights @ x).tangent
        assert tangent is None or not tangent.any()


def test_grad_none_still_maps_a_closed_over_tensor_under_vmap():
    W, b, _ = numbers(batch=3)
    x = torch.vmap(lambda W: ns.solve(lambda v: matrix_of("cg", W) @ v, b[0], method="cg", grad="none"))(W)
    expected = torch.stack([torch.linalg.solve(matrix_of("cg", w), b[0]) for w in W])
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=1e-6)


def test_grad_none_needs_no_dependency_to_be_found():
    """What would be lost under `grad="implicit"` is not asked for here."""
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    _, b, _ = numbers()
    x = ns.solve(lambda v: Opaque.apply(v, theta), b, method="cg", grad="none")
    torch.testing.assert_close(x, b / 2)


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, theta: Tensor) -> Tensor:
        return v * theta.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def test_a_layer_keeps_the_choice():
    W, b, weights = numbers()
    W.requires_grad_()
    A = matrix_of("cg", W)
    layer = ns.LinearSolve(method="cg", maxiter=3, grad="unroll", on_failure="ignore")
    (gradient,) = torch.autograd.grad(loss_of(layer(lambda v: A @ v, b), weights), W)
    (reference,) = torch.autograd.grad(loss_of(textbook("cg", W, b, 3), weights), W)
    torch.testing.assert_close(gradient, reference, **TOLERANCE)
    assert not layer(lambda v: A @ v, b, grad="none").requires_grad
