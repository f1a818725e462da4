"""The discrete Fourier transform as an operator, in the conventions of the field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice, check_integer
from ..vectors import real_dtype
from .base import LinearOperator, StructuredOperator
from .claims import Claims
from .convolution import check_sizes
from .factorisation import Factorisation
from .sampling import vector_dtype
from .spaces import any_batch
from .spectrum import Spectrum

ADJOINT_NORM = {"ortho": "ortho", "backward": "forward", "forward": "backward"}


class DFT(StructuredOperator):
    """`X[k] = c sum_n x[n] exp(-2 pi i (k_1 n_1 / N_1 + ...))`, the discrete Fourier transform; unitary for `norm="ortho"`.

    Args:
        shape: of `x`, without batch dimensions.
        dims: the dimensions of `shape` to transform, by default all.
        centered: have the origin of space and the zero frequency at entry `N // 2` of each dimension instead of entry 0:
            `fftshift(fft(ifftshift(x)))`, the convention of magnetic resonance imaging.
        norm: `"ortho"`, `c = 1 / sqrt(N)` for `N` the number of transformed entries; `"backward"`, `c = 1`, torch's default;
            `"forward"`, `c = 1 / N`.
        like: a tensor with the precision and device of `x`; torch's default precision otherwise. Vectors are complex.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `norm` is unknown, or `dims` are out of range or repeated.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        dims: Sequence[int] | None = None,
        *,
        centered: bool = False,
        norm: str = "ortho",
        like: Tensor | None = None,
    ) -> None:
        shape = check_sizes("shape", shape)
        if not isinstance(centered, bool):
            raise TypeError(f"centered: expected a bool, got {type(centered).__name__}")
        self.dims = check_dims("dims", dims, len(shape))
        self.centered, self.norm = centered, check_choice("norm", norm, tuple(ADJOINT_NORM))
        self.count = math.prod(shape[d] for d in self.dims)
        unitary = norm == "ortho"
        super().__init__(
            any_batch(shape, like, vector_dtype(like).to_complex()), claims=Claims(isometric=unitary, coisometric=unitary)
        )

    def apply(self, x: Tensor) -> Tensor:
        return self._transformed(x, torch.fft.fftn, self.norm)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self._transformed(y, torch.fft.ifftn, ADJOINT_NORM[self.norm])

    def _transformed(self, x: Tensor, transform: Any, norm: str) -> Tensor:
        if not self.centered:
            result: Tensor = transform(x, dim=self.dims, norm=norm)
            return result
        moved: Tensor = torch.fft.fftshift(transform(torch.fft.ifftshift(x, self.dims), dim=self.dims, norm=norm), self.dims)
        return moved

    @property
    def _square(self) -> float:
        """The `c` of `F^H F = c I`."""
        return {"ortho": 1.0, "backward": float(self.count), "forward": 1 / self.count}[self.norm]

    def gram_spectrum(self) -> Spectrum:
        """`F^H F`, a multiple of the identity."""
        example = self.domain.example
        square = torch.full((), self._square, dtype=real_dtype(example.dtype), device=example.device)
        return Spectrum(None, square, example.shape, real=False, analytic=True)

    def inverse(self, **options: Any) -> LinearOperator:
        """The inverse transform; the options of a solve do not matter."""
        return self.H if self.norm == "ortho" else self.H / self._square

    def factorise(self) -> Factorisation:
        return Factorisation(
            lambda r: self._transformed(r, torch.fft.ifftn, self.norm),
            lambda r: self._transformed(r, torch.fft.fftn, ADJOINT_NORM[self.norm]),
        )

    def exact_norm(self) -> Tensor:
        example = self.domain.example
        return torch.full((), math.sqrt(self._square), dtype=real_dtype(example.dtype), device=example.device)

    def _label(self) -> str:
        options = [*(["centered"] if self.centered else []), *([] if self.norm == "ortho" else [self.norm])]
        if len(self.dims) < self.domain.example.ndim:
            options.insert(0, f"dims={self.dims}")
        return f"DFT({', '.join(options)})" if options else "DFT"


def check_dims(name: str, dims: Any, ndim: int) -> tuple[int, ...]:
    """Dimensions of a vector with `ndim` of them, counted from the end and ascending; all of them for None.

    Raises:
        TypeError: if they are no sequence of integers.
        ValueError: if one is out of range or repeated, or there is none.
    """
    if dims is None:
        return tuple(range(-ndim, 0))
    if not isinstance(dims, Sequence) or isinstance(dims, str):
        raise TypeError(f"{name}: expected a sequence of integers, got {type(dims).__name__}")
    numbers = [check_integer(name, d) for d in dims]
    if not numbers or any(not -ndim <= d < ndim for d in numbers):
        raise ValueError(f"{name}: expected dimensions from {-ndim} to {ndim - 1}, got {tuple(numbers)}")
    counted = sorted(d if d < 0 else d - ndim for d in numbers)
    if len(set(counted)) < len(counted):
        raise ValueError(f"{name}: expected each dimension once, got {tuple(numbers)}")
    return tuple(counted)
