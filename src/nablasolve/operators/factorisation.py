"""Direct solves with an operator whose structure allows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any


@dataclass(frozen=True)
class Factorisation:
    """What a structure leaves once it has been factorised: how to solve with `A`, and how with `A^H`.

    Both functions act on vectors of the operator's space with any batch dimensions, and may be off by rounding, which a
    solve refines away. Where the operator is singular they return finite vectors that solve nothing.

    Attributes:
        solve: `r -> A^{-1} r`.
        solve_adjoint: `r -> A^{-H} r`.
    """

    solve: Callable[[Tree], Tree]
    solve_adjoint: Callable[[Tree], Tree]

    @property
    def H(self) -> Factorisation:
        """Of `A^H`."""
        return Factorisation(self.solve_adjoint, self.solve)

    def conj(self) -> Factorisation:
        """Of the complex conjugate of `A`."""

        def conjugated(solve: Callable[[Tree], Tree]) -> Callable[[Tree], Tree]:
            return lambda r: pytree.tree_map(torch.conj, solve(pytree.tree_map(torch.conj, r)))

        return Factorisation(conjugated(self.solve), conjugated(self.solve_adjoint))

    def scaled(self, factor: Any) -> Factorisation:
        """Of `c A`."""
        conjugate = factor.conj() if isinstance(factor, Tensor) else factor.conjugate()
        return Factorisation(
            lambda r: pytree.tree_map(lambda leaf: safe_divide(leaf, factor), self.solve(r)),
            lambda r: pytree.tree_map(lambda leaf: safe_divide(leaf, conjugate), self.solve_adjoint(r)),
        )

    def then(self, right: Factorisation) -> Factorisation:
        """Of the product `A B`, for this `A` and the factorisation of `B`."""
        return Factorisation(lambda r: right.solve(self.solve(r)), lambda r: self.solve_adjoint(right.solve_adjoint(r)))


def safe_divide(numerator: Tensor, denominator: Any) -> Tensor:
    """`numerator / denominator`, and 0 where the denominator is zero."""
    if not isinstance(denominator, Tensor):
        return numerator / denominator if denominator != 0 else torch.zeros_like(numerator)
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))
