"""The nullspaces of a singular system as its solver needs them: as projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .graph import is_wrapped
from .operators import LinearOperator
from .vectors import Layout, any_true, flatten, precise_norm

Tree = Any  # a tensor, or a pytree of tensors


@dataclass(frozen=True, eq=False)
class Nullspace:
    """A nullspace: vectors that span it, or a function that projects onto it.

    Attributes:
        name: of the argument that gave it.
        vectors: each with the structure of `x`, without its batch dimensions or with them.
        projection: `v -> P v`, in the place of the vectors.
    """

    name: str
    vectors: tuple[Tree, ...] = ()
    projection: Callable[[Tree], Tree] | None = None

    @classmethod
    def of(cls, name: str, given: Any) -> Nullspace:
        """The nullspace of an argument: a vector, a list of vectors, or an operator or function that projects onto it.

        Raises:
            TypeError: if it is none of these.
        """
        if isinstance(given, LinearOperator):
            return cls(name, projection=given.apply)
        if callable(given) and not isinstance(given, Tensor):
            return cls(name, projection=given)
        vectors = tuple(given) if isinstance(given, list) else (given,)
        leaves = pytree.tree_leaves(vectors)
        wrong = next((type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)), None if leaves else "none")
        if wrong is not None:
            raise TypeError(f"{name}: expected a vector, a list of vectors or a function that projects, got {wrong}")
        return cls(name, vectors)

    def project(self, layout: Layout, like: Tensor) -> Callable[[Tensor], Tensor]:
        """`v -> P v` on packed vectors like `like`, without derivatives.

        Raises:
            ValueError: if a vector has the wrong structure or shape.
        """
        if self.projection is not None:
            projection = self.projection
            return lambda v: layout.pack(projection(layout.unpack(v)))
        with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(False):
            basis = self.basis(layout, like)
            # an orthonormal basis, whatever the vectors' lengths and angles
            Q, sigma, _ = torch.linalg.svd(basis, full_matrices=False)
            Q = torch.where((sigma > basis.shape[-2] * torch.finfo(basis.dtype).eps * sigma[..., :1]).unsqueeze(-2), Q, 0.0)

        def projected(v: Tensor) -> Tensor:
            columns = flatten(v, layout.batch_dims).unsqueeze(-1)
            return (Q @ (Q.mH @ columns)).reshape(v.shape)

        return projected

    def basis(self, layout: Layout, like: Tensor) -> Tensor:
        """The vectors as columns, of shape `(n, k)` or `(*batch, n, k)`.

        Raises:
            ValueError: if a vector has the wrong structure or shape.
        """
        rows = [row for vector in self.vectors for row in self._rows(vector, layout, like)]
        for row in rows:
            norm = precise_norm(row.detach(), row.ndim - 1)
            if any_true(~(norm > 0) | ~torch.isfinite(norm)):
                raise ValueError(f"{self.name}: expected vectors other than zero, got one that is zero, NaN or Inf")
        return torch.stack(torch.broadcast_tensors(*rows), dim=-1)

    def _rows(self, vector: Tree, layout: Layout, like: Tensor) -> list[Tensor]:
        """The vector, or the vectors along the first dimension of one tensor, flattened to `(n,)` or `(*batch, n)`."""
        leaves = layout.leaves(vector)
        if leaves is None:
            got = pytree.tree_structure(vector)
            raise ValueError(f"{self.name}: expected the structure of x, {layout.spec}, got {got}")
        k = layout.batch_dims
        shapes = [tuple(leaf.shape) for leaf in leaves]
        bare, full = [tuple(s[k:]) for s in layout.shapes], [tuple(s) for s in layout.shapes]
        if layout.single and shapes[0] not in (bare[0], full[0]) and shapes[0][1:] in (bare[0], full[0]):
            return [row for one in leaves[0] for row in self._rows(one, layout, like)]
        if shapes != bare and shapes != full:
            expected = " or ".join(str(s[0] if layout.single else s) for s in dict.fromkeys(map(tuple, (bare, full))))
            raise ValueError(f"{self.name}: expected shape {expected} like x, got {shapes[0] if layout.single else shapes}")
        for leaf in leaves:
            if leaf.is_complex() and not like.is_complex():
                raise ValueError(f"{self.name}: expected real vectors like x, got {leaf.dtype}")
        dims = k if shapes == full and k else 0
        return [torch.cat([flatten(leaf.to(like.dtype), dims) for leaf in leaves], dim=-1)]


@dataclass(frozen=True, eq=False)
class Gauge:
    """The condition `c^H x = g` that picks one solution of a singular system.

    Attributes:
        functionals: `c`, one vector for each dimension of the nullspace, given as a nullspace is.
        values: `g`, a number, or a tensor of shape `(k,)` or `(*batch, k)`, whose last dimension may be missing for `k = 1`.
        null: the nullspace.
    """

    functionals: Nullspace
    values: Any
    null: Nullspace

    @classmethod
    def of(cls, gauge: Any, singular: Nullspaces | None) -> Gauge | None:
        """The gauge of the argument of `solve`.

        Raises:
            TypeError: if it is no pair of a vector (or a list of vectors) and a number or tensor.
            ValueError: if the system has no nullspace of which the vectors are known.
        """
        if gauge is None:
            return None
        if not isinstance(gauge, tuple) or len(gauge) != 2:
            raise TypeError(f"gauge: expected a pair (c, g), got {type(gauge).__name__}")
        if singular is None or not singular.right.vectors:
            raise ValueError("gauge: needs nullspace= as vectors, beside which it picks one solution")
        functionals = Nullspace.of("gauge", gauge[0])
        if functionals.projection is not None:
            raise TypeError("gauge: expected a vector c or a list of vectors in (c, g), got a function")
        return cls(functionals, gauge[1], singular.right)

    def applied(self, x: Tensor, null: Tensor, layout: Layout) -> Tensor:
        """`x + N (c^H N)^{-1} (g - c^H x)` for a packed `x`, and `N` of shape `(n, k)` or `(*batch, n, k)`, differentiably.

        Raises:
            ValueError: if there are not as many functionals as null vectors, `g` does not fit, or `c^H N` is singular.
        """
        c, k = self.functionals.basis(layout, x), null.shape[-1]
        if c.shape[-1] != k:
            raise ValueError(f"gauge: expected {k} vectors c, one for each dimension of the nullspace, got {c.shape[-1]}")
        flat = flatten(x, layout.batch_dims).unsqueeze(-1)
        now = c.mH @ flat
        g = torch.as_tensor(self.values, device=x.device).to(x.dtype)
        if k == 1 and g.shape in (torch.Size(), now.shape[:-2]):
            g = g.unsqueeze(-1)
        if g.shape not in (now.shape[:-1], now.shape[-2:-1]):
            raise ValueError(f"gauge: expected g of shape {tuple(now.shape[:-1])}, got {tuple(g.shape)}")
        meets = c.mH @ null
        size = torch.linalg.vector_norm(c, dim=-2).unsqueeze(-1) * torch.linalg.vector_norm(null, dim=-2).unsqueeze(-2)
        if any_true(torch.linalg.svdvals(meets / size)[..., -1] <= k * torch.finfo(x.dtype).eps):
            raise ValueError("gauge: c^H x says nothing of the part of x in the nullspace, because c^H N is singular")
        # by the inverse: torch 2.13's derivatives of linalg.solve are wrong in forward mode over forward mode
        along: Tensor = torch.linalg.inv(meets) @ (g.unsqueeze(-1) - now)
        return x + (null @ along).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class Nullspaces:
    """The nullspaces of a square `A` and of `A^H`.

    Attributes:
        right: that of `A`.
        left: that of `A^H`.
    """

    right: Nullspace
    left: Nullspace

    @property
    def one(self) -> bool:
        """Whether the two are known to be the same."""
        left, right = self.left, self.right
        if left is right or left.vectors is right.vectors or left.projection is not None:
            return left is right or left.projection is right.projection
        leaves = [pytree.tree_leaves(side.vectors) for side in (left, right)]
        return len(leaves[0]) == len(leaves[1]) and all(
            a is b or (not (is_wrapped(a) or is_wrapped(b)) and torch.equal(a, b)) for a, b in zip(*leaves, strict=True)
        )

    @classmethod
    def of(cls, operator: LinearOperator, right: Any, left: Any, hermitian: bool) -> Nullspaces | None:
        """Those of the arguments of `solve`, or else those that the operator knows; None for an `A` that is not known singular.

        Raises:
            TypeError: if an argument is no nullspace.
            ValueError: if only one of them is given, and `A` is not claimed Hermitian.
        """
        known = [list(n) if isinstance(n, tuple) else n for n in (operator.nullspace, operator.left_nullspace)]
        if right is None and left is None:
            right, left = known
            if right is None or right == [] or (left is None and not hermitian):
                return None
        if hermitian:
            right = left = left if right is None else right
        right, left = (other if own is None else own for own, other in zip((right, left), known, strict=True))
        for name, given_one in (("nullspace", right), ("left_nullspace", left)):
            if given_one is None:
                given = "left_nullspace" if name == "nullspace" else "nullspace"
                raise ValueError(
                    f"{name}: needed beside {given}=, because A is not claimed Hermitian: give {name}=, which is {given} "
                    "itself where A is normal, or claim hermitian=True"
                )
        one = Nullspace.of("nullspace", right)
        return cls(one, one if left is right else Nullspace.of("left_nullspace", left))
