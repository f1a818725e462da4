"""A slice of computed tomography from few angles, with a learned regularisation: `python examples/ct.py`.

A scanner measures line integrals of an image, `y = R x + noise`. From fewer angles than a filtered back-projection needs, the
image is reconstructed by

    x = (R^T R + λ D^T D)^{-1} R^T y,

where `D` takes differences between neighbouring pixels; λ is learned by backpropagation through that solve on one slice, and
tried on another.
"""

from __future__ import annotations

import importlib.resources
import math

import torch
from torch import Tensor

import nablasolve as ns
from nablasolve.operators import Gradient, LinearOperator, Radon

SEED = 0
NOISE = 1.0  # standard deviation of a line integral, for grey values from 0 to 1 and lengths in pixels
FIRST_WEIGHT = 0.3


def slice_of(name: str, size: int) -> Tensor:
    """A picture of scikit-image in grey values from 0 to 1, dark outside of the disc that the scanner sees."""
    from matplotlib.image import imread

    with importlib.resources.as_file(importlib.resources.files("skimage") / "data" / name) as path:
        grey = torch.from_numpy(imread(path).copy()).float()
    grey = grey[..., :3].mean(-1) if grey.ndim == 3 else grey
    t = torch.linspace(-1, 1, size)
    inside = t[:, None].square() + t.square() < 1
    return inside * torch.nn.functional.interpolate(grey[None, None], (size, size), mode="area")[0, 0]


def reconstruct(R: LinearOperator, y: Tensor, weight: Tensor, rtol: float = 1e-4) -> Tensor:
    """The regularised least-squares solution, differentiable in all of its arguments; a descent needs no sharper gradient."""
    b = R.H(y)
    D = Gradient(b.shape, boundary="neumann", like=b)
    return ns.solve(R.gram() + weight * D.gram(), b, method="cg", rtol=rtol, adjoint={"rtol": 100 * rtol})


def psnr(x: Tensor, truth: Tensor) -> float:
    """The peak signal-to-noise ratio, in dB."""
    return float(-10 * (x - truth).square().mean().log10())


def main(out: str | None = "ct.png", size: int = 96, views: int = 45, steps: int = 6) -> dict[str, float]:
    """Learn, reconstruct, draw; returns what was measured."""
    R = Radon((size, size), torch.arange(views) * (math.pi / views), detectors=size)
    generator = torch.Generator().manual_seed(SEED)

    def measured(truth: Tensor) -> Tensor:
        y = R(truth)
        return y + NOISE * torch.randn(y.shape, generator=generator)

    known, unknown = slice_of("camera.png", size), slice_of("phantom.png", size)
    y_known, y = measured(known), measured(unknown)

    log_weight = torch.tensor(FIRST_WEIGHT).log().requires_grad_()
    before = reconstruct(R, y, log_weight.exp()).detach()
    optimizer = torch.optim.LBFGS([log_weight], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (reconstruct(R, y_known, log_weight.exp()) - known).square().mean().log()
        value.backward()
        return value

    optimizer.step(loss)
    after = reconstruct(R, y, log_weight.exp()).detach()
    # the back-projection of the sinogram, over that of an image of ones
    back_projection = R.H(y) / R.H(R(torch.ones_like(unknown)))

    if out is not None:
        images = {
            "truth": unknown,
            "back-projection": back_projection,
            f"λ = {FIRST_WEIGHT:.1g}": before,
            f"learned λ = {log_weight.exp().item():.2g}": after,
        }
        draw(out, images, y)
    return {
        "psnr_back_projection": psnr(back_projection, unknown),
        "psnr_before": psnr(before, unknown),
        "psnr_after": psnr(after, unknown),
        "weight_before": FIRST_WEIGHT,
        "weight_after": log_weight.exp().item(),
    }


def draw(out: str, images: dict[str, Tensor], sinogram: Tensor) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.4), dpi=110, layout="constrained")
    truth, *_ = images.values()
    first, *others = figure.subplots(1, 5)
    first.imshow(sinogram.numpy(), cmap="gray", aspect="auto")
    first.set_title("sinogram: angle against detector", fontsize=11)
    for axes, (title, image) in zip(others, images.items(), strict=True):
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title if image is truth else f"{title}: {psnr(image, truth):.1f} dB", fontsize=11)
    for axes in (first, *others):
        axes.axis("off")
    figure.savefig(out)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the images are too small for more
    for name, value in main().items():
        print(f"{name:<22}{value:10.3g}")
