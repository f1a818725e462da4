"""Permutations of the entries of a vector."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import StructuredOperator
from .claims import Claims
from .spaces import any_batch


class Permutation(StructuredOperator):
    """`x -> x[indices]`: entry `i` of the result is entry `indices[i]` of the vector. Unitary.

    Args:
        indices: an integer Tensor of shape `(n,)` that holds each of `0 ... n - 1` once. A Tensor of another shape permutes
            vectors of its own shape, with indices into the flattened vector. Further dimensions in front are batch dimensions.
        dtype: of the vectors, by default torch's default dtype.

    Raises:
        TypeError: if `indices` is no Tensor, or `dtype` no floating-point or complex dtype.
        ValueError: if it has no dimension or no integer dtype, or is no permutation.
    """

    def __init__(self, indices: Tensor, dtype: torch.dtype | None = None) -> None:
        if not isinstance(indices, Tensor):
            raise TypeError(f"indices: expected a Tensor of integers, got {type(indices).__name__}")
        if indices.ndim == 0 or indices.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise ValueError(f"indices: expected integers of shape (n,), got {indices.dtype} of shape {tuple(indices.shape)}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
            raise TypeError(f"dtype: expected a floating-point or complex dtype, got {dtype}")
        order = indices.long()
        in_order = order.reshape(-1).sort().values
        if not torch.equal(in_order, torch.arange(indices.numel(), device=indices.device)):
            raise ValueError(f"indices: expected each of 0 ... {indices.numel() - 1} once, got {_fault(in_order)}")
        space = any_batch(indices.shape, indices, dtype or torch.get_default_dtype())
        super().__init__(space, claims=Claims(isometric=True, coisometric=True))
        self.indices = order

    def apply(self, x: Tensor) -> Tensor:
        return self._reordered(x, self.indices.reshape(-1))

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self._reordered(y, self.indices.reshape(-1).argsort())

    def _reordered(self, x: Tensor, order: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - self.indices.ndim]
        entries = x.reshape(*batch, math.prod(self.indices.shape))
        return entries.index_select(-1, order).reshape(x.shape)

    def exact_diagonal(self) -> Tensor:
        places = torch.arange(self.indices.numel(), device=self.indices.device)
        diagonal: Tensor = self.indices.reshape(-1) == places
        return diagonal.to(self.domain.example.dtype).reshape(self.indices.shape)

    def exact_norm(self) -> Tensor:
        return torch.ones((), dtype=self.domain.example.real.dtype, device=self.indices.device)


def _fault(in_order: Tensor) -> Any:
    """What is wrong with sorted indices that are no permutation, in words."""
    n = in_order.numel()
    if in_order[0] < 0 or in_order[-1] >= n:
        return f"indices from {int(in_order[0])} to {int(in_order[-1])}"
    twice = in_order[:-1][in_order[1:] == in_order[:-1]]
    return f"{int(twice[0])} more than once"
