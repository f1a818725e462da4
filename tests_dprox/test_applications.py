"""20 steps of ADMM: not more applications of dprox's operator than dprox makes, and far fewer with warm starts."""

import functools

import pytest
import torch
from dprox.algo.admm import ADMM
from dprox.linalg import LinearSolveConfig
from problems import PROBLEMS, Count, deconvolution, variation

from nablasolve.interop import dprox as client

CONVERGED = dict(rtol=1e-6, max_iters=2000)


@functools.cache
def dprox_alone(name):
    client.uninstall()
    problem = PROBLEMS[name]()
    return problem, problem.run(**CONVERGED)


@pytest.mark.parametrize("name", PROBLEMS)
def test_converged_solves_cost_no_more_applications_at_the_same_objective(name):
    problem, (_, theirs, _, their_count) = dprox_alone(name)
    records = []
    client.install(record=records.append)
    _, ours, _, our_count = problem.run(**CONVERGED)
    print(f"\n{name}: dprox {their_count} applications, objective {theirs:.6f}; here {our_count}, {ours:.6f}")
    assert our_count <= their_count
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert len(records) == 20
    assert all(info.converged for info in records)
    assert sum(info.matvecs for info in records) == our_count


@pytest.mark.parametrize(("steps", "applications", "loss"), [(5, 140, 0.15), (4, 120, 0.2)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_with_warm_starts_a_few_steps_give_the_same_image_quality(name, steps, applications, loss):
    problem, (_, _, theirs, their_count) = dprox_alone(name)
    _, _, cold, _ = problem.run(rtol=1e-6, max_iters=steps)
    client.install(warm_start=True)
    _, _, ours, our_count = problem.run(rtol=1e-6, max_iters=steps)
    print(f"\n{name}: {their_count} applications, {theirs:.2f} dB; {our_count}, {ours:.2f} dB; {cold:.2f} dB from zero")
    assert our_count <= applications
    assert ours >= theirs - loss
    assert ours > cold


def test_a_gradient_costs_no_application_of_the_forward_solves():
    problem = deconvolution()
    counts = []
    for learn in (False, True):
        x, term = problem.data_term()
        psi, omega = ADMM.partition([term, *variation(x)])
        solver = ADMM(psi, omega, try_diagonalize=False, linear_solve_config=LinearSolveConfig(**CONVERGED))
        rhos = torch.full((5,), problem.rho, requires_grad=learn)
        client.install()
        with Count() as count, torch.set_grad_enabled(learn):
            image = solver.solve(x0=problem.x0.clone(), rhos=rhos, lams=problem.lam, max_iter=5)
        assert image.requires_grad == learn
        counts.append(count.applications)
    assert counts[1] == counts[0]


def test_without_warm_starts_a_few_steps_give_the_image_of_dprox():
    problem = deconvolution()
    theirs, *_, their_count = problem.run(steps=5, max_iters=5)
    client.install()
    ours, *_, our_count = problem.run(steps=5, max_iters=5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert our_count == their_count


def test_warm_starts_leave_nothing_for_the_next_run():
    problem = deconvolution()
    client.install(warm_start=True)
    first, *_ = problem.run(steps=5, max_iters=5)
    second, *_ = problem.run(steps=5, max_iters=5)
    assert torch.equal(first, second)
