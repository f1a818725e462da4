"""What `install` replaces, and that `uninstall` puts everything back."""

import sys

import dprox
import pytest
import torch
from dprox.linalg import LinearSolveConfig, linear_solve
from dprox.proxfn.sum_square import least_squares

from nablasolve.interop import dprox as client


class Half(dprox.LinOp):
    def forward(self, x, **_):
        return x / 2

    adjoint = forward


def held():
    """Everything that a module of dprox or its table of solvers holds."""
    modules = {name: dict(vars(m)) for name, m in sys.modules.items() if name == "dprox" or name.startswith("dprox.")}
    return modules, dict(dprox.linalg.solve.SOLVERS), least_squares.solve_cg


def test_uninstall_puts_everything_back():
    before = held()
    client.install()
    during = held()
    client.install(warm_start=True)
    client.uninstall()
    client.uninstall()
    assert held() == before
    assert during != before


def test_every_module_gets_the_new_functions():
    client.install()
    for module in (dprox.linalg, dprox.linalg.custom, dprox.proxfn.sum_square):
        assert module.linear_solve is not linear_solve
    assert set(dprox.linalg.solve.SOLVERS) >= {"cg", "cg2", "pcg", "minres", "plss", "plssw", "gmres", "bicgstab"}
    assert all("nablasolve" in solver.__func__.__module__ for solver in dprox.linalg.solve.SOLVERS.values())
    assert dprox.algo.lp.solvers.pcg is dprox.linalg.custom.pcg


def test_a_function_that_was_imported_earlier_comes_here_as_well():
    records = []
    client.install(record=records.append)
    b = torch.ones(4, dtype=torch.float64)
    assert torch.equal(linear_solve(Half(), b), 2 * b)
    assert len(records) == 1


def test_a_solver_of_somebody_else_runs_as_it_is(monkeypatch):
    monkeypatch.setitem(dprox.linalg.solve.SOLVERS, "mine", lambda A, b, rtol, max_iters, verbose, factor: factor * b)
    client.install()
    b = torch.ones(4)
    x = dprox.linalg.linear_solve(Half(), b, LinearSolveConfig(solver_type="mine", solver_kwargs=dict(factor=3)))
    assert torch.equal(x, 3 * b)


@pytest.mark.parametrize("name", ["on_failure", "on_adjoint_failure"])
def test_an_unknown_policy_is_named_and_changes_nothing(name):
    with pytest.raises(ValueError, match=name):
        client.install(**{name: "shout"})
    assert dprox.linalg.linear_solve is linear_solve
