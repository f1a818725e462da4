"""The benchmark measures what it says: its systems are right in every form, and wrong answers are found out."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import adapters, fence, floor, imaging, measure, memory, report, workloads
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
    for name in ("floor", "nablasolve", *(() if workload.hermitian else ("nablasolve-autograd",))):
        posed = ADAPTERS[name].pose(workload, Request(rtol))
        x, gradient, rhs_gradient = posed.gradient(workload.theta, workload.b, workload.cotangent)
        # of least squares, the rule of this library is another one, and its tolerance is found by trying
        assert workload.true_residual(x) < (1e-8 if workload.least_squares else 1.05 * rtol)
        gradients.append((gradient, rhs_gradient))
    for ours in gradients[1:]:
        for mine, theirs in zip(ours, gradients[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())


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
    close(workload.recorded(theta)(v), product)
    close(workload.fused(theta)(v), product)
    close(workload.fused_transposed(theta)(w), transposed)
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
    assert page.count("\n| nablasolve |") == page.count("\n| floor |") == 1 + len(kinds)  # in the summary, and in each section
    assert report.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    noisy = [dataclasses.replace(row, forward_ratio=-0.5) for row in results.rows]  # a difference of two times
    assert report.plot(dataclasses.replace(results, rows=noisy), tmp_path / "noisy.png")


def test_results_are_joined_and_summed_up(quick):
    libraries = [ADAPTERS[name] for name in ("floor", "nablasolve", "scipy")]
    both = measure.measure([workloads.Diffusion, workloads.Deconvolution], libraries, "tiny", 1, memory=False, copied=1)
    again = measure.measure([workloads.Deconvolution, workloads.DenseSmall], libraries[:2], "tiny", 1, memory=False, copied=1)
    joined = both.joined(again)
    assert [fact["workload"] for fact in joined.facts] == ["W1", "W2", "W8"]
    assert [row for row in joined.rows if row.workload == "W1"] == both.rows[:3]
    assert [row for row in joined.rows if row.workload == "W2"] == again.rows[:2]
    head, _, *lines = report.summary(joined).splitlines()
    assert head == "| library | W1 | W2 | W8 |"
    assert [line.split(" | ")[0] for line in lines] == ["| floor", "| nablasolve", "| scipy"]
    assert lines[0] == "| floor | 1.00 / 1.00 | 1.00 / 1.00 | 1.00 |"
    assert lines[2].endswith(" | – | – |")  # it was in neither of the two, and is not measured here
    ours = both.rows[1]
    assert f"{ours.forward_ratio:.2f} / {ours.gradient_ratio:.2f}" in lines[1]


def test_the_readme_shows_the_results_that_are_kept():
    root = Path(__file__).parents[1]
    results = measure.Results.from_json((root / "docs/benchmark/results.json").read_text(encoding="utf-8"))
    assert report.summary(results) in (root / "README.md").read_text(encoding="utf-8")
    assert report.markdown(results) == (root / "docs/benchmark/results.md").read_text(encoding="utf-8")
    assert (root / "docs/benchmark/plot.png").stat().st_size > 10_000


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


class NoGradient(Floor):
    name = "no gradient"

    def pose(self, workload, request):
        def gradient(*arrays):
            raise MemoryError

        return Posed(super().pose(workload, request).forward, gradient)


class Hangs(Floor):
    name = "hangs"

    def pose(self, workload, request):
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # as a library may that hides errors
                continue


def test_a_gradient_that_fails_or_is_wrong_leaves_the_time_of_the_solution(quick):
    results = measure.measure(
        [workloads.Diffusion], [Floor(), NoGradient(), WrongGradient()], "tiny", 1, memory=False, copied=1
    )
    _, none, wrong = results.rows
    assert none.status == "gradient fails: out of memory"
    assert wrong.status == "wrong gradient"
    for row in (none, wrong):
        assert row.forward_ratio is not None
        assert row.gradient is row.gradient_ratio is None


def test_a_library_that_takes_too_long_is_over_and_the_others_go_on(quick):
    kinds = [workloads.Diffusion, workloads.DenseSmall, workloads.DriftingDiffusion]
    results = measure.measure(kinds, [Hangs(), Floor()], "tiny", 1, memory=False, copied=1, limit=0.5)
    assert [row.status for row in results.rows if row.library == "hangs"] == ["over 0.5 s"] * 3
    assert [row.status for row in results.rows if row.library == "floor"] == ["ok"] * 3
    assert "| over 0.5 s |" in report.markdown(results)


def test_a_slow_library_is_sampled_in_fewer_rounds():
    slow, quick = (measure.Task(measure.Sample(), lambda: None, 1, seconds) for seconds in (4.0, 0.1))
    queue = measure.Rounds(5, 10.0)
    for task in (slow, quick):
        assert queue.set_up(measure.Row("W1", 1, "a library"), lambda task=task: [task])
    queue.run()
    assert (len(slow.sample.wall), len(quick.sample.wall)) == (2, 5)
    slow.sample.wall[:], quick.sample.wall[:] = [2.0, 4.0], [1.0, 1.0, 9.0, 9.0, 9.0]
    assert slow.sample.ratio(quick.sample) == 3.0  # of the rounds that both have
    assert "once" in report.seconds(measure.Sample([1.0], [1.0]))


def test_the_alarm_is_off_afterwards_and_there_is_none_in_a_thread():
    with fence.alarm(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(fence.OverTimeError, match=r"over 0\.05 s"), fence.alarm(0.05):
        time.sleep(1)
    ended = []

    def work():
        with fence.alarm(0.05):
            time.sleep(0.1)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is that of Linux")
def test_what_is_more_than_the_free_memory_fails_instead_of_ending_the_process():
    free = fence.kibibytes("/proc/meminfo", "MemAvailable")
    with fence.ceiling(0.5):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(free, dtype=torch.uint8)
        torch.ones(1000)
    assert measure.failure(caught.value) == "fails: out of memory"


def test_an_interruption_loses_one_workload_only(quick):
    kept = []
    kinds = [workloads.Diffusion, workloads.DenseSmall]

    def keep(results):
        kept.append([row.workload for row in results.rows])

    measure.measure(kinds, [Floor()], "tiny", 1, memory=False, copied=1, keep=keep)
    assert kept == [["W1"], ["W1", "W8"]]


class Compiles(Floor):
    name = "compiles"
    module = "numpy"  # torch's own compiler is not meant
    compiles = True

    def pose(self, workload, request):
        right, first = super().pose(workload, request), []

        def slow(function):
            def call(*arrays):
                if not first:
                    first.append(time.sleep(0.3))
                return function(*arrays)

            return call

        return Posed(slow(right.forward), slow(right.gradient), guessed=slow(right.guessed))


def test_compiling_is_told_apart(quick):
    kinds = [workloads.Diffusion, workloads.DenseSmall, workloads.DriftingDiffusion]
    results = measure.measure(kinds, [Floor(), Compiles()], "tiny", 3, memory=False, copied=1)
    for row in results.rows:
        assert (row.compiling is None) == (row.library == "floor")
    assert all(0.2 < row.compiling < 2 for row in results.rows if row.library == "compiles")
    assert all("compiling s" in page for page in report.markdown(results).split("###")[2:])  # after the summary


def test_the_bytes_at_the_bandwidth_stand_beside_the_times(quick):
    results = measure.measure([workloads.Diffusion], [Floor()], "tiny", 1, memory=False, copied=1)
    (row,), (facts,) = results.rows, results.facts
    workload = workloads.Diffusion(16)
    limit = row.iterations * workload.iteration_bytes() / results.machine.bandwidth
    assert facts["seconds at the bandwidth"] == pytest.approx(limit)
    assert row.over_bandwidth == pytest.approx(row.forward.median / limit)


def test_this_library_compiled_is_unavailable_until_it_has_the_keyword(quick, monkeypatch):
    monkeypatch.setattr(adapters.NablasolveCompiled, "extra", {"no_such_keyword": True})
    monkeypatch.setattr(adapters.NablasolveCompiled, "missing", lambda self: adapters.lacks_keyword("no_such_keyword"))
    results = measure.measure([workloads.Diffusion], [ADAPTERS["nablasolve-compiled"]], "tiny", 1, memory=False, copied=1)
    assert results.rows[0].status == "has no no_such_keyword= yet"
    assert adapters.lacks_keyword("rtol") is None


def test_this_library_compiled_agrees_with_the_floor():
    adapter, workload = ADAPTERS["nablasolve-compiled"], workloads.Diffusion(8, torch.float64)
    if adapter.missing() is not None:
        pytest.skip(adapter.missing())
    arrays = (workload.theta, workload.b, workload.cotangent)
    ours, theirs = (ADAPTERS[name].pose(workload, Request(1e-10)).gradient(*arrays) for name in (adapter.name, "floor"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize("kind", [workloads.Diffusion, workloads.SuperResolution], ids=lambda kind: kind.key)
def test_the_floor_calls_what_its_product_is_replaced_by(kind, monkeypatch):
    replaced = []
    monkeypatch.setattr(torch, "compile", lambda product: replaced.append(product) or product)
    workload = tiny(kind)
    arrays = (workload.theta, workload.b, workload.cotangent)
    # so tight that what is left of rounding, after hundreds of iterations, is far below what is allowed
    ours, theirs = (ADAPTERS[name].pose(workload, Request(1e-12)).gradient(*arrays) for name in ("floor-compiled", "floor"))
    assert len(replaced) >= 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", ["cg", "bicgstab", "cgls", "gmres"])
def test_iterations_are_found_from_products(method):
    products = {"cg": 65, "bicgstab": 130, "cgls": 131, "gmres": 65 + 3}
    assert abs(floor.iterations(method, products[method]) - 65) <= 1


@SOLVES
def test_deepinv_solves_what_it_has_solvers_for(kind):
    workload, adapter = tiny(kind), ADAPTERS["deepinv"]
    if adapter.missing() is not None:
        pytest.skip(adapter.missing())
    if not adapter.supports(workload):
        assert workload.method in ("gmres", "direct")
        return
    x, gradient, rhs_gradient = adapter.pose(workload, Request(1e-8)).gradient(workload.theta, workload.b, workload.cotangent)
    assert workload.true_residual(x) < 1.05e-8
    reference = measure.Reference.of(workload)
    assert measure.distance(rhs_gradient, reference.rhs_gradient) < 1e-4
    if not kind.key.startswith(("W4", "W5")):  # unrolled CG has another derivative where the matrix does not stay symmetric
        assert measure.distance(gradient, reference.gradient) < 1e-4


@SOLVES
def test_dprox_solves_and_differentiates(kind):
    workload, adapter = tiny(kind), ADAPTERS["dprox"]
    if adapter.missing() is not None:
        pytest.skip(adapter.missing())
    if not adapter.supports(workload):
        assert workload.method != "cg"
        return
    x, gradient, rhs_gradient = adapter.pose(workload, Request(1e-8)).gradient(workload.theta, workload.b, workload.cotangent)
    assert workload.true_residual(x) < 1.05e-8
    reference = measure.Reference.of(workload)
    assert measure.distance(rhs_gradient, reference.rhs_gradient) < 1e-5
    assert measure.distance(gradient, reference.gradient) < 1e-5


def test_cola_has_a_gradient_for_its_operator_and_none_for_the_right_hand_side():
    workload, adapter = tiny(workloads.Diffusion), ADAPTERS["cola"]
    if adapter.missing() is not None:
        pytest.skip(adapter.missing())
    _, gradient, rhs_gradient = adapter.pose(workload, Request(1e-8)).gradient(workload.theta, workload.b, workload.cotangent)
    assert rhs_gradient is None
    assert measure.distance(gradient, measure.Reference.of(workload).gradient) < 1e-5


def test_the_module_for_dprox_is_the_operator_and_its_transpose_a_copy():
    workload = tiny(workloads.ConvectionDiffusion)
    A = imaging.DifferentiableModule(workload.theta, workload.operator, workload.recorded, workload.transposed)
    close = torch.testing.assert_close
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            close(A(workload.b), workload.operator(workload.theta)(workload.b))
        with torch.no_grad():
            close(A.T(workload.b), workload.transposed(workload.theta)(workload.b))
    assert A.clone().theta is not A.theta


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
