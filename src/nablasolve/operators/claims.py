"""What is known of an operator, and how the algebra carries it on: where mathematics allows it, and never further."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from ..arguments import nearest

NAMES = ("hermitian", "positive_semidefinite", "positive_definite", "unitary", "full_rank")


@dataclass(frozen=True)
class Claims:
    """Properties that are known to hold; False says nothing.

    Attributes:
        hermitian: `A = A^H`.
        positive_definite: Hermitian, and `x^H A x > 0` for every `x != 0`. Implies `positive_semidefinite` and both ranks.
        positive_semidefinite: Hermitian, and `x^H A x >= 0`. Implies `hermitian`.
        isometric: `A^H A = I`. Implies `full_column_rank`.
        coisometric: `A A^H = I`. Implies `full_row_rank`.
        full_column_rank: `A x = 0` for `x = 0` only.
        full_row_rank: every `b` is an `A x`. A Hermitian operator has both ranks or none.
    """

    hermitian: bool = False
    positive_definite: bool = False
    positive_semidefinite: bool = False
    isometric: bool = False
    coisometric: bool = False
    full_column_rank: bool = False
    full_row_rank: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(getattr(self, field.name), bool):
                raise TypeError(f"{field.name}: expected a bool, got {type(getattr(self, field.name)).__name__}")
        if self.positive_definite:
            object.__setattr__(self, "positive_semidefinite", True)
        if self.positive_semidefinite:
            object.__setattr__(self, "hermitian", True)
        column, row = self.full_column_rank or self.isometric, self.full_row_rank or self.coisometric
        both = self.positive_definite or (self.hermitian and (column or row))
        object.__setattr__(self, "full_column_rank", column or both)
        object.__setattr__(self, "full_row_rank", row or both)

    @property
    def unitary(self) -> bool:
        """`A^H A = A A^H = I`."""
        return self.isometric and self.coisometric

    @property
    def full_rank(self) -> bool:
        """Of full column and of full row rank, and so square."""
        return self.full_column_rank and self.full_row_rank

    @classmethod
    def named(cls, claims: dict[str, Any]) -> Claims:
        """The claims of the keywords `hermitian`, `positive_semidefinite`, `positive_definite`, `unitary` and `full_rank`.

        `full_rank` is read as of a square operator; `within` leaves of it what holds for other sizes.

        Raises:
            TypeError: for an unknown name, with the nearest known one, or a value that is not a bool.
        """
        for name in claims:
            if name in ("nullspace", "left_nullspace"):
                raise TypeError(f"unknown option {name!r}; say it of the operator: aslinearoperator(A, {name}=...)")
            if name not in NAMES:
                raise TypeError(f"unknown claim {name!r}{nearest(name, NAMES)}")
        unitary, full = claims.get("unitary", False), claims.get("full_rank", False)
        for name, value in (("unitary", unitary), ("full_rank", full)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
        others = {name: value for name, value in claims.items() if name not in ("unitary", "full_rank")}
        return cls(**others, isometric=unitary, coisometric=unitary, full_column_rank=full, full_row_rank=full)

    def within(self, rows: bool, columns: bool) -> Claims:
        """The claims without the full row rank, or column rank, unless the spaces allow it."""
        return replace(self, full_row_rank=self.full_row_rank and rows, full_column_rank=self.full_column_rank and columns)

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
            full_column_rank=self.full_row_rank, full_row_rank=self.full_column_rank,
        )  # fmt: skip

    @property
    def inverse(self) -> Claims:
        """Of `A^{-1}`: where it exists, a semidefinite operator is definite, and all ranks are full."""
        return Claims(
            self.hermitian, positive_definite=self.positive_semidefinite, isometric=self.unitary, coisometric=self.unitary,
            full_column_rank=True, full_row_rank=True,
        )  # fmt: skip

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
        return Claims(
            isometric=self.isometric and other.isometric,
            coisometric=self.coisometric and other.coisometric,
            full_column_rank=self.full_column_rank and other.full_column_rank,
            full_row_rank=self.full_row_rank and other.full_row_rank,
        )

    def scaled(self, factor: Any) -> Claims:
        """Of `c A`. The value of a tensor is data, and is not read."""
        if isinstance(factor, Tensor):
            return Claims(hermitian=self.hermitian and not factor.is_complex())
        real, unit, nonzero = isinstance(factor, numbers.Real), bool(abs(factor) == 1), is_nonzero(factor)
        return Claims(
            hermitian=self.hermitian and real,
            positive_semidefinite=self.positive_semidefinite and real and bool(factor >= 0),
            positive_definite=self.positive_definite and real and bool(factor > 0),
            isometric=self.isometric and unit,
            coisometric=self.coisometric and unit,
            full_column_rank=self.full_column_rank and nonzero,
            full_row_rank=self.full_row_rank and nonzero,
        )

    def gram(self, damp: Any) -> Claims:
        """Of `A^H A + damp^2 I`."""
        undamped = not isinstance(damp, Tensor) and bool(damp == 0)
        damped = not isinstance(damp, Tensor) and bool(damp * damp > 0)
        return Claims(
            positive_semidefinite=True,
            positive_definite=damped or self.full_column_rank,
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
        implied = self == self.within(rows=False, columns=False)  # the rank follows from what is said already
        ranks = () if implied else ("full_rank", "full_column_rank", "full_row_rank")
        rank = next((n for n in ranks if getattr(self, n)), None)
        return ", ".join(name for name in (strongest, orthogonal, rank) if name)


def is_nonzero(factor: Any) -> bool:
    """Whether a factor is a finite number other than zero; the value of a tensor is data, and is not read."""
    return not isinstance(factor, Tensor) and bool(0 < abs(factor) < math.inf)
