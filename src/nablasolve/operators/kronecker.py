"""Kronecker products of operators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .algebra import Composite
from .base import aslinearoperator
from .claims import Claims
from .factorisation import Factorisation
from .spaces import AnyBatch, Tree, any_batch, zeros


class Kronecker(Composite):
    """`A_1 ⊗ A_2 ⊗ ...`: each factor acts along its own dimensions of a vector of shape `(*batch, n_1, n_2, ...)`.

    On flattened vectors this is the Kronecker product of the matrices in the same order (Golub & Van Loan 2013, §12.3). A solve
    is one solve with each factor, where every one of them is square and has a direct solve of its own.

    Args:
        factors: operators on vectors with free batch dimensions (matrices, and the operators of this library), or matrices.
            A factor that acts on vectors of `k` dimensions takes `k` of the dimensions.

    Raises:
        ValueError: if there is no factor, or one whose vectors cannot have further batch dimensions.
    """

    def __init__(self, *factors: Any) -> None:
        if not factors:
            raise ValueError("factors: expected at least one operator, got none")
        parts = tuple(aslinearoperator(factor) for factor in factors)
        for i, part in enumerate(parts):
            if not isinstance(part.domain, AnyBatch) or not isinstance(part.codomain, AnyBatch):
                needed = "a matrix or an operator whose vectors may have batch dimensions"
                raise ValueError(f"factors[{i}]: expected {needed}, got {part.expression}")
            with torch.no_grad():
                image = part.apply(zeros(part.domain))
            if image.ndim > part.codomain.example.ndim:
                raise ValueError(f"factors[{i}]: expected an operator without batch dimensions of its own, got {part!r}")
        domain, codomain = (_joined([getattr(part, side) for part in parts]) for side in ("domain", "codomain"))
        super().__init__(parts, domain, codomain, Claims.all([part.claims for part in parts]))

    def apply(self, x: Tensor) -> Tensor:
        return self._along([part.apply for part in self.parts], x, [part.domain for part in self.parts])

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self._along([part.apply_adjoint for part in self.parts], y, [part.codomain for part in self.parts])

    @staticmethod
    def _along(functions: list[Callable[[Tensor], Tensor]], x: Tensor, spaces: list[AnyBatch]) -> Tensor:
        """Each function along its own dimensions: those go last, and what comes of them goes first, for the next ones."""
        sizes = [space.example.ndim for space in spaces]
        first = x.ndim - sum(sizes)
        for function, size in zip(functions, sizes, strict=True):
            x = function(x.movedim(tuple(range(first, first + size)), tuple(range(-size, 0))))
        return x

    def factorise(self) -> Factorisation | None:
        factors = [part.factorise() for part in self.parts]
        found = [factor for factor in factors if factor is not None]
        if len(found) < len(factors):
            return None
        spaces = [part.domain for part in self.parts]

        def solve(r: Tensor) -> Tensor:
            return self._along([factor.solve for factor in found], r, spaces)

        def solve_adjoint(r: Tensor) -> Tensor:
            return self._along([factor.solve_adjoint for factor in found], r, spaces)

        return Factorisation(solve, solve_adjoint)

    def exact_diagonal(self) -> Tree | None:
        diagonals = [part.exact_diagonal() for part in self.parts]
        known = [diagonal for diagonal in diagonals if diagonal is not None]
        if len(known) < len(diagonals):
            return None
        sizes = [part.domain.example.ndim for part in self.parts]
        return functools.reduce(torch.mul, (d[(..., *(None,) * sum(sizes[i + 1 :]))] for i, d in enumerate(known)))

    def exact_trace(self) -> Tensor | None:
        return _product([part.exact_trace() for part in self.parts])

    def exact_norm(self) -> Tensor | None:
        return _product([part.exact_norm() for part in self.parts])

    def exact_eigenvalue_bounds(self) -> tuple[Tensor, Tensor] | None:
        # the eigenvalues are the products of those of the factors, which are real where the factors are Hermitian
        bounds = [part.exact_eigenvalue_bounds() if part.hermitian else None for part in self.parts]
        if any(pair is None for pair in bounds):
            return None
        low, high = torch.ones(()), torch.ones(())
        for pair in bounds:
            assert pair is not None
            ends = torch.stack(torch.broadcast_tensors(*(a * b for a in (low, high) for b in pair)))
            low, high = ends.amin(0), ends.amax(0)
        return low, high

    @property
    def expression(self) -> str:
        return f"Kronecker({', '.join(part.expression for part in self.parts)})"


def _joined(spaces: list[Any]) -> AnyBatch:
    examples = [space.example for space in spaces]
    dtype = functools.reduce(torch.promote_types, (example.dtype for example in examples))
    return any_batch([size for example in examples for size in example.shape], examples[0], dtype)


def _product(values: list[Tensor | None]) -> Tensor | None:
    known = [value for value in values if value is not None]
    return functools.reduce(torch.mul, known) if len(known) == len(values) else None
