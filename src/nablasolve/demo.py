"""Learn the operator, not only the image: `python -m nablasolve`.

A real photograph is blurred by an unknown kernel and noised. It is restored by the regularised least-squares problem

    x = (H^T H + λ D^T D)^{-1} H^T y,

where `H` blurs and `D` takes differences between neighbouring pixels, solved by conjugate gradients. Kernel and λ are
learned by backpropagation through that solve, so that sharp training crops come out sharp; a part of the photograph that
was never seen in training then shows what they are worth.

The boundary is that of a real camera. `H` is a circular convolution on a frame, followed by the choice of those pixels that
the blur does not wrap around to: the others were not observed, and are unknowns of the system like all the rest. That
choice is also why no Fourier transform inverts the system (Almeida & Figueiredo 2013, "Deconvolving images with unknown
boundaries").
"""

from __future__ import annotations

import argparse
import importlib
import importlib.resources
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nablasolve as ns

from .plot import MIB, plot_memory, plot_residuals

PHOTOGRAPH = "data/astronaut.png"  # of scikit-image's wheel; NASA, public domain
KERNEL = 11  # pixels on a side
MARGIN = KERNEL // 2
NOISE = 0.005  # standard deviation, for grey values from 0 to 1
FIRST_WEIGHT = 1e-2
RTOL = 1e-4  # what float32 can be asked for on these systems
SEED = 0


@dataclass(frozen=True)
class Settings:
    """How much work the demo does."""

    crops: int = 4
    crop_size: int = 96
    evaluations: int = 40
    directions: int = 8
    memory_iterations: tuple[int, ...] = (50, 200, 800)
    memory_size: int = 128


QUICK = Settings(crops=2, crop_size=64, evaluations=12, directions=2, memory_iterations=(25, 100))


# -- the photograph and its blur -----------------------------------------------------------------------------------------


def photograph() -> Tensor:
    """The photograph in grey values from 0 to 1, of shape (512, 512), read from the installed scikit-image."""
    from matplotlib.image import imread

    with importlib.resources.as_file(importlib.resources.files("skimage") / PHOTOGRAPH) as path:
        colors = torch.from_numpy(imread(path)[..., :3].copy())
    luma: Tensor = colors @ torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
    return luma


def true_kernel() -> Tensor:
    """The kernel to find: a camera shaken along the three sides of a nabla."""
    axis = torch.arange(KERNEL, dtype=torch.float32)
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)
    corners = torch.tensor([[1.0, 0.5], [1.0, 9.5], [9.3, 5.0]])
    distances = []
    for start, end in zip(corners, corners.roll(-1, dims=0), strict=True):
        side = end - start
        along = (((pixels - start) @ side) / (side @ side)).clamp(0, 1)
        distances.append(torch.linalg.vector_norm(pixels - start - along[..., None] * side, dim=-1))
    kernel = (1 - torch.stack(distances).amin(dim=0)).clamp(min=0)
    return kernel / kernel.sum()


def spectrum(kernel: Tensor, height: int, width: int) -> Tensor:
    """The Fourier transform of a kernel centred on pixel (0, 0) of a frame."""
    frame = nn.functional.pad(kernel, (0, width - KERNEL, 0, height - KERNEL))
    transfer: Tensor = torch.fft.rfft2(frame.roll((-MARGIN, -MARGIN), dims=(0, 1)))
    return transfer


def convolve(image: Tensor, transfer: Tensor) -> Tensor:
    """Circular convolution of `image`, of shape (..., height, width), with the kernel of the spectrum `transfer`."""
    blurred: Tensor = torch.fft.irfft2(torch.fft.rfft2(image) * transfer, s=image.shape[-2:])
    return blurred


def observed(image: Tensor) -> Tensor:
    """The part of a frame that the blur does not wrap around to."""
    return image[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def psnr(image: Tensor, truth: Tensor) -> float:
    """The peak signal-to-noise ratio in dB, over the observed part."""
    return float(-10 * (observed(image) - observed(truth)).square().mean().log10())


# -- the model: a solve with an unknown operator -------------------------------------------------------------------------


class Deblurring(nn.Module):
    """Restores blurred images with a learned kernel and a learned weight λ."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(KERNEL, KERNEL))
        self.log_weight = nn.Parameter(torch.tensor(FIRST_WEIGHT).log())

    @property
    def kernel(self) -> Tensor:
        """The kernel, positive and of sum 1: a non-leaf tensor."""
        return self.logits.flatten().softmax(0).view_as(self.logits)

    def system(self, blurred: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The operator `H^T H + λ D^T D` as a closure, and the right-hand side `H^T y`."""
        transfer, weight = spectrum(self.kernel, *blurred.shape[-2:]), self.log_weight.exp()
        mask = nn.functional.pad(torch.ones_like(observed(blurred)), (MARGIN,) * 4)

        def normal(x: Tensor) -> Tensor:
            neighbours = x.roll(1, -1) + x.roll(-1, -1) + x.roll(1, -2) + x.roll(-1, -2)
            return convolve(mask * convolve(x, transfer), transfer.conj()) + weight * (4 * x - neighbours)

        return normal, convolve(mask * blurred, transfer.conj())

    def forward(self, blurred: Tensor, **options: Any) -> Tensor:
        """The restored images, of the shape (..., height, width) of the blurred ones."""
        A, b = self.system(blurred)
        x: Tensor = ns.solve(A, b, method="cg", **options)  # all images are one vector
        return x


def distance(restored: Tensor, truth: Tensor) -> Tensor:
    """The loss: the logarithm of the mean squared error, which is the negative PSNR up to a factor."""
    return (observed(restored) - observed(truth)).square().mean().log()


def learn(model: Deblurring, blurred: Tensor, truth: Tensor, evaluations: int) -> None:
    """Fit kernel and λ to pairs of blurred and sharp crops by L-BFGS, which suits few parameters and an exact gradient."""
    from tqdm.auto import tqdm

    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=evaluations, max_eval=evaluations, history_size=20, line_search_fn="strong_wolfe"
    )
    with tqdm(total=evaluations, desc="learning the kernel", unit="gradient") as bar:

        def closure() -> Tensor:
            optimizer.zero_grad()
            restored = model(blurred, rtol=RTOL, adjoint={"rtol": 10 * RTOL})
            loss = distance(restored, truth)
            loss.backward()
            bar.set_postfix_str(f"PSNR {psnr(restored.detach(), truth):.2f} dB, λ {model.log_weight.exp().item():.1e}")
            bar.update(1)
            return loss

        optimizer.step(closure)
        bar.total = bar.n  # a line search may take one more or one fewer


# -- what is measured ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """The restoration of the held-out part at one state of the model."""

    restored: Tensor
    kernel: Tensor
    weight: float
    psnr: float
    info: ns.SolveInfo
    residuals: dict[str, list[float]]


def evaluate(model: Deblurring, blurred: Tensor, truth: Tensor) -> Evaluation:
    """Restore the held-out part, and run the backward pass as well to record its adjoint solve."""
    curves: dict[str, list[float]] = {"forward": [], "adjoint": []}
    A, b = model.system(blurred)
    x, info = ns.solve_ex(A, b, method="cg", rtol=RTOL, callback=lambda state: curves[state.phase].append(state.residual_norm))
    torch.autograd.grad(distance(x, truth), list(model.parameters()))
    assert info.adjoint is not None
    for phase, record in (("forward", info), ("adjoint", info.adjoint)):
        curves[phase].insert(0, record.residual_norm / record.relative_residual)  # the norm of the right-hand side
    x, kernel = x.detach(), model.kernel.detach()
    return Evaluation(x, kernel, model.log_weight.exp().item(), psnr(x, truth), info, curves)


def gradient_error(truth: Tensor, blurred: Tensor, directions: int) -> float:
    """The relative error of directional derivatives in float64 against five-point central differences."""
    truth, blurred = truth.double(), blurred.double()
    generator = torch.Generator().manual_seed(SEED)
    model = Deblurring().double()
    count = KERNEL**2 + 1
    point = nn.utils.parameters_to_vector(model.parameters()).detach()
    point = point + 0.5 * torch.randn(count, dtype=torch.float64, generator=generator)

    def loss(parameters: Tensor) -> Tensor:
        values = {"logits": parameters[:-1].view(KERNEL, KERNEL), "log_weight": parameters[-1]}
        return distance(torch.func.functional_call(model, values, blurred, {"rtol": 1e-12}), truth)

    gradient = torch.func.grad(loss)(point)
    step = 1e-2  # balances the truncation, of fourth order, with the tolerance of the solves
    errors, slopes = [], []
    for _ in range(directions):
        d = torch.randn(count, dtype=torch.float64, generator=generator)
        d = d / torch.linalg.vector_norm(d)
        with torch.no_grad():
            near = loss(point + step * d) - loss(point - step * d)
            far = loss(point + 2 * step * d) - loss(point - 2 * step * d)
        slope = (8 * near - far) / (12 * step)
        errors.append(gradient @ d - slope)
        slopes.append(slope)
    return float(torch.linalg.vector_norm(torch.stack(errors)) / torch.linalg.vector_norm(torch.stack(slopes)))


def peak_memory(grad: str, iterations: int, size: int) -> float:
    """The bytes by which a solve of `iterations` CG steps and its backward pass raise the peak of a fresh process.

    The system is that of the demo on a frame of `size` x `size` pixels in float32. The figure is the operating
    system's; NaN where it has none.

    Raises:
        RuntimeError: if the process fails.
    """
    package = str(Path(__file__).resolve().parents[1])
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))))
    code = f"from nablasolve.demo import report_memory; report_memory({grad!r}, {iterations}, {size})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of grad={grad!r} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def report_memory(grad: str, iterations: int, size: int) -> None:
    """What the process of `peak_memory` does: print the growth of its own peak.

    Raises:
        RuntimeError: if the solve did not take the iterations it was asked for.
    """
    torch.set_num_threads(1)

    def work(iterations: int, size: int) -> None:
        blurred = torch.rand(size, size, generator=torch.Generator().manual_seed(SEED))
        model = Deblurring()
        A, b = model.system(blurred)
        # no tolerance: exactly this many steps
        x, info = ns.solve_ex(A, b, method="cg", grad=grad, rtol=0.0, maxiter=iterations, on_failure="ignore")
        distance(x, blurred).backward()
        for record in (info, info.adjoint):  # unrolling has no adjoint solve
            if record is not None and record.iterations != iterations:
                raise RuntimeError(f"expected {iterations} iterations, got {record!r}")

    work(2, 4 * KERNEL)  # loads and sets up what the first use of an operation does
    before = _peak()
    work(iterations, size)
    print(_peak() - before)


def _peak() -> float:
    """The peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux: ru_maxrss survives exec and so contains the peak of the parent process; this figure does not
        return next(float(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


# -- the whole job -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What the demo found. `memory` has, for each value of `grad`, the bytes at each of `iterations`."""

    truth: Tensor
    blurred: Tensor
    kernel: Tensor
    before: Evaluation
    after: Evaluation
    gradient_error: float
    iterations: tuple[int, ...]
    memory: dict[str, list[float]]

    def __str__(self) -> str:
        before, after = self.before, self.after
        rows = [
            ("", "blurred", "before", "after"),
            ("PSNR, held-out part (dB)", f"{psnr(self.blurred, self.truth):.2f}", f"{before.psnr:.2f}", f"{after.psnr:.2f}"),
            ("lambda", "", f"{before.weight:.1e}", f"{after.weight:.1e}"),
            ("CG iterations", "", before.info.iterations, after.info.iterations),
            ("adjoint iterations", "", *(e.info.adjoint.iterations for e in (before, after) if e.info.adjoint)),
            (),
            ("gradient error, float64", f"{self.gradient_error:.1e}", "  (against finite differences)"),
            (),
            ("peak memory (MiB) at iterations", *self.iterations),
            *((f'  grad="{grad}"', *(f"{value / MIB:.1f}" for value in values)) for grad, values in self.memory.items()),
        ]
        return "\n".join(f"{row[0]:<33}" + "".join(f"{cell:>10}" for cell in row[1:]) if row else "" for row in rows)


def run(settings: Settings) -> Result:
    """Blur, learn, restore and measure.

    Raises:
        ImportError: if an extra is missing.
    """
    for module in ("matplotlib", "skimage", "tqdm"):
        try:
            importlib.import_module(module)
        except ImportError as missing:
            raise ImportError(f'the demo needs {module}: pip install "nablasolve[demo]"') from missing
    from tqdm.auto import tqdm

    sharp, kernel = photograph(), true_kernel()
    noise = torch.randn(sharp.shape, generator=torch.Generator().manual_seed(SEED))
    blurred = convolve(sharp, spectrum(kernel, *sharp.shape)) + NOISE * noise

    # the lower half trains, the upper half is held out
    def crops(image: Tensor) -> Tensor:
        tiles = image[256:].unfold(0, settings.crop_size, settings.crop_size).unfold(1, settings.crop_size, settings.crop_size)
        tiles = tiles.reshape(-1, settings.crop_size, settings.crop_size)
        return tiles[:: len(tiles) // settings.crops][: settings.crops]

    held_out = (slice(0, 256), slice(144, 464))

    # processes of their own, so they can be measured beside the training
    executor = ThreadPoolExecutor(max_workers=1)
    try:
        measured = {
            grad: [executor.submit(peak_memory, grad, count, settings.memory_size) for count in settings.memory_iterations]
            for grad in ("implicit", "unroll")
        }
        model = Deblurring()
        before = evaluate(model, blurred[held_out], sharp[held_out])
        learn(model, crops(blurred), crops(sharp), settings.evaluations)
        after = evaluate(model, blurred[held_out], sharp[held_out])

        small = (slice(96, 128), slice(224, 256))
        error = gradient_error(sharp[small], blurred[small], settings.directions)
        with tqdm(total=2 * len(settings.memory_iterations), desc="measuring peak memory", unit="process") as bar:
            memory: dict[str, list[float]] = {}
            for grad, futures in measured.items():
                memory[grad] = []
                for future in futures:
                    memory[grad].append(future.result())
                    bar.update(1)
    finally:
        executor.shutdown(cancel_futures=True)
    return Result(sharp[held_out], blurred[held_out], kernel, before, after, error, settings.memory_iterations, memory)


def draw(result: Result, path: Path) -> None:
    """Write the picture of a result."""
    from matplotlib.figure import Figure

    before, after = result.before, result.after
    figure = Figure(figsize=(14, 7.2), dpi=130, layout="constrained", facecolor="white")
    figure.suptitle(
        r"Learning a blur through the solve  $x = (H^\mathsf{T} H + \lambda D^\mathsf{T} D)^{-1} H^\mathsf{T} y$", fontsize=17
    )
    rows: Any = figure.subfigures(2, 1, height_ratios=(1, 1.12), hspace=0.03)
    top, bottom = rows

    images = (
        (result.truth, "truth (not seen in training)"),
        (result.blurred, f"blurred and noised: {psnr(result.blurred, result.truth):.1f} dB"),
        (before.restored, f"restored before learning: {before.psnr:.1f} dB"),
        (after.restored, f"restored after learning: {after.psnr:.1f} dB"),
    )
    for axes, (image, title) in zip(top.subplots(1, len(images)), images, strict=True):
        axes.imshow(observed(image).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=12)
        axes.axis("off")

    true, learned, residuals, memory = bottom.subplots(1, 4, width_ratios=(1, 1, 1.35, 1.35))
    for axes, kernel, title in ((true, result.kernel, "true kernel"), (learned, after.kernel, "learned kernel")):
        axes.imshow(kernel.numpy(), cmap="magma", vmin=0, vmax=result.kernel.max().item())
        axes.set_title(title, fontsize=12)
        axes.axis("off")
    plot_residuals(residuals, after.residuals, rtol=RTOL)
    residuals.set_title("residual of the two solves", fontsize=12)
    plot_memory(memory, result.iterations, {f'grad="{grad}"': values for grad, values in result.memory.items()})
    memory.set_title("memory of forward and backward", fontsize=12)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: run the demo, print its table and write its picture.

    Raises:
        ImportError: if an extra is missing.
    """
    parser = argparse.ArgumentParser(prog="python -m nablasolve", description="Learn a blur kernel through a linear solve.")
    parser.add_argument("--output", type=Path, default=Path("nablasolve_demo.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smaller problem, for a first look")
    options = parser.parse_args(arguments)
    if not options.output.absolute().parent.is_dir():
        parser.error(f"--output: {options.output.parent} is not a directory")
    torch.set_num_threads(1)  # the images are small, and the other core measures memory
    start = time.perf_counter()
    result = run(QUICK if options.quick else Settings())
    draw(result, options.output)
    print(f"{result}\n\n{options.output} written; {time.perf_counter() - start:.0f} s in all")
    return 0
