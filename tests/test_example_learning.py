"""The examples of learning: a network trained by Gauss-Newton steps, and labels that propagate through a graph."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import nablasolve as ns

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("gauss_newton") / "picture.png"
    return example("gauss_newton").main(out=str(out), points=48, width=10, steps=25), out


@pytest.fixture(scope="module")
def propagated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("label_propagation") / "picture.png"
    return example("label_propagation").main(out=str(out)), out


def test_gauss_newton_lowers_the_loss_and_never_raises_it(trained: tuple[dict[str, Any], Path]) -> None:
    losses = trained[0]["losses"]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0] / 30


def test_gauss_newton_gets_further_than_adam_at_the_same_cost(trained: tuple[dict[str, Any], Path]) -> None:
    result = trained[0]
    assert len(result["adam_losses"]) == result["costs"][-1] + 1
    assert result["losses"][-1] < result["adam_losses"][-1]


def test_the_step_is_that_of_the_dense_matrix() -> None:
    module = example("gauss_newton")
    model = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    for i, p in enumerate(model.parameters()):
        p.data = torch.linspace(-1, 1, p.numel(), dtype=torch.float64).view(p.shape) * (4 - i) / 4
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    target = module.truth(x)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    rows = []
    for y in model(x).reshape(-1):
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(y, list(model.parameters()), retain_graph=True)]))
    J, residual = torch.stack(rows), (model(x) - target).detach().reshape(-1)
    step = torch.linalg.solve(J.mT @ J / 9 + 1e-2 * torch.eye(len(before), dtype=torch.float64), J.mT @ residual / 9)
    module.train_by_gauss_newton(model, x, target, 1)
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert (before - after - step).norm() < 1e-2 * step.norm()  # the solve is only as accurate as the step needs


def test_learned_weights_lower_the_leave_one_out_loss_and_predict_better(propagated: tuple[dict[str, Any], Path]) -> None:
    result = propagated[0]
    assert result["losses"][-1] < 0.6 * result["losses"][0]
    assert result["accuracy_after"] > result["accuracy_before"] > 0.9
    assert 0 < result["alpha"] < 1


def test_accuracy_is_that_of_the_club_attribute(propagated: tuple[dict[str, Any], Path]) -> None:
    import networkx

    module, result = example("label_propagation"), propagated[0]
    graph = networkx.karate_club_graph()
    right = [(result["prediction"][i] > 0) == (graph.nodes[i]["club"] == "Mr. Hi") for i in graph if i not in module.LABELLED]
    assert len(right) == 26
    assert result["accuracy_after"] == pytest.approx(sum(map(bool, right)) / 26)


def test_the_propagation_operator_is_the_dense_matrix_and_learns_its_weights() -> None:
    module = example("label_propagation")
    _, edges, _, sides = module.karate_club()
    n, weights = len(sides), torch.linspace(1, 2, edges.shape[1], dtype=torch.float64)
    alpha = torch.tensor(0.7, dtype=torch.float64)

    def dense(weights: Tensor, alpha: Tensor) -> Tensor:
        W = torch.zeros(n, n, dtype=torch.float64).index_put((edges[0], edges[1]), weights)
        W = W + W.mT
        return torch.eye(n, dtype=torch.float64) - alpha * W / (W.sum(0)[:, None] * W.sum(0)).sqrt()

    A = module.propagation(edges, weights, alpha, n)
    assert (A.to_dense() - dense(weights, alpha)).abs().max() < 1e-14
    assert A.positive_definite
    inputs = weights.requires_grad_(), alpha.requires_grad_()
    got = torch.autograd.grad(ns.solve(module.propagation(edges, *inputs, n), sides, rtol=1e-13).square().sum(), inputs)
    wanted = torch.autograd.grad((torch.linalg.inv(dense(*inputs)) @ sides).square().sum(), inputs)
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).abs().max() < 1e-9 * w.abs().max()


@pytest.mark.parametrize("which", ["trained", "propagated"])
def test_a_picture_is_written(which: str, request: pytest.FixtureRequest) -> None:
    picture = request.getfixturevalue(which)[1]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def test_an_example_runs_as_a_script(tmp_path: Path) -> None:
    script = [sys.executable, "-W", "error", str(EXAMPLES / "label_propagation.py")]
    printed = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "accuracy after" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["label_propagation.png"]
