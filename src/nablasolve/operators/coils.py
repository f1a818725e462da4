"""The coils of a magnetic resonance scanner."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import StructuredOperator
from .claims import Claims
from .convolution import check_floating
from .spaces import any_batch
from .spectrum import Spectrum, Standard


class CoilSensitivities(StructuredOperator):
    """`x -> (s_1 x, ..., s_C x)`: an image as each of `C` coils receives it.

    With a Fourier transform and a mask this is the multi-coil encoding of magnetic resonance imaging, `E = M F S`. `S^H S` is
    diagonal, and `gram` is solved directly.

    Args:
        maps: the sensitivities, a floating-point or complex tensor of shape `(C, *shape)`. The operator maps `(..., *shape)` to
            `(..., C, *shape)`.

    Raises:
        TypeError: if `maps` is not a Tensor.
        ValueError: if it has fewer than two dimensions, or an integer dtype.

    Source: Pruessmann, Weiger, Scheidegger & Boesiger 1999 (SENSE).
    """

    def __init__(self, maps: Tensor) -> None:
        check_floating("maps", maps)
        if maps.ndim < 2:
            raise ValueError(f"maps: expected shape (coils, *shape of the image), got {tuple(maps.shape)}")
        super().__init__(any_batch(maps.shape[1:], maps), any_batch(maps.shape, maps), Claims())
        self.maps = maps

    def apply(self, x: Tensor) -> Tensor:
        return self.maps * x.unsqueeze(-self.maps.ndim)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return (self.maps.conj() * y).sum(-self.maps.ndim)

    def energy(self) -> Tensor:
        """`sum_c |s_c|^2`, of the shape of the image: the diagonal of `S^H S`."""
        if not self.maps.is_complex():
            return self.maps.square().sum(0)
        return (self.maps.real.square() + self.maps.imag.square()).sum(0)

    def gram_spectrum(self) -> Spectrum:
        """`S^H S`: `sum_c |s_c|^2` at each pixel."""
        energy = self.energy()
        return Spectrum(Standard(), energy, energy.shape, real=True, analytic=True)

    def exact_norm(self) -> Tensor:
        return torch.sqrt(self.energy().amax())

    def _label(self) -> str:
        return f"CoilSensitivities({self.maps.shape[0]} coils)"
