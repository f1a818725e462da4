"""Matrices with constant diagonals or antidiagonals, applied by fast Fourier transforms in `O(n log n)`.

Source: Golub & Van Loan 2013, §4.8 (circulant systems; a Toeplitz matrix is part of a circulant one).
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .base import StructuredOperator
from .claims import Claims
from .convolution import filtered, transform
from .in_place import with_conjugate
from .spaces import any_batch
from .spectrum import Fourier, Spectrum
from .triangular import check_tensor


class _Circular(StructuredOperator):
    """A part of a circular convolution with a kernel, whose transform one solve needs once."""

    column: Tensor
    kept: Tensor | None = None

    @abstractmethod
    def _kernel(self) -> Tensor: ...

    @property
    @abstractmethod
    def _circle(self) -> int:
        """The size of the convolution, to which the kernel is filled up with zeros."""

    def _transform(self, full: bool) -> Tensor:
        """The transform of the kernel, of all frequencies or of the half that determines a real one."""
        if self.kept is not None and full == self.column.is_complex():
            return self.kept
        return transform(self._kernel(), (self._circle,), full)

    def for_one_solve(self) -> _Circular:
        result = copy.copy(self)
        result.kept = self._transform(self.column.is_complex())
        return result

    def _convolved(self, x: Tensor, adjoint: bool = False) -> Tensor:
        """The convolution with a vector, filled up with zeros, or the correlation."""
        full = self.column.is_complex() or x.is_complex()
        return filtered(x, self._transform(full), (self._circle,), full, adjoint)


class Circulant(_Circular):
    """`x -> C x` with `C[i, j] = column[(i - j) mod n]`, a circular convolution; `scipy.linalg.circulant`.

    It is diagonal in the Fourier basis, with the transform of the column for eigenvalues, and so solved directly.

    Args:
        column: the first column, a floating-point or complex Tensor of shape `(..., n)`. It acts on vectors of shape
            `(..., n)`; batch dimensions broadcast.
        claims: `hermitian=True`, `positive_definite=True`, `unitary=True` and the like, where they are known.

    Raises:
        TypeError: if `column` is no Tensor.
        ValueError: if it has no dimension or no entry, or an integer dtype.
    """

    def __init__(self, column: Tensor, **claims: Any) -> None:
        _check_entries("column", column, "(..., n)")
        super().__init__(any_batch(column.shape[-1:], column), claims=Claims.named(claims))
        self.column = column

    def apply(self, x: Tensor) -> Tensor:
        return self._convolved(x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self._convolved(y, adjoint=True)

    def _kernel(self) -> Tensor:
        return self.column

    @property
    def _circle(self) -> int:
        return self.column.shape[-1]

    def spectrum(self) -> Spectrum:
        n = self.column.shape[-1]
        return Spectrum(Fourier((n,)), self._transform(full=True), torch.Size((n,)), real=not self.column.is_complex())

    def exact_diagonal(self) -> Tensor:
        return self.column[..., :1].expand(self.column.shape)


class _ColumnAndRow(_Circular):
    """A matrix given by a column, and by a row or a rule for it.

    For `m` rows and `n` columns the kernel has `m + n - 1` entries, and a circle of that size suffices: what wraps around it
    falls on the first `n - 1` entries of the convolution, which are not read.
    """

    def __init__(self, column: Tensor, row: Tensor | None, claims: dict[str, Any]) -> None:
        _check_entries("column", column, "(..., m)")
        if row is not None:
            _check_row(column, row)
        self.column, self.row = column, row
        m, n = self._size
        domain = any_batch((n,), column)
        super().__init__(domain, domain if m == n else any_batch((m,), column), Claims.named(claims))

    @property
    def _size(self) -> tuple[int, int]:
        """The numbers of rows and of columns."""
        return self.column.shape[-1], (self.column if self.row is None else self.row).shape[-1]

    @property
    def _circle(self) -> int:
        return _smooth(sum(self._size) - 1)


class Toeplitz(_ColumnAndRow):
    """`x -> T x` with `T[i, j] = column[i - j]` on and below the diagonal and `row[j - i]` above; `scipy.linalg.toeplitz`.

    Args:
        column: the first column, a floating-point or complex Tensor of shape `(..., m)`.
        row: the first row, of shape `(..., n)` and the same dtype; its first entry is not read, since `column` holds it. By
            default the conjugate of the column: the operator is then known to be Hermitian where it is real; where it is
            complex, `hermitian=True` says that the first entry is real.
        claims: `hermitian=True`, `positive_definite=True` and the like, where they are known.

    Raises:
        TypeError: if `column` or `row` is no Tensor.
        ValueError: if they have different dtypes or devices, no entry, or batch dimensions that do not broadcast.
    """

    def __init__(self, column: Tensor, row: Tensor | None = None, **claims: Any) -> None:
        super().__init__(column, row, claims)
        self.claims |= Claims(hermitian=row is None and not column.is_complex())

    def _kernel(self) -> Tensor:
        """The entries of the diagonals, from the upper right corner to the lower left one."""
        row = self.column.conj() if self.row is None else self.row
        return _joined(row[..., 1:].flip(-1), self.column)

    def apply(self, x: Tensor) -> Tensor:
        m, n = self._size
        return self._convolved(x)[..., n - 1 : n - 1 + m]

    def apply_adjoint(self, y: Tensor) -> Tensor:
        m, n = self._size
        return self._convolved(pad(y, (n - 1, self._circle - (n - 1 + m))), adjoint=True)[..., :n]

    def exact_diagonal(self) -> Tensor | None:
        m, n = self._size
        return self.column[..., :1].expand(self.column.shape) if m == n else None


class Hankel(_ColumnAndRow):
    """`x -> H x` with `H[i, j] = column[i + j]`, and `row[i + j - m + 1]` beyond its end; `scipy.linalg.hankel`.

    A real square one is symmetric.

    Args:
        column: the first column, a floating-point or complex Tensor of shape `(..., m)`.
        row: the last row, of shape `(..., n)` and the same dtype; its first entry is not read, since `column` holds it. By
            default `m` zeros.
        claims: `positive_definite=True` and the like, where they are known.

    Raises:
        TypeError: if `column` or `row` is no Tensor.
        ValueError: if they have different dtypes or devices, no entry, or batch dimensions that do not broadcast.
    """

    def __init__(self, column: Tensor, row: Tensor | None = None, **claims: Any) -> None:
        super().__init__(column, row, claims)
        m, n = self._size
        self.claims |= Claims(hermitian=m == n and not column.is_complex())

    def _kernel(self) -> Tensor:
        """The entries of the antidiagonals, from the upper left corner to the lower right one."""
        row = torch.zeros_like(self.column) if self.row is None else self.row
        return _joined(self.column, row[..., 1:])

    # a Hankel matrix is a Toeplitz matrix times the reversal of the vector, and its transpose is one of the same kernel
    def apply(self, x: Tensor) -> Tensor:
        m, n = self._size
        return self._convolved(x.flip(-1))[..., n - 1 : n - 1 + m]

    def apply_adjoint(self, y: Tensor) -> Tensor:
        adjoint: Tensor = with_conjugate(self._apply_transpose, y) if self.column.is_complex() else self._apply_transpose(y)
        return adjoint

    def _apply_transpose(self, y: Tensor) -> Tensor:
        m, n = self._size
        return self._convolved(y.flip(-1))[..., m - 1 : m - 1 + n]

    def exact_diagonal(self) -> Tensor | None:
        m, n = self._size
        return self._kernel()[..., ::2] if m == n else None


def _check_entries(name: str, entries: Any, shape: str) -> None:
    check_tensor(name, entries, 1, shape)
    if entries.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one entry, got shape {tuple(entries.shape)}")


def _check_row(column: Tensor, row: Any) -> None:
    _check_entries("row", row, "(..., n)")
    if row.dtype != column.dtype or row.device != column.device:
        raise ValueError(f"row: expected {column.dtype} on {column.device} like column, got {row.dtype} on {row.device}")
    batch, own = tuple(column.shape[:-1]), tuple(row.shape[:-1])
    try:
        torch.broadcast_shapes(batch, own)
    except RuntimeError:
        raise ValueError(f"row: its batch dimensions {own} do not broadcast with those of column, {batch}") from None


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Two tensors one after the other in the last dimension; their batch dimensions broadcast."""
    batch = torch.broadcast_shapes(first.shape[:-1], second.shape[:-1])
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in (first, second)], dim=-1)


def _smooth(length: int) -> int:
    """The smallest size of the form `2^a`, `3 * 2^a` or `5 * 2^a`, for which transforms are fast, that is not less."""
    return min(factor << max(0, -(-length // factor) - 1).bit_length() for factor in (1, 3, 5))
