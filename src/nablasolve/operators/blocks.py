"""Operators made of blocks: stacked, side by side, in a table, or along the diagonal.

The parts of a vector are the entries of a tuple: `VStack(A, B)` maps `x` to `(A x, B x)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .algebra import Adjoint, Composite, add, map_leaves
from .base import LinearOperator, aslinearoperator
from .claims import Claims
from .factorisation import Factorisation
from .spaces import Tree, common, is_complex


class Block(Composite):
    """A table of operators: `y_i = sum_j A_ij x_j` for tuples `x` and `y`.

    Args:
        rows: a sequence of rows of operators or matrices, all of one length; None stands for zero. Every row and every
            column holds an operator that knows its spaces.

    Raises:
        ValueError: if the rows have different lengths, or blocks of one row or column different spaces.
    """

    def __init__(self, rows: Sequence[Sequence[Any]]) -> None:
        table = [[None if block is None else aslinearoperator(block) for block in row] for row in rows]
        if not table or not table[0] or any(len(row) != len(table[0]) for row in table):
            raise ValueError(f"rows: expected rows of one length, got lengths {[len(row) for row in table]}")
        self.table = table
        columns = [list(column) for column in zip(*table, strict=True)]
        domain = tuple(self._space("column", j, column, "domain") for j, column in enumerate(columns))
        codomain = tuple(self._space("row", i, row, "codomain") for i, row in enumerate(table))
        parts = tuple(block for row in table for block in row if block is not None)
        super().__init__(parts, domain, codomain, self._claims(table))

    def _space(self, what: str, index: int, blocks: Sequence[LinearOperator | None], side: str) -> Tree:
        space, found = None, False
        for block in blocks:
            if block is not None:
                here = getattr(block, side)
                names = (f"{side} of earlier blocks of {what} {index}", f"{side} of {block.expression}")
                space = common(self.expression, names, space, here)
                found = True
        if not found or space is None:
            raise ValueError(
                f"rows: {what} {index} holds no operator that knows its {side}; give domain=, or a Zero of that shape"
            )
        return space

    def with_parts(self, parts: tuple[LinearOperator, ...]) -> LinearOperator:
        result = super().with_parts(parts)
        assert isinstance(result, Block)
        remaining = iter(parts)
        result.table = [[None if block is None else next(remaining) for block in row] for row in self.table]
        return result

    @staticmethod
    def _claims(table: Sequence[Sequence[LinearOperator | None]]) -> Claims:
        n = len(table)
        hermitian = all(len(row) == n for row in table) and all(
            _mirrored(table[i][j], table[j][i]) for i in range(n) for j in range(i + 1)
        )
        return Claims(hermitian=hermitian)

    def apply(self, x: Tree) -> Tree:
        return tuple(
            _sum(block.apply(part) for block, part in zip(row, x, strict=True) if block is not None) for row in self.table
        )

    def apply_adjoint(self, y: Tree) -> Tree:
        columns = zip(*self.table, strict=True)
        return tuple(
            _sum(block.apply_adjoint(part) for block, part in zip(c, y, strict=True) if block is not None) for c in columns
        )

    @property
    def expression(self) -> str:
        rows = (", ".join("0" if block is None else block.expression for block in row) for row in self.table)
        return f"Block([{'; '.join(rows)}])"


class BlockDiagonal(Composite):
    """`(x_1, x_2, ...) -> (A_1 x_1, A_2 x_2, ...)`; solved block by block where each has a direct solve.

    Args:
        blocks: operators or matrices that know their spaces.

    Raises:
        ValueError: if there is no block, or one that does not know its domain.
    """

    def __init__(self, *blocks: Any) -> None:
        parts = _known("blocks", blocks)
        domain, codomain = tuple(part.domain for part in parts), tuple(part.codomain for part in parts)
        super().__init__(parts, domain, codomain, Claims.all([part.claims for part in parts]))

    def apply(self, x: Tree) -> Tree:
        return tuple(part.apply(leaf) for part, leaf in zip(self.parts, x, strict=True))

    def apply_adjoint(self, y: Tree) -> Tree:
        return tuple(part.apply_adjoint(leaf) for part, leaf in zip(self.parts, y, strict=True))

    def factorise(self) -> Factorisation | None:
        factors = [part.factorise() for part in self.parts]
        found = [factor for factor in factors if factor is not None]
        if len(found) < len(factors):
            return None
        return Factorisation(
            lambda r: tuple(factor.solve(leaf) for factor, leaf in zip(found, r, strict=True)),
            lambda r: tuple(factor.solve_adjoint(leaf) for factor, leaf in zip(found, r, strict=True)),
        )

    def exact_diagonal(self) -> Tree | None:
        diagonals = tuple(part.exact_diagonal() for part in self.parts)
        return None if any(diagonal is None for diagonal in diagonals) else diagonals

    def exact_norm(self) -> Tensor | None:
        norms = [part.exact_norm() for part in self.parts]
        return None if any(norm is None for norm in norms) else _extreme(norms, largest=True)

    def exact_eigenvalue_bounds(self) -> tuple[Tensor, Tensor] | None:
        bounds = [part.exact_eigenvalue_bounds() for part in self.parts]
        known = [pair for pair in bounds if pair is not None]
        if len(known) < len(bounds):
            return None
        return _extreme([low for low, _ in known], largest=False), _extreme([high for _, high in known], largest=True)

    @property
    def expression(self) -> str:
        return f"BlockDiagonal({', '.join(part.expression for part in self.parts)})"


class VStack(Composite):
    """`x -> (A_1 x, A_2 x, ...)`; of full column rank where one of them is.

    Args:
        blocks: operators or matrices with one domain.

    Raises:
        ValueError: if there is no block, or the domains differ, or a block does not know its own.
    """

    def __init__(self, *blocks: Any) -> None:
        parts = _known("blocks", blocks)
        self.parts = parts
        domain = parts[0].domain
        for part in parts[1:]:
            domain = common(self.expression, ("domain of earlier blocks", f"domain of {part.expression}"), domain, part.domain)
        claims = Claims(full_column_rank=any(part.claims.full_column_rank for part in parts))
        super().__init__(parts, domain, tuple(part.codomain for part in parts), claims)

    def apply(self, x: Tree) -> Tree:
        return tuple(part.apply(x) for part in self.parts)

    def apply_adjoint(self, y: Tree) -> Tree:
        return _sum(part.apply_adjoint(leaf) for part, leaf in zip(self.parts, y, strict=True))

    def gram(self, damp: Any = 0.0) -> LinearOperator:
        """`sum_i A_i^H A_i + damp^2 I`, whose terms keep their structure."""
        *rest, last = self.parts
        gram = sum((part.gram() for part in rest), start=last.gram(damp)) if rest else last.gram(damp)
        # what was claimed of the stack, its blocks do not know
        if self.claims.full_column_rank and not gram.positive_definite:
            return aslinearoperator(gram, positive_definite=True)
        undamped = not isinstance(damp, Tensor) and damp == 0
        return aslinearoperator(gram, nullspace=self.claimed_nullspace) if undamped and self.claimed_nullspace else gram

    @property
    def expression(self) -> str:
        return f"VStack({', '.join(part.expression for part in self.parts)})"


class HStack(Composite):
    """`(x_1, x_2, ...) -> A_1 x_1 + A_2 x_2 + ...`; of full row rank where one of them is.

    Args:
        blocks: operators or matrices with one codomain.

    Raises:
        ValueError: if there is no block, or the codomains differ, or a block does not know its own.
    """

    def __init__(self, *blocks: Any) -> None:
        parts = _known("blocks", blocks)
        self.parts = parts
        codomain = parts[0].codomain
        for part in parts[1:]:
            names = ("codomain of earlier blocks", f"codomain of {part.expression}")
            codomain = common(self.expression, names, codomain, part.codomain)
        # a real block does not reach all of a complex codomain
        onto = (part.claims.full_row_rank and is_complex(part.domain) == is_complex(codomain) for part in parts)
        super().__init__(parts, tuple(part.domain for part in parts), codomain, Claims(full_row_rank=any(onto)))

    def apply(self, x: Tree) -> Tree:
        return _sum(part.apply(leaf) for part, leaf in zip(self.parts, x, strict=True))

    def apply_adjoint(self, y: Tree) -> Tree:
        return tuple(part.apply_adjoint(y) for part in self.parts)

    @property
    def expression(self) -> str:
        return f"HStack({', '.join(part.expression for part in self.parts)})"


def _known(name: str, blocks: Sequence[Any]) -> tuple[LinearOperator, ...]:
    """The blocks as operators that know their spaces; one list of them is taken for its items."""
    if len(blocks) == 1 and isinstance(blocks[0], list | tuple):
        blocks = blocks[0]
    parts = tuple(aslinearoperator(block) for block in blocks)
    if not parts:
        raise ValueError(f"{name}: expected at least one operator, got none")
    for i, part in enumerate(parts):
        if part.domain is None or part.codomain is None:
            raise ValueError(f"{name}[{i}]: {part.expression} does not know its domain; give domain= an example of x")
    return parts


def _mirrored(block: LinearOperator | None, other: LinearOperator | None) -> bool:
    """Whether it is known that `other = block^H`."""
    if block is None or other is None:
        return block is other
    if block is other:
        return block.hermitian
    return any(isinstance(a, Adjoint) and a.parts[0] is b for a, b in ((block, other), (other, block)))


def _sum(trees: Any) -> Tree:
    first, *rest = trees
    for tree in rest:
        first = map_leaves(add, first, tree)
    return first


def _extreme(values: Sequence[Any], largest: bool) -> Tensor:
    stacked = torch.stack(torch.broadcast_tensors(*values))
    return stacked.amax(0) if largest else stacked.amin(0)
