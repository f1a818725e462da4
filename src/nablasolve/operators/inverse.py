"""The inverse of an operator, applied by solving."""

from __future__ import annotations

from typing import Any

from .algebra import Composite
from .base import LinearOperator, aslinearoperator
from .factorisation import Factorisation
from .spaces import Tree, common


class Inverse(Composite):
    """`A^{-1}`: each application solves `A x = y`, and each of the adjoint `A^H x = y`; differentiable as `solve` is.

    So a Schur complement is `D - C @ Inverse(A) @ B`.

    Args:
        A: a square operator, matrix or function.
        options: of `solve`, such as `rtol` or `method`.

    Raises:
        ValueError: if `A` is known not to be square.
    """

    def __init__(self, A: Any, **options: Any) -> None:
        of = aslinearoperator(A)
        common(f"Inverse({of.expression})", ("domain of A", "codomain of A"), of.domain, of.codomain)
        super().__init__((of,), of.codomain, of.domain, of.claims.inverse)
        self.options = options

    def apply(self, x: Tree) -> Tree:
        from ..solve import solve

        return solve(self.parts[0], x, **self.options)

    def apply_adjoint(self, y: Tree) -> Tree:
        from ..solve import solve

        return solve(self.parts[0].H, y, **self.options)

    def inverse(self, **options: Any) -> LinearOperator:
        return self.parts[0]

    def factorise(self) -> Factorisation:
        of = self.parts[0]
        return Factorisation(of.apply, of.apply_adjoint)

    @property
    def has_adjoint(self) -> bool:
        return True

    @property
    def expression(self) -> str:
        return f"Inverse({self.parts[0].expression})"
