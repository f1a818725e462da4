"""The one derivative rule, for every shape and rank.

For `x = A(θ)^+ b` of locally constant rank, with `r = b - A x` and the dual `q = A^{+H} x`, Golub & Pereyra (1973) give

    dx = A^+ (db - dA x + A^{+H} dA^H r) + (I - A^+ A) dA^H q                       forward mode

and, for a loss `L` with cotangent `x̄ = ∂L/∂x` (PyTorch's convention: `dL = Re<x̄, dx>`), reverse mode is

    w = A^{+H} x̄,   p = x̄ - A^H w,   v = A^+ w,      b̄ = w,
    θ̄ = ∂/∂θ Re( -<w, A(θ) x> + <r, A(θ) v> + <q, A(θ) p> )                         with x, w, r, v, q, p held

that is one solve with the adjoint and at most three backward passes through one application of `A` each. The terms vanish
with `r` (where `A` reaches every `b`, as a regular square one does) and with `p` (where it has full column rank):
of a square system only the first is left, the matrix-free form of Lai et al., "∇-Prox", SIGGRAPH 2023. The rule
differentiates the *problem*, not the loop: nothing of the iteration is stored. It is written with this same differentiable
solve, on the attached solution, so it is right to every order and under every `torch.func` transform.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from . import certify
from .closure import transforms_active, transparent
from .drive import solve_concretely
from .graph import Run, is_differentiable, is_wrapped, level_of, tracks_beneath
from .info import Column, Status, converged, read_report
from .nullspaces import Gauge
from .problem import Problem
from .trace import as_one_operation
from .vectors import any_true, flatten, own_precision, precise_norm, probe

_functorch = torch._C._functorch

NO_SECOND_SPARSE_DERIVATIVE = (
    "A second derivative (create_graph=True, nested transforms) through a sparse Tensor A is not to be had: torch's own sparse "
    "tensors drop it in silence. Detach A if it is wanted for b alone; else write A as a function of its values: "
    "solve(lambda v, values: torch.zeros_like(v).index_add(0, rows, values * v[columns]), b, params=(values,))."
)

# How far a dual, which a least-squares solve leaves on its way, may miss its equation beside the tolerance of that solve.
DUAL_SLACK = 100.0
# How far the residual of the solution may exceed what was certified before A is taken to have changed.
CHANGE_SLACK = 10.0


@as_one_operation
def solve(problem: Problem, b: Tensor, x0: Tensor | None, given: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Solve the problem differentiably: solution, report and history (the latter two without derivatives)."""
    x, report, history, *_ = _apply(problem, b, x0, len(given), *given)
    return x, report, history


class _Solve(torch.autograd.Function):
    """`(b, θ) -> A(θ)^{-1} b`, with every derivative.

    The inputs are `(problem, b, x0, count, *given, *kept)`: `count` tensors for the closures of the problem, then what an
    earlier solve left for this one (a factorisation). The outputs are `(x, report, history, dual, *kept)`, where the dual
    is the `q` with `x = A^H q` of a least-squares method that has found it, else empty.
    """

    @staticmethod
    def forward(problem: Problem, b: Tensor, x0: Tensor | None, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        given, kept = tensors[:count], tensors[count:]
        outcome = solve_concretely(problem, b, x0, given, kept)
        dual = outcome.report.new_empty((*outcome.report.shape[:-1], 0)) if outcome.dual is None else outcome.dual
        # what was handed in is not handed out again: an output must not be an input
        return outcome.x, outcome.report, outcome.history, dual, *(() if kept else outcome.kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        problem, b, _, count, *tensors = inputs
        x, report, history, dual, *kept = output
        ctx.mark_non_differentiable(report, history, dual, *kept)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.count = replace(problem, known=False) if problem.known else problem, count
        ctx.inputs, ctx.outputs = len(inputs), len(output)
        # Where r vanishes b is needed for a check only, and outside transforms its owner may change it: it is not saved then.
        checked = problem.onto and not is_wrapped(b) and not b.is_inference()
        ctx.b, ctx.b_version = (b, b._version) if checked else (None, 0)
        saved = (x, b if ctx.b is None else report, report, dual, *tensors[:count], *(tensors[count:] or kept))
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    @own_precision()
    def backward(ctx: Any, x_bar: Tensor | None, *_: Any) -> tuple[Any, ...]:
        grads: list[Tensor | None] = [None] * ctx.inputs
        if x_bar is None:
            return tuple(grads)
        problem: Problem = ctx.problem
        if _functorch.is_legacy_batchedtensor(x_bar) and not (problem.injective and problem.onto):
            return _each_pulled_back(ctx, x_bar)
        # the pull-back of torch.func.vjp runs after its transform has ended, and its tensors are wrapped no more
        x_bar = _functorch.unwrap_if_dead(x_bar)
        x, b, report, dual, *tensors = [_functorch.unwrap_if_dead(t) for t in _saved(ctx)]
        given = list(tensors[: ctx.count])
        for closure in problem.closures.values():
            closure.check_constants()
        needed = ctx.needs_input_grad[4:]
        wanted = [i for i in range(len(problem.operator.recorded)) if needed[i] and is_differentiable(given[i])]
        again = _is_differentiated_again([x_bar, x, *given])
        if again and any(_is_stored_in_sparse(given[i]) for i in wanted):
            raise RuntimeError(NO_SECOND_SPARSE_DERIVATIVE)

        # what vanishes here need not vanish nearby: a derivative of this pass is one of every term
        left_part = _null_part(problem.H, b, given) if ctx.b is None else None
        misfit = bool(wanted) and not problem.onto and (again or _any_left(problem, report) or _any_part(problem, left_part, b))
        adjoint = replace(problem.H, dual=misfit)
        w, adjoint_report, _history, dual_of_w = _apply(adjoint, x_bar, None, ctx.count, *tensors)[:4]
        grads[1] = w
        null_part = _null_part(problem, x_bar, given)
        pull_back = _pull_back_in_transform if transforms_active() else _pull_back

        def check(y: Tensor) -> None:
            if ctx.b is None:
                _check_unchanged(problem, b if left_part is None else b - left_part, y, report)
            elif ctx.b._version == ctx.b_version:
                _check_unchanged(problem, ctx.b, y, report)

        def check_back(x_back: Tensor) -> None:
            _check_linear(problem, -x_back, x_bar if null_part is None else x_bar - null_part, adjoint_report)

        # the older vmap of is_grads_batched=True cannot read the batch that it hides
        unchecked = problem.linear or _functorch.is_legacy_batchedtensor(x_bar)
        total = pull_back(problem, x, given, wanted, -w, check, None if unchecked else check_back)
        terms = []
        if misfit:
            v = _attached_dual(problem.tangent, w, dual_of_w, adjoint_report, ctx.count, tensors)
            r = b - problem.differentiable_apply(x, given)
            _check_rounding(problem, b, r, v, w, x)
            terms.append((v, r))
        left = bool(wanted) and not problem.injective
        if left and (again or _any_left(problem.H, adjoint_report) or _any_part(problem.H, null_part, x_bar)):
            p = x_bar - problem.H.differentiable_apply(w, given)
            if again or _moves(problem, p, x, given, wanted, pull_back):
                terms.append((p, _attached_dual(problem.H.tangent, x, dual, report, ctx.count, tensors)))
        for vector, cotangent in terms:
            parts = pull_back(problem, vector, given, wanted, cotangent, _unchecked, None)
            total = [_sum(one, other) for one, other in zip(total, parts, strict=True)]
        for i, part in zip(wanted, total, strict=True):
            grads[4 + i] = part
        return tuple(grads)

    @staticmethod
    @own_precision()
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        problem: Problem = ctx.problem
        moving = tangents[4 : 4 + len(problem.operator.recorded)]
        push_forward = _push_forward_in_transform if transforms_active() else _push_forward
        with torch.enable_grad():
            dx = push_forward(problem, ctx.b, ctx.saved_tensors, ctx.count, tangents[1], moving)
        return dx, *(None,) * (ctx.outputs - 1)

    @staticmethod
    def vmap(info: Any, in_dims: Any, problem: Problem, b: Tensor, x0: Tensor | None, count: int, *tensors: Tensor) -> Any:
        b_dim, x0_dim, dims = in_dims[1], in_dims[2], in_dims[4:]

        def spread(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
        # a factorisation that is shared has a batch dimension of size 1
        kept = [t.unsqueeze(0) if d is None else t for t, d in zip(moved[count:], dims[count:], strict=True)]
        mapped = problem.vmapped([None if d is None else 0 for d in dims[:count]])
        guess = None if x0 is None else spread(x0, x0_dim)
        x, report, history, dual, *left = _apply(mapped, spread(b, b_dim), guess, count, *moved[:count], *kept)
        if any(d is not None for d in dims[: len(problem.operator.recorded)]):
            return (x, report, history, dual, *left), (0,) * (4 + len(left))
        return (x, report, history, dual, *(t.squeeze(0) for t in left)), (0, 0, 0, 0, *(None,) * len(left))


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """The saved tensors; where one was changed in place, autograd's refusal in words that name `A`."""
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "The solution of solve, or a tensor that A depends on, was modified by an inplace operation between the forward "
            "solve and the backward pass, so that the gradient is lost. Change a copy instead."
        ) from error
    return saved


class _BatchSize(NamedTuple):
    batch_size: int


def _apply(problem: Problem, b: Tensor, x0: Tensor | None, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`_Solve.apply`, also for the batched tensors of `torch.autograd.grad(..., is_grads_batched=True)`.

    Those come from an older `vmap` that custom Functions take no part in, so its batch dimension is handed to the same
    rule here.
    """
    arguments: list[Any] = [problem, b, x0, count, *tensors]
    batched = [isinstance(t, Tensor) and _functorch.is_legacy_batchedtensor(t) for t in arguments]
    if not any(batched):
        result: tuple[Tensor, ...] = _Solve.apply(*arguments)
        return result
    torch._C._vmapmode_increment_nesting()
    level = torch._C._vmapmode_decrement_nesting()
    arguments = [torch._remove_batch_dim(t, level, 0, 0) if flag else t for t, flag in zip(arguments, batched, strict=True)]
    size = next(t.shape[0] for t, flag in zip(arguments, batched, strict=True) if flag)
    outputs, out_dims = _Solve.vmap(_BatchSize(size), [0 if flag else None for flag in batched], *arguments)
    return tuple(t if d is None else torch._add_batch_dim(t, d, level) for t, d in zip(outputs, out_dims, strict=True))


def _each_pulled_back(ctx: Any, x_bar: Tensor) -> tuple[Any, ...]:
    """The backward pass of each cotangent in a batch of the older `vmap`, whose batches autograd cannot follow back."""
    torch._C._vmapmode_increment_nesting()
    level = torch._C._vmapmode_decrement_nesting()
    rows = [_Solve.backward(ctx, row) for row in torch._remove_batch_dim(x_bar, level, 0, 0)]
    columns = zip(*rows, strict=True)
    return tuple(None if c[0] is None else torch._add_batch_dim(torch.stack(c), 0, level) for c in columns)


def _pull_back_in_transform(
    problem: Problem,
    x: Tensor,
    given: Sequence[Tensor],
    wanted: Sequence[int],
    cotangent: Tensor,
    check: Callable[[Tensor], None],
    check_back: Callable[[Tensor], None] | None,
) -> Sequence[Tensor | None]:
    """`(∂(A(θ) x)/∂θ_i)^H cotangent` for the wanted `i`, differentiable at every level of `torch.func`.

    `check` sees the product `A x` that this costs, and `check_back` the `A'(x)^H cotangent` that comes with it.
    """
    first = [x] if check_back is not None else []

    def of_all(*tensors: Tensor) -> Tensor:
        start, parameters = (tensors[0], tensors[1:]) if first else (x, tensors)
        return problem.differentiable_apply(start, _replaced(given, wanted, parameters))

    if not (first or wanted):
        check(problem.differentiable_apply(x, given))
        return []
    try:
        y, pull_back = torch.func.vjp(of_all, *first, *(given[i] for i in wanted))[:2]
    except RuntimeError:
        if wanted:
            raise
        check(problem.differentiable_apply(x, given))  # as below
        return []
    check(y)
    parts: tuple[Tensor, ...] = pull_back(cotangent)
    if check_back is not None:
        check_back(parts[0])
    return parts[len(first) :]


def _pull_back(
    problem: Problem,
    x: Tensor,
    given: Sequence[Tensor],
    wanted: Sequence[int],
    cotangent: Tensor,
    check: Callable[[Tensor], None],
    check_back: Callable[[Tensor], None] | None,
) -> Sequence[Tensor | None]:
    """The same outside transforms, by plain autograd."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), transparent():
        with torch.set_grad_enabled(again):
            start = x.clone()  # with its tangent
        if not start.requires_grad:
            start.requires_grad_()
        run = Run()
        # Aliases, made here and now: hooks on the user's own tensors, and what those keep in .grad, belong to the pass outside.
        # Nothing leads from θ to its alias but through θ, so a part of θ̄ neither goes through x nor through another θ.
        parameters = [_alias(given[i]) for i in wanted]
        try:
            y = problem.differentiable_apply(start, _replaced(given, wanted, parameters))
        except RuntimeError:
            if wanted:
                raise
            with torch.no_grad():  # code that autograd cannot follow, though nothing but the check of linearity asks it to
                y = problem.differentiable_apply(x, given)
        run.stop()
        check(y)
        if not y.requires_grad:
            return [None] * len(wanted)
        # an operation that no mode sees has taken θ itself
        originals = problem.operator.originals
        others = [start, *given, *parameters]
        reached = run.dependencies(y, [*others, *(t for t, _ in originals)])[0] if originals else set()
        unseen = [original for i, original in enumerate(originals, len(others)) if i in reached and original[1] in wanted]
        tensors = [*parameters, *(t for t, _ in unseen)]
        first = [] if check_back is None or unseen else [start]  # a path from start may go through the unseen ones
        if not (first or tensors):
            return []
        with _Cut([start, *tensors]) if unseen else contextlib.nullcontext(), _unhooked([t for t, _ in unseen]):
            parts = torch.autograd.grad(
                y, [*first, *tensors], cotangent, create_graph=again, retain_graph=True, allow_unused=True
            )
        if first and check_back is not None and parts[0] is not None:
            check_back(parts[0])
        parts = parts[len(first) :]
        total = dict(zip(wanted, parts, strict=False))
        for (_, i), part in zip(unseen, parts[len(wanted) :], strict=True):
            total[i] = part if total[i] is None else total[i] if part is None else total[i] + part
        return [total[i] for i in wanted]


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor of the same values, and of the same tangent; the graph of one that has a graph goes on into it."""
    if tensor.requires_grad and tensor.layout == torch.strided:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()


@contextlib.contextmanager
def _unhooked(tensors: Sequence[Tensor]) -> Iterator[None]:
    """While open, gradients that arrive at the tensors run no hooks of theirs, and leave `.grad` as it was."""
    hooks = [(t._backward_hooks, dict(t._backward_hooks)) for t in tensors if t._backward_hooks]
    retained = [(t, t.grad) for t in tensors if t.retains_grad]
    for now, _ in hooks:
        now.clear()
    try:
        yield
    finally:
        for now, before in hooks:
            now.update(before)
        for tensor, grad in retained:
            tensor.grad = grad


def _unchecked(y: Tensor) -> None:
    """The check of a product that says nothing new."""


def _any_left(problem: Problem, report: Tensor) -> bool:
    """Whether the residual of some system is more than what its solve may leave; a direct one leaves rounding only.

    That of a damped problem is never negligible, because its cofactor in the derivative grows as the damping falls.
    """
    if problem.data is not None:
        return True
    negligible = 100 * torch.finfo(problem.layout.dtype).eps if problem.options.method.direct else problem.options.rtol
    return any_true(~(report[..., Column.RELATIVE] <= negligible))


def _null_part(problem: Problem, x_bar: Tensor, given: Sequence[Tensor]) -> Tensor | None:
    """The part in the nullspace of a vector of the domain, where the user gave that; else None."""
    if problem.nullspace is None:
        return None
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        name = "left_nullspace" if problem.transposed else "nullspace"
        return problem.closures[name].apply(x_bar, problem.split(given)[name])


def _any_part(problem: Problem, part: Tensor | None, of: Tensor) -> bool:
    """Whether the part of a right-hand side of this problem that is in a nullspace is more than its tolerance."""
    if part is None:
        return False
    return any_true(precise_norm(part, problem.batch_dims) > problem.options.rtol * precise_norm(of, problem.batch_dims))


def _check_rounding(problem: Problem, b: Tensor, r: Tensor, v: Tensor, w: Tensor, x: Tensor) -> None:
    """Apply the policy of the adjoint solve where nothing is right of `r v^H` beside `w x^H`, as tiny dampings leave it.

    The rounding of `b` is in `r = b - A x`, and `v` is large where a singular value, or the damping, is small.
    """
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        data = [t if problem.data is None else t[..., : problem.data] for t in (b, r, w)]  # what belongs to A
        norm_b, norm_r, norm_w, norm_v, norm_x = (precise_norm(t, problem.batch_dims) for t in (*data, v, x))
        eps = torch.finfo(b.dtype).eps
        lost = eps * norm_b * norm_v > 30 * eps**0.5 * (norm_w * norm_x + norm_r * norm_v)
        if any_true(lost):
            _fail(problem, x, torch.where(lost, int(Status.ILL_CONDITIONED), int(Status.CONVERGED)))


def _fail(problem: Problem, x: Tensor, status: Tensor) -> None:
    """Report a derivative that is lost as a failed adjoint solve."""
    report = torch.full((*status.shape, Column.COUNT), torch.nan, dtype=torch.float64, device=status.device)
    report[..., Column.STATUS] = status
    for column in (Column.ITERATIONS, Column.MATVECS, Column.RMATVECS):
        report[..., column] = 0
    mapped = is_wrapped(report)
    info = read_report(report, None, problem.adjoint.method.name, [], mapped, problem.least_squares)
    certify.enforce(problem.adjoint.on_failure, "adjoint", x.detach(), info)


def _attached_dual(problem: Problem, b: Tensor, dual: Tensor, report: Tensor, count: int, tensors: Sequence[Tensor]) -> Tensor:
    """`A^+ b` for a `b = A^{+H} c` whose solve has left this vector as its dual, or else by one more solve.

    Raises:
        RuntimeError: if `b` is not in the range, so that the solution of that solve was not the shortest one.
    """
    found = dual.shape[-1:] != (0,) and not any_true(report[..., Column.DUAL] > DUAL_SLACK * problem.options.rtol)
    if found:  # it has only to be attached to the graph
        return _apply(replace(problem, known=True), b, dual, count, *tensors)[0]
    solution, left, *_ = _apply(problem, b, None, count, *tensors)
    limit = max(CHANGE_SLACK * problem.options.rtol, torch.finfo(b.dtype).eps ** 0.5)
    unreached = (left[..., Column.STATUS] == Status.LEAST_SQUARES) & (left[..., Column.RELATIVE] > limit)
    if any_true(unreached):
        if not problem.guessed:  # what A^{+H} has made is in the range, to the rounding that the condition of A magnifies
            _fail(problem, solution, torch.where(unreached, int(Status.ILL_CONDITIONED), int(Status.CONVERGED)))
            return solution
        raise RuntimeError(
            "The solution of lstsq is not the minimiser of smallest norm, so that its derivative is not defined: x0 had a part "
            "in the nullspace of A, which has not full column rank. Leave x0 out, or give damp."
        )
    return solution


def in_gauge(problem: Problem, x: Tensor, gauge: Gauge, given: Sequence[Tensor]) -> Tensor:
    """The solution `x` of a singular system moved along the nullspace to where `c^H x = g`.

    The nullspace may move with the tensors of `A`: a null vector `n` is the function `n - A^+ A n` of them.
    """
    basis = gauge.null.basis(problem.layout, x).detach()
    # A n is in the range whatever moves; and A^+ A n is zero where it stands
    held = replace(problem.tangent, known=True, onto=True)
    columns = []
    for n in basis.unbind(-1):
        n = n.expand(*x.shape[: problem.batch_dims], n.shape[-1]).reshape(x.shape)
        image = problem.differentiable_apply(n, given)
        moved = n - _apply(held, image, torch.zeros_like(n), len(given), *given)[0]
        columns.append(flatten(moved, problem.batch_dims))
    return gauge.applied(x, torch.stack(columns, dim=-1), problem.layout)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _moves(
    problem: Problem, p: Tensor, x: Tensor, given: Sequence[Tensor], wanted: Sequence[int], pull_back: Callable[..., Any]
) -> bool:
    """Whether a nullspace that the user gave moves with the tensors of `A`; one that was not given has to be taken to do so.

    It stays if `dA p = 0` whatever moves, and then `<c, dA p>` vanishes for a random `c`, beside `<c, dA x>`.
    """
    if problem.nullspace is None:
        return True
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        null_part = _null_part(problem, p, given)  # without what the adjoint solve has left
        p = p if null_part is None else null_part
        noise = probe(p)
        norms = [
            torch.stack([torch.linalg.vector_norm(part) for part in parts if part is not None]).sum()
            / torch.linalg.vector_norm(v)
            for v in (p, x)
            if (parts := [t for t in pull_back(problem, v, given, wanted, noise, _unchecked, None) if t is not None])
        ]
    return bool(norms) and any_true(norms[0] > torch.finfo(p.dtype).eps ** 0.5 * norms[-1])


def _check_unchanged(problem: Problem, b: Tensor, y: Tensor, report: Tensor) -> None:
    """Raise if `y = A x` is no longer what the forward solve certified, because `A` computes something else by now.

    Raises:
        RuntimeError: for instance if an attribute that `A` reads was set to another tensor.
    """
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        norm_b, before = precise_norm(b, problem.batch_dims), report[..., Column.NORM_R]
        now = precise_norm(b - y, problem.batch_dims)
        limit = CHANGE_SLACK * problem.options.rtol * norm_b
        if problem.onto:
            changed = now > torch.maximum(limit, CHANGE_SLACK * before)
        else:  # the residual of a minimiser is no measure of what is left of it in rounding
            limit = torch.clamp(limit, min=CHANGE_SLACK * torch.finfo(b.dtype).eps ** 0.5 * norm_b)
            changed = torch.isfinite(before) & ((now - before).abs() > limit)
        if any_true(changed):
            raise RuntimeError(
                "A changed between the forward solve and the backward pass: applied to the solution it no longer gives b, "
                "so that its adjoint is not that of the system that was solved. Keep what A reads unchanged until backward "
                "has run."
            )


def _check_linear(problem: Problem, x_back: Tensor, x_bar: Tensor, report: Tensor) -> None:
    """Raise if `A'(x)^H w`, with the derivative of `A` at the solution, is not the `A^H w` that the adjoint solve certified.

    Raises:
        RuntimeError: for an `A` that is not linear, whose derivative at zero gave the adjoint.
    """
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        size = precise_norm(x_bar, problem.batch_dims)
        error, before = precise_norm(x_back - x_bar, problem.batch_dims), report[..., Column.NORM_R]
        smallest = max(CHANGE_SLACK * problem.H.options.rtol, torch.finfo(x_bar.dtype).eps ** 0.5)
        limit = smallest * size
        if problem.injective or problem.nullspace is not None:
            limit = torch.maximum(limit, CHANGE_SLACK * before)
        else:
            error = (error - before).abs()
        if any_true(converged(report[..., Column.STATUS], problem.least_squares) & (error > limit)):
            raise RuntimeError(
                "A is not linear: its derivative at the solution is another one than at zero, so that the gradient would be "
                "that of another operator. print(nablasolve.check_operator(A, b)) looks for the reason; a system that is not "
                "linear is solved by Newton's method, with nablasolve.Jacobian(f, x) for A."
            )


class _Cut:
    """While open, backward passes stop at the given tensors instead of going on into what those depend on.

    Several tensors that `A` depends on may depend on one another; autograd would then count a path twice, once inside
    our derivative and once in the graph outside.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.nodes = {t.grad_fn for t in tensors if t.grad_fn is not None}

    def __enter__(self) -> None:
        self.handles = [node.register_prehook(lambda grads: (None,) * len(grads)) for node in self.nodes]

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def _push_forward(
    problem: Problem,
    b: Tensor | None,
    saved: Sequence[Tensor],
    count: int,
    db: Tensor | None,
    tangents: Sequence[Tensor | None],
) -> Tensor:
    """`dx` for plain dual numbers, of which there is one level: `A`'s own tensors are dual already.

    PyTorch calls this with forward gradients switched off, so the solves below see values only.
    """
    (x, saved_b, report, dual), tensors = saved[:4], saved[4:]
    b = saved_b if b is None else b
    # plain autograd has not attached x to its graph yet, and dA x depends on it
    x = _apply(replace(problem.tangent, known=True), b, x.detach(), count, *tensors)[0]
    duals = list(tensors[:count])
    with forward_ad._set_fwd_grad_enabled(True):
        for i, (recorded, tangent) in enumerate(zip(problem.operator.recorded, tangents, strict=True)):
            captured = i >= problem.operator.declared and not is_wrapped(recorded)
            if tangent is not None and not (captured and forward_ad.unpack_dual(recorded).tangent is not None):
                duals[i] = forward_ad.make_dual(forward_ad.unpack_dual(duals[i]).primal, tangent)
            elif captured:
                duals[i] = recorded

    def change(of: Problem, v: Tensor) -> Tensor | None:
        with forward_ad._set_fwd_grad_enabled(True):
            tangent: Tensor | None = forward_ad.unpack_dual(of.differentiable_apply(v, duals)).tangent
            return tangent

    return _tangent(problem, b, x, dual, report, count, tensors, db, change)


def _push_forward_in_transform(
    problem: Problem,
    b: Tensor | None,
    saved: Sequence[Tensor],
    count: int,
    db: Tensor | None,
    tangents: Sequence[Tensor | None],
) -> Tensor:
    """The same at any level of `torch.func`, with `dA x` by a double vector-Jacobian product.

    `u -> (∂(A x)/∂θ)^H u` is linear, and its transpose is `dθ -> dA x`. A Function's jvp runs with forward gradients
    switched off, which would silence every nested derivative: they are switched on.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        # a sparse tensor holds no tangent
        values = [forward_ad.unpack_dual(t).primal if t.layout == torch.strided else t for t in saved]
        x, saved_b, report, dual, *tensors = values
        b = saved_b if b is None else b
        given = tensors[:count]
        moving = [i for i, t in enumerate(tangents) if t is not None]

        def change(of: Problem, v: Tensor) -> Tensor | None:
            if not moving:
                return None

            def of_parameters(*parameters: Tensor) -> Tensor:
                return of.differentiable_apply(v, _replaced(given, moving, parameters))

            y, pull_back = torch.func.vjp(of_parameters, *(given[i] for i in moving))[:2]
            transposed = torch.func.vjp(pull_back, torch.zeros_like(y))[1]
            result: Tensor = transposed(tuple(t for t in tangents if t is not None))[0]
            return result

        return _tangent(problem, b, x, dual, report, count, tensors, db, change)


def _tangent(
    problem: Problem,
    b: Tensor,
    x: Tensor,
    dual: Tensor,
    report: Tensor,
    count: int,
    tensors: Sequence[Tensor],
    db: Tensor | None,
    change: Callable[[Problem, Tensor], Tensor | None],
) -> Tensor:
    """`dx = A^+ (db - dA x + A^{+H} dA^H r - A dA^H q) + dA^H q`; `change(problem, v)` is `dA v`, or None if `A` stays."""
    given, adjoint = tensors[:count], problem.H.tangent
    dA_x = change(problem, x)
    rhs = torch.zeros_like(b) if db is None else db
    if dA_x is None:
        return _apply(problem.tangent, rhs, None, count, *tensors)[0]
    rhs, beside = rhs - dA_x, None
    if not problem.onto:
        turned = change(adjoint, b - problem.differentiable_apply(x, given))
        if turned is not None:
            rhs = rhs + _apply(adjoint, turned, None, count, *tensors)[0]
    if not problem.injective:
        beside = change(adjoint, _attached_dual(adjoint, x, dual, report, count, tensors))
    if beside is None:
        return _apply(problem.tangent, rhs, None, count, *tensors)[0]
    return _apply(problem.tangent, rhs - problem.differentiable_apply(beside, given), None, count, *tensors)[0] + beside


def _is_differentiated_again(tensors: Sequence[Tensor]) -> bool:
    """Whether a derivative of this backward pass, of which these are the inputs, can be asked for.

    A transform of `torch.func` always builds the graph of its pass, and drops the part at its own level: what counts is then
    whether a transform further out, or plain autograd around all of them, takes part.
    """
    if not torch.is_grad_enabled():
        return False
    if max(level_of(t) for t in tensors) <= 0:
        return True
    return tracks_beneath(tensors) or not _is_called_by_a_transform()


def _is_called_by_a_transform() -> bool:
    """Whether this backward pass is that of a transform, and not one that a user runs inside; False where it cannot be told."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code is not torch.autograd.grad.__code__:
        frame = frame.f_back
    return frame.f_back is not None and frame.f_back.f_code is eager_transforms._autograd_grad.__code__


def _is_stored_in_sparse(values: Tensor) -> bool:
    """Whether these are the values of a sparse tensor, through which the gradient goes on."""
    if values.layout != torch.strided:
        return values.requires_grad
    return values.grad_fn is not None and values.grad_fn.name() == "ValuesBackward0"


def _replaced(given: Sequence[Tensor], indices: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
    result = list(given)
    for i, value in zip(indices, values, strict=True):
        result[i] = value
    return result
