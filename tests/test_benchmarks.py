"""The benchmark measures what it says: its systems are right in every form, and wrong answers are found out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import adapters, floor, measure, memory, report, workloads
from benchmarks.adapters import ADAPTERS, Floor
from benchmarks.posing import Posed, Request

MIB = 2**20
SOLVES = pytest.mark.parametrize("kind", workloads.SOLVES, ids=lambda kind: kind.key)


def tiny(kind: type[workloads.Workload]) -> workloads.Workload:
    return kind(kind.sizes["tiny"][0], torch.float64)


@pytest.fixture
def quick(monkeypatch):
    """One call a sample and few training steps."""
    monkeypatch.setattr(measure, "SHORTEST", 0.0)
    monkeypatch.setattr(measure, "OVERHEAD_ITERATIONS", (2, 4))
    monkeypatch.setattr(workloads.DriftingDiffusion, "STEPS", 2)


@SOLVES
def test_floor_and_this_library_agree(kind):
    workload, rtol = tiny(kind), 1e-10
    gradients = []
    for name in ("floor", "nablasolve"):
        posed = ADAPTERS[name].pose(workload, Request(rtol))
        x, gradient, rhs_gradient = posed.gradient(workload.theta, workload.b, workload.cotangent)
        # of least squares, the rule of this library is another one, and its tolerance is found by trying
        assert workload.true_residual(x) < (1e-8 if workload.least_squares else 1.05 * rtol)
        gradients.append((gradient, rhs_gradient))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())


@SOLVES
def test_gradient_of_the_floor_is_that_of_finite_differences(kind):
    assert measure.Reference.of(tiny(kind)).finite_differences < 1e-6


@SOLVES
def test_every_form_of_the_operator_is_the_same(kind):
    workload = tiny(kind)
    theta, v, w = workload.theta, workload.cotangent, workload.b + 1
    product, transposed = (torch.from_numpy(f(u.numpy())) for f, u in zip(workload.exact_product(), (v, w), strict=True))
    close = torch.testing.assert_close
    close(workload.operator(theta)(v), product)
    close(workload.transposed(theta)(w), transposed)
    matrix = workload.matrix(theta)
    if matrix is not None:
        close(torch.matmul(matrix, v if workload.batch_dims == 0 else v[..., None]).reshape(v.shape), product)
    of_numpy = workload.numpy_operator(theta.numpy())
    if of_numpy is not None:
        close(torch.from_numpy(of_numpy[0](v.numpy().ravel())).reshape(product.shape), product)
        close(torch.from_numpy(of_numpy[1](w.numpy().ravel())).reshape(transposed.shape), transposed)
        pulled = workload.numpy_pullback(theta.numpy(), w.numpy().ravel(), v.numpy().ravel())
        close(torch.from_numpy(np.asarray(pulled)).reshape(theta.shape), workload.pullback(theta, w, v))


@SOLVES
def test_jax_has_the_same_operator(kind):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    workload = tiny(kind)
    theta, v = workload.theta.numpy(), workload.cotangent.numpy()
    product = jax.vmap(workload.jax_product) if workload.batch_dims else workload.jax_product
    torch.testing.assert_close(
        torch.from_numpy(np.array(product(theta, v))), workload.operator(workload.theta)(workload.cotangent)
    )


@pytest.mark.parametrize("kind", [workloads.StiffDiffusion, workloads.DenseSmall])
def test_a_set_number_of_iterations_is_run(kind):
    workload = tiny(kind)
    request = Request(0.0, 150, counts=True)
    ADAPTERS["floor"].pose(workload, request).forward(workload.theta, workload.b)
    assert request.products() == 150
    posed = ADAPTERS["nablasolve"].pose(workload, Request(0.0, 150))
    posed.forward(workload.theta, workload.b)
    assert posed.iterations() == 150


def test_the_report_has_a_row_for_each_and_json_round_trips(quick, tmp_path):
    kinds = [kind for kind in workloads.WORKLOADS.values() if kind is not workloads.StiffDiffusion]
    chosen = [ADAPTERS[name] for name in ("floor", "nablasolve")]
    results = measure.measure(kinds, chosen, "tiny", 1, memory=False, copied=1)
    assert [(r.workload, r.library) for r in results.rows] == [(k.key, a.name) for k in kinds for a in chosen]
    assert [r.status for r in results.rows] == ["ok"] * len(results.rows)
    assert measure.Results.from_json(results.to_json()) == results
    page = report.markdown(results)
    assert page.count("\n| nablasolve |") == page.count("\n| floor |") == len(kinds)
    assert report.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    noisy = [dataclasses.replace(row, forward_ratio=-0.5) for row in results.rows]  # a difference of two times
    assert report.plot(dataclasses.replace(results, rows=noisy), tmp_path / "noisy.png")


class NotThere(Floor):
    name = "not there"
    module = "no_such_module_anywhere"


class WrongGradient(Floor):
    name = "wrong gradient"

    def pose(self, workload, request):
        right = super().pose(workload, request)

        def gradient(*arrays):
            x, g, gb = right.gradient(*arrays)
            return x, 1.01 * g, gb

        return Posed(right.forward, gradient)


class Loose(Floor):
    name = "loose"

    def pose(self, workload, request):
        return super().pose(workload, Request(10 * request.rtol))


class Raises(Floor):
    name = "raises"

    def pose(self, workload, request):
        raise ArithmeticError("no such luck")


def test_what_is_wrong_or_missing_is_reported(quick):
    cheats = [Floor(), NotThere(), WrongGradient(), Loose(), Raises()]
    results = measure.measure([workloads.Diffusion], cheats, "tiny", 1, memory=False, copied=1)
    said = {row.library: row.status for row in results.rows}
    assert said == {
        "floor": "ok",
        "not there": "not installed",
        "wrong gradient": "wrong gradient",
        "loose": "misses the tolerance",
        "raises": "fails: ArithmeticError: no such luck",
    }
    assert "| not there | – |" in report.markdown(results)


def test_of_a_message_the_line_that_names_the_error_is_shown():
    assert (
        measure.gist("JaxError: Traceback\n  File x\nlib._Error: not finite\n-----\nfor more see") == "lib._Error: not finite"
    )
    assert measure.gist("no error is named") == "no error is named"


def test_memory_is_measured_at_about_the_number_of_iterations_that_is_asked_for():
    workload = tiny(workloads.StiffDiffusion)
    request = Request(memory.tolerance(workload, 20), counts=True)
    ADAPTERS["floor"].pose(workload, request).forward(workload.theta, workload.b)
    assert 15 <= request.products() <= 21


def test_unrolling_is_seen_to_need_memory():
    size, iterations = 128, 60
    kept = memory.main("W7", size, "floor", iterations, True)
    assert kept > iterations * size * size * 8  # a vector an iteration at least
    assert memory.main("W7", size, "floor", iterations, False) < kept / 4


def test_the_unrolled_floor_is_the_floor_and_has_its_own_gradient():
    workload = workloads.Diffusion(4, torch.float64)
    theta, b = workload.theta.requires_grad_(), workload.b.requires_grad_()
    torch.testing.assert_close(
        floor.unrolled_cg(workload.operator(theta), b, 4).detach(),
        floor.cg(workload.operator(theta.detach()), b.detach(), 0.0, 4),
    )
    assert torch.autograd.gradcheck(lambda t, b: floor.unrolled_cg(workload.operator(t), b, 4), (theta, b))


def test_bytes_of_an_iteration_are_those_of_the_textbook():
    workload = tiny(workloads.Diffusion)
    assert workload.iteration_bytes() == (12 + 4) * workload.b.nbytes


def test_workloads_are_chosen_by_key_or_family():
    assert [k.key for k in measure.chosen(["W3", "W5"])] == ["W3-gmres", "W3-bicgstab", "W5"]
    assert len(measure.chosen(None)) == len(workloads.WORKLOADS)
    with pytest.raises(ValueError, match="W12"):
        measure.chosen(["W12"])


def test_every_adapter_has_its_name():
    assert all(name == adapter.name for name, adapter in adapters.ADAPTERS.items())
