"""The front door: `solve`, `solve_ex`, and the functions with SciPy's names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import certify, derivative
from .closure import Closure, MatrixClosure, is_wrapped, transforms_active
from .drive import check_result, run, solve_concretely
from .info import SolveInfo, Status, read_report
from .methods import CG, GMRES, METHODS, MINRES, BiCGStab, Direct, Method
from .operators import DenseOperator, LinearOperator, SparseOperator, aslinearoperator
from .operators.base import check_structure
from .problem import (
    DEFAULT_RTOL,
    Options,
    Problem,
    check_choice,
    check_integer,
    check_maxiter,
    check_tolerance,
    nearest,
)
from .vectors import Layout, any_true, real_dtype

F = TypeVar("F", bound=Callable[..., Any])
Tree = Any  # a tensor, or a pytree (tuple, list, dict) of tensors

ON_FAILURE = ("raise", "warn", "ignore")
GRAD = ("implicit", "unroll", "none")
ADJOINT_OPTIONS = ("rtol", "maxiter", "method", "M")


def names_options(function: F) -> F:
    """Make an unknown keyword a TypeError that names the nearest known one."""
    known = [
        p.name for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY or p.default is not p.empty
    ]
    accepted = set(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in accepted:
                raise TypeError(f"{function.__name__}: unknown option {name!r}{nearest(name, known)}")
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


@names_options
def solve(
    A: Any,
    b: Tree,
    *,
    method: str | Method[Any] | None = None,
    M: Any = None,
    x0: Tree = None,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    batch_dims: int = 0,
    params: Sequence[Any] = (),
    grad: str = "implicit",
    adjoint: Mapping[str, Any] | None = None,
    on_failure: str = "raise",
    callback: Callable[[Any], Any] | None = None,
    progress: bool = False,
    history: bool = False,
) -> Tree:
    """Solve the square linear system `A x = b`, with exact derivatives to `b` and to everything that `A` depends on.

    Args:
        A: `v -> A v`. A callable or `nn.Module` that maps a vector to a vector of the same shape and dtype; a dense Tensor
            of shape `(..., n, n)`; a sparse Tensor `(n, n)` in any layout; or a `LinearOperator`. It may depend on any
            tensors (closed over, attributes, parameters, non-leaf): gradients reach them without being declared.
        b: the right-hand side, a floating-point or complex tensor of any shape or a pytree of such tensors of one dtype. All
            of it is one vector, but for its batch dimensions.
        method: `"cg"`, `"minres"`, `"gmres"`, `"bicgstab"`, `"direct"`, or an object such as `GMRES(restart=50)`. None chooses
            from what is known: a dense Tensor is factorised (`"direct"`), the claim positive definite selects CG, Hermitian
            MINRES, and anything else GMRES. Asking for `"cg"` claims that `A` is Hermitian positive definite, for
            `"minres"` that it is Hermitian.
        M: a preconditioner, `M(r) ≈ A^{-1} r`: a callable, `nn.Module`, Tensor or `LinearOperator`. The adjoint solve uses
            `M^H`. Its derivative is zero.
        x0: an initial guess with the structure and shape of the solution. Its derivative is zero.
        rtol: stop when `|b - A x| <= max(rtol |b|, atol)`. `rtol=None` is 1e-8 for 64-bit and 1e-5 for 32-bit dtypes. The
            adjoint solve uses the same `rtol`, relative to its own right-hand side, and never `atol`.
        atol: the absolute tolerance in that rule, in the units of `b`.
        maxiter: the largest number of iterations, by default `10 n`; GMRES counts inner steps.
        batch_dims: how many leading dimensions of `b` count independent systems, each with its own step sizes, stopping
            and status. For a Tensor `A` it is `b.ndim - 1` after broadcasting.
        params: tensors, or pytrees of tensors, that `A` is called with, `A(v, *params)`: the remedy where a dependency cannot
            be found.
        grad: `"implicit"`, the derivative of the solution of the equation; `"unroll"`, the derivative of the iteration that was
            run, by plain autograd through the loop; `"none"`. Unrolling is for learning an early-stopped solver. It is not the
            gradient of the solution, however small the residual: for `A = diag(1, 1, 2)` and `b = (1, 2, 3)`, CG finds the
            solution in two steps, and the derivative of the loss `x @ (1, -1, 0.5)` with respect to the diagonal comes out as
            `(-0.4, 1.4, -0.375)`, where the truth is `(-1, 2, -0.375)`.
        adjoint: options of the adjoint solve that differ from the forward ones: `dict(rtol=, maxiter=, method=, M=)`. Here
            `M(r) ≈ A^{-H} r`.
        on_failure: `"raise"` a `ConvergenceError`, `"warn"` with a `ConvergenceWarning`, or `"ignore"`; for the forward solve
            and for the adjoint solve in the backward pass.
        callback: `callback(state)` once an iteration, with `state.iteration`, `state.residual_norm` and `state.phase`; a
            true return stops the solve, which then has not converged.
        progress: show a tqdm bar.
        history: keep the residual norms in the record.

    Returns:
        The solution, with the structure and shape of `b`.

    Raises:
        ConvergenceError: if a system does not reach its tolerance, under `on_failure="raise"`.
        TypeError: for an argument of the wrong type or an unknown option.
        ValueError: for a wrong shape, dtype, device or value.
        RuntimeError: if `A` depends on a tensor that needs a gradient and cannot be found.

    Source: the matrix-free differentiable solver of Lai et al., "∇-Prox", SIGGRAPH 2023; the methods name theirs.
    """
    x, _ = solve_with_record(
        A, b, method=method, M=M, x0=x0, rtol=rtol, atol=atol, maxiter=maxiter, batch_dims=batch_dims, params=params, grad=grad,
        adjoint=adjoint, on_failure=on_failure, on_adjoint_failure=on_failure, callback=callback, progress=progress,
        history=history,
    )  # fmt: skip
    return x


@names_options
def solve_ex(
    A: Any,
    b: Tree,
    *,
    method: str | Method[Any] | None = None,
    M: Any = None,
    x0: Tree = None,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    batch_dims: int = 0,
    params: Sequence[Any] = (),
    grad: str = "implicit",
    adjoint: Mapping[str, Any] | None = None,
    on_failure: str = "warn",
    callback: Callable[[Any], Any] | None = None,
    progress: bool = False,
    history: bool = False,
) -> tuple[Tree, SolveInfo]:
    """`solve` that returns `(x, info)` and neither raises nor warns when the forward solve does not converge.

    Args: those of `solve`. `on_failure` governs the adjoint solve only, and is `"warn"` by default.

    Returns:
        The solution or the last iterate that made sense, and its `SolveInfo`, whose `adjoint` is filled by the backward pass.

    Raises:
        TypeError: for an argument of the wrong type or an unknown option.
        ValueError: for a wrong shape, dtype, device or value.
        RuntimeError: if `A` depends on a tensor that needs a gradient and cannot be found.
    """
    return solve_with_record(
        A, b, method=method, M=M, x0=x0, rtol=rtol, atol=atol, maxiter=maxiter, batch_dims=batch_dims, params=params, grad=grad,
        adjoint=adjoint, on_failure="ignore", on_adjoint_failure=on_failure, callback=callback, progress=progress,
        history=history,
    )  # fmt: skip


@names_options
def cg(
    A: Any,
    b: Tree,
    x0: Tree = None,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = None,
    callback: Callable[[Any], Any] | None = None,
) -> tuple[Tree, SolveInfo]:
    """Conjugate gradients for Hermitian positive definite `A`, with SciPy's argument names; differentiable.

    Args and errors: those of `solve_ex`.

    Returns:
        `(x, info)`.

    Source: Hestenes & Stiefel 1952.
    """
    return solve_ex(A, b, method=CG(), x0=x0, rtol=rtol, atol=atol, maxiter=maxiter, M=M, callback=callback)


@names_options
def minres(
    A: Any,
    b: Tree,
    x0: Tree = None,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = None,
    callback: Callable[[Any], Any] | None = None,
) -> tuple[Tree, SolveInfo]:
    """MINRES for Hermitian `A`, definite or not, with SciPy's argument names; differentiable.

    Args and errors: those of `solve_ex`.

    Returns:
        `(x, info)`.

    Source: Paige & Saunders 1975.
    """
    return solve_ex(A, b, method=MINRES(), x0=x0, rtol=rtol, atol=atol, maxiter=maxiter, M=M, callback=callback)


@names_options
def gmres(
    A: Any,
    b: Tree,
    x0: Tree = None,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    restart: int = 20,
    maxiter: int | None = None,
    M: Any = None,
    callback: Callable[[Any], Any] | None = None,
) -> tuple[Tree, SolveInfo]:
    """Restarted GMRES for any square `A`, with SciPy's argument names; differentiable.

    Args and errors: those of `solve_ex`. `restart` is the length of a cycle; `maxiter` counts inner steps, where SciPy's
    counts cycles.

    Returns:
        `(x, info)`.

    Source: Saad & Schultz 1986.
    """
    method = GMRES(restart=restart)
    return solve_ex(A, b, method=method, x0=x0, rtol=rtol, atol=atol, maxiter=maxiter, M=M, callback=callback)


@names_options
def bicgstab(
    A: Any,
    b: Tree,
    x0: Tree = None,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = None,
    callback: Callable[[Any], Any] | None = None,
) -> tuple[Tree, SolveInfo]:
    """BiCGStab for any square `A`, with SciPy's argument names; differentiable.

    Args and errors: those of `solve_ex`.

    Returns:
        `(x, info)`.

    Source: van der Vorst 1992.
    """
    return solve_ex(A, b, method=BiCGStab(), x0=x0, rtol=rtol, atol=atol, maxiter=maxiter, M=M, callback=callback)


# -- from arguments to a problem ---------------------------------------------------------------------------------------


def solve_with_record(
    A: Any,
    b: Tree,
    *,
    method: str | Method[Any] | None = None,
    M: Any = None,
    x0: Tree = None,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    batch_dims: int = 0,
    params: Sequence[Any] = (),
    grad: str = "implicit",
    adjoint: Mapping[str, Any] | None = None,
    on_failure: str = "raise",
    on_adjoint_failure: str = "raise",
    callback: Callable[[Any], Any] | None = None,
    progress: bool = False,
    history: bool = False,
) -> tuple[Tree, SolveInfo]:
    """`solve` with its record, and with a failure policy for each pass: what every public function calls."""
    check_choice("grad", grad, GRAD)
    check_choice("on_failure", on_failure, ON_FAILURE)
    check_choice("on_failure", on_adjoint_failure, ON_FAILURE)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: expected a callable or None, got {type(callback).__name__}")
    for name, flag in (("progress", progress), ("history", history)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
    A, params = _with_flat_params(A, params)
    operator = _operator(A, params)
    b, batch_dims = _right_hand_side(operator, b, batch_dims)
    layout = Layout.of(b, batch_dims)
    vector = layout.pack(b)
    guess = None if x0 is None else _guess(layout, x0, vector)
    if guess is not None and grad != "unroll":
        guess = guess.detach()

    adjoint = _adjoint_options(adjoint)
    n = max(1, vector[(0,) * batch_dims].numel() if vector.numel() else 0)
    forward = Options(
        method=_method("method", method, operator, M),
        rtol=DEFAULT_RTOL[real_dtype(vector.dtype)] if rtol is None else check_tolerance("rtol", rtol),
        atol=check_tolerance("atol", atol),
        maxiter=check_maxiter("maxiter", maxiter, 10 * n),
        on_failure=on_failure,
    )
    # the adjoint of a claimed operator keeps the claim; a method that was asked for by name is inherited
    backward = replace(
        forward,
        method=_method("adjoint['method']", adjoint["method"], operator, M) if "method" in adjoint else forward.method,
        rtol=check_tolerance("adjoint['rtol']", adjoint["rtol"]) if adjoint.get("rtol") is not None else forward.rtol,
        maxiter=check_maxiter("adjoint['maxiter']", adjoint.get("maxiter"), forward.maxiter),
        atol=0.0,
        on_failure=on_adjoint_failure,
    )

    preconditioner = None if M is None else _flat("M", _preconditioner("M", M, vector), layout)
    other = adjoint.get("M")
    adjoint_preconditioner = None if other is None else _flat("M", _preconditioner("adjoint['M']", other, vector), layout)

    differentiate = grad != "none" and (torch.is_grad_enabled() or _forward_mode())
    active = transforms_active()
    record = active or (differentiate and grad == "implicit")
    flat = _flat("A", operator, layout, with_params=bool(params))
    recordings = 0
    if isinstance(operator, DenseOperator):
        main: Closure = MatrixClosure.of(operator.matrix, batch_dims)
    elif record:
        main = Closure.record(_checked("A", flat.fn if params else flat.apply), vector, params)
        recordings = main.runs
    else:
        main = Closure(flat.fn if params else flat.apply, params, declared=len(params))
    side = functools.partial(_side_closure, vector=vector, record=active)
    problem = Problem(
        operator=main,
        operator_adjoint=_adjoint_closure(operator, flat, batch_dims, side),
        user_adjoint=operator.has_user_adjoint,
        preconditioner=None if preconditioner is None else side("M", preconditioner.apply),
        preconditioner_adjoint=(
            side("M", preconditioner.apply_adjoint) if preconditioner is not None and preconditioner.has_adjoint else None
        ),
        adjoint_preconditioner=None if adjoint_preconditioner is None else side("M", adjoint_preconditioner.apply),
        hermitian=operator.hermitian or forward.method.hermitian,
        positive_definite=operator.positive_definite or forward.method.positive_definite,
        batch_dims=batch_dims,
        forward=forward,
        adjoint=backward,
        layout=layout,
        callback=callback,
        progress=progress,
        history=history,
        recordings=recordings,
    )
    given = problem.recorded
    if grad == "none":
        vector, given = vector.detach(), tuple(t.detach() for t in given)
    if differentiate and grad == "unroll":
        x, report, past = _unrolled(problem, vector, guess, given)
    elif active or differentiate:
        count = len(main.recorded)  # only the operator's own tensors have derivatives
        given = (*given[:count], *(t.detach() for t in given[count:]))
        x, report, past = derivative.solve(problem, vector, guess, given)
    else:
        outcome = solve_concretely(problem, vector, guess, given, ())
        x, report, past = outcome.x, outcome.report, outcome.history
    mapped = is_wrapped(report)
    if mapped and report.ndim == 1 and not _is_batched(report):
        report, past, mapped = _unwrapped(report), _unwrapped(past), False
    kept_history = past.movedim(-1, 0) if history else None
    info = read_report(report, kept_history, forward.method.name, problem.adjoint_records, mapped)
    return layout.unpack(x), info


def _unrolled(problem: Problem, b: Tensor, x0: Tensor | None, given: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Plain autograd through the loop; the failure policy is applied here, since no `Function` does it."""
    outcome = run(problem, b, x0, given, unroll=True)
    policy = problem.forward.on_failure
    if policy != "ignore" and any_true(outcome.report[..., 0] != Status.CONVERGED):
        mapped = is_wrapped(outcome.report)
        info = read_report(outcome.report.detach(), None, problem.forward.method.name, problem.adjoint_records, mapped)
        certify.enforce(policy, "forward", problem.layout.unpack(outcome.x.detach()), info)
    return outcome.x, outcome.report, outcome.history


def _with_flat_params(A: Any, params: Any) -> tuple[Any, tuple[Tensor, ...]]:
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


def _operator(A: Any, params: tuple[Tensor, ...]) -> LinearOperator:
    """`A` as an operator; with params, its `fn` takes them after the vector."""
    if params and (not callable(A) or isinstance(A, Tensor | LinearOperator)):
        raise TypeError(f"params: needs A as a function A(v, *params), got {type(A).__name__}")
    operator = aslinearoperator(A)
    if isinstance(operator, DenseOperator | SparseOperator):
        m, n = operator.matrix.shape[-2:]
        if m != n:
            raise ValueError(f"A: expected a square matrix, got shape {tuple(operator.matrix.shape)}")
    return operator.for_one_solve() if isinstance(operator, SparseOperator) else operator


def _right_hand_side(operator: LinearOperator, b: Tree, batch_dims: Any) -> tuple[Tree, int]:
    """`b`, checked, promoted and broadcast as a Tensor `A` asks, and its number of batch dimensions."""
    batch_dims = check_integer("batch_dims", batch_dims)
    leaves, spec = pytree.tree_flatten(b)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        wrong = next((type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)), "an empty tree")
        raise TypeError(f"b: expected a Tensor or a pytree of Tensors, got {wrong}")
    first = leaves[0]
    for leaf in leaves:
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
        check_structure("b", b, operator.domain)
        return b, batch_dims

    matrix = operator.matrix
    if not spec.is_leaf():
        raise TypeError(f"b: expected one Tensor for a Tensor A, got {type(b).__name__}")
    n = matrix.shape[-1]
    if first.ndim < 1 or first.shape[-1] != n:
        raise ValueError(f"b: expected shape (..., {n}) for A of shape {tuple(matrix.shape)}, got {tuple(first.shape)}")
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
    return first.expand(*batch, n), len(batch)


def _guess(layout: Layout, x0: Tree, vector: Tensor) -> Tensor:
    """The initial guess as a vector, checked against the solution's structure."""
    leaves = layout.leaves(x0)
    if leaves is None or not all(isinstance(leaf, Tensor) for leaf in leaves):
        got = pytree.tree_map(lambda leaf: type(leaf).__name__, x0)
        raise TypeError(f"x0: expected the structure of b, {layout.spec}, of Tensors, got {got}")
    for leaf, shape in zip(leaves, layout.shapes, strict=True):
        if leaf.shape != shape:
            raise ValueError(f"x0: expected shape {tuple(shape)} like the solution, got {tuple(leaf.shape)}")
        if leaf.device != vector.device:
            raise ValueError(f"x0: expected device {vector.device} like b, got {leaf.device}")
        if leaf.dtype != vector.dtype and not (vector.is_complex() and leaf.dtype == real_dtype(vector.dtype)):
            raise ValueError(f"x0: expected dtype {vector.dtype} like the solution, got {leaf.dtype}")
    return layout.pack(pytree.tree_unflatten(leaves, layout.spec)).to(vector.dtype)


def _adjoint_options(adjoint: Any) -> Mapping[str, Any]:
    if adjoint is None:
        return {}
    if not isinstance(adjoint, Mapping):
        raise TypeError(f"adjoint: expected a dict of options or None, got {type(adjoint).__name__}")
    for name in adjoint:
        if name not in ADJOINT_OPTIONS:
            raise TypeError(f"adjoint: unknown option {name!r}{nearest(str(name), ADJOINT_OPTIONS)}")
    return adjoint


def _method(name: str, method: Any, operator: LinearOperator, M: Any) -> Method[Any]:
    """The method object of a name, an object or None."""
    dense = isinstance(operator, DenseOperator)
    if method is None:
        if dense and M is None:
            return Direct(positive_definite_matrix=operator.positive_definite)
        if operator.positive_definite:
            return CG()
        return MINRES() if operator.hermitian else GMRES()
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"{name}: unknown method {method!r}{nearest(method, tuple(METHODS))}")
        method = Direct(positive_definite_matrix=operator.positive_definite) if method == "direct" else METHODS[method]()
    if not isinstance(method, Method):
        raise TypeError(f"{name}: expected a name or a method object such as GMRES(restart=50), got {type(method).__name__}")
    if isinstance(method, Direct):
        if not dense:
            raise ValueError(f"{name}: 'direct' needs A as a dense Tensor, got {operator!r}")
        if M is not None:
            raise ValueError("M: a direct method takes no preconditioner; choose an iterative method or leave M out")
    return method


def _preconditioner(name: str, M: Any, vector: Tensor) -> LinearOperator:
    try:
        operator = aslinearoperator(M)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("A:", f"{name}:", 1)) from None
    if isinstance(operator, DenseOperator | SparseOperator):
        matrix, n = operator.matrix, vector.shape[-1] if vector.ndim else 1
        if matrix.shape[-2:] != (n, n):
            raise ValueError(f"{name}: expected a matrix of shape ({n}, {n}), got {tuple(matrix.shape)}")
        if matrix.dtype not in (vector.dtype, real_dtype(vector.dtype)):
            raise ValueError(f"{name}: expected dtype {vector.dtype} like b, got {matrix.dtype}")
        if matrix.device != vector.device:
            raise ValueError(f"{name}: expected device {vector.device} like b, got {matrix.device}")
    return operator


def _flat(name: str, operator: LinearOperator, layout: Layout, with_params: bool = False) -> LinearOperator:
    """The operator on packed vectors, which checks that a tree comes back with the structure it had."""
    if layout.single:
        return operator

    def packed(apply: Callable[..., Tree]) -> Callable[..., Tensor]:
        def function(v: Tensor, *params: Tensor) -> Tensor:
            x = layout.unpack(v)
            y = apply(x, *params)
            leaves = layout.leaves(y)
            if leaves is None:
                got = pytree.tree_structure(y)
                raise TypeError(f"{name}: expected {name}(v) to have the structure of v, {layout.spec}, got {got}")
            for vx, vy in zip(pytree.tree_leaves(x), leaves, strict=True):
                check_result(name, vx, vy)
            return layout.pack(pytree.tree_unflatten(leaves, layout.spec))

        return function

    adjoint = packed(operator.apply_adjoint) if operator.has_adjoint else None
    flat = LinearOperator(packed(operator.fn if with_params else operator.apply), adjoint=adjoint)
    flat.claims = operator.claims
    return flat


def _checked(name: str, apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`apply`, whose result is checked when it is recorded; the loop checks every later one."""

    def function(v: Tensor, *params: Tensor) -> Tensor:
        y = apply(v, *params)
        check_result(name, v, y)
        return y

    return function


def _side_closure(name: str, apply: Callable[[Tensor], Tensor], *, vector: Tensor, record: bool) -> Closure:
    """A closure without derivatives (an adjoint, a preconditioner): recorded only where transforms hide its tensors."""
    if not record:
        return Closure(apply)
    closure = Closure.record(_checked(name, apply), vector)
    return replace(closure, versions=(-1,) * len(closure.order))


def _adjoint_closure(
    operator: LinearOperator, flat: LinearOperator, batch_dims: int, side: Callable[..., Closure]
) -> Closure | None:
    """`v -> A^H v` where it is written down; None where autograd is to derive it, or `A` itself serves."""
    if operator.hermitian or not flat.has_adjoint:
        return None
    if isinstance(operator, DenseOperator):
        with torch.autograd.forward_ad._set_fwd_grad_enabled(False):
            return MatrixClosure.of(operator.matrix.detach().mH, batch_dims)
    return side("A", flat.apply_adjoint)


def _forward_mode() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def _is_batched(tensor: Tensor) -> bool:
    while is_wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def _unwrapped(tensor: Tensor) -> Tensor:
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
