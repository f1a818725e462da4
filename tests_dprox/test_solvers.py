"""dprox's solvers one by one, as its own tests of them call them: with matrices, images and their options."""

import dprox as dp
import pytest
import torch
from dprox.linalg import LinearSolveConfig, linear_solve
from dprox.linalg import solve as solvers
from dprox.linalg.custom import pcg

import nablasolve as ns
from nablasolve.interop import dprox as client

POSITIVE = ("cg", "cg2", "pcg", "minres", "plss", "gmres", "bicgstab")
TIGHT = {torch.float64: 1e-10, torch.float32: 1e-5}


class Matrix(dp.LinOp):
    """A matrix as an operator of dprox."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix)

    def forward(self, x, **_):
        return self.matrix @ x

    def adjoint(self, y, **_):
        return self.matrix.mT @ y


class Local(dp.LinOp):
    """Another positive definite operator for each image of a batch."""

    def __init__(self, weights):
        super().__init__()
        self.weights = torch.nn.Parameter(weights)

    def forward(self, x, **_):
        ramp = torch.linspace(0, 1, x.shape[-2] * x.shape[-1], dtype=x.dtype).view(x.shape[-2:])
        return self.weights.view(-1, 1, 1, 1) * ramp * x + 2.1 * x - x.roll(1, -1) - x.roll(-1, -1)

    adjoint = forward


@pytest.fixture(autouse=True)
def installed():
    client.install()


def system(dtype=torch.float64, n=20, wide=0):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(n, n + wide, dtype=torch.float64, generator=generator)
    A = A @ A.mT / n + torch.eye(n, dtype=torch.float64) if wide == 0 else A
    return A.to(dtype), torch.randn(n, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", TIGHT)
@pytest.mark.parametrize("name", POSITIVE)
def test_each_solver_solves_and_has_gradients(name, dtype):
    matrix, b = system(dtype)
    A, rtol = Matrix(matrix), TIGHT[dtype]
    b.requires_grad_()
    config = LinearSolveConfig(rtol=rtol**2 if name == "cg2" else rtol, max_iters=500, solver_type=name)
    x = linear_solve(A, b, config)
    weights = torch.linspace(-1, 1, b.numel(), dtype=dtype)
    got = torch.autograd.grad(weights @ x, (b, A.matrix))
    exact = matrix.double().requires_grad_(), b.detach().double().requires_grad_()
    solution = torch.linalg.inv(exact[0]) @ exact[1]
    expected = torch.autograd.grad(weights.double() @ solution, (exact[1], exact[0]))
    slack = 1e-8 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(x.double(), solution, rtol=slack, atol=slack)
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=slack, atol=slack)


@pytest.mark.parametrize("name", ["cg", "cg2", "pcg", "minres", "plss"])
def test_the_functions_of_the_solve_package_are_replaced(name):
    matrix, b = system()
    x = getattr(solvers, name)(Matrix(matrix), b, rtol=1e-20 if name == "cg2" else 1e-10, max_iters=500)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-8)
    assert "nablasolve" in getattr(solvers, name).__func__.__module__


@pytest.mark.parametrize("name", ["cg", "minres", "gmres", "bicgstab"])
def test_dimension_0_counts_systems(name):
    records = []
    client.install(record=records.append)
    weights = torch.tensor([0.1, 10.0, 1e4], dtype=torch.float64)
    b = torch.randn(3, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = b * torch.tensor([1.0, 1e-9, 1e6]).view(3, 1, 1, 1)
    A = Local(weights)
    config = LinearSolveConfig(rtol=1e-10, max_iters=200, solver_type=name)
    x = linear_solve(A, b, config)
    assert records[-1].iterations.shape == (3,)
    assert len(set(records[-1].iterations.tolist())) > 1
    residual = (A(x) - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
    assert (residual <= 1e-10).all()
    alone = [linear_solve(Local(w.view(1)), one[None], config) for w, one in zip(weights, b, strict=True)]
    torch.testing.assert_close(x, torch.cat(alone), rtol=1e-8, atol=0)


def test_a_warm_guess_counts_relative_to_b_in_each_system():
    records = []
    client.install(record=records.append)
    A = Local(torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64))
    b = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solution = linear_solve(A, b, LinearSolveConfig(rtol=1e-13)).detach()
    guess = torch.stack([solution[0], solution[1] * (1 + 1e-4), torch.full_like(b[2], torch.nan)])
    x = solvers.cg(A, b, x0=guess, rtol=1e-6)
    info = records[-1]
    assert info.iterations[0] == 0
    assert 0 < info.iterations[1] < info.iterations[2]
    assert info.converged.all()
    residual = (b - A(x)).flatten(1).norm(dim=1)
    torch.testing.assert_close(info.residual_norm, residual, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(info.relative_residual, residual / b.flatten(1).norm(dim=1), rtol=1e-6, atol=1e-12)


def test_an_unsymmetric_system_is_solved_by_plss_gmres_and_bicgstab_and_named_by_cg():
    matrix, b = system()
    matrix = matrix + torch.triu(torch.ones_like(matrix), 1)
    for name in ("plss", "gmres", "bicgstab"):
        x = linear_solve(Matrix(matrix), b, LinearSolveConfig(rtol=1e-10, max_iters=2000, solver_type=name))
        torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-6)
    x = linear_solve(Matrix(matrix), b, LinearSolveConfig(rtol=1e-10, max_iters=50))
    with pytest.warns(ns.ConvergenceWarning, match="NOT_HERMITIAN"):
        x.sum().backward()


def test_plss_gives_the_solution_of_a_wide_system_that_is_nearest():
    matrix, b = system(wide=6)
    A, start = Matrix(matrix), torch.linspace(0, 1, 26, dtype=torch.float64)
    nearest = start + torch.linalg.pinv(matrix) @ (b - matrix @ start)
    torch.testing.assert_close(solvers.plss(A, b, x0=start, rtol=1e-12, max_iters=500), nearest, rtol=1e-8, atol=1e-8)
    weight = torch.linspace(1, 3, 26, dtype=torch.float64)
    scaled = torch.linalg.pinv(matrix / weight) @ (b - matrix @ start) / weight
    x = solvers.plssw(A, b, weight, x0=start, rtol=1e-12, max_iters=500)
    torch.testing.assert_close(x, start + scaled, rtol=1e-8, atol=1e-8)


def test_solver_kwargs_arrive():
    matrix, b = system()
    inverse = 1 / matrix.diagonal()
    expected = torch.linalg.solve(matrix, b)
    for name in ("pcg", "minres"):
        config = LinearSolveConfig(rtol=1e-10, solver_type=name, solver_kwargs=dict(Minv=lambda r: inverse * r, x0=b))
        torch.testing.assert_close(linear_solve(Matrix(matrix), b, config), expected, rtol=1e-8, atol=1e-8)
    x = pcg(Matrix(matrix), b, rtol=1e-10, Minv=lambda r: inverse * r)
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-8)
    with pytest.raises(TypeError, match="restrat"):
        linear_solve(Matrix(matrix), b, LinearSolveConfig(solver_type="gmres", solver_kwargs=dict(restrat=5)))


def test_shifts_of_minres_give_one_solution_each():
    matrix, b = system()
    shifts = torch.tensor([0.5, 2.0], dtype=torch.float64)
    x = solvers.minres(Matrix(matrix), b, rtol=1e-10, shifts=shifts, value=2.0)
    expected = torch.stack([torch.linalg.solve(2 * matrix + s * torch.eye(20, dtype=torch.float64), b) for s in shifts])
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-8)


def test_columns_of_a_matrix_right_hand_side_are_solved_by_minres():
    matrix, b = system()
    columns = torch.stack([b, 3 * b.flip(0)], dim=-1)
    x = solvers.minres(Matrix(matrix), columns, rtol=1e-10)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, columns), rtol=1e-8, atol=1e-8)


def test_pcg_and_cg2_hold_their_absolute_tolerances():
    matrix, b = system()
    A = Matrix(matrix)
    for scale in (1e-3, 1e3):
        assert (A(solvers.pcg(A, scale * b, rtol=1e-7)) - scale * b).abs().max() < 1e-7
        assert ((A(solvers.cg2(A, scale * b, rtol=1e-9)) - scale * b) ** 2).sum() < 1e-9
        records = []
        client.install(record=records.append)
        assert (A(solvers.pcg(A, scale * b, x0=b, rtol=1e-7)) - scale * b).abs().max() < 1e-7
        assert records[-1].residual_norm > 1e-9


def test_a_preconditioned_solve_takes_the_same_steps_with_and_without_a_gradient():
    records = []
    client.install(record=records.append)
    matrix, b = system()
    scale = torch.linspace(1, 30, 20, dtype=torch.float64)
    A = Matrix(scale[:, None] * matrix * scale)
    solvers.pcg(A, b, rtol=1e-8, Minv=lambda r: r / scale**2)
    with torch.no_grad():
        solvers.pcg(A, b, rtol=1e-8, Minv=lambda r: r / scale**2)
    assert records[0].iterations == records[1].iterations
    assert records[0].matvecs == records[1].matvecs + 1  # the run that records what A depends on


def test_max_iters_is_kept_and_no_failure():
    records = []
    client.install(on_failure="raise", record=records.append)
    matrix, b = system(n=40)
    x = linear_solve(Matrix(matrix).requires_grad_(False), b, LinearSolveConfig(max_iters=5))
    (info,) = records
    assert (info.iterations, info.matvecs) == (5, 6)
    assert info.status is ns.Status.STOPPED
    expected, _ = ns.solve_ex(matrix.matmul, b, method="cg", maxiter=5)
    torch.testing.assert_close(x, expected)


def test_an_adjoint_solve_that_max_iters_cuts_off_warns():
    matrix, b = system(n=40)
    x = linear_solve(Matrix(matrix), b, LinearSolveConfig(max_iters=5))
    with pytest.warns(ns.ConvergenceWarning, match="adjoint solve"):
        x.sum().backward()
    client.install(on_adjoint_failure="ignore")
    linear_solve(Matrix(matrix), b, LinearSolveConfig(max_iters=5)).sum().backward()


def test_a_failure_is_shown_as_asked():
    b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    A = Matrix(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)))
    with pytest.warns(ns.ConvergenceWarning, match="INDEFINITE"):
        linear_solve(A, b)
    client.install(on_failure="raise")
    with pytest.raises(ns.ConvergenceError, match="INDEFINITE"):
        linear_solve(A, b)
    client.install(on_failure="ignore")
    assert linear_solve(A, b).shape == b.shape


def test_verbose_prints_the_record(capsys):
    matrix, b = system()
    linear_solve(Matrix(matrix), b, LinearSolveConfig(verbose=True))
    assert "CONVERGED" in capsys.readouterr().out
    linear_solve(Matrix(matrix), b)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("batch", [1, 3])
def test_a_parameter_of_the_shape_of_b_is_not_mistaken_for_a_product(batch):
    # the product of the recording run is used again, while a trace looks out for tensors in the order of their entry
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(1 + torch.rand(batch, 1, 4, 4, dtype=torch.float64, generator=generator))
    b = torch.rand(batch, 1, 4, 4, dtype=torch.float64, generator=generator)
    x = solvers.cg(lambda v: weights * v, b, rtol=1e-12)
    torch.testing.assert_close(x, b / weights)
    (grad,) = torch.autograd.grad(x.sum(), weights)
    torch.testing.assert_close(grad, -b / weights.detach() ** 2)


def test_an_operator_that_returns_float32_still_solves_in_float64():
    matrix, b = system()
    x = solvers.cg(lambda v: (matrix @ v).float(), b, rtol=1e-5)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-4, atol=1e-4)


def test_zero_gives_zero():
    matrix, b = system()
    for name in (*POSITIVE, "plss"):
        x = linear_solve(Matrix(matrix), 0 * b, LinearSolveConfig(solver_type=name))
        assert torch.equal(x, torch.zeros_like(b))
