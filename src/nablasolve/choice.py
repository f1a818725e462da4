"""Which method: from a name, an object or None, by what is known of the operator and never by a guess."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .arguments import nearest
from .methods import CG, CRAIG, GMRES, LSMR, METHODS, MINRES, SVD, Direct, Method
from .operators import DenseOperator, LinearOperator
from .operators.factorisation import Factorisation


def check_method_name(name: str, method: str) -> None:
    """Raise a ValueError that names the nearest method, where there is none of this name."""
    if method not in METHODS:
        raise ValueError(f"{name}: unknown method {method!r}{nearest(method, tuple(METHODS))}")


def claims_hermitian(method: Any) -> bool:
    """Whether asking for this method claims that `A` is Hermitian."""
    kind = METHODS.get(method) if isinstance(method, str) else method
    return kind is not None and bool(getattr(kind, "hermitian", False))


@dataclass(frozen=True, eq=False)
class Choice:
    """What a choice of method rests on.

    Attributes:
        operator: `A`, with its claims.
        preconditioned: whether there is an `M`.
        least_squares: whether a least-squares problem is asked.
        injective: whether `A` has full column rank.
        square: whether `A`, with its damping, has as many rows as columns.
        singular: whether the nullspaces of a square `A` are given.
        one_nullspace: whether they are the same for `A` and `A^H`.
        unroll: whether autograd is to go through a factorisation.
    """

    operator: LinearOperator
    preconditioned: bool
    least_squares: bool = False
    injective: bool = True
    square: bool = True
    singular: bool = False
    one_nullspace: bool = False
    unroll: bool = False

    @functools.cached_property
    def factors(self) -> Factorisation | None:
        """The factorisation that the operator's structure gives, computed once and only if it is asked for."""
        if self.least_squares or self.singular:
            return None
        if self.unroll:
            return self.operator.factorise()
        with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(False):
            return self.operator.factorise()

    @property
    def dense(self) -> bool:
        """Whether `A` is a dense matrix."""
        return isinstance(self.operator, DenseOperator)

    def iterative(self) -> Method[Any]:
        """The iterative method for what is claimed of the operator."""
        if self.least_squares:
            return LSMR()
        if self.operator.positive_definite or (self.singular and self.operator.claims.positive_semidefinite):
            return CG()
        if self.operator.hermitian:
            return MINRES()
        # GMRES is safe for a singular A only where A and A^H have one nullspace (Brown & Walker 1997)
        return GMRES() if not self.singular or self.one_nullspace else LSMR()

    def direct(self) -> Method[Any]:
        """The direct method for a dense matrix or a structure that brings its own factorisation."""
        if self.least_squares or self.singular:
            return SVD()
        return Direct(positive_definite_matrix=self.operator.positive_definite)

    def method(self, name: str, method: Any) -> Method[Any]:
        """The method object of the argument `name`.

        Raises:
            TypeError: if it is none of a name, a method object and None.
            ValueError: for an unknown name, or a method that does not fit the problem.
        """
        if method is None:
            known = not self.preconditioned and (self.dense or self.factors is not None)
            return self.direct() if known else self.iterative()
        if isinstance(method, str):
            check_method_name(name, method)
            method = self.direct() if method == Direct.name else METHODS[method]()
        if not isinstance(method, Method):
            got = (
                f"the class {method.__name__}; write {method.__name__}()" if isinstance(method, type) else type(method).__name__
            )
            raise TypeError(f"{name}: expected a name or a method object such as GMRES(restart=50), got {got}")
        self._check(name, method)
        return method

    def _check(self, name: str, method: Method[Any]) -> None:
        if self.least_squares and not method.least_squares:
            known = ", ".join(repr(n) for n, kind in METHODS.items() if kind.least_squares)
            raise ValueError(f"{name}: expected a least-squares method, one of {known}, got {method.name!r}")
        if method.hermitian and self.least_squares and not self.square:
            raise ValueError(f"{name}: {method.name!r} needs a square Hermitian A, and no operator in damp; choose 'lsmr'")
        if method.direct and not self.dense and (method.least_squares or self.factors is None):
            needed = "A as a dense Tensor" + ("" if method.least_squares else " or an operator whose structure allows it")
            raise ValueError(f"{name}: {method.name!r} needs {needed}, got {self.operator.expression}")
        if method.direct and self.preconditioned:
            raise ValueError("M: a direct method takes no preconditioner; choose an iterative method or leave M out")
        if method.least_squares and self.preconditioned and not self.least_squares:
            raise ValueError(f"M: {method.name!r} takes no M of a square system; solve with lstsq, or choose 'gmres'")

    def adjoint(self, options: Mapping[str, Any], asked: Any, forward: Method[Any]) -> Method[Any]:
        """The method of the adjoint solve: the forward one, unless another is asked for or the problem is of another kind.

        The adjoint of an `A` of full column rank is consistent for every cotangent: CRAIG's method then finds
        `w = A^{+H} x_bar` and `v = A^+ w` in one run.
        """
        if "method" in options:
            return self.method("adjoint['method']", options["method"])
        if not self.least_squares or forward.direct:
            return forward
        if self.injective and (asked is None or self.preconditioned or isinstance(forward, CRAIG)):
            return CRAIG()
        return LSMR() if isinstance(forward, CRAIG) else forward
