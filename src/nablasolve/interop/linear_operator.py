"""GPyTorch's `linear_operator`, both ways. Needs it: `pip install 'nablasolve[linear-operator]'`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..closure import Closure
from ..operators import LinearOperator, aslinearoperator, spaces
from ..operators.spaces import any_batch


def from_linear_operator(A: Any, **claims: Any) -> LinearOperator:
    """A `linear_operator.LinearOperator` of shape `(m, n)` on vectors of shape `(*batch, n)`, with gradients to its tensors.

    Its adjoint is its own `mT`, which the adjoint solve checks against the one that autograd derives.

    Args:
        A: the operator, without batch dimensions.
        claims: `hermitian=`, `positive_definite=`, ...; GPyTorch's covariances are definite, but do not say so.

    Raises:
        ValueError: if it has batch dimensions.
    """
    if len(A.shape) != 2:
        raise ValueError(f"A: expected a linear_operator of shape (m, n), got {tuple(A.shape)}")
    m, n = A.shape
    like = torch.empty((), dtype=A.dtype, device=A.device)
    domain = any_batch((n,), like)

    def product(operator: Any, x: Tensor) -> Tensor:
        if x.is_complex():  # it is real
            return torch.complex(product(operator, x.real), product(operator, x.imag))
        columns: Tensor = operator @ x.reshape(-1, x.shape[-1]).mT
        return columns.mT.reshape(*x.shape[:-1], columns.shape[0])

    return LinearOperator(
        lambda x: product(A, x),
        adjoint=lambda y: product(A.mT, y),
        domain=domain,
        codomain=domain if m == n else any_batch((m,), like),
        **claims,
    )


def to_linear_operator(A: Any, like: Tensor | None = None) -> Any:
    """An operator on real tensors as a `linear_operator.LinearOperator` on flattened vectors, with gradients to its tensors.

    Args:
        A: what `aslinearoperator` takes.
        like: an example of `x`, where the operator does not know its domain.

    Raises:
        ImportError: without `linear_operator`.
        ValueError: if the domain is not known, a pytree, or complex.
    """
    operator = aslinearoperator(A)
    domain = operator.domain if like is None else spaces.space_of("like", like)
    if domain is None:
        raise ValueError("like: the operator does not know its domain; pass an example: to_linear_operator(A, like=x)")
    x = spaces.zeros(domain)
    if not isinstance(x, Tensor) or x.is_complex():
        raise ValueError(f"A: expected an operator on one real tensor, got {spaces.describe(domain)}")
    with torch.no_grad():
        y = operator(x)
    forward = Closure.record(lambda v: operator.apply(v.reshape(x.shape)).reshape(-1), x.reshape(-1))
    adjoint = Closure.record(lambda v: operator.apply_adjoint(v.reshape(y.shape)).reshape(-1), y.reshape(-1))
    tensors = (*forward.recorded, *adjoint.recorded)
    return _wrapper()(x.new_empty(0), *tensors, closures=(forward, adjoint), size=(y.numel(), x.numel()))


def _wrapper() -> Any:
    try:
        from linear_operator import LinearOperator as Base
    except ImportError as error:
        raise ImportError("nablasolve.interop.linear_operator needs it: pip install 'nablasolve[linear-operator]'") from error

    class Wrapped(Base):
        """Pure functions of the tensors, which `linear_operator` may replace in order to differentiate."""

        def __init__(self, like: Tensor, *tensors: Tensor, closures: Any, size: tuple[int, int]) -> None:
            super().__init__(like, *tensors, closures=closures, size=size)
            self.closures, self.own_size, self.like, self.tensors = closures, size, like, tensors

        def _matmul(self, rhs: Tensor) -> Tensor:
            columns = rhs.unsqueeze(-1) if rhs.ndim == 1 else rhs
            flat = columns.reshape(-1, *columns.shape[-2:])
            forward = self.closures[0]
            given = self.tensors[: len(forward.recorded)]
            products = [torch.stack([forward.apply(v, given) for v in matrix.unbind(-1)], dim=-1) for matrix in flat]
            result = torch.stack(products).reshape(*columns.shape[:-2], self.own_size[0], columns.shape[-1])
            return result.squeeze(-1) if rhs.ndim == 1 else result

        def _size(self) -> torch.Size:
            return torch.Size(self.own_size)

        def _transpose_nonbatch(self) -> Any:
            forward, adjoint = self.closures
            split = len(forward.recorded)
            tensors = (*self.tensors[split:], *self.tensors[:split])
            return type(self)(self.like, *tensors, closures=(adjoint, forward), size=self.own_size[::-1])

        @property
        def dtype(self) -> torch.dtype:
            return self.like.dtype

        @property
        def device(self) -> torch.device:
            return self.like.device

    return Wrapped
