"""Train a small network by Gauss-Newton steps that form no matrix: `python examples/gauss_newton.py`.

Levenberg and Marquardt's step for the loss `|f(w) - y|^2 / 2` of a model with parameters `w` solves

    (J^T J + μ I) dw = -gradient,

with the Jacobian `J` of the outputs. Here it is solved by conjugate gradients, for which `GaussNewton` multiplies by `J` and
`J^T`. The damping μ shrinks after a step that lowers the loss; after one that does not, it grows and the step is taken back.
Adam trains the same network from the same start for comparison. The tolerance and the limit of the conjugate gradients
and the number of steps were tuned for this problem; with other settings the two came out nearly equal.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import nablasolve as ns
from nablasolve.operators import GaussNewton

SEED = 0


def truth(x: Tensor) -> Tensor:
    """The function to fit."""
    return torch.sin(3 * x) + 0.3 * torch.sin(15 * x)


def half_squares(y: Tensor, target: Tensor) -> Tensor:
    """The loss, a convex function of the outputs."""
    return (y - target).square().mean() / 2


def train_by_gauss_newton(model: nn.Module, x: Tensor, target: Tensor, steps: int) -> tuple[list[float], list[int]]:
    """Train in place; returns the losses, and how many gradients and products with the matrix led to each."""
    damping, losses, costs = 1e-2, [], [0]
    parameters = dict(model.named_parameters())

    def loss_of(outputs: Tensor) -> Tensor:
        return half_squares(outputs, target)

    for _ in range(steps):
        loss = loss_of(model(x))
        losses.append(loss.item())
        gradient = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        A = GaussNewton.of_module(model, x, loss_of, damping=damping, positive_semidefinite=True)
        with torch.no_grad():
            # a step need not be solved accurately, and so may end before it is
            step, info = ns.solve_ex(A, gradient, rtol=1e-3, maxiter=200)
            costs.append(costs[-1] + 1 + int(info.iterations))
            before = {name: p.clone() for name, p in parameters.items()}
            for name, p in parameters.items():
                p -= step[name]
            if loss_of(model(x)) < loss:
                damping /= 3
            else:
                damping *= 4
                for name, p in parameters.items():
                    p.copy_(before[name])
    losses.append(loss_of(model(x)).item())
    return losses, costs


def train_by_adam(model: nn.Module, x: Tensor, target: Tensor, steps: int) -> list[float]:
    """Train in place; returns the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps + 1):
        loss = half_squares(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def main(out: str | None = "gauss_newton.png", points: int = 128, width: int = 24, steps: int = 100) -> dict[str, Any]:
    """Train, compare, draw.

    Args:
        out: where the picture is written, or None.
        points: how many samples of the function there are.
        width: of the hidden layers.
        steps: of Gauss-Newton. Adam takes as many gradients as these steps take gradients and products.

    Returns:
        `losses` and `adam_losses`, one before each step and one after the last, and `costs`, of Gauss-Newton: how many
        gradients and products with the matrix had been computed by then.
    """
    generator = torch.Generator().manual_seed(SEED)
    x = torch.linspace(-1, 1, points, dtype=torch.float64)[:, None]
    target = truth(x)
    model = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
        model[0].weight.mul_(4)
    other = copy.deepcopy(model)
    losses, costs = train_by_gauss_newton(model, x, target, steps)
    adam_losses = train_by_adam(other, x, target, costs[-1])
    if out is not None:
        with torch.no_grad():
            fits = {"Gauss-Newton": model(x), "Adam": other(x)}
        draw(out, x, target, fits, {"Gauss-Newton": (costs, losses), "Adam": (range(costs[-1] + 1), adam_losses)})
    return {"losses": losses, "adam_losses": adam_losses, "costs": costs}


def draw(out: str, x: Tensor, target: Tensor, fits: dict[str, Tensor], curves: dict[str, Any]) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(x, target, color="#999999", linewidth=4, label="truth")
    for name, fit in fits.items():
        left.plot(x, fit, linewidth=1.6, label=name)
        right.semilogy(*curves[name], label=name)
    left.legend(frameon=False)
    right.set_xlabel("gradients and products with the matrix")
    right.set_ylabel("loss")
    right.legend(frameon=False)
    figure.savefig(out)


if __name__ == "__main__":
    result = main()
    gradients = len(result["losses"]) - 1
    print(f"Gauss-Newton: loss {result['losses'][0]:.2e} -> {result['losses'][-1]:.2e}")
    print(f"              by {gradients} gradients and {result['costs'][-1] - gradients} products with the matrix")
    print(f"Adam:         loss {result['adam_losses'][0]:.2e} -> {result['adam_losses'][-1]:.2e}")
    print(f"              by {len(result['adam_losses']) - 1} gradients")
