"""Operators that observe a part of an image, and the transforms of imaging."""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from operator_cases import OperatorCase, away_from_zero, draw
from torch import Tensor

from nablasolve.operators import (
    DFT,
    CoilSensitivities,
    Downsample,
    Mask,
    Mosaic,
    Radon,
    Subsample,
    Wavelet,
)

PATTERN = torch.tensor([[True, False, True], [False, True, True]])
REAL = (torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)


def like(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"like": torch.zeros((), dtype=dtype)}


def where(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """All positions of an array in row-major order."""
    return list(itertools.product(*map(range, shape)))


def rows_of_identity(rows: Sequence[int], n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype)[list(rows)]


def dft_matrix(shape: Sequence[int], dims: Sequence[int], centered: bool, factor: float, like: Tensor) -> Tensor:
    """The sum of the definition, entry by entry."""
    entries = where(shape)
    M = torch.zeros(len(entries), len(entries), dtype=torch.complex128)
    for row, k in enumerate(entries):
        for column, n in enumerate(entries):
            if any(k[d] != n[d] for d in range(len(shape)) if d not in dims):
                continue
            shift = [shape[d] // 2 if centered else 0 for d in dims]
            phase = sum((k[d] - s) * (n[d] - s) / shape[d] for d, s in zip(dims, shift, strict=True))
            M[row, column] = factor * cmath.exp(-2j * cmath.pi * phase)
    return M.to(like.dtype)


def wavelet_matrix(h: Tensor, n: int, levels: int) -> Tensor:
    """The wavelet transform of a signal: one matrix a level, written row by row."""
    whole = torch.eye(n, dtype=h.dtype)
    for level in range(levels):
        size, taps = n >> level, len(h)
        step = torch.eye(n, dtype=h.dtype)
        rows = []
        for part in range(2):
            for k in range(size // 2):
                row = torch.zeros(n, dtype=h.dtype)
                for j in range(taps):
                    weight = h[j] if part == 0 else (-1) ** j * h[taps - 1 - j]
                    place = torch.zeros(n, dtype=h.dtype)
                    place[(2 * k + j - taps // 2 + 1) % size] = 1
                    row = row + weight * place
                rows.append(row)
        whole = torch.cat([torch.stack(rows), step[size:]]) @ whole
    return whole


def wavelet_matrix_of_an_image(h: Tensor, shape: tuple[int, int], levels: int) -> Tensor:
    """The Kronecker products of one level each on the corner of averages."""
    entries = where(shape)
    whole = torch.eye(len(entries), dtype=h.dtype)
    for level in range(levels):
        size = tuple(n >> level for n in shape)
        corner = [i for i, (row, column) in enumerate(entries) if row < size[0] and column < size[1]]
        place = torch.eye(len(entries), dtype=h.dtype)[corner]
        step = torch.kron(wavelet_matrix(h, size[0], 1), wavelet_matrix(h, size[1], 1))
        whole = (torch.eye(len(entries), dtype=h.dtype) - place.mT @ place + place.mT @ step @ place) @ whole
    return whole


def outside(position: int, n: int, boundary: str) -> int | None:
    """Which entry stands at a position outside of an array."""
    if 0 <= position < n:
        return position
    if boundary == "zero":
        return None
    if boundary == "circular":
        return position % n
    if boundary == "replicate":
        return 0 if position < 0 else n - 1
    if boundary == "symmetric":
        while not 0 <= position < n:
            position = -1 - position if position < 0 else 2 * n - 1 - position
        return position
    while not 0 <= position < n:
        position = -position if position < 0 else 2 * (n - 1) - position
    return position


def downsample_matrix(kernel: Tensor, shape: Sequence[int], factor: Sequence[int], boundary: str) -> Tensor:
    """The weight of each tap, added where it reads."""
    small = [n // f for n, f in zip(shape, factor, strict=True)]
    offset = [math.ceil((k - f) / 2) for k, f in zip(kernel.shape, factor, strict=True)]
    index = {position: i for i, position in enumerate(where(shape))}
    rows = []
    for i in where(small):
        row = torch.zeros(len(index), dtype=kernel.dtype)
        for tap in where(kernel.shape):
            read = [outside(f * a + j - o, n, boundary) for f, a, j, o, n in zip(factor, i, tap, offset, shape, strict=True)]
            if None not in read:
                place = torch.zeros(len(index), dtype=kernel.dtype)
                place[index[tuple(read)]] = 1  # type: ignore[arg-type]
                row = row + kernel[tap] * place
        rows.append(row)
    return torch.stack(rows)


def gaussian(factor: int) -> Tensor:
    if factor == 1:
        return torch.ones(1, dtype=torch.float64)
    g = torch.tensor(
        [math.exp(-2 * ((i - (3 * factor - 1) / 2) / factor) ** 2) for i in range(3 * factor)], dtype=torch.float64
    )
    return g / g.sum()


def radon_matrix(shape: tuple[int, int], angles: Tensor, detectors: int, width: float) -> Tensor:
    """Areas as second differences of `max(t, 0)^2 / 2`: a pixel's section is the convolution of two boxes."""
    a, b = torch.cos(angles), torch.sin(angles)

    def area_below(t: Tensor) -> Tensor:
        corners = [t + (p * a + q * b) / 2 for p, q in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
        signs = (1, -1, -1, 1)
        return sum(s * c.clamp(min=0).square() / 2 for s, c in zip(signs, corners, strict=True)) / (a * b)

    columns = []
    for row, column in where(shape):
        centre = (column - (shape[1] - 1) / 2) * a + ((shape[0] - 1) / 2 - row) * b
        edges = [(k - detectors / 2) * width - centre for k in range(detectors + 1)]
        areas = torch.stack([area_below(high) - area_below(low) for low, high in itertools.pairwise(edges)], dim=1)
        columns.append(areas.flatten() / width)
    return torch.stack(columns, dim=1)


def downsample_case(name: str, shape: Sequence[int], factor: Sequence[int], boundary: str, *kernel: int) -> OperatorCase:
    return OperatorCase(
        f"downsample, {name}",
        parameters=lambda dtype: {"kernel": draw(*kernel, dtype=dtype)},
        build=lambda kernel: Downsample(shape, factor, kernel, boundary=boundary),
        dense=lambda kernel: downsample_matrix(kernel, shape, factor, boundary),
        solvable=False,
    )


def dft_case(name: str, shape: Sequence[int], factor: Callable[[int], float], dims: Sequence[int], **options) -> OperatorCase:
    count = math.prod(shape[d] for d in dims)
    return OperatorCase(
        f"DFT, {name}",
        parameters=like,
        build=lambda like: DFT(shape, dims, like=like, **options),
        dense=lambda like: dft_matrix(shape, dims, options.get("centered", False), factor(count), like),
        dtypes=COMPLEX,
        direct=True,
    )


def radon_case(name: str, shape: tuple[int, int], detectors: int, width: float) -> OperatorCase:
    return OperatorCase(
        f"Radon, {name}",
        # away from the axes, where the reference divides by zero
        parameters=lambda dtype: {"angles": torch.tensor([0.3, 0.9, 2.2, 4.0], dtype=dtype)},
        build=lambda angles: Radon(shape, angles, detectors, width=width),
        dense=lambda angles: radon_matrix(shape, angles, detectors, width),
        dtypes=REAL,
        solvable=False,
    )


CASES = [
    OperatorCase(
        "boolean mask",
        parameters=like,
        build=lambda like: Mask(PATTERN, like=like),
        dense=lambda like: torch.diag(PATTERN.reshape(-1).to(like.dtype)),
        solvable=False,
        direct=True,
    ),
    OperatorCase(
        "boolean mask of all channels",
        parameters=like,
        build=lambda like: Mask(PATTERN, (2, 2, 3), like=like),
        dense=lambda like: torch.diag(PATTERN.reshape(-1).repeat(2).to(like.dtype)),
        solvable=False,
        direct=True,
    ),
    OperatorCase(
        "mask of weights",
        parameters=lambda dtype: {"mask": away_from_zero(2, 3, dtype=dtype)},
        build=lambda mask: Mask(mask),
        dense=lambda mask: torch.diag(mask.reshape(-1)),
        direct=True,
    ),
    OperatorCase(
        "mask of weights for each column",
        parameters=lambda dtype: {"mask": away_from_zero(1, 3, dtype=dtype)},
        build=lambda mask: Mask(mask, (2, 3)),
        dense=lambda mask: torch.diag(mask.reshape(-1).repeat(2)),
        direct=True,
    ),
    OperatorCase(
        "damped mask",
        parameters=lambda dtype: {"weight": away_from_zero(dtype=dtype)},
        build=lambda weight: Mask(PATTERN, like=weight).gram(0.5) + weight.abs() * Mask(~PATTERN, like=weight),
        dense=lambda weight: torch.diag(torch.where(PATTERN, 1.25, 0.25 + weight.abs()).reshape(-1)).to(weight.dtype),
        direct=True,
    ),
    OperatorCase(
        "subsample by mask",
        parameters=like,
        build=lambda like: Subsample((2, 3), mask=PATTERN, like=like),
        dense=lambda like: rows_of_identity((0, 2, 4, 5), 6, like),
        solvable=False,
        direct=True,
    ),
    OperatorCase(
        "subsample by indices",
        parameters=like,
        build=lambda like: Subsample((2, 3), [[5, 0], [3, 1]], like=like),
        dense=lambda like: rows_of_identity((5, 0, 3, 1), 6, like),
        solvable=False,
        direct=True,
    ),
    OperatorCase(
        "subsample by steps",
        parameters=like,
        build=lambda like: Subsample((2, 3, 5), step=(1, 2, 3), like=like),
        dense=lambda like: rows_of_identity(
            [i for i, (_, row, column) in enumerate(where((2, 3, 5))) if row % 2 == 0 and column % 3 == 0], 30, like
        ),
        solvable=False,
        direct=True,
    ),
    OperatorCase(
        "mosaic",
        parameters=like,
        build=lambda like: Mosaic((3, 3, 2), "GRBG", like=like),
        dense=lambda like: rows_of_identity([6 * c + i for i, c in enumerate((1, 0, 2, 1, 1, 0))], 18, like),
        solvable=False,
        direct=True,
    ),
    OperatorCase(
        "mosaic of three planes",
        parameters=like,
        build=lambda like: Mosaic((3, 3, 2), keep_channels=True, like=like),
        dense=lambda like: torch.diag(
            torch.tensor(
                [float(c == (0, 1, 1, 2)[2 * (row % 2) + column % 2]) for c, row, column in where((3, 3, 2))], dtype=like.dtype
            )
        ),
        solvable=False,
        direct=True,
    ),
    downsample_case("odd kernel, zero", (6,), (2,), "zero", 3),
    downsample_case("even kernel, circular", (4, 6), (2, 3), "circular", 4, 3),
    downsample_case("even kernel of odd blocks, reflect", (4, 6), (2, 3), "reflect", 5, 2),
    downsample_case("kernel larger than the image, reflect", (4,), (2,), "reflect", 12),
    downsample_case("kernel larger than the image, symmetric", (4,), (2,), "symmetric", 13),
    downsample_case("volume, replicate", (2, 4, 2), (1, 2, 2), "replicate", 1, 5, 3),
    downsample_case("volume, zero", (2, 4, 2), (1, 2, 1), "zero", 2, 3, 4),
    OperatorCase(
        "downsample, box",
        parameters=like,
        build=lambda like: Downsample((4, 6), (2, 3), "box", like=like),
        dense=lambda like: downsample_matrix(torch.full((2, 3), 1 / 6, dtype=like.dtype), (4, 6), (2, 3), "zero"),
        solvable=False,
    ),
    OperatorCase(
        "downsample, Gaussian",
        parameters=like,
        build=lambda like: Downsample((6, 4, 1), (3, 2, 1), like=like),
        dense=lambda like: downsample_matrix(
            (gaussian(3)[:, None, None] * gaussian(2)[:, None]).to(like.dtype), (6, 4, 1), (3, 2, 1), "reflect"
        ),
        solvable=False,
    ),
    dft_case("of a signal", (5,), lambda n: n**-0.5, (0,)),
    dft_case("of an image", (3, 4), lambda n: n**-0.5, (0, 1)),
    dft_case("of some dimensions", (3, 2, 3), lambda n: n**-0.5, (0, 2)),
    dft_case("centred", (3, 4), lambda n: n**-0.5, (0, 1), centered=True),
    dft_case("without a factor", (3, 4), lambda n: 1.0, (0, 1), norm="backward"),
    dft_case("with the whole factor, centred", (4, 3), lambda n: 1 / n, (1,), norm="forward", centered=True),
    OperatorCase(
        "coil sensitivities",
        parameters=lambda dtype: {"maps": draw(3, 2, 4, dtype=dtype)},
        build=lambda maps: CoilSensitivities(maps),
        dense=lambda maps: torch.cat([torch.diag(s.reshape(-1)) for s in maps]),
        solvable=False,
        direct=True,
    ),
    OperatorCase(
        "multi-coil MRI",
        parameters=lambda dtype: {"maps": draw(3, 2, 3, dtype=dtype)},
        build=lambda maps: (
            Mask(PATTERN, maps.shape, like=maps) @ DFT(maps.shape, (-2, -1), like=maps) @ CoilSensitivities(maps)
        ),
        dense=lambda maps: torch.cat(
            [PATTERN.reshape(-1, 1) * dft_matrix((2, 3), (0, 1), False, 6**-0.5, maps) * s.reshape(-1) for s in maps]
        ),
        dtypes=COMPLEX,
        solvable=False,
    ),
    radon_case("all detectors", (3, 4), 5, 1.0),
    radon_case("few detectors", (4, 3), 3, 0.7),
    radon_case("wide detectors", (4, 4), 4, 2.5),
    OperatorCase(
        "wavelet, Haar",
        parameters=like,
        build=lambda like: Wavelet((8,), "haar", like=like),
        dense=lambda like: wavelet_matrix(torch.full((2,), 0.5**0.5, dtype=torch.float64), 8, 2).to(like.dtype),
        direct=True,
    ),
    OperatorCase(
        "wavelet of an image",
        parameters=like,
        build=lambda like: Wavelet((4, 8), "db2", 2, like=like),
        dense=lambda like: wavelet_matrix_of_an_image(daubechies(), (4, 8), 2).to(like.dtype),
        direct=True,
    ),
    OperatorCase(
        "wavelet of one dimension",
        parameters=like,
        build=lambda like: Wavelet((3, 6), "db2", 1, dims=(-1,), like=like),
        dense=lambda like: torch.block_diag(*[wavelet_matrix(daubechies(), 6, 1)] * 3).to(like.dtype),
        direct=True,
    ),
    OperatorCase(
        "wavelet with a filter",
        parameters=lambda dtype: {"h": (daubechies() + 0.05 * draw(4)).to(dtype)},
        build=lambda h: Wavelet((8,), h, 2),
        dense=lambda h: wavelet_matrix(h, 8, 2),
        dtypes=REAL,
    ),
]


def daubechies() -> Tensor:
    """The roots of the equations for four taps: orthonormal, and a moment of the details that vanishes beside their mean."""
    angle = math.pi / 3  # the filters of four taps and one vanishing moment are a circle; this one has two
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([1 - c + s, 1 + c + s, 1 + c - s, 1 - c - s], dtype=torch.float64) / (2 * 2**0.5)
