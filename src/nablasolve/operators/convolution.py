"""Convolutions: with one kernel, with a kernel for each pixel, and by a transfer function."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..arguments import check_choice, check_integer
from .base import LinearOperator, StructuredOperator
from .claims import Claims
from .spaces import any_batch
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
        # of each extended dimension: the pixel that every entry is a copy of; the zero boundary copies none
        self.sources = tuple(
            None if boundary == "zero" or k == 1 else _source(n, p, c, boundary, like.device)
            for n, k, p, c in zip(shape, window, self.before, self.center, strict=True)
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

    def _extend(self, x: Tensor) -> Tensor:
        """The image continued over its boundary, as far as a window reaches."""
        if self.boundary == "zero":
            return pad(x, _widths(self.before, self.center))
        for dim, source in zip(self.dims, self.sources, strict=True):
            x = x if source is None else x.index_select(dim, source)
        return x

    def _fold(self, y: Tensor) -> Tensor:
        """The adjoint of `_extend`: every entry is added to the pixel that it is a copy of."""
        for dim, n, p in zip(self.dims, self.shape, self.before, strict=True):
            y = _fold(y, dim, n, p, self.boundary)
        return y

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
            kernel, extended = self._stripped(), self._extend(x)
            return _weighted_sum((_entry(kernel, j), self._window_at(extended, j)) for j in self._positions())
        if self.boundary in ("circular", "zero"):  # a torus of its size, or with zeros around, extends the image by itself
            return _part(self._filtered(x, adjoint=False), (0,) * len(self.shape), self.shape)
        return _part(self._filtered(self._extend(x), adjoint=False), self.before, self.shape)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        origin = (0,) * len(self.shape)
        if self.method == "spatial":
            kernel, margins = self._stripped().conj(), tuple(k - 1 for k in self.window)
            wide = pad(y, _widths(margins, margins))
            return self._fold(_weighted_sum((_entry(kernel, j), _part(wide, j, self.extended)) for j in self._positions()))
        if self.boundary in ("circular", "zero"):
            return _part(self._filtered(y, adjoint=True), origin, self.shape)
        shifted = pad(y, _widths(self.before, origin))
        return self._fold(_part(self._filtered(shifted, adjoint=True), origin, self.extended))

    def _stripped(self) -> Tensor:
        """The kernel without leading channels of size one."""
        shape = (*self.channels, *self.window)
        return self.kernel if self.kernel.shape == shape else self.kernel.reshape(shape)

    def _wrapped(self) -> Tensor:
        """The kernel wrapped around the torus, its center at the origin."""
        kernel = self._stripped()
        for dim, n, c in zip(self.dims, self.grid, self.center, strict=True):
            kernel = _fold(kernel, dim, n, c, "circular")
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
        transform: Tensor = (torch.fft.fftn if full else torch.fft.rfftn)(self._wrapped(), dim=self.dims)
        return transform

    def _filtered(self, x: Tensor, adjoint: bool) -> Tensor:
        """The image, on the torus and zero where it has no entry, convolved there with the kernel, or correlated."""
        full = self.kernel.is_complex() or x.is_complex()
        transform = self._transform(full).conj() if adjoint else self._transform(full)
        y: Tensor
        if full:
            y = torch.fft.ifftn(torch.fft.fftn(x, s=self.grid, dim=self.dims) * transform, dim=self.dims)
        else:
            y = torch.fft.irfftn(torch.fft.rfftn(x, s=self.grid, dim=self.dims) * transform, s=self.grid, dim=self.dims)
        return y

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
        return _entry(self._stripped(), self.center).expand(*self.channels, *self.shape)

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
        self.channels = channels

    def apply(self, x: Tensor) -> Tensor:
        kernels, extended = self._stripped(), self._extend(x)
        return _weighted_sum((_at(kernels, j), self._window_at(extended, j)) for j in self._positions())

    def apply_adjoint(self, y: Tensor) -> Tensor:
        kernels = self._stripped().conj()
        total: Tensor | None = None
        for j in self._positions():
            start = tuple(k - 1 - i for k, i in zip(self.window, j, strict=True))
            term = pad(_at(kernels, j) * y, _widths(start, j))
            total = term if total is None else total + term
        assert total is not None
        return self._fold(total)

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
        self.sizes = tuple(otf.shape[otf.ndim - d :])
        self.real = real

    def apply(self, x: Tensor) -> Tensor:
        return self.spectrum().apply(lambda c: self.otf * c, x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.spectrum().apply(lambda c: self.otf.conj() * c, y)

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


def _entry(kernel: Tensor, j: Sequence[int]) -> Tensor:
    """An entry of a kernel, with dimensions of size one for those of the image."""
    return _part(kernel, j, (1,) * len(j))


def _weighted_sum(terms: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of the products of weights and images."""
    weight, image = next(terms)
    total = weight * image
    for weight, image in terms:
        total = torch.addcmul(total, weight, image)
    return total


def _source(size: int, before: int, after: int, boundary: str, device: torch.device) -> Tensor:
    """The pixel that each entry of an extended dimension is a copy of."""
    i = torch.arange(-before, size + after, device=device)
    if boundary == "circular":
        return i % size
    if boundary == "replicate":
        return i.clamp(0, size - 1)
    if boundary == "symmetric":
        i = i % (2 * size)
        return torch.where(i < size, i, 2 * size - 1 - i)
    period = max(1, 2 * size - 2)
    i = i % period
    return torch.where(i < size, i, period - i)


def _fold(y: Tensor, dim: int, size: int, before: int, boundary: str) -> Tensor:
    """The adjoint of an extension along a dimension by `before` entries in front and any number behind.

    It adds slices, and no index twice, so that the sum does not depend on the order of threads.
    """
    length = y.shape[dim]
    if boundary == "zero":
        return y.narrow(dim, before, size)
    if boundary == "replicate":
        after = length - before - size
        inside = y.narrow(dim, before, size)
        first = y.narrow(dim, 0, before).sum(dim, keepdim=True)
        last = y.narrow(dim, before + size, after).sum(dim, keepdim=True)
        return inside + pad_along(first, dim, 0, size - 1) + pad_along(last, dim, size - 1, 0)
    # the others are periodic, one period being the image or the image and its mirror image
    period = {"circular": size, "symmetric": 2 * size, "reflect": max(1, 2 * size - 2)}[boundary]
    front = -before % period
    y = pad_along(y, dim, front, -(front + length) % period)
    if y.shape[dim] > period:
        y = y.unflatten(dim, (-1, period)).sum(dim - 1)
    if period == size:
        return y
    mirrored = y.narrow(dim, size, period - size).flip(dim)
    inset = (2 * size - period) // 2
    return y.narrow(dim, 0, size) + pad_along(mirrored, dim, inset, inset)


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
