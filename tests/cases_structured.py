"""Matrices of known structure: triangular, banded, of low rank, permutations, constant along their (anti)diagonals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from operator_cases import COMPLEX, REAL, OperatorCase, away_from_zero, draw
from torch import Tensor

from nablasolve.operators import (
    Banded,
    Circulant,
    Diagonal,
    Hankel,
    Identity,
    LowRank,
    Permutation,
    Toeplitz,
    Triangular,
    Tridiagonal,
)

N = 7
ORDER = torch.tensor([3, 0, 6, 1, 5, 2, 4])
IMAGE_ORDER = torch.tensor([[4, 0, 3], [5, 2, 1]])


def stretched(dtype: torch.dtype) -> dict[str, Tensor]:
    """A matrix with a dominant diagonal."""
    return {"M": draw(N, N, dtype=dtype) / 3 + 3 * torch.eye(N, dtype=dtype)}


def bands(offsets: Sequence[int], n: int = N, diagonal: float = 3.0) -> Callable[[torch.dtype], dict[str, Tensor]]:
    """Diagonals `b0, b1, ...` for the offsets."""

    def parameters(dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            f"b{i}": (0.5 if diagonal else 1) * away_from_zero(n - abs(o), dtype=dtype, seed=i) + (diagonal if o == 0 else 0)
            for i, o in enumerate(offsets)
        }

    return parameters


def placed(diagonals: Sequence[Tensor], offsets: Sequence[int]) -> Tensor:
    """The matrix with these diagonals."""
    return sum((torch.diag(d, o) for d, o in zip(diagonals, offsets, strict=True)), start=torch.zeros(()))


def column_aligned(offsets: Sequence[int]) -> Callable[..., Tensor]:
    """The matrix `A[j - o, j] = bands[k, j]`, entry by entry."""

    def dense(bands: Tensor) -> Tensor:
        n = bands.shape[-1]
        rows = []
        for i in range(n):
            entries = [bands[offsets.index(j - i), j] if j - i in offsets else bands.new_zeros(()) for j in range(n)]
            rows.append(torch.stack(entries))
        return torch.stack(rows)

    return dense


def permuted(order: Tensor, dtype: torch.dtype) -> Tensor:
    """The permutation matrix."""
    return torch.eye(order.numel(), dtype=dtype)[order.reshape(-1)]


def low_rank(m: int, n: int, k: int, **more: Callable[[torch.dtype], Tensor]) -> Callable[[torch.dtype], dict[str, Tensor]]:
    """Thin matrices and further parameters."""

    def parameters(dtype: torch.dtype) -> dict[str, Tensor]:
        thin = {"U": 0.4 * draw(m, k, dtype=dtype, seed=3), "V": 0.4 * draw(n, k, dtype=dtype, seed=4)}
        return thin | {name: make(dtype) for name, make in more.items()}

    return parameters


def away(dtype: torch.dtype) -> Tensor:
    return 1.5 * away_from_zero(N, dtype=dtype)


def scalar(dtype: torch.dtype) -> Tensor:
    return torch.tensor(-0.7, dtype=dtype)


def along_diagonals(column: Tensor, row: Tensor) -> Tensor:
    """`T[i, j]`, entry by entry."""
    m, n = len(column), len(row)
    return torch.stack([torch.stack([column[i - j] if i >= j else row[j - i] for j in range(n)]) for i in range(m)])


def along_antidiagonals(column: Tensor, row: Tensor) -> Tensor:
    """`H[i, j]`, entry by entry."""
    m, n = len(column), len(row)
    return torch.stack([torch.stack([column[i + j] if i + j < m else row[i + j - m + 1] for j in range(n)]) for i in range(m)])


def column_and_row(m: int, n: int, place: int = 0) -> Callable[[torch.dtype], dict[str, Tensor]]:
    """A column and a row; one entry of the column is large, so that a square matrix is well-conditioned."""

    def parameters(dtype: torch.dtype) -> dict[str, Tensor]:
        large = 4.0 * (torch.arange(m) == place)
        return {"column": 0.5 * draw(m, dtype=dtype) + large, "row": 0.5 * draw(n, dtype=dtype, seed=1)}

    return parameters


TRIANGULAR = [
    OperatorCase("lower triangle", stretched, lambda M: Triangular(M), lambda M: torch.tril(M), direct=True),
    OperatorCase("upper triangle", stretched, lambda M: Triangular(M, upper=True), lambda M: torch.triu(M), direct=True),
    OperatorCase(
        "lower triangle, unit diagonal",
        stretched,
        lambda M: Triangular(M, unit_diagonal=True),
        lambda M: torch.tril(M, -1) + torch.eye(N, dtype=M.dtype),
        direct=True,
    ),
    OperatorCase(
        "upper triangle, unit diagonal",
        stretched,
        lambda M: Triangular(M, upper=True, unit_diagonal=True),
        lambda M: torch.triu(M, 1) + torch.eye(N, dtype=M.dtype),
        direct=True,
    ),
]

BANDED = [
    OperatorCase(
        "tridiagonal",
        bands((-1, 0, 1)),
        lambda b0, b1, b2: Tridiagonal(b0, b1, b2),
        lambda b0, b1, b2: placed((b0, b1, b2), (-1, 0, 1)),
        direct=True,
    ),
    OperatorCase(
        "tridiagonal without a diagonal, which needs pivoting",
        bands((-1, 1), n=8, diagonal=0.0),
        lambda b0, b1: Tridiagonal(b0, torch.zeros(8, dtype=b0.dtype), b1),
        lambda b0, b1: placed((b0, b1), (-1, 1)),
        direct=True,
    ),
    OperatorCase(
        "real symmetric tridiagonal",
        bands((0, 1)),
        lambda b0, b1: Tridiagonal.symmetric(b0, b1),
        lambda b0, b1: placed((b1, b0, b1), (-1, 0, 1)),
        dtypes=REAL,
        direct=True,
    ),
    OperatorCase(
        "Hermitian tridiagonal",
        bands((0, 1)),
        lambda b0, b1: Tridiagonal.symmetric(b0, b1),
        lambda b0, b1: placed((b1, b0.real.to(b1.dtype), b1.conj()), (-1, 0, 1)),
        dtypes=COMPLEX,
        direct=True,
    ),
    OperatorCase(
        "banded by a sequence",
        bands((0, 1, -2, 3)),
        lambda b0, b1, b2, b3: Banded((b0, b1, b2, b3), (0, 1, -2, 3)),
        lambda b0, b1, b2, b3: placed((b0, b1, b2, b3), (0, 1, -2, 3)),
        direct=True,
    ),
    OperatorCase(
        "banded by a tensor",
        lambda dtype: {"bands": 0.4 * draw(3, N, dtype=dtype) + torch.tensor([[0.0], [3], [0]])},
        lambda bands: Banded(bands, (2, 0, -1)),
        column_aligned((2, 0, -1)),
        direct=True,
    ),
    OperatorCase(
        "Hermitian banded",
        bands((-2, 0)),
        lambda b0, b1: Banded.symmetric((b0, b1), (-2, 0)),
        lambda b0, b1: placed((b0, b1.real.to(b0.dtype), b0.conj()), (-2, 0, 2)),
        direct=True,
    ),
    OperatorCase("diagonal by its band", bands((0,)), lambda b0: Banded([b0], [0]), lambda b0: torch.diag(b0), direct=True),
    OperatorCase(
        "one side of the diagonal",
        bands((0, 1)),
        lambda b0, b1: Banded([b0, b1], [0, 1]),
        lambda b0, b1: placed((b0, b1), (0, 1)),
        direct=True,
    ),
]

PERMUTATION = [
    OperatorCase(
        "permutation",
        parameters=lambda dtype: {"like": torch.zeros(N, dtype=dtype)},
        build=lambda like: Permutation(ORDER, dtype=like.dtype),
        dense=lambda like: permuted(ORDER, like.dtype),
        direct=True,
    ),
    OperatorCase(
        "permutation of an image",
        parameters=lambda dtype: {"like": torch.zeros(2, 3, dtype=dtype)},
        build=lambda like: Permutation(IMAGE_ORDER, dtype=like.dtype),
        dense=lambda like: permuted(IMAGE_ORDER, like.dtype),
        direct=True,
    ),
    OperatorCase(
        "permuted tridiagonal",
        bands((-1, 0, 1)),
        lambda b0, b1, b2: Tridiagonal(b0, b1, b2).restrict(Permutation(ORDER, dtype=b0.dtype)),
        lambda b0, b1, b2: (
            permuted(ORDER, b0.dtype).mT @ placed((b0, b1, b2), (-1, 0, 1)) @ permuted(ORDER, b0.dtype)  # P^H T P
        ),
        direct=True,
    ),
]

LOW_RANK = [
    OperatorCase("wide of low rank", low_rank(5, N, 2), lambda U, V: LowRank(U, V), lambda U, V: U @ V.mH, solvable=False),
    OperatorCase("square of low rank", low_rank(N, N, 2), lambda U, V: LowRank(U, V), lambda U, V: U @ V.mH, solvable=False),
    OperatorCase("semidefinite of low rank", low_rank(N, N, 2), lambda U, V: LowRank(U), lambda U, V: U @ U.mH, solvable=False),
    OperatorCase(
        "negative semidefinite of full rank",
        low_rank(N, N, 9),
        lambda U, V: -2 * LowRank(U),
        lambda U, V: -2 * U @ U.mH,
        solvable=False,
    ),
    OperatorCase(
        "multiple of low rank",
        low_rank(N, N, 2, c=scalar),
        lambda U, V, c: c * LowRank(U, V) / 2,
        lambda U, V, c: c / 2 * U @ V.mH,
        solvable=False,
    ),
    OperatorCase(
        "sum of low ranks",
        low_rank(N, N, 2),
        lambda U, V: LowRank(U) + LowRank(V),
        lambda U, V: U @ U.mH + V @ V.mH,
        solvable=False,
    ),
    OperatorCase(
        "diagonal plus low rank",
        low_rank(N, N, 2, d=away),
        lambda U, V, d: Diagonal(d) + LowRank(U, V),
        lambda U, V, d: torch.diag(d) + U @ V.mH,
        direct=True,
    ),
    OperatorCase(
        "low rank plus diagonal",
        low_rank(N, N, 2, d=away),
        lambda U, V, d: LowRank(U, V) + Diagonal(d),
        lambda U, V, d: torch.diag(d) + U @ V.mH,
        direct=True,
    ),
    OperatorCase(
        "identity plus a multiple of a semidefinite low rank",
        low_rank(N, N, 2, c=scalar),
        lambda U, V, c: 2 * Identity(U[:, 0]) - c * LowRank(U),
        lambda U, V, c: 2 * torch.eye(N, dtype=U.dtype) - c * U @ U.mH,
        direct=True,
    ),
    OperatorCase(
        "tridiagonal minus two low ranks",
        lambda dtype: low_rank(N, N, 2)(dtype) | bands((-1, 0, 1))(dtype),
        lambda U, V, b0, b1, b2: Tridiagonal(b0, b1, b2) - LowRank(U, V) + LowRank(V, U) / 3,
        lambda U, V, b0, b1, b2: placed((b0, b1, b2), (-1, 0, 1)) - U @ V.mH + V @ U.mH / 3,
        direct=True,
    ),
    OperatorCase(
        "two low ranks and the adjoint of a triangle",
        lambda dtype: low_rank(N, N, 2)(dtype) | stretched(dtype),
        lambda U, V, M: LowRank(V, U).H - LowRank(V) + Triangular(M).H,
        lambda U, V, M: U @ V.mH - V @ V.mH + torch.tril(M).mH,
        direct=True,
    ),
]

BY_FFT = [
    OperatorCase(
        "circulant",
        lambda dtype: {"column": column_and_row(N, N, 1)(dtype)["column"]},
        lambda column: Circulant(column),
        lambda column: torch.stack([torch.stack([column[(i - j) % N] for j in range(N)]) for i in range(N)]),
        direct=True,
    ),
    OperatorCase(
        "circulants combined",
        column_and_row(6, 6),
        lambda column, row: Circulant(column).H @ (Circulant(row) / 2 + 3 * Identity(row)),
        lambda column, row: (
            torch.stack([column.roll(i) for i in range(6)]).conj()
            @ (torch.stack([row.roll(i) for i in range(6)], dim=1) / 2 + 3 * torch.eye(6, dtype=row.dtype))
        ),
        direct=True,
    ),
    OperatorCase(
        "diagonal plus circulant",  # diagonal in no known basis
        column_and_row(6, 6),
        lambda column, row: Diagonal(3 + row) + Circulant(column),
        lambda column, row: torch.diag(3 + row) + torch.stack([column.roll(i) for i in range(6)], dim=1),
    ),
    OperatorCase("Toeplitz", column_and_row(N, N), lambda column, row: Toeplitz(column, row), along_diagonals),
    OperatorCase(
        "Toeplitz by its column",
        lambda dtype: {"column": column_and_row(N, N)(dtype)["column"]},
        lambda column: Toeplitz(column),
        lambda column: along_diagonals(column, column.conj()),
    ),
    OperatorCase(
        "tall Toeplitz", column_and_row(8, 3), lambda column, row: Toeplitz(column, row), along_diagonals, solvable=False
    ),
    OperatorCase(
        "wide Toeplitz", column_and_row(3, 8), lambda column, row: Toeplitz(column, row), along_diagonals, solvable=False
    ),
    OperatorCase("Hankel", column_and_row(N, N, N - 1), lambda column, row: Hankel(column, row), along_antidiagonals),
    OperatorCase(
        "Hankel by its column",
        lambda dtype: {"column": column_and_row(N, N, N - 1)(dtype)["column"]},
        lambda column: Hankel(column),
        lambda column: along_antidiagonals(column, torch.zeros_like(column)),
    ),
    OperatorCase(
        "tall Hankel", column_and_row(8, 3), lambda column, row: Hankel(column, row), along_antidiagonals, solvable=False
    ),
    OperatorCase(
        "wide Hankel", column_and_row(3, 8), lambda column, row: Hankel(column, row), along_antidiagonals, solvable=False
    ),
]

CASES = [*TRIANGULAR, *BANDED, *PERMUTATION, *LOW_RANK, *BY_FFT]
