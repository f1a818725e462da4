"""Sparse matrices as operators, in every layout of torch, with gradients on their own pattern."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..closure import is_wrapped, transforms_active
from .base import StructuredOperator
from .claims import Claims
from .spaces import any_batch

_BY_ROWS = (torch.sparse_csr, torch.sparse_bsr)
# layouts whose transpose has no kernel in torch, or that have none themselves
_BLOCKS = (torch.sparse_bsr, torch.sparse_bsc)


class SparseOperator(StructuredOperator):
    """A sparse matrix in COO, CSR, CSC, BSR or BSC layout.

    Products outside autograd use torch's sparse kernels. Differentiable ones are gathers and scatters of the stored
    values, so that a gradient has as many entries as the matrix has values, and never `m n`.

    Args:
        matrix: a floating-point or complex sparse Tensor of shape `(m, n)`. It acts on vectors of shape `(*batch, n)`.
        hermitian, positive_definite, full_rank: claims.

    Raises:
        ValueError: for a batch of matrices, a hybrid tensor, or an integer dtype.
    """

    def __init__(self, matrix: Tensor, **claims: Any) -> None:
        # a torch.func transform cannot touch most sparse layouts; a matrix that it does not wrap is a constant to it
        inside = is_wrapped(matrix)
        with contextlib.nullcontext() if inside else temporarily_clear_interpreter_stack():
            dense_dim = matrix.dense_dim()
            if matrix.ndim != 2 or dense_dim:
                raise ValueError(
                    f"A: expected a sparse matrix of shape (m, n) without dense dimensions, got shape "
                    f"{tuple(matrix.shape)} with {dense_dim} dense"
                )
            if not (matrix.is_floating_point() or matrix.is_complex()):
                raise ValueError(f"A: expected a floating-point or complex dtype, got {matrix.dtype}")
            if matrix.layout == torch.sparse_coo:
                matrix = matrix.coalesce()
            self.source = matrix
            self.matrix = matrix.detach()
        # A leaf's values are taken anew at each use, since a backward pass may free the graph in between; any other
        # matrix has a graph of its own that lives as long.
        leaf = self.source.is_leaf and self.source.requires_grad
        self.values: Tensor | None = None if leaf else self._stored_values()
        m, n = matrix.shape
        like = self.values if self.values is not None else self.matrix
        domain = any_batch((n,), like)
        super().__init__(domain, domain if m == n else any_batch((m,), like), Claims.named(claims))

    @functools.cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """The row and the column of each stored value or block."""
        levels = contextlib.nullcontext() if is_wrapped(self.source) else temporarily_clear_interpreter_stack()
        with levels, torch.inference_mode(False):  # they are kept, for gradients too
            if self.matrix.layout == torch.sparse_coo:
                rows, columns = self.matrix.indices()
                return rows, columns
            return _block_indices(self.matrix)

    @property
    def constants(self) -> tuple[Tensor, ...] | None:
        moves = self.source.requires_grad or transforms_active() or torch.autograd.forward_ad._current_level >= 0
        return None if moves or self.values is None else (self.values,)

    def apply(self, x: Tensor) -> Tensor:
        if self.matrix.layout == torch.sparse_bsc or _differentiable():
            return _gather_scatter(self._blocks(), *self.places, x, self.matrix.shape[0])
        return _product(self.matrix, x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        if self.matrix.layout in _BLOCKS or _differentiable():
            rows, columns = self.places
            return _gather_scatter(self._blocks().conj_physical().mT, columns, rows, y, self.matrix.shape[1])
        return _product(self.matrix.t(), y.conj()).conj().resolve_conj()

    def to_dense(self, like: Any = None) -> Tensor:
        p, q = self._blocks().shape[1:]
        m, n = self.matrix.shape
        values = self._blocks()
        blocks = values.new_zeros(m // p, n // q, p, q).index_put(self.places, values, accumulate=True)
        return blocks.transpose(1, 2).reshape(m, n)

    def exact_diagonal(self) -> Tensor | None:
        blocks = self._blocks()
        _, p, q = blocks.shape
        if self.codomain is not self.domain or p != q:
            return None
        rows, columns = self.places
        on = rows == columns
        diagonals = blocks[on].diagonal(dim1=-2, dim2=-1)
        zero = torch.zeros((self.matrix.shape[0] // p, p), dtype=diagonals.dtype, device=diagonals.device)
        return zero.index_add(0, rows[on], diagonals).reshape(-1)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseOperator:
        """A copy with values of its own; torch has no deep copy of a compressed layout."""
        matrix = self.matrix.clone().requires_grad_(self.source.requires_grad)
        result = SparseOperator(matrix)
        result.claims = self.claims
        result.claimed_nullspace = copy.deepcopy(self.claimed_nullspace, memo)
        result.claimed_left_nullspace = copy.deepcopy(self.claimed_left_nullspace, memo)
        memo[id(self)] = result
        return result

    def _blocks(self) -> Tensor:
        """The values as blocks, of shape `(nnz, p, q)`."""
        values = self.values if self.values is not None else self._stored_values()
        return values if values.ndim == 3 else values[:, None, None]

    def _stored_values(self) -> Tensor:
        with contextlib.nullcontext() if is_wrapped(self.source) else temporarily_clear_interpreter_stack():
            values: Tensor = self.source.values()
        return values

    def for_one_solve(self) -> SparseOperator:
        """The same operator, whose values are taken out of the matrix once: a dense tensor that gradients pass through."""
        if self.values is not None:
            return self
        _ = self.places  # found once, for all copies
        result = copy.copy(self)
        result.values = self._stored_values()
        return result

    def _label(self) -> str:
        return f"SparseOperator({str(self.matrix.layout).removeprefix('torch.sparse_').upper()})"


def _differentiable() -> bool:
    return torch.is_grad_enabled() or transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _block_indices(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each stored value or block of a compressed layout."""
    by_rows = matrix.layout in _BY_ROWS
    pointers = matrix.crow_indices() if by_rows else matrix.ccol_indices()
    inner = matrix.col_indices() if by_rows else matrix.row_indices()
    outer = torch.repeat_interleave(torch.arange(len(pointers) - 1, device=inner.device), pointers.diff())
    return (outer, inner) if by_rows else (inner, outer)


def _gather_scatter(blocks: Tensor, rows: Tensor, columns: Tensor, x: Tensor, m: int) -> Tensor:
    """The product of a block-sparse matrix: blocks `(nnz, p, q)` at block rows and columns, `x` of shape `(*batch, n)`."""
    _, p, q = blocks.shape
    gathered = x.reshape(*x.shape[:-1], x.shape[-1] // q, q).index_select(-2, columns)
    products = (blocks * gathered.unsqueeze(-2)).sum(-1)
    result = torch.zeros((*x.shape[:-1], m // p, p), dtype=products.dtype, device=x.device)
    return result.index_add(-2, rows, products).reshape(*x.shape[:-1], m)


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """`matrix @ x` by torch's sparse kernels, for `x` of shape `(*batch, n)`; real and complex mix as in mathematics."""
    if matrix.is_complex() and not x.is_complex():
        x = x.to(matrix.dtype)
    if x.is_complex() and not matrix.is_complex():
        return torch.complex(_product(matrix, x.real), _product(matrix, x.imag))
    if x.ndim == 1:
        return matrix @ x
    columns = matrix @ x.reshape(-1, x.shape[-1]).mT
    return columns.mT.reshape(*x.shape[:-1], matrix.shape[0])
