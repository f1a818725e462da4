"""Linear maps that another library applies, out of autograd's sight, as functions that autograd can differentiate.

The map has no tensors of its own that a gradient could reach; the derivative with respect to the vector is the map itself,
and its adjoint in reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..operators.base import StructuredOperator
from ..operators.claims import Claims
from ..operators.spaces import any_batch


@dataclass(frozen=True)
class Map:
    """`x -> A x` on one vector and `y -> A^H y`, each from a detached CPU tensor to one of the other space's shape."""

    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    domain: tuple[int, ...]
    codomain: tuple[int, ...]

    @property
    def H(self) -> Map:
        """The adjoint map."""
        return Map(self.adjoint, self.forward, self.codomain, self.domain)

    def __call__(self, x: Tensor) -> Tensor:
        """`A x` for `x` of shape `(*batch, *domain)`; differentiable to any order."""
        return _Apply.apply(self, x)  # type: ignore[no-any-return]


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(map: Map, x: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - len(map.domain)]
        vectors = x.detach().resolve_conj().resolve_neg().cpu().reshape(-1, *map.domain)
        if not len(vectors):
            return x.new_zeros((*batch, *map.codomain))
        return torch.stack([map.forward(v) for v in vectors]).reshape(*batch, *map.codomain).to(x.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.map = inputs[0]

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[None, Tensor]:
        return None, ctx.map.H(y)

    @staticmethod
    def jvp(ctx: Any, _: None, dx: Tensor) -> Tensor:
        with torch.autograd.forward_ad._set_fwd_grad_enabled(True):  # PyTorch calls this with it switched off
            return ctx.map(dx)  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, in_dims: Any, map: Map, x: Tensor) -> tuple[Tensor, int]:
        return map(x.movedim(in_dims[1], 0)), 0


class External(StructuredOperator):
    """An operator of another library.

    Args:
        map: how it is applied.
        dtype: of its vectors; a real operator acts on complex ones part by part.
        device: where the tensors of a solve are.
    """

    def __init__(self, map: Map, dtype: torch.dtype, device: torch.device | str | None = None, **claims: Any) -> None:
        like = torch.empty((), dtype=dtype, device=device)
        domain = any_batch(map.domain, like)
        codomain = domain if map.domain == map.codomain else any_batch(map.codomain, like)
        super().__init__(domain, codomain, Claims.named(claims))
        self.map, self.real = map, not dtype.is_complex

    def apply(self, x: Tensor) -> Tensor:
        return self._by_parts(self.map, x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self._by_parts(self.map.H, y)

    def _by_parts(self, map: Map, x: Tensor) -> Tensor:
        if not self.real:
            x = x.to(x.dtype.to_complex())
        elif x.is_complex():
            return torch.complex(map(x.real), map(x.imag))
        return map(x)
