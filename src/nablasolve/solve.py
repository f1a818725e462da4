"""The front door: `solve`, `solve_ex`, and the functions with SciPy's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import certify, derivative
from .arguments import names_options
from .closure import eager, is_wrapped, transforms_active
from .drive import run, solve_concretely
from .info import Column, ConvergenceError, SolveInfo, converged, read_report
from .least_squares import pose_least_squares
from .methods import CG, CGLS, GMRES, LSMR, LSQR, MINRES, BiCGStab, Method
from .operators.algebra import map_leaves
from .pose import Policy, Posed, pose
from .problem import Problem
from .vectors import any_true, own_precision

Tree = Any  # a tensor, or a pytree (tuple, list, dict) of tensors


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
    nullspace: Any = None,
    left_nullspace: Any = None,
    gauge: tuple[Any, Any] | None = None,
    grad: str = "implicit",
    adjoint: Mapping[str, Any] | None = None,
    on_failure: str = "raise",
    callback: Callable[[Any], Any] | None = None,
    progress: bool = False,
    history: bool = False,
    check_every: int | None = None,
    compile: bool = False,
) -> Tree:
    """Solve the square linear system `A x = b`, with exact derivatives to `b` and to everything that `A` depends on.

    Args:
        A: `v -> A v`. A callable or `nn.Module` that maps a vector to a vector of the same shape and dtype; a dense Tensor
            of shape `(..., n, n)`; a sparse Tensor `(n, n)` in any layout; or a `LinearOperator`. It may depend on any
            tensors (closed over, attributes, parameters, non-leaf): gradients reach them without being declared.
        b: the right-hand side, a floating-point or complex tensor of any shape or a pytree of such tensors of one dtype. All
            of it is one vector, but for its batch dimensions.
        method: `"cg"`, `"minres"`, `"gmres"`, `"bicgstab"`, `"direct"`, a least-squares method of `lstsq` (for a square `A`
            that may be singular), or an object such as `GMRES(restart=50)`. None chooses
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
        nullspace: of a singular `A`: a vector with the structure of `x`, a list of such vectors, or an operator or function
            that projects onto it. The solution is then the shortest one, `A^+ b`, and its derivative the right one, also where
            the nullspace moves with `A`. An operator that knows its own (`A.nullspace`) need not be told.
        left_nullspace: that of `A^H`, likewise; by default the same where `A` is Hermitian. A `b` with a part in it is
            INCONSISTENT.
        gauge: `(c, g)`, a vector (or a list of as many vectors as the nullspace has dimensions) and a number or tensor, for
            the solution with `c^H x = g` in the place of the shortest one.
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
        check_every: after how many steps the host looks whether any system still runs. None chooses: 1 on the CPU; on a GPU
            up to 10, one check late and without waiting. A system that has converged is frozen, so that the solution and
            `iterations` do not depend on it, while `matvecs` counts the steps in vain. A `callback`, `history` and `progress`
            see every step.
        compile: compile each step with the products in it as one (`torch.compile`), forward and adjoint. The first solve
            takes seconds more; later ones with the same code, shapes and dtypes, though with other tensors, do not. The
            results are the same to rounding. Of GMRES, whose steps differ, the products alone are compiled; a direct method
            has no steps. Where `A` cannot be compiled a `CompileWarning` says why, and the solve runs eagerly.

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
        A, b, method=method, M=M, x0=x0, rtol=rtol, atol=atol, maxiter=maxiter, batch_dims=batch_dims, params=params,
        nullspace=nullspace, left_nullspace=left_nullspace, gauge=gauge, grad=grad, adjoint=adjoint, on_failure=on_failure,
        on_adjoint_failure=on_failure, callback=callback, progress=progress, history=history,
        check_every=check_every, compile=compile,
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
    nullspace: Any = None,
    left_nullspace: Any = None,
    gauge: tuple[Any, Any] | None = None,
    grad: str = "implicit",
    adjoint: Mapping[str, Any] | None = None,
    on_failure: str = "warn",
    callback: Callable[[Any], Any] | None = None,
    progress: bool = False,
    history: bool = False,
    check_every: int | None = None,
    compile: bool = False,
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
        A, b, method=method, M=M, x0=x0, rtol=rtol, atol=atol, maxiter=maxiter, batch_dims=batch_dims, params=params,
        nullspace=nullspace, left_nullspace=left_nullspace, gauge=gauge, grad=grad, adjoint=adjoint, on_failure="ignore",
        on_adjoint_failure=on_failure, callback=callback, progress=progress, history=history,
        check_every=check_every, compile=compile,
    )  # fmt: skip


@names_options
def lstsq(
    A: Any,
    b: Tree,
    *,
    damp: Any = 0.0,
    weight: Tree = None,
    x_ref: Tree = None,
    domain: Tree = None,
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
    check_every: int | None = None,
    compile: bool = False,
) -> Tree:
    """Solve `min |A x - b|^2 + damp^2 |x|^2` for an `A` of any shape and rank, with exact derivatives.

    Of several minimisers it is the one of minimum norm, `A^+ b`. Gradients reach `b`, everything that `A` depends on, `damp`,
    `weight` and `x_ref`. They are right for every rank, as long as it stays the same nearby: where the rank of `A` changes,
    the solution jumps, which `damp` prevents.

    Args:
        A: as for `solve`, and of any shape: `(..., m, n)` for a Tensor. A claim `full_rank=True` (`aslinearoperator(A,
            full_rank=True)`) spares the derivative what it would else have to find out.
        b: the right-hand side, as for `solve`.
        damp: λ, a real number or a real tensor, 0-d or of the batch shape; or a pair `(λ, L)` of it and an operator or matrix,
            for the term `λ^2 |L x|^2`.
        weight: of the data, `sum_i weight_i |(A x - b)_i|^2`: real tensors of at least 0 that broadcast to `b`, the
            reciprocals of the variances. A whole weighting matrix goes into `A` and `b` by its factor.
        x_ref: a prior centre with the structure of `x`: the damping is of `x - x_ref`, and of several minimisers it is the one
            nearest to `x_ref`.
        domain: an example of `x` (tensor or pytree, batch dimensions included), where `A` is a bare function; only its
            structure is read, and whether it is complex. By default that of `x0`.
        method: `"lsmr"`, `"lsqr"`, `"cgls"`, `"craig"` (consistent systems), `"minres_qlp"` (Hermitian `A`), for a dense Tensor
            `"svd"` or `"qr"` (full rank), or a method object. None chooses `"svd"` for a dense Tensor and LSMR for
            everything else.
        M: a preconditioner, Hermitian positive definite, `M(s) ≈ (A^H A + damp^2)^{-1} s`, for a problem of full column rank.
        x0: an initial guess. Its derivative is zero. It is not used where `A` has fewer rows than columns and there is no
            damping; in a problem without damping whose rank is smaller than it has columns, what it has of the nullspace stays.
        rtol: stop when `|b - A x| <= max(rtol |b|, atol)` (CONVERGED) or `|A^H r| <= rtol |A| |r|` (LEAST_SQUARES), with the
            damping as further rows of `A`, and an estimate of `|A|` that grows to its Frobenius norm.
        atol: as for `solve`.
        maxiter: as for `solve`.
        batch_dims: as for `solve`.
        params: as for `solve`.
        grad: as for `solve`.
        adjoint: as for `solve`.
        on_failure: as for `solve`.
        callback: as for `solve`.
        progress: as for `solve`.
        history: as for `solve`.
        check_every: as for `solve`.
        compile: as for `solve`.

    Returns:
        The minimiser, with the structure of `domain`.

    Raises:
        ConvergenceError: if a system meets neither test, under `on_failure="raise"`.
        TypeError: for an argument of the wrong type or an unknown option.
        ValueError: for a wrong shape, dtype, device or value, or a domain that cannot be known.
        RuntimeError: if `A` depends on a tensor that needs a gradient and cannot be found.

    Source: Paige & Saunders 1982 (the tests); Golub & Pereyra 1973 (the derivative of a pseudo-inverse).
    """
    x, _ = lstsq_with_record(
        A, b, damp=damp, weight=weight, x_ref=x_ref, domain=domain, method=method, M=M, x0=x0, rtol=rtol, atol=atol,
        maxiter=maxiter, batch_dims=batch_dims, params=params, grad=grad, adjoint=adjoint, on_failure=on_failure,
        on_adjoint_failure=on_failure, callback=callback, progress=progress, history=history,
        check_every=check_every, compile=compile,
    )  # fmt: skip
    return x


@names_options
def lstsq_ex(
    A: Any,
    b: Tree,
    *,
    damp: Any = 0.0,
    weight: Tree = None,
    x_ref: Tree = None,
    domain: Tree = None,
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
    check_every: int | None = None,
    compile: bool = False,
) -> tuple[Tree, SolveInfo]:
    """`lstsq` that returns `(x, info)` and neither raises nor warns when the forward solve does not converge.

    Args: those of `lstsq`. `on_failure` governs the adjoint solve only, and is `"warn"` by default.

    Returns:
        The minimiser or the last iterate that made sense, and its `SolveInfo`, with `norm_r`, `norm_Ar`, `norm_A`, `cond_A` and
        `norm_x`.

    Raises:
        TypeError: for an argument of the wrong type or an unknown option.
        ValueError: for a wrong shape, dtype, device or value, or a domain that cannot be known.
        RuntimeError: if `A` depends on a tensor that needs a gradient and cannot be found.
    """
    return lstsq_with_record(
        A, b, damp=damp, weight=weight, x_ref=x_ref, domain=domain, method=method, M=M, x0=x0, rtol=rtol, atol=atol,
        maxiter=maxiter, batch_dims=batch_dims, params=params, grad=grad, adjoint=adjoint, on_failure="ignore",
        on_adjoint_failure=on_failure, callback=callback, progress=progress, history=history,
        check_every=check_every, compile=compile,
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


@names_options
def lsmr(
    A: Any,
    b: Tree,
    x0: Tree = None,
    *,
    damp: Any = 0.0,
    domain: Tree = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = None,
    callback: Callable[[Any], Any] | None = None,
) -> tuple[Tree, SolveInfo]:
    """LSMR for least squares of any shape and rank, with SciPy's name; differentiable.

    Args and errors: those of `lstsq_ex`.

    Returns:
        `(x, info)`.

    Source: Fong & Saunders 2011.
    """
    return lstsq_ex(
        A, b, damp=damp, domain=domain, method=LSMR(), x0=x0, rtol=rtol, atol=atol, maxiter=maxiter, M=M, callback=callback
    )


@names_options
def lsqr(
    A: Any,
    b: Tree,
    x0: Tree = None,
    *,
    damp: Any = 0.0,
    domain: Tree = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = None,
    callback: Callable[[Any], Any] | None = None,
) -> tuple[Tree, SolveInfo]:
    """LSQR for least squares of any shape and rank, with SciPy's name; differentiable.

    Args and errors: those of `lstsq_ex`.

    Returns:
        `(x, info)`.

    Source: Paige & Saunders 1982.
    """
    return lstsq_ex(
        A, b, damp=damp, domain=domain, method=LSQR(), x0=x0, rtol=rtol, atol=atol, maxiter=maxiter, M=M, callback=callback
    )


@names_options
def cgls(
    A: Any,
    b: Tree,
    x0: Tree = None,
    *,
    damp: Any = 0.0,
    domain: Tree = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = None,
    callback: Callable[[Any], Any] | None = None,
) -> tuple[Tree, SolveInfo]:
    """Conjugate gradients on the normal equations, for least squares of any shape and rank; differentiable.

    Args and errors: those of `lstsq_ex`.

    Returns:
        `(x, info)`.

    Source: Hestenes & Stiefel 1952; Björck 1996, §7.4.
    """
    return lstsq_ex(
        A, b, damp=damp, domain=domain, method=CGLS(), x0=x0, rtol=rtol, atol=atol, maxiter=maxiter, M=M, callback=callback
    )


# -- from a problem to its solution ------------------------------------------------------------------------------------


@eager
@own_precision()
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
    nullspace: Any = None,
    left_nullspace: Any = None,
    gauge: tuple[Any, Any] | None = None,
    grad: str = "implicit",
    adjoint: Mapping[str, Any] | None = None,
    on_failure: str = "raise",
    on_adjoint_failure: str = "raise",
    callback: Callable[[Any], Any] | None = None,
    progress: bool = False,
    history: bool = False,
    check_every: int | None = None,
    compile: bool = False,
) -> tuple[Tree, SolveInfo]:
    """`solve` with its record, and with a failure policy for each pass: what every public function calls."""
    policy = Policy(
        method,
        M,
        x0,
        rtol,
        atol,
        maxiter,
        grad,
        adjoint,
        on_failure,
        on_adjoint_failure,
        callback,
        progress,
        history,
        check_every,
        compile,
    )
    return solved(
        pose(
            A,
            b,
            policy,
            batch_dims=batch_dims,
            params=params,
            nullspace=nullspace,
            left_nullspace=left_nullspace,
            gauge=gauge,
        ),
        policy,
    )


@eager
@own_precision()
def lstsq_with_record(
    A: Any,
    b: Tree,
    *,
    damp: Any,
    weight: Tree,
    x_ref: Tree,
    domain: Tree,
    method: str | Method[Any] | None,
    M: Any,
    x0: Tree,
    rtol: float | None,
    atol: float,
    maxiter: int | None,
    batch_dims: int,
    params: Sequence[Any],
    grad: str,
    adjoint: Mapping[str, Any] | None,
    on_failure: str,
    on_adjoint_failure: str,
    callback: Callable[[Any], Any] | None,
    progress: bool,
    history: bool,
    check_every: int | None,
    compile: bool,
) -> tuple[Tree, SolveInfo]:
    """`lstsq` with its record, and with a failure policy for each pass."""
    policy = Policy(
        method,
        M,
        x0,
        rtol,
        atol,
        maxiter,
        grad,
        adjoint,
        on_failure,
        on_adjoint_failure,
        callback,
        progress,
        history,
        check_every,
        compile,
    )
    asked = pose_least_squares(
        A, b, policy, damp=damp, weight=weight, x_ref=x_ref, domain=domain, batch_dims=batch_dims, params=params
    )
    try:
        solution, info = solved(asked.posed, policy)
    except ConvergenceError as error:
        error.x = map_leaves(torch.Tensor.detach, asked.minimiser(error.x))
        raise
    asked.adjust(solution, info, policy.atol)
    x = asked.minimiser(solution)
    return (map_leaves(torch.Tensor.detach, x) if grad == "none" else x), info


def solved(posed: Posed, policy: Policy) -> tuple[Tree, SolveInfo]:
    """The solution of a problem, as the tree that the user asked for, and its record."""
    problem, vector, guess, differentiate, gauge = posed
    given = problem.recorded
    if policy.grad == "none":
        vector, given = vector.detach(), tuple(t.detach() for t in given)
    if differentiate and policy.grad == "unroll":
        x, report, past = _unrolled(problem, vector, guess, given)
    elif transforms_active() or differentiate:
        count = len(problem.operator.recorded)  # only the operator's own tensors have derivatives
        given = (*given[:count], *(t.detach() for t in given[count:]))
        x, report, past = derivative.solve(problem, vector, guess, given)
    else:
        outcome = solve_concretely(problem, vector, guess, given, ())
        x, report, past = outcome.x, outcome.report, outcome.history
    if gauge is not None:
        x = derivative.in_gauge(problem, x, gauge, given)
        x = x.detach() if policy.grad == "none" else x
    mapped = is_wrapped(report)
    if mapped and report.ndim == 1 and not _is_batched(report):
        report, past, mapped = _unwrapped(report), _unwrapped(past), False
    kept_history = past.movedim(-1, 0) if policy.history else None
    method = problem.records[-1].method if problem.records else problem.forward.method.name
    info = read_report(report, kept_history, method, problem.adjoint_records, mapped, problem.least_squares)
    return problem.solution_layout.unpack(x), info


def _unrolled(problem: Problem, b: Tensor, x0: Tensor | None, given: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Plain autograd through the loop; the failure policy is applied here, since no `Function` does it."""
    outcome = run(problem, b, x0, given, unroll=True)
    policy, report = problem.forward.on_failure, outcome.report.detach()
    if policy != "ignore" and any_true(~converged(report[..., Column.STATUS], problem.least_squares)):
        name, mapped = problem.forward.method.name, is_wrapped(report)
        info = read_report(report, None, name, problem.adjoint_records, mapped, problem.least_squares)
        certify.enforce(policy, "forward", problem.solution_layout.unpack(outcome.x.detach()), info)
    return outcome.x, outcome.report, outcome.history


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
