"""What is known of an operator, and how the algebra carries it on: where mathematics allows it, and never further."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..arguments import nearest

NAMES = ("hermitian", "positive_semidefinite", "positive_definite", "unitary")


@dataclass(frozen=True)
class Claims:
    """Properties that are known to hold; False says nothing.

    Attributes:
        hermitian: `A = A^H`.
        positive_definite: Hermitian, and `x^H A x > 0` for every `x != 0`. Implies `positive_semidefinite`.
        positive_semidefinite: Hermitian, and `x^H A x >= 0`. Implies `hermitian`.
        isometric: `A^H A = I`.
        coisometric: `A A^H = I`.
    """

    hermitian: bool = False
    positive_definite: bool = False
    positive_semidefinite: bool = False
    isometric: bool = False
    coisometric: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(getattr(self, field.name), bool):
                raise TypeError(f"{field.name}: expected a bool, got {type(getattr(self, field.name)).__name__}")
        if self.positive_definite:
            object.__setattr__(self, "positive_semidefinite", True)
        if self.positive_semidefinite:
            object.__setattr__(self, "hermitian", True)

    @property
    def unitary(self) -> bool:
        """`A^H A = A A^H = I`."""
        return self.isometric and self.coisometric

    @classmethod
    def named(cls, claims: dict[str, Any]) -> Claims:
        """The claims of the keywords `hermitian`, `positive_semidefinite`, `positive_definite` and `unitary`.

        Raises:
            TypeError: for an unknown name, with the nearest known one, or a value that is not a bool.
        """
        for name in claims:
            if name not in NAMES:
                raise TypeError(f"unknown claim {name!r}{nearest(name, NAMES)}")
        unitary = claims.get("unitary", False)
        if not isinstance(unitary, bool):
            raise TypeError(f"unitary: expected a bool, got {type(unitary).__name__}")
        others = {name: value for name, value in claims.items() if name != "unitary"}
        return cls(**others, isometric=unitary, coisometric=unitary)

    @classmethod
    def all(cls, claims: Sequence[Claims]) -> Claims:
        """What holds for every one of several operators, and so for their Kronecker product and their block diagonal."""
        return cls(*(all(getattr(c, field.name) for c in claims) for field in fields(cls)))

    def __or__(self, other: Claims) -> Claims:
        """What either source knows of the same operator."""
        return Claims(*(getattr(self, field.name) or getattr(other, field.name) for field in fields(self)))

    @property
    def H(self) -> Claims:
        """Of `A^H`."""
        return Claims(
            self.hermitian, self.positive_definite, self.positive_semidefinite,
            isometric=self.coisometric, coisometric=self.isometric,
        )  # fmt: skip

    @property
    def inverse(self) -> Claims:
        """Of `A^{-1}`: where it exists, a semidefinite operator is definite."""
        return Claims(
            self.hermitian, positive_definite=self.positive_semidefinite, isometric=self.unitary, coisometric=self.unitary
        )

    def plus(self, other: Claims) -> Claims:
        """Of `A + B`."""
        semidefinite = self.positive_semidefinite and other.positive_semidefinite
        return Claims(
            hermitian=self.hermitian and other.hermitian,
            positive_semidefinite=semidefinite,
            positive_definite=semidefinite and (self.positive_definite or other.positive_definite),
        )

    def times(self, other: Claims) -> Claims:
        """Of the product `A B`."""
        return Claims(isometric=self.isometric and other.isometric, coisometric=self.coisometric and other.coisometric)

    def scaled(self, factor: Any) -> Claims:
        """Of `c A`. The value of a tensor is data, and is not read."""
        if isinstance(factor, Tensor):
            return Claims(hermitian=self.hermitian and not factor.is_complex())
        real, unit = isinstance(factor, numbers.Real), bool(abs(factor) == 1)
        return Claims(
            hermitian=self.hermitian and real,
            positive_semidefinite=self.positive_semidefinite and real and bool(factor >= 0),
            positive_definite=self.positive_definite and real and bool(factor > 0),
            isometric=self.isometric and unit,
            coisometric=self.coisometric and unit,
        )

    def gram(self, damp: Any) -> Claims:
        """Of `A^H A + damp^2 I`."""
        undamped = not isinstance(damp, Tensor) and bool(damp == 0)
        damped = not isinstance(damp, Tensor) and bool(damp * damp > 0)
        return Claims(
            positive_semidefinite=True,
            positive_definite=damped or self.isometric,
            isometric=undamped and self.isometric,
            coisometric=undamped and self.isometric,
        )

    def congruent(self, V: Claims) -> Claims:
        """Of `V^H A V`; for `V` with orthonormal columns a definite operator stays definite."""
        return Claims(
            hermitian=self.hermitian,
            positive_semidefinite=self.positive_semidefinite,
            positive_definite=self.positive_definite and V.isometric,
        )

    def __str__(self) -> str:
        strongest = next((n for n in ("positive_definite", "positive_semidefinite", "hermitian") if getattr(self, n)), None)
        orthogonal = next((n for n in ("unitary", "isometric", "coisometric") if getattr(self, n)), None)
        return ", ".join(name for name in (strongest, orthogonal) if name)
