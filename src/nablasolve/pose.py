"""From the arguments of the front door to a problem: everything is validated once, here, before `A` is called."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .arguments import check_choice, check_integer, check_maxiter, check_result, check_tolerance, nearest
from .choice import Choice, claims_hermitian
from .closure import Closure, MatrixClosure, transforms_active
from .methods import Direct, Method
from .nullspaces import Gauge, Nullspaces
from .operators import DenseOperator, LinearOperator, SparseOperator, aslinearoperator, spaces
from .operators.factorisation import Factorisation
from .operators.spaces import check_structure
from .problem import Options, Problem
from .vectors import Layout, real_dtype

Tree = Any  # a tensor, or a pytree (tuple, list, dict) of tensors

ON_FAILURE = ("raise", "warn", "ignore")
GRAD = ("implicit", "unroll", "none")
ADJOINT_OPTIONS = ("rtol", "maxiter", "method", "M")
DEFAULT_RTOL = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Posed(NamedTuple):
    """A problem, its right-hand side and initial guess as vectors, and whether a derivative can be asked for."""

    problem: Problem
    vector: Tensor
    guess: Tensor | None
    differentiate: bool
    gauge: Gauge | None = None


@dataclass(frozen=True)
class Policy:
    """The arguments that every solve has in common, which say how and not what.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for an unknown word.
    """

    method: str | Method[Any] | None
    M: Any
    x0: Tree
    rtol: float | None
    atol: float
    maxiter: int | None
    grad: str
    adjoint: Mapping[str, Any] | None
    on_failure: str
    on_adjoint_failure: str
    callback: Callable[[Any], Any] | None
    progress: bool
    history: bool
    check_every: int | None
    compile: bool

    def __post_init__(self) -> None:
        check_choice("grad", self.grad, GRAD)
        check_choice("on_failure", self.on_failure, ON_FAILURE)
        check_choice("on_failure", self.on_adjoint_failure, ON_FAILURE)
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback: expected a callable or None, got {type(self.callback).__name__}")
        for name, flag in (("progress", self.progress), ("history", self.history), ("compile", self.compile)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
        if self.check_every is not None and check_integer("check_every", self.check_every) < 1:
            raise ValueError(f"check_every: expected None or at least 1, got {self.check_every}")
        if self.compile and self.grad == "unroll":
            raise ValueError(
                "compile: expected grad='implicit' or 'none', got grad='unroll', whose steps autograd goes through"
            )

    @property
    def differentiate(self) -> bool:
        """Whether a derivative can be asked for."""
        return self.grad != "none" and (torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0)


def pose(
    A: Any, b: Tree, policy: Policy, *, batch_dims: int, params: Sequence[Any], nullspace: Any, left_nullspace: Any, gauge: Any
) -> Posed:
    """The linear system that the arguments of `solve` ask.

    Raises:
        TypeError: for an argument of the wrong type or an unknown option.
        ValueError: for a wrong shape, dtype, device or value.
        RuntimeError: if `A` depends on a tensor that needs a gradient and cannot be found.
    """
    A, params = with_flat_params(A, params)
    operator = square_operator(A, params).for_one_solve()
    b, batch_dims = right_hand_side(operator, b, batch_dims)
    singular = Nullspaces.of(operator, nullspace, left_nullspace, operator.hermitian or claims_hermitian(policy.method))
    chosen = Gauge.of(gauge, singular)
    return posed(operator, b, batch_dims, params, policy, Layout.of(b, batch_dims), singular=singular)._replace(gauge=chosen)


def posed(
    operator: LinearOperator,
    b: Tree,
    batch_dims: int,
    params: tuple[Tensor, ...],
    policy: Policy,
    solution_layout: Layout,
    *,
    singular: Nullspaces | None = None,
    **least_squares: Any,
) -> Posed:
    """The problem of an operator and a right-hand side that were checked; `least_squares` says what else is known of it."""
    layout = Layout.of(b, batch_dims)
    vector = layout.pack(b)
    guess = None if policy.x0 is None else _guess(solution_layout, policy.x0, vector)
    if guess is not None and policy.grad != "unroll":
        guess = guess.detach()

    adjoint, M = _adjoint_options(policy.adjoint), policy.M
    n = max(1, math.prod(layout.vector_shape), math.prod(solution_layout.vector_shape)) if vector.numel() else 1
    choice = Choice(
        operator,
        preconditioned=M is not None,
        least_squares=bool(least_squares),
        injective=least_squares.get("injective", True),
        square=layout.vector_shape == solution_layout.vector_shape,
        singular=singular is not None,
        one_nullspace=singular is not None and singular.one,
        unroll=policy.differentiate and policy.grad == "unroll",
    )
    forward = Options(
        method=choice.method("method", policy.method),
        rtol=DEFAULT_RTOL[real_dtype(vector.dtype)] if policy.rtol is None else check_tolerance("rtol", policy.rtol),
        atol=check_tolerance("atol", policy.atol),
        maxiter=check_maxiter("maxiter", policy.maxiter, 10 * n),
        on_failure=policy.on_failure,
    )
    if policy.method is None and isinstance(forward.method, Direct) and not isinstance(operator, DenseOperator):
        forward = replace(forward, fallback=choice.iterative())
    # the adjoint of a claimed operator keeps the claim; a method that was asked for by name is inherited
    backward = replace(
        forward,
        fallback=None if "method" in adjoint else forward.fallback,
        method=choice.adjoint(adjoint, policy.method, forward.method),
        rtol=check_tolerance("adjoint['rtol']", adjoint["rtol"]) if adjoint.get("rtol") is not None else forward.rtol,
        maxiter=check_maxiter("adjoint['maxiter']", adjoint.get("maxiter"), forward.maxiter),
        atol=0.0,
        on_failure=policy.on_adjoint_failure,
    )

    example = solution_layout.unpack(solution_layout.zero(vector, batch_dims))
    preconditioner = None if M is None else _flat("M", _preconditioner("M", M, example), solution_layout)
    other = adjoint.get("M")
    adjoint_preconditioner = (
        None if other is None else _flat("M", _preconditioner("adjoint['M']", other, example), solution_layout)
    )

    active = transforms_active()
    record = active or (policy.differentiate and policy.grad == "implicit")
    flat = _flat("A", operator, solution_layout, layout, with_params=bool(params))
    function = flat.fn if params or type(flat) is LinearOperator else flat.apply
    zero = solution_layout.zero(vector, batch_dims)
    recordings = 0
    if isinstance(operator, DenseOperator):
        main: Closure = MatrixClosure.of(operator.matrix, batch_dims)
    elif record and operator.constants is not None:  # to run it would tell nothing more
        main = Closure.of_constants(function, operator.constants)
    elif record:
        main = _recorded("A", function, zero, layout, params)
        recordings = main.runs
    else:
        main = Closure(function, params, declared=len(params))
    side = functools.partial(_side_closure, record=active)
    direct = any(isinstance(options.method, Direct) for options in (forward, backward))
    inverse = _flat_factors(choice.factors, layout) if direct and not isinstance(operator, DenseOperator) else None
    problem = Problem(
        operator=main,
        operator_adjoint=_adjoint_closure(operator, flat, batch_dims, side, vector, solution_layout),
        user_adjoint=operator.has_user_adjoint,
        linear=operator.known_linear,
        preconditioner=None if preconditioner is None else side("M", preconditioner.apply, zero, solution_layout),
        preconditioner_adjoint=(
            side("M", preconditioner.apply_adjoint, zero, solution_layout)
            if preconditioner is not None and preconditioner.has_adjoint
            else None
        ),
        adjoint_preconditioner=None
        if adjoint_preconditioner is None
        else side("M", adjoint_preconditioner.apply, zero, solution_layout),
        inverse=None if inverse is None else side("A.factorise()", inverse.solve, vector, layout),
        inverse_adjoint=None if inverse is None else side("A.factorise()", inverse.solve_adjoint, vector, layout),
        nullspace=None if singular is None else side("nullspace", singular.right.project(layout, vector), vector, layout),
        left_nullspace=(
            None if singular is None else side("left_nullspace", singular.left.project(layout, vector), vector, layout)
        ),
        hermitian=operator.hermitian or forward.method.hermitian,
        positive_definite=(operator.positive_definite or forward.method.positive_definite) and singular is None,
        batch_dims=batch_dims,
        forward=forward,
        adjoint=backward,
        layout=layout,
        solution_layout=solution_layout,
        callback=policy.callback,
        progress=policy.progress,
        history=policy.history,
        check_every=policy.check_every,
        compile=policy.compile,
        recordings=recordings,
        **(dict(injective=False, onto=False) if singular is not None else least_squares),
    )
    return Posed(problem, vector, guess, policy.differentiate)


def with_flat_params(A: Any, params: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """`A` as a function of the vector and of the tensors in `params`, and those tensors."""
    if not isinstance(params, tuple | list):
        raise TypeError(f"params: expected a tuple of tensors, got {type(params).__name__}")
    leaves, spec = pytree.tree_flatten(tuple(params))
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"params: expected a tuple of tensors (or pytrees of them), got {type(leaf).__name__} in it")
    if not leaves or all(isinstance(p, Tensor) for p in params):
        return A, tuple(leaves)
    return (lambda v, *flat: A(v, *pytree.tree_unflatten(flat, spec))), tuple(leaves)


def square_operator(A: Any, params: tuple[Tensor, ...]) -> LinearOperator:
    """`A` as an operator; with params, its `fn` takes them after the vector."""
    if params and (not callable(A) or isinstance(A, Tensor | LinearOperator)):
        raise TypeError(f"params: needs A as a function A(v, *params), got {type(A).__name__}")
    operator = aslinearoperator(A)
    if isinstance(operator, DenseOperator | SparseOperator):
        m, n = operator.matrix.shape[-2:]
        if m != n:
            raise ValueError(f"A: expected a square matrix, got shape {tuple(operator.matrix.shape)}; lstsq takes any shape")
    elif operator.codomain is not None and not spaces.agree(operator.domain, operator.codomain):
        between = f"from {spaces.shapes(operator.domain)} to {spaces.shapes(operator.codomain)}"
        raise ValueError(f"A: expected a square operator, got {operator.expression} {between}; lstsq takes any shape")
    return operator


def right_hand_side(operator: LinearOperator, b: Tree, batch_dims: Any) -> tuple[Tree, int]:
    """`b`, checked, promoted and broadcast as a Tensor `A` asks, and its number of batch dimensions."""
    batch_dims = check_integer("batch_dims", batch_dims)
    leaves, spec = pytree.tree_flatten(b)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        wrong = next((type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)), "an empty tree")
        remedy = "; use torch.from_numpy" if wrong == "ndarray" else ""
        raise TypeError(f"b: expected a Tensor or a pytree of Tensors, got {wrong}{remedy}")
    first = leaves[0]
    for leaf in leaves:
        if type(leaf).__name__ == "DTensor":  # torch 2.13 reads a scalar of one as the part that this process has
            raise TypeError("b: expected a plain Tensor, got a DTensor; sharded vectors are not supported yet")
        if leaf.layout != torch.strided:
            raise ValueError(f"b: expected a dense tensor, got layout {leaf.layout}")
        if real_dtype(leaf.dtype) not in DEFAULT_RTOL:
            raise ValueError(f"b: expected a floating-point or complex dtype, got {leaf.dtype}")
        if leaf.dtype != first.dtype or leaf.device != first.device:
            raise ValueError(
                f"b: expected one dtype and device in all leaves, got {first.dtype} on {first.device} and {leaf.dtype} on "
                f"{leaf.device}"
            )
        if not 0 <= batch_dims <= leaf.ndim:
            raise ValueError(f"batch_dims: expected 0 to {leaf.ndim} for b of shape {tuple(leaf.shape)}, got {batch_dims}")
        if leaf.shape[:batch_dims] != first.shape[:batch_dims]:
            raise ValueError(
                f"b: expected the same {batch_dims} batch dimensions in all leaves, got {tuple(first.shape[:batch_dims])} and "
                f"{tuple(leaf.shape[:batch_dims])}"
            )
    if not isinstance(operator, DenseOperator | SparseOperator):
        check_structure("b", b, operator.codomain)
        return _promoted(b, operator.codomain), batch_dims

    matrix = operator.matrix
    if not spec.is_leaf():
        raise TypeError(f"b: expected one Tensor for a Tensor A, got {type(b).__name__}")
    m = matrix.shape[-2]
    if first.ndim < 1 or first.shape[-1] != m:
        remedy = "; right-hand sides are rows here: b.mT" if first.ndim == 2 and first.shape[0] == m else ""
        expected = f"(..., {m}) for A of shape {tuple(matrix.shape)}"
        raise ValueError(f"b: expected shape {expected}, got {tuple(first.shape)}{remedy}")
    if matrix.device != first.device:
        raise ValueError(f"b: expected device {matrix.device} like A, got {first.device}")
    if real_dtype(matrix.dtype) != real_dtype(first.dtype):
        raise ValueError(f"b: expected a dtype of the precision of A, {matrix.dtype}, got {first.dtype}")
    if matrix.dtype.is_complex and not first.is_complex():
        first = first.to(matrix.dtype)
    try:
        batch = torch.broadcast_shapes(matrix.shape[:-2], first.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"b: its batch dimensions {tuple(first.shape[:-1])} do not broadcast with those of A, {tuple(matrix.shape[:-2])}"
        ) from None
    if batch_dims not in (0, len(batch)):
        raise ValueError(f"batch_dims: a Tensor A and b have {len(batch)} batch dimensions, got batch_dims={batch_dims}")
    return first.expand(*batch, m), len(batch)


def _promoted(b: Tree, space: Tree) -> Tree:
    """`b`, complex where the space is; its precision and device are to be those that an operator with tensors has."""
    if space is None:
        return b

    def promoted(leaf: Tensor, like: Any) -> Tensor:
        example = like.example if isinstance(like, spaces.AnyBatch) else like
        if isinstance(like, spaces.AnyBatch):
            if example.device != leaf.device:
                raise ValueError(f"b: expected device {example.device} like A, got {leaf.device}")
            if real_dtype(example.dtype) != real_dtype(leaf.dtype):
                raise ValueError(f"b: expected a dtype of the precision of A, {example.dtype}, got {leaf.dtype}")
        return leaf.to(leaf.dtype.to_complex()) if example.is_complex() and not leaf.is_complex() else leaf

    leaves = pytree.tree_structure(space).flatten_up_to(b)
    flat = [promoted(leaf, like) for leaf, like in zip(leaves, pytree.tree_leaves(space), strict=True)]
    return pytree.tree_unflatten(flat, pytree.tree_structure(space))


def guess_leaves(name: str, layout: Layout, x: Tree) -> list[Tensor]:
    """The leaves of an argument that is like the solution, checked, in the solution's dtype.

    Raises:
        TypeError: if it has not the structure of the solution.
        ValueError: for a wrong shape, dtype or device.
    """
    leaves = layout.leaves(x)
    if leaves is None or not all(isinstance(leaf, Tensor) for leaf in leaves):
        got = pytree.tree_map(lambda leaf: type(leaf).__name__, x)
        raise TypeError(f"{name}: expected the structure of the solution, {layout.spec}, of Tensors, got {got}")
    for leaf, shape in zip(leaves, layout.shapes, strict=True):
        if leaf.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got layout {leaf.layout}")
        if leaf.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)} like the solution, got {tuple(leaf.shape)}")
        if leaf.dtype != layout.dtype and not (layout.dtype.is_complex and leaf.dtype == real_dtype(layout.dtype)):
            raise ValueError(f"{name}: expected dtype {layout.dtype} like the solution, got {leaf.dtype}")
    return [leaf.to(layout.dtype) for leaf in leaves]


def _guess(layout: Layout, x0: Tree, vector: Tensor) -> Tensor:
    """The initial guess as a vector, checked against the solution's structure."""
    leaves = guess_leaves("x0", layout, x0)
    for leaf in leaves:
        if leaf.device != vector.device:
            raise ValueError(f"x0: expected device {vector.device} like b, got {leaf.device}")
    return layout.pack(pytree.tree_unflatten(leaves, layout.spec))


def _adjoint_options(adjoint: Any) -> Mapping[str, Any]:
    if adjoint is None:
        return {}
    if not isinstance(adjoint, Mapping):
        raise TypeError(f"adjoint: expected a dict of options or None, got {type(adjoint).__name__}")
    for name in adjoint:
        if name not in ADJOINT_OPTIONS:
            raise TypeError(f"adjoint: unknown option {name!r}{nearest(str(name), ADJOINT_OPTIONS)}")
    return adjoint


def _preconditioner(name: str, M: Any, x: Tree) -> LinearOperator:
    """The preconditioner as an operator, checked against a vector of the solution's structure."""
    try:
        operator = aslinearoperator(M)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("A:", f"{name}:", 1)) from None
    if isinstance(operator, DenseOperator | SparseOperator):
        matrix, vector = operator.matrix, pytree.tree_leaves(x)[0]
        n = vector.shape[-1] if vector.ndim else 1
        if matrix.shape[-2:] != (n, n):
            raise ValueError(f"{name}: expected a matrix of shape ({n}, {n}), got {tuple(matrix.shape)}")
        if matrix.dtype not in (vector.dtype, real_dtype(vector.dtype)):
            raise ValueError(f"{name}: expected dtype {vector.dtype} like b, got {matrix.dtype}")
        if matrix.device != vector.device:
            raise ValueError(f"{name}: expected device {vector.device} like b, got {matrix.device}")
    elif operator.domain is not None and not spaces.agree(operator.domain, x):
        got = spaces.shapes(operator.domain)
        raise ValueError(f"{name}: expected an operator on vectors {spaces.shapes(x)} like b, got one on {got}")
    return operator


def _flat(
    name: str, operator: LinearOperator, layout: Layout, codomain: Layout | None = None, with_params: bool = False
) -> LinearOperator:
    """The operator on packed vectors, which checks that a tree comes back with the structure that is due.

    Args:
        name: of the operator, for messages.
        operator: on trees.
        layout: of its domain.
        codomain: that of its codomain, by default the same.
        with_params: whether the function takes tensors after the vector.
    """
    codomain = layout if codomain is None else codomain
    if layout.single and codomain.single:
        return operator

    def packed(apply: Callable[..., Tree], source: Layout, target: Layout) -> Callable[..., Tensor]:
        def function(v: Tensor, *params: Tensor) -> Tensor:
            x = source.unpack(v)
            y = apply(x, *params)
            leaves = target.leaves(y)
            if leaves is None:
                got = pytree.tree_structure(y)
                what = "v" if source is target else "b"
                raise TypeError(f"{name}: expected {name}(v) to have the structure of {what}, {target.spec}, got {got}")
            # what a leaf has to be like, in no memory of its own
            blank = v.new_zeros((), dtype=target.dtype).expand(*v.shape[: source.batch_dims], *target.vector_shape)
            due = pytree.tree_leaves(x if source is target else target.unpack(blank))
            for leaf, like in zip(leaves, due, strict=True):
                check_result(name, like, leaf)
            return target.pack(pytree.tree_unflatten(leaves, target.spec))

        return function

    adjoint = packed(operator.apply_adjoint, codomain, layout) if operator.has_adjoint else None
    flat = LinearOperator(packed(operator.fn if with_params else operator.apply, layout, codomain), adjoint=adjoint)
    flat.claims = operator.claims
    return flat


def _flat_factors(factors: Factorisation | None, layout: Layout) -> Factorisation | None:
    """The factorisation on packed vectors."""
    if factors is None or layout.single:
        return factors

    def packed(solve: Callable[[Tree], Tree]) -> Callable[[Tensor], Tensor]:
        return lambda r: layout.pack(pytree.tree_unflatten(layout.leaves(solve(layout.unpack(r))) or [], layout.spec))

    return Factorisation(packed(factors.solve), packed(factors.solve_adjoint))


def _recorded(
    name: str, apply: Callable[..., Tensor], vector: Tensor, target: Layout, params: Sequence[Tensor] = ()
) -> Closure:
    """The closure of `apply` on vectors like `vector`, whose result is checked here; the loop checks every later one."""

    def checked(v: Tensor, *params: Tensor) -> Tensor:
        y = apply(v, *params)
        check_result(name, v, y, target.zero(v, target.batch_dims))  # made inside: to read a tensor from outside records it
        return y

    return replace(Closure.record(checked, vector, params), function=apply)


def _side_closure(name: str, apply: Callable[[Tensor], Tensor], vector: Tensor, target: Layout, *, record: bool) -> Closure:
    """A closure without derivatives (an adjoint, a preconditioner): recorded only where transforms hide its tensors."""
    if not record:
        return Closure(apply)
    closure = _recorded(name, apply, vector, target)
    return replace(closure, versions=(-1,) * len(closure.order))


def _adjoint_closure(
    operator: LinearOperator,
    flat: LinearOperator,
    batch_dims: int,
    side: Callable[..., Closure],
    vector: Tensor,
    target: Layout,
) -> Closure | None:
    """`v -> A^H v` where it is written down; None where autograd is to derive it, or `A` itself serves."""
    if operator.hermitian or not flat.has_adjoint:
        return None
    if isinstance(operator, DenseOperator):
        with torch.autograd.forward_ad._set_fwd_grad_enabled(False):
            return MatrixClosure.of(operator.matrix.detach().mH, batch_dims)
    return side("A", flat.apply_adjoint, vector, target)
