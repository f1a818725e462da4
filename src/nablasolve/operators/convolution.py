"""Convolutions: with one kernel, with a kernel for each pixel, and by a transfer function."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..arguments import check_choice, check_integer
from .base import LinearOperator, StructuredOperator
from .claims import Claims
from .in_place import multiplied, with_conjugate, zeros_for
from .spaces import any_batch, is_complex
from .spectrum import Fourier, Spectrum

BOUNDARIES = ("circular", "zero", "reflect", "symmetric", "replicate")
METHODS = ("fft", "spatial")

# a pass over the image for each entry of the kernel, against two or three transforms
LARGEST_SPATIAL_KERNEL = 25


class _Windowed(StructuredOperator):
    """What operators share whose result at a pixel is a weighted sum over a window of an extended image.

    At a pixel `n` the window is `x[n + center - j]` for the positions `j` of the kernel.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        shape: tuple[int, ...],
        window: tuple[int, ...],
        boundary: str,
        center: Any,
        like: Tensor,
        claims: Claims,
    ) -> None:
        self.boundary = check_choice("boundary", boundary, BOUNDARIES)
        self.shape, self.window = shape, window
        if center is None:
            self.center = tuple(k // 2 for k in window)
        else:
            self.center = check_sizes("center", center, smallest=0)
            if len(self.center) != len(window) or any(c >= k for c, k in zip(self.center, window, strict=True)):
                raise ValueError(f"center: expected a position in a kernel of shape {window}, got {center!r}")
        self.before = tuple(k - 1 - c for k, c in zip(window, self.center, strict=True))
        # of each dimension, the entries of the extended image that lie outside; at the zero boundary they are no copies
        self.margins = tuple(
            () if boundary == "zero" else (*_runs(-p, 0, n, boundary), *_runs(n, n + c, n, boundary))
            for n, p, c in zip(shape, self.before, self.center, strict=True)
        )
        super().__init__(any_batch((*channels, *shape), like), claims=claims)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions of the image, counted from the end."""
        return tuple(range(-len(self.shape), 0))

    @property
    def extended(self) -> tuple[int, ...]:
        """The sizes of the extended image."""
        return tuple(n + k - 1 for n, k in zip(self.shape, self.window, strict=True))

    def _extend(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The image continued over its boundary, as far as a window reaches, and zeros behind that up to some sizes."""
        shape = (*x.shape[: x.ndim - len(self.shape)], *sizes)
        copied = self.boundary != "zero" and sizes == self.extended
        extended = x.new_empty(shape) if copied else x.new_zeros(shape)
        _part(extended, self.before, self.shape).copy_(x)
        for dim, before, runs in zip(self.dims, self.before, self.margins, strict=True):
            for run in runs:
                source = extended.narrow(dim, before + run.source, run.pixels)
                extended.narrow(dim, before + run.at, run.length).copy_(source if run.ascending else source.flip(dim))
        return extended

    def _fold(self, y: Tensor) -> Tensor:
        """The adjoint of `_extend`: every entry is added to the pixel that it is a copy of, in place.

        It adds slices, and no index twice, so that the sum does not depend on the order of threads.
        """
        for dim, before, n, runs in zip(self.dims, self.before, self.shape, self.margins, strict=True):
            for run in runs:
                copies = y.narrow(dim, before + run.at, run.length)
                if run.pixels < run.length:
                    copies = copies.sum(dim, keepdim=True)
                pixels = y.narrow(dim, before + run.source, run.pixels)
                pixels.add_(copies if run.ascending else copies.flip(dim))
            y = y.narrow(dim, before, n)
        return y

    def _apply(self, weights: list[Tensor], x: Tensor) -> Tensor:
        """The product, by one pass over the image for each position of the kernel."""
        extended = self._extend(x, self.extended)
        first, *others = zip(weights, self._positions(), strict=True)
        result = first[0] * self._window_at(extended, first[1])
        for weight, j in others:
            result.addcmul_(weight, self._window_at(extended, j))
        return result

    def _apply_transpose(self, weights: list[Tensor], y: Tensor) -> Tensor:
        extended = zeros_for(self.extended, y, weights[0])
        for weight, j in zip(weights, self._positions(), strict=True):
            self._window_at(extended, j).addcmul_(weight, y)
        return self._fold(extended)

    def _apply_adjoint(self, weights: list[Tensor], y: Tensor) -> Tensor:
        if not is_complex(self.domain):
            return self._apply_transpose(weights, y)
        adjoint: Tensor = with_conjugate(lambda v: self._apply_transpose(weights, v), y)
        return adjoint

    def _positions(self) -> Iterator[tuple[int, ...]]:
        """The positions of a kernel's entries."""
        return itertools.product(*map(range, self.window))

    def _window_at(self, extended: Tensor, j: tuple[int, ...]) -> Tensor:
        """What the entry `j` of the kernel meets at each pixel."""
        return _part(extended, tuple(k - 1 - i for k, i in zip(self.window, j, strict=True)), self.shape)


class Convolution(_Windowed):
    """`x -> kernel * x`, the convolution of an image with a kernel, of the size of the image.

    `y[n] = sum_j kernel[j] x[n + center - j]`: the kernel is flipped, as in `scipy.ndimage.convolve` and
    `scipy.signal.convolve`, and not as in `torch.nn.functional.conv2d`. With the default center it equals
    `scipy.ndimage.convolve` with the modes `"wrap"`, `"constant"`, `"mirror"`, `"reflect"` and `"nearest"`, for the boundaries
    in the order below.

    The kernel may be larger than the image. A point spread function of the image's size, as an optical design gives it, is
    a kernel like any other: `Convolution(psf, psf.shape[-2:], boundary="zero")`, with `center=` where its origin is not at
    `size // 2`. A circular convolution is diagonal in the Fourier basis, so that systems made of such operators are solved
    directly.

    Args:
        kernel: a floating-point or complex tensor of shape `(*channels, *k)` with as many sizes `k` as `shape` has. Without
            channels it acts on vectors of shape `(..., *shape)`; with channels on `(..., *channels, *shape)`, each with its
            own kernel. Leading channels of size one count as none. Each application transforms the kernel anew, so that
            gradients reach it and a change in place is seen.
        shape: the sizes of the image, an integer or a sequence of them.
        boundary: how the image goes on beyond its edges: `"circular"`, `"zero"`, `"reflect"` (mirrored about the edge pixels,
            which are not repeated), `"symmetric"` (mirrored with the edge pixels repeated) or `"replicate"` (the edge pixels
            repeated).
        method: `"spatial"` adds up shifted images, one for each entry of the kernel; `"fft"` multiplies transforms. The results
            agree to rounding. By default small kernels are spatial.
        center: the position of the kernel's origin, by default `k // 2`; `(k - 1) // 2` is the `mode="same"` of `scipy.signal`.
        claims: `hermitian=True`, `positive_definite=True`, ... where the values of the kernel make it so.

    Raises:
        TypeError: if `kernel` is not a Tensor, or sizes are not integers.
        ValueError: for a wrong dtype or shape of the kernel, an unknown boundary or method, or a center outside of the kernel.
    """

    def __init__(
        self,
        kernel: Tensor,
        shape: int | Sequence[int],
        *,
        boundary: str = "circular",
        method: str | None = None,
        center: int | Sequence[int] | None = None,
        **claims: Any,
    ) -> None:
        check_floating("kernel", kernel)
        sizes = check_sizes("shape", shape)
        d = len(sizes)
        if kernel.ndim < d or 0 in kernel.shape:
            raise ValueError(
                f"kernel: expected at least {d} dimensions of positive size for shape {sizes}, got shape {tuple(kernel.shape)}"
            )
        window = tuple(kernel.shape[kernel.ndim - d :])
        if method is not None:
            check_choice("method", method, METHODS)
        channels = _channels(kernel.shape[: kernel.ndim - d])
        super().__init__(channels, sizes, window, boundary, center, kernel, Claims.named(claims))
        self.kernel = kernel
        self.transform: Tensor | None = None
        self.channels = channels
        self.method = method or ("spatial" if math.prod(window) <= LARGEST_SPATIAL_KERNEL else "fft")
        # the torus of the transforms, on which nothing of what is kept has wrapped around
        self.grid = sizes if boundary == "circular" else tuple(map(_fast_size, self._reach()))

    def _reach(self) -> Iterator[int]:
        for n, k, p, c in zip(self.shape, self.window, self.before, self.center, strict=True):
            yield n + max(p, c) if self.boundary == "zero" else n + k - 1

    def apply(self, x: Tensor) -> Tensor:
        if self.method == "spatial":
            return self._apply(self._weights(), x)
        if self.boundary in ("circular", "zero"):  # a torus of its size, or with zeros around, extends the image by itself
            return _part(self._filtered(x, adjoint=False), (0,) * len(self.shape), self.shape)
        return _part(self._filtered(self._extend(x, self.grid), adjoint=False), self.before, self.shape)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        if self.method == "spatial":
            return self._apply_adjoint(self._weights(), y)
        if self.boundary in ("circular", "zero"):
            return _part(self._filtered(y, adjoint=True), (0,) * len(self.shape), self.shape)
        behind = [g - p - n for g, p, n in zip(self.grid, self.before, self.shape, strict=True)]
        return self._fold(self._filtered(pad(y, _widths(self.before, behind)), adjoint=True))

    def _weights(self) -> list[Tensor]:
        """The entries of the kernel, with dimensions of size one for those of the image."""
        kernel = self._stripped()
        return [_part(kernel, j, (1,) * len(j)) for j in self._positions()]

    def _stripped(self) -> Tensor:
        """The kernel without leading channels of size one."""
        shape = (*self.channels, *self.window)
        return self.kernel if self.kernel.shape == shape else self.kernel.reshape(shape)

    def _wrapped(self) -> Tensor:
        """The kernel wrapped around the torus, its center at the origin."""
        kernel = self._stripped()
        for dim, n, c in zip(self.dims, self.grid, self.center, strict=True):
            front, length = -c % n, kernel.shape[dim]
            kernel = pad_along(kernel, dim, front, -(front + length) % n)
            if kernel.shape[dim] > n:
                kernel = kernel.unflatten(dim, (-1, n)).sum(dim - 1)
        return kernel

    def for_one_solve(self) -> LinearOperator:
        if self.method == "spatial":
            return self
        result = copy.copy(self)
        result.transform = self._transform(self.kernel.is_complex())
        return result

    def _transform(self, full: bool) -> Tensor:
        """The transform of the kernel on the torus, of all frequencies or of the half that determines a real one."""
        if self.transform is not None and full == self.kernel.is_complex():
            return self.transform
        return transform(self._wrapped(), self.grid, full)

    def _filtered(self, x: Tensor, adjoint: bool) -> Tensor:
        """The image, on the torus and zero where it has no entry, convolved there with the kernel, or correlated."""
        full = self.kernel.is_complex() or x.is_complex()
        return filtered(x, self._transform(full), self.grid, full, adjoint)

    def transfer_function(self) -> Tensor:
        """The values of the circular convolution in the Fourier basis, a complex tensor of shape `(*channels, *shape)`.

        `FourierFilter(H.transfer_function(), dims=len(H.shape))` is the same operator with the transform of the kernel stored.

        Raises:
            ValueError: for another boundary, where there is none.
        """
        if self.boundary != "circular":
            raise ValueError(f"boundary: only a circular convolution has a transfer function, got {self.boundary!r}")
        return self._transform(full=True)

    def spectrum(self) -> Spectrum | None:
        if self.boundary != "circular":
            return None
        sizes = torch.Size((*self.channels, *self.shape))
        return Spectrum(Fourier(self.shape), self.transfer_function(), sizes, real=not self.kernel.is_complex())

    def exact_diagonal(self) -> Tensor | None:
        if self.boundary != "zero":
            return super().exact_diagonal()
        return _part(self._stripped(), self.center, (1,) * len(self.center)).expand(*self.channels, *self.shape)

    def _label(self) -> str:
        return f"Convolution({'×'.join(map(str, self.window))}, {self.boundary})"


class VaryingBlur(_Windowed):
    """`y[n] = sum_j kernels[n, j] x[n + center - j]`: a convolution whose kernel depends on the pixel of the result.

    Where the kernels of all pixels are the same it is `Convolution`.

    Args:
        kernels: a floating-point or complex tensor of shape `(*channels, *shape, *k)` with as many sizes `shape` as `k`, such
            as `(H, W, kh, kw)`. It acts on vectors of shape `(..., *channels, *shape)`; leading channels of size one count as
            none.
        boundary: as for `Convolution`.
        ndim: the number of dimensions of the image.
        center: as for `Convolution`.
        claims: `hermitian=True`, `positive_definite=True`, ... where the values of the kernels make it so.

    Raises:
        TypeError: if `kernels` is not a Tensor.
        ValueError: for a wrong dtype or shape of the kernels, an unknown boundary, or a center outside of the kernels.
    """

    def __init__(
        self,
        kernels: Tensor,
        *,
        boundary: str = "circular",
        ndim: int = 2,
        center: int | Sequence[int] | None = None,
        **claims: Any,
    ) -> None:
        check_floating("kernels", kernels)
        d = check_integer("ndim", ndim)
        if d < 1 or kernels.ndim < 2 * d or 0 in kernels.shape:
            raise ValueError(
                f"kernels: expected at least {2 * d} dimensions of positive size, those of an image of {d} and of its kernels, "
                f"got shape {tuple(kernels.shape)}"
            )
        front = kernels.ndim - 2 * d
        channels = _channels(kernels.shape[:front])
        shape, window = tuple(kernels.shape[front : front + d]), tuple(kernels.shape[front + d :])
        super().__init__(channels, shape, window, boundary, center, kernels, Claims.named(claims))
        self.kernels = kernels
        self.weights: list[Tensor] | None = None
        self.channels = channels

    def apply(self, x: Tensor) -> Tensor:
        return self._apply(self._weights(), x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self._apply_adjoint(self._weights(), y)

    def for_one_solve(self) -> LinearOperator:
        # a position of all kernels is an image: in one piece it is read several times as fast
        result = copy.copy(self)
        result.weights = [weight.contiguous() for weight in self._weights()]
        return result

    def _weights(self) -> list[Tensor]:
        """For each position of the kernel, its entries at all pixels."""
        if self.weights is not None:
            return self.weights
        kernels = self._stripped()
        return [_at(kernels, j) for j in self._positions()]

    def _stripped(self) -> Tensor:
        shape = (*self.channels, *self.shape, *self.window)
        return self.kernels if self.kernels.shape == shape else self.kernels.reshape(shape)

    def exact_diagonal(self) -> Tensor | None:
        return _at(self._stripped(), self.center) if self.boundary == "zero" else None

    def _label(self) -> str:
        return f"VaryingBlur({'×'.join(map(str, self.window))}, {self.boundary})"


class FourierFilter(StructuredOperator):
    """`x -> F^{-1}(otf * F x)`, a circular convolution given by its transfer function.

    Args:
        otf: a floating-point or complex tensor of shape `(*channels, *shape)`, with the zero frequency first, as
            `torch.fft.fftn` orders them. It acts on vectors of that shape, with any batch dimensions in front.
        dims: the number of its last dimensions that are frequencies; all of them by default.
        real: whether the operator maps real vectors to real ones, that is `otf[-k] = conj(otf[k])`. The values are not
            checked; what is imaginary in the result of a real vector is dropped.
        claims: `positive_definite=True`, ... A real transfer function is known to be Hermitian.

    Raises:
        TypeError: if `otf` is not a Tensor.
        ValueError: for an integer dtype, or a wrong number of dimensions.
    """

    def __init__(self, otf: Tensor, *, dims: int | None = None, real: bool = False, **claims: Any) -> None:
        check_floating("otf", otf)
        d = otf.ndim if dims is None else check_integer("dims", dims)
        if not 1 <= d <= otf.ndim:
            raise ValueError(f"dims: expected 1 to {otf.ndim} for otf of shape {tuple(otf.shape)}, got {d}")
        if not isinstance(real, bool):
            raise TypeError(f"real: expected a bool, got {type(real).__name__}")
        dtype = otf.dtype.to_real() if real else otf.dtype.to_complex()
        super().__init__(any_batch(otf.shape, otf, dtype), claims=Claims.named(claims) | Claims(hermitian=not otf.is_complex()))
        self.otf = otf
        self.half: Tensor | None = None
        self.sizes = tuple(otf.shape[otf.ndim - d :])
        self.real = real

    def apply(self, x: Tensor) -> Tensor:
        return self._filtered(x, adjoint=False)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self._filtered(y, adjoint=True)

    def for_one_solve(self) -> LinearOperator:
        result = copy.copy(self)
        result.half = self._half() if self.real else None
        return result

    def _half(self) -> Tensor:
        """Half of the frequencies of the operator on real vectors, whose values at `k` and `-k` are conjugate."""
        if self.half is not None:
            return self.half
        # the mean with the conjugate operator's is what a real vector's result without its imaginary part depends on
        mean = (self.otf + Fourier(self.sizes).conjugate(self.otf)) / 2
        return mean.narrow(-1, 0, self.sizes[-1] // 2 + 1)

    def _filtered(self, x: Tensor, adjoint: bool) -> Tensor:
        full = x.is_complex() or not self.real
        return filtered(x, self.otf if full else self._half(), self.sizes, full, adjoint)

    def spectrum(self) -> Spectrum:
        return Spectrum(Fourier(self.sizes), self.otf, self.otf.shape, real=self.real, analytic=True)

    def _label(self) -> str:
        return "FourierFilter(real)" if self.real else "FourierFilter"


# -- helpers -------------------------------------------------------------------------------------------------------


def check_floating(name: str, value: object) -> None:
    """Raise unless the value is a tensor with a floating-point or complex dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if not (value.is_floating_point() or value.is_complex()):
        raise ValueError(f"{name}: expected a floating-point or complex dtype, got {value.dtype}")


def check_sizes(name: str, value: Any, smallest: int = 1) -> tuple[int, ...]:
    """An integer or a sequence of them, none smaller than a bound, as a tuple.

    Raises:
        TypeError: if it is neither.
        ValueError: if it is empty, or a number is too small.
    """
    numbers = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    sizes = tuple(check_integer(name, number) for number in numbers)
    if not sizes or any(size < smallest for size in sizes):
        raise ValueError(f"{name}: expected one or more integers of at least {smallest}, got {value!r}")
    return sizes


def _channels(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes without the leading ones, which broadcasting does without."""
    return tuple(itertools.dropwhile(lambda size: size == 1, sizes))


def _widths(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """The widths that `torch.nn.functional.pad` takes, which begin with the last dimension."""
    pairs = list(zip(before, after, strict=True))
    return [width for pair in reversed(pairs) for width in pair]


def _part(x: Tensor, start: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A box of the last dimensions."""
    box: tuple[Any, ...] = tuple(slice(s, s + n) for s, n in zip(start, sizes, strict=True))
    return x[(..., *box)]


def _at(kernels: Tensor, j: Sequence[int]) -> Tensor:
    """An entry of the kernel of each pixel."""
    index: tuple[Any, ...] = (..., *j)
    return kernels[index]


def transform(kernel: Tensor, sizes: tuple[int, ...], full: bool) -> Tensor:
    """The Fourier transform on a torus, of all frequencies or of the half that determines a real vector's."""
    dims = tuple(range(-len(sizes), 0))
    coefficients: Tensor = (torch.fft.fftn if full else torch.fft.rfftn)(kernel, s=sizes, dim=dims)
    return coefficients


def filtered(x: Tensor, otf: Tensor, sizes: tuple[int, ...], full: bool, adjoint: bool) -> Tensor:
    """A vector, on a torus and zero where it has no entry, filtered there: `F^{-1} (otf * F x)`, or with the conjugate.

    Args:
        x: the vector.
        otf: the values at all frequencies, or at half of them, as `transform` gives them.
        sizes: of the torus.
        full: whether the values are those at all frequencies; they must be if `x` is complex.
        adjoint: whether to conjugate the values: by conjugating the coefficients twice, which copies neither.
    """
    dims = tuple(range(-len(sizes), 0))
    coefficients = transform(x, sizes, full)
    if adjoint and otf.is_complex():
        coefficients = multiplied(coefficients.conj_physical_(), otf).conj_physical_()
    else:
        coefficients = multiplied(coefficients, otf)
    result: Tensor = torch.fft.ifftn(coefficients, dim=dims) if full else torch.fft.irfftn(coefficients, s=sizes, dim=dims)
    return result


@dataclass(frozen=True)
class _Run:
    """Entries of an extended dimension that are copies of successive pixels, in either order, or all of one pixel.

    Attributes:
        at: the first of the entries, counted from the first pixel.
        length: how many there are.
        source: the lowest of the pixels.
        pixels: how many there are, `length` or 1.
        ascending: whether the pixels come in their order.
    """

    at: int
    length: int
    source: int
    pixels: int
    ascending: bool


def _runs(start: int, stop: int, size: int, boundary: str) -> Iterator[_Run]:
    """The entries from `start` to `stop`, all before or all behind the pixels, in as few runs as they are copied by."""
    sources = [_source(i, size, boundary) for i in range(start, stop)]
    while sources:
        step = sources[1] - sources[0] if len(sources) > 1 else 0
        length = 1
        while length < len(sources) and abs(step) <= 1 and sources[length] - sources[length - 1] == step:
            length += 1
        lowest = min(sources[0], sources[length - 1])
        yield _Run(start, length, lowest, length if step else 1, step >= 0 or length == 1)
        start, sources = start + length, sources[length:]


def _source(i: int, size: int, boundary: str) -> int:
    """The pixel that an entry of an extended dimension is a copy of."""
    if boundary == "circular":
        return i % size
    if boundary == "replicate":
        return min(max(i, 0), size - 1)
    period = 2 * size if boundary == "symmetric" else max(1, 2 * size - 2)
    i %= period
    return i if i < size else 2 * size - 1 - i if boundary == "symmetric" else period - i


def pad_along(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """`x` with zeros before and after it along a dimension that is counted from the end."""
    return pad(x, [0, 0] * (-dim - 1) + [before, after]) if before or after else x


def _fast_size(size: int) -> int:
    """The smallest size from here on without prime factors above 5, for which transforms are fast."""
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1
