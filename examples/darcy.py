"""Find the permeability of the ground from a few pressures: `python examples/darcy.py`.

Darcy's law and the conservation of water say

    -div(exp(m) grad p) = f,    p = 0 on the border,

for the logarithm `m` of the permeability, the pressure `p` and what the wells inject, `f`. Water is injected at one well
after the other, and a few sensors record the pressure. The estimate is the most probable `m` given the records, whose noise
has a known size, and a Gaussian prior: fields `m = L w` with white noise `w` and a smoothing `L`. L-BFGS finds it; the gradient
comes from backpropagation through `nablasolve.solve`.

A Taylor test says whether that gradient is right: `|J(m + h dm) - J(m)|` shrinks like `h`, and
`|J(m + h dm) - J(m) - h J'(m) dm|` like `h^2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import nablasolve as ns
from nablasolve.operators import Diffusion

SEED = 0
WELLS = ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))  # in a square of side 1
SENSORS = 6  # in each direction
NOISE = 0.005  # of the largest pressure
SMOOTHNESS = 0.12  # correlation length of the prior, as a fraction of the side
SPREAD = 1.0  # standard deviation of the logarithm


def pressures(m: Tensor, f: Tensor) -> Tensor:
    """The pressure for each of several injections `f`, of shape `(wells, n, n)`."""
    A = Diffusion(m.exp(), spacing=1 / m.shape[-1], positive_definite=True)
    return ns.solve(A, f, batch_dims=1, rtol=1e-10)


def injections(n: int) -> Tensor:
    """For each well a Gaussian source of total strength 1."""
    x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    sources = [torch.exp(-((x - a)[:, None] ** 2 + (x - b) ** 2) / (2 * 0.05**2)) for a, b in WELLS]
    return torch.stack([source / source.mean() for source in sources])


def prior(w: Tensor) -> Tensor:
    """`L w`: white noise, smoothed to a field of standard deviation `SPREAD`; around the edges it is periodic."""
    n = w.shape[-1]
    k = 2 * math.pi * torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
    amplitude = torch.exp(-(k[:, None] ** 2 + k**2) * SMOOTHNESS**2 / 4)
    amplitude = SPREAD * amplitude / amplitude.square().mean().sqrt()
    return torch.fft.ifft2(amplitude * torch.fft.fft2(w)).real


def taylor_test(J: Callable[[Tensor], Tensor], m: Tensor, dm: Tensor, h: float = 1e-2, halvings: int = 4) -> dict[str, Any]:
    """The remainders of first and second order of `J` at `m` in the direction `dm`, and the slopes of their logarithms.

    Args:
        J: a function with a scalar value.
        m: where it is expanded.
        dm: a direction.
        h: the largest step.
        halvings: how often it is halved.
    """
    m = m.detach().requires_grad_()
    J0 = J(m)
    derivative = (torch.autograd.grad(J0, m)[0] * dm).sum()
    steps = [h / 2**i for i in range(halvings + 1)]
    with torch.no_grad():
        change = torch.stack([J(m + step * dm) - J0 for step in steps])
    remainders = change.abs(), (change - torch.tensor(steps) * derivative).abs()
    slopes = [torch.log2(r[:-1] / r[1:]).tolist() for r in remainders]
    return {"steps": steps, "remainders": [r.tolist() for r in remainders], "slopes": slopes}


def main(out: str = "darcy.png", size: int = 40, steps: int = 40) -> dict[str, Any]:
    """Estimate the permeability, and draw it.

    Args:
        out: where the picture is written.
        size: cells on a side of the square.
        steps: of L-BFGS.

    Returns:
        `truth` and `estimate` (fields of log-permeability), `misfits` (one an evaluation, in units of the noise), the
        relative `error` of the estimate, and the `slopes` of the Taylor test at `m = 0`.
    """
    generator = torch.Generator().manual_seed(SEED)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    truth, f = prior(noise(size, size)), injections(size)
    at = ((torch.arange(SENSORS) + 0.5) * size / SENSORS).long()

    def sensors(p: Tensor) -> Tensor:
        return p[:, at[:, None], at]

    with torch.no_grad():
        clean = sensors(pressures(truth, f))
    sigma = NOISE * clean.max()
    records = clean + sigma * noise(*clean.shape)

    def misfit(m: Tensor) -> Tensor:
        """Half of the mean squared misfit, in units of the noise."""
        return ((sensors(pressures(m, f)) - records) / sigma).square().mean() / 2

    w = torch.zeros(size, size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=steps, max_eval=2 * steps, line_search_fn="strong_wolfe")
    misfits = []

    def objective() -> Tensor:
        optimizer.zero_grad()
        fit = misfit(prior(w))
        # the negative logarithm of the posterior density, divided by the number of records
        loss = fit + w.square().sum() / 2 / records.numel()
        loss.backward()
        misfits.append(fit.item())
        return loss

    optimizer.step(objective)
    estimate = prior(w.detach())
    taylor = taylor_test(misfit, torch.zeros_like(truth), prior(noise(size, size)))
    with torch.no_grad():
        draw(out, truth, estimate, pressures(estimate, f)[0], at, misfits)
    error = float(torch.linalg.vector_norm(estimate - truth) / torch.linalg.vector_norm(truth))
    return {"truth": truth, "estimate": estimate, "misfits": misfits, "error": error, "slopes": taylor["slopes"]}


def draw(out: str, truth: Tensor, estimate: Tensor, pressure: Tensor, at: Tensor, misfits: list[float]) -> None:
    """Truth, estimate, one pressure with the sensors, and the misfit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.6), layout="constrained")
    axes = figure.subplots(1, 4)
    limit = float(truth.abs().max())
    for ax, field, title in zip(axes, (truth, estimate), ("log-permeability: truth", "estimate"), strict=False):
        image = ax.imshow(field.mT.numpy(), origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set_title(title)
        figure.colorbar(image, ax=ax)
    image = axes[2].imshow(pressure.mT.numpy(), origin="lower", cmap="viridis")
    grid = torch.cartesian_prod(at, at).mT.numpy()
    axes[2].plot(*grid, "w.", markersize=4)
    axes[2].set_title("pressure of one well, and the sensors")
    figure.colorbar(image, ax=axes[2])
    for ax in axes[:3]:
        ax.set_xticks([])
        ax.set_yticks([])
    axes[3].semilogy(misfits)
    axes[3].axhline(0.5, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)), label="the noise")
    axes[3].set_xlabel("evaluation")
    axes[3].set_title("misfit")
    axes[3].legend()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    result = main()
    print(f"misfit {result['misfits'][0]:.1f} -> {result['misfits'][-1]:.2f} (0.5 is the noise)")
    print(f"relative error of the log-permeability: {result['error']:.2f}")
    first, second = result["slopes"]
    print(f"Taylor test: slopes {first[-1]:.3f} and {second[-1]:.3f}")
    print("wrote darcy.png")
