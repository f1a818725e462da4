"""Finite differences on a grid: along one dimension, the gradient, the Laplacian, and the bases that diagonalise them."""

from __future__ import annotations

import copy
import itertools
import math
import numbers
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice, check_integer
from ..vectors import real_dtype
from .base import LinearOperator, StructuredOperator, is_real, is_scalar
from .claims import Claims
from .convolution import check_sizes, pad_along
from .in_place import multiplied, subtract
from .nullspace import Nullspace
from .spaces import any_batch
from .spectrum import Basis, Fourier, Spectrum

BOUNDARIES = ("circular", "zero", "neumann")
# of each kind, the neighbour that enters and the one that is subtracted
STEPS = {"forward": (1, 0), "backward": (0, -1), "central": (1, -1)}
KINDS = tuple(STEPS)


# -- bases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trigonometric(Basis):
    """An orthonormal basis of real vectors, a product of one for each of the last dimensions."""

    sizes: tuple[int, ...]

    @property
    def dims(self) -> tuple[int, ...]:
        """The transformed dimensions, counted from the end."""
        return tuple(range(-len(self.sizes), 0))

    def _along_all(self, transform: Callable[[Tensor, int], Tensor], x: Tensor) -> Tensor:
        if x.is_complex():
            return torch.complex(self._along_all(transform, x.real), self._along_all(transform, x.imag))
        for dim in self.dims:
            x = transform(x, dim)
        return x

    @abstractmethod
    def _analyse(self, x: Tensor, dim: int) -> Tensor: ...

    @abstractmethod
    def _synthesise(self, c: Tensor, dim: int) -> Tensor: ...

    @abstractmethod
    def _squares(self, values: Tensor, dim: int) -> Tensor:
        """`sum_k U[n, k]^2 values[k]` for the basis vectors `U[:, k]` of a dimension."""

    def analyse(self, x: Tensor) -> Tensor:
        return self._along_all(self._analyse, x)

    def synthesise(self, coefficients: Tensor) -> Tensor:
        return self._along_all(self._synthesise, coefficients)

    def conjugate(self, values: Tensor) -> Tensor:
        return values.conj()

    def diagonal(self, values: Tensor) -> Tensor:
        return self._along_all(self._squares, values)


@dataclass(frozen=True)
class Sine(_Trigonometric):
    """The orthonormal sines of the last dimensions (DST-I): vectors that vanish one step beyond the edges.

    `U[n, k] = sqrt(2 / (N + 1)) sin(π (n + 1) (k + 1) / (N + 1))`, which is its own inverse.

    Source: Strang 1999, "The discrete cosine transform".
    """

    def _analyse(self, x: Tensor, dim: int) -> Tensor:
        n = x.shape[dim]
        # the odd extension has 2 (N + 1) entries, and a transform of -2i times the sines
        odd = torch.cat([pad_along(x, dim, 1, 1), -x.flip(dim)], dim)
        sines: Tensor = torch.fft.rfft(odd, dim=dim).imag.narrow(dim, 1, n)
        return sines * (-0.5 * math.sqrt(2 / (n + 1)))

    def _synthesise(self, c: Tensor, dim: int) -> Tensor:
        return self._analyse(c, dim)

    def _squares(self, values: Tensor, dim: int) -> Tensor:
        # 2 sin^2(φ) = 1 - cos(2 φ)
        n = values.shape[dim]
        cosines: Tensor = torch.fft.fft(pad_along(values, dim, 1, 0), dim=dim).real
        return (values.sum(dim, keepdim=True) - cosines.narrow(dim, 1, n)) / (n + 1)


@dataclass(frozen=True)
class Cosine(_Trigonometric):
    """The orthonormal cosines of the last dimensions (DCT-II): vectors that are mirrored at the edges.

    `U[n, k] = sqrt((2 - [k = 0]) / N) cos(π (n + 1/2) k / N)`.

    Source: Strang 1999, "The discrete cosine transform".
    """

    @staticmethod
    def _weights(x: Tensor, dim: int, sign: float) -> tuple[Tensor, Tensor]:
        """The scale of each basis vector, and `exp(sign i π k / 2 N)`, which moves the grid by half a step."""
        n = x.shape[dim]
        k = torch.arange(n, dtype=x.dtype, device=x.device)
        scale = torch.where(k == 0, math.sqrt(1 / n), math.sqrt(2 / n))
        return _along(scale, dim), _along(torch.polar(torch.ones_like(k), sign * math.pi / (2 * n) * k), dim)

    def _analyse(self, x: Tensor, dim: int) -> Tensor:
        scale, shift = self._weights(x, dim, -1.0)
        even = torch.cat([x, x.flip(dim)], dim)
        cosines: Tensor = (torch.fft.rfft(even, dim=dim).narrow(dim, 0, x.shape[dim]) * shift).real
        return cosines * (0.5 * scale)

    def _synthesise(self, c: Tensor, dim: int) -> Tensor:
        n = c.shape[dim]
        scale, shift = self._weights(c, dim, 1.0)
        # an inverse transform counts every frequency but the zeroth twice, and divides by 2 N
        half = torch.where(torch.arange(n, device=c.device) == 0, 2.0 * n, 1.0 * n).to(c.dtype)
        x: Tensor = torch.fft.irfft(c * (scale * _along(half, dim)) * shift, n=2 * n, dim=dim)
        return x.narrow(dim, 0, n)

    def _squares(self, values: Tensor, dim: int) -> Tensor:
        # 2 cos^2(φ) = 1 + cos(2 φ), where the zeroth basis vector has neither the factor 2 nor the cosine
        n = values.shape[dim]
        k = torch.arange(n, dtype=values.dtype, device=values.device)
        shift = _along(torch.polar((k > 0).to(values.dtype), math.pi / n * k), dim)
        cosines: Tensor = torch.fft.ifft(values * shift, dim=dim).real
        return values.mean(dim, keepdim=True) + cosines


# -- operators -------------------------------------------------------------------------------------------------------


class _Difference(StructuredOperator):
    """What finite differences share: a grid, its spacing and what lies beyond its edges."""

    def __init__(
        self,
        shape: int | Sequence[int],
        boundary: str,
        spacing: Any,
        channels: Sequence[int],
        like: Tensor | None,
        dtype: torch.dtype | None,
        device: Any,
        stacked: bool = False,
        claims: Claims | None = None,
    ) -> None:
        self.boundary = check_choice("boundary", boundary, BOUNDARIES)
        self.shape = check_sizes("shape", shape)
        self.channels = check_sizes("channels", channels) if channels != () else ()
        self.spacing = _spacings(spacing, len(self.shape))
        self.example = _example(like, dtype, device)
        domain = any_batch((*self.channels, *self.shape), self.example)
        components = any_batch((*self.channels, len(self.shape), *self.shape), self.example) if stacked else None
        super().__init__(domain, components, claims)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions of the grid, counted from the end."""
        return tuple(range(-len(self.shape), 0))

    def conj(self) -> LinearOperator:
        return self  # the coefficients are real

    @property
    def _one(self) -> Tensor:
        """The constant vector along a dimension, as a single entry."""
        return torch.ones(1, dtype=self.example.dtype, device=self.example.device)

    def _products(self, lines: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """The products of one vector along each dimension, in each of the channels."""
        count = math.prod(self.channels)
        channels = torch.eye(count, dtype=self.example.dtype, device=self.example.device)
        found = []
        for channel, *factors in itertools.product(channels, *lines):
            product = channel.reshape(*self.channels, *(1,) * len(self.shape))
            for dim, factor in zip(self.dims, factors, strict=True):
                product = product * _along(factor, dim)
            found.append(product.expand(*self.channels, *self.shape))
        return tuple(found)

    def _frequencies(self, dim: int) -> Tensor:
        """`0, 1, ..., N - 1`, along a dimension of the grid."""
        n = self.shape[dim]
        return _along(torch.arange(n, dtype=real_dtype(self.example.dtype), device=self.example.device), dim)

    def _basis(self) -> Basis:
        """The basis of the second differences at this boundary."""
        if self.boundary == "circular":
            return Fourier(self.shape)
        return Cosine(self.shape) if self.boundary == "neumann" else Sine(self.shape)

    def _diagonal(self, basis: Basis, values: Tensor) -> Spectrum:
        # what a formula rounds to 1e-16 is zero for central differences, which do not see the highest frequency
        analytic = getattr(self, "kind", "") != "central"
        return Spectrum(basis, values, torch.Size((*self.channels, *self.shape)), real=True, analytic=analytic)


class _FirstDifference(_Difference):
    """First differences along some dimensions of a grid, whose Gram operator may be diagonal in a known basis."""

    kind: str
    along: tuple[int, ...]

    def _set_kind(self, kind: str, along: tuple[int, ...]) -> None:
        """Set what differences there are, and the rank that follows."""
        self.kind, self.along = check_choice("kind", kind, KINDS), along
        trivial = any(self._sees_all(dim) for dim in along)
        self.claims = Claims(full_column_rank=trivial, full_row_rank=trivial and self.codomain is self.domain)

    def _sees_all(self, dim: int) -> bool:
        """Whether no vector along a dimension but zero has vanishing differences."""
        return self.boundary == "zero" and (self.kind != "central" or self.shape[dim] % 2 == 0)

    def _line_nullspace(self, dim: int) -> list[Tensor]:
        """The vectors along a dimension whose differences vanish."""
        if self._sees_all(dim):
            return []
        n = self.shape[dim]
        every_other = (torch.arange(n, device=self.example.device) % 2 == 0).to(self.example.dtype)
        if self.boundary == "zero":
            return [every_other]
        # around an even period, central differences do not see the highest frequency
        unseen = self.kind == "central" and self.boundary == "circular" and n % 2 == 0
        return [self._one, 2 * every_other - 1] if unseen else [self._one]

    def known_nullspace(self) -> Nullspace | None:
        """The constants of each channel, and what else central differences do not see, for differences along all dimensions."""
        if any(n > 1 for dim, n in zip(self.dims, self.shape, strict=True) if dim not in self.along):
            return None  # any function of the other dimensions
        return self._products([self._line_nullspace(dim) if dim in self.along else [self._one] for dim in self.dims])

    def _differences(self, x: Tensor, dim: int) -> Tensor:
        result = torch.empty_like(x)
        _write_difference(result, x, dim, *STEPS[self.kind], self.boundary)
        return multiplied(result, 1 / self._distance(dim, x))

    def _differences_adjoint(self, y: Tensor, dim: int) -> Tensor:
        result = torch.empty_like(y)
        plus, minus = STEPS[self.kind]
        _write_difference(result, y, dim, -plus, -minus, "zero" if self.boundary == "neumann" else self.boundary)
        if self.boundary == "neumann":
            _add_edge(result, y, dim, plus, 1)
            _add_edge(result, y, dim, minus, -1)
        return multiplied(result, 1 / self._distance(dim, y))

    def _distance(self, dim: int, x: Tensor) -> float | Tensor:
        """The distance of the two neighbours of a difference, in the precision of a vector."""
        return _in_precision(self.spacing[dim], x) * (2 if self.kind == "central" else 1)

    def gram_spectrum(self) -> Spectrum | None:
        """The spectrum of `A^H A`, which differences at a zero boundary do not have in these bases."""
        if self.boundary == "zero":
            return None
        step = math.pi if self.boundary == "circular" else math.pi / 2
        values: Any = 0.0
        for dim in self.along:
            angle = self._frequencies(dim) * (step / self.shape[dim])
            factor = torch.sin(angle) * 2 if self.kind != "central" else torch.sin(2 * angle)
            values = values + (factor / self.spacing[dim]) ** 2
        return self._diagonal(self._basis(), values)

    def exact_norm(self) -> Tensor:
        spectrum = self.gram_spectrum()
        if spectrum is not None:
            return spectrum.norm().sqrt()
        # the largest singular value of differences whose first or last neighbour is zero
        total: Any = torch.zeros((), dtype=real_dtype(self.example.dtype), device=self.example.device)
        for dim in self.along:
            n = self.shape[dim]
            one = 2 * math.cos(math.pi / (2 * n + 1)) if self.kind != "central" else math.cos(math.pi / (n + 1))
            total = total + (one / self.spacing[dim]) ** 2
        norm: Tensor = total.sqrt()
        return norm

    def _label(self) -> str:
        kind = "" if self.kind == "forward" else f", {self.kind}"
        return f"{type(self).__name__}({self.boundary}{kind})"


class FiniteDifference(_FirstDifference):
    """First differences along one dimension of a grid: `(x[n + 1] - x[n]) / spacing`, of the size of `x`.

    On a grid without other dimensions the nullspace is known. At a circular or Neumann boundary it is the constants of each
    channel; and, of central differences around a period of even size, the vectors that alternate, too. At a zero boundary it is
    trivial, but for central differences of an odd number of entries, which do not see every other of them.

    Args:
        shape: the sizes of the grid, an integer or a sequence of them.
        dim: along which of its dimensions.
        boundary: what lies beyond the edges: `"circular"`, the other end; `"zero"`; or `"neumann"`, the edge itself once more,
            so that the last forward difference is 0.
        spacing: the distance of neighbours in this dimension, a number or 0-d tensor.
        kind: `"forward"`, `"backward"`, `(x[n] - x[n - 1]) / spacing`, or `"central"`, `(x[n + 1] - x[n - 1]) / (2 spacing)`.
        channels: the sizes of dimensions in front of the grid that belong to every vector.
        like: a tensor whose dtype and device the vectors have.
        dtype: of the vectors, instead; torch's default without either.
        device: of the vectors, instead.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: for an unknown boundary or kind, or a dimension, size or spacing that is none.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        dim: int = -1,
        *,
        boundary: str = "circular",
        spacing: float | Tensor = 1.0,
        kind: str = "forward",
        channels: Sequence[int] = (),
        like: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__(shape, boundary, spacing, channels, like, dtype, device)
        d, index = len(self.shape), check_integer("dim", dim)
        if not -d <= index < d:
            raise ValueError(f"dim: expected {-d} to {d - 1} for a grid of shape {self.shape}, got {index}")
        self._set_kind(kind, (index if index < 0 else index - d,))

    def apply(self, x: Tensor) -> Tensor:
        return self._differences(x, self.along[0])

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self._differences_adjoint(y, self.along[0])

    def known_left_nullspace(self) -> Nullspace | None:
        return self.known_nullspace() if self.boundary == "circular" else None  # a circulant matrix is normal

    def spectrum(self) -> Spectrum | None:
        if self.boundary != "circular":
            return None
        dim = self.along[0]
        angle = self._frequencies(dim) * (2 * math.pi / self.shape[dim])
        forward = torch.complex(-2 * torch.sin(angle / 2) ** 2, torch.sin(angle))  # exp(i angle) - 1
        if self.kind == "central":
            values = torch.complex(torch.zeros_like(angle), torch.sin(angle))
        else:
            values = forward if self.kind == "forward" else -forward.conj()
        return self._diagonal(Fourier(self.shape), values / self.spacing[dim])

    def exact_diagonal(self) -> Tensor | None:
        spectrum = self.spectrum()
        if spectrum is not None:
            return spectrum.diagonal()
        # the coefficient of x[n] itself, then that of a neighbour beyond the edge
        dim = self.along[0]
        k, last = self._frequencies(dim), self.shape[dim] - 1
        diagonal = torch.full_like(k, {"forward": -1.0, "backward": 1.0, "central": 0.0}[self.kind])
        if self.boundary == "neumann":
            after = {"forward": 1.0, "backward": 0.0, "central": 0.5}[self.kind]
            before = {"forward": 0.0, "backward": -1.0, "central": -0.5}[self.kind]
            diagonal = diagonal + after * (k == last) + before * (k == 0)
        return (diagonal / self.spacing[dim]).to(self.example.dtype).expand(*self.channels, *self.shape)


class Gradient(_FirstDifference):
    """`∇`, the first differences along every dimension of a grid: `(..., *shape) -> (..., d, *shape)`.

    The nullspace is known. At a circular or Neumann boundary it is the constants of each channel; and checkerboards, too, where
    central differences go around a period of even size. At a zero boundary it is trivial, unless the differences are central
    and all sizes odd.

    Args:
        shape: the sizes of the grid, an integer or a sequence of them.
        boundary: what lies beyond the edges: `"circular"`, the other end; `"zero"`; or `"neumann"`, the edge itself once more,
            so that the last forward difference is 0.
        spacing: the distance of neighbours, a number or 0-d tensor, or one for each dimension.
        kind: `"forward"`, `"backward"` or `"central"`, as for `FiniteDifference`.
        channels: the sizes of dimensions in front of the grid that belong to every vector; the result has the shape
            `(..., *channels, d, *shape)`.
        like: a tensor whose dtype and device the vectors have.
        dtype: of the vectors, instead; torch's default without either.
        device: of the vectors, instead.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: for an unknown boundary or kind, or a size or spacing that is none.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        boundary: str = "circular",
        spacing: float | Tensor | Sequence[float | Tensor] = 1.0,
        kind: str = "forward",
        channels: Sequence[int] = (),
        like: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__(shape, boundary, spacing, channels, like, dtype, device, stacked=True)
        self._set_kind(kind, self.dims)

    def apply(self, x: Tensor) -> Tensor:
        stack = -len(self.dims) - 1
        if any(isinstance(h, Tensor) for h in self.spacing) or (torch.is_grad_enabled() and x.requires_grad):
            # backward, writing into a slice costs a copy of the whole: in pieces it is less
            return torch.stack([self._differences(x, dim) for dim in self.dims], dim=stack)
        batch = x.shape[: x.ndim - len(self.shape)]
        result = x.new_empty((*batch, len(self.shape), *self.shape))
        for i, dim in enumerate(self.dims):
            component = result.select(stack, i)
            _write_difference(component, x, dim, *STEPS[self.kind], self.boundary)
            multiplied(component, 1 / self._distance(dim, x))
        return result

    def apply_adjoint(self, y: Tensor) -> Tensor:
        first, *others = y.unbind(-len(self.dims) - 1)
        total = self._differences_adjoint(first, self.dims[0])
        for component, dim in zip(others, self.dims[1:], strict=True):
            distance = self._distance(dim, component)
            if isinstance(distance, Tensor):
                total = total + self._differences_adjoint(component, dim)
            else:
                for step, sign in zip(STEPS[self.kind], (1, -1), strict=True):
                    _add_shifted_adjoint(total, component, dim, step, self.boundary, sign / distance)
        return total


class Laplacian(_Difference):
    """`Δ`, the sum of the second differences `(x[n + 1] - 2 x[n] + x[n - 1]) / spacing^2` along every dimension of a grid.

    It is the Laplacian of mathematics, negative semidefinite: `-Laplacian(...)` is the positive one, and is known to be
    (positive definite at a zero boundary). Systems are solved directly, in the Fourier, sine or cosine basis. The
    nullspace is known: the constants of each channel, and at a zero boundary nothing.

    Args:
        shape: the sizes of the grid, an integer or a sequence of them.
        boundary: what lies beyond the edges: `"circular"`, the other end; `"zero"` (Dirichlet); or `"neumann"`, the edge
            itself once more, so that nothing flows over it.
        spacing: the distance of neighbours, a number or 0-d tensor, or one for each dimension.
        channels: the sizes of dimensions in front of the grid that belong to every vector.
        like: a tensor whose dtype and device the vectors have.
        dtype: of the vectors, instead; torch's default without either.
        device: of the vectors, instead.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: for an unknown boundary, or a size or spacing that is none.

    Source: the eigenvalues are those of Strang 1999, "The discrete cosine transform".
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        boundary: str = "circular",
        spacing: float | Tensor | Sequence[float | Tensor] = 1.0,
        channels: Sequence[int] = (),
        like: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__(shape, boundary, spacing, channels, like, dtype, device, claims=Claims(hermitian=True))
        self.sign = 1

    def known_nullspace(self) -> Nullspace:
        return () if self.boundary == "zero" else self._products([[self._one]] * len(self.shape))

    def apply(self, x: Tensor) -> Tensor:
        # (d_1 h_2^2 / h_1^2 + d_2) / h_2^2, for two dimensions: of a constant each second difference d is exactly zero
        total = -2 * x
        for dim, h, following in zip(self.dims, self.spacing, (*self.spacing[1:], None), strict=True):
            if dim != self.dims[0]:
                total.add_(x, alpha=-2)
            for step in (1, -1):
                _add_shifted(total, x, dim, step, self.boundary, 1)
            if following is not h:
                ratio = self.sign if following is None else _in_precision(following, x) ** 2
                total = multiplied(total, ratio / _in_precision(h, x) ** 2)
        return total

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)

    def spectrum(self) -> Spectrum:
        values: Any = 0.0
        for dim in self.dims:
            k, n = self._frequencies(dim), self.shape[dim]
            if self.boundary == "circular":
                angle = k * (math.pi / n)
            elif self.boundary == "neumann":
                angle = k * (math.pi / (2 * n))
            else:
                angle = (k + 1) * (math.pi / (2 * n + 2))
            values = values - self.sign * (2 * torch.sin(angle) / self.spacing[dim]) ** 2
        return self._diagonal(self._basis(), values)

    def __neg__(self) -> Laplacian:
        result = copy.copy(self)
        result.sign = -self.sign
        positive = result.sign < 0
        result.claims = Claims(
            hermitian=True, positive_semidefinite=positive, positive_definite=positive and self.boundary == "zero"
        )
        return result

    def __mul__(self, other: Any) -> LinearOperator:
        if isinstance(other, numbers.Real) and other < 0:
            return (-self) * -other
        return super().__mul__(other) if is_scalar(other) else NotImplemented

    __rmul__ = __mul__

    def _label(self) -> str:
        return f"{'-' if self.sign < 0 else ''}Laplacian({self.boundary})"


# -- helpers -------------------------------------------------------------------------------------------------------


def _example(like: Tensor | None, dtype: torch.dtype | None, device: Any) -> Tensor:
    """A 0-d tensor with the dtype and device of the vectors."""
    if like is not None and not isinstance(like, Tensor):
        raise TypeError(f"like: expected a Tensor or None, got {type(like).__name__}")
    if like is not None:
        dtype, device = dtype or like.dtype, like.device if device is None else device
    example = torch.zeros((), dtype=dtype, device=device)
    if not (example.is_floating_point() or example.is_complex()):
        raise ValueError(f"dtype: expected a floating-point or complex dtype, got {example.dtype}")
    return example


def _spacings(spacing: Any, d: int) -> tuple[float | Tensor, ...]:
    """A spacing for each dimension."""
    spacings = tuple(spacing) if isinstance(spacing, tuple | list) else (spacing,) * d
    if len(spacings) != d:
        raise ValueError(f"spacing: expected a number or {d} of them, got {len(spacings)}")
    for h in spacings:
        if isinstance(h, bool) or not is_scalar(h) or not is_real(h):
            raise TypeError(f"spacing: expected real numbers or 0-d tensors, got {type(h).__name__}")
        if not isinstance(h, Tensor) and not 0 < h < math.inf:
            raise ValueError(f"spacing: expected a positive number, got {h!r}")
    return spacings


def _in_precision(h: float | Tensor, x: Tensor) -> float | Tensor:
    """A spacing in the precision of a vector."""
    return h.to(real_dtype(x.dtype)) if isinstance(h, Tensor) else h


def _along(v: Tensor, dim: int) -> Tensor:
    """A vector along a dimension that is counted from the end."""
    return v.reshape(-1, *(1,) * (-dim - 1))


def _neighbour(x: Tensor, dim: int, i: int, boundary: str) -> Tensor:
    """The entry `i` of a dimension, up to one beyond its edges."""
    n = x.shape[dim]
    if 0 <= i < n:
        return x.narrow(dim, i, 1)
    if boundary == "zero":
        return torch.zeros_like(x.narrow(dim, 0, 1))
    return x.narrow(dim, i % n if boundary == "circular" else min(max(i, 0), n - 1), 1)


def _write_difference(result: Tensor, x: Tensor, dim: int, plus: int, minus: int, boundary: str) -> None:
    """Write `x[n + plus] - x[n + minus]`, for two different steps from -1 to 1."""
    n = x.shape[dim]
    first, last = max(0, -plus, -minus), n - max(0, plus, minus)
    if last > first:
        a, b = (x.narrow(dim, first + step, last - first) for step in (plus, minus))
        subtract(a, b, out=result.narrow(dim, first, last - first))
    for i in {*range(first), *range(last, n)}:
        a, b = (_neighbour(x, dim, i + step, boundary) for step in (plus, minus))
        subtract(a, b, out=result.narrow(dim, i, 1))


def _add_shifted(result: Tensor, x: Tensor, dim: int, step: int, boundary: str, factor: float) -> None:
    """Add a multiple of the neighbours `x[n + step]`, for a step from -1 to 1."""
    n = x.shape[dim]
    first, last = max(0, -step), n - max(0, step)
    result.narrow(dim, first, last - first).add_(x.narrow(dim, first + step, last - first), alpha=factor)
    if step and boundary != "zero":
        i = 0 if step < 0 else n - 1
        result.narrow(dim, i, 1).add_(_neighbour(x, dim, i + step, boundary), alpha=factor)


def _add_shifted_adjoint(result: Tensor, y: Tensor, dim: int, step: int, boundary: str, factor: float) -> None:
    """Add a multiple of what the adjoint of the shift by a step makes of `y`."""
    if boundary != "neumann":
        return _add_shifted(result, y, dim, -step, boundary, factor)
    _add_shifted(result, y, dim, -step, "zero", factor)
    return _add_edge(result, y, dim, step, factor)


def _add_edge(result: Tensor, y: Tensor, dim: int, step: int, factor: float) -> None:
    """Add a multiple of the edge that a step leads beyond: its own neighbour, where the edge is continued."""
    if step:
        i = y.shape[dim] - 1 if step > 0 else 0
        result.narrow(dim, i, 1).add_(y.narrow(dim, i, 1), alpha=factor)
