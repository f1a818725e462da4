"""The examples of magnetic resonance imaging and tomography: their gradients are right, and learning helps."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nablasolve.operators import LinearOperator, Radon


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mri_is_better_than_zero_filling_and_better_for_learning(tmp_path: Path) -> None:
    measured = example("mri").main(out=str(tmp_path / "mri.png"), size=48, steps=4)
    assert measured["psnr_after"] > measured["psnr_zero_filled"] + 1.5
    assert measured["psnr_after"] > measured["psnr_before"] + 1.5
    assert measured["weight_after"] > 2 * measured["weight_before"]
    assert (tmp_path / "mri.png").stat().st_size > 10_000


def test_ct_is_better_than_back_projection_and_better_for_learning(tmp_path: Path) -> None:
    measured = example("ct").main(out=str(tmp_path / "ct.png"), size=48, views=24, steps=4)
    assert measured["psnr_after"] > measured["psnr_back_projection"] + 3
    assert measured["psnr_after"] > measured["psnr_before"] + 1.5
    assert measured["weight_after"] > 2 * measured["weight_before"]
    assert (tmp_path / "ct.png").stat().st_size > 10_000


def mri_problem(module: ModuleType) -> tuple[LinearOperator, Tensor, Tensor]:
    size = 16
    truth = module.slice_of("camera.png", size).to(torch.complex128)
    E = module.encoding(module.sampling_mask(size, 2), module.coil_maps(4, size)).to(torch.float64)
    return E, truth, E(truth) + 0.01


def ct_problem(module: ModuleType) -> tuple[LinearOperator, Tensor, Tensor]:
    truth = module.slice_of("camera.png", 16).double()
    R = Radon((16, 16), torch.arange(9, dtype=torch.float64) * (math.pi / 9))
    return R, truth, R(truth) + 0.1


@pytest.mark.parametrize(("name", "problem"), [("mri", mri_problem), ("ct", ct_problem)])
def test_the_gradient_of_the_weight_is_that_of_finite_differences(
    name: str, problem: Callable[[ModuleType], tuple[LinearOperator, Tensor, Tensor]]
) -> None:
    module = example(name)
    A, truth, y = problem(module)

    def loss(log_weight: Tensor) -> Tensor:
        x = module.reconstruct(A, y, log_weight.exp(), rtol=1e-12)
        return (x - truth).abs().square().mean().log()

    at = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(at), at)
    with torch.no_grad():
        slope = (loss(at + 1e-4) - loss(at - 1e-4)) / 2e-4
    assert abs(float(slope)) > 1e-3
    assert abs(float(gradient - slope)) < 1e-6 * abs(float(slope))
