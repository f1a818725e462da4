"""The one derivative rule.

For `x = A(θ)^{-1} b` and a loss `L` with cotangent `x̄ = ∂L/∂x` (PyTorch's convention: `dL = Re<x̄, dx>`):

    dx = A^{-1} (db - dA x)                                     forward mode: one more solve with A
    λ  = A^{-H} x̄                                               reverse mode: one solve with the adjoint
    b̄  = λ,     θ̄ = -(∂(A(θ) x)/∂θ)^H λ                         and one backward pass through one application of A

(Golub & Pereyra 1973 for the derivative of an inverse; Lai et al., "∇-Prox", SIGGRAPH 2023, for the matrix-free form.)
The rule differentiates the *problem*, not the loop: nothing of the iteration is stored. Both lines are written with this
same differentiable solve, on the attached solution, so they are right to every order and under every `torch.func`
transform.
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

from .closure import transforms_active, transparent
from .drive import solve_concretely
from .graph import Run, is_differentiable, is_wrapped, level_of, tracks_beneath
from .info import Status
from .problem import Problem
from .trace import as_one_operation
from .vectors import any_true, own_precision, precise_norm

_functorch = torch._C._functorch

NO_SECOND_SPARSE_DERIVATIVE = (
    "A second derivative (create_graph=True, nested transforms) through a sparse Tensor A is not to be had: torch's own sparse "
    "tensors drop it in silence. Detach A if it is wanted for b alone; else write A as a function of its values: "
    "solve(lambda v, values: torch.zeros_like(v).index_add(0, rows, values * v[columns]), b, params=(values,))."
)

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
    earlier solve left for this one (a factorisation). The outputs are `(x, report, history, *kept)`.
    """

    @staticmethod
    def forward(problem: Problem, b: Tensor, x0: Tensor | None, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        given, kept = tensors[:count], tensors[count:]
        outcome = solve_concretely(problem, b, x0, given, kept)
        # what was handed in is not handed out again: an output must not be an input
        return outcome.x, outcome.report, outcome.history, *(() if kept else outcome.kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        problem, b, _, count, *tensors = inputs
        x, report, history, *kept = output
        ctx.mark_non_differentiable(report, history, *kept)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.count = replace(problem, known=False) if problem.known else problem, count
        ctx.inputs, ctx.outputs = len(inputs), len(output)
        # b is needed for a check only, and outside transforms its owner may change it: it is not saved then
        ctx.b, ctx.b_version = (b, b._version) if not is_wrapped(b) and not b.is_inference() else (None, 0)
        saved = (x, b if ctx.b is None else report, report, *tensors[:count], *(tensors[count:] or kept))
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    @own_precision()
    def backward(ctx: Any, x_bar: Tensor | None, *_: Any) -> tuple[Any, ...]:
        grads: list[Tensor | None] = [None] * ctx.inputs
        if x_bar is None:
            return tuple(grads)
        problem: Problem = ctx.problem
        # the pull-back of torch.func.vjp runs after its transform has ended, and its tensors are wrapped no more
        x_bar, x, b, report, *tensors = (_functorch.unwrap_if_dead(t) for t in (x_bar, *_saved(ctx)))
        given = list(tensors[: ctx.count])
        for closure in problem.closures.values():
            closure.check_constants()
        adjoint, adjoint_report = _apply(problem.H, x_bar, None, ctx.count, *tensors)[:2]
        grads[1] = adjoint
        needed = ctx.needs_input_grad[4:]
        wanted = [i for i in range(len(problem.operator.recorded)) if needed[i] and is_differentiable(given[i])]
        if any(_is_stored_in_sparse(given[i]) for i in wanted) and _is_differentiated_again([x_bar, x, *given]):
            raise RuntimeError(NO_SECOND_SPARSE_DERIVATIVE)
        pull_back = _pull_back_in_transform if transforms_active() else _pull_back

        def check(y: Tensor) -> None:
            if ctx.b is None:
                _check_unchanged(problem, b, y, report)
            elif ctx.b._version == ctx.b_version:
                _check_unchanged(problem, ctx.b, y, report)

        def check_back(x_back: Tensor) -> None:
            _check_linear(problem, x_back, x_bar, adjoint_report)

        # the older vmap of is_grads_batched=True cannot read the batch that it hides
        unchecked = problem.linear or _functorch.is_legacy_batchedtensor(x_bar)
        parts = pull_back(problem, x, given, wanted, adjoint, check, None if unchecked else check_back)
        for i, part in zip(wanted, parts, strict=True):
            grads[4 + i] = None if part is None else -part
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
        x, report, history, *left = _apply(mapped, spread(b, b_dim), guess, count, *moved[:count], *kept)
        if any(d is not None for d in dims[: len(problem.operator.recorded)]):
            return (x, report, history, *left), (0,) * (3 + len(left))
        return (x, report, history, *(t.squeeze(0) for t in left)), (0, 0, 0, *(None,) * len(left))


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


def _check_unchanged(problem: Problem, b: Tensor, y: Tensor, report: Tensor) -> None:
    """Raise if `y = A x` is no longer what the forward solve certified, because `A` computes something else by now.

    Raises:
        RuntimeError: for instance if an attribute that `A` reads was set to another tensor.
    """
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        norm_b = precise_norm(b, problem.batch_dims)
        residual = precise_norm(b - y, problem.batch_dims) / torch.where(norm_b > 0, norm_b, 1.0)
        if any_true(residual > CHANGE_SLACK * torch.clamp(report[..., 3], min=problem.options.rtol)):
            raise RuntimeError(
                "A changed between the forward solve and the backward pass: applied to the solution it no longer gives b, "
                "so that its adjoint is not that of the system that was solved. Keep what A reads unchanged until backward "
                "has run."
            )


def _check_linear(problem: Problem, x_back: Tensor, x_bar: Tensor, report: Tensor) -> None:
    """Raise if `A'(x)^H λ`, the derivative of `A` at the solution, is not the `A^H λ = x̄` that the adjoint solve certified.

    Raises:
        RuntimeError: for an `A` that is not linear, whose derivative at zero gave the adjoint.
    """
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        size = precise_norm(x_bar, problem.batch_dims)
        error = precise_norm(x_back - x_bar, problem.batch_dims) / torch.where(size > 0, size, 1.0)
        limit = CHANGE_SLACK * torch.clamp(report[..., 3], min=problem.H.options.rtol)
        limit = torch.clamp(limit, min=torch.finfo(x_bar.dtype).eps ** 0.5)
        if any_true((report[..., 0] == Status.CONVERGED) & (error > limit)):
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
    problem: Problem, b: Tensor, saved: Sequence[Tensor], count: int, db: Tensor | None, tangents: Sequence[Tensor | None]
) -> Tensor:
    """`A^{-1} (db - dA x)` for plain dual numbers, of which there is one level: `A`'s own tensors are dual already.

    PyTorch calls this with forward gradients switched off, so the solves below see values only.
    """
    x, _, _, *tensors = saved
    # plain autograd has not attached x to its graph yet, and dA x depends on it
    x = _apply(replace(problem.tangent, known=True), b, x.detach(), count, *tensors)[0]
    rhs = torch.zeros_like(x) if db is None else db
    duals = list(tensors[:count])
    with forward_ad._set_fwd_grad_enabled(True):
        for i, (recorded, tangent) in enumerate(zip(problem.operator.recorded, tangents, strict=True)):
            captured = i >= problem.operator.declared and not is_wrapped(recorded)
            if tangent is not None and not (captured and forward_ad.unpack_dual(recorded).tangent is not None):
                duals[i] = forward_ad.make_dual(forward_ad.unpack_dual(duals[i]).primal, tangent)
            elif captured:
                duals[i] = recorded
        change = forward_ad.unpack_dual(problem.differentiable_apply(x, duals)).tangent
    return _apply(problem.tangent, rhs if change is None else rhs - change, None, count, *tensors)[0]


def _push_forward_in_transform(
    problem: Problem, _: Tensor, saved: Sequence[Tensor], count: int, db: Tensor | None, tangents: Sequence[Tensor | None]
) -> Tensor:
    """The same at any level of `torch.func`, with `dA x` by a double vector-Jacobian product.

    `u -> (∂(A x)/∂θ)^H u` is linear, and its transpose is `dθ -> dA x`. A Function's jvp runs with forward gradients
    switched off, which would silence every nested derivative: they are switched on.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        # a sparse tensor holds no tangent
        x, _, _, *tensors = (forward_ad.unpack_dual(t).primal if t.layout == torch.strided else t for t in saved)
        given = tensors[:count]
        rhs = torch.zeros_like(x) if db is None else db
        moving = [i for i, t in enumerate(tangents) if t is not None]
        if moving:

            def of_parameters(*parameters: Tensor) -> Tensor:
                return problem.differentiable_apply(x, _replaced(given, moving, parameters))

            pull_back = torch.func.vjp(of_parameters, *(given[i] for i in moving))[1]
            transposed = torch.func.vjp(pull_back, torch.zeros_like(x))[1]
            rhs = rhs - transposed(tuple(t for t in tangents if t is not None))[0]
        return _apply(problem.tangent, rhs, None, count, *tensors)[0]


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
