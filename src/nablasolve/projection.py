"""A least-squares problem on the subspace of a bidiagonalisation, where an answer for every λ costs a few numbers.

The bidiagonalisation of Golub and Kahan, `A V = U B` with `b = |b| u_1`, takes one product with `A` and one with `A^H` a step,
and keeps its vectors, so that they stay orthogonal.

Source: Golub & Kahan 1965; O'Leary & Simmons 1981 (the projected problem).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .adjoint import Transpose
from .least_squares import domain_example
from .operators import LinearOperator, aslinearoperator
from .pose import Tree, right_hand_side
from .vectors import Basis, Layout, TensorSpace, precise_norm, real_dtype

DAMPS = 200  # points of the default grid, as in Hansen's l_curve
ROUNDING = 10  # how many roundings of |A| a new vector of the process has to be longer than
MISMATCH = 1e-3  # how far `u^H A v` may be from `(A^H u)^H v`, relative to |A|; single precision in A stays far below


@dataclass(frozen=True, eq=False)
class Projection:
    """The problem on the subspace of a bidiagonalisation, in units of the norms of its matrix and of its start.

    Attributes:
        sigma: the singular values, the largest 1.
        c: the start in the basis of the left singular vectors; `rest` is what lies outside of all.
        rest: as said.
        Q: the right singular vectors as columns.
        norm_A: the largest singular value.
        norm_b: the norm of the start.
    """

    sigma: Tensor
    c: Tensor
    rest: float
    Q: Tensor
    norm_A: float
    norm_b: float

    @classmethod
    def of(cls, B: Tensor, norm_b: float) -> Projection:
        """The projected problem of a lower bidiagonal matrix of shape `(k + 1, k)`."""
        scale = float(B.abs().max())
        P, sigma, Qh = torch.linalg.svd(B / scale, full_matrices=True)
        return cls(sigma / sigma[0], P[0, :-1], abs(float(P[0, -1])), Qh.mT, scale * float(sigma[0]), norm_b)

    def left(self, damps: Tensor) -> Tensor:
        """`λ^2 / (s^2 + λ^2)`, what the damping leaves of each part of the residual, of shape `(*damps.shape, k)`."""
        left: Tensor = 1 / (1 + (self.sigma / self._relative(damps)) ** 2)
        return left

    def parts(self, damps: Tensor) -> Tensor:
        """`s / (s^2 + λ^2) c`, the parts of the solution, of shape `(*damps.shape, k)`."""
        size = torch.hypot(self.sigma, self._relative(damps))
        return self.sigma / size * (self.c / size)

    def _relative(self, damps: Tensor) -> Tensor:
        return (damps / self.norm_A).unsqueeze(-1)

    def mean_left(self, damps: Tensor) -> Tensor:
        """`u^H (I - T) u` for the unit vector `u` that the process began with, by Gauss-Radau quadrature."""
        return (self.left(damps) * self.c.square()).sum(-1) + self.rest**2

    def residual_norms(self, damps: Tensor) -> Tensor:
        """`|A x - b|`."""
        return self.norm_b * ((self.left(damps) * self.c).square().sum(-1) + self.rest**2).sqrt()

    def solution_norms(self, damps: Tensor) -> Tensor:
        """`|x|`."""
        norm: Tensor = torch.linalg.vector_norm(self.parts(damps), dim=-1)
        return self.norm_b / self.norm_A * norm

    def coefficients(self, damp: Tensor) -> Tensor:
        """The solution in the basis of the subspace."""
        return self.norm_b / self.norm_A * (self.Q @ self.parts(damp))

    @property
    def floor(self) -> float:
        """The residual norm without damping."""
        return self.norm_b * self.rest

    def curvature(self, damps: Tensor) -> Tensor:
        """The curvature of `(log |A x - b|, log |x|)`.

        For `rho = |A x - b|^2` and `eta = |x|^2` the derivatives obey `rho' = -λ^2 eta'`, so that the tangent has the slope
        `-1 / w` with `w = λ^2 eta / rho`. By derivatives to `log λ`, with `q = -(log eta)' / 2`, the curvature is

            2 w (1 - q (1 + w)) / (q (1 + w^2)^{3/2}).
        """
        left, parts = self.left(damps), self.parts(damps).square()
        rho, eta = (left * self.c).square().sum(-1) + self.rest**2, parts.sum(-1)
        w = (damps / self.norm_A) ** 2 * eta / rho
        q = 2 * (left * parts).sum(-1) / eta
        return 2 * w * (1 - q * (1 + w)) / (q * (1 + w * w) ** 1.5)

    def damp_of_residual(self, level: float) -> float:
        """The λ at which `|A x - b|` is a level between `floor` and `norm_b`.

        As a function of `1 / λ^2` its square falls and is convex, so that Newton's iterates from 0 rise to the root.
        """
        goal, weights, inverse = (level / self.norm_b) ** 2, self.c.square(), 0.0
        while True:
            denominator = 1 + inverse * self.sigma.square()
            excess = float((weights / denominator.square()).sum()) + self.rest**2 - goal
            slope = 2 * float((weights * self.sigma.square() / denominator**3).sum())
            step = excess / slope if slope > 0 else 0.0
            inverse += step
            if not step > 4 * torch.finfo(torch.float64).eps * inverse:
                return self.norm_A / math.sqrt(inverse)

    def grid(self, low: float) -> Tensor:
        """The default λ from a smallest one up to a decade above the norm of `A`, where nothing is left of the solution."""
        return torch.logspace(math.log10(low), math.log10(10 * self.norm_A), DAMPS, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Process:
    """`A V = U B` after some steps, with both bases orthogonalised in full, twice.

    Attributes:
        U, V: the bases; `U` has one vector more than `V`, but where it ended by `beta = 0`.
        B: lower bidiagonal, of shape `(steps + 1, steps)`, float64 on the CPU.
        norm: of the start.
        allowed: how many steps it was allowed.
        exhausted: whether it ended by itself: by a zero, or by the last dimension.
    """

    U: Basis
    V: Basis
    B: Tensor
    norm: float
    allowed: int
    exhausted: bool

    @property
    def steps(self) -> int:
        """How many it has taken."""
        return self.B.shape[1]

    @property
    def eps(self) -> float:
        """The roundoff of its vectors."""
        return float(torch.finfo(self.V[0].dtype).eps)

    def projections(self) -> tuple[Projection, Projection | None]:
        """The projected problem, and that without the last quarter of the steps, None where the process ended by itself."""
        whole = Projection.of(self.B, self.norm)
        if self.exhausted:
            return whole, None
        k = self.steps - max(1, self.steps // 4)
        return whole, Projection.of(self.B[: k + 1, :k], self.norm)

    @classmethod
    def run(cls, products: Products, start: Tensor, allowed: int) -> Process | None:
        """The process from a vector of the codomain; None for one that is orthogonal to the range of `A`.

        Raises:
            ValueError: if a product holds NaN or Inf, or `A` and its adjoint do not belong together.
        """
        space, norm = TensorSpace(0), float(precise_norm(start, 0))
        rounding = ROUNDING * torch.finfo(start.dtype).eps
        steps = min(allowed, products.m, products.n)
        U = Basis(space, start / norm, steps + 1)
        V: Basis | None = None
        alphas: list[float] = []
        betas: list[float] = []
        norm_A, exhausted = 0.0, False
        while len(alphas) < steps and not exhausted:
            v, alpha = new_vector(V, products.adjoint(U[U.count - 1]))
            if alpha <= rounding * norm_A:
                exhausted = True
                break
            if V is None:
                V = Basis(space, v, steps)
            else:
                V.append(v)
            w = products(v)
            mismatch = U.project(w)
            mismatch[-1] -= alpha
            u, beta = new_vector(U, w)
            norm_A = max(norm_A, math.hypot(alpha, beta))
            if float(mismatch.abs().max()) > MISMATCH * norm_A:
                raise ValueError(
                    "A: u^H (A v) and (A^H u)^H v differ, so that it is not linear (a bias?), or the adjoint that was given is "
                    "not its adjoint; look at check_operator(A, x)"
                )
            if not alphas and alpha <= rounding * norm_A:
                return None
            exhausted = beta <= rounding * norm_A  # so it is where U is complete
            if not exhausted:
                U.append(u)
            alphas.append(alpha)
            betas.append(0.0 if exhausted else beta)
        if V is None:
            return None
        B = torch.zeros(len(alphas) + 1, len(alphas), dtype=torch.float64)
        B.diagonal().copy_(torch.tensor(alphas, dtype=torch.float64))
        B.diagonal(-1).copy_(torch.tensor(betas, dtype=torch.float64))
        return cls(U, V, B, norm, steps, exhausted or len(alphas) == products.n)


def new_vector(basis: Basis | None, w: Tensor) -> tuple[Tensor, float]:
    """`w` without its part in a basis, of unit norm, and the norm it had."""
    if basis is not None:
        for _ in range(2):  # twice is enough (Parlett 1998, §6.9)
            w = basis.subtract(w, basis.project(w))
    norm = float(precise_norm(w, 0))
    if not math.isfinite(norm):
        raise ValueError("A: a product with A or with its adjoint holds NaN or Inf")
    return (w / norm if norm > 0 else w), norm


class _Space:
    """Vectors of one side of `A`: trees, and flat tensors of one dimension, with real parts and imaginary parts if `split`."""

    def __init__(self, example: Tree, split: bool) -> None:
        self.layout = Layout.of(example, 0)
        self.like = self.layout.pack(example)
        self.due = pytree.tree_leaves(example)
        self.split = split and self.like.is_complex()

    def flat(self, tree: Tree) -> Tensor:
        packed = self.layout.pack(tree).reshape(-1)
        return torch.view_as_real(packed.resolve_conj()).reshape(-1) if self.split else packed

    def tree(self, flat: Tensor) -> Tree:
        packed = torch.view_as_complex(flat.reshape(-1, 2)) if self.split else flat
        return self.layout.unpack(packed.reshape(self.like.shape))

    def checked(self, name: str, tree: Tree, what: str) -> Tree:
        """The tree in the order of this layout.

        Raises:
            TypeError: if it has another structure.
            ValueError: for another shape, dtype or device.
        """
        leaves = self.layout.leaves(tree)
        if leaves is None or not all(isinstance(leaf, Tensor) for leaf in leaves):
            got = pytree.tree_map(lambda leaf: type(leaf).__name__, tree)
            raise TypeError(
                f"{name}: expected it to return Tensors with the structure of {what}, {self.layout.spec}, got {got}"
            )
        for leaf, due in zip(leaves, self.due, strict=True):
            for kind in ("shape", "dtype", "device"):
                got, expected = getattr(leaf, kind), getattr(due, kind)
                if got != expected:
                    complex_A = kind == "dtype" and got.is_complex
                    remedy = f"; if the operator is complex, give b as {got}" if complex_A else ""
                    got, expected = (tuple(got), tuple(expected)) if kind == "shape" else (got, expected)
                    raise ValueError(f"{name}: expected it to return the {kind} {expected} of {what}, got {got}{remedy}")
        return pytree.tree_unflatten(leaves, self.layout.spec)


class Products:
    """`A` and `A^H` on flat vectors, counted.

    Where only one of the two sides is complex, `A` is linear over the real numbers only, and complex vectors are pairs of them.
    """

    def __init__(self, operator: LinearOperator, x: Tree, b: Tree) -> None:
        split = pytree.tree_leaves(x)[0].is_complex() != pytree.tree_leaves(b)[0].is_complex()
        self.domain, self.codomain = _Space(x, split), _Space(b, split)
        self.zero = self.domain.flat(x)
        self.n, self.m = len(self.zero), len(self.codomain.flat(b))
        self.matvecs = self.rmatvecs = 0
        self.operator = operator
        self.transpose = None if operator.has_adjoint else Transpose(self, self.zero)

    @classmethod
    def of(cls, A: Any, b: Tree, domain: Tree) -> tuple[Products, Tensor]:
        """The products of the arguments of a choice, and `b` as a flat vector.

        Raises:
            TypeError: for an argument of the wrong type.
            ValueError: for a wrong shape, dtype, device or value, or a domain that cannot be known.
        """
        operator = aslinearoperator(A).for_one_solve()
        b, batch_dims = right_hand_side(operator, b, 0)
        first = pytree.tree_leaves(b)[0]
        if batch_dims:
            raise ValueError(
                f"b: expected one vector for a Tensor A, of shape {tuple(first.shape[-1:])}, got a batch of them, "
                f"{tuple(first.shape)}; choose for each one by itself"
            )
        if real_dtype(first.dtype) not in (torch.float32, torch.float64):
            raise ValueError(f"b: expected 32 or 64 bits, got {first.dtype}")
        products = cls(operator, domain_example(operator, b, 0, domain=domain), b)
        flat = products.codomain.flat(b)
        size = float(precise_norm(flat, 0))
        if not math.isfinite(size):
            raise ValueError("b: expected finite numbers, got NaN or Inf")
        if size == 0:
            raise ValueError("b: expected a vector that is not zero, since every damp gives x = 0 for this one")
        return products, flat

    def __call__(self, v: Tensor) -> Tensor:
        """`A v`, a new tensor."""
        self.matvecs += 1
        y = self.operator.apply(self.domain.tree(v))
        return self.codomain.flat(self.codomain.checked("A", y, "b")).clone()

    def adjoint(self, u: Tensor) -> Tensor:
        """`A^H u`, a new tensor."""
        self.rmatvecs += 1
        if self.transpose is not None:
            return self.transpose(u).clone()
        x = self.operator.apply_adjoint(self.codomain.tree(u))
        return self.domain.flat(self.domain.checked("the adjoint of A", x, "x")).clone()

    def singular_values(self) -> Tensor:
        """All `min(m, n)` singular values, by a product for each dimension of the smaller side."""
        size, apply = (self.n, self) if self.n <= self.m else (self.m, self.adjoint)
        eye = torch.eye(size, dtype=self.zero.dtype, device=self.zero.device)
        matrix = torch.stack([apply(e) for e in eye]).cpu()
        sigma: Tensor = torch.linalg.svdvals(matrix.to(torch.complex128 if matrix.is_complex() else torch.float64))
        return sigma
