"""From the arguments of `lstsq` to a problem: damping, weights and a prior centre become a plain least-squares problem.

    min sum_i w_i |(A x - b)_i|^2 + λ^2 |L (x - x_ref)|^2   =   min |B y - c|^2,   x = x_ref + y,

    B = ( sqrt(w) A )     c = ( sqrt(w) (b - A x_ref) )
        (   λ L     ),        (          0            ).

Every derivative is that of the pseudo-inverse of `B`, whose tensors are those of `A` and `L`, and the weights and λ. Where `A`
has fewer rows than columns, `B` is as ill-conditioned as `1 / λ`, and what its derivative needs of the residual is lost in
rounding. The same minimiser is then the first part of

    min |x|^2 + |t|^2   subject to   A x + λ t = b                                  (Saunders 1995),

whose operator is as well-conditioned as `A`. A method for Hermitian operators is given one as well, for a Hermitian `A` with
damping: `s = (b - A x) / λ` makes `(A, λ; -λ, A)` of it, with its rows exchanged.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .choice import claims_hermitian
from .graph import is_wrapped, tracks_anywhere
from .info import SolveInfo, Status
from .methods import CRAIG
from .operators import DenseOperator, LinearOperator, aslinearoperator, spaces
from .operators.algebra import add, map_leaves
from .pose import Policy, Posed, Tree, guess_leaves, posed, right_hand_side, with_flat_params
from .vectors import Layout, any_true, flatten, precise_norm, real_dtype, spread


def pose_least_squares(
    A: Any,
    b: Tree,
    policy: Policy,
    *,
    damp: Any,
    weight: Any,
    x_ref: Tree,
    domain: Tree,
    batch_dims: int,
    params: Sequence[Any],
) -> Asked:
    """The problem that the arguments of `lstsq` ask, and how its solution is read.

    Raises:
        TypeError: for an argument of the wrong type or an unknown option.
        ValueError: for a wrong shape, dtype, device or value.
        RuntimeError: if `A` depends on a tensor that needs a gradient and cannot be found.
    """
    A, params = with_flat_params(A, params)
    if params and (not callable(A) or isinstance(A, Tensor | LinearOperator)):
        raise TypeError(f"params: needs A as a function A(v, *params), got {type(A).__name__}")
    operator = aslinearoperator(A).for_one_solve()
    if type(operator) is LinearOperator and operator.codomain is operator.domain and not operator.hermitian:
        operator = copy.copy(operator)  # a codomain that was not given is only square until b says otherwise
        operator.codomain = None
    b, batch_dims = right_hand_side(operator, b, batch_dims)
    if domain is None and operator.domain is None and (operator.hermitian or claims_hermitian(policy.method)):
        domain = b
    layout = Layout.of(domain_example(operator, b, batch_dims, domain=domain, x0=policy.x0, x_ref=x_ref), batch_dims)
    injective = operator.claims.full_column_rank or operator.nullspace == ()
    onto = operator.claims.full_row_rank or operator.left_nullspace == ()
    m, n = (math.prod(t.vector_shape) * (1 + t.dtype.is_complex) for t in (Layout.of(b, batch_dims), layout))
    injective, onto = injective and n <= m, onto and m <= n  # of full rank is what has the rank min(m, n)
    shift = None
    if x_ref is not None:
        shift = pytree.tree_unflatten(guess_leaves("x_ref", layout, x_ref), layout.spec)
        image = operator.fn(shift, *params) if params else operator.apply(shift)
        b = map_leaves(torch.sub, b, image)
    if weight is not None:
        root = _square_root(weight, b)
        positive = not any(any_true(leaf == 0) for leaf in pytree.tree_leaves(root))
        injective, onto = injective and positive, onto and positive
        if claims_hermitian(policy.method):
            raise ValueError("weight: makes A another than the Hermitian one that the method needs; choose 'lsmr'")
        operator, b = _weighted(operator, b, root, bool(params))
    data = math.prod(Layout.of(b, batch_dims).vector_shape)
    lam, L = _damping(damp, b, batch_dims)
    underdetermined, extended = n > m, None
    # where a method or a guess is given, the iterates are to be that method's from that guess
    free = underdetermined and policy.method is None and policy.M is None and policy.x0 is None and policy.grad != "unroll"
    consistent = policy.method == CRAIG.name or isinstance(policy.method, CRAIG)
    if lam is not None and L is None and (free or consistent) and not any_true(lam == 0):
        extended, lam, onto = lam, None, True
        operator = _extended(operator, extended, bool(params))
    vector, of_x = Layout.of(b, batch_dims).pack(b), layout
    if lam is not None and L is None and claims_hermitian(policy.method) and n == m and not any_true(lam == 0):
        extended, lam, injective, onto = lam, None, True, True
        operator, pair = _hermitian_extended(operator, b, extended, bool(params))
        layout, b = _extended_layout(operator, layout, b, batch_dims), pair
    elif extended is not None:
        layout = _extended_layout(operator, layout, b, batch_dims)
    if lam is not None:
        definite = not any_true(lam == 0) and (L is None or L.claims.full_column_rank)
        injective, onto = injective or definite, False
        operator, b = _damped(operator, b, layout, lam, L, bool(params))
    if policy.M is not None and not injective:
        raise ValueError(
            "M: a preconditioner changes which of several minimisers is found, so that A has to have full column rank: claim "
            "full_rank=True, or give damp"
        )
    if policy.x0 is not None:
        guess = pytree.tree_unflatten(guess_leaves("x0", of_x, policy.x0), of_x.spec)
        if shift is not None:
            guess = map_leaves(torch.sub, guess, shift)
        # of several minimisers the shortest is asked, and whatever of x0 lies in the nullspace would stay
        policy = replace(policy, x0=None if (underdetermined and not injective) or extended is not None else guess)
    problem = posed(
        operator, b, batch_dims, params, policy, layout, least_squares=True, injective=injective, onto=onto,
        data=data if lam is not None else None, guessed=policy.x0 is not None and not injective,
        dual=policy.differentiate and underdetermined and not injective,
    )  # fmt: skip
    return Asked(problem, vector, shift, extended)


@dataclass(frozen=True, eq=False)
class Asked:
    """A posed least-squares problem, and how the minimiser is read from its solution.

    Attributes:
        posed: the problem.
        b: the right-hand side as a vector, with its weights.
        shift: what is to be added, `x_ref`; or None.
        extended: λ, where the solution is `(x, t)`; else None.
    """

    posed: Posed
    b: Tensor
    shift: Tree
    extended: Tensor | None

    def minimiser(self, solution: Tree) -> Tree:
        """`x` from what the problem has for a solution."""
        x = solution
        if self.extended is not None:  # of a dense matrix the two are one vector
            m = self.b.shape[-1]
            x = solution[..., : solution.shape[-1] - m] if isinstance(solution, Tensor) else solution[0]
        return x if self.shift is None else map_leaves(torch.add, x, self.shift)

    def adjust(self, solution: Tree, info: SolveInfo, atol: float) -> None:
        """Make the record one of `x`: for `(x, t)` the misfit is `λ t`, and with `x_ref` the norm is that of the whole."""
        problem = self.posed.problem
        k, vector = problem.batch_dims, problem.solution_layout.pack(solution).detach()
        if is_wrapped(vector):
            return  # a record inside torch.vmap is that of the problem as it was posed
        scalar = (lambda a: a) if isinstance(info.status, Tensor) else (lambda a: a.item())
        if self.extended is not None:
            b = self.b.detach()
            lam, size = self.extended.detach().abs().to(torch.float64), precise_norm(b, k)
            misfit = lam * precise_norm(flatten(vector, k)[..., -flatten(b, k).shape[-1] :], k)
            info.residual_norm, info.norm_r = scalar(misfit), scalar(lam * precise_norm(vector, k))
            info.relative_residual = scalar(misfit / torch.where(size > 0, size, 1.0))
            above = scalar((misfit > torch.clamp(problem.forward.rtol * size, min=atol)).expand(size.shape))
            if isinstance(info.status, Tensor):
                info.status = torch.where((info.status == Status.CONVERGED) & above, int(Status.LEAST_SQUARES), info.status)
            elif info.status is Status.CONVERGED and above:
                info.status = Status.LEAST_SQUARES
        if self.extended is not None or self.shift is not None:
            x = torch.cat([flatten(leaf.detach(), k) for leaf in pytree.tree_leaves(self.minimiser(solution))], dim=-1)
            info.norm_x = scalar(precise_norm(x, k))


def domain_example(operator: LinearOperator, b: Tree, batch_dims: int, **given: Tree) -> Tree:
    """The zero vector of the domain, of `b`'s dtype unless the operator maps real vectors to complex ones, or back.

    Args:
        operator: `A`, which may know its domain.
        b: the right-hand side.
        batch_dims: its batch dimensions.
        given: arguments that may be like `x`, by name, or None.

    Raises:
        TypeError: if `domain` is no tensor or pytree of tensors.
        ValueError: if the domain is not known, or the example does not fit `b` or the operator.
    """
    known, first = operator.domain, pytree.tree_leaves(b)[0]
    named = next(((name, example) for name, example in given.items() if example is not None), None)
    real = known is not None and spaces.is_complex(operator.codomain) and not spaces.is_complex(known)
    dtype = real_dtype(first.dtype) if real else first.dtype
    if spaces.is_complex(known if named is None else spaces.space_of(*named)):
        dtype = dtype.to_complex()
    if named is not None:
        name, example = named
        leaves = pytree.tree_leaves(spaces.space_of(name, example))
        if known is not None and not spaces.agree(known, example):
            raise ValueError(
                f"{name}: expected shape {spaces.shapes(known)} like the domain of A, got {spaces.shapes(example)}"
            )
        for leaf in leaves:
            if leaf.shape[:batch_dims] != first.shape[:batch_dims]:
                expected = f"{tuple(first.shape[:batch_dims])} like b"
                raise ValueError(f"{name}: expected the batch dimensions {expected}, got shape {tuple(leaf.shape)}")
        known = example
    elif known is None and operator.hermitian:
        known = b
    elif known is None:
        raise ValueError(
            "domain: the shape of x cannot be known from a function alone; give domain= an example of x, or give A as "
            "nablasolve.LinearOperator(A, domain=...)"
        )
    free = operator.codomain is not None and spaces.has_free_batch(operator.codomain)
    batch = spaces.batch_shape(b, operator.codomain) if named is None and free else torch.Size()

    def zero(leaf: Any) -> Tensor:
        shape = (*batch, *leaf.example.shape) if isinstance(leaf, spaces.AnyBatch) else leaf.shape
        result: Tensor = first.new_zeros(shape, dtype=dtype)
        return result

    return pytree.tree_map(zero, known)


# -- weights -------------------------------------------------------------------------------------------------------


def _square_root(weight: Tree, b: Tree) -> Tree:
    """The roots of the weights, one real tensor a leaf of `b`.

    Raises:
        TypeError: if `weight` is no tensor, or has not the structure of `b`.
        ValueError: for a complex, negative or infinite weight, one that does not broadcast, or one whose gradient is lost.
    """

    def root(w: Any, leaf: Tensor) -> Tensor:
        if not isinstance(w, Tensor):
            raise TypeError(f"weight: expected a Tensor for each one of b, got {type(w).__name__}")
        if w.dtype != real_dtype(leaf.dtype):
            raise ValueError(f"weight: expected dtype {real_dtype(leaf.dtype)} like b, got {w.dtype}")
        try:
            fits = torch.broadcast_shapes(w.shape, leaf.shape) == leaf.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"weight: expected a shape that broadcasts to {tuple(leaf.shape)} of b, got {tuple(w.shape)}")
        if any_true(~(w >= 0) | ~torch.isfinite(w)):
            raise ValueError("weight: expected finite numbers of at least 0, got a negative one, NaN or Inf")
        if tracks_anywhere(w) and any_true(w == 0):
            raise ValueError(
                "weight: its gradient at a weight of 0 is lost, because the square root has none there: detach the weights, or "
                "keep them above 0"
            )
        return w.sqrt()

    layout = Layout.of(b, 0)
    leaves = layout.leaves(weight)
    if leaves is None:
        raise TypeError(f"weight: expected the structure of b, {layout.spec}, got {pytree.tree_structure(weight)}")
    roots = [root(w, leaf) for w, leaf in zip(leaves, pytree.tree_leaves(b), strict=True)]
    return pytree.tree_unflatten(roots, layout.spec)


def _weighted(operator: LinearOperator, b: Tree, root: Tree, with_params: bool) -> tuple[LinearOperator, Tree]:
    """`sqrt(w) A` and `sqrt(w) b`."""
    scaled = map_leaves(torch.mul, b, root)
    if isinstance(operator, DenseOperator):
        return DenseOperator(
            operator.matrix * root.expand(torch.broadcast_shapes(root.shape, b.shape[-1:])).unsqueeze(-1)
        ), scaled

    def fn(v: Tree, *params: Tensor) -> Tree:
        return map_leaves(torch.mul, operator.fn(v, *params) if params else operator.apply(v), root)

    def adjoint(y: Tree) -> Tree:
        return operator.apply_adjoint(map_leaves(torch.mul, y, root))

    return _Built((operator,), fn, None if with_params or not operator.has_adjoint else adjoint), scaled


# -- damping -------------------------------------------------------------------------------------------------------


def _damping(damp: Any, b: Tree, batch_dims: int) -> tuple[Tensor | None, LinearOperator | None]:
    """λ as a tensor that multiplies the vectors, None for no damping, and `L`, None for the identity.

    Raises:
        TypeError: if `damp` is neither a real number, a real tensor, nor a pair of one and an operator.
        ValueError: if it is not finite, or of a wrong shape, dtype or device.
    """
    L = None
    if isinstance(damp, tuple | list):
        if len(damp) != 2:
            raise TypeError(f"damp: expected a number, a Tensor or a pair (number, operator), got {len(damp)} items")
        damp, L = damp
        L = aslinearoperator(L).for_one_solve()
    first = pytree.tree_leaves(b)[0]
    if isinstance(damp, Tensor):
        batch = tuple(first.shape[:batch_dims])
        if damp.is_complex() or not damp.is_floating_point():
            raise TypeError(f"damp: expected a real floating-point tensor, got {damp.dtype}")
        if damp.ndim and tuple(damp.shape) != batch:
            raise ValueError(f"damp: expected a 0-d tensor or one of the batch shape {batch}, got shape {tuple(damp.shape)}")
        if damp.device != first.device and damp.ndim:
            raise ValueError(f"damp: expected device {first.device} like b, got {damp.device}")
        lam = damp.to(device=first.device, dtype=real_dtype(first.dtype))
        if any_true(~torch.isfinite(lam)):
            raise ValueError("damp: expected finite numbers, got NaN or Inf")
        return lam, L
    if isinstance(damp, bool) or not isinstance(damp, numbers.Real):
        raise TypeError(f"damp: expected a real number, a real Tensor or a pair (number, operator), got {type(damp).__name__}")
    if not math.isfinite(damp):
        raise ValueError(f"damp: expected a finite number, got {damp!r}")
    return (None if damp == 0 else first.new_full((), float(damp), dtype=real_dtype(first.dtype))), L


def _times(lam: Tensor, v: Tree) -> Tree:
    """`λ v`, with one λ a system or one for all."""
    return map_leaves(lambda leaf: spread(lam, leaf) * leaf, v)


def _damped(
    operator: LinearOperator, b: Tree, layout: Layout, lam: Tensor, L: LinearOperator | None, with_params: bool
) -> tuple[LinearOperator, Tree]:
    """`(A, λ L)` and `(b, 0)`.

    Raises:
        ValueError: if `L` has another domain.
    """
    example = layout.unpack(layout.zero(pytree.tree_leaves(b)[0], layout.batch_dims))
    if L is not None and L.domain is not None and not spaces.agree(L.domain, example):
        got = f"{L.expression} on vectors {spaces.shapes(L.domain)}"
        raise ValueError(f"damp: expected L on vectors {spaces.shapes(example)} like x, got {got}")
    if isinstance(operator, DenseOperator) and (L is None or isinstance(L, DenseOperator)):
        matrix, n = operator.matrix, operator.matrix.shape[-1]
        lower = torch.eye(n, dtype=matrix.dtype, device=matrix.device) if L is None else L.matrix
        lower = lam[..., None, None] * lower
        batch = torch.broadcast_shapes(matrix.shape[:-2], lower.shape[:-2])
        dtype = torch.promote_types(matrix.dtype, lower.dtype)
        blocks = [block.to(dtype).expand(*batch, *block.shape[-2:]) for block in (matrix, lower)]
        return DenseOperator(torch.cat(blocks, dim=-2)), torch.cat([b, b.new_zeros(*b.shape[:-1], lower.shape[-2])], dim=-1)

    def fn(v: Tree, *params: Tensor) -> Tree:
        return operator.fn(v, *params) if params else operator.apply(v), _times(lam, v if L is None else L.apply(v))

    def plus(g: Tensor, u: Tensor) -> Tensor:
        return g + spread(lam, u) * u if g.shape == u.shape else add(g, u)  # which says what is wrong

    def adjoint(y: Tree) -> Tree:
        return map_leaves(plus, operator.apply_adjoint(y[0]), y[1] if L is None else L.apply_adjoint(y[1]))

    parts: tuple[LinearOperator, ...] = (operator,) if L is None else (operator, L)
    written = not with_params and all(part.has_adjoint for part in parts)
    if L is not None:
        with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(False):
            example = map_leaves(torch.zeros_like, L(example))
    return _Built(parts, fn, adjoint if written else None), (b, example)


def _extended(operator: LinearOperator, lam: Tensor, with_params: bool) -> LinearOperator:
    """`(x, t) -> A x + λ t`."""
    if isinstance(operator, DenseOperator):
        matrix, m = operator.matrix, operator.matrix.shape[-2]
        right = lam[..., None, None] * torch.eye(m, dtype=matrix.dtype, device=matrix.device)
        batch = torch.broadcast_shapes(matrix.shape[:-2], right.shape[:-2])
        return DenseOperator(torch.cat([block.expand(*batch, *block.shape[-2:]) for block in (matrix, right)], dim=-1))

    def fn(v: Tree, *params: Tensor) -> Tree:
        image = operator.fn(v[0], *params) if params else operator.apply(v[0])
        return map_leaves(add, image, _times(lam, v[1]))

    def adjoint(y: Tree) -> Tree:
        return operator.apply_adjoint(y), _times(lam, y)

    return _Built((operator,), fn, None if with_params or not operator.has_adjoint else adjoint)


def _hermitian_extended(operator: LinearOperator, b: Tree, lam: Tensor, with_params: bool) -> tuple[LinearOperator, Tree]:
    """`(x, s) -> (A s - λ x, A x + λ s)`, which is Hermitian if `A` is, and `(0, b)`."""
    if isinstance(operator, DenseOperator):
        A = operator.matrix
        shift = lam[..., None, None] * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        A, shift = torch.broadcast_tensors(A, shift)
        matrix = torch.cat([torch.cat([-shift, A], dim=-1), torch.cat([A, shift], dim=-1)], dim=-2)
        return DenseOperator(matrix), torch.cat([torch.zeros_like(b), b], dim=-1)

    def fn(v: Tree, *params: Tensor) -> Tree:
        x, s = v
        of_x, of_s = (operator.fn(u, *params) if params else operator.apply(u) for u in (x, s))
        return map_leaves(torch.sub, of_s, _times(lam, x)), map_leaves(add, of_x, _times(lam, s))

    return _Built((operator,), fn, None), (map_leaves(torch.zeros_like, b), b)


def _extended_layout(operator: LinearOperator, layout: Layout, b: Tree, batch_dims: int) -> Layout:
    """That of `(x, t)`, which of a dense matrix is one vector."""
    if isinstance(operator, DenseOperator):
        return Layout.of(b.new_zeros(*b.shape[:-1], operator.matrix.shape[-1]), batch_dims)
    return Layout.of((layout.unpack(layout.zero(pytree.tree_leaves(b)[0], batch_dims)), b), batch_dims)


class _Built(LinearOperator):
    """An operator that is written in terms of others."""

    def __init__(self, parts: tuple[LinearOperator, ...], fn: Callable[..., Any], adjoint: Callable[..., Any] | None) -> None:
        super().__init__(fn, adjoint=adjoint)
        self.parts = parts

    @property
    def has_user_adjoint(self) -> bool:
        return any(part.has_user_adjoint for part in self.parts)

    @property
    def has_adjoint(self) -> bool:
        return self.adjoint_fn is not None

    @property
    def known_linear(self) -> bool:
        return all(part.known_linear for part in self.parts)
