"""Orthonormal wavelets, by periodic filter banks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice, check_integer
from ..vectors import real_dtype
from .base import StructuredOperator
from .claims import Claims
from .convolution import check_sizes
from .fourier import check_dims
from .sampling import vector_dtype
from .spaces import any_batch

ROOT2, ROOT3 = 2**0.5, 3**0.5
FILTERS = {
    "haar": (1 / ROOT2, 1 / ROOT2),
    "db2": tuple(c / (4 * ROOT2) for c in (1 + ROOT3, 3 + ROOT3, 3 - ROOT3, 1 - ROOT3)),
}


class Wavelet(StructuredOperator):
    """The analysis of a periodic signal in orthonormal wavelets; `W.H` is the synthesis.

    A level halves each dimension: in the first half the averages `sum_j h[j] x[2k + j - s]`, in the second the details
    `sum_j (-1)^j h[L-1-j] x[2k + j - s]`, with `s = L / 2 - 1`. The next level takes the corner of averages. So the result has
    the shape of `x`, with the coarsest averages in its first corner; the coefficients are those of PyWavelets in its mode
    "periodization".

    Args:
        shape: of `x`, without batch dimensions.
        wavelet: `"haar"`; `"db2"`, of Daubechies with two vanishing moments; or the filter `h`, a 1-d real tensor of even
            length such as `torch.tensor(pywt.Wavelet("db4").rec_lo)`.
        levels: how many; by default as many as halve every transformed dimension exactly and leave it at least as long as the
            filter.
        dims: the dimensions of `shape` to transform, by default all.
        like: a tensor with the dtype and device of `x`; by default the filter, or torch's default dtype.
        claims: `unitary=True` for a filter that is a tensor, if its even translates are orthonormal: its values are not
            read. The named ones are known to be unitary.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the wavelet is unknown, the filter has an odd length, or a dimension cannot be halved so often.

    Source: Mallat 1989; Daubechies 1988.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        wavelet: str | Tensor = "db2",
        levels: int | None = None,
        *,
        dims: Sequence[int] | None = None,
        like: Tensor | None = None,
        **claims: Any,
    ) -> None:
        shape = check_sizes("shape", shape)
        self.dims = check_dims("dims", dims, len(shape))
        dtype = vector_dtype(like)
        known = Claims.named(claims)
        if isinstance(wavelet, Tensor):
            if wavelet.ndim != 1 or wavelet.shape[0] % 2 or not wavelet.shape[0]:
                raise ValueError(f"wavelet: expected a 1-d filter of even length, got shape {tuple(wavelet.shape)}")
            if not wavelet.is_floating_point():
                raise ValueError(f"wavelet: expected a floating-point dtype, got {wavelet.dtype}")
            self.wavelet, self.filter = "filter", wavelet
            dtype = wavelet.dtype if like is None else torch.promote_types(wavelet.dtype, dtype)
            like = wavelet if like is None else like
        elif isinstance(wavelet, str):
            self.wavelet = check_choice("wavelet", wavelet, tuple(FILTERS))
            device = None if like is None else like.device
            self.filter = torch.tensor(FILTERS[wavelet], dtype=real_dtype(dtype), device=device)
            known |= Claims(isometric=True, coisometric=True)
        else:
            raise TypeError(f"wavelet: expected a name or a Tensor, got {type(wavelet).__name__}")
        sizes = [shape[d] for d in self.dims]
        most = min(_halvings(n, self.filter.shape[0]) for n in sizes)
        self.levels = most if levels is None else check_integer("levels", levels)
        if self.levels < 0 or any(n % 2**self.levels for n in sizes):
            raise ValueError(f"levels: expected sizes that 2^levels divides, got levels={self.levels} for sizes {tuple(sizes)}")
        super().__init__(any_batch(shape, like, dtype), claims=known)

    def apply(self, x: Tensor) -> Tensor:
        for level in range(self.levels):
            part = self._corner(x, level)
            for dim in self.dims:
                part = self._analysed(part, dim)
            x = self._with_corner(x, part)
        return x

    def apply_adjoint(self, y: Tensor) -> Tensor:
        for level in reversed(range(self.levels)):
            part = self._corner(y, level)
            for dim in self.dims:
                part = self._synthesised(part, dim)
            y = self._with_corner(y, part)
        return y

    def _taps(self) -> tuple[Tensor, Tensor]:
        """The low-pass and the high-pass filter, of shape `(taps / 2, 2)`: even and odd entries."""
        even, odd = self.filter.flip(0).reshape(-1, 2).unbind(1)
        return self.filter.reshape(-1, 2), torch.stack([even, -odd], 1)

    def _analysed(self, x: Tensor, dim: int) -> Tensor:
        low, high = self._taps()
        even, odd = x.roll(len(low) - 1, dim).unflatten(dim, (x.shape[dim] // 2, 2)).unbind(dim)
        # a sum over pairs of taps: entry k meets entries 2(k + m) and 2(k + m) + 1
        halves = [
            torch.stack([t[m, 0] * even.roll(-m, dim) + t[m, 1] * odd.roll(-m, dim) for m in range(len(t))]).sum(0)
            for t in (low, high)
        ]
        return torch.cat(halves, dim)

    def _synthesised(self, y: Tensor, dim: int) -> Tensor:
        pairs = list(zip(self._taps(), y.chunk(2, dim), strict=True))
        even, odd = (
            torch.stack([t[m, i] * part.roll(m, dim) for t, part in pairs for m in range(len(t))]).sum(0) for i in (0, 1)
        )
        x = torch.stack([even, odd], dim).flatten(dim - 1, dim)
        return x.roll(1 - self.filter.shape[0] // 2, dim)

    def _corner(self, x: Tensor, level: int) -> Tensor:
        """The averages that a level takes."""
        for dim in self.dims:
            x = x.narrow(dim, 0, x.shape[dim] >> level)
        return x

    def _with_corner(self, x: Tensor, corner: Tensor) -> Tensor:
        """`x` with another first corner."""
        size = corner.shape
        for dim in reversed(self.dims):
            rest = x.narrow(dim, size[dim], x.shape[dim] - size[dim])
            for other in self.dims:
                if other < dim:
                    rest = rest.narrow(other, 0, size[other])
            corner = torch.cat([corner, rest], dim)
        return corner

    def _label(self) -> str:
        return f"Wavelet({self.wavelet}, levels={self.levels})"


def _halvings(n: int, taps: int) -> int:
    count = 0
    while n % 2 == 0 and n // 2 >= taps:
        n, count = n // 2, count + 1
    return count
