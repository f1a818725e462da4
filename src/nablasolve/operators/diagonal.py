"""Operators that multiply each entry by a number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..vectors import real_dtype
from . import spaces
from .base import StructuredOperator
from .claims import Claims
from .factorisation import Factorisation
from .nullspace import Nullspace
from .spaces import AnyBatch, Tree, any_batch, any_batch_of, batch_shape
from .spectrum import Spectrum, Standard


class Identity(StructuredOperator):
    """`x -> x`.

    Args:
        like: an example of `x` (a tensor or pytree; only its structure is read).
    """

    def __init__(self, like: Tree) -> None:
        super().__init__(any_batch_of("like", like), claims=Claims(positive_definite=True, isometric=True, coisometric=True))

    def apply(self, x: Tree) -> Tree:
        return x

    def apply_adjoint(self, y: Tree) -> Tree:
        return y

    def factorise(self) -> Factorisation:
        return Factorisation(self.apply, self.apply)

    def spectrum(self) -> Spectrum | None:
        if not isinstance(self.domain, AnyBatch):
            return None
        example = self.domain.example
        one = torch.ones((), dtype=example.dtype, device=example.device)
        return Spectrum(None, one, example.shape, real=not example.is_complex(), analytic=True)


class Zero(StructuredOperator):
    """`x -> 0`; its nullspace is everything, given by the `Identity` as the projection.

    Args:
        like: an example of `x` (a tensor or pytree; only its structure is read).
        codomain: an example of the result, by default like `x`.
    """

    def __init__(self, like: Tree, codomain: Tree = None) -> None:
        domain = any_batch_of("like", like)
        target = domain if codomain is None else any_batch_of("codomain", codomain)
        super().__init__(domain, target, Claims(positive_semidefinite=target is domain))

    def apply(self, x: Tree) -> Tree:
        return self._zero(x, self.domain, self.codomain)

    def apply_adjoint(self, y: Tree) -> Tree:
        return self._zero(y, self.codomain, self.domain)

    def known_nullspace(self) -> Nullspace:
        return Identity(self.domain)

    def known_left_nullspace(self) -> Nullspace:
        return Identity(self.codomain)

    @staticmethod
    def _zero(x: Tree, source: Tree, target: Tree) -> Tree:
        batch = batch_shape(x, source)
        first: Tensor = pytree.tree_leaves(x)[0]

        def zero(like: AnyBatch) -> Tensor:
            dtype = like.example.dtype.to_complex() if first.is_complex() else like.example.dtype
            return first.new_zeros((*batch, *like.example.shape), dtype=dtype)

        result: Tree = pytree.tree_map(zero, target)
        return result

    def exact_diagonal(self) -> Tree | None:
        return spaces.zeros(self.domain) if self.codomain is self.domain else None

    def exact_norm(self) -> Tensor:
        example = spaces.examples(self.domain)[0]
        return torch.zeros((), dtype=real_dtype(example.dtype), device=example.device)


class Diagonal(StructuredOperator):
    """`x -> d * x`, entry by entry.

    Args:
        d: a floating-point or complex tensor of the shape of `x`. Vectors may have further batch dimensions in front; and
            the first dimensions of `d` may be batch dimensions themselves.
        claims: `positive_definite=True` where every entry is positive, `positive_semidefinite=True`, `unitary=True`. A real
            diagonal is known to be Hermitian.

    Raises:
        TypeError: if `d` is not a Tensor.
        ValueError: if it has an integer dtype.
    """

    def __init__(self, d: Tensor, **claims: Any) -> None:
        if not isinstance(d, Tensor):
            raise TypeError(f"d: expected a Tensor, got {type(d).__name__}")
        if not (d.is_floating_point() or d.is_complex()):
            raise ValueError(f"d: expected a floating-point or complex dtype, got {d.dtype}")
        super().__init__(any_batch(d.shape, d), claims=Claims.named(claims) | Claims(hermitian=not d.is_complex()))
        self.d = d

    def apply(self, x: Tensor) -> Tensor:
        return self.d * x

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.d.conj() * y

    def spectrum(self) -> Spectrum:
        return Spectrum(Standard(), self.d, self.d.shape, real=not self.d.is_complex(), analytic=True)
