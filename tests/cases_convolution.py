"""Convolutions and finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from operator_cases import REAL, OperatorCase, draw
from torch import Tensor

from nablasolve.operators import (
    Convolution,
    FiniteDifference,
    FourierFilter,
    Gradient,
    Laplacian,
    VaryingBlur,
)

# what NumPy calls each boundary
PAD = {"circular": "wrap", "zero": "constant", "reflect": "reflect", "symmetric": "symmetric", "replicate": "edge"}
DIFFERENCE_PAD = {"circular": "wrap", "zero": "constant", "neumann": "edge"}


def shifts(shape: Sequence[int], window: Sequence[int], boundary: str, center: Sequence[int] | None = None) -> Tensor:
    """`S[j, n, m] = 1` where pixel `m` stands at `n + center - j`, for a flat kernel position `j`; by NumPy's padding."""
    center = [k // 2 for k in window] if center is None else center
    size = math.prod(shape)
    options = {"constant_values": -1} if boundary == "zero" else {}
    widths = [(k - 1 - c, c) for k, c in zip(window, center, strict=True)]
    pixels = np.pad(np.arange(size).reshape(shape), widths, mode=PAD[boundary], **options)
    S = torch.zeros(math.prod(window), size, size, dtype=torch.float64)
    for t, j in enumerate(itertools.product(*map(range, window))):
        for n, pixel in enumerate(itertools.product(*map(range, shape))):
            m = pixels[tuple(p + k - 1 - i for p, k, i in zip(pixel, window, j, strict=True))]
            if m >= 0:
                S[t, n, m] = 1
    return S


def convolution_matrix(kernel: Tensor, shape: Sequence[int], boundary: str, center: Sequence[int] | None = None) -> Tensor:
    """The matrix of a convolution with one kernel for all, or one for each channel."""
    d = len(shape)
    S = shifts(shape, kernel.shape[-d:], boundary, center).to(kernel.dtype)
    blocks = [torch.einsum("t,tnm->nm", k.reshape(-1), S) for k in kernel.reshape(-1, *kernel.shape[-d:])]
    return torch.block_diag(*blocks)


def difference_matrix(n: int, boundary: str, kind: str, spacing: Any = 1.0) -> Tensor:
    """The matrix of differences along a line, from the identity with a row more on either side."""
    rows = torch.from_numpy(np.pad(np.eye(n), ((1, 1), (0, 0)), mode=DIFFERENCE_PAD[boundary]))
    before, here, after = rows[:-2], rows[1:-1], rows[2:]
    if kind == "second":
        return (before - 2 * here + after) / spacing**2
    D = {"forward": after - here, "backward": here - before, "central": (after - before) / 2}[kind]
    return D / spacing


def on_grid(matrix: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """The matrix that acts along one dimension of a grid."""
    left, right = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    eye = lambda n: torch.eye(n, dtype=matrix.dtype)  # noqa: E731
    return torch.kron(torch.kron(eye(left), matrix), eye(right))


def gradient_matrix(shape: Sequence[int], boundary: str, kind: str = "forward", spacing: Sequence[Any] | None = None) -> Tensor:
    spacing = [1.0] * len(shape) if spacing is None else spacing
    parts = [
        on_grid(difference_matrix(n, boundary, kind, h), shape, i) for i, (n, h) in enumerate(zip(shape, spacing, strict=True))
    ]
    return torch.cat(parts)


def laplacian_matrix(shape: Sequence[int], boundary: str, spacing: Sequence[Any] | None = None) -> Tensor:
    return gradient_matrix(shape, boundary, "second", spacing).reshape(len(shape), math.prod(shape), -1).sum(0)


def near_delta(*window: int, dtype: torch.dtype, channels: tuple[int, ...] = (), center: Sequence[int] | None = None) -> Tensor:
    """A random kernel with so large an entry at its center that the convolution is well-conditioned."""
    kernel = draw(*channels, *window, dtype=dtype) * (0.4 / math.sqrt(math.prod(window)))
    delta = torch.zeros(window, dtype=dtype)
    delta[tuple(k // 2 for k in window) if center is None else tuple(center)] = 2
    return kernel + delta


def convolution(
    name: str,
    shape: tuple[int, ...],
    window: tuple[int, ...],
    boundary: str,
    method: str | None = None,
    channels: tuple[int, ...] = (),
    center: tuple[int, ...] | None = None,
) -> OperatorCase:
    return OperatorCase(
        f"{name}, {boundary}, {method}",
        parameters=lambda dtype: {"kernel": near_delta(*window, dtype=dtype, channels=channels, center=center)},
        build=lambda kernel: Convolution(kernel, shape, boundary=boundary, method=method, center=center),
        dense=lambda kernel: convolution_matrix(kernel, shape, boundary, center),
        direct=boundary == "circular",
    )


def difference(name: str, build: Any, dense: Any, solvable: bool = False, direct: bool = False) -> OperatorCase:
    """An operator without tensors of its own: `build(like=)`, and a real matrix."""
    return OperatorCase(
        name,
        parameters=lambda dtype: {"like": torch.zeros((), dtype=dtype)},
        build=lambda like: build(like=like),
        dense=lambda like: dense().to(like.dtype),
        solvable=solvable,
        direct=direct,
    )


def fourier_matrix(otf: Tensor) -> Tensor:
    """`F^-1 diag(otf) F` of the two-dimensional DFT matrices."""
    F = [torch.exp(-2j * math.pi / n * torch.outer(k, k)) for n in otf.shape for k in [torch.arange(n).to(torch.float64)]]
    whole = torch.kron(*F).to(otf.dtype)
    return whole.mH @ torch.diag(otf.reshape(-1)) @ whole / otf.numel()


CASES = [
    *(
        convolution("2-D", (4, 5), (3, 3), boundary, method)
        for boundary in ("circular", "zero", "reflect", "symmetric", "replicate")
        for method in ("spatial", "fft")
    ),
    convolution("1-D, even", (7,), (4,), "circular", "fft"),
    convolution("1-D, even", (7,), (4,), "replicate", "spatial"),
    convolution("3-D", (3, 2, 4), (2, 1, 3), "circular", "fft"),
    convolution("3-D", (3, 2, 4), (2, 1, 3), "symmetric", "fft"),
    convolution("larger than the image", (3, 4), (5, 9), "circular"),
    convolution("larger than the image", (3, 4), (5, 9), "zero"),
    convolution("larger than the image", (3, 4), (5, 9), "reflect"),
    convolution("larger than the image", (3, 4), (5, 9), "replicate", "spatial"),
    convolution("channels", (3, 4), (3, 2), "circular", channels=(2,)),
    convolution("channels", (3, 4), (3, 2), "zero", "fft", channels=(2,)),
    convolution("off center", (4, 3), (3, 4), "circular", "fft", center=(0, 3)),
    convolution("off center", (4, 3), (3, 4), "zero", "fft", center=(2, 0)),
    convolution("off center", (4, 3), (3, 4), "reflect", "spatial", center=(2, 0)),
    *(
        OperatorCase(
            f"varying blur, {boundary}",
            parameters=lambda dtype: {
                "kernels": 0.3 * draw(3, 4, 3, 2, dtype=dtype) + near_delta(3, 2, dtype=dtype) * torch.ones(3, 4, 1, 1)
            },
            build=lambda kernels, boundary=boundary: VaryingBlur(kernels, boundary=boundary),
            dense=lambda kernels, boundary=boundary: torch.einsum(
                "nt,tnm->nm", kernels.reshape(12, 6), shifts((3, 4), (3, 2), boundary).to(kernels.dtype)
            ),
        )
        for boundary in ("circular", "zero", "reflect", "symmetric", "replicate")
    ),
    OperatorCase(
        "Fourier filter",
        parameters=lambda dtype: {"otf": draw(3, 4, dtype=dtype) + 4},
        build=lambda otf: FourierFilter(otf),
        dense=lambda otf: fourier_matrix(otf),
        dtypes=(torch.complex64, torch.complex128),
        direct=True,
    ),
    OperatorCase(
        "real Fourier filter of a kernel",
        parameters=lambda dtype: {"kernel": near_delta(2, 3, 4, dtype=dtype)},
        build=lambda kernel: FourierFilter(torch.fft.fftn(kernel, dim=(-2, -1)), dims=2, real=True),
        dense=lambda kernel: convolution_matrix(kernel, (3, 4), "circular", (0, 0)),
        dtypes=REAL,
        direct=True,
    ),
    OperatorCase(
        "deconvolution",
        parameters=lambda dtype: {"kernel": near_delta(3, 2, dtype=dtype), "lam": torch.tensor(0.3, dtype=dtype.to_real())},
        build=lambda kernel, lam: Convolution(kernel, (3, 4)).gram() + lam.abs() * Gradient((3, 4), like=kernel).gram(),
        dense=lambda kernel, lam: (
            (lambda M: M.mH @ M)(convolution_matrix(kernel, (3, 4), "circular"))
            - lam.abs() * laplacian_matrix((3, 4), "circular").to(kernel.dtype)
        ),
        direct=True,
    ),
    *(
        difference(
            f"{kind} difference, {boundary}, dim {dim}",
            lambda like, dim=dim, boundary=boundary, kind=kind: FiniteDifference(
                (3, 4), dim, boundary=boundary, kind=kind, spacing=0.5, like=like
            ),
            lambda dim=dim, boundary=boundary, kind=kind: on_grid(
                difference_matrix((3, 4)[dim], boundary, kind, 0.5), (3, 4), dim
            ),
            direct=boundary != "zero",
        )
        for kind, dim in (("forward", 0), ("backward", 1), ("central", 1))
        for boundary in ("circular", "zero", "neumann")
    ),
    *(
        difference(
            f"{kind} gradient, {boundary}",
            lambda like, boundary=boundary, kind=kind: Gradient(
                (3, 4), boundary=boundary, kind=kind, spacing=(1.0, 2.0), like=like
            ),
            lambda boundary=boundary, kind=kind: gradient_matrix((3, 4), boundary, kind, (1.0, 2.0)),
            direct=boundary != "zero",
        )
        for kind in ("forward", "central")
        for boundary in ("circular", "zero", "neumann")
    ),
    difference(
        "gradient, channels",
        lambda like: Gradient((4,), boundary="neumann", channels=(2, 2), like=like),
        lambda: torch.kron(torch.eye(4), gradient_matrix((4,), "neumann")),
        direct=True,
    ),
    difference("gradient, 3-D", lambda like: Gradient((2, 3, 2), like=like), lambda: gradient_matrix((2, 3, 2), "circular")),
    *(
        difference(
            f"{'negative ' if sign < 0 else ''}Laplacian, {boundary}",
            lambda like, boundary=boundary, sign=sign: (
                sign * Laplacian((3, 4), boundary=boundary, spacing=(1.0, 0.5), like=like)
            ),
            lambda boundary=boundary, sign=sign: sign * laplacian_matrix((3, 4), boundary, (1.0, 0.5)),
            solvable=boundary == "zero",
            direct=True,
        )
        for boundary in ("circular", "zero", "neumann")
        for sign in (1, -1)
    ),
    difference(
        "shifted Laplacian, 3-D",
        lambda like: (
            -Laplacian((2, 3, 2), boundary="neumann", like=like) + Laplacian((2, 3, 2), boundary="neumann", like=like).gram(1)
        ),
        lambda: (lambda L: L @ L - L + torch.eye(12))(laplacian_matrix((2, 3, 2), "neumann")),
        solvable=True,
        direct=True,
    ),
    OperatorCase(
        "Laplacian of a learned spacing",
        parameters=lambda dtype: {"h": torch.tensor(0.7, dtype=dtype)},
        build=lambda h: -Laplacian((3, 4), boundary="zero", spacing=(h, 1.0), channels=(2,), like=h),
        dense=lambda h: torch.kron(torch.eye(2, dtype=h.dtype), -laplacian_matrix((3, 4), "zero", (h, 1.0)).to(h.dtype)),
        dtypes=REAL,
        direct=True,
    ),
    OperatorCase(
        "gradient of a learned spacing",
        parameters=lambda dtype: {"h": torch.tensor(0.7, dtype=dtype)},
        build=lambda h: Gradient((5,), boundary="neumann", spacing=h, like=h),
        dense=lambda h: gradient_matrix((5,), "neumann", "forward", (h,)).to(h.dtype),
        dtypes=REAL,
        solvable=False,
        direct=True,
    ),
]
