"""Multi-coil magnetic resonance imaging with a learned regularisation: `python examples/mri.py`.

A scanner measures a part of the Fourier transform of an image as each of its coils sees it, `y = E x + noise` with
`E = M F S`. The image is reconstructed by

    x = (E^H E + λ D^H D)^{-1} E^H y,

where `D` takes differences between neighbouring pixels; λ is learned by backpropagation through that solve on one slice, and
tried on another.
"""

from __future__ import annotations

import importlib.resources
import math

import torch
from torch import Tensor

import nablasolve as ns
from nablasolve.operators import DFT, CoilSensitivities, Gradient, LinearOperator, Mask

SEED = 0
NOISE = 0.02  # standard deviation of the real and of the imaginary part, for images of magnitude 0 to 1
FIRST_WEIGHT = 1e-3


def slice_of(name: str, size: int) -> Tensor:
    """A picture of scikit-image in grey values from 0 to 1, with the smooth phase that a scanner adds."""
    from matplotlib.image import imread

    with importlib.resources.as_file(importlib.resources.files("skimage") / "data" / name) as path:
        grey = torch.from_numpy(imread(path).copy()).float()
    grey = grey[..., :3].mean(-1) if grey.ndim == 3 else grey
    magnitude = torch.nn.functional.interpolate(grey[None, None], (size, size), mode="area")[0, 0]
    t = torch.linspace(-1, 1, size)
    return torch.polar(magnitude, 0.8 * t[:, None] - 0.5 * t.square())


def coil_maps(coils: int, size: int) -> Tensor:
    """Smooth complex sensitivities of coils around the image, of shape (coils, size, size) and of unit energy at each pixel."""
    angle = 2 * math.pi * torch.arange(coils) / coils
    t = torch.linspace(-1, 1, size)
    distance = (t[:, None] - 1.2 * angle.sin()[:, None, None]).square() + (t - 1.2 * angle.cos()[:, None, None]).square()
    maps = torch.polar(torch.exp(-distance), angle[:, None, None] + 0.5 * distance)
    return maps / torch.linalg.vector_norm(maps, dim=0)


def sampling_mask(size: int, acceleration: int) -> Tensor:
    """Which rows of the Fourier plane are measured: all of the middle, and fewer the further out."""
    row = torch.arange(size)
    far = (row - size // 2).abs() / (size / 2)
    chance = torch.rand(size, generator=torch.Generator().manual_seed(SEED)) * (0.3 + far.square())
    chance[far < 0.08] = 0
    rows = chance.argsort()[: size // acceleration]
    return torch.isin(row, rows)[:, None].expand(size, size)


def encoding(mask: Tensor, maps: Tensor) -> LinearOperator:
    """`E = M F S`, from an image to what the coils measure."""
    F = DFT(maps.shape, dims=(-2, -1), centered=True, like=maps)
    return Mask(mask, maps.shape, like=maps) @ F @ CoilSensitivities(maps)


def reconstruct(E: LinearOperator, y: Tensor, weight: Tensor, rtol: float = 1e-4) -> Tensor:
    """The regularised least-squares solution, differentiable in all of its arguments; a descent needs no sharper gradient."""
    D = Gradient(y.shape[-2:], like=y)
    return ns.solve(E.gram() + weight * D.gram(), E.H(y), method="cg", rtol=rtol, adjoint={"rtol": 100 * rtol})


def psnr(x: Tensor, truth: Tensor) -> float:
    """The peak signal-to-noise ratio of magnitudes, in dB."""
    return float(-10 * (x.abs() - truth.abs()).square().mean().log10())


def main(
    out: str | None = "mri.png", size: int = 96, coils: int = 8, acceleration: int = 3, steps: int = 6
) -> dict[str, float]:
    """Learn, reconstruct, draw; returns what was measured."""
    mask = sampling_mask(size, acceleration)
    E = encoding(mask, coil_maps(coils, size))
    generator = torch.Generator().manual_seed(SEED)

    def measured(truth: Tensor) -> Tensor:
        y = E(truth)
        return y + NOISE * mask * torch.complex(*torch.randn(2, *y.shape, generator=generator))

    known, unknown = slice_of("camera.png", size), slice_of("phantom.png", size)
    y_known, y = measured(known), measured(unknown)

    log_weight = torch.tensor(FIRST_WEIGHT).log().requires_grad_()
    before = reconstruct(E, y, log_weight.exp()).detach()
    optimizer = torch.optim.LBFGS([log_weight], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (reconstruct(E, y_known, log_weight.exp()) - known).abs().square().mean().log()
        value.backward()
        return value

    optimizer.step(loss)
    after = reconstruct(E, y, log_weight.exp()).detach()
    zero_filled = E.H(y)

    if out is not None:
        images = {
            "truth": unknown,
            "zero-filled": zero_filled,
            f"λ = {FIRST_WEIGHT:.1g}": before,
            f"learned λ = {log_weight.exp().item():.2g}": after,
        }
        draw(out, images, mask)
    return {
        "psnr_zero_filled": psnr(zero_filled, unknown),
        "psnr_before": psnr(before, unknown),
        "psnr_after": psnr(after, unknown),
        "weight_before": FIRST_WEIGHT,
        "weight_after": log_weight.exp().item(),
    }


def draw(out: str, images: dict[str, Tensor], mask: Tensor) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.4), dpi=110, layout="constrained")
    truth, *_ = images.values()
    for axes, (title, image) in zip(figure.subplots(1, 5), {**images, "measured rows": mask}.items(), strict=True):
        axes.imshow(image.abs().numpy() if image.is_complex() else image.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title if image is truth or image is mask else f"{title}: {psnr(image, truth):.1f} dB", fontsize=11)
        axes.axis("off")
    figure.savefig(out)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the images are too small for more
    for name, value in main().items():
        print(f"{name:<18}{value:10.3g}")
