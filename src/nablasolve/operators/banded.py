"""Banded matrices, and a direct solve with them that is stable without pivoting or dominance, and parallel.

A band of `p` diagonals below and `q` above the main one makes rows `i w ... (i + 1) w - 1`, for `w = p + q`, touch the `2 w`
unknowns from `i w - p` on: those of the *separator* `i`, which starts there, and of separator `i + 1`. So the matrix is a
chain of blocks

    [L_0 R_0]
        [L_1 R_1]
            [L_2 R_2]  ...

and two neighbours share one separator. A QR factorisation of its `2 w` rows eliminates it from `w` of them:

    Q^H [ R_0     L_0  0  ]  =  [ R  C_l  C_r ]      R is triangular: the shared separator, once the outer ones are known
        [ L_1     0   R_1 ]     [ 0  L'   R'  ]      a block of half as long a chain

All pairs of a chain are independent, so `log2(n / w)` levels of batched factorisations of small matrices reduce it to one
block. As every step is orthogonal, this is a QR factorisation of the matrix with its rows and columns reordered, and
backward stable for every matrix (Wright 1992, "Stable parallel algorithms for two-point boundary value problems"; Golub &
Van Loan 2013, §5.2; cyclic reduction, §4.5, which is the same without orthogonality, needs dominance).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .base import StructuredOperator
from .claims import Claims
from .factorisation import Factorisation
from .in_place import with_conjugate, zeros_for
from .spaces import any_batch, is_complex
from .triangular import check_tensor, on_vectors, substitute


class Banded(StructuredOperator):
    """`x -> B x` for a square matrix `B` that is zero outside of a few diagonals.

    A solve is direct where the band reaches from `p` diagonals below to `q` above the main one with `w = p + q <= 128`: a QR
    factorisation in `log2(n / w)` batched levels, of `O(n w^2)` operations and some `8 n w` numbers, backward stable for every
    matrix, whether or not it is dominant. A step of iterative refinement follows where the residual asks for it.

    Args:
        bands: the diagonals, as in `scipy.sparse.diags_array`: a sequence of floating-point or complex Tensors, that of
            offset `o` of shape `(..., n - |o|)` with entries `B[i, i + o]` (or `B[j - o, j]`) in order. Or one Tensor of
            shape `(..., k, n)` with `bands[..., i, j] = B[j - offsets[i], j]`, as in `scipy.sparse.dia_array` and
            `scipy.linalg.solve_banded`; what stands outside of the matrix is not read.
        offsets: of each diagonal from the main one, positive above it.
        claims: `hermitian=True`, `positive_definite=True` and the like, where they are known.

    Raises:
        TypeError: if a diagonal is no Tensor, or an offset no integer.
        ValueError: if the shapes do not agree with the offsets, an offset comes twice, or dtypes or devices differ.
    """

    WIDEST = 128

    def __init__(self, bands: Sequence[Tensor] | Tensor, offsets: Sequence[int], **claims: Any) -> None:
        self.offsets = _checked_offsets(offsets)
        self.bands = _checked_bands(bands, self.offsets)
        n = self.bands[0].shape[-1] + abs(self.offsets[0])
        super().__init__(any_batch((n,), self.bands[0]), claims=Claims.named(claims))

    @classmethod
    def symmetric(cls, bands: Sequence[Tensor] | Tensor, offsets: Sequence[int], **claims: Any) -> Banded:
        """The Hermitian matrix of which the diagonals on one side are given.

        Args:
            bands: as above.
            offsets: none of them negative, or none positive. The main diagonal, if it is among them, is real: the imaginary
                part of complex entries is not read.
            claims: `positive_definite=True` where it is known.

        Raises:
            ValueError: if there are offsets of both signs.
        """
        one_side = _checked_offsets(offsets)
        if min(one_side) < 0 < max(one_side):
            raise ValueError(f"offsets: expected diagonals on one side of the main one, got {list(one_side)}")
        given = _checked_bands(bands, one_side)
        given = tuple(_real(band) if offset == 0 else band for band, offset in zip(given, one_side, strict=True))
        mirrored = [(band.conj(), -offset) for band, offset in zip(given, one_side, strict=True) if offset != 0]
        both = [*zip(given, one_side, strict=True), *mirrored]
        return Banded([band for band, _ in both], [offset for _, offset in both], **{**claims, "hermitian": True})

    @property
    def _n(self) -> int:
        n: int = self.domain.example.shape[-1]
        return n

    def apply(self, x: Tensor) -> Tensor:
        return self._sum(self.offsets, x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        transposed = [-offset for offset in self.offsets]
        return with_conjugate(lambda v: self._sum(transposed, v), y) if is_complex(self.domain) else self._sum(transposed, y)

    def _sum(self, offsets: Sequence[int], x: Tensor) -> Tensor:
        """The product with the matrix that has the bands at the offsets."""
        n = self._n
        result = zeros_for((n,), x, *self.bands)
        for band, offset in zip(self.bands, offsets, strict=True):
            before, after = max(-offset, 0), n - max(offset, 0)
            result[..., before:after].addcmul_(band, x[..., before + offset : after + offset])
        return result

    def factorise(self) -> Factorisation | None:
        below, above = max(0, -min(self.offsets)), max(0, max(self.offsets))
        if below + above > self.WIDEST:
            return None
        entries = self._rows(below, max(above, 1 - below))  # the blocks of a diagonal matrix have one row, too
        chain = _Chain.of(entries, below)
        batch, dtype = entries.shape[:-2], entries.dtype
        return Factorisation(on_vectors(chain.solve, batch, dtype), on_vectors(chain.solve_adjoint, batch, dtype))

    def _rows(self, below: int, above: int) -> Tensor:
        """The entries `B[i, i - below ... i + above]` of each row, `(..., n, below + above + 1)`; 0 outside of the matrix."""
        shape = (*torch.broadcast_shapes(*(band.shape[:-1] for band in self.bands)), self._n)
        columns = dict.fromkeys(range(-below, above + 1), self.bands[0].new_zeros(()))
        for band, offset in zip(self.bands, self.offsets, strict=True):
            columns[offset] = pad(band, (max(-offset, 0), max(offset, 0)))
        return torch.stack([column.expand(shape) for column in columns.values()], dim=-1)

    def exact_diagonal(self) -> Tensor:
        batch = torch.broadcast_shapes(*(band.shape[:-1] for band in self.bands))
        for band, offset in zip(self.bands, self.offsets, strict=True):
            if offset == 0:
                return band.expand(*batch, self._n)
        return self.bands[0].new_zeros((*batch, self._n))

    def exact_trace(self) -> Tensor:
        return self.exact_diagonal().sum(-1)

    def _label(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{offset:+d}' if offset else '0' for offset in self.offsets)})"


class Tridiagonal(Banded):
    """`x -> T x` with `T[i + 1, i] = lower[i]`, `T[i, i] = diagonal[i]` and `T[i, i + 1] = upper[i]`.

    A solve is direct: a QR factorisation in `log2(n)` batched levels that keeps some `16 n` numbers, backward stable
    for every matrix, whether or not it is dominant. A step of iterative refinement follows where the residual asks for it.

    Args:
        lower: a floating-point or complex Tensor of shape `(..., n - 1)`.
        diagonal: of shape `(..., n)`.
        upper: of shape `(..., n - 1)`. All have one dtype, act on vectors of shape `(..., n)`, and their batch dimensions
            broadcast.
        claims: `hermitian=True`, `positive_definite=True` and the like, where they are known.

    Raises:
        TypeError: if one of them is no Tensor.
        ValueError: if their shapes do not agree, or dtypes or devices differ.
    """

    def __init__(self, lower: Tensor, diagonal: Tensor, upper: Tensor, **claims: Any) -> None:
        for name, band in (("lower", lower), ("diagonal", diagonal), ("upper", upper)):
            check_tensor(name, band, 1, "(..., n)" if name == "diagonal" else "(..., n - 1)")
        n = diagonal.shape[-1]
        for name, band in (("lower", lower), ("upper", upper)):
            if band.shape[-1] != n - 1:
                raise ValueError(f"{name}: expected shape (..., {n - 1}) for a diagonal of length {n}, got {tuple(band.shape)}")
        super().__init__((lower, diagonal, upper), (-1, 0, 1), **claims)

    @classmethod
    def symmetric(cls, diagonal: Tensor, off_diagonal: Tensor, **claims: Any) -> Tridiagonal:  # type: ignore[override]
        """The Hermitian matrix with `off_diagonal` below the diagonal and its conjugate above.

        Args:
            diagonal: of shape `(..., n)`; the imaginary part of complex entries is not read.
            off_diagonal: of shape `(..., n - 1)`, real or complex.
            claims: `positive_definite=True` where it is known.
        """
        check_tensor("diagonal", diagonal, 1, "(..., n)")
        check_tensor("off_diagonal", off_diagonal, 1, "(..., n - 1)")
        real = _real(diagonal).to(torch.promote_types(diagonal.dtype, off_diagonal.dtype))
        return Tridiagonal(off_diagonal, real, off_diagonal.conj(), **{**claims, "hermitian": True})

    def _label(self) -> str:
        return "Tridiagonal"


def _real(band: Tensor) -> Tensor:
    return band.real.to(band.dtype) if band.is_complex() else band


def _checked_offsets(offsets: Any) -> tuple[int, ...]:
    try:
        given = tuple(operator.index(offset) for offset in offsets)
    except TypeError:
        raise TypeError(f"offsets: expected a sequence of integers, got {offsets!r}") from None
    if len(given) == 0 or len(set(given)) != len(given):
        raise ValueError(f"offsets: expected at least one, and each of them once, got {list(given)}")
    return given


def _checked_bands(bands: Any, offsets: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The diagonals, each of its own length."""
    if isinstance(bands, Tensor):
        check_tensor("bands", bands, 2, "(..., k, n)")
        if bands.shape[-2] != len(offsets):
            raise ValueError(f"bands: expected shape (..., {len(offsets)}, n) for the offsets, got {tuple(bands.shape)}")
        n = bands.shape[-1]
        _check_reach(offsets, n)
        return tuple(bands[..., i, max(o, 0) : n + min(o, 0)] for i, o in enumerate(offsets))
    if not isinstance(bands, Sequence):
        raise TypeError(f"bands: expected a sequence of Tensors or one Tensor, got {type(bands).__name__}")
    if len(bands) != len(offsets):
        raise ValueError(f"bands: expected one for each of {len(offsets)} offsets, got {len(bands)}")
    for i, band in enumerate(bands):
        check_tensor(f"bands[{i}]", band, 1, "(..., n - |offset|)")
    first = bands[0]
    n = first.shape[-1] + abs(offsets[0])
    _check_reach(offsets, n)
    for i, (band, offset) in enumerate(zip(bands, offsets, strict=True)):
        if band.shape[-1] != n - abs(offset):
            raise ValueError(
                f"bands[{i}]: expected shape (..., {n - abs(offset)}) for offset {offset} of a matrix of size {n}, "
                f"got shape {tuple(band.shape)}"
            )
        if band.dtype != first.dtype or band.device != first.device:
            raise ValueError(
                f"bands[{i}]: expected {first.dtype} on {first.device} like bands[0], got {band.dtype} on {band.device}"
            )
    try:
        torch.broadcast_shapes(*(band.shape[:-1] for band in bands))
    except RuntimeError:
        shapes = ", ".join(str(tuple(band.shape[:-1])) for band in bands)
        raise ValueError(f"bands: the batch dimensions {shapes} do not broadcast") from None
    return tuple(bands)


def _check_reach(offsets: tuple[int, ...], n: int) -> None:
    for offset in offsets:
        if abs(offset) >= n:
            raise ValueError(f"offsets: expected offsets between {1 - n} and {n - 1} for a matrix of size {n}, got {offset}")


@dataclass(frozen=True, eq=False)
class _QR:
    """QR factorisations of `h` tall matrices at once.

    Attributes:
        Q: `(*batch, h, r, r)`.
        R: the triangles, `(*batch, h, w, w)`.
    """

    Q: Tensor
    R: Tensor

    @classmethod
    def of(cls, matrix: Tensor, rounding: float) -> _QR:
        """Factorise matrices `(*batch, h, r, w)`."""
        r, w = matrix.shape[-2:]
        # further columns, any that are independent, make the matrix square: torch differentiates no other complete QR
        index = torch.arange(1, r * (r - w) + 1, dtype=matrix.real.dtype, device=matrix.device)
        further = torch.sin(index**2).to(matrix.dtype).reshape(r, r - w).expand(*matrix.shape[:-2], r, r - w)
        Q, triangle = torch.linalg.qr(torch.cat([matrix, further], dim=-1))
        R = triangle[..., :w, :w]
        # a pivot below rounding may as well have the size of rounding: the solution stays finite, and the error as small
        pivots = R.diagonal(dim1=-2, dim2=-1)
        return cls(Q, R + torch.diag_embed(torch.where(pivots.abs() < rounding, rounding - pivots, 0.0)))


@dataclass(frozen=True, eq=False)
class _Level(_QR):
    """Every second separator, eliminated.

    Attributes:
        left: `C_l`, the coupling with the separator before, `(*batch, h, w, w)`.
        right: `C_r`, that with the separator behind.
    """

    left: Tensor
    right: Tensor


def _eliminate(left: Tensor, right: Tensor, rounding: float) -> tuple[_Level, Tensor, Tensor]:
    """Eliminate every second separator of the chain of blocks `[left_i right_i]`: a level, and half as long a chain."""
    w, paired = left.shape[-1], left.shape[-3] // 2 * 2
    even, odd = slice(0, paired, 2), slice(1, paired, 2)
    qr = _QR.of(torch.cat([right[..., even, :, :], left[..., odd, :, :]], dim=-2), rounding)
    first = qr.Q[..., :w, :].mH @ left[..., even, :, :]
    second = qr.Q[..., w:, :].mH @ right[..., odd, :, :]
    level = _Level(qr.Q, qr.R, first[..., :w, :], second[..., :w, :])
    left = torch.cat([first[..., w:, :], left[..., paired:, :, :]], dim=-3)
    right = torch.cat([second[..., w:, :], right[..., paired:, :, :]], dim=-3)
    return level, left, right


@dataclass(frozen=True, eq=False)
class _Chain:
    """The QR factorisation of a banded matrix, as columns in and columns out.

    Attributes:
        n: the size of the matrix.
        below: the number of diagonals below the main one.
        rows: the size that was divided out of each row, `(*batch, n, 1)`.
        unknowns: that of each unknown, by separator, `(*batch, N + 1, w, 1)`.
        levels: the eliminations, the longest first.
        last: that of the unknowns in the two ends of the chain.
    """

    n: int
    below: int
    rows: Tensor
    unknowns: Tensor
    levels: tuple[_Level, ...]
    last: _QR

    @classmethod
    def of(cls, entries: Tensor, below: int) -> _Chain:
        """Factorise the matrix with the entries `(*batch, n, w + 1)`, those of row `i` from column `i - below` on."""
        n, w = entries.shape[-2], entries.shape[-1] - 1
        # sizes are constants of the algorithm: whatever they are, the solution is the same
        rows = _size(entries.detach().abs().amax(-1, keepdim=True))
        count = -(-n // w)
        identity = torch.zeros(w + 1, dtype=entries.dtype, device=entries.device)
        identity = torch.where(torch.arange(w + 1, device=entries.device) == below, 1.0, identity)
        filler = identity.expand(*entries.shape[:-2], count * w - n, w + 1)
        blocks = torch.cat([entries / rows, filler], dim=-2).reshape(*entries.shape[:-2], count, w, w + 1)
        # row a of a block is shifted by a: fill up to 2w + 1 entries a row, and read 2w a row
        blocks = pad(blocks, (0, w)).flatten(-2)[..., : 2 * w * w].reshape(*blocks.shape[:-1], 2 * w)
        largest = blocks.detach().abs().amax(-2)
        unknowns = _size(torch.maximum(pad(largest[..., :w], (0, 0, 0, 1)), pad(largest[..., w:], (0, 0, 1, 0)))).unsqueeze(-1)
        left, right = blocks[..., :w] / unknowns[..., :-1, :, :].mT, blocks[..., w:] / unknowns[..., 1:, :, :].mT
        rounding = torch.finfo(rows.dtype).eps
        levels = []
        while left.shape[-3] > 1:
            level, left, right = _eliminate(left, right, rounding)
            levels.append(level)
        ends = torch.cat([left[..., below:], right[..., :below]], dim=-1)
        return cls(n, below, rows, unknowns, tuple(levels), _QR.of(ends, rounding))

    @property
    def _width(self) -> int:
        return self.last.R.shape[-1]

    def solve(self, columns: Tensor) -> Tensor:
        """`B^{-1} C` for `(*batch, n, k)` columns."""
        w, k, batch = self._width, columns.shape[-1], columns.shape[:-2]
        count = self.unknowns.shape[-3] - 1
        f = pad(columns / self.rows, (0, 0, 0, count * w - self.n)).reshape(*batch, count, w, k)
        sides = []
        for level in self.levels:
            h = level.R.shape[-3]
            c = level.Q.mH @ f[..., : 2 * h, :, :].reshape(*batch, h, 2 * w, k)
            sides.append(c[..., :w, :])
            f = torch.cat([c[..., w:, :], f[..., 2 * h :, :, :]], dim=-3)
        ends = substitute(self.last.R, self.last.Q.mH @ f, upper=True)
        above = w - self.below
        first = pad(ends[..., :above, :], (0, 0, self.below, 0))  # what stands outside of the matrix is zero
        s = torch.cat([first, pad(ends[..., above:, :], (0, 0, 0, above))], dim=-3)
        for level, side in zip(reversed(self.levels), reversed(sides), strict=True):
            h = level.R.shape[-3]
            side = side - level.left @ s[..., :h, :, :] - level.right @ s[..., 1 : h + 1, :, :]
            eliminated = substitute(level.R, side, upper=True)
            both = torch.stack([s[..., :h, :, :], eliminated], dim=-3).reshape(*batch, 2 * h, w, k)
            s = torch.cat([both, s[..., h:, :, :]], dim=-3)
        return (s / self.unknowns).reshape(*batch, (count + 1) * w, k)[..., self.below : self.below + self.n, :]

    def solve_adjoint(self, columns: Tensor) -> Tensor:
        """`B^{-H} C` for `(*batch, n, k)` columns: the same steps backwards, `R^{-H}` and then `Q`."""
        w, k, batch = self._width, columns.shape[-1], columns.shape[:-2]
        count = self.unknowns.shape[-3] - 1
        s = pad(columns, (0, 0, self.below, (count + 1) * w - self.n - self.below))
        s = s.reshape(*batch, count + 1, w, k) / self.unknowns
        sides = []
        for level in self.levels:
            h = level.R.shape[-3]
            z = substitute(level.R.mH, s[..., 1 : 2 * h : 2, :, :], upper=False)
            sides.append(z)
            effect = pad(level.left.mH @ z, (0, 0, 0, 0, 0, 1)) + pad(level.right.mH @ z, (0, 0, 0, 0, 1, 0))
            s = torch.cat([s[..., : 2 * h + 1 : 2, :, :] - effect, s[..., 2 * h + 1 :, :, :]], dim=-3)
        ends = torch.cat([s[..., :1, self.below :, :], s[..., 1:, : self.below, :]], dim=-2)
        f = self.last.Q @ substitute(self.last.R.mH, ends, upper=False)
        for level, z in zip(reversed(self.levels), reversed(sides), strict=True):
            h = level.R.shape[-3]
            pairs = level.Q @ torch.cat([z, f[..., :h, :, :]], dim=-2)
            f = torch.cat([pairs.reshape(*batch, 2 * h, w, k), f[..., h:, :, :]], dim=-3)
        return f.reshape(*batch, count * w, k)[..., : self.n, :] / self.rows


def _size(values: Tensor) -> Tensor:
    """The values, and 1 for 0."""
    return torch.where(values == 0, 1.0, values)
