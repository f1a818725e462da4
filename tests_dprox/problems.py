"""Image problems in dprox's language, and a count of the applications of the operator of its x-update."""

import dprox as dp
import numpy as np
import torch
from dprox.algo.admm import ADMM
from dprox.linalg import LinearSolveConfig
from dprox.linop.blackbox import BlackBox
from skimage import data, transform

SIZE = 64


class Count:
    """Counts the applications of the normal operator that `least_squares.solve_cg` makes, while it is open."""

    def __enter__(self):
        self.applications, forward = 0, BlackBox.forward

        def counted(op, *inputs):
            self.applications += op._forward.__qualname__.startswith("least_squares.solve_cg")
            return forward(op, *inputs)

        BlackBox.forward, self.forward = counted, forward
        return self

    def __exit__(self, *_):
        BlackBox.forward = self.forward


def photograph(colours=3):
    image = transform.resize(data.astronaut(), (SIZE, SIZE), anti_aliasing=True)
    image = torch.tensor(image.transpose(2, 0, 1)[None], dtype=torch.float32)
    return image if colours == 3 else image.mean(1, keepdim=True)


def gaussian(size=9, sigma=2.0):
    line = np.exp(-0.5 * ((np.arange(size) - size // 2) / sigma) ** 2)
    psf = np.outer(line, line)
    return (psf / psf.sum())[..., None]


def variation(x):
    return [dp.norm1(dp.grad(x, dim=0)), dp.norm1(dp.grad(x, dim=1))]


class Problem:
    """`min 1/2 |K x - y|^2 + rho lam |D x|_1` by 20 steps of ADMM."""

    def __init__(self, K, truth, noise, rho, lam, start):
        self.K, self.truth, self.rho, self.lam = K, truth, rho, lam
        torch.manual_seed(0)
        clean = dp.CompGraph(K(dp.Variable())).forward(truth)
        self.y = clean + noise * torch.randn_like(clean) * (clean != 0)
        self.x0 = start(self.y)

    def data_term(self):
        x = dp.Variable(value=torch.zeros_like(self.truth))
        return x, dp.sum_squares(self.K(x) - self.y)

    def run(self, steps=20, **config):
        """The image, its objective, its PSNR, and the number of applications."""
        x, term = self.data_term()
        psi, omega = ADMM.partition([term, *variation(x)])
        solver = ADMM(psi, omega, try_diagonalize=False, linear_solve_config=LinearSolveConfig(**config))
        with torch.no_grad(), Count() as count:
            image = solver.solve(x0=self.x0.clone(), rhos=self.rho, lams=self.lam, max_iter=steps)
            return image, self.objective(image), self.psnr(image), count.applications

    def objective(self, image):
        x, term = self.data_term()
        jumps = sum(dp.CompGraph(fn.linop).forward(image).abs().sum() for fn in variation(x))
        residual = term.dag.forward(image) - term.offset
        return (0.5 * (residual**2).sum() + self.rho * self.lam * jumps).item()

    def psnr(self, image):
        return -10 * torch.log10(((image - self.truth) ** 2).mean()).item()


def deconvolution():
    return Problem(lambda x: dp.conv(x, gaussian()), photograph(), 0.01, rho=0.02, lam=0.02, start=lambda y: y)


def demosaicking():
    return Problem(lambda x: dp.mosaic(dp.conv(x, gaussian())), photograph(), 0.01, rho=0.02, lam=0.05, start=lambda y: y)


def magnetic_resonance():
    torch.manual_seed(1)
    mask = (torch.rand(1, 1, SIZE, SIZE) < 0.3).float()
    for rows in (slice(None, 4), slice(-4, None)):
        for columns in (slice(None, 4), slice(-4, None)):
            mask[..., rows, columns] = 1

    def forward(v, step=None):
        spectrum = torch.fft.fft2(v, norm="ortho") * mask
        return torch.cat([spectrum.real, spectrum.imag], dim=1)

    def adjoint(y, step=None):
        real, imaginary = y.chunk(2, dim=1)
        return torch.fft.ifft2(torch.complex(real, imaginary) * mask, norm="ortho").real

    factory = dp.LinOpFactory(forward, adjoint)
    return Problem(factory, photograph(1), 0.005, rho=0.02, lam=0.1, start=adjoint)


PROBLEMS = {"TV deconvolution": deconvolution, "demosaicking": demosaicking, "compressed-sensing MRI": magnetic_resonance}
