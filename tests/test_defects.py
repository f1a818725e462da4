"""One regression test for each defect that was measured in comparable libraries.

The numbers are those of the project's list of defects. A test is named after what must hold and runs for every method
that the defect could strike.

     1  test_b_receives_its_gradient
     2  test_adjoint_of_a_nonsymmetric_operator_is_its_transpose
     3  test_complex_gradient_is_conjugated
     4  test_gradients_are_returned_and_not_written_as_a_side_effect
     5  test_tensor_that_is_closed_over_receives_its_gradient
     6  test_implicit_gradient_is_that_of_the_solution_and_unrolled_that_of_the_iteration
     7  test_second_derivative_matches_the_dense_inverse
     8  test_forward_mode_keeps_the_tangents_of_b_and_of_the_operator
     9  test_operator_changed_in_place_before_backward_raises
    10  test_weight_inside_the_operator_receives_its_gradient
    11  test_gradient_has_the_shape_of_its_parameter_and_its_own_entries
    12  test_scaling_the_loss_scales_the_gradient
    13  test_loss_scaled_by_1e_minus_9_scales_the_gradient
    14  test_tight_tolerance_is_reached
    15  test_scaling_b_scales_x_in_the_same_number_of_iterations
    16  test_tolerance_is_relative_to_b_however_small_b_is
    17  test_atol_is_never_used_for_the_cotangent
    18  test_float32_cotangent_of_1e_minus_13_gives_a_finite_gradient
    19  test_float32_solves_large_and_small_scaled_diagonals
    20  test_bicgstab_solves_every_well_conditioned_float32_system
    21  test_default_tolerance_is_tight
    22  test_one_bad_system_is_not_hidden_by_the_mean
    23  test_norm_of_a_matrix_shaped_vector_is_euclidean
    24  test_zero_right_hand_side_changes_no_other_system
    25  test_inconsistent_least_squares_stops_by_its_own_test
    26  test_converging_at_exactly_maxiter_is_converging
    27  test_converged_means_that_the_true_residual_meets_the_tolerance
    28  test_zero_curvature_is_named_and_leaves_no_nan
    29  test_inconsistent_singular_system_is_a_failure
    30  test_preconditioner_of_the_wrong_sign_is_no_success
    31  test_gmres_stops_inside_a_cycle_and_keeps_its_basis_orthogonal
    32  test_zero_entries_in_b_need_no_absolute_tolerance
    33  test_iterations_are_limited_by_default
    34  test_rank_deficient_matrix_is_a_failure
        and test_rank_deficient_least_squares_has_no_solution_of_size_1e16
    35  test_options_reach_the_differentiable_path
    36  test_exact_guess_takes_no_iteration_at_any_scale
    37  test_guess_is_a_start_and_not_a_shift
    38  test_misspelt_option_is_an_error
    39  test_preconditioner_is_applied_in_both_passes_on_its_side
    40  test_what_the_operator_returns_is_never_written_to
    41  test_global_random_state_is_untouched
    42  test_solution_shares_no_memory_with_its_inputs
    43  test_preconditioned_iterates_are_optimal_from_the_first_step
    44  test_least_squares_gradient_is_right_for_every_shape_and_rank
    45  test_parameter_that_is_wrapped_anew_keeps_its_graph
    46  test_composition_is_solved_as_a_whole
"""

import functools
import itertools
import re
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import nablasolve as ns
from nablasolve import Status

N = 8
KRYLOV = ("cg", "minres", "gmres", "bicgstab")
METHODS = (*KRYLOV, "direct")
TIGHT = 1e-12

each_method = pytest.mark.parametrize("method", METHODS)
each_krylov = pytest.mark.parametrize("method", KRYLOV)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrix(method, W):
    """A well-conditioned matrix of the kind that the method is for, as a smooth function of any square `W`."""
    n = W.shape[-1]
    eye = torch.eye(n, dtype=W.dtype)
    if method == "cg":
        return W @ W.mH / n + eye
    if method == "minres":  # Hermitian and indefinite
        signs = torch.ones(n).to(W.dtype)
        signs[::2] = -1
        return (W + W.mH) / (4 * n**0.5) + 2 * torch.diag(signs)
    return W / n**0.5 + 3 * eye


def operator(method, A):
    """What the method is given: the matrix itself for the direct one, else a closure."""
    return A if method == "direct" else lambda v: (A @ v.unsqueeze(-1)).squeeze(-1)


def solve(method, A, b, **options):
    return ns.solve(operator(method, A), b, method=method, **{"rtol": TIGHT, **options})


def solve_ex(method, A, b, **options):
    return ns.solve_ex(operator(method, A), b, method=method, **{"rtol": TIGHT, **options})


def close(actual, expected, rtol=1e-8):
    """Equal in norm, relative to what is expected, so that a tiny gradient is compared at its own scale."""
    assert actual.shape == expected.shape
    error, size = torch.linalg.vector_norm(actual - expected), torch.linalg.vector_norm(expected)
    assert error <= rtol * size, f"relative error {float(error / size):.1e}"


def far(actual, expected, rtol=0.05):
    """A wrong rule would be seen: the case can tell right from wrong."""
    assert torch.linalg.vector_norm(actual - expected) > rtol * torch.linalg.vector_norm(expected)


# -- gradients ------------------------------------------------------------------------------------------------------


@each_method
def test_b_receives_its_gradient(method):
    """Defect 1: a right-hand side that was detached on the way in."""
    A, weights = matrix(method, draw(N, N)), draw(N, seed=2)
    b = draw(N, seed=1).requires_grad_()
    (solve(method, A, b) @ weights).backward()
    close(b.grad, torch.linalg.inv(A).mH @ weights)


@pytest.mark.parametrize(
    ("method", "preconditioned"),
    (("gmres", False), ("gmres", True), ("bicgstab", False), ("bicgstab", True), ("direct", False)),
)
def test_adjoint_of_a_nonsymmetric_operator_is_its_transpose(method, preconditioned):
    """Defect 2: the adjoint system solved with `A` in the place of `A^H`."""
    W, b, weights = draw(N, N).requires_grad_(), draw(N, seed=1).requires_grad_(), draw(N, seed=2)
    M = torch.diag(1 / matrix(method, W).detach().diagonal()) if preconditioned else None
    x = solve(method, matrix(method, W), b, M=M)
    grads = torch.autograd.grad(x @ weights, (W, b))
    inverse = torch.linalg.inv(matrix(method, W))
    expected = torch.autograd.grad(inverse @ b @ weights, (W, b))
    close(grads[0], expected[0])
    close(grads[1], expected[1])
    far(inverse.detach() @ weights, expected[1])


@each_method
def test_complex_gradient_is_conjugated(method):
    """Defect 3: the transpose, or a cotangent that is not conjugated, where the adjoint is due."""
    W = draw(N, N, dtype=torch.complex128).requires_grad_()
    b, weights = (draw(N, seed=s, dtype=torch.complex128) for s in (1, 2))
    b.requires_grad_()

    def loss(x):
        return (weights.conj() * x).sum().abs() ** 2 + x.imag.sum()

    grads = torch.autograd.grad(loss(solve(method, matrix(method, W), b)), (W, b))
    expected = torch.autograd.grad(loss(torch.linalg.inv(matrix(method, W)) @ b), (W, b))
    for actual, right in zip(grads, expected, strict=True):
        close(actual, right)
        far(right.conj(), right)


@each_method
def test_gradients_are_returned_and_not_written_as_a_side_effect(method):
    """Defect 4: parameters' gradients written to `.grad` by the solver, and non-leaf tensors cut off from theirs."""
    leaf, b, weights = draw(N, N).requires_grad_(), draw(N, seed=1).requires_grad_(), draw(N, seed=2)

    def loss():
        non_leaf = torch.sin(leaf)
        return solve(method, matrix(method, non_leaf), b) @ weights

    returned = torch.autograd.grad(loss(), (leaf, b))
    assert leaf.grad is None
    assert b.grad is None
    loss().backward()
    close(leaf.grad, returned[0], rtol=1e-14)
    close(b.grad, returned[1], rtol=1e-14)
    (expected,) = torch.autograd.grad(torch.linalg.inv(matrix(method, torch.sin(leaf))) @ b @ weights, leaf)
    close(leaf.grad, expected)


class Holder(nn.Module):
    """A tensor held as an attribute, reached through `forward`, a bound method or a function that these call."""

    def __init__(self, method, W):
        super().__init__()
        self.method, self.hidden = method, {"W": [W]}

    def forward(self, v):
        return self.product(v)

    def product(self, v):
        return _product(self.method, self.hidden["W"][0], v)


def _product(method, W, v):
    return matrix(method, W) @ v


HIDING_PLACES = {
    "closure": lambda method, W: lambda v: _product(method, W, v),
    "closed-over matrix": lambda method, W: functools.partial(torch.mv, matrix(method, W)),
    "default argument": lambda method, W: lambda v, W=W: _product(method, W, v),
    "partial": lambda method, W: functools.partial(_product, method, W),
    "module": Holder,
    "bound method": lambda method, W: Holder(method, W).product,
    "list": lambda method, W: lambda v, kept=[W]: _product(method, kept[0], v),
    "operator": lambda method, W: ns.LinearOperator(lambda v: _product(method, W, v)),
    "sum of operators": lambda method, W: (
        0.5 * ns.LinearOperator(lambda v: _product(method, W, v)) + ns.LinearOperator(Holder(method, W / 1).product) / 2
    ),
}


@each_krylov
@pytest.mark.parametrize("place", HIDING_PLACES)
def test_tensor_that_is_closed_over_receives_its_gradient(method, place):
    """Defect 5: a tensor that was not declared gets no gradient, in silence."""
    leaf, b, weights = draw(N, N).requires_grad_(), draw(N, seed=1), draw(N, seed=2)
    A = HIDING_PLACES[place](method, torch.tanh(leaf))
    (actual,) = torch.autograd.grad(ns.solve(A, b, method=method, rtol=TIGHT) @ weights, leaf)
    (expected,) = torch.autograd.grad(torch.linalg.inv(matrix(method, torch.tanh(leaf))) @ b @ weights, leaf)
    close(actual, expected)


@each_krylov
def test_implicit_gradient_is_that_of_the_solution_and_unrolled_that_of_the_iteration(method):
    """Defect 6: step sizes without derivative, so that the gradient is neither the solution's nor the iteration's."""
    W, direction, b, weights = draw(N, N), draw(N, N, seed=3), draw(N, seed=1), draw(N, seed=2)

    def derivative(grad, **options):
        leaf = W.clone().requires_grad_()
        x, _ = solve_ex(method, matrix(method, leaf), b, grad=grad, **options)
        return torch.autograd.grad(x @ weights, leaf)[0].flatten() @ direction.flatten()

    def difference(h=1e-5, **options):
        ends = [solve_ex(method, matrix(method, W + s * h * direction), b, **options)[0] @ weights for s in (1, -1)]
        return (ends[0] - ends[1]) / (2 * h)

    few = {"maxiter": 3}
    close(derivative("implicit"), difference(), rtol=1e-6)
    close(derivative("unroll", **few), difference(**few), rtol=1e-6)
    far(difference(**few), difference(), rtol=1e-3)


@each_method
@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128))
def test_second_derivative_matches_the_dense_inverse(method, dtype):
    """Defect 7: a backward pass that runs on a copy of the operator has no second derivative of it."""
    W, b, weights = (draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(N, N), (N,), (N,)]))
    W.requires_grad_(), b.requires_grad_()

    def second(x):
        first = torch.autograd.grad((weights * x).sum().abs() ** 2, (W, b), create_graph=True)
        return torch.autograd.grad(sum((g * g.conj()).real.sum() for g in first), (W, b))

    actual = second(solve(method, matrix(method, W), b))
    expected = second(torch.linalg.inv(matrix(method, W)) @ b)
    close(actual[0], expected[0], rtol=1e-7)
    close(actual[1], expected[1], rtol=1e-7)


@each_method
def test_forward_mode_keeps_the_tangents_of_b_and_of_the_operator(method):
    """Defect 8: a forward-mode derivative that knows the operator's tangent only."""
    W, b, dW, db = draw(N, N), draw(N, seed=1), draw(N, N, seed=2), draw(N, seed=3)
    zero_W, zero_b = torch.zeros_like(W), torch.zeros_like(b)

    def ours(W, b):
        return solve(method, matrix(method, W), b)

    def dense(W, b):
        return torch.linalg.inv(matrix(method, W)) @ b

    for tangents in ((zero_W, db), (dW, zero_b), (dW, db)):
        expected = torch.func.jvp(dense, (W, b), tangents)[1]
        close(torch.func.jvp(ours, (W, b), tangents)[1], expected)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, t) for p, t in zip((W, b), tangents, strict=True)]
            close(forward_ad.unpack_dual(ours(*duals)).tangent, expected)


@each_method
@pytest.mark.parametrize("trained", (False, True))
def test_operator_changed_in_place_before_backward_raises(method, trained):
    """Defect 9: the adjoint solved with another operator than the one that was solved with."""
    A, b = matrix(method, draw(N, N)).requires_grad_(trained), draw(N, seed=1).requires_grad_()
    x = solve(method, A, b)
    with torch.no_grad():
        A.mul_(1.25)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        x.sum().backward()
    assert b.grad is None


@each_krylov
@pytest.mark.parametrize("number", ("0-d", "1-element", "non-leaf"))
def test_weight_inside_the_operator_receives_its_gradient(method, number):
    """Defect 10: the weight of a regulariser, a number inside `A`, without a gradient."""
    A, b, weights = matrix(method, draw(N, N)), draw(N, seed=1), draw(N, seed=2)
    leaf = torch.full((1,) if number == "1-element" else (), 0.3, dtype=torch.float64, requires_grad=True)
    weight = leaf.exp() if number == "non-leaf" else leaf
    x = ns.solve(lambda v: A @ v + 0.1 * weight * v, b, method=method, rtol=TIGHT)
    (actual,) = torch.autograd.grad(x @ weights, leaf)
    weight = leaf.exp() if number == "non-leaf" else leaf
    dense = torch.linalg.inv(A + 0.1 * weight * torch.eye(N, dtype=torch.float64)) @ b
    (expected,) = torch.autograd.grad(dense @ weights, leaf)
    close(actual, expected)
    assert actual != 0


@each_method
@pytest.mark.parametrize("shape", ((), (1,), (N,), (2, N), (N, N)))
def test_gradient_has_the_shape_of_its_parameter_and_its_own_entries(method, shape):
    """Defect 11: one summed scalar spread over a parameter that is a vector."""
    A, b, weights = matrix(method, draw(N, N)), draw(N, seed=1), draw(N, seed=2)
    parameter = draw(*shape, seed=3).requires_grad_()

    def full():
        diagonal = parameter.sin().sum(0) if parameter.ndim == 2 else parameter.sin()
        return A + 0.2 * torch.diag(diagonal.expand(N))

    (actual,) = torch.autograd.grad(solve(method, full(), b) @ weights, parameter)
    (expected,) = torch.autograd.grad(torch.linalg.inv(full()) @ b @ weights, parameter)
    close(actual, expected)
    if parameter.numel() > 1:
        far(expected.mean().expand_as(expected), expected)


# -- absolute constants ---------------------------------------------------------------------------------------------


def _scaled_gradients(method, scale, dtype, **options):
    """The gradients of a loss and of `scale` times that loss with respect to a captured matrix and to b."""
    W, b, weights = (t.to(dtype) for t in (draw(N, N), draw(N, seed=1), draw(N, seed=2)))
    W.requires_grad_(), b.requires_grad_()
    x, info = ns.solve_ex(operator(method, matrix(method, W)), b, method=method, **options)
    one = torch.autograd.grad(x @ weights, (W, b), retain_graph=True)
    iterations = info.adjoint.iterations
    scaled = torch.autograd.grad(scale * (x @ weights), (W, b))
    return one, scaled, iterations, info.adjoint.iterations


@each_method
@pytest.mark.parametrize("scale", (1e-2, 1e-4, 1e-12, 1e-100, 1e30))
def test_scaling_the_loss_scales_the_gradient(method, scale):
    """Defect 12: an absolute constant in the inner products of the adjoint solve, 20 % wrong already at 1e-2."""
    one, scaled, iterations, scaled_iterations = _scaled_gradients(method, scale, torch.float64)
    for g, s in zip(one, scaled, strict=True):
        close(s / scale, g, rtol=1e-6)
    assert scaled_iterations == iterations


@each_method
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_loss_scaled_by_1e_minus_9_scales_the_gradient(method, dtype):
    """Defect 13: a small right-hand side taken for zero, so that its solution and every gradient is zero."""
    one, scaled, _, _ = _scaled_gradients(method, 1e-9, dtype)
    for g, s in zip(one, scaled, strict=True):
        assert s.count_nonzero() == s.numel()
        close(s / 1e-9, g, rtol=1e-6 if dtype == torch.float64 else 1e-4)
    A, b = matrix(method, draw(N, N)).to(dtype), draw(N, seed=1).to(dtype)
    close(ns.solve(operator(method, A), 1e-9 * b, method=method) / 1e-9, torch.linalg.inv(A) @ b, rtol=1e-4)


@each_method
def test_tight_tolerance_is_reached(method):
    """Defect 14: a squared residual compared with a constant, which stops the descent at 1e-6."""
    A, b = matrix(method, draw(40, 40)), draw(40, seed=1)
    x, info = solve_ex(method, A, b, rtol=1e-13)
    assert info.converged
    assert torch.linalg.vector_norm(b - A @ x) <= 2e-13 * torch.linalg.vector_norm(b)


@each_method
@pytest.mark.parametrize("scale", (1e-12, 1e12, 1e-30, 1e30))
def test_scaling_b_scales_x_in_the_same_number_of_iterations(method, scale):
    """Defect 15: a small b reported as solved by x = 0."""
    A, b = matrix(method, draw(N, N)), draw(N, seed=1)
    x, info = solve_ex(method, A, b, rtol=1e-8)
    scaled, scaled_info = solve_ex(method, A, scale * b, rtol=1e-8)
    close(scaled / scale, x, rtol=1e-11)
    assert scaled_info.converged
    assert scaled_info.iterations == info.iterations > 0


@each_method
@pytest.mark.parametrize("scale", (1.0, 1e-6, 1e-9, 1e-20))
def test_tolerance_is_relative_to_b_however_small_b_is(method, scale):
    """Defect 16: the norm of b clipped from below before it divides the residual."""
    A, b = matrix(method, draw(N, N)), scale * draw(N, seed=1)
    x, info = solve_ex(method, A, b, rtol=1e-6)
    relative = torch.linalg.vector_norm(b - A @ x) / torch.linalg.vector_norm(b)
    assert info.converged
    assert relative <= 1e-6
    assert info.relative_residual == pytest.approx(relative.item(), rel=1e-3, abs=1e-14)
    assert info.relative_residual == pytest.approx(info.residual_norm / b.norm().item(), rel=1e-12)


@each_krylov
@pytest.mark.parametrize("scale", (1.0, 1e-8))
def test_atol_is_never_used_for_the_cotangent(method, scale):
    """Defect 17: an absolute tolerance, meant for b, that a small cotangent meets with the zero gradient."""
    A, weights = matrix(method, draw(N, N)), draw(N, seed=2)
    b = (1e3 * draw(N, seed=1)).requires_grad_()
    x, info = solve_ex(method, A, b, rtol=1e-9, atol=1e-3)
    (actual,) = torch.autograd.grad(scale * (x @ weights), b)
    close(actual / scale, torch.linalg.inv(A).mH @ weights, rtol=1e-7)
    assert info.adjoint.converged
    assert info.adjoint.relative_residual <= 1e-9


@each_method
@pytest.mark.parametrize("scale", (1e-13, 1e-24, 1e-35))
def test_float32_cotangent_of_1e_minus_13_gives_a_finite_gradient(method, scale):
    """Defect 18: squares of a float32 cotangent underflow, and zero divides zero."""
    one, scaled, _, scaled_iterations = _scaled_gradients(method, scale, torch.float32)
    for g, s in zip(one, scaled, strict=True):
        close(s.double() / scale, g.double(), rtol=1e-4)
    assert scaled_iterations > 0


@each_krylov
@pytest.mark.parametrize(("n", "scale"), ((50_000, 1.0), (1000, 1e-2), (1000, 1e2)))
def test_float32_solves_large_and_small_scaled_diagonals(method, n, scale):
    """Defect 19: a constant in the stopping rule that grows with n, or with the scale, beyond what float32 can reach."""
    diagonal = torch.linspace(scale, 3 * scale, n)
    b = draw(n, dtype=torch.float32)
    for factor in (1.0, scale):
        x, info = ns.solve_ex(lambda v: diagonal * v, factor * b, method=method)
        assert info.converged
        assert info.iterations < 30
        close(x, factor * b / diagonal, rtol=1e-4)


@pytest.mark.parametrize("scale", (1.0, 1e-8))
def test_bicgstab_solves_every_well_conditioned_float32_system(scale):
    """Defect 20: a breakdown test that forgets the sign, or the scale, of what it tests."""
    n, count = 30, 50
    G = draw(count, n, n, dtype=torch.float32) / n**0.5
    A, b = torch.eye(n) + 0.3 * G, scale * draw(count, n, seed=1, dtype=torch.float32)
    alone = [ns.solve_ex(lambda v, A=A[i]: A @ v, b[i], method="bicgstab")[1] for i in range(count)]
    assert [info.status for info in alone] == [Status.CONVERGED] * count
    x, info = ns.solve_ex(operator("bicgstab", A), b, method="bicgstab", batch_dims=1)
    assert info.converged.all()
    close(x, torch.linalg.inv(A.double()).float().matmul(b.unsqueeze(-1)).squeeze(-1), rtol=1e-4)


# -- stopping and batches -------------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize(("dtype", "rtol"), ((torch.float32, 1e-5), (torch.float64, 1e-8), (torch.complex64, 1e-5)))
def test_default_tolerance_is_tight(method, dtype, rtol):
    """Defect 21: a default tolerance that the zero vector meets."""
    A, b = matrix(method, draw(N, N, dtype=dtype)), draw(N, seed=1, dtype=dtype)
    x, info = ns.solve_ex(operator(method, A), b, method=method)
    assert info.converged
    assert info.relative_residual <= rtol
    assert torch.linalg.vector_norm(b - A @ x) <= 1.1 * rtol * torch.linalg.vector_norm(b)


@each_krylov
def test_one_bad_system_is_not_hidden_by_the_mean(method):
    """Defect 22: the mean residual of many columns meets the tolerance, and one column is wrong."""
    count, n = 100, 30
    A = torch.eye(n, dtype=torch.float64).expand(count, n, n).clone()
    A[17] = torch.diag(torch.logspace(0, 6, n, dtype=torch.float64))
    b = draw(count, n)
    x, info = ns.solve_ex(operator(method, A), b, method=method, rtol=1e-6, maxiter=6, batch_dims=1)
    true = torch.linalg.vector_norm(b - operator(method, A)(x), dim=-1) / torch.linalg.vector_norm(b, dim=-1)
    assert true[17] > 1e-3
    assert true.mean() < true[17] / 50
    assert info.converged.nonzero().flatten().tolist() == [i for i in range(count) if i != 17]
    torch.testing.assert_close(info.relative_residual, true, rtol=1e-6, atol=1e-12)
    with pytest.raises(ns.ConvergenceError, match="1 of 100"):
        ns.solve(operator(method, A), b, method=method, rtol=1e-6, maxiter=6, batch_dims=1)


@each_krylov
def test_norm_of_a_matrix_shaped_vector_is_euclidean(method):
    """Defect 23: the spectral norm of a batch or of an image, which is another number and an SVD at each iteration."""
    weights = 1 + torch.arange(42, dtype=torch.float64).reshape(6, 7)
    b = draw(6, 7)
    x, info = ns.solve_ex(lambda v: weights * v, b, method=method, maxiter=2)
    residual = b - weights * x
    assert info.residual_norm == pytest.approx(residual.square().sum().sqrt().item(), rel=1e-10)
    assert info.residual_norm > 1.01 * torch.linalg.matrix_norm(residual, ord=2)
    batch = torch.stack([b, torch.zeros_like(b), 2 * b])
    _, info = ns.solve_ex(lambda v: weights * v, batch, method=method, maxiter=2, batch_dims=1)
    assert info.iterations.tolist() == [2, 0, 2]
    assert info.status.tolist() == [Status.MAXITER, Status.CONVERGED, Status.MAXITER]


@each_method
@pytest.mark.parametrize("guessed", (False, True))
def test_zero_right_hand_side_changes_no_other_system(method, guessed):
    """Defect 24: one zero right-hand side returns the start for all systems, or turns all to NaN."""
    A, b = matrix(method, draw(3, N, N)), draw(3, N, seed=1)
    b[1] = 0
    x0 = draw(3, N, seed=2) if guessed else None
    x, info = solve_ex(method, A, b, x0=x0, **({} if method == "direct" else {"batch_dims": 1}))
    assert info.converged.all()
    assert info.iterations[1] == 0
    assert x[1].count_nonzero() == 0
    close(x, (torch.linalg.inv(A) @ b.unsqueeze(-1)).squeeze(-1))


@each_method
@pytest.mark.parametrize("grad", ("implicit", "none"))
def test_converging_at_exactly_maxiter_is_converging(method, grad):
    """Defect 26: the limit tested before the tolerance, so that the last allowed step counts as a failure."""
    A, b = matrix(method, draw(N, N)), draw(N, seed=1).requires_grad_()
    _, info = solve_ex(method, A, b, rtol=1e-6)
    enough = info.iterations
    assert enough > 0
    x, info = solve_ex(method, A, b, rtol=1e-6, maxiter=enough, grad=grad)
    assert info.status is Status.CONVERGED
    assert info.iterations == enough
    close(x, torch.linalg.inv(A) @ b, rtol=1e-5)
    _, info = solve_ex(method, A, b, rtol=1e-6, maxiter=enough - 1, grad=grad)
    assert info.status is Status.MAXITER
    assert info.iterations == enough - 1
    with pytest.raises(ns.ConvergenceError, match="MAXITER"):
        solve(method, A, b, rtol=1e-6, maxiter=enough - 1, grad=grad)


@each_method
@pytest.mark.parametrize("rtol", (1e-4, 1e-6, 1e-8))
def test_converged_means_that_the_true_residual_meets_the_tolerance(method, rtol):
    """Defect 27: the recurrence for the residual reports 1e-8 where the residual is 9e-6."""
    n = 40
    for seed in range(2):
        Q, _ = torch.linalg.qr(draw(n, n, seed=seed, dtype=torch.float32))
        spectrum = torch.logspace(0, 4, n)
        if method != "cg":
            spectrum[::2] *= -1
        A, b = (Q * spectrum) @ Q.mT, draw(n, seed=seed + 10, dtype=torch.float32)
        A = (A + A.mT) / 2
        x, info = solve_ex(method, A, b, rtol=rtol, maxiter=400)
        norm_b = torch.linalg.vector_norm(b).item()
        # both evaluations of b - A x round by up to about n eps |A| |x|
        rounding = 1e-6 * torch.linalg.vector_norm(A.abs() @ x.abs()).item() / norm_b
        true = torch.linalg.vector_norm(b.double() - A.double() @ x.double()).item() / norm_b
        assert abs(info.relative_residual - true) <= rounding + 1e-6 * true
        assert info.converged == (info.relative_residual <= rtol)
        assert info.converged or info.status in (Status.MAXITER, Status.STAGNATED, Status.BREAKDOWN)
        assert rtol > 1e-8 or not info.converged  # below what float32 can reach, and so said


@pytest.mark.parametrize(
    ("method", "rows", "allowed"),
    (
        ("cg", [[1.0, 0.0], [0.0, -1.0]], (Status.INDEFINITE, Status.BREAKDOWN)),  # p^H A p = 0 at the first step
        ("cg", [[0.0, 0.0], [0.0, 0.0]], (Status.BREAKDOWN, Status.INCONSISTENT, Status.INDEFINITE)),
        ("minres", [[1.0, 0.0], [0.0, -1.0]], (Status.CONVERGED,)),
        ("minres", [[0.0, 0.0], [0.0, 0.0]], (Status.BREAKDOWN, Status.INCONSISTENT, Status.STAGNATED)),
        ("gmres", [[0.0, 1.0], [-1.0, 0.0]], (Status.CONVERGED,)),
        ("gmres", [[0.0, 0.0], [0.0, 0.0]], (Status.BREAKDOWN, Status.INCONSISTENT)),
        ("bicgstab", [[0.0, 1.0], [-1.0, 0.0]], (Status.BREAKDOWN,)),  # r^H A r = 0 at the first step
        ("bicgstab", [[0.0, 0.0], [0.0, 0.0]], (Status.BREAKDOWN, Status.INCONSISTENT)),
        ("direct", [[0.0, 0.0], [0.0, 0.0]], (Status.BREAKDOWN, Status.INCONSISTENT)),
    ),
)
def test_zero_curvature_is_named_and_leaves_no_nan(method, rows, allowed):
    """Defect 28: a division by a zero curvature, whose NaN then looks like too few iterations."""
    A, b = torch.tensor(rows, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    x, info = solve_ex(method, A, b)
    assert info.status in allowed
    assert x.isfinite().all()
    easy = 2 * torch.eye(2, dtype=torch.float64)
    batch = {} if method == "direct" else {"batch_dims": 1}
    x, info = solve_ex(method, torch.stack([A, easy]), torch.stack([b, b]), **batch)
    assert info.status[0] in allowed
    assert info.status[1] == Status.CONVERGED
    assert x[0].isfinite().all()
    close(x[1], b / 2)


@each_method
def test_inconsistent_singular_system_is_a_failure(method):
    """Defect 29: a singular system without solution reported as solved, with a solution of size 1e15."""
    Q, _ = torch.linalg.qr(draw(N, N))
    spectrum = torch.arange(N, dtype=torch.float64)  # one eigenvalue is zero
    A, b = (Q * spectrum) @ Q.mT, Q.sum(1)
    A = (A + A.mT) / 2
    x, info = solve_ex(method, A, b, rtol=1e-8)
    assert not info.converged
    assert x.isfinite().all()
    with pytest.raises(ns.ConvergenceError):
        solve(method, A, b, rtol=1e-8)
    if method == "minres":  # whose iterates can be told to have found all that there is
        assert info.status is Status.INCONSISTENT
        assert torch.linalg.vector_norm(x) < 100
        assert info.residual_norm == pytest.approx(1.0, rel=1e-6)  # the part of b outside the range
    consistent = b - Q[:, 0]
    if method in ("cg", "minres"):
        x, info = solve_ex(method, A, consistent, rtol=1e-8)
        assert info.converged
        close(x, torch.linalg.pinv(A, rtol=1e-10) @ consistent, rtol=1e-6)


@each_krylov
def test_preconditioner_of_the_wrong_sign_is_no_success(method):
    """Defect 30: a negative r^H M r passes for a residual below the tolerance, and x = 0 for the solution."""
    A, b = matrix(method, draw(N, N)), draw(N, seed=1)
    x, info = solve_ex(method, A, b, M=lambda r: -r, rtol=1e-8)
    true = torch.linalg.vector_norm(b - A @ x) / torch.linalg.vector_norm(b)
    if method in ("cg", "minres"):
        assert info.status is Status.INDEFINITE
        assert true > 1e-8
    else:  # any nonsingular M is a right preconditioner
        assert info.converged
        assert true <= 2e-8


@pytest.mark.parametrize("restart", (30, 100, 1000))
def test_gmres_stops_inside_a_cycle_and_keeps_its_basis_orthogonal(restart):
    """Defect 31: convergence seen only at the end of a cycle, and a basis that loses orthogonality at a condition of 1e10."""
    n, count = 200, 0
    A = torch.eye(n, dtype=torch.float64) + 0.3 * draw(n, n) / n**0.5
    b = draw(n, seed=1)

    def counted(v):
        nonlocal count
        count += 1
        return A @ v

    _, info = ns.solve_ex(counted, b, method=ns.GMRES(restart=restart), rtol=1e-8)
    # the least number of products: the smallest Krylov space that holds a solution of this accuracy
    krylov, needed = b[:, None] / b.norm(), 0
    while True:
        needed += 1
        y = torch.linalg.lstsq(A @ krylov, b[:, None]).solution
        if torch.linalg.vector_norm(b[:, None] - A @ krylov @ y) <= 1e-8 * b.norm():
            break
        krylov = torch.linalg.qr(torch.cat([krylov, A @ krylov[:, -1:]], dim=1)).Q
    assert info.converged
    assert needed <= info.iterations <= needed + 1
    assert count == info.matvecs <= needed + 2
    assert needed < 30  # inside the first cycle

    n = 60
    (U, _), (V, _) = (torch.linalg.qr(draw(n, n, seed=s)) for s in (2, 3))
    A, b = (U * torch.logspace(0, -10, n, dtype=torch.float64)) @ V.mT, draw(n, seed=4)
    _, full = ns.solve_ex(lambda v: A @ v, A @ b, method=ns.GMRES(restart=max(restart, n)), rtol=1e-10)
    assert full.converged
    assert full.iterations <= n


@each_method
def test_zero_entries_in_b_need_no_absolute_tolerance(method):
    """Defect 32: an entrywise relative test divides by the zeros of b."""
    diagonal = torch.arange(1, N + 1, dtype=torch.float64)
    A = torch.diag(diagonal)
    for zeros in (slice(0, 1), slice(0, N // 2), slice(1, N)):
        b = draw(N, seed=1)
        b[zeros] = 0
        x, info = solve_ex(method, A, b, atol=0.0)
        assert info.converged
        close(x, b / diagonal)
        _, info = solve_ex(method, matrix(method, draw(N, N)), b, atol=0.0)
        assert info.converged


NEVER_CONVERGES = {  # each with rtol = 0, or with a matrix on which the method makes no progress
    "cg": lambda v, noise: v + 0.3 * noise(),
    "minres": lambda v, noise: v + 0.3 * noise(),
    "gmres": lambda v, noise: v.roll(1),
    "bicgstab": lambda v, noise: v + 3 * noise(),
}


@each_krylov
@pytest.mark.parametrize("rtol", (0.0, 1e-8))
def test_iterations_are_limited_by_default(method, rtol):
    """Defect 33: a loop that ends by convergence alone."""
    n, count = 30, 0
    generator = torch.Generator().manual_seed(3)

    def A(v):
        nonlocal count
        count += 1
        assert count < 100 * n, "no limit"
        return NEVER_CONVERGES[method](v, lambda: torch.randn(n, generator=generator, dtype=torch.float64) * v.norm())

    A_method = ns.GMRES(restart=2) if method == "gmres" else method
    x, info = ns.solve_ex(A, draw(n, seed=1), method=A_method, rtol=rtol, grad="none")
    assert not info.converged
    assert info.iterations <= 10 * n
    assert x.isfinite().all()


@pytest.mark.parametrize("rank", (1, N // 2, N - 1))
@pytest.mark.parametrize("exact", (False, True))
def test_rank_deficient_matrix_is_a_failure(rank, exact):
    """Defect 34: a factorisation with a pivot of rounding size, its solution of size 1e16 called successful."""
    A = draw(N, rank) @ draw(rank, N, seed=1)
    if exact:
        A[-1] = 0
    b = draw(N, seed=2)
    x, info = ns.solve_ex(A, b)
    assert info.method == "direct"
    assert not info.converged
    assert x.isfinite().all()
    assert info.residual_norm == pytest.approx(torch.linalg.vector_norm(b - A @ x).item(), rel=1e-3)
    with pytest.raises(torch.linalg.LinAlgError):
        ns.solve(A, b)


# -- least squares ---------------------------------------------------------------------------------------------------

LEAST_SQUARES = ("lsmr", "lsqr", "cgls")


@pytest.mark.parametrize("method", LEAST_SQUARES)
def test_one_zero_right_hand_side_leaves_the_other_least_squares_alone(method):
    """Defect 24, in LSQR, where it was measured."""
    A, b = draw(9, 5), draw(3, 9, seed=1)
    b[1] = 0
    x, info = ns.lstsq_ex(
        lambda v: v @ A.mT, b, domain=torch.zeros(3, 5, dtype=b.dtype), method=method, batch_dims=1, rtol=1e-12
    )
    assert info.converged.all()
    assert info.iterations[1] == 0
    assert x[1].count_nonzero() == 0
    close(x, b @ torch.linalg.pinv(A).mT)


@pytest.mark.parametrize("method", LEAST_SQUARES)
def test_inconsistent_least_squares_stops_by_its_own_test(method):
    """Defect 25: no test of `|A^H r|`, so that an inconsistent problem always runs to the limit, forward and adjoint."""
    A, b = draw(60, 20).requires_grad_(), draw(60, seed=1)
    x, info = ns.lstsq_ex(lambda v: A @ v, b, domain=torch.zeros(20, dtype=b.dtype), method=method, maxiter=10_000)
    x.sum().backward()
    wide, record = ns.lstsq_ex(lambda v: A.mT @ v, b[:20], domain=torch.zeros(60, dtype=b.dtype), method=method, maxiter=10_000)
    wide.square().sum().add(wide[0]).backward()  # the cotangent is not in the range of A^H
    assert info.status == Status.LEAST_SQUARES
    assert record.adjoint.status == Status.LEAST_SQUARES
    for solve in (info, info.adjoint, record, record.adjoint):
        assert solve.converged
        assert solve.iterations <= 60


@pytest.mark.parametrize("method", LEAST_SQUARES)
@pytest.mark.parametrize(("m", "n", "rank"), ((8, 5, 5), (5, 8, 5), (8, 6, 3)))
def test_least_squares_gradient_is_right_for_every_shape_and_rank(method, m, n, rank):
    """Defect 44: the rule of square systems is 31-99 % wrong for other shapes, and for a deficient rank."""
    U, V, b = (t.requires_grad_() for t in (draw(m, rank), draw(n, rank, seed=1), draw(m, seed=2)))
    x = ns.lstsq(lambda v: U @ (V.mT @ v), b, domain=torch.zeros(n, dtype=b.dtype), method=method, rtol=1e-13)
    inv = torch.linalg.inv
    expected = V @ (inv(V.mT @ V) @ (inv(U.mT @ U) @ (U.mT @ b)))
    close(x, expected)
    weights = draw(n, seed=3)
    for one, other in zip(*(torch.autograd.grad(y @ weights, (U, V, b)) for y in (x, expected)), strict=True):
        close(one, other)


@pytest.mark.parametrize("method", (*LEAST_SQUARES, "svd", "qr"))
def test_rank_deficient_least_squares_has_no_solution_of_size_1e16(method):
    """Defect 34, of least squares: what is called a solution is the shortest one."""
    A = draw(9, 3) @ draw(3, 6, seed=1)
    b = draw(9, seed=2)
    x, info = ns.lstsq_ex(A, b, method=method, rtol=1e-12)
    if info.converged:
        close(x, torch.linalg.pinv(A, rtol=1e-10) @ b)
    else:
        assert method == "qr"
        assert info.status == Status.ILL_CONDITIONED


# -- options and aliasing -------------------------------------------------------------------------------------------


@each_krylov
def test_options_reach_the_differentiable_path(method):
    """Defect 35: tolerance, limit and guess obeyed without gradients and forgotten with them."""
    n = 40
    A, b = matrix(method, draw(n, n)), draw(n, seed=1)
    reference = torch.linalg.inv(A) @ b
    infos = {}
    for differentiable in (False, True):
        rhs = b.clone().requires_grad_(differentiable)
        for name, options in {
            "loose": {"rtol": 1e-2},
            "tight": {"rtol": 1e-10},
            "few": {"rtol": 1e-10, "maxiter": 3},
            "guess": {"rtol": 1e-8, "x0": reference},
            "atol": {"rtol": 0.0, "atol": 1e-3 * b.norm().item()},
            "history": {"rtol": 1e-10, "history": True},
        }.items():
            x, info = solve_ex(method, A, rhs, on_failure="ignore", **options)
            infos[name, differentiable] = info
            if differentiable:
                x.sum().backward()
    for name in ("loose", "tight", "few", "guess", "atol", "history"):
        without, with_gradient = infos[name, False], infos[name, True]
        assert (without.status, without.iterations) == (with_gradient.status, with_gradient.iterations)
        assert without.relative_residual == with_gradient.relative_residual
    loose, tight, few, guess, atol = (infos[name, True] for name in ("loose", "tight", "few", "guess", "atol"))
    assert 0 < loose.iterations < tight.iterations
    assert 0 < atol.iterations < tight.iterations
    assert few.iterations == few.adjoint.iterations == 3
    assert not few.adjoint.converged
    assert guess.iterations == 0
    assert 1e-10 < loose.adjoint.relative_residual <= 1e-2
    assert tight.adjoint.relative_residual <= 1e-10
    assert loose.adjoint.iterations < tight.adjoint.iterations
    assert len(infos["history", True].history) == tight.iterations + 1


@each_method
@pytest.mark.parametrize("scale", (1.0, 1e3, 1e-3, 1e-20))
def test_exact_guess_takes_no_iteration_at_any_scale(method, scale):
    """Defect 36: b divided by its norm and the guess not, so that the exact one costs 18 iterations."""
    n = 40
    A, x_true = matrix(method, draw(n, n)), scale * draw(n, seed=1)
    x, info = solve_ex(method, A, A @ x_true, x0=x_true, rtol=1e-8)
    assert info.converged
    assert info.iterations == 0
    assert torch.equal(x, x_true)
    near = x_true * (1 + 1e-4 * draw(n, seed=2))
    _, started_near = solve_ex(method, A, A @ x_true, x0=near, rtol=1e-8)
    _, cold = solve_ex(method, A, A @ x_true, rtol=1e-8)
    assert started_near.iterations < cold.iterations or method == "direct"


@each_method
def test_guess_is_a_start_and_not_a_shift(method):
    """Defect 37: `x0 + A^{-1} b` returned, the guess added to what already solves the system."""
    A, b, x0 = matrix(method, draw(N, N)), draw(N, seed=1).requires_grad_(), draw(N, seed=2).requires_grad_()
    x = solve(method, A, b, x0=x0)
    close(x, torch.linalg.inv(A) @ b)
    far(x0 + x, x)
    x.sum().backward()
    close(b.grad, torch.linalg.inv(A).mH.sum(1))
    assert x0.grad is None or x0.grad.count_nonzero() == 0


@pytest.mark.parametrize(
    ("function", "misspelt", "meant"),
    (
        *itertools.product((ns.solve, ns.solve_ex), ("max_iter", "maxiters"), ("maxiter",)),
        *itertools.product((ns.cg, ns.minres, ns.gmres, ns.bicgstab), ("max_iter",), ("maxiter",)),
        (ns.solve, "methods", "method"),
        (ns.solve, "rtoll", "rtol"),
        (ns.solve, "batch_dim", "batch_dims"),
        (ns.solve, "on_fail", "on_failure"),
        (ns.gmres, "restarts", "restart"),
        (ns.LinearSolve, "max_iter", "maxiter"),
    ),
)
def test_misspelt_option_is_an_error(function, misspelt, meant):
    """Defect 38: an unknown option swallowed, so that the default holds in silence."""
    arguments = () if function is ns.LinearSolve else (torch.eye(2), torch.ones(2))
    with pytest.raises(TypeError, match=rf"{misspelt}.*did you mean '{meant}'"):
        function(*arguments, **{misspelt: 5})


@each_krylov
@pytest.mark.parametrize("form", ("callable", "tensor", "module", "operator", "operator with adjoint"))
def test_preconditioner_is_applied_in_both_passes_on_its_side(method, form):
    """Defect 39: a preconditioner that is never called, or `M` where the adjoint solve needs `M^H`."""
    n = 40
    A = matrix(method, draw(n, n))
    if method == "minres":  # whose preconditioner must be definite
        A = A + 5 * torch.eye(n, dtype=torch.float64)
    b = draw(n, seed=1).requires_grad_()
    inverse = torch.linalg.inv(A)
    linear = nn.Linear(n, n, bias=False, dtype=torch.float64)
    linear.weight = nn.Parameter(inverse)
    M = {
        "callable": lambda r: inverse @ r,
        "tensor": inverse,
        "module": linear,
        "operator": ns.LinearOperator(lambda r: inverse @ r),
        "operator with adjoint": ns.LinearOperator(lambda r: inverse @ r, adjoint=lambda r: inverse.mT @ r),
    }[form]
    x, plain = solve_ex(method, A, b, rtol=1e-8)
    x.sum().backward()
    x, info = solve_ex(method, A, b, rtol=1e-8, M=M)
    (gradient,) = torch.autograd.grad(x.sum(), b)
    # the exact inverse on the right side solves each system in one step
    assert plain.iterations > 4
    assert plain.adjoint.iterations > 4
    assert info.converged
    assert info.iterations <= 2
    assert info.adjoint.converged
    assert info.adjoint.iterations <= 2
    close(gradient, inverse.mH.sum(1))
    assert linear.weight.grad is None


def _guarded(function, seen):
    """`function`, each result of which is kept beside a copy."""

    def guarded(v):
        y = function(v)
        seen.append((y, y.detach().clone(), y._version))
        return y

    return guarded


@each_krylov
@pytest.mark.parametrize("preconditioned", (False, True))
@pytest.mark.parametrize("batched", (False, True))
def test_what_the_operator_returns_is_never_written_to(method, preconditioned, batched):
    """Defect 40: an update in place on the operator's own tensor; `lambda v: v` then gives 2 b."""
    b = draw(3, N, seed=1).requires_grad_()
    options = {"batch_dims": 1} if batched else {}
    M = {"M": lambda r: r} if preconditioned else {}
    x = ns.solve(lambda v: v, b, method=method, **options, **M)
    close(x, b, rtol=1e-15)
    x.sum().backward()
    close(b.grad, torch.ones_like(b), rtol=1e-15)

    A, seen = matrix(method, draw(N, N)), []
    diagonal = torch.diag(1 / A.diagonal().abs())
    M = {"M": _guarded(lambda r: r @ diagonal, seen)} if preconditioned else {}
    x = ns.solve(_guarded(lambda v: v @ A.mT, seen), b, method=method, **options, **M)
    x.sum().backward()
    assert len(seen) > 5
    for y, copy, version in seen:
        assert y._version == version
        assert torch.equal(y, copy)


@each_method
def test_global_random_state_is_untouched(method):
    """Defect 41: random start or shadow vectors drawn from, or seeding, the user's generator."""
    torch.manual_seed(4)
    state = torch.get_rng_state()
    b = draw(N, seed=1).requires_grad_()
    solve(method, matrix(method, draw(N, N)), b, M=None).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@each_method
def test_solution_shares_no_memory_with_its_inputs(method):
    """Defect 42: b itself, or the guess, returned where it happens to be the solution."""
    A = torch.eye(N, dtype=torch.float64)
    b = draw(N, seed=1)
    cases = [(torch.zeros_like(b), None), (b, None), (b, b), (b, b.clone()), (torch.zeros_like(b), torch.zeros_like(b))]
    for b, x0 in cases:
        for grad in ("implicit", "none", "unroll"):
            for source in (A, lambda v: v) if method != "direct" else (A,):
                x = ns.solve(source, b, x0=x0, method=method, grad=grad)
                taken = {t.untyped_storage().data_ptr() for t in (b, x0) if t is not None}
                close(x, b, rtol=1e-15)
                assert x.untyped_storage().data_ptr() not in taken


@pytest.mark.parametrize("method", ("cg", "minres"))
@pytest.mark.parametrize("steps", (1, 2, 3, 5))
def test_preconditioned_iterates_are_optimal_from_the_first_step(method, steps):
    """Defect 43: a first direction that ignores M spoils the conjugacy of all that follow.

    After k steps the iterate is the best one of the space that `M A` and `M b` span: in the A-norm of the error for CG, in
    the M-norm of the residual for MINRES.
    """
    n = 20
    A, M, b = matrix(method, draw(n, n)), matrix("cg", 2 * draw(n, n, seed=1)), draw(n, seed=2)
    space = [M @ b]
    while len(space) < steps:
        space.append(M @ (A @ space[-1]))
        space[-1] = space[-1] / space[-1].norm()
    V = torch.linalg.qr(torch.stack(space, dim=1)).Q
    left = V if method == "cg" else M @ A @ V
    best = V @ torch.linalg.inv(left.mT @ A @ V) @ left.mT @ b
    x, info = solve_ex(method, A, b, M=M, maxiter=steps)
    assert info.iterations == steps
    close(x, best, rtol=1e-9)


@each_krylov
def test_parameter_that_is_wrapped_anew_keeps_its_graph(method):
    """Defect 45: a parameter put in a new tensor on the way, so that the graph does not lead to it.

    The update of a splitting method, `(K^H K + rho I) x = K^H y + rho z`, has the parameter on both sides.
    """
    K, y, z, weights = draw(N, N) / N**0.5, draw(N, seed=1), draw(N, seed=2), draw(N, seed=3)
    leaf = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def update(invert):
        rho = leaf.exp()
        return invert(rho, K.mT @ y + rho * z)

    def ours(rho, b):
        layer = ns.LinearSolve(method=method, rtol=TIGHT)
        gram = ns.LinearOperator(lambda v: K @ v).gram() + ns.LinearOperator(lambda v: rho * v, hermitian=True)
        return layer(gram, b)

    def dense(rho, b):
        return torch.linalg.inv(K.mT @ K + rho * torch.eye(N, dtype=torch.float64)) @ b

    (actual,) = torch.autograd.grad(update(ours) @ weights, leaf)
    (expected,) = torch.autograd.grad(update(dense) @ weights, leaf)
    close(actual, expected)
    # the right-hand side's part alone is what a lost parameter leaves
    (partial,) = torch.autograd.grad(update(lambda rho, b: dense(rho.detach(), b)) @ weights, leaf)
    far(partial, expected)


def _convolution(kernel):
    return ns.LinearOperator(lambda v: nn.functional.conv1d(v[None, None], kernel[None, None], padding=1)[0, 0])


COMPOSITIONS = {
    "identity + convolution": lambda conv, scale: ns.LinearOperator(lambda v: v) + conv,
    "diagonal + convolution": lambda conv, scale: scale + conv,
    "diagonal @ convolution": lambda conv, scale: scale @ (conv + ns.LinearOperator(lambda v: v)),
    "convolution @ diagonal": lambda conv, scale: (conv + scale) @ scale,
    "damped gram": lambda conv, scale: (conv @ scale).gram(0.7),
}


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("method", ("gmres", "bicgstab", None))
def test_composition_is_solved_as_a_whole(composition, method):
    """Defect 46: the inverse of a diagonal part used for a composition that is not diagonal: `x + conv(x)` 120 % wrong."""
    leaf = torch.tensor([0.2, 0.5, -0.1], dtype=torch.float64, requires_grad=True)
    diagonal, b = torch.linspace(1, 2, N, dtype=torch.float64), draw(N, seed=1)
    A = COMPOSITIONS[composition](_convolution(leaf), ns.LinearOperator(lambda v: diagonal * v, hermitian=True))
    x = ns.solve(A, b, method=method, rtol=TIGHT)
    dense = A.to_dense(like=b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = torch.linalg.inv(dense) @ b
    close(x, expected)
    far(b / dense.diagonal(), expected)
    (actual,) = torch.autograd.grad(x.square().sum(), leaf)
    (right,) = torch.autograd.grad(expected.square().sum(), leaf)
    close(actual, right)


def test_table_names_every_defect_and_every_test():
    """The table above lists the numbers 1 to 46, and every test that it names exists."""
    rows = dict(re.findall(r"^ +(\d+)  (test_\w+)", __doc__, flags=re.MULTILINE))
    assert sorted(map(int, rows)) == list(range(1, 47))
    for number, name in rows.items():
        assert f"Defect {number}:" in globals()[name].__doc__
