"""Spaces: what an operator knows of its vectors, as examples without data.

A space is an *example*, a tensor or a pytree of tensors of which only shapes, dtypes and devices are read, or a pytree with
`AnyBatch` for leaves: the trailing shape of vectors that may come with any batch dimensions in front. None is a space
of which nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any  # a tensor, or a pytree of tensors


@dataclass(frozen=True, eq=False)
class AnyBatch:
    """Vectors of shape `(*batch, *example.shape)` with any batch dimensions."""

    example: Tensor


def any_batch(shape: Sequence[int], like: Tensor | None = None, dtype: torch.dtype | None = None) -> AnyBatch:
    """The space of vectors of a trailing shape, with the dtype and device of a tensor."""
    dtype = dtype or (torch.get_default_dtype() if like is None else like.dtype)
    return AnyBatch(torch.empty((), dtype=dtype, device=None if like is None else like.device).expand(tuple(shape)))


def space_of(name: str, example: Tree) -> Tree:
    """The space of an example: shapes, dtypes and devices, without the data.

    Raises:
        TypeError: if `example` is no tensor or pytree of tensors.
    """
    if example is None:
        return None
    leaves = pytree.tree_leaves(example)
    if not leaves or not all(isinstance(leaf, Tensor | AnyBatch) for leaf in leaves):
        raise TypeError(f"{name}: expected an example tensor or a pytree of tensors, got {type(example).__name__}")

    def without_data(leaf: Tensor | AnyBatch) -> Tensor | AnyBatch:
        if isinstance(leaf, AnyBatch):
            return leaf
        return torch.empty((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)

    return pytree.tree_map(without_data, example)


def any_batch_of(name: str, example: Tree) -> Tree:
    """The space of an example whose leaves may have further batch dimensions in front.

    Raises:
        TypeError: if `example` is no tensor or pytree of tensors.
    """
    space = space_of(name, example)
    return pytree.tree_map(lambda leaf: leaf if isinstance(leaf, AnyBatch) else AnyBatch(leaf), space)


def batch_shape(x: Tree, space: Tree) -> torch.Size:
    """The batch dimensions of a vector of a space whose leaves are `AnyBatch`."""
    leaf: Tensor = pytree.tree_leaves(x)[0]
    like = examples(space)[0]
    return leaf.shape[: leaf.ndim - like.ndim]


def examples(space: Tree) -> list[Tensor]:
    """The example tensors of a space, one a leaf."""
    return [leaf.example if isinstance(leaf, AnyBatch) else leaf for leaf in pytree.tree_leaves(space)]


def zeros(space: Tree) -> Tree:
    """The zero vector of a space, without batch dimensions where they are free."""

    def zero(leaf: Tensor | AnyBatch) -> Tensor:
        example = leaf.example if isinstance(leaf, AnyBatch) else leaf
        return torch.zeros(example.shape, dtype=example.dtype, device=example.device)

    return pytree.tree_map(zero, space)


def dimension(space: Tree) -> int:
    """The number of entries of a vector, without batch dimensions where they are free."""
    return sum(math.prod(example.shape) for example in examples(space))


def is_complex(space: Tree) -> bool:
    """Whether some part of the space is known to be complex."""
    return space is not None and any(example.is_complex() for example in examples(space))


def has_free_batch(space: Tree) -> bool:
    """Whether vectors of some part of the space may come with any batch dimensions."""
    return any(isinstance(leaf, AnyBatch) for leaf in pytree.tree_leaves(space))


def complexified(space: Tree) -> Tree:
    """The space of complex vectors with the same shapes, where batch dimensions are free; an example stays as it was given."""

    def leaf(space: Tensor | AnyBatch) -> Tensor | AnyBatch:
        if not isinstance(space, AnyBatch) or space.example.is_complex():
            return space
        return any_batch(space.example.shape, space.example, space.example.dtype.to_complex())

    return pytree.tree_map(leaf, space)


def shapes(space: Tree) -> str:
    """The shapes of a space or of a vector, as text."""

    def shape(leaf: Tensor | AnyBatch) -> str:
        if not isinstance(leaf, AnyBatch):
            return str(tuple(leaf.shape))
        return "(" + ", ".join(["...", *map(str, leaf.example.shape)]) + ")"

    if space is None:
        return "?"
    text = pytree.tree_map(shape, space)
    return text if isinstance(text, str) else str(text).replace("'", "")


def describe(space: Tree) -> str:
    """Shapes and dtypes of a space, as text."""
    dtypes = dict.fromkeys(str(example.dtype).removeprefix("torch.") for example in examples(space) if space is not None)
    return f"{shapes(space)} {' '.join(dtypes)}".rstrip()


def agree(left: Tree, right: Tree) -> bool:
    """Whether two spaces, or a space and a vector, can be the same; dictionaries are read by key."""
    spec = pytree.tree_structure(left)
    try:
        pairs = zip(pytree.tree_leaves(left), spec.flatten_up_to(right), strict=True)
    except (ValueError, TypeError, KeyError):
        return False
    return all(_leaves_agree(a, b) for a, b in pairs)


def same(left: Tree, right: Tree) -> bool:
    """Whether two spaces are known to be the same, in shapes and dtypes."""
    if left is None or right is None or not agree(left, right):
        return left is right
    kinds = ([type(leaf) is AnyBatch for leaf in pytree.tree_leaves(space)] for space in (left, right))
    dtypes = ([example.dtype for example in examples(space)] for space in (left, right))
    return next(kinds) == next(kinds) and next(dtypes) == next(dtypes)


def _leaves_agree(left: Any, right: Any) -> bool:
    if not isinstance(left, Tensor | AnyBatch) or not isinstance(right, Tensor | AnyBatch):
        return False
    if isinstance(left, AnyBatch) == isinstance(right, AnyBatch):
        return examples(left)[0].shape == examples(right)[0].shape
    free, fixed = (left, right) if isinstance(left, AnyBatch) else (right, left)
    shape, whole = examples(free)[0].shape, examples(fixed)[0].shape
    return whole[len(whole) - len(shape) :] == shape if len(whole) >= len(shape) else False


def common(expression: str, what: tuple[str, str], left: Tree, right: Tree) -> Tree:
    """The common part of two spaces, where they are known.

    Args:
        expression: the composition that needs them to be the same.
        what: what the two spaces are, in words.
        left: the one space.
        right: the other.

    Raises:
        ValueError: if they differ, with both shapes and the expression.
    """
    if left is None or right is None:
        return right if left is None else left
    if not agree(left, right):
        raise ValueError(
            f"{expression}: the {what[0]} has shape {shapes(left)} and the {what[1]} {shapes(right)}; they must be the same"
        )
    return pytree.tree_map(_common_leaf, left, right)


def _common_leaf(left: Any, right: Any) -> Any:
    """The one with fewer free dimensions, complex where one of them is."""
    first, second = (right, left) if isinstance(left, AnyBatch) else (left, right)
    (example,), (other,) = examples(first), examples(second)
    if example.is_complex() or not other.is_complex():
        return first
    example = torch.empty((), dtype=example.dtype.to_complex(), device=example.device).expand(example.shape)
    return AnyBatch(example) if isinstance(first, AnyBatch) else example


def check_structure(name: str, x: Tree, space: Tree) -> None:
    """Raise if `x` is no element of a space that is known.

    Raises:
        TypeError: if it is no tensor or pytree of tensors.
        ValueError: if its shape differs.
    """
    if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(x)):
        raise TypeError(f"{name}: expected a tensor or a pytree of tensors, got {type(x).__name__}")
    if space is not None and not agree(space, x):
        raise ValueError(f"{name}: expected shape {shapes(space)}, got {shapes(x)}")
