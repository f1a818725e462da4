"""deepinv's physics, both ways. Needs deepinv: `pip install deepinv`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator, aslinearoperator


def from_deepinv(physics: Any, like: Tensor, **parameters: Any) -> LinearOperator:
    """A `deepinv.physics.LinearPhysics` as a `LinearOperator`, with gradients to its tensors.

    Its adjoint is `A_adjoint`, which the adjoint solve checks against the one that autograd derives. As in deepinv, the first
    dimension of an image counts images: solve with `batch_dims=1` for a step size and a status of their own.

    Args:
        physics: the forward operator, without its noise.
        like: an example image `(B, C, H, W)`; only its structure is read.
        parameters: handed on to `physics.A` and `physics.A_adjoint`, such as `filter=` of a blur.
    """
    with torch.no_grad():
        measurement = physics.A(torch.zeros_like(like), **parameters)
    same = measurement.shape == like.shape and measurement.dtype == like.dtype
    return LinearOperator(
        lambda x: physics.A(x, **parameters),
        adjoint=lambda y: physics.A_adjoint(y, **parameters),
        domain=like,
        codomain=None if same else measurement,
    )


def to_deepinv(A: Any, img_size: tuple[int, ...] | None = None) -> Any:
    """An operator on images as a `deepinv.physics.LinearPhysics`.

    Args:
        A: what `aslinearoperator` takes; it acts on images with deepinv's batch dimension in front.
        img_size: the shape of an image without the batch dimension, for deepinv's functions that ask for it.

    Raises:
        ImportError: without deepinv.
    """
    try:
        from deepinv.physics import LinearPhysics
    except ImportError as error:
        raise ImportError("nablasolve.interop.deepinv needs deepinv: pip install deepinv") from error
    operator = aslinearoperator(A)
    return LinearPhysics(
        A=lambda x, **_: operator.apply(x), A_adjoint=lambda y, **_: operator.apply_adjoint(y), img_size=img_size
    )
