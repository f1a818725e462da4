"""PyLops operators, both ways. Needs PyLops: `pip install 'nablasolve[pylops]'`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator, aslinearoperator, spaces
from .external import External, Map
from .scipy import dtype_of, to_scipy


def from_pylops(
    A: Any, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, **claims: Any
) -> LinearOperator:
    """A PyLops operator as a `LinearOperator` from vectors of shape `(*batch, *A.dims)` to `(*batch, *A.dimsd)`.

    PyLops applies it on the CPU, one vector at a time. The derivative with respect to the vector is known; gradients do not
    reach the arrays that the PyLops operator holds.

    Args:
        A: a `pylops.LinearOperator`.
        dtype: of the vectors, by default that of the operator.
        device: of the vectors.
        claims: `hermitian=`, `positive_definite=`, ...
    """
    domain, codomain = tuple(A.dims), tuple(A.dimsd)

    def forward(x: Tensor) -> Tensor:
        return torch.as_tensor(A.matvec(x.numpy().reshape(-1))).to(x.dtype).reshape(codomain)

    def adjoint(y: Tensor) -> Tensor:
        return torch.as_tensor(A.rmatvec(y.numpy().reshape(-1))).to(y.dtype).reshape(domain)

    return External(Map(forward, adjoint, domain, codomain), dtype_of(A) if dtype is None else dtype, device, **claims)


def to_pylops(A: Any, like: Any = None) -> Any:
    """An operator on tensors as a `pylops.LinearOperator` with `dims` and `dimsd`; its products run under `no_grad`.

    Args:
        A: what `aslinearoperator` takes.
        like: an example of `x`, where the operator does not know its domain.

    Raises:
        ImportError: without PyLops.
        ValueError: if the domain is not known.
    """
    try:
        import pylops
    except ImportError as error:
        raise ImportError("nablasolve.interop.pylops needs PyLops: pip install 'nablasolve[pylops]'") from error
    operator = aslinearoperator(A)
    matrix = to_scipy(operator, like)
    domain = operator.domain if like is None else spaces.space_of("like", like)
    with torch.no_grad():
        x = spaces.zeros(domain)
        dims, dimsd = _dims(x), _dims(operator(x))
    return pylops.LinearOperator(Op=pylops.aslinearoperator(matrix), dims=dims, dimsd=dimsd)


def _dims(x: Any) -> tuple[int, ...]:
    """The shape of a tensor; pytrees are flat for PyLops."""
    if isinstance(x, Tensor):
        return tuple(x.shape)
    leaves = torch.utils._pytree.tree_leaves(x)
    return (sum(math.prod(leaf.shape) for leaf in leaves),)
