"""The example of Darcy's law: its gradient is right, and it finds the permeability."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def darcy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("darcy", Path(__file__).parents[1] / "examples" / "darcy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(darcy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("darcy") / "darcy.png"
    return darcy.main(out=str(out), size=12, steps=8), out


def test_remainders_have_slopes_one_and_two(run: tuple[dict[str, Any], Path]) -> None:
    first, second = run[0]["slopes"]
    assert len(first) == len(second) == 4
    assert all(abs(slope - 1) < 0.1 for slope in first)
    assert all(abs(slope - 2) < 0.1 for slope in second)


def test_a_wrong_gradient_has_no_second_slope(darcy: ModuleType) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, m: Tensor) -> Tensor:
            ctx.save_for_backward(m)
            return m.square().sum()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2.02 * ctx.saved_tensors[0] * gradient  # one per cent too much

    m = torch.linspace(1, 2, 5, dtype=torch.float64)
    slopes = darcy.taylor_test(Wrong.apply, m, torch.ones_like(m), h=1e-4)["slopes"][1]
    assert all(abs(slope - 1) < 0.1 for slope in slopes)


def test_the_misfit_falls_twentyfold_and_the_picture_is_written(run: tuple[dict[str, Any], Path]) -> None:
    result, out = run
    assert result["misfits"][-1] < result["misfits"][0] / 20
    assert result["error"] < 0.6
    assert result["truth"].shape == result["estimate"].shape == (12, 12)
    assert out.read_bytes().startswith(b"\x89PNG")
