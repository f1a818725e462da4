"""The adjoint of a linear function, derived by autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .closure import Bound, transforms_active, transparent

NO_ADJOINT = (
    "The adjoint of A is needed, and autograd cannot derive it because A(v) does not depend differentiably on v. Give it: "
    "nablasolve.LinearOperator(A, adjoint=...), or claim hermitian=True if A is."
)


def pull_back(apply: Callable[[Tensor], Tensor], v: Tensor, zero: Tensor | None = None) -> Tensor:
    """`A^H v` of a linear `apply`, itself differentiable: the vector-Jacobian product at `zero`, by default like `v`."""
    zero = torch.zeros_like(v) if zero is None else zero
    if transforms_active():
        result: Tensor = torch.func.vjp(apply, zero)[1](v)[0]
        return result
    again = torch.is_grad_enabled()
    with torch.enable_grad(), transparent():
        zero.requires_grad_()
        return _vjp(apply(zero), zero, v, create_graph=again)


def _vjp(y: Tensor, x: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    if not y.requires_grad:
        raise RuntimeError(NO_ADJOINT)
    (result,) = torch.autograd.grad(y, x, v, create_graph=create_graph, retain_graph=True, allow_unused=True)
    if result is None:
        raise RuntimeError(NO_ADJOINT)
    return result


class Transpose:
    """`v -> A^H v`, from one recorded application of `A` and one backward pass through it a product."""

    def __init__(self, apply: Callable[[Tensor], Tensor], like: Tensor) -> None:
        self.apply = apply
        with torch.enable_grad(), transparent():
            self.input = torch.zeros_like(like).requires_grad_()
            self.output = apply(self.input)

    def __call__(self, v: Tensor) -> Tensor:
        """`A^H v`."""
        return _vjp(self.output, self.input, v)

    def alone(self) -> Callable[[Tensor], Tensor] | None:
        """The same as a function of the user's tensors alone, one that a compiler can follow; None where there is none."""
        function = self.apply.alone() if isinstance(self.apply, Bound) else None
        return None if function is None else functools.partial(_pulled_back, function, torch.zeros_like(self.input))


def _pulled_back(function: Callable[[Tensor], Tensor], zero: Tensor, v: Tensor) -> Tensor:
    result: Tensor = torch.func.vjp(function, zero)[1](v)[0]
    return result
