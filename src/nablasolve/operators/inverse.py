"""The inverse of an operator, applied by solving."""

from __future__ import annotations

from typing import Any

from .algebra import Composite
from .base import LinearOperator, aslinearoperator
from .claims import Claims
from .factorisation import Factorisation
from .spaces import Tree, common


class Inverse(Composite):
    """`A^{-1}`: each application solves `A x = y`, and each of the adjoint `A^H x = y`; differentiable as `solve` is.

    So a Schur complement is `D - C @ Inverse(A) @ B`.

    Args:
        A: a square operator, matrix or function.
        options: of `solve`, but `x0`, `params` and `batch_dims`; the adjoint applies those of `adjoint=` and `M^H`.

    Raises:
        TypeError: for one of these three.
        ValueError: if `A` is known not to be square.
    """

    def __init__(self, A: Any, **options: Any) -> None:
        for name in ("x0", "params", "batch_dims"):
            if name in options:
                raise TypeError(f"Inverse: the option {name!r} belongs to one right-hand side, and not to an operator")
        of = aslinearoperator(A)
        common(f"Inverse({of.expression})", ("domain of A", "codomain of A"), of.domain, of.codomain)
        singular = of.nullspace != () and of.nullspace is not None
        claims = Claims(of.hermitian, positive_semidefinite=of.claims.positive_semidefinite) if singular else of.claims.inverse
        super().__init__((of,), of.codomain, of.domain, claims)
        self.options = options

    def apply(self, x: Tree) -> Tree:
        from ..solve import solve

        return solve(self.parts[0], x, **self.options)

    def apply_adjoint(self, y: Tree) -> Tree:
        from ..solve import solve

        # what the forward solve is told of A, this one is told of A^H, and the other way round
        options, other = dict(self.options), dict(self.options.get("adjoint") or {})
        M, adjoint_M = options.pop("M", None), other.pop("M", None)
        if adjoint_M is not None or M is not None:
            options["M"] = aslinearoperator(M).H if adjoint_M is None else adjoint_M
        own: dict[str, Any] = {name: options[name] for name in ("rtol", "maxiter", "method") if name in options}
        if M is not None:
            own["M"] = M
        return solve(self.parts[0].H, y, **(options | other | {"adjoint": own}))

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
