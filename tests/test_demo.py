"""The demo: `python -m nablasolve` does what it says, on its small setting; and the plots that it is made with."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from matplotlib.figure import Figure

import nablasolve as ns
from nablasolve import demo
from nablasolve.plot import MIB, plot_memory, plot_residuals


class Run(NamedTuple):
    result: demo.Result
    folder: Path
    stdout: str
    stderr: str
    same_random_state: bool


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    results, stdout, stderr = [], io.StringIO(), io.StringIO()
    original = demo.run
    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.chdir(folder)
        patch.setattr(demo, "run", lambda settings: results.append(original(settings)) or results[-1])
        assert demo.main(["--quick"]) == 0
    same = torch.equal(state, torch.get_rng_state())
    return Run(results[0], folder, stdout.getvalue(), stderr.getvalue(), same)


# -- the main job --------------------------------------------------------------------------------------------------------


def test_one_picture_is_written_into_the_current_directory(quick):
    (picture,) = quick.folder.iterdir()
    assert picture.name == "nablasolve_demo.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 100_000


def test_the_table_goes_to_stdout_and_the_progress_to_stderr(quick):
    for word in (
        "PSNR",
        "lambda",
        "CG iterations",
        "adjoint iterations",
        "gradient error",
        "implicit",
        "unroll",
        "nablasolve_demo.png",
    ):
        assert word in quick.stdout
    assert "learning the kernel" in quick.stderr
    assert "learning" not in quick.stdout


def test_learning_sharpens_what_was_held_out(quick):
    before, after = quick.result.before, quick.result.after
    assert after.psnr > before.psnr + 5
    assert after.psnr > demo.psnr(quick.result.blurred, quick.result.truth) + 5


def test_the_learned_kernel_is_the_true_one(quick):
    truth = quick.result.kernel
    error = [((e.kernel - truth).norm() / truth.norm()).item() for e in (quick.result.before, quick.result.after)]
    assert error[1] < 0.6
    assert error[1] < 0.75 * error[0]


def test_the_gradient_is_that_of_finite_differences(quick):
    assert 0 < quick.result.gradient_error < 1e-6


def test_implicit_memory_is_flat_and_unrolled_memory_grows(quick):
    implicit, unroll = (quick.result.memory[grad] for grad in ("implicit", "unroll"))
    assert max(implicit) - min(implicit) < 8 * MIB
    assert unroll[-1] > 2 * unroll[0]
    assert unroll[-1] > 4 * implicit[-1]


def test_both_residual_curves_end_at_the_tolerance(quick):
    for evaluation in (quick.result.before, quick.result.after):
        records = {"forward": evaluation.info, "adjoint": evaluation.info.adjoint}
        assert evaluation.residuals.keys() == records.keys()
        for phase, record in records.items():
            curve = evaluation.residuals[phase]
            assert record.converged
            assert len(curve) == record.iterations + 1
            assert curve[-1] <= demo.RTOL * curve[0]


def test_the_global_random_state_is_left_alone(quick):
    assert quick.same_random_state


# -- its parts -----------------------------------------------------------------------------------------------------------


def test_a_frame_blurs_its_observed_part_as_the_whole_photograph_does():
    image = torch.rand(64, 72, generator=torch.Generator().manual_seed(0))
    kernel = demo.true_kernel()
    part = (slice(10, 42), slice(20, 50))
    whole = demo.convolve(image, demo.spectrum(kernel, 64, 72))
    frame = demo.convolve(image[part], demo.spectrum(kernel, 32, 30))
    torch.testing.assert_close(demo.observed(frame), demo.observed(whole[part]))
    assert not torch.allclose(frame, whole[part], atol=1e-3)


def test_a_point_blurs_into_the_kernel():
    kernel = demo.true_kernel()
    point = torch.zeros(31, 31)
    point[15, 15] = 1
    image = demo.convolve(point, demo.spectrum(kernel, 31, 31))
    torch.testing.assert_close(image[10:21, 10:21], kernel)
    torch.testing.assert_close(image.sum(), torch.tensor(1.0))


def test_the_system_is_that_of_the_regularised_least_squares_problem():
    generator = torch.Generator().manual_seed(0)
    model = demo.Deblurring().double()
    with torch.no_grad():
        model.logits.copy_(torch.randn(demo.KERNEL, demo.KERNEL, generator=generator))
    y, x = (torch.rand(14, 16, dtype=torch.float64, generator=generator) for _ in range(2))

    def energy(x):
        misfit = demo.observed(demo.convolve(x, demo.spectrum(model.kernel, 14, 16)) - y)
        slopes = [x - x.roll(1, dim) for dim in (0, 1)]
        return (misfit.square().sum() + model.log_weight.exp() * sum(s.square().sum() for s in slopes)) / 2

    A, b = model.system(y)
    torch.testing.assert_close(A(x) - b, torch.func.grad(energy)(x))


def test_memory_is_not_reported_for_a_process_that_failed():
    with pytest.raises(RuntimeError, match="grad='sideways' failed"):
        demo.peak_memory("sideways", 2, 32)


@pytest.mark.parametrize("module", ["matplotlib", "skimage", "tqdm"])
def test_a_missing_extra_is_named_with_its_remedy(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}: pip install "nablasolve\[demo\]"'):
        demo.run(demo.QUICK)


def test_an_impossible_output_is_refused_before_the_work(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--output", str(tmp_path / "nowhere" / "picture.png")])
    assert "not a directory" in capsys.readouterr().err


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nablasolve", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("nablasolve", run_name="__main__")
    assert "--quick" in capsys.readouterr().out


# -- the plots -----------------------------------------------------------------------------------------------------------


def test_a_record_is_drawn_as_its_relative_residuals():
    weights, b = torch.linspace(1, 9, 6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    _, info = ns.solve_ex(lambda v: weights * v, b, method="cg", history=True)
    axes = Figure().subplots()
    plot_residuals(axes, {"forward": info, "given": [2.0, 1.0]}, rtol=1e-8)
    forward, given, tolerance = axes.get_lines()
    torch.testing.assert_close(torch.as_tensor(forward.get_ydata()), info.history / b.norm())
    assert list(given.get_ydata()) == [1.0, 0.5]
    assert set(tolerance.get_ydata()) == {1e-8}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["forward", "given", "tolerance"]


def test_each_system_of_a_batch_is_a_line():
    weights, b = torch.linspace(1, 9, 6), torch.tensor([[1.0], [0.0], [2.0]]).expand(3, 6)
    _, info = ns.solve_ex(lambda v: weights * v, b, method="cg", batch_dims=1, history=True)
    axes = Figure().subplots()
    plot_residuals(axes, {"batch": info})
    finite = [bool(torch.as_tensor(line.get_ydata()).isfinite().all()) for line in axes.get_lines()]
    assert finite == [True, False, True]
    assert len(axes.get_legend().get_texts()) == 1


def test_a_record_without_history_is_refused():
    _, info = ns.solve_ex(lambda v: 2 * v, torch.ones(3), method="cg")
    with pytest.raises(ValueError, match="history=True"):
        plot_residuals(Figure().subplots(), {"forward": info})


def test_memory_is_drawn_in_mebibytes():
    axes = Figure().subplots()
    plot_memory(axes, (50, 200), {"implicit": [3 * MIB, 3 * MIB], "unroll": [40 * MIB, 160 * MIB]})
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[3, 3], [40, 160]]
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[50, 200]] * 2


def test_a_memory_curve_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="expected 2 values, got 1"):
        plot_memory(Figure().subplots(), (50, 200), {"implicit": [1.0]})
