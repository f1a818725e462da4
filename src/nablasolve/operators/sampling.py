"""Operators that observe a part of an image: masks, subsampling, the Bayer mosaic, downsampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..arguments import check_choice, check_integer
from ..vectors import real_dtype
from .base import StructuredOperator
from .claims import Claims
from .convolution import check_floating, check_sizes
from .spaces import any_batch
from .spectrum import Spectrum, Standard

BOUNDARIES = ("circular", "zero", "reflect", "symmetric", "replicate")
FILTERS = ("box", "gaussian")


class Mask(StructuredOperator):
    """`x -> mask * x`: zeroes entries, or weights them; the shape is kept.

    Args:
        mask: a tensor that broadcasts to `shape`. A boolean one keeps the entries where it is true and is an orthogonal
            projection, known to be positive semidefinite. A floating-point one weights, and is known to be Hermitian; a complex
            one as well, and is not.
        shape: of `x`, without batch dimensions, an integer or a sequence of them; by default that of the mask.
        like: a tensor with the dtype and device of `x`; by default the mask, and torch's default dtype for a boolean one.
        claims: `positive_definite=True` where every weight is positive, `positive_semidefinite=True`, `unitary=True`.

    Raises:
        TypeError: if `mask` or `like` is no tensor.
        ValueError: if `mask` has an integer dtype, or does not broadcast to `shape`.
    """

    def __init__(
        self, mask: Tensor, shape: int | Sequence[int] | None = None, *, like: Tensor | None = None, **claims: Any
    ) -> None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a Tensor, got {type(mask).__name__}")
        boolean = mask.dtype == torch.bool
        if not (boolean or mask.is_floating_point() or mask.is_complex()):
            raise ValueError(f"mask: expected a boolean, floating-point or complex dtype, got {mask.dtype}")
        shape = tuple(mask.shape) if shape is None else check_sizes("shape", shape)
        if mask.ndim > len(shape) or any(m not in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1], strict=False)):
            raise ValueError(f"mask: expected a shape that broadcasts to {shape}, got {tuple(mask.shape)}")
        dtype = vector_dtype(like)
        if not boolean:
            dtype = mask.dtype if like is None else torch.promote_types(mask.dtype, dtype)
        space = any_batch(shape, mask if like is None else like, dtype)
        own = Claims(hermitian=not mask.is_complex(), positive_semidefinite=boolean)
        super().__init__(space, claims=Claims.named(claims) | own)
        self.mask = mask

    @property
    def boolean(self) -> bool:
        """Whether the mask keeps or zeroes, rather than weights."""
        return self.mask.dtype == torch.bool

    def apply(self, x: Tensor) -> Tensor:
        return keep(self.mask, x) if self.boolean else self.mask * x

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return keep(self.mask, y) if self.boolean else self.mask.conj() * y

    def spectrum(self) -> Spectrum:
        example = self.domain.example
        values = self.mask.to(real_dtype(example.dtype)) if self.boolean else self.mask
        return Spectrum(Standard(), values, example.shape, real=not self.mask.is_complex())


class Subsample(StructuredOperator):
    """`x -> x[picked]`: some of the entries, each at most once; `S S^H = I`.

    Exactly one of `indices`, `mask` and `step` says which. `S^H S` is diagonal, and `gram` is solved directly.

    Args:
        shape: of `x`, without batch dimensions.
        indices: an integer tensor, or nested lists, of positions among the entries in row-major order; the result has its
            shape.
        mask: a boolean tensor of shape `shape`; the result is a vector of the entries where it is true, in row-major order,
            as `x[mask]`.
        step: every how many-th entry to take, for all dimensions or one for each, as `x[::step]`; the result keeps the
            number of dimensions.
        like: a tensor with the dtype and device of `x`; torch's default dtype otherwise.

    Raises:
        TypeError: if not exactly one of the three is given, or one has the wrong type.
        ValueError: if an index is out of range or repeated, no entry is picked, or a shape or step is impossible.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        indices: Any = None,
        *,
        mask: Tensor | None = None,
        step: int | Sequence[int] | None = None,
        like: Tensor | None = None,
    ) -> None:
        self.shape = check_sizes("shape", shape)
        given = [name for name, value in (("indices", indices), ("mask", mask), ("step", step)) if value is not None]
        if len(given) != 1:
            raise TypeError(f"Subsample: expected exactly one of indices, mask and step, got {' and '.join(given) or 'none'}")
        device = None if like is None else like.device
        if step is not None:
            strides = check_each("step", step, len(self.shape))
            positions = torch.arange(math.prod(self.shape), device=device).reshape(self.shape)
            self.indices = positions[tuple(slice(None, None, s) for s in strides)].contiguous()
        elif mask is not None:
            self.indices = self._from_mask(mask)
        else:
            self.indices = self._checked(torch.as_tensor(indices, device=device))
        if not self.indices.numel():
            raise ValueError(f"{given[0]}: expected at least one entry to be picked, got none")
        dtype = vector_dtype(like)
        like = self.indices if like is None else like
        super().__init__(
            any_batch(self.shape, like, dtype), any_batch(self.indices.shape, like, dtype), Claims(coisometric=True)
        )

    def _from_mask(self, mask: Tensor) -> Tensor:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a boolean Tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a boolean Tensor, got dtype {mask.dtype}; Mask takes weights")
        if tuple(mask.shape) != self.shape:
            raise ValueError(f"mask: expected shape {self.shape} like x, got {tuple(mask.shape)}")
        return mask.reshape(-1).nonzero().squeeze(1)

    def _checked(self, indices: Tensor) -> Tensor:
        if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
            raise TypeError(f"indices: expected integers, got dtype {indices.dtype}")
        indices, n = indices.long(), math.prod(self.shape)
        if indices.numel():
            low, high = indices.min(), indices.max()
            if low < 0 or high >= n:
                raise ValueError(f"indices: expected 0 to {n - 1} for shape {self.shape}, got {int(low)} to {int(high)}")
            if indices.unique().numel() != indices.numel():
                raise ValueError("indices: expected each entry at most once, got one that is repeated")
        return indices

    def apply(self, x: Tensor) -> Tensor:
        flat = x.flatten(-len(self.shape))
        batch = flat.shape[:-1]
        picked = flat.gather(-1, self.indices.reshape(-1).expand(*batch, -1))
        return picked.reshape(*batch, *self.indices.shape)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        batch = y.shape[: y.ndim - self.indices.ndim]
        flat = y.reshape(*batch, -1)
        zero = flat.new_zeros((*batch, math.prod(self.shape)))
        placed = zero.scatter(-1, self.indices.reshape(-1).expand(*batch, -1), flat)
        return placed.reshape(*batch, *self.shape)

    @property
    def mask(self) -> Tensor:
        """Which entries are picked, a boolean tensor of shape `shape`."""
        picked = torch.zeros(math.prod(self.shape), dtype=torch.bool, device=self.indices.device)
        return picked.index_fill(0, self.indices.reshape(-1), True).reshape(self.shape)

    def gram_spectrum(self) -> Spectrum:
        """`S^H S`: 1 where an entry is picked, 0 elsewhere."""
        return Spectrum(Standard(), self.mask.to(real_dtype(self.domain.example.dtype)), self.mask.shape, True, analytic=True)

    def exact_norm(self) -> Tensor:
        return torch.ones((), dtype=real_dtype(self.domain.example.dtype), device=self.indices.device)

    def _label(self) -> str:
        return f"Subsample({self.indices.numel()} of {math.prod(self.shape)})"


class Mosaic(StructuredOperator):
    """What a colour filter array leaves of an image: one of its three colours at each pixel.

    The result is one plane, `(..., 3, H, W) -> (..., H, W)`, the sum over the colours of the image times the array's mask, and
    then `M M^H = I`; or with `keep_channels=True` the three planes with zeros where a colour was not seen, which is an
    orthogonal projection (the `mosaic` of ∇-Prox).

    Args:
        shape: of `x`, without batch dimensions: `(3, H, W)`, with red, green and blue in this order.
        pattern: the colours of the top left pixels `(0, 0)`, `(0, 1)`, `(1, 0)`, `(1, 1)`, from which the array repeats.
        keep_channels: keep the three planes.
        like: a tensor with the dtype and device of `x`; torch's default dtype otherwise.

    Raises:
        ValueError: if `shape` has not three dimensions with the size 3 first, or `pattern` is not four letters of `RGB`.

    Source: Bayer, US patent 3971065, 1976.
    """

    def __init__(
        self, shape: int | Sequence[int], pattern: str = "RGGB", *, keep_channels: bool = False, like: Tensor | None = None
    ) -> None:
        shape = check_sizes("shape", shape)
        if len(shape) != 3 or shape[0] != 3:
            raise ValueError(f"shape: expected (3, height, width), got {shape}")
        if not isinstance(pattern, str) or len(pattern) != 4 or set(pattern) - set("RGB"):
            raise ValueError(f"pattern: expected four letters of 'RGB' such as 'RGGB', got {pattern!r}")
        if not isinstance(keep_channels, bool):
            raise TypeError(f"keep_channels: expected a bool, got {type(keep_channels).__name__}")
        dtype = vector_dtype(like)
        domain = any_batch(shape, like, dtype)
        if keep_channels:
            super().__init__(domain, claims=Claims(positive_semidefinite=True))
        else:
            super().__init__(domain, any_batch(shape[1:], like, dtype), Claims(coisometric=True))
        self.pattern, self.keep_channels = pattern, keep_channels
        device = domain.example.device
        colors = torch.tensor(["RGB".index(color) for color in pattern], device=device).reshape(2, 2)
        rows, columns = (torch.arange(n, device=device) % 2 for n in shape[1:])
        seen = colors[rows[:, None], columns]
        self.mask = seen == torch.arange(3, device=device)[:, None, None]

    def apply(self, x: Tensor) -> Tensor:
        seen = keep(self.mask, x)
        return seen if self.keep_channels else seen.sum(-3)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return keep(self.mask, y if self.keep_channels else y.unsqueeze(-3))

    def spectrum(self) -> Spectrum | None:
        if not self.keep_channels:
            return None
        example = self.domain.example
        return Spectrum(Standard(), self.mask.to(real_dtype(example.dtype)), example.shape, real=True)

    def gram_spectrum(self) -> Spectrum:
        """`M^H M`: 1 where a colour is seen, 0 elsewhere."""
        return Spectrum(Standard(), self.mask.to(real_dtype(self.domain.example.dtype)), self.mask.shape, True, analytic=True)

    def exact_norm(self) -> Tensor:
        return torch.ones((), dtype=real_dtype(self.domain.example.dtype), device=self.mask.device)

    def _label(self) -> str:
        return f"Mosaic({self.pattern})"


class Downsample(StructuredOperator):
    """A filter against aliasing, and then one entry for each block: `y[i] = sum_j kernel[j] x[factor i + j - offset]`.

    The centre of the kernel lies on the centre of the block, or half an entry before it where their sizes do not allow that.

    Args:
        shape: of `x`, without batch dimensions: one to three dimensions, each divisible by its factor.
        factor: the size of a block, for all dimensions or one for each; 1 leaves a dimension as it is.
        filter: `"box"`, the mean of each block; `"gaussian"`, of standard deviation `factor / 2`, cut at three of them and of
            sum 1; or the kernel, a floating-point or complex tensor with the dimensions of `shape`.
        boundary: what lies outside of `x`, where the kernel is larger than a block: `"reflect"` mirrors about the
            outermost entries and `"symmetric"` about the edges beyond them, `"replicate"` repeats the outermost entry,
            `"circular"` wraps around, `"zero"`.
        like: a tensor with the dtype and device of `x`; by default the kernel, or torch's default dtype.

    Raises:
        TypeError: if `factor` is no integer, or `filter` neither a name nor a tensor.
        ValueError: if a size is not divisible by its factor, or an option or the kernel's shape or dtype is impossible.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        factor: int | Sequence[int],
        filter: str | Tensor = "gaussian",
        *,
        boundary: str = "reflect",
        like: Tensor | None = None,
    ) -> None:
        shape = check_sizes("shape", shape)
        if len(shape) > 3:
            raise ValueError(
                f"shape: expected one to three dimensions, got {shape}; further ones in front are batch dimensions"
            )
        self.factor = check_each("factor", factor, len(shape))
        if any(n % f for n, f in zip(shape, self.factor, strict=True)):
            raise ValueError(f"factor: expected divisors of the sizes {shape}, got {self.factor}")
        self.boundary = check_choice("boundary", boundary, BOUNDARIES)
        dtype = vector_dtype(like)
        if isinstance(filter, Tensor):
            if filter.ndim != len(shape) or not filter.numel():
                raise ValueError(f"filter: expected a kernel of {len(shape)} dimensions, got shape {tuple(filter.shape)}")
            check_floating("filter", filter)
            self.filter, self.kernel = "kernel", filter
            dtype = filter.dtype if like is None else torch.promote_types(filter.dtype, dtype)
            like = filter if like is None else like
        elif isinstance(filter, str):
            self.filter = check_choice("filter", filter, FILTERS)
            device = None if like is None else like.device
            profiles = [_profile(self.filter, f).to(device, real_dtype(dtype)) for f in self.factor]
            self.kernel = profiles[0]
            for profile in profiles[1:]:
                self.kernel = self.kernel[..., None] * profile
        else:
            raise TypeError(f"filter: expected 'box', 'gaussian' or a Tensor, got {type(filter).__name__}")
        small = tuple(n // f for n, f in zip(shape, self.factor, strict=True))
        super().__init__(any_batch(shape, like, dtype), any_batch(small, like, dtype))
        self.reads = [
            _reads(n, f, k, self.boundary).to(self.kernel.device)
            for n, f, k in zip(shape, self.factor, self.kernel.shape, strict=True)
        ]

    def apply(self, x: Tensor) -> Tensor:
        d = len(self.factor)
        for dim, reads in zip(range(-d, 0), self.reads, strict=True):
            x = x.index_select(dim, reads.clamp(min=0))
            if self.boundary == "zero":
                x = keep((reads >= 0).reshape(-1, *(1,) * (-1 - dim)), x)
        batch = x.shape[:-d]
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[d - 1]
        y = _by_parts(lambda v, w: convolve(v, w[None, None], stride=self.factor), x.reshape(-1, 1, *x.shape[-d:]), self.kernel)
        return y.reshape(*batch, *y.shape[-d:])

    def apply_adjoint(self, y: Tensor) -> Tensor:
        d = len(self.factor)
        batch = y.shape[:-d]
        spread = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[d - 1]
        x = _by_parts(
            lambda v, w: spread(v, w[None, None], stride=self.factor), y.reshape(-1, 1, *y.shape[-d:]), self.kernel.conj()
        )
        x = x.reshape(*batch, *x.shape[-d:])
        for dim, reads, n in zip(range(-d, 0), self.reads, self.domain.example.shape, strict=True):
            if self.boundary == "zero":
                x = keep((reads >= 0).reshape(-1, *(1,) * (-1 - dim)), x)
            zero = x.new_zeros((*x.shape[: x.ndim + dim], n, *x.shape[x.ndim + dim + 1 :]))
            x = zero.index_add(dim, reads.clamp(min=0), x)
        return x

    def exact_norm(self) -> Tensor | None:
        if self.filter != "box":
            return None
        # the blocks do not overlap: A A^H = I / (entries of a block)
        return self.kernel.new_tensor(math.prod(self.factor) ** -0.5)

    def _label(self) -> str:
        factors = "x".join(map(str, self.factor))
        return f"Downsample({factors}, {self.filter}, {self.boundary})"


# -- helpers -------------------------------------------------------------------------------------------------------


def keep(mask: Tensor, x: Tensor) -> Tensor:
    """`x` where the mask is true, and 0 elsewhere, whatever stands there."""
    return torch.where(mask, x, 0.0)


def check_each(name: str, value: Any, count: int) -> tuple[int, ...]:
    """A positive integer for each of some dimensions; a single one stands for all.

    Raises:
        TypeError: if it is no integer or sequence of integers.
        ValueError: if their number differs, or one is not positive.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        value = (value,) * count
    numbers = tuple(check_integer(name, n) for n in value)
    if len(numbers) != count or min(numbers) < 1:
        raise ValueError(f"{name}: expected a positive integer, or {count} of them, got {numbers}")
    return numbers


def vector_dtype(like: Any) -> torch.dtype:
    """The dtype of vectors like a tensor, or torch's default.

    Raises:
        TypeError: if it is neither a tensor nor None.
        ValueError: if it has an integer dtype.
    """
    if like is None:
        return torch.get_default_dtype()
    check_floating("like", like)
    dtype: torch.dtype = like.dtype
    return dtype


def _profile(filter: str, factor: int) -> Tensor:
    """The kernel of a named filter in one dimension, of sum 1 and of a size that can be centred on a block."""
    if filter == "box" or factor == 1:
        return torch.full((factor,), 1 / factor, dtype=torch.float64)
    t = torch.arange(3 * factor, dtype=torch.float64) - (3 * factor - 1) / 2
    weights = torch.exp(-(t**2) / (2 * (factor / 2) ** 2))
    return weights / weights.sum()


def _reads(n: int, factor: int, taps: int, boundary: str) -> Tensor:
    """The entries that the kernel meets along a dimension of size `n`, in order; -1 for a zero outside."""
    before = -((factor - taps) // 2)
    positions = torch.arange(-before, n + taps - factor - before)
    if boundary == "circular":
        return positions % n
    if boundary == "replicate":
        return positions.clamp(0, n - 1)
    if boundary == "reflect":
        period = max(1, 2 * (n - 1))
        return torch.minimum(positions % period, -positions % period)
    if boundary == "symmetric":
        return torch.minimum(positions % (2 * n), (-1 - positions) % (2 * n))
    return torch.where((positions >= 0) & (positions < n), positions, -1)


def _by_parts(bilinear: Callable[[Tensor, Tensor], Tensor], v: Tensor, w: Tensor) -> Tensor:
    """A real bilinear function of real or complex tensors."""
    if w.is_complex():
        return _by_parts(bilinear, v, w.real) + 1j * _by_parts(bilinear, v, _imaginary(w))
    return torch.complex(bilinear(v.real, w), bilinear(_imaginary(v), w)) if v.is_complex() else bilinear(v, w)


def _imaginary(z: Tensor) -> Tensor:
    """The imaginary part; of a lazily conjugated tensor, torch has none under vmap."""
    return (-1j * z).real
