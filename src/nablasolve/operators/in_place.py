"""Writing into a result that nobody else holds yet, so that a product allocates little more than what it returns.

In-place operations are differentiable, and part of every transform but for three things, which the functions here take care
of: `vmap` cannot write what it maps over into a tensor that it does not map over; `out=` is for tensors that nothing
watches; and a lazy conjugate is copied by every operation that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree


def zeros_for(sizes: Sequence[int], x: Tensor, *factors: Any) -> Tensor:
    """Zeros for a sum of products of a vector and other factors: of their dtype and batch dimensions.

    Args:
        sizes: the last dimensions of the result. Those of a tensor in front of as many dimensions are batch dimensions.
        x: the vector.
        factors: tensors and numbers that the sum depends on. `vmap` maps over the result where it maps over one of them.
    """
    dtype, batches = x.dtype, {x.shape[: x.ndim - len(sizes)]}
    for factor in factors:
        if isinstance(factor, Tensor) and factor.ndim:
            dtype = torch.promote_types(dtype, factor.dtype)
            batches.add(factor.shape[: max(0, factor.ndim - len(sizes))])
        elif factor.is_complex() if isinstance(factor, Tensor) else isinstance(factor, complex):
            dtype = dtype.to_complex()
    batch = torch.broadcast_shapes(*batches) if len(batches) > 1 else batches.pop()
    result = x.new_zeros((*batch, *sizes), dtype=dtype)
    if torch._C._are_functorch_transforms_active():
        for factor in factors:
            result = result + factor.new_zeros(()) if isinstance(factor, Tensor) else result
    return result


def subtract(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write `a - b` into a tensor of their size that is mapped over where they are."""
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        out.copy_(a - b)
    else:
        torch.sub(a, b, out=out)


def multiplied(x: Tensor, factor: Any) -> Tensor:
    """`x` times a real number or a tensor: written into `x` where that can hold it."""
    if not isinstance(factor, Tensor):
        return x if factor == 1 else x.mul_(factor)
    # a number, and so a tensor without dimensions, enlarges no precision
    held = factor.ndim <= x.ndim and torch.promote_types(x.dtype, factor.dtype if factor.ndim else x.dtype) == x.dtype
    held = held and (x.is_complex() or not factor.is_complex())
    held = held and all(m in (1, n) for m, n in zip(reversed(factor.shape), reversed(x.shape), strict=False))
    return x.mul_(factor) if held and not torch._C._are_functorch_transforms_active() else x * factor


def add_product(result: Tensor, factor: Any, x: Tensor) -> None:
    """Add a number or a tensor times `x` to a result that is made for them."""
    if isinstance(factor, Tensor):
        result.addcmul_(factor, x)
    else:
        result.add_(x, alpha=factor)


def with_conjugate(apply: Callable[[Any], Any], x: Any) -> Any:
    """`conj(A) x = conj(A conj(x))`, with one copy of `x` instead of one of every coefficient of `A`.

    Args:
        apply: `x -> A x`, whose result is its own. Nothing is copied where it is real.
        x: a tensor or a pytree of tensors.
    """
    conjugate = pytree.tree_map(lambda leaf: leaf.conj().resolve_conj(), x)
    return pytree.tree_map(lambda leaf: leaf.conj_physical_(), apply(conjugate))
