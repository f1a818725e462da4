"""Diagonal, trace, norm and extreme eigenvalues: exact where the structure gives them, else estimated by products.

Each returns its value and says how it came by it: `"exact"`, `"stochastic"` (random probes) or `"Lanczos"`. The probes come
from a generator of their own; the global random state is neither read nor changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..vectors import Layout, real_dtype
from . import spaces
from .spaces import Tree

if TYPE_CHECKING:
    from .base import LinearOperator


def diagonal(A: LinearOperator, samples: int, seed: int) -> tuple[Tree, str]:
    """The diagonal: of the structure, by `n` products where `n <= samples`, else an estimate.

    The estimate (Bekas, Kokiopoulou & Saad 2007) is `sum_k conj(z_k) * A z_k / samples` for vectors `z_k` of random signs: the
    error of an entry is of the size of the rest of its row, divided by `sqrt(samples)`.
    """
    known = A.exact_diagonal()
    if known is not None:
        return known, "exact"
    flat = _Flat(A)
    if flat.n <= samples:
        return flat.unpack(flat.matrix().diagonal()), "exact"
    z = flat.signs(samples, seed)
    return flat.unpack((z * flat(z)).mean(1)), "stochastic"


def trace(A: LinearOperator, samples: int, seed: int) -> tuple[Tensor, str]:
    """The trace: of the structure, by `n` products where `n <= samples`, else Hutch++ (Meyer, Musco, Musco & Woodruff 2021).

    A third of the products finds a subspace `Q` near the dominant one, a third gives `tr(Q^H A Q)` exactly, and a third
    estimates what is left by random signs.
    """
    known = A.exact_trace()
    if known is not None:
        return known, "exact"
    entries = A.exact_diagonal()
    if entries is not None:
        leaves = zip(pytree.tree_leaves(entries), spaces.examples(A.domain), strict=True)
        total: Tensor = sum(leaf.sum(tuple(range(-like.ndim, 0))) for leaf, like in leaves)
        return total, "exact"
    flat = _Flat(A)
    if flat.n <= samples:
        return flat.matrix().trace(), "exact"
    third = max(1, samples // 3)
    Q = torch.linalg.qr(flat(flat.signs(third, seed)))[0]
    G = flat.signs(third, seed + 1).to(Q.dtype)
    rest = G - Q @ (Q.mH @ G)
    return (Q.conj() * flat(Q)).sum() + (rest.conj() * flat(rest)).sum() / third, "stochastic"


def norm(A: LinearOperator, steps: int, seed: int) -> tuple[Tensor, str]:
    """The spectral norm: of the structure, else from below by Lanczos' process on `A^H A` (Golub & Van Loan 2013, §10.4)."""
    known = A.exact_norm()
    if known is not None:
        return known, "exact"
    flat = _Flat(A)
    theta, _ = _lanczos(lambda v: flat.adjoint(flat(v)), flat.signs(1, seed), steps)
    return theta[-1].clamp(min=0).sqrt(), "Lanczos"


def eigenvalue_bounds(A: LinearOperator, steps: int, seed: int) -> tuple[tuple[Tensor, Tensor], str]:
    """The extreme eigenvalues of a Hermitian operator: of the structure, else by Lanczos' process.

    Its extreme Ritz values lie inside of the spectrum; each is moved outwards by its residual norm, within which an
    eigenvalue lies (Parlett 1998, §13.2).

    Raises:
        ValueError: if the operator is not known to be Hermitian.
    """
    if not A.hermitian:
        raise ValueError(f"A: expected an operator that is known to be Hermitian, got {A.expression}; claim hermitian=True")
    known = A.exact_eigenvalue_bounds()
    if known is not None:
        return known, "exact"
    flat = _Flat(A)
    theta, residual = _lanczos(flat, flat.signs(1, seed), steps)
    return (theta[0] - residual[0], theta[-1] + residual[-1]), "Lanczos"


class _Flat:
    """An operator on flat columns, `(n, k) -> (m, k)`, without batch dimensions."""

    def __init__(self, A: LinearOperator) -> None:
        if A.domain is None:
            raise ValueError(f"A: {A.expression} does not know its domain; give domain= an example of x")
        self.A = A
        self.domain, self.codomain = Layout.of(spaces.zeros(A.domain), 0), Layout.of(spaces.zeros(A.codomain), 0)
        self.n = spaces.dimension(A.domain)
        self.like = spaces.examples(A.domain)[0]

    def __call__(self, columns: Tensor) -> Tensor:
        return self._applied(self.A.apply, columns, self.domain, self.codomain)

    def adjoint(self, columns: Tensor) -> Tensor:
        return self._applied(self.A.apply_adjoint, columns, self.codomain, self.domain)

    @staticmethod
    def _applied(apply: Callable[[Tree], Tree], columns: Tensor, source: Layout, target: Layout) -> Tensor:
        def one(v: Tensor) -> Tensor:
            x = source.unpack(v.reshape(source.shapes[0]) if source.single else v)
            return target.pack(apply(x)).reshape(-1)

        return torch.stack([one(v) for v in columns.unbind(1)], dim=1)

    def matrix(self) -> Tensor:
        return self(torch.eye(self.n, dtype=self.like.dtype, device=self.like.device))

    def signs(self, k: int, seed: int) -> Tensor:
        """`k` columns of random signs."""
        bits = torch.randint(0, 2, (self.n, k), generator=torch.Generator().manual_seed(seed))
        return (2 * bits - 1).to(dtype=self.like.dtype, device=self.like.device)

    def unpack(self, v: Tensor) -> Tree:
        return self.domain.unpack(v.reshape(self.domain.shapes[0]) if self.domain.single else v)


def _lanczos(apply: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Ritz values, ascending, and their residual norms, after some steps with full re-orthogonalisation."""
    q = start / torch.linalg.vector_norm(start)
    basis, alphas, betas = [q], [], []
    eps = torch.finfo(real_dtype(q.dtype)).eps
    for _ in range(min(steps, len(q))):
        w = apply(basis[-1])
        alphas.append((basis[-1].conj() * w).sum().real)
        Q = torch.cat(basis, dim=1)
        for _ in range(2):  # twice is enough
            w = w - Q @ (Q.mH @ w)
        betas.append(torch.linalg.vector_norm(w))
        scale = max(math.hypot(float(a), float(b)) for a, b in zip(alphas, betas, strict=True))
        if float(betas[-1]) <= len(q) * eps * scale:  # the space is invariant
            betas[-1] = betas[-1] * 0
            break
        basis.append(w / betas[-1])
    T = torch.diag(torch.stack(alphas))
    if len(alphas) > 1:
        beside = torch.diag(torch.stack(betas[:-1]), 1)
        T = T + beside + beside.mT
    theta, S = torch.linalg.eigh(T)
    return theta, betas[-1] * S[-1].abs()
