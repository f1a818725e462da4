"""Sparse matrices as operators, in every layout of torch, with gradients on their own pattern."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..closure import transforms_active
from .base import Claims, LinearOperator, matrix_spaces

_COMPRESSED_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_BLOCKS = (torch.sparse_bsr, torch.sparse_bsc)


class SparseOperator(LinearOperator):
    """A sparse matrix in COO, CSR, CSC, BSR or BSC layout.

    Products outside autograd use torch's sparse kernels. Differentiable ones are gathers and scatters of the stored
    values, so that a gradient has as many entries as the matrix has values, and never `m n`.

    Args:
        matrix: a floating-point or complex sparse Tensor of shape `(m, n)`. It acts on vectors of shape `(*batch, n)`.
        hermitian, positive_definite: claims.

    Raises:
        ValueError: for a batch of matrices, a hybrid tensor, or an integer dtype.
    """

    def __init__(self, matrix: Tensor, **claims: Any) -> None:
        dense_dim = matrix.dense_dim()
        if matrix.ndim != 2 or dense_dim:
            raise ValueError(
                f"A: expected a sparse matrix of shape (m, n) without dense dimensions, got shape {tuple(matrix.shape)} with "
                f"{dense_dim} dense"
            )
        if not (matrix.is_floating_point() or matrix.is_complex()):
            raise ValueError(f"A: expected a floating-point or complex dtype, got {matrix.dtype}")
        self.matrix = matrix
        self.domain, self.codomain = matrix_spaces(matrix)
        self.claims = Claims.named(claims)

    @property
    def has_adjoint(self) -> bool:
        return True

    def apply(self, x: Tensor) -> Tensor:
        if self._differentiable(x):
            rows, columns, values = self._entries()
            return _gather_scatter(values, rows, columns, x, self.matrix.shape[0])
        return _product(self.matrix, x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        if self._differentiable(y) or self.matrix.layout in _BLOCKS:
            rows, columns, values = self._entries()
            return _gather_scatter(values.conj_physical().mT, columns, rows, y, self.matrix.shape[1])
        return _product(self.matrix.t(), y.conj()).conj().resolve_conj()

    def to_dense(self, like: Any = None) -> Tensor:
        return self.matrix.to_dense()

    def _differentiable(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() or transforms_active() or self.matrix.layout == torch.sparse_bsc

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Block rows, block columns and values of shape `(nnz, p, q)`, as differentiable functions of the matrix."""
        matrix = self.matrix
        if matrix.layout == torch.sparse_coo:
            matrix = matrix.coalesce()
            rows, columns = matrix.indices()
            return rows, columns, matrix.values()[:, None, None]
        by_rows = matrix.layout in _COMPRESSED_ROWS
        pointers, inner = (
            (matrix.crow_indices(), matrix.col_indices()) if by_rows else (matrix.ccol_indices(), matrix.row_indices())
        )
        outer = torch.repeat_interleave(torch.arange(len(pointers) - 1, device=inner.device), pointers.diff())
        values = matrix.values()
        if values.ndim == 1:
            values = values[:, None, None]
        return (outer, inner, values) if by_rows else (inner, outer, values)

    def _describe(self) -> str:
        layout = str(self.matrix.layout).removeprefix("torch.sparse_").upper()
        return f"SparseOperator{tuple(self.matrix.shape)}:{layout}:{str(self.matrix.dtype).removeprefix('torch.')}"


def _gather_scatter(values: Tensor, rows: Tensor, columns: Tensor, x: Tensor, m: int) -> Tensor:
    """The product of a block-sparse matrix: blocks `(nnz, p, q)` at block rows and columns, `x` of shape `(*batch, n)`."""
    _, p, q = values.shape
    blocks = x.reshape(*x.shape[:-1], -1, q).index_select(-2, columns)
    products = (values * blocks.unsqueeze(-2)).sum(-1)
    result = torch.zeros((*x.shape[:-1], m // p, p), dtype=products.dtype, device=x.device)
    return result.index_add(-2, rows, products).reshape(*x.shape[:-1], m)


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """`matrix @ x` by torch's sparse kernels, for `x` of shape `(*batch, n)`; a real matrix acts on complex vectors."""
    if matrix.is_complex() and not x.is_complex():
        x = x.to(matrix.dtype)
    if x.is_complex() and not matrix.is_complex():
        return torch.complex(_product(matrix, x.real), _product(matrix, x.imag))
    if x.ndim == 1:
        return matrix @ x
    columns = matrix @ x.reshape(-1, x.shape[-1]).mT
    return columns.mT.reshape(*x.shape[:-1], matrix.shape[0])
