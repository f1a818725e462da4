"""The four steps of ∇-Prox's tutorial on its own numbers, and the same gradients through `solve`.

For `K(θ) x = b` and a loss `L(x)` (Lai et al., "∇-Prox", SIGGRAPH 2023), the gradients can be found (a) by autograd through a
direct solve; (b) for `b`, as the solution `λ` of `K^T λ = ∂L/∂x`; (c) for `θ`, by contracting `-λ` with the explicit Jacobian
of `θ ↦ K(θ) x̂`; and (d) for `θ`, by one backward pass through that map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import nablasolve as ns

SEEDS = range(20)
# What the tutorial prints for `b.grad`, in float32 and to four decimals.
PRINTED_B_GRAD = (0.1406, -0.0938, 0.2671, -0.1739, -0.1323)


class Tutorial(NamedTuple):
    """The tutorial's system: `theta` and `b` are leaves that require grad, and `operator(theta)` is the matrix `K`."""

    theta: Tensor
    b: Tensor
    x: Tensor

    @classmethod
    def of(cls, n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tutorial:
        """The tutorial's draw in float32, widened afterwards, so that every dtype has the same numbers."""
        generator = torch.Generator().manual_seed(seed)
        theta = torch.randn(n, n, generator=generator).to(dtype).requires_grad_()
        x = torch.randn(n, generator=generator).to(dtype)
        b = (operator(theta) @ x).detach().requires_grad_()
        return cls(theta, b, x)


def operator(theta: Tensor) -> Tensor:
    return 2 * theta


def autograd_through_a_direct_solve(case: Tutorial) -> tuple[Tensor, Tensor]:
    """Step (a): the gradients for `b` and `theta`."""
    loss = torch.linalg.solve(operator(case.theta), case.b).mean()
    return torch.autograd.grad(loss, (case.b, case.theta))


def cotangent(case: Tutorial) -> Tensor:
    """`∂L/∂x` of the mean."""
    return torch.full_like(case.x, 1 / case.x.numel())


def one_transposed_solve(case: Tutorial) -> Tensor:
    """Step (b): `∂L/∂b = K^{-T} ∂L/∂x`."""
    return torch.linalg.solve(operator(case.theta.detach()).T, cotangent(case))


def explicit_jacobian(case: Tutorial) -> Tensor:
    """`∂K/∂θ`, of shape `(n, n, n, n)`."""
    return torch.autograd.functional.jacobian(operator, case.theta.detach(), vectorize=True)


def through_the_explicit_jacobian(case: Tutorial) -> Tensor:
    """Step (c): `∂L/∂θ = -λ^T (∂K/∂θ) x̂`."""
    solution = torch.linalg.solve(operator(case.theta.detach()), case.b.detach())
    return -torch.einsum("i,ijkl,j->kl", one_transposed_solve(case), explicit_jacobian(case), solution)


def matrix_free(case: Tutorial) -> Tensor:
    """Step (d): one backward pass through `θ ↦ K(θ) x̂`."""
    solution = torch.linalg.solve(operator(case.theta.detach()), case.b.detach())
    (gradient,) = torch.autograd.grad(operator(case.theta) @ solution, case.theta, -one_transposed_solve(case))
    return gradient


# -- the same through `solve`. The eigenvalues of a random matrix lie all around zero, the worst case for a Krylov method,
# so that each method is given the form of `K x = b` that suits it. --------------------------------------------------------


def as_matrix(case: Tutorial) -> Tensor:
    return ns.solve(operator(case.theta), case.b)


def with_gmres(case: Tutorial) -> Tensor:
    K = operator(case.theta)
    return ns.solve(lambda v: K @ v, case.b, method=ns.GMRES(restart=case.b.numel()), rtol=1e-13)


def with_bicgstab(case: Tutorial) -> Tensor:
    K = operator(case.theta)
    n = case.b.numel()
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=K.dtype)
    M = torch.linalg.inv(K.detach()) @ (torch.eye(n, dtype=K.dtype) + 0.2 / n**0.5 * noise)
    return ns.solve(lambda v: K @ v, case.b, method="bicgstab", M=M, rtol=1e-12)


def with_cg(case: Tutorial) -> Tensor:
    """`K K^T y = b` and `x = K^T y`: its residual is that of `K x = b`."""
    K = operator(case.theta)
    return K.T @ ns.solve(lambda y: K @ (K.T @ y), case.b, method="cg", rtol=1e-12, adjoint=dict(rtol=1e-10))


def with_minres(case: Tutorial) -> Tensor:
    """`[[0, K], [K^T, 0]] (u, x) = (b, 0)`: symmetric, indefinite, and no worse conditioned than `K`."""
    K = operator(case.theta)
    rhs = (case.b, torch.zeros_like(case.b))
    _, x = ns.solve(lambda z: (K @ z[1], K.T @ z[0]), rhs, method="minres", rtol=1e-12)
    return x


SOLVES: dict[str, Callable[[Tutorial], Tensor]] = {
    "direct": as_matrix,
    "gmres": with_gmres,
    "bicgstab": with_bicgstab,
    "cg": with_cg,
    "minres": with_minres,
}

CASES = [pytest.param(5, 0, id="tutorial"), *(pytest.param(32, seed, id=f"32x32-seed{seed}") for seed in SEEDS)]


def test_the_printed_gradient_of_b_is_reproduced():
    case = Tutorial.of(5, seed=0, dtype=torch.float32)
    b_grad, _ = autograd_through_a_direct_solve(case)
    printed = torch.tensor(PRINTED_B_GRAD)
    torch.testing.assert_close(b_grad, printed, atol=5e-5, rtol=0)
    torch.testing.assert_close(one_transposed_solve(case), printed, atol=5e-5, rtol=0)
    as_matrix(case).mean().backward()
    torch.testing.assert_close(case.b.grad, printed, atol=5e-5, rtol=0)


def test_a_local_generator_draws_the_tutorials_numbers():
    torch.manual_seed(0)
    theta, x = torch.randn(5, 5), torch.randn(5)
    case = Tutorial.of(5, seed=0, dtype=torch.float32)
    assert torch.equal(case.theta, theta)
    assert torch.equal(case.x, x)


def test_the_explicit_jacobian_has_four_dimensions_and_is_twice_the_identity():
    jacobian = explicit_jacobian(Tutorial.of(5, seed=0))
    assert jacobian.shape == (5, 5, 5, 5)
    assert torch.equal(jacobian.reshape(25, 25), 2 * torch.eye(25, dtype=torch.float64))


@pytest.mark.parametrize(("n", "seed"), CASES)
def test_the_four_steps_agree(n: int, seed: int):
    case = Tutorial.of(n, seed)
    b_grad, theta_grad = autograd_through_a_direct_solve(case)
    torch.testing.assert_close(one_transposed_solve(case), b_grad, atol=0, rtol=1e-10)
    torch.testing.assert_close(through_the_explicit_jacobian(case), theta_grad, atol=0, rtol=1e-9)
    torch.testing.assert_close(matrix_free(case), theta_grad, atol=0, rtol=1e-9)


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize(("n", "seed"), CASES)
def test_solve_agrees_with_the_four_steps(n: int, seed: int, name: str):
    case = Tutorial.of(n, seed)
    x = SOLVES[name](case)
    assert relative_error(x, case.x) < 1e-9
    gradients = torch.autograd.grad(x.mean(), (case.b, case.theta))
    for gradient, expected in zip(gradients, autograd_through_a_direct_solve(case), strict=True):
        assert relative_error(gradient, expected) < 1e-8
    assert relative_error(gradients[0], one_transposed_solve(case)) < 1e-8
    assert relative_error(gradients[1], matrix_free(case)) < 1e-8


def test_solve_in_single_precision_agrees_with_the_tutorial():
    case = Tutorial.of(5, seed=0, dtype=torch.float32)
    expected = autograd_through_a_direct_solve(case)
    for solution in (as_matrix(case), ns.solve(lambda v: operator(case.theta) @ v, case.b, rtol=1e-6)):
        for gradient, reference in zip(torch.autograd.grad(solution.mean(), (case.b, case.theta)), expected, strict=True):
            assert relative_error(gradient, reference) < 1e-4


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return (torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)).item()
