"""The algebra of operators: adjoint, conjugate, sum, product, multiple, Gram operator, restriction.

Each is a value that knows its parts, and so its adjoint, claims, spectrum and factorisation wherever theirs are known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .base import LinearOperator, check_scalar, is_real
from .claims import Claims, is_nonzero
from .factorisation import Factorisation
from .nullspace import Nullspace, conjugated
from .spaces import AnyBatch, Tree, common, complexified, is_complex, same
from .spectrum import Spectrum


class Composite(LinearOperator):
    """An operator made of others; its adjoint is known where its parts' are."""

    def __init__(self, parts: tuple[LinearOperator, ...], domain: Tree, codomain: Tree, claims: Claims) -> None:
        self.parts, self.claims = parts, claims
        self.domain, self.codomain = domain, domain if same(domain, codomain) else codomain

    @property
    def has_adjoint(self) -> bool:
        return self.claims.hermitian or all(part.has_adjoint for part in self.parts)

    @property
    def has_user_adjoint(self) -> bool:
        return any(part.has_user_adjoint for part in self.parts)

    @property
    def known_linear(self) -> bool:
        return all(part.known_linear for part in self.parts)

    @property
    def has_claimed_nullspace(self) -> bool:
        """Whether a nullspace was claimed of the composition itself, which its parts do not know."""
        return self.claimed_nullspace is not None or self.claimed_left_nullspace is not None

    def for_one_solve(self) -> LinearOperator:
        return self.with_parts(tuple(part.for_one_solve() for part in self.parts))

    def with_parts(self, parts: tuple[LinearOperator, ...]) -> LinearOperator:
        """The same composition of other parts, which are the same maps."""
        result = copy.copy(self)
        result.parts = parts
        return result


class Adjoint(Composite):
    """`A^H`."""

    def __init__(self, of: LinearOperator) -> None:
        super().__init__((of,), of.codomain, of.domain, of.claims.H)

    def apply(self, x: Tree) -> Tree:
        return self.parts[0].apply_adjoint(x)

    def apply_adjoint(self, y: Tree) -> Tree:
        return self.parts[0].apply(y)

    @property
    def has_adjoint(self) -> bool:
        return True

    @property
    def H(self) -> LinearOperator:
        return Adjoint(self) if self.has_claimed_nullspace else self.parts[0]

    def known_nullspace(self) -> Nullspace | None:
        return self.parts[0].left_nullspace

    def known_left_nullspace(self) -> Nullspace | None:
        return self.parts[0].nullspace

    def spectrum(self) -> Spectrum | None:
        spectrum = self.parts[0].spectrum()
        return None if spectrum is None else spectrum.H

    def factorise(self) -> Factorisation | None:
        factors = self.parts[0].factorise()
        return None if factors is None else factors.H

    def exact_diagonal(self) -> Tree | None:
        diagonal = self.parts[0].exact_diagonal()
        return None if diagonal is None else map_leaves(torch.conj, diagonal)

    def exact_norm(self) -> Tensor | None:
        return self.parts[0].exact_norm()

    @property
    def expression(self) -> str:
        return f"{self.parts[0].expression}.H"


class Conjugate(Composite):
    """`conj(A)`."""

    def __init__(self, of: LinearOperator) -> None:
        super().__init__((of,), of.domain, of.codomain, of.claims)

    def apply(self, x: Tree) -> Tree:
        return map_leaves(torch.conj, self.parts[0].apply(map_leaves(torch.conj, x)))

    def apply_adjoint(self, y: Tree) -> Tree:
        return map_leaves(torch.conj, self.parts[0].apply_adjoint(map_leaves(torch.conj, y)))

    def conj(self) -> LinearOperator:
        return Conjugate(self) if self.has_claimed_nullspace else self.parts[0]

    def known_nullspace(self) -> Nullspace | None:
        return conjugated(self.parts[0].nullspace)

    def known_left_nullspace(self) -> Nullspace | None:
        return conjugated(self.parts[0].left_nullspace)

    def spectrum(self) -> Spectrum | None:
        spectrum = self.parts[0].spectrum()
        return None if spectrum is None else spectrum.conj()

    def factorise(self) -> Factorisation | None:
        factors = self.parts[0].factorise()
        return None if factors is None else factors.conj()

    def exact_diagonal(self) -> Tree | None:
        diagonal = self.parts[0].exact_diagonal()
        return None if diagonal is None else map_leaves(torch.conj, diagonal)

    def exact_norm(self) -> Tensor | None:
        return self.parts[0].exact_norm()

    @property
    def expression(self) -> str:
        return f"{self.parts[0].expression}.conj()"


class Sum(Composite):
    """`A + B`."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        expression = f"{left.expression} + {right.expression}"
        domain = common(expression, ("domain of the left", "domain of the right"), left.domain, right.domain)
        codomain = common(expression, ("codomain of the left", "codomain of the right"), left.codomain, right.codomain)
        super().__init__((left, right), domain, codomain, left.claims.plus(right.claims))

    def apply(self, x: Tree) -> Tree:
        left, right = self.parts
        return self._added(left.apply(x), right.apply(x))

    def apply_adjoint(self, y: Tree) -> Tree:
        left, right = self.parts
        return self._added(left.apply_adjoint(y), right.apply_adjoint(y))

    def _added(self, left: Tree, right: Tree) -> Tree:
        # where batch dimensions are free, an operator may bring its own
        return map_leaves(torch.add if isinstance(self.domain, AnyBatch) else add, left, right)

    def spectrum(self) -> Spectrum | None:
        left, right = (part.spectrum() for part in self.parts)
        return None if left is None or right is None else left.plus(right)

    def factorise(self) -> Factorisation | None:
        direct = super().factorise()
        if direct is not None:
            return direct
        for whole, update in (self.parts, self.parts[::-1]):
            factors = update.factorise_update(whole)
            if factors is not None:
                return factors
        return None

    def exact_diagonal(self) -> Tree | None:
        left, right = (part.exact_diagonal() for part in self.parts)
        return None if left is None or right is None else map_leaves(torch.add, left, right)

    @property
    def expression(self) -> str:
        return f"({self.parts[0].expression} + {self.parts[1].expression})"


class Product(Composite):
    """`A B`."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        expression = f"{left.expression} @ {right.expression}"
        common(expression, ("domain of the left", "codomain of the right"), left.domain, right.codomain)
        claims = left.claims.times(right.claims)
        self.is_gram = any(isinstance(a, Adjoint) and a.parts[0] is b for a, b in ((left, right), (right, left)))
        if self.is_gram:  # A^H A, or A A^H
            claims |= Claims(positive_semidefinite=True, positive_definite=right.claims.full_column_rank)
        # where the left one is complex, so are the vectors that it makes of real ones
        domain = complexified(right.domain) if is_complex(left.domain) and not is_complex(right.codomain) else right.domain
        # of the values of a complex operator, those that are made of real vectors are a part
        self.into_complex = domain is not None and not is_complex(domain) and is_complex(left.domain)
        super().__init__((left, right), domain, left.codomain, claims.within(rows=not self.into_complex, columns=True))

    def apply(self, x: Tree) -> Tree:
        return self.parts[0].apply(self.parts[1].apply(x))

    def apply_adjoint(self, y: Tree) -> Tree:
        return self.parts[1].apply_adjoint(self.parts[0].apply_adjoint(y))

    def known_nullspace(self) -> Nullspace | None:
        left, right = self.parts
        return right.nullspace if self.is_gram or left.nullspace == () else None

    def known_left_nullspace(self) -> Nullspace | None:
        left, right = self.parts
        return left.left_nullspace if right.left_nullspace == () and not self.into_complex else None

    def spectrum(self) -> Spectrum | None:
        left, right = (part.spectrum() for part in self.parts)
        return None if left is None or right is None else left.times(right)

    def factorise(self) -> Factorisation | None:
        direct = super().factorise()
        if direct is not None:
            return direct
        left = self.parts[0].factorise()
        right = None if left is None else self.parts[1].factorise()
        return None if left is None or right is None else left.then(right)

    @property
    def expression(self) -> str:
        return f"({self.parts[0].expression} @ {self.parts[1].expression})"


class Scaled(Composite):
    """`c A`, or `A / c`, for a number or 0-d tensor `c`."""

    def __init__(self, of: LinearOperator, factor: Any, divided: bool = False) -> None:
        check_scalar("factor", factor)
        domain, codomain = (space if is_real(factor) else complexified(space) for space in (of.domain, of.codomain))
        super().__init__((of,), domain, codomain, of.claims.scaled(factor))
        self.number, self.divided = factor, divided

    @property
    def factor(self) -> Any:
        """The multiple, `c` or `1 / c`."""
        return 1 / self.number if self.divided else self.number

    def apply(self, x: Tree) -> Tree:
        return map_leaves(lambda leaf: leaf * self.factor, self.parts[0].apply(x))

    def apply_adjoint(self, y: Tree) -> Tree:
        return map_leaves(lambda leaf: leaf * _conj(self.factor), self.parts[0].apply_adjoint(y))

    def __neg__(self) -> LinearOperator:
        if self.has_claimed_nullspace:
            return super().__neg__()
        return Scaled(-self.parts[0], self.number, self.divided)  # the part may know what it is negative of

    def known_nullspace(self) -> Nullspace | None:
        return self.parts[0].nullspace if is_nonzero(self.number) else None

    def known_left_nullspace(self) -> Nullspace | None:
        return self.parts[0].left_nullspace if is_nonzero(self.number) else None

    def spectrum(self) -> Spectrum | None:
        spectrum = self.parts[0].spectrum()
        return None if spectrum is None else spectrum.scaled(self.factor)

    def factorise(self) -> Factorisation | None:
        factors = self.parts[0].factorise()
        return None if factors is None else factors.scaled(self.factor)

    def exact_diagonal(self) -> Tree | None:
        diagonal = self.parts[0].exact_diagonal()
        return None if diagonal is None else map_leaves(lambda leaf: leaf * self.factor, diagonal)

    def exact_norm(self) -> Tensor | None:
        norm = self.parts[0].exact_norm()
        return None if norm is None else norm * abs(self.factor)

    def _label(self) -> str:
        return f"1 / {_number(self.number)} *" if self.divided else f"{_number(self.number)} *"

    @property
    def expression(self) -> str:
        return f"{self._label()} {self.parts[0].expression}"


class Gram(Composite):
    """`A^H A + damp^2 I`."""

    def __init__(self, of: LinearOperator, damp: Any) -> None:
        super().__init__((of,), of.domain, of.domain, of.claims.gram(damp))
        self.damp = damp

    @property
    def damped(self) -> bool:
        """Whether there is a damping, or may be one: the value of a tensor is not read."""
        return isinstance(self.damp, Tensor) or self.damp != 0

    def apply(self, x: Tree) -> Tree:
        y = self.parts[0].apply_adjoint(self.parts[0].apply(x))
        return map_leaves(lambda a, b: a + b * self.damp**2, y, x) if self.damped else y

    def apply_adjoint(self, y: Tree) -> Tree:
        return self.apply(y)

    def known_nullspace(self) -> Nullspace | None:
        return None if self.damped else self.parts[0].nullspace

    def spectrum(self) -> Spectrum | None:
        from .diagonal import Identity

        of = self.parts[0]
        spectrum = of.gram_spectrum()
        if spectrum is None and of.claims.isometric and isinstance(of.domain, AnyBatch):  # A^H A = I
            spectrum = Identity(of.domain).spectrum()
        return None if spectrum is None else replace(spectrum, values=spectrum.values + self.damp**2)

    def factorise(self) -> Factorisation | None:
        direct, of = super().factorise(), self.parts[0]
        if direct is not None:
            return direct
        if isinstance(of, Product) and of.parts[1].unitary:  # (A U)^H (A U) + damp^2 I = U^H (A^H A + damp^2 I) U
            A, U = of.parts
            return Product(Product(U.H, A.gram(self.damp)), U).factorise()
        factors = None if self.damped else of.factorise()
        return None if factors is None else factors.H.then(factors)

    def exact_norm(self) -> Tensor | None:
        norm = self.parts[0].exact_norm()
        return None if norm is None else norm**2 + self.damp**2

    def _label(self) -> str:
        return f"Gram(damp={_number(self.damp)})"

    @property
    def expression(self) -> str:
        return f"{self.parts[0].expression}.gram({_number(self.damp)})"


class Restriction(Composite):
    """`V^H A V`."""

    def __init__(self, of: LinearOperator, V: LinearOperator) -> None:
        expression = f"{of.expression}.restrict({V.expression})"
        common(expression, ("domain of A", "codomain of V"), of.domain, V.codomain)
        common(expression, ("codomain of A", "codomain of V"), of.codomain, V.codomain)
        super().__init__((of, V), V.domain, V.domain, of.claims.congruent(V.claims))

    def apply(self, x: Tree) -> Tree:
        A, V = self.parts
        return V.apply_adjoint(A.apply(V.apply(x)))

    def apply_adjoint(self, y: Tree) -> Tree:
        A, V = self.parts
        return V.apply_adjoint(A.apply_adjoint(V.apply(y)))

    def factorise(self) -> Factorisation | None:
        A, V = self.parts
        return (V.H @ A @ V).factorise() if V.claims.unitary else None

    @property
    def expression(self) -> str:
        return f"{self.parts[0].expression}.restrict({self.parts[1].expression})"


def map_leaves(function: Callable[..., Tensor], *trees: Tree) -> Tree:
    """The function of each leaf."""
    if all(isinstance(tree, Tensor) for tree in trees):
        return function(*trees)
    return pytree.tree_map(function, *trees)


def add(a: Tensor, b: Tensor) -> Tensor:
    """`a + b` without broadcasting."""
    if a.shape != b.shape:
        raise ValueError(f"A + B: A gave shape {tuple(a.shape)} and B gave {tuple(b.shape)} for the same vector")
    return a + b


def _conj(factor: Any) -> Any:
    return factor.conj() if isinstance(factor, Tensor) else factor.conjugate()


def _number(factor: Any) -> str:
    return "tensor" if isinstance(factor, Tensor) else str(factor)
