"""Operators that are diagonal in a known unitary basis: `A = U diag(values) U^H`.

Their sums, products, multiples, adjoints and inverses are diagonal in the same basis, and in no other; a solve is one
division between two transforms.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .factorisation import Factorisation, safe_divide


class Basis(ABC):
    """A unitary change of basis on trailing dimensions. Bases that are equal are the same basis."""

    @abstractmethod
    def analyse(self, x: Tensor) -> Tensor:
        """The coefficients `U^H x`."""

    @abstractmethod
    def synthesise(self, coefficients: Tensor) -> Tensor:
        """The vector `U c`."""

    @abstractmethod
    def conjugate(self, values: Tensor) -> Tensor:
        """The values of `conj(A)`, where `values` are those of `A`."""

    @abstractmethod
    def diagonal(self, values: Tensor) -> Tensor:
        """The diagonal of `A` among the unit vectors."""


@dataclass(frozen=True)
class Standard(Basis):
    """The unit vectors: operators are diagonal matrices."""

    def analyse(self, x: Tensor) -> Tensor:
        return x

    def synthesise(self, coefficients: Tensor) -> Tensor:
        return coefficients

    def conjugate(self, values: Tensor) -> Tensor:
        return values.conj()

    def diagonal(self, values: Tensor) -> Tensor:
        return values


@dataclass(frozen=True)
class Fourier(Basis):
    """The orthonormal Fourier basis of the last dimensions, of the given sizes: operators are circular convolutions."""

    sizes: tuple[int, ...]

    @property
    def dims(self) -> tuple[int, ...]:
        """The transformed dimensions, counted from the end."""
        return tuple(range(-len(self.sizes), 0))

    def analyse(self, x: Tensor) -> Tensor:
        coefficients: Tensor = torch.fft.fftn(x, dim=self.dims, norm="ortho")
        return coefficients

    def synthesise(self, coefficients: Tensor) -> Tensor:
        x: Tensor = torch.fft.ifftn(coefficients, dim=self.dims, norm="ortho")
        return x

    def conjugate(self, values: Tensor) -> Tensor:
        # conj(F) = F with the frequencies negated
        return values.flip(self.dims).roll((1,) * len(self.dims), self.dims).conj()

    def diagonal(self, values: Tensor) -> Tensor:
        # every unit vector has the same modulus at every frequency
        return values.mean(self.dims, keepdim=True).expand_as(values)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """`A = U diag(values) U^H`.

    Attributes:
        basis: the basis; None for a multiple of the identity, which is diagonal in all of them.
        values: a tensor that broadcasts against the coefficients of a vector.
        sizes: the trailing shape of the coefficients.
        real: whether `A` maps real vectors to real ones.
        analytic: whether the values come from a formula, so that a tiny one is no rounding of zero.
    """

    basis: Basis | None
    values: Tensor
    sizes: torch.Size
    real: bool
    analytic: bool = False

    def _joined(self, other: Spectrum, values: Tensor) -> Spectrum | None:
        if self.basis is not None and other.basis is not None and self.basis != other.basis:
            return None
        analytic = self.analytic and other.analytic
        return Spectrum(self.basis or other.basis, values, self.sizes, self.real and other.real, analytic)

    def plus(self, other: Spectrum) -> Spectrum | None:
        """Of the sum; None where the bases differ."""
        return self._joined(other, self.values + other.values)

    def times(self, other: Spectrum) -> Spectrum | None:
        """Of the product; None where the bases differ."""
        return self._joined(other, self.values * other.values)

    def scaled(self, factor: Any) -> Spectrum:
        """Of `c A`."""
        complex_factor = factor.is_complex() if isinstance(factor, Tensor) else isinstance(factor, complex)
        return replace(self, values=self.values * factor, real=self.real and not complex_factor)

    @property
    def H(self) -> Spectrum:
        """Of the adjoint."""
        return replace(self, values=self.values.conj())

    def conj(self) -> Spectrum:
        """Of the complex conjugate."""
        values = self.values if self.real else self.full().values
        return self if self.real else replace(self, values=(self.basis or Standard()).conjugate(values))

    def gram(self, damp: Any) -> Spectrum:
        """Of `A^H A + damp^2 I`."""
        return replace(self, values=self.values.abs().square() + damp**2)

    def full(self) -> Spectrum:
        """The same with one value for each coefficient."""
        batch = self.values.shape[: max(0, self.values.ndim - len(self.sizes))]
        return replace(self, values=self.values.expand(*batch, *self.sizes))

    @property
    def _trailing(self) -> tuple[int, ...]:
        return tuple(range(-len(self.sizes), 0))

    def diagonal(self) -> Tensor:
        """The diagonal of `A`, of the shape of a vector."""
        diagonal = (self.basis or Standard()).diagonal(self.full().values)
        return diagonal.real if self.real and diagonal.is_complex() else diagonal

    def trace(self) -> Tensor:
        """The sum of the eigenvalues."""
        return self.diagonal().sum(self._trailing)

    def norm(self) -> Tensor:
        """The spectral norm, the largest modulus."""
        return self.full().values.abs().amax(self._trailing)

    def eigenvalue_bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest of the eigenvalues, which are real for a Hermitian operator."""
        values = self.full().values
        values = values.real if values.is_complex() else values
        return values.amin(self._trailing), values.amax(self._trailing)

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`U function(U^H x)`, real for a real vector where the operator is."""
        if self.basis is None:
            return function(x)
        y = self.basis.synthesise(function(self.basis.analyse(x)))
        return y.real if self.real and y.is_complex() and not x.is_complex() else y

    def factorise(self) -> Factorisation:
        """Division by the values, those of the size of rounding being zero."""
        values = self.values
        size = values.abs()
        if not self.analytic:  # a transform has rounded them
            dims = self.basis.dims if isinstance(self.basis, Fourier) else self._trailing  # channels are apart
            noise = torch.finfo(size.dtype).eps * math.log2(2 + math.prod(self.sizes))
            values = torch.where(size <= noise * self.full().values.abs().amax(dims, keepdim=True), 0.0, values)
        return Factorisation(
            lambda r: self.apply(lambda c: safe_divide(c, values), r),
            lambda r: self.apply(lambda c: safe_divide(c, values.conj()), r),
        )
