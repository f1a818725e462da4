"""The systems: each gives its operator to torch, NumPy and JAX, and knows an independent product that results are held to."""

# ruff: noqa: D102  (overriding methods, which the base class documents)
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import scipy.fft
import scipy.sparse as sp
import torch
from torch import Tensor

Product = Callable[[Any], Any]
Array = Any  # a NumPy or a JAX array

# Vectors read and written by one iteration of the textbook method, every kernel being one pass over its operands, the products
# left out. Of least squares: those of the size of x and those of the size of b.
PASSES: Mapping[str, tuple[float, float]] = {
    "cg": (12, 0),  # p.q 2, x 3, r 3, r.r 1, p 3
    "bicgstab": (26, 0),  # two dots of two vectors, <t,t> and |r|, x 3 + 3, r 3 + 3, p 6, <shadow,r> 2
    "gmres": (38, 0),  # restart 30: on average 15.5 basis vectors read twice, w three times, norm, scaling, a 30th of x
    "cgls": (13, 4),  # |q| 1, r 3 of b's size; x 3, r 3, |s| 1, p 3, |p| and s - damp^2 x 3 of x's size
    "direct": (0, 0),
}


class Workload(ABC):
    """A system `A(theta) x = b`, or `min |A(theta) x - b|^2 + damp^2 |x|^2`, and the loss `<cotangent, x>`.

    Args:
        size: the length of a side, or what `sizes` says otherwise.
        dtype: of its tensors, that of the workload by default.

    Attributes:
        key: the name on the command line.
        title: what it is, in a few words.
        method: the textbook method that every library is asked for.
        sizes: those of each scale.
        rtol: the relative residual that every library has to reach.
        theta, b, cotangent: the tensors of the problem.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    method: ClassVar[str]
    sizes: ClassVar[Mapping[str, Sequence[int]]]
    rtol: ClassVar[float] = 1e-6
    dtype: ClassVar[torch.dtype] = torch.float64
    hermitian: ClassVar[bool] = True
    batch_dims: ClassVar[int] = 0
    damp: ClassVar[float] = 0.0
    restart: ClassVar[int] = 30
    theta: Tensor
    b: Tensor
    cotangent: Tensor

    def __init__(self, size: int, dtype: torch.dtype | None = None) -> None:
        self.size = size
        self.precision = dtype or self.dtype
        theta, b, cotangent = self.data(np.random.default_rng(size))
        self.theta, self.b, self.cotangent = (torch.from_numpy(a).to(self.precision) for a in (theta, b, cotangent))

    @abstractmethod
    def data(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`theta`, `b` and the cotangent."""

    @abstractmethod
    def operator(self, theta: Tensor) -> Product:
        """`v -> A(theta) v` as a user of torch writes it."""

    def recorded(self, theta: Tensor) -> Product:
        """`operator`, in a form that autograd can follow to `theta`."""
        return self.operator(theta)

    def transposed(self, theta: Tensor) -> Product:
        """`v -> A(theta)^T v`, written by hand."""
        return self.operator(theta)

    def fused(self, theta: Tensor) -> Product:
        """`operator`, in the form that `torch.compile` makes the most of: pads and slices, no writes to parts of tensors."""
        return self.operator(theta)

    def fused_transposed(self, theta: Tensor) -> Product:
        """`transposed`, in that form."""
        return self.fused(theta) if self.hermitian else self.transposed(theta)

    def matrix(self, theta: Tensor) -> Tensor | None:
        """The tensor that holds `A(theta)`, where a user of torch would give that instead."""
        return None

    def pullback(self, theta: Tensor, w: Tensor, x: Tensor) -> Tensor:
        """The derivative of `<w, A(theta) x>` with respect to `theta`: one product under autograd."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            return torch.autograd.grad(self.operator(theta)(x), theta, w)[0]

    def numpy_operator(self, theta: np.ndarray) -> tuple[Product, Product] | None:
        """The same for NumPy: the product and that of the transpose. None where SciPy has no such solver."""
        return None

    def numpy_pullback(self, theta: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        """`pullback`, written by hand for NumPy."""
        raise NotImplementedError

    @abstractmethod
    def jax_product(self, theta: Array, v: Array) -> Array:
        """`A(theta) v` for JAX."""

    @abstractmethod
    def exact_product(self) -> tuple[Product, Product]:
        """`v -> A v` and `v -> A^T v` in float64 by other means than those above: what true residuals are computed with."""

    @abstractmethod
    def product_bytes(self) -> float:
        """What one application of `A` has to move at least: every operand read once, the result written once."""

    # -- what follows from these -------------------------------------------------------------------------------------------

    @property
    def least_squares(self) -> bool:
        """Whether it is a least-squares problem."""
        return self.method == "cgls"

    def direction(self) -> Tensor:
        """A direction in which `theta` is moved to check the gradient: one in which `A` stays what its method needs."""
        return torch.randn(self.theta.shape, generator=torch.Generator().manual_seed(1), dtype=self.theta.dtype) * self.theta

    def true_residual(self, x: Tensor) -> float:
        """The relative residual of `x`, the largest of a batch; of least squares, that of the normal equations."""
        product, transposed = self.exact_product()
        b, x = self.b.double().numpy(), x.detach().double().numpy()
        if self.least_squares:
            r = transposed(b - product(x)) - self.damp**2 * x
            b = transposed(b)
        else:
            r = b - product(x)
        r, b = (a.reshape(*a.shape[: self.batch_dims], -1) for a in (r, b))
        return float((np.linalg.norm(r, axis=-1) / np.linalg.norm(b, axis=-1)).max())

    def iteration_bytes(self) -> float:
        """What one iteration of the textbook method moves, its products included, in bytes."""
        of_x, of_b = PASSES[self.method]
        products = 2 if self.method in ("bicgstab", "cgls") else 1
        item = self.b.element_size()
        return (of_x * self.cotangent.numel() + of_b * self.b.numel()) * item + products * self.product_bytes()


# of a grid's coefficients for the cell above, below, left and right: zeros where there is no such cell
BORDERS = ((0, 0, 1, 0), (0, 0, 0, 1), (1, 0), (0, 1))


def around(shape: Sequence[int]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Of a field, its values in the cells above, below, left and right of each; anything where there is no such cell.

    One padded copy in memory, and views of it: of a pad alone the compiler would make tests in every loop that reads it.
    """
    rows, n = shape
    starts = (0, 2 * n, n - 1, n + 1)

    def neighbours(v: Tensor) -> tuple[Tensor, ...]:
        padded = torch.nn.functional.pad(v.reshape(-1), (n, n))
        return tuple(padded.as_strided((rows, n), (n, 1), start) for start in starts)

    return neighbours


class Diffusion(Workload):
    """One implicit step of variable-coefficient diffusion: `A = shift - div(theta grad)`, a coefficient a cell, no flux out."""

    key = "W1"
    title = "variable-coefficient diffusion, a coefficient a cell"
    method = "cg"
    sizes: ClassVar = {"tiny": (16,), "small": (64,), "full": (512, 1024)}
    shift: ClassVar[float] = 0.01

    def data(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n = self.size
        return np.exp(0.5 * random.standard_normal((n, n))), random.standard_normal((n, n)), random.standard_normal((n, n))

    def operator(self, theta: Tensor) -> Product:
        down, right = (theta[1:] + theta[:-1]) / 2, (theta[:, 1:] + theta[:, :-1]) / 2  # the coefficients of the faces

        def A(v: Tensor) -> Tensor:
            flux_down, flux_right = down * (v[1:] - v[:-1]), right * (v[:, 1:] - v[:, :-1])
            out = self.shift * v
            out[1:] += flux_down
            out[:-1] -= flux_down
            out[:, 1:] += flux_right
            out[:, :-1] -= flux_right
            return out

        return A

    def fused(self, theta: Tensor) -> Product:
        down, right = (theta[1:] + theta[:-1]) / 2, (theta[:, 1:] + theta[:, :-1]) / 2
        # in memory that of the left face follows that of the right face of the cell before
        pad, shape = torch.nn.functional.pad, theta.shape
        down, right = pad(down, (0, 0, 1, 1)), pad(pad(right, (0, 1)).reshape(-1), (1, 0))
        north, south, west, east = down[:-1], down[1:], right[:-1].view(shape), right[1:].view(shape)
        neighbours, shift = around(shape), self.shift

        def A(v: Tensor) -> Tensor:
            up, below, left, beside = neighbours(v)
            return shift * v + north * (v - up) + south * (v - below) + west * (v - left) + east * (v - beside)

        return A

    def numpy_operator(self, theta: np.ndarray) -> tuple[Product, Product]:
        down, right = (theta[1:] + theta[:-1]) / 2, (theta[:, 1:] + theta[:, :-1]) / 2
        flux_down, flux_right = np.empty_like(down), np.empty_like(right)

        def A(v: np.ndarray) -> np.ndarray:
            v = v.reshape(theta.shape)
            out = self.shift * v
            np.multiply(down, np.subtract(v[1:], v[:-1], out=flux_down), out=flux_down)
            np.multiply(right, np.subtract(v[:, 1:], v[:, :-1], out=flux_right), out=flux_right)
            out[1:] += flux_down
            out[:-1] -= flux_down
            out[:, 1:] += flux_right
            out[:, :-1] -= flux_right
            return out.reshape(-1)

        return A, A

    def numpy_pullback(self, theta: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        w, x = w.reshape(theta.shape), x.reshape(theta.shape)
        down = (w[1:] - w[:-1]) * (x[1:] - x[:-1]) / 2
        right = (w[:, 1:] - w[:, :-1]) * (x[:, 1:] - x[:, :-1]) / 2
        g = np.zeros_like(theta)
        g[1:] += down
        g[:-1] += down
        g[:, 1:] += right
        g[:, :-1] += right
        return g

    def jax_product(self, theta: Array, v: Array) -> Array:
        import jax.numpy as jnp

        down, right = (theta[1:] + theta[:-1]) / 2, (theta[:, 1:] + theta[:, :-1]) / 2
        flux_down = jnp.pad(down * (v[1:] - v[:-1]), ((1, 1), (0, 0)))
        flux_right = jnp.pad(right * (v[:, 1:] - v[:, :-1]), ((0, 0), (1, 1)))
        return self.shift * v + flux_down[:-1] - flux_down[1:] + flux_right[:, :-1] - flux_right[:, 1:]

    def exact_product(self) -> tuple[Product, Product]:
        theta, n = self.theta.double().numpy(), self.size
        difference = sp.diags_array([np.full(n - 1, -1.0), np.ones(n - 1)], offsets=[0, 1], shape=(n - 1, n))
        D = sp.vstack([sp.kron(difference, sp.eye_array(n)), sp.kron(sp.eye_array(n), difference)])
        faces = np.concatenate([((theta[1:] + theta[:-1]) / 2).ravel(), ((theta[:, 1:] + theta[:, :-1]) / 2).ravel()])
        A = (self.shift * sp.eye_array(n * n) + D.T @ sp.diags_array(faces) @ D).tocsr()
        return by_matrix(A, self.b.shape), by_matrix(A, self.b.shape)

    def product_bytes(self) -> float:
        return 4 * self.b.nbytes  # v, the result and two coefficients a cell


class StiffDiffusion(Diffusion):
    """The same with hardly any shift, so that hundreds of iterations do not finish it: for counts that are set."""

    key = "W7"
    title = "peak memory against iterations (diffusion, CG)"
    sizes: ClassVar = {"tiny": (32,), "small": (128,), "full": (256,)}
    shift: ClassVar[float] = 1e-6


class DriftingDiffusion(Diffusion):
    """The same with a coefficient that drifts from step to step, as in training."""

    key = "W9"
    title = "50 training steps with a drifting coefficient (diffusion, CG)"
    sizes: ClassVar = {"tiny": (16,), "small": (48,), "full": (256,)}
    STEPS: ClassVar[int] = 50

    def drift(self) -> list[Tensor]:
        """The coefficient at each step."""
        generator = torch.Generator().manual_seed(2)
        move = torch.randn(self.theta.shape, generator=generator, dtype=self.theta.dtype)
        return [self.theta * torch.exp(0.005 * k * move) for k in range(self.STEPS)]


class Deconvolution(Workload):
    """Regularised deconvolution of a colour picture by FFT: `A = H^T H + weight D^T D`, theta the point-spread function."""

    key = "W2"
    title = "deconvolution HᵀH + μDᵀD, float32, the PSF"
    method = "cg"
    dtype = torch.float32
    rtol = 1e-4
    sizes: ClassVar = {"tiny": (16,), "small": (64,), "full": (512,)}
    support: ClassVar[int] = 9
    weight: ClassVar[float] = 1e-2

    def data(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        t = np.arange(self.support) - self.support // 2
        psf = np.exp(-(t[:, None] ** 2 + t**2) / (2 * 1.5**2)) * np.exp(0.1 * random.standard_normal((self.support,) * 2))
        shape = (3, self.size, self.size)
        return psf / psf.sum(), random.standard_normal(shape), random.standard_normal(shape)

    def _differences(self) -> np.ndarray:
        """The spectrum of `D^T D` with periodic borders."""
        one = 4 * np.sin(np.pi * np.fft.fftfreq(self.size)) ** 2
        return self.weight * (one[:, None] + one[: self.size // 2 + 1])

    def operator(self, theta: Tensor) -> Product:
        # where the PSF has its centre makes no difference to H^T H
        shape = (self.size, self.size)
        regular = torch.from_numpy(self._differences()).to(theta)
        spectrum = torch.fft.rfft2(theta, s=shape).abs().square() + regular
        return lambda v: torch.fft.irfft2(spectrum * torch.fft.rfft2(v), s=shape)

    def numpy_operator(self, theta: np.ndarray) -> tuple[Product, Product]:
        shape = (self.size, self.size)
        regular = self._differences().astype(theta.dtype)
        spectrum = np.abs(scipy.fft.rfft2(theta, s=shape)) ** 2 + regular

        def A(v: np.ndarray) -> np.ndarray:
            return scipy.fft.irfft2(spectrum * scipy.fft.rfft2(v.reshape(self.b.shape)), s=shape).reshape(-1)

        return A, A

    def numpy_pullback(self, theta: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        shape = (self.size, self.size)
        H, W, X = (scipy.fft.rfft2(a, s=shape) for a in (theta, w.reshape(self.b.shape), x.reshape(self.b.shape)))
        g = scipy.fft.irfft2((W.conj() * (H * X) + X.conj() * (H * W)).sum(0), s=shape)
        return g[: self.support, : self.support]

    def jax_product(self, theta: Array, v: Array) -> Array:
        import jax.numpy as jnp

        shape = (self.size, self.size)
        otf = jnp.fft.rfft2(theta, s=shape)
        spectrum = otf.real**2 + otf.imag**2 + jnp.asarray(self._differences(), theta.dtype)
        return jnp.fft.irfft2(spectrum * jnp.fft.rfft2(v), s=shape)

    def exact_product(self) -> tuple[Product, Product]:
        theta = self.theta.double().numpy()

        def shifts(v: np.ndarray, sign: int) -> np.ndarray:
            out = np.zeros_like(v)
            for i, j in np.ndindex(*theta.shape):
                out += theta[i, j] * np.roll(v, (sign * i, sign * j), (-2, -1))
            return out

        def A(v: np.ndarray) -> np.ndarray:
            neighbours = sum(np.roll(v, s, axis) for s in (1, -1) for axis in (-2, -1))
            return shifts(shifts(v, 1), -1) + self.weight * (4 * v - neighbours)

        return A, A

    def product_bytes(self) -> float:
        return 10 * self.b.nbytes  # two FFTs of two dimensions, each of which reads and writes once, and the spectrum


class ConvectionDiffusion(Workload):
    """Convection and diffusion by central differences, `A v = shift v - lap v + theta . grad v`, a velocity a cell."""

    key = "W3-gmres"
    title = "convection–diffusion, GMRES(30), a velocity a cell"
    method = "gmres"
    hermitian = False
    sizes: ClassVar = {"tiny": (16,), "small": (48,), "full": (256,)}
    shift: ClassVar[float] = 0.05

    def data(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n = self.size
        t = np.linspace(-1, 1, n)
        swirl = np.stack([np.broadcast_to(t, (n, n)), -np.broadcast_to(t[:, None], (n, n))])
        velocity = 0.5 * swirl + 0.1 * random.standard_normal((2, n, n))
        return velocity, random.standard_normal((n, n)), random.standard_normal((n, n))

    def operator(self, theta: Tensor) -> Product:
        up, down, left, right = -1 - theta[0] / 2, -1 + theta[0] / 2, -1 - theta[1] / 2, -1 + theta[1] / 2

        def A(v: Tensor) -> Tensor:
            p = torch.nn.functional.pad(v, (1, 1, 1, 1))
            out = (4 + self.shift) * v
            out += up * p[:-2, 1:-1]
            out += down * p[2:, 1:-1]
            out += left * p[1:-1, :-2]
            out += right * p[1:-1, 2:]
            return out

        return A

    def transposed(self, theta: Tensor) -> Product:
        up, down, left, right = -1 - theta[0] / 2, -1 + theta[0] / 2, -1 - theta[1] / 2, -1 + theta[1] / 2

        def AT(v: Tensor) -> Tensor:
            out = (4 + self.shift) * v
            out[:-1] += up[1:] * v[1:]
            out[1:] += down[:-1] * v[:-1]
            out[:, :-1] += left[:, 1:] * v[:, 1:]
            out[:, 1:] += right[:, :-1] * v[:, :-1]
            return out

        return AT

    def _five_point(self, coefficients: Sequence[Tensor]) -> Product:
        """Those of the cells above, below, left and right, which are not read where there is no such cell."""
        up, down, left, right = (torch.nn.functional.pad(c, p) for c, p in zip(coefficients, BORDERS, strict=True))
        neighbours, centre = around(self.b.shape), 4 + self.shift

        def A(v: Tensor) -> Tensor:
            above, below, before, after = neighbours(v)
            return centre * v + up * above + down * below + left * before + right * after

        return A

    def fused(self, theta: Tensor) -> Product:
        up, down, left, right = -1 - theta[0] / 2, -1 + theta[0] / 2, -1 - theta[1] / 2, -1 + theta[1] / 2
        return self._five_point((up[1:], down[:-1], left[:, 1:], right[:, :-1]))

    def fused_transposed(self, theta: Tensor) -> Product:
        up, down, left, right = -1 - theta[0] / 2, -1 + theta[0] / 2, -1 - theta[1] / 2, -1 + theta[1] / 2
        return self._five_point((down[:-1], up[1:], right[:, :-1], left[:, 1:]))

    def numpy_operator(self, theta: np.ndarray) -> tuple[Product, Product]:
        shape = theta.shape[1:]
        up, down, left, right = -1 - theta[0] / 2, -1 + theta[0] / 2, -1 - theta[1] / 2, -1 + theta[1] / 2

        def A(v: np.ndarray) -> np.ndarray:
            v = v.reshape(shape)
            out = (4 + self.shift) * v
            out[1:] += up[1:] * v[:-1]
            out[:-1] += down[:-1] * v[1:]
            out[:, 1:] += left[:, 1:] * v[:, :-1]
            out[:, :-1] += right[:, :-1] * v[:, 1:]
            return out.reshape(-1)

        def AT(v: np.ndarray) -> np.ndarray:
            v = v.reshape(shape)
            out = (4 + self.shift) * v
            out[:-1] += up[1:] * v[1:]
            out[1:] += down[:-1] * v[:-1]
            out[:, :-1] += left[:, 1:] * v[:, 1:]
            out[:, 1:] += right[:, :-1] * v[:, :-1]
            return out.reshape(-1)

        return A, AT

    def numpy_pullback(self, theta: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        w, p = w.reshape(theta.shape[1:]), np.pad(x.reshape(theta.shape[1:]), 1)
        return np.stack([w * (p[2:, 1:-1] - p[:-2, 1:-1]), w * (p[1:-1, 2:] - p[1:-1, :-2])]) / 2

    def jax_product(self, theta: Array, v: Array) -> Array:
        import jax.numpy as jnp

        p = jnp.pad(v, 1)
        north, south, west, east = p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]
        return (4 + self.shift) * v - north - south - west - east + (theta[0] * (south - north) + theta[1] * (east - west)) / 2

    def exact_product(self) -> tuple[Product, Product]:
        theta, n = self.theta.double().numpy(), self.size
        one, central = sp.eye_array(n), sp.diags_array([-0.5, 0.5], offsets=[-1, 1], shape=(n, n))
        second = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n))
        A = self.shift * sp.eye_array(n * n) + sp.kron(second, one) + sp.kron(one, second)
        A = A + sp.diags_array(theta[0].ravel()) @ sp.kron(central, one)
        A = (A + sp.diags_array(theta[1].ravel()) @ sp.kron(one, central)).tocsr()
        return by_matrix(A, self.b.shape), by_matrix(A.T.tocsr(), self.b.shape)

    def product_bytes(self) -> float:
        return 4 * self.b.nbytes  # v, the result and two components of the velocity


class ConvectionDiffusionBiCGStab(ConvectionDiffusion):
    """The same by BiCGStab."""

    key = "W3-bicgstab"
    title = "convection–diffusion, BiCGStab, a velocity a cell"
    method = "bicgstab"


class DenseBatch(Workload):
    """Many small dense symmetric positive definite systems, `theta` the matrices."""

    key = "W4-cg"
    title = "dense 32×32 systems in a batch, CG"
    method = "cg"
    batch_dims = 1
    sizes: ClassVar = {"tiny": (8,), "small": (128,), "full": (4096,)}  # how many
    side: ClassVar[int] = 32

    def data(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        G = random.standard_normal((self.size, self.side, self.side))
        A = G @ G.transpose(0, 2, 1) / self.side + 0.1 * np.eye(self.side)
        return A, random.standard_normal((self.size, self.side)), random.standard_normal((self.size, self.side))

    def operator(self, theta: Tensor) -> Product:
        return lambda v: torch.matmul(theta, v.unsqueeze(-1)).squeeze(-1)

    def fused(self, theta: Tensor) -> Product:
        # a row is summed into eight lanes of a vector, and these by themselves: inductor adds up a vector slowly, and a matrix
        # product of a batch it leaves to a library, matrix by matrix
        return lambda v: sum((theta * v[:, None]).unflatten(-1, (-1, 8)).sum(-2).unbind(-1))

    def matrix(self, theta: Tensor) -> Tensor:
        return theta

    def direction(self) -> Tensor:
        move = torch.randn(self.theta.shape, generator=torch.Generator().manual_seed(1), dtype=self.theta.dtype)
        return (move + move.mT) / 10

    def jax_product(self, theta: Array, v: Array) -> Array:
        return theta @ v  # of one system: jax.vmap makes the batch

    def exact_product(self) -> tuple[Product, Product]:
        A = self.theta.double().numpy()
        return (lambda v: np.einsum("bij,bj->bi", A, v)), (lambda v: np.einsum("bji,bj->bi", A, v))

    def product_bytes(self) -> float:
        return self.theta.nbytes + 2 * self.b.nbytes


class DenseBatchDirect(DenseBatch):
    """The same by factorisation."""

    key = "W4-direct"
    title = "dense 32×32 systems in a batch, factorised"
    method = "direct"
    rtol = 1e-10


class SparseGrid(Workload):
    """The five-point matrix of a grid in CSR, theta its non-zeros."""

    key = "W5"
    title = "sparse five-point matrix, its non-zeros"
    method = "cg"
    sizes: ClassVar = {"tiny": (12,), "small": (48,), "full": (300,)}
    shift: ClassVar[float] = 0.02

    def data(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n = self.size
        difference = sp.diags_array([np.full(n - 1, -1.0), np.ones(n - 1)], offsets=[0, 1], shape=(n - 1, n))
        D = sp.vstack([sp.kron(difference, sp.eye_array(n)), sp.kron(sp.eye_array(n), difference)])
        weights = np.exp(0.5 * random.standard_normal(D.shape[0]))
        A = (self.shift * sp.eye_array(n * n) + D.T @ sp.diags_array(weights) @ D).tocsr()
        A.sort_indices()
        self.indptr, self.indices = A.indptr.astype(np.int64), A.indices.astype(np.int64)
        self.rows = np.repeat(np.arange(n * n), np.diff(self.indptr))
        self.torch_pattern = tuple(torch.from_numpy(a) for a in (self.indptr, self.indices, self.rows))
        return A.data, random.standard_normal(n * n), random.standard_normal(n * n)

    def matrix(self, theta: Tensor) -> Tensor:
        indptr, indices, _ = self.torch_pattern
        return torch.sparse_csr_tensor(indptr, indices, theta, (len(self.b),) * 2, check_invariants=False)

    def operator(self, theta: Tensor) -> Product:
        A = self.matrix(theta)
        return lambda v: A @ v

    def recorded(self, theta: Tensor) -> Product:
        _, columns, rows = self.torch_pattern
        return lambda v: torch.zeros_like(v).index_add(0, rows, theta * v[columns])

    def fused(self, theta: Tensor) -> Product:
        indptr, columns, rows = self.torch_pattern
        place = torch.arange(len(rows)) - indptr[rows]
        # as many places in each row as the longest has, the same for all of them
        width = int(place.max()) + 1
        index = torch.zeros(len(self.b), width, dtype=torch.int64).index_put((rows, place), columns)
        values = theta.new_zeros(len(self.b), width).index_put((rows, place), theta)
        return lambda v: (values * v[index]).sum(-1)

    def pullback(self, theta: Tensor, w: Tensor, x: Tensor) -> Tensor:
        _, columns, rows = self.torch_pattern
        return w[rows] * x[columns]

    def direction(self) -> Tensor:
        move = torch.randn(len(self.theta), generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy()
        n = len(self.b)
        G = sp.csr_array((move, self.indices, self.indptr), shape=(n, n))
        G = (G + G.T).tocsr()
        G.sort_indices()
        return torch.from_numpy(G.data / 10).to(self.theta.dtype)

    def numpy_operator(self, theta: np.ndarray) -> tuple[Product, Product]:
        A = sp.csr_array((theta, self.indices, self.indptr), shape=(len(self.b),) * 2)
        return A.__matmul__, A.__matmul__

    def numpy_pullback(self, theta: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        return w[self.rows] * x[self.indices]

    def jax_product(self, theta: Array, v: Array) -> Array:
        import jax

        return jax.ops.segment_sum(theta * v[self.indices], self.rows, len(self.b), indices_are_sorted=True)

    def exact_product(self) -> tuple[Product, Product]:
        theta = self.theta.double().numpy()

        def A(v: np.ndarray) -> np.ndarray:
            return np.bincount(self.rows, theta * v[self.indices], minlength=len(self.b))

        return A, A

    def product_bytes(self) -> float:
        return self.theta.nbytes + self.indices.nbytes + self.indptr.nbytes + 2 * self.b.nbytes


class SuperResolution(Workload):
    """Damped least squares: four frames, each blurred by its own PSF and downsampled by two. Theta holds the four PSFs."""

    key = "W6"
    title = "damped least squares, blur and downsample, four frames"
    method = "cgls"
    hermitian = False
    sizes: ClassVar = {"tiny": (16,), "small": (64,), "full": (512,)}
    damp = 0.05
    support: ClassVar[int] = 5
    frames: ClassVar[int] = 4

    def data(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        t = np.arange(self.support) - self.support // 2
        centres = np.array([(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)])[:, :, None]
        rows, columns = (np.exp(-((t - centres[:, k]) ** 2) / 2) for k in (0, 1))
        psf = rows[:, :, None] * columns[:, None] * np.exp(0.1 * random.standard_normal((4, self.support, self.support)))
        n = self.size
        frames = random.standard_normal((self.frames, n // 2, n // 2))
        return psf / psf.sum((1, 2), keepdims=True), frames, random.standard_normal((n, n))

    def operator(self, theta: Tensor) -> Product:
        kernel = theta[:, None]
        return lambda v: torch.nn.functional.conv2d(v[None, None], kernel, stride=2, padding=2)[0]

    def transposed(self, theta: Tensor) -> Product:
        kernel = theta[:, None]
        return lambda y: torch.nn.functional.conv_transpose2d(y[None], kernel, stride=2, padding=2, output_padding=1)[0, 0]

    # In float64 a convolution is a matrix product after a copy of 25 shifts. These are the shifts themselves, of every second
    # column: split once, and each slice is contiguous. A stack is written to memory, while inductor repeats a pad in every use.

    def fused(self, theta: Tensor) -> Product:
        n, half = self.size, self.size // 2

        def A(v: Tensor) -> Tensor:
            p = torch.nn.functional.pad(v, (2, 2, 2, 2))
            q = torch.stack([p[:, ::2], p[:, 1::2]])
            taps = ((i, j) for i in range(self.support) for j in range(self.support))
            return sum(theta[:, i, j, None, None] * q[j % 2, i : i + n : 2, j // 2 : j // 2 + half] for i, j in taps)

        return A

    def fused_transposed(self, theta: Tensor) -> Product:
        half = self.size // 2

        def AT(y: Tensor) -> Tensor:
            p = torch.stack([torch.nn.functional.pad(frame, (1, 1, 1, 1)) for frame in y])

            def phase(row: int, column: int) -> Tensor:
                """Every second pixel in both directions, from these on: the other taps of the PSF miss them."""
                taps = ((i, j) for i in range(row, self.support, 2) for j in range(column, self.support, 2))
                frames = (theta[:, i, j, None, None] * p[:, 2 - i // 2 :, 2 - j // 2 :][:, :half, :half] for i, j in taps)
                return sum(frames).sum(0)

            columns = [torch.stack([phase(row, column) for row in (0, 1)], 1) for column in (0, 1)]
            return torch.stack(columns, -1).reshape(self.cotangent.shape)

        return AT

    def _pattern(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, column and tap of every non-zero of the matrix, which depends on theta by its values only."""
        if not hasattr(self, "pattern"):
            n, half = self.size, self.size // 2
            frame, i, j, k, m = np.ogrid[: self.frames, :half, :half, : self.support, : self.support]
            y, x = 2 * i + k - self.support // 2, 2 * j + m - self.support // 2
            inside = np.broadcast_to((y >= 0) & (y < n) & (x >= 0) & (x < n), (self.frames, half, half, *self.theta.shape[1:]))
            row, column, tap = (frame * half + i) * half + j, y * n + x, (frame * self.support + k) * self.support + m
            self.pattern = tuple(np.broadcast_to(a, inside.shape)[inside] for a in (row, column, tap))
        return self.pattern

    def _sparse(self, theta: np.ndarray) -> sp.csr_array:
        row, column, tap = self._pattern()  # rows ascend
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=self.b.numel()))])
        return sp.csr_array((theta.reshape(-1)[tap], column, indptr), shape=(self.b.numel(), self.cotangent.numel()))

    def numpy_operator(self, theta: np.ndarray) -> tuple[Product, Product]:
        A = self._sparse(theta)
        return A.__matmul__, A.T.__matmul__

    def numpy_pullback(self, theta: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        row, column, tap = self._pattern()
        return np.bincount(tap, w[row] * x[column], minlength=theta.size).reshape(theta.shape)

    def jax_product(self, theta: Array, v: Array) -> Array:
        import jax
        import jax.numpy as jnp

        # a convolution is slower in XLA as well; the barrier keeps it from computing the product anew for every tap of A^T A
        p, half = jnp.pad(v, 2), self.size // 2
        q = [[p[row::2, column::2] for column in (0, 1)] for row in (0, 1)]
        taps = {(i, j): q[i % 2][j % 2][i // 2 :, j // 2 :][:half, :half] for i, j in np.ndindex(self.support, self.support)}
        frames = [sum(frame[tap] * u for tap, u in taps.items()) for frame in theta]
        return jax.lax.optimization_barrier(jnp.stack(frames))

    def exact_product(self) -> tuple[Product, Product]:
        theta, n, half = self.theta.double().numpy(), self.size, self.support // 2

        def A(v: np.ndarray) -> np.ndarray:
            p = np.pad(v, half)
            frames = np.zeros(self.b.shape)
            for i, j in np.ndindex(self.support, self.support):
                frames += theta[:, i, j, None, None] * p[i : i + n : 2, j : j + n : 2]
            return frames

        def AT(y: np.ndarray) -> np.ndarray:
            p = np.zeros((n + 2 * half,) * 2)
            for i, j in np.ndindex(self.support, self.support):
                p[i : i + n : 2, j : j + n : 2] += (theta[:, i, j, None, None] * y).sum(0)
            return p[half:-half, half:-half]

        return A, AT

    def product_bytes(self) -> float:
        return self.b.nbytes + self.cotangent.nbytes


class DenseSmall(Workload):
    """A dense positive definite closure of size 100, so ill conditioned that hundreds of iterations do not finish it."""

    key = "W8"
    title = "microseconds an iteration at n = 100 (dense closure, CG)"
    method = "cg"
    sizes: ClassVar = {"tiny": (100,), "small": (100,), "full": (100,)}

    def data(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        Q, _ = np.linalg.qr(random.standard_normal((self.size, self.size)))
        A = (Q * np.logspace(0, -11, self.size)) @ Q.T
        return (A + A.T) / 2, random.standard_normal(self.size), random.standard_normal(self.size)

    def operator(self, theta: Tensor) -> Product:
        return lambda v: theta @ v

    def numpy_operator(self, theta: np.ndarray) -> tuple[Product, Product]:
        return theta.__matmul__, theta.T.__matmul__

    def numpy_pullback(self, theta: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.outer(w, x)

    def jax_product(self, theta: Array, v: Array) -> Array:
        return theta @ v

    def exact_product(self) -> tuple[Product, Product]:
        A = self.theta.double().numpy()
        return (lambda v: A @ v), (lambda v: A.T @ v)

    def product_bytes(self) -> float:
        return self.theta.nbytes + 2 * self.b.nbytes


def by_matrix(A: sp.csr_array, shape: tuple[int, ...]) -> Product:
    """The product of a sparse matrix with vectors that have a shape."""
    return lambda v: (A @ v.reshape(-1)).reshape(shape)


SOLVES: tuple[type[Workload], ...] = (
    Diffusion, Deconvolution, ConvectionDiffusion, ConvectionDiffusionBiCGStab, DenseBatch, DenseBatchDirect, SparseGrid,
    SuperResolution,
)  # fmt: skip
WORKLOADS: Mapping[str, type[Workload]] = {w.key: w for w in (*SOLVES, StiffDiffusion, DenseSmall, DriftingDiffusion)}
