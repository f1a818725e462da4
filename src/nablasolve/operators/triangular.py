"""Triangular matrices, and what every factorisation into triangles needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..closure import matvec
from .base import StructuredOperator
from .claims import Claims
from .factorisation import Factorisation
from .spaces import any_batch


class Triangular(StructuredOperator):
    """`x -> tril(M) x`, or `x -> triu(M) x`.

    A solve is one substitution, of `n^2` multiplications (Golub & Van Loan 2013, §3.1).

    Args:
        matrix: a floating-point or complex Tensor of shape `(..., n, n)`, of which one triangle is read. It acts on vectors of
            shape `(..., n)`; batch dimensions broadcast.
        upper: read the upper triangle rather than the lower one.
        unit_diagonal: take ones for the diagonal, which is then not read.
        claims: `positive_definite=True` and the like, where they are known.

    Raises:
        TypeError: if `matrix` is no Tensor, or an option no bool.
        ValueError: if it is not square, or has an integer dtype.
    """

    def __init__(self, matrix: Tensor, upper: bool = False, unit_diagonal: bool = False, **claims: Any) -> None:
        check_tensor("matrix", matrix, 2, "(..., n, n)")
        if matrix.shape[-2] != matrix.shape[-1]:
            raise ValueError(f"matrix: expected a square matrix of shape (..., n, n), got shape {tuple(matrix.shape)}")
        for name, value in (("upper", upper), ("unit_diagonal", unit_diagonal)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
        super().__init__(any_batch(matrix.shape[-1:], matrix), claims=Claims.named(claims))
        self.matrix, self.upper, self.unit_diagonal = matrix, upper, unit_diagonal

    def triangle(self) -> Tensor:
        """The matrix that the operator is, of shape `(..., n, n)`."""
        skipped = int(self.unit_diagonal)
        read = self.matrix.triu(skipped) if self.upper else self.matrix.tril(-skipped)
        return read + torch.eye(read.shape[-1], dtype=read.dtype, device=read.device) if self.unit_diagonal else read

    def apply(self, x: Tensor) -> Tensor:
        return matvec(self.triangle(), x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return matvec(self.triangle().mH, y)

    def factorise(self) -> Factorisation:
        triangle = self.triangle()
        pivots = triangle.diagonal(dim1=-2, dim2=-1)
        # any other number for a pivot of zero solves what can be solved, with zero for its unknown
        triangle = triangle + torch.diag_embed(torch.where(pivots == 0, 1.0, 0.0)).to(triangle.dtype)

        def solve(columns: Tensor) -> Tensor:
            return substitute(triangle, columns, upper=self.upper)

        def solve_adjoint(columns: Tensor) -> Tensor:
            return substitute(triangle.mH, columns, upper=not self.upper)

        batch = self.matrix.shape[:-2]
        return Factorisation(on_vectors(solve, batch, self.matrix.dtype), on_vectors(solve_adjoint, batch, self.matrix.dtype))

    def exact_diagonal(self) -> Tensor:
        diagonal = self.matrix.diagonal(dim1=-2, dim2=-1)
        return torch.ones_like(diagonal) if self.unit_diagonal else diagonal

    def exact_trace(self) -> Tensor:
        return self.exact_diagonal().sum(-1)

    def to_dense(self, like: Any = None) -> Tensor:
        return self.triangle()

    def _label(self) -> str:
        return f"Triangular({'upper' if self.upper else 'lower'}{', unit diagonal' if self.unit_diagonal else ''})"


def check_tensor(name: str, value: Any, dims: int, shape: str) -> None:
    """Raise unless the value is a floating-point or complex tensor of at least as many dimensions.

    Raises:
        TypeError: if it is no Tensor.
        ValueError: if it has fewer dimensions, or an integer dtype.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor of shape {shape}, got {type(value).__name__}")
    if value.ndim < dims:
        raise ValueError(f"{name}: expected shape {shape}, got shape {tuple(value.shape)}")
    if not (value.is_floating_point() or value.is_complex()):
        raise ValueError(f"{name}: expected a floating-point or complex dtype, got {value.dtype}")


def substitute(triangle: Tensor, columns: Tensor, *, upper: bool) -> Tensor:
    """`R^{-1} C` for triangles `(*batch, n, n)` and columns `(*batch, n, k)`."""
    solution: Tensor = torch.linalg.solve_triangular(triangle, columns, upper=upper)
    return solution


def on_vectors(solve: Callable[[Tensor], Tensor], batch: torch.Size, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The solution for columns `(*batch, n, k)` of a dtype, as one for vectors `(*more, *batch, n)`, real or complex.

    Vectors that share a matrix are its columns, and so are the real and the imaginary part for a real matrix.
    """

    def function(r: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(r.shape, (*batch, r.shape[-1]))
        more = shape[: len(shape) - 1 - len(batch)]
        columns = r.expand(shape).reshape(math.prod(more), *batch, shape[-1]).movedim(0, -1)
        split = columns.is_complex() and not dtype.is_complex
        if split:
            columns = torch.cat([columns.real, columns.imag], dim=-1)
        x = solve(columns.to(torch.promote_types(columns.dtype, dtype)))
        if split:
            x = torch.complex(*x.chunk(2, dim=-1))
        return x.movedim(-1, 0).reshape(shape)

    return function
