"""What is known of a nullspace: vectors that span it, or a projection onto it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import spaces
from .spaces import AnyBatch, Tree

# linearly independent vectors that span it, none where it is trivial; or a function that projects onto it
Nullspace = tuple[Tree, ...] | Callable[[Tree], Tree]


def check_nullspace(name: str, value: Any, space: Tree) -> Nullspace:
    """A nullspace as a user gives it, as a tuple of vectors or a function.

    Args:
        name: of the argument.
        value: one vector, a list or tuple of vectors, or a callable that projects. A list is always a list of vectors; a
            tuple is one vector where the vectors of the space are tuples of the same structure.
        space: in which the vectors are.

    Raises:
        TypeError: if it is none of these; or a tuple, where nothing is known of the space.
        ValueError: if a vector has another structure, shape, dtype or device than the space has.
    """
    from .base import LinearOperator

    if callable(value):
        for side in ("domain", "codomain") if isinstance(value, LinearOperator) else ():
            own = getattr(value, side)
            if not (space is None or own is None or spaces.agree(own, space)):
                raise ValueError(f"{name}: expected a projection with {side} {spaces.shapes(space)}, got {spaces.shapes(own)}")
        return value  # type: ignore[no-any-return]
    if isinstance(value, tuple) and value and space is None:
        raise TypeError(f"{name}: a tuple may be one vector or several; give a list of vectors, or domain= an example of one")
    if isinstance(value, list) or (isinstance(value, tuple) and not _is_one_vector(value, space)):
        return tuple(_vector(f"{name}[{i}]", vector, space) for i, vector in enumerate(value))
    return (_vector(name, value, space),)


def conjugated(nullspace: Nullspace | None) -> Nullspace | None:
    """The nullspace of `conj(A)` by that of `A`."""
    from .base import LinearOperator

    if nullspace is None:
        return None
    if isinstance(nullspace, tuple):
        return tuple(pytree.tree_map(torch.conj, vector) for vector in nullspace)
    return nullspace.conj() if isinstance(nullspace, LinearOperator) else functools.partial(_apply_conjugated, nullspace)


def constants(space: AnyBatch) -> tuple[Tensor, ...]:
    """The constant vector alone, as a view of one number."""
    like = space.example
    return (torch.ones((), dtype=like.dtype, device=like.device).expand(like.shape),)


def _apply_conjugated(projection: Callable[[Tree], Tree], v: Tree) -> Tree:
    return pytree.tree_map(torch.conj, projection(pytree.tree_map(torch.conj, v)))


def _is_one_vector(value: tuple[Any, ...], space: Tree) -> bool:
    """Whether a tuple has the structure of a space that is known."""
    if space is None:
        return False
    try:
        leaves = pytree.tree_structure(space).flatten_up_to(value)
    except (ValueError, TypeError, KeyError):
        return False
    return all(isinstance(leaf, Tensor) for leaf in leaves)


def _vector(name: str, value: Tree, space: Tree) -> Tree:
    """A vector of a space without batch dimensions, detached."""
    leaves = pytree.tree_leaves(value)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(
            f"{name}: expected a tensor or a pytree of tensors, or a callable that projects, got {type(value).__name__}"
        )
    for leaf in leaves:
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise ValueError(f"{name}: expected a floating-point or complex dtype, got {leaf.dtype}")
    if space is None:
        return pytree.tree_map(torch.detach, value)
    one = pytree.tree_map(lambda leaf: leaf.example if isinstance(leaf, AnyBatch) else leaf, space)
    if not spaces.agree(one, value):
        raise ValueError(f"{name}: expected one vector of shape {spaces.shapes(one)}, got {spaces.shapes(value)}")
    structure = pytree.tree_structure(space)
    leaves = structure.flatten_up_to(value)
    for leaf, like in zip(leaves, spaces.examples(space), strict=True):
        if leaf.is_complex() and not like.is_complex():
            raise ValueError(f"{name}: expected a real dtype like {like.dtype}, got {leaf.dtype}")
        if leaf.device != like.device:
            raise ValueError(f"{name}: expected the device {like.device}, got {leaf.device}")
    return pytree.tree_unflatten([leaf.detach() for leaf in leaves], structure)
