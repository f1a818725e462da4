"""Exact derivatives: every form of `A`, method, dtype and mode against dense references, and every way to lose one."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from references import (
    DTYPES,
    FORM,
    FORMS,
    HERMITIAN,
    ITERATIVE,
    KIND,
    METHODS,
    MODES,
    RTOL,
    SECOND_ORDER,
    TOLERANCE,
    WIDE,
    Case,
    Form,
    Mode,
    NewStyleProduct,
    OldStyleProduct,
    cases,
    dense_solution,
    differentiated,
    draw,
    inner,
    loss,
    matrix,
    pairwise,
    reference_derivative,
    relative_error,
    tolerance,
)
from torch import Tensor, nn
from torch.autograd import forward_ad

import nablasolve as ns
from nablasolve.closure import Closure

# what Dynamo does to any captured tensor that is no leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

F64 = torch.float64


@pytest.fixture(autouse=True)
def _room_for_compiled_code(request: pytest.FixtureRequest) -> Iterator[None]:
    """One compiled product serves all dtypes, modes and levels of a process, and each is one more compilation."""
    if "compiled" not in request.node.name:  # importing Dynamo takes seconds, and changes what others see
        yield
        return
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield


# -- the grid ------------------------------------------------------------------------------------------------------

# beside the pairs: every method in every mode with one of the four dtypes, and the direct path in both of its shapes
CORNERS = [
    (mode, Case(FORM["closure"], method, DTYPES[(i + j) % 4]))
    for i, method in enumerate(ITERATIVE)
    for j, mode in enumerate(MODES)
]
CORNERS += [
    (mode, Case(FORM[name], "direct", DTYPES[(i + j) % 4]))
    for i, name in enumerate(("dense", "dense batch"))
    for j, mode in enumerate(MODES)
]

VALUES = list(dict.fromkeys(cases(WIDE) + cases(DTYPES, [FORM["closure"], FORM["dense"]], every=True)))
DERIVATIVES = list(dict.fromkeys(pairwise() + CORNERS))


@pytest.mark.parametrize("case", VALUES, ids=str)
def test_value_agrees_with_the_dense_solution(case: Case) -> None:
    W, b = case.form.system(case.dtype)
    A = case.form.dense(case.form.kind(case.method), W)
    x = case.form.solve(case.method, W, b)
    assert x.dtype == case.dtype
    assert relative_error(x, case.form.reference(case.method, W, b)) <= tolerance(0, case.dtype, A)


@pytest.mark.parametrize(("mode", "case"), DERIVATIVES, ids=str)
def test_derivative_agrees_with_the_dense_solution(mode: Mode, case: Case) -> None:
    W, _ = case.form.system(case.dtype)
    allowed = tolerance(mode.order, case.dtype, case.form.dense(case.form.kind(case.method), W))
    try:
        values = differentiated(mode, case)
    except RuntimeError:  # torch itself has no second derivative through these
        assert mode.order == 2
        assert any(word in str(case) for word in ("csr", "csc", "bsr", "bsc", "function"))
        return
    for value, reference in zip(values, reference_derivative(mode, case), strict=True):
        assert value.dtype == case.dtype
        assert relative_error(value, reference) <= allowed


@pytest.mark.parametrize("mode", SECOND_ORDER[1:-1], ids=str)
def test_references_agree_with_one_another(mode: Mode) -> None:
    case = Case(FORM["closure"], "gmres", torch.complex128)
    for value, reference in zip(reference_derivative(mode, case), reference_derivative(SECOND_ORDER[0], case), strict=True):
        assert relative_error(value, reference) <= 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_third_derivative_agrees_with_the_dense_solution(method: str) -> None:
    form = FORM["dense"]
    W, b = form.system(F64)
    d = draw(*W.shape, dtype=F64, seed=3)

    def third(solve: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        def directional(W: Tensor, b: Tensor) -> Tensor:
            def change(W: Tensor) -> Tensor:
                return torch.func.jvp(lambda W: loss(solve(method, W, b)), (W,), (d,))[1]

            return torch.func.jvp(change, (W,), (d,))[1]

        result: tuple[Tensor, Tensor] = torch.func.grad(directional, argnums=(0, 1))(W, b)
        return result

    for value, reference in zip(third(form.solve), third(form.reference), strict=True):
        assert relative_error(value, reference) <= 1e-6


# -- finite differences --------------------------------------------------------------------------------------------


def checkable(case: Case, n: int | None = None) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function of `W` and `b` (of `b` alone, where PyTorch has no second derivatives of the form) and its inputs."""
    form, method = case.form, case.method
    W, b = form.system(case.dtype) if n is None else (draw(n, n, dtype=case.dtype), draw(n, dtype=case.dtype, seed=1))
    if form.reach == "values":
        return form.solver(method, W), (b.requires_grad_(),)
    return functools.partial(form.solve, method), (W.requires_grad_(), b.requires_grad_())


def conjugates(case: Case) -> bool:
    """Whether making the matrix takes a conjugate view, which PyTorch cannot do with batched complex tangents."""
    return case.dtype.is_complex and case.form.kind(case.method) in HERMITIAN


def small(method: str, dtype: torch.dtype) -> Case:
    return Case(FORM["dense" if method == "direct" else "closure"], method, dtype)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_of_every_entry(method: str, dtype: torch.dtype) -> None:
    case = small(method, dtype)
    f, inputs = checkable(case, n=2 if dtype.is_complex else 3)
    assert torch.autograd.gradcheck(
        f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=not conjugates(case)
    )


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_gradgradcheck(method: str, dtype: torch.dtype) -> None:
    f, inputs = checkable(small(method, dtype), n=2)
    fast = dtype.is_complex  # every entry of every complex derivative would take most of the time of this file
    assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=fast)


FORM_CHECKS = [Case(form, form.methods[i % len(form.methods)], F64) for i, form in enumerate(FORMS)]


@pytest.mark.parametrize("case", FORM_CHECKS, ids=str)
def test_gradcheck_of_every_form(case: Case) -> None:
    f, inputs = checkable(case)
    batched = case.form.reach != "plain"
    assert torch.autograd.gradcheck(
        f,
        inputs,
        check_forward_ad=True,
        check_batched_grad=batched,
        check_batched_forward_grad=batched and "function" not in case.form.name,  # the functions' own limit
        fast_mode=True,
    )


@pytest.mark.parametrize("case", FORM_CHECKS, ids=str)
def test_gradgradcheck_of_every_form(case: Case) -> None:
    f, inputs = checkable(case)
    batched = case.form.reach != "plain"
    assert torch.autograd.gradgradcheck(lambda *p: loss(f(*p)), inputs, check_batched_grad=batched, fast_mode=True)


@pytest.mark.parametrize("form", [form for form in FORMS if form.reach == "values"], ids=lambda form: form.name)
@pytest.mark.parametrize("method", ITERATIVE)
def test_gradcheck_of_sparse_values(form: Form, method: str) -> None:
    W, b = form.system(F64)
    assert torch.autograd.gradcheck(
        functools.partial(form.solve, method), (W.requires_grad_(), b.requires_grad_()), fast_mode=True
    )


# -- gradients reach -----------------------------------------------------------------------------------------------

n = 5
EYE = torch.eye(n, dtype=F64)


@dataclass(frozen=True)
class Way:
    """One way in which `A` can hold the leaves it depends on: `build(leaves) -> (A, options of solve)`."""

    name: str
    build: Callable[..., tuple[Any, dict[str, Any]]]
    dense: Callable[..., Tensor]
    leaves: int = 1


class Child(nn.Module):
    def __init__(self, weight: Tensor, *, buffer: bool) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("weight", weight)
        else:
            self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)

    def forward(self, v: Tensor) -> Tensor:
        return self.weight @ v


def product_of(table: dict[str, Tensor], v: Tensor) -> Tensor:
    return table["weight"] @ v


GLOBAL: dict[str, Tensor] = {}


def reads_a_global(v: Tensor) -> Tensor:
    return product_of(GLOBAL, v)


def of_a_global(W: Tensor) -> Any:
    GLOBAL["weight"] = W
    return reads_a_global


def one_depends_on_the_other(P: Tensor) -> Any:
    Q = torch.sin(P)
    return lambda v: P @ v + Q @ (Q @ v)


def chain(W: Tensor) -> Any:
    P = 2 * W
    Q = P @ P / 20
    R = Q - P
    return lambda v: P @ v + Q @ v + R @ v


def symmetric_and_a_view(W: Tensor) -> Any:
    rows = W[:3]
    return lambda v: torch.cat([rows @ v, W[3:] @ v]) + W.T @ v


def written_in_place(W: Tensor) -> Any:
    buffer = torch.zeros(n, n, dtype=F64)
    buffer[:] = W
    buffer += EYE
    return lambda v: buffer @ v


def rows_by_vmap(W: Tensor) -> Any:
    return lambda v: torch.vmap(lambda row: row @ v)(W)


def checkpointed(W: Tensor) -> Any:
    from torch.utils.checkpoint import checkpoint

    return lambda v: checkpoint(lambda v: W @ v, v, use_reentrant=False)


class Kept:
    """Keeps what it computes at first use."""

    def __init__(self, W: Tensor) -> None:
        self.W = W
        self.matrix: Tensor | None = None

    def __call__(self, v: Tensor) -> Tensor:
        if self.matrix is None:
            self.matrix = self.W + torch.sin(self.W)
        return self.matrix @ v


def parametrised(W: Tensor) -> Any:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    module = Child(torch.zeros_like(W), buffer=True)
    module.weight = W
    return lambda v: Doubled()(module.weight) @ v


WAYS = (
    Way("leaf", lambda W: (lambda v: W @ v, {}), lambda W: W),
    Way("non-leaf", lambda W: ((lambda P: lambda v: P @ v)(2 * W), {}), lambda W: 2 * W),
    Way("leaf and what depends on it", lambda W: (one_depends_on_the_other(W), {}), lambda W: W + torch.sin(W) @ torch.sin(W)),
    Way(
        "non-leaf and what depends on it",
        lambda W: (one_depends_on_the_other(W * 1.5), {}),
        lambda W: 1.5 * W + torch.sin(1.5 * W) @ torch.sin(1.5 * W),
    ),
    Way("chain of three", lambda W: (chain(W), {}), lambda W: 2 * (2 * W @ (2 * W) / 20)),
    Way("used twice", lambda W: (lambda v: W @ (W @ v) + W @ v, {}), lambda W: W @ W + W),
    Way("views", lambda W: (symmetric_and_a_view(W), {}), lambda W: W + W.T),
    Way("written in place before", lambda W: (written_in_place(W), {}), lambda W: W + EYE),
    Way("called function", lambda W: (lambda v: product_of({"weight": W}, v), {}), lambda W: W),
    Way("global of a called function", lambda W: (of_a_global(W), {}), lambda W: W),
    Way("partial", lambda W: (functools.partial(torch.mv, W), {}), lambda W: W),
    Way("list", lambda W: ((lambda held: lambda v: held[0][1] @ v)([(None, W)]), {}), lambda W: W),
    Way("default argument", lambda W: (lambda v, W=W: W @ v, {}), lambda W: W),
    Way("buffer", lambda W: (Child(W, buffer=True), {}), lambda W: W),
    Way("nested modules", lambda W: (nn.Sequential(Child(W, buffer=True), nn.Identity(), Child(W, buffer=True)), {}),
        lambda W: W @ W),
    Way("made anew in each call", lambda W: (parametrised(W), {}), lambda W: 2 * W),
    Way("scalar", lambda W, s: (lambda v: W @ v + s * v, {}), lambda W, s: W + s * EYE, leaves=2),
    Way("operator scaled by a scalar", lambda W, s: (ns.aslinearoperator(W) + s * ns.aslinearoperator(EYE), {}),
        lambda W, s: W + s * EYE, leaves=2),
    Way("params", lambda W: (lambda v, W: W @ v, {"params": (W,)}), lambda W: W),
    Way("non-leaf params", lambda W, s: (lambda v, P, s: P @ v + s * v, {"params": (2 * W, s)}),
        lambda W, s: 2 * W + s * EYE, leaves=2),
    Way("params and a closure", lambda W, s: (lambda v, P: P @ v + s * v, {"params": (W,)}),
        lambda W, s: W + s * EYE, leaves=2),
    Way("params and what depends on it", lambda W: ((lambda Q: lambda v, W: W @ v + Q @ v)(torch.sin(W)), {"params": (W,)}),
        lambda W: W + torch.sin(W)),
    Way("params and the same captured", lambda W: (lambda v, P: P @ v + W.T @ v, {"params": (W,)}), lambda W: W + W.T),
    Way("kept from its first use", lambda W: (Kept(W), {}), lambda W: W + torch.sin(W)),
    Way("old-style function alone", lambda W: (lambda v: OldStyleProduct.apply(W, v), {}), lambda W: W),
    Way("new-style function alone", lambda W: (lambda v: NewStyleProduct.apply(W, v), {}), lambda W: W),
    Way("function on a non-leaf", lambda W: ((lambda P: lambda v: OldStyleProduct.apply(P, v))(2 * W), {}), lambda W: 2 * W),
    Way("vmap inside", lambda W: (rows_by_vmap(W), {}), lambda W: W),
    Way("checkpoint inside", lambda W: (checkpointed(W), {}), lambda W: W),
    Way("adjoint that captures too", lambda W: (ns.LinearOperator(lambda v: W @ v, adjoint=lambda y: W.mH @ y), {}),
        lambda W: W),
)  # fmt: skip


def well_conditioned_leaves(count: int) -> list[Tensor]:
    W = (draw(n, n, dtype=F64, seed=2) / 3 + 3 * EYE).requires_grad_()
    return [W, torch.tensor(0.5, dtype=F64, requires_grad=True)][:count]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_first_and_second_derivatives_reach(way: Way) -> None:
    leaves = well_conditioned_leaves(way.leaves)
    b = draw(n, dtype=F64, seed=4).requires_grad_()
    A, options = way.build(*leaves)
    x = ns.solve(A, b, rtol=1e-13, **options)
    reference = dense_solution(way.dense(*leaves), b)
    value, expected = loss(x), loss(reference)
    for allowed in TOLERANCE[1:]:
        gradients = torch.autograd.grad(value, [*leaves, b], create_graph=True)
        references = torch.autograd.grad(expected, [*leaves, b], create_graph=True)
        for g, e in zip(gradients, references, strict=True):
            assert relative_error(g, e) <= allowed
        value, expected = inner(gradients, gradients), inner(references, references)


def test_gradients_reach_the_parameters_of_modules() -> None:
    module = nn.Sequential(*(Child(draw(n, n, dtype=F64, seed=s) / 3 + 3 * EYE, buffer=False) for s in range(2)))
    twin = copy.deepcopy(module)
    b = draw(n, dtype=F64, seed=4)
    loss(ns.solve(module, b, rtol=1e-13)).backward()
    loss(dense_solution(twin[1].weight @ twin[0].weight, b)).backward()
    for mine, reference in zip(module.parameters(), twin.parameters(), strict=True):
        assert relative_error(mine.grad, reference.grad) <= 1e-7


def test_gradient_is_not_counted_twice_where_b_depends_on_a_tensor_of_the_operator() -> None:
    (W,) = well_conditioned_leaves(1)
    P = torch.sin(W) + 3 * EYE
    b = P @ draw(n, dtype=F64)
    (value,) = torch.autograd.grad(loss(ns.solve(lambda v: P @ v + W @ v, b, rtol=1e-13)), W, retain_graph=True)
    (reference,) = torch.autograd.grad(loss(dense_solution(P + W, b)), W)
    assert relative_error(value, reference) <= 1e-7


def test_preconditioner_and_initial_guess_have_zero_derivative() -> None:
    W, s = well_conditioned_leaves(2)
    b, x0 = draw(n, dtype=F64), draw(n, dtype=F64, seed=1).requires_grad_()
    x = ns.solve(lambda v: W @ v, b, M=lambda r: s * r, x0=x0 * 2, rtol=1e-13)
    g, none, nothing = torch.autograd.grad(loss(x), [W, s, x0], allow_unused=True)
    assert none is None
    assert nothing is None
    assert relative_error(g, torch.autograd.grad(loss(dense_solution(W, b)), W)[0]) <= 1e-7


@pytest.mark.parametrize("form", [form for form in FORMS if not form.batch], ids=lambda form: form.name)
def test_autograd_grad_touches_no_grad(form: Form) -> None:
    W, b = (t.requires_grad_() for t in form.system(F64))
    b.grad = torch.full_like(b, 7.0)
    torch.autograd.grad(loss(form.solve(form.methods[0], W, b)), b, retain_graph=True)
    torch.autograd.grad(loss(form.solve(form.methods[0], W, b)), [W, b])
    assert W.grad is None
    assert bool((b.grad == 7).all())


def test_backward_touches_the_grad_of_leaves_only_and_adds_to_it() -> None:
    module = Child(well_conditioned_leaves(1)[0].detach(), buffer=False)
    b = draw(n, dtype=F64).requires_grad_()
    expected = torch.autograd.grad(loss(ns.solve(module, b, rtol=1e-13)), [module.weight, b])
    for times in (1, 2):
        loss(ns.solve(module, b, rtol=1e-13)).backward()
        for leaf, g in zip((module.weight, b), expected, strict=True):
            assert relative_error(leaf.grad, times * g) <= 1e-12


def test_only_what_is_asked_for_is_differentiated() -> None:
    W, s = well_conditioned_leaves(2)
    b = draw(n, dtype=F64).requires_grad_()
    x = ns.solve(lambda v: W @ v + s * v, b, rtol=1e-13)
    everything = torch.autograd.grad(loss(x), [W, s, b], retain_graph=True)
    for tensor, g in zip((W, s, b), everything, strict=True):
        (alone,) = torch.autograd.grad(loss(x), tensor, retain_graph=True)
        assert relative_error(alone, g) <= 1e-12


@pytest.mark.parametrize("form", ["closure", "dense", "csr"])
def test_nothing_is_recorded_without_derivatives(form: str) -> None:
    W, b = (t.requires_grad_() for t in FORM[form].system(F64))
    assert not FORM[form].solve("gmres", W, b, grad="none").requires_grad
    with torch.no_grad():
        assert not FORM[form].solve("gmres", W, b).requires_grad


# -- what a first solve leaves alone -------------------------------------------------------------------------------

READERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "closure": lambda K, b: ns.solve(lambda v: K @ v, b, rtol=1e-13),
    "transposed product": lambda K, b: ns.solve(lambda v: K @ v + 0 * (K.T @ v), b, rtol=1e-13),
    "module": lambda K, b: ns.solve(Child(K, buffer=True), b, rtol=1e-13),
    "params": lambda K, b: ns.solve(lambda v, K: K @ v, b, params=(K,), rtol=1e-13),
    "dense": lambda K, b: ns.solve(K, b),
    "coo": lambda K, b: ns.solve(K.to_sparse_coo(), b, rtol=1e-13),
    "old-style function": lambda K, b: ns.solve(lambda v: OldStyleProduct.apply(K, v), b, rtol=1e-13),
    "seen and in a function": lambda K, b: ns.solve(lambda v: (OldStyleProduct.apply(K, v) + K @ v) / 2, b, rtol=1e-13),
    "transform inside": lambda K, b: ns.solve(lambda v: torch.func.jvp(lambda u: K @ u, (v,), (v,))[1], b, rtol=1e-13),
    "solve inside": lambda K, b: ns.solve(lambda v: K @ ns.solve(K, K @ v), b, rtol=1e-12),
}


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(
    ("reader", "create_graph"),
    [(r, c) for r in READERS for c in (False, True) if not (c and r == "coo")],  # torch's sparse tensors have no second ones
)
def test_hooks_and_retained_gradients_of_the_users_tensors_see_the_gradient_once(reader: str, create_graph: bool) -> None:
    def run(solve: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        (W,) = well_conditioned_leaves(1)
        b = draw(n, dtype=F64, seed=4).requires_grad_()
        K = 1.5 * W
        seen: list[Tensor] = []
        for tensor in (W, K, b):
            tensor.register_hook(lambda g: seen.append(g) or 0.1 * g)
        for leaf in (W, b):
            leaf.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad))
        K.retain_grad()
        x = solve(K, b)
        x.retain_grad()
        loss(x).backward(create_graph=create_graph)
        result = [*seen, W.grad, K.grad, b.grad, x.grad]
        W.grad = b.grad = None  # create_graph=True leaves a cycle
        return sorted((t.detach() for t in result), key=lambda t: (t.shape, float(t.norm())))

    for value, reference in zip(run(READERS[reader]), run(dense_solution), strict=True):
        assert relative_error(value, reference) <= 1e-7


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("parameter", [True, False])
def test_backward_hooks_of_a_module_have_no_part_in_the_algebra(parameter: bool) -> None:
    module = Child(well_conditioned_leaves(1)[0].detach(), buffer=not parameter)
    b = draw(n, dtype=F64).requires_grad_()
    calls: list[nn.Module] = []

    def hook(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        calls.append(module)
        return tuple(None if g is None else 7 * g for g in inputs)

    module.register_full_backward_hook(hook)
    leaves = [b, module.weight] if parameter else [b]
    value = torch.autograd.grad(loss(ns.solve(lambda v: module(v), b, rtol=1e-13)), leaves)
    reference = torch.autograd.grad(loss(dense_solution(module.weight, b)), leaves)
    for g, e in zip(value, reference, strict=True):
        assert relative_error(g, e) <= 1e-7
    assert not calls
    module(b).sum().backward()
    assert len(calls) == 1


SAVERS = {
    "identity": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "copy": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "on the CPU": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("reader", READERS)
def test_hooks_on_saved_tensors_change_no_gradient(reader: str, saver: str) -> None:
    results = []
    for solve, context in ((READERS[reader], SAVERS[saver]), (dense_solution, contextlib.nullcontext)):
        (W,) = well_conditioned_leaves(1)
        b = draw(n, dtype=F64, seed=4).requires_grad_()
        with context():
            value = loss(solve(W, b))
            first = torch.autograd.grad(value, [W, b], create_graph=reader != "coo")
            second = [] if reader == "coo" else torch.autograd.grad(sum(g.square().sum() for g in first), [W, b])
        results.append([*first, *second][: 2 if reader == "coo" else 4])
    for g, e in zip(*results, strict=True):
        assert relative_error(g, e) <= 1e-6


def in_a_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:  # a new thread, in which autograd counts its nodes from 0
        return pool.submit(function).result()


@pytest.mark.parametrize("older", range(6))
@pytest.mark.parametrize("reader", READERS)
def test_tensors_may_come_from_another_thread(reader: str, older: int) -> None:
    (W,) = well_conditioned_leaves(1)
    b = draw(n, dtype=F64, seed=4).requires_grad_()

    def made() -> Tensor:
        K = W
        for _ in range(older + 1):
            K = K * 1.1
        return K

    K = in_a_thread(made)
    for there, back in ((in_a_thread, lambda f: f()), (lambda f: f(), in_a_thread), (in_a_thread, in_a_thread)):
        x = there(lambda: READERS[reader](K, b))
        value = back(lambda x=x: torch.autograd.grad(loss(x), [W, b], retain_graph=True))
        for g, e in zip(value, torch.autograd.grad(loss(dense_solution(made(), b)), [W, b]), strict=True):
            assert relative_error(g, e) <= 1e-7


@pytest.mark.parametrize("older", range(6))
def test_hidden_dependency_from_another_thread_raises(older: int) -> None:
    (W,) = well_conditioned_leaves(1)

    def made() -> Tensor:
        K = W
        for _ in range(older + 1):
            K = K * 1.1
        return K

    K = in_a_thread(made)
    with pytest.raises(RuntimeError, match="params="):
        in_a_thread(lambda: ns.solve(lambda v: W @ v + unseen(K, v), draw(n, dtype=F64)))


def test_operator_may_read_its_right_hand_side() -> None:
    b = draw(n, dtype=F64).requires_grad_()

    def energy(w: Tensor) -> Tensor:
        return 2 * w.square().sum() + (w**4).sum() + w[0] * w[1]

    def product(v: Tensor) -> Tensor:
        return torch.func.vjp(torch.func.grad(energy), b)[1](v)[0]

    (g,) = torch.autograd.grad(loss(ns.solve(product, b, rtol=1e-13)), b)
    H = torch.autograd.functional.hessian(energy, b, create_graph=True)
    assert relative_error(g, torch.autograd.grad(loss(dense_solution(H, b)), b)[0]) <= 1e-7


def test_recording_runs_the_operator_once_and_again_only_for_what_it_keeps() -> None:
    (W,) = well_conditioned_leaves(1)
    b = draw(n, dtype=F64)
    kept = Kept(W)
    for A, runs in ((lambda v: W @ v, 1), (Child(W, buffer=True), 1), (kept, 2), (kept, 1)):
        assert Closure.record(A, b).runs == runs


def test_autocast_keeps_no_cast_from_recording() -> None:
    W = well_conditioned_leaves(1)[0].detach().float().requires_grad_()
    b = draw(n, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        W @ b  # the cast that this leaves behind is older than the solve
        closure = Closure.record(lambda v: (W @ v).float(), b)
    assert closure.runs == 1
    assert closure.recorded[0] is W


# -- dependencies that no recording can see ------------------------------------------------------------------------


def unseen(W: Tensor, v: Tensor) -> Tensor:
    """`W v` where no mode can look, as in compiled extension code; autograd sees it all the same."""
    with torch._C.DisableTorchFunction():
        return W @ v


@torch.jit.script
def scripted(W: Tensor, v: Tensor) -> Tensor:
    return torch.mv(W, v)


def scripted_module(W: Tensor) -> Any:
    return torch.jit.script(Child(W.detach(), buffer=False))


HIDDEN = {
    "leaf": lambda W: lambda v: unseen(W, v),
    "non-leaf": lambda W: (lambda P: lambda v: unseen(P, v))(2 * W),
    "beside a seen one": lambda W: (lambda P: lambda v: W @ v + unseen(P, v))(torch.sin(W)),
    "behind a seen one": lambda W: (lambda P: lambda v: W @ unseen(P, v))(torch.sin(W) + 3 * EYE),
    "scripted function": lambda W: lambda v: scripted(W, v),
    "scripted module": scripted_module,
    "operator": lambda W: ns.LinearOperator(lambda v: unseen(W, v), adjoint=lambda y: unseen(W.mH, y)),
}


@pytest.mark.parametrize("method", ["gmres", "bicgstab"])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_dependency_raises_and_names_params(name: str, method: str) -> None:
    (W,) = well_conditioned_leaves(1)
    with pytest.raises(RuntimeError, match="params="):
        ns.solve(HIDDEN[name](W), draw(n, dtype=F64), method=method)


TRANSFORMS = {
    "grad": lambda f, W: torch.func.grad(f)(W),
    "vjp": lambda f, W: torch.func.vjp(f, W),
    "jvp": lambda f, W: torch.func.jvp(f, (W,), (W,)),
}


def _nested(inner: Callable[..., Any], outer: Callable[..., Any]) -> Callable[..., Any]:
    """The tangent or cotangent of the outer transform reaches `W`, that of the inner one a factor beside it."""
    return lambda f, W: outer(lambda W: inner(lambda s: f(s * W), torch.ones((), dtype=F64)), W)


def _jvp(f: Callable[..., Any], x: Tensor) -> Tensor:
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


TRANSFORMS |= {
    "jvp of jvp": _nested(_jvp, _jvp),
    "jvp of grad": _nested(lambda f, x: torch.func.grad(f)(x), _jvp),
    "jvp of jvp, of a constant": lambda f, W: _jvp(lambda W: _jvp(lambda s: s * f(W), torch.ones((), dtype=F64)), W),
    "jacfwd": lambda f, W: torch.func.jacfwd(f)(W),
    "hessian": lambda f, W: torch.func.hessian(f)(W),
    "vmap of jvp": lambda f, W: torch.vmap(lambda W: _jvp(f, W))(W.expand(2, n, n)),
}


@pytest.mark.parametrize("name", ["leaf", "non-leaf", "beside a seen one", "behind a seen one"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_hidden_dependency_raises_inside_transforms(transform: str, name: str) -> None:
    W = well_conditioned_leaves(1)[0].detach()
    b = draw(n, dtype=F64)
    with pytest.raises(RuntimeError, match="params="):
        TRANSFORMS[transform](lambda W: ns.solve(HIDDEN[name](W), b).sum(), W)


@pytest.mark.parametrize("name", ["leaf", "non-leaf"])
def test_hidden_batch_raises_or_is_solved(name: str) -> None:
    W = well_conditioned_leaves(1)[0].detach()
    b, batch = draw(n, dtype=F64), torch.stack([W, 2 * W + W.T])

    def solution(W: Tensor) -> Tensor:
        return ns.solve(HIDDEN[name](W), b, rtol=1e-12)

    try:
        value = torch.vmap(solution)(batch)
    except RuntimeError as error:
        loud = ("params=", "did not converge", "escaped from inside a function being vmapped")  # ours, or torch's own words
        assert any(words in str(error) for words in loud)  # noqa: PT017 - a value is allowed as well
    else:
        assert relative_error(value, torch.stack([solution(W) for W in batch])) <= 1e-9


@pytest.mark.parametrize("name", ["beside a seen one", "behind a seen one"])
def test_dual_numbers_go_through_a_hidden_dependency_beside_a_seen_one(name: str) -> None:
    W = well_conditioned_leaves(1)[0].detach()
    b = draw(n, dtype=F64)
    dense = {"beside a seen one": lambda W: W + torch.sin(W), "behind a seen one": lambda W: W @ (torch.sin(W) + 3 * EYE)}[name]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(W, EYE)
        change = forward_ad.unpack_dual(ns.solve(HIDDEN[name](dual), b, rtol=1e-13)).tangent
        expected = forward_ad.unpack_dual(dense_solution(dense(dual), b)).tangent
    assert relative_error(change, expected) <= 1e-7


@pytest.mark.parametrize("name", ["leaf", "non-leaf"])
def test_hidden_dependency_raises_in_forward_mode(name: str) -> None:
    W = well_conditioned_leaves(1)[0].detach()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="params="):
        ns.solve(HIDDEN[name](forward_ad.make_dual(W, EYE)), draw(n, dtype=F64))


def test_hidden_constant_raises_nothing() -> None:
    W = well_conditioned_leaves(1)[0].detach()
    b = draw(n, dtype=F64).requires_grad_()
    (g,) = torch.autograd.grad(loss(ns.solve(lambda v: unseen(W, v), b, rtol=1e-13)), b)
    assert relative_error(g, torch.autograd.grad(loss(dense_solution(W, b)), b)[0]) <= 1e-7


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("product", [unseen, scripted], ids=["unseen", "scripted"])
def test_params_reach_a_hidden_dependency(product: Callable[..., Tensor], mode: Mode) -> None:
    W, s = (t.detach() for t in well_conditioned_leaves(2))
    b = draw(n, dtype=F64)

    def solution(W: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return ns.solve(lambda v, W, s: product(W, v) + s * v, b, params=(W, s), rtol=1e-13)

    value = mode(solution, (W, s, b))
    reference = mode(lambda W, s, b: dense_solution(W + s * EYE, b), (W, s, b))
    for g, e in zip(value, reference, strict=True):
        assert relative_error(g, e) <= TOLERANCE[mode.order]


# -- changes between the passes ------------------------------------------------------------------------------------

IN_PLACE = r"in-?place"
HOLDERS = {
    "closure": lambda W: lambda v: W @ v,
    "non-leaf closure": lambda W: (lambda held: lambda v: held[:] @ v)(W.view_as(W)),
    "module": lambda W: Child(W, buffer=True),
    "operator with adjoint": lambda W: ns.LinearOperator(lambda v: W @ v, adjoint=lambda y: W.mH @ y),
    "old-style function": lambda W: lambda v: OldStyleProduct.apply(W, v),
    "dense, iterative": lambda W: W,
    "dense, direct": lambda W: W,
    "dense operator": ns.aslinearoperator,
}


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("holder", HOLDERS)
def test_operator_changed_in_place_before_backward_raises(holder: str, needs_gradient: bool) -> None:
    W = well_conditioned_leaves(1)[0].detach().requires_grad_(needs_gradient)
    b = draw(n, dtype=F64).requires_grad_()
    x = ns.solve(HOLDERS[holder](W), b, method="direct" if holder == "dense, direct" else "gmres")
    with torch.no_grad():
        W.mul_(1.5)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        loss(x).backward()


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_params_changed_in_place_before_backward_raise(needs_gradient: bool) -> None:
    W = well_conditioned_leaves(1)[0].detach().requires_grad_(needs_gradient)
    b = draw(n, dtype=F64).requires_grad_()
    x = ns.solve(lambda v, W: W @ v, b, params=(W,))
    with torch.no_grad():
        W.mul_(1.5)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        loss(x).backward()


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_an_operator_that_reads_its_tensors_in_another_order_without_autograd(needs_gradient: bool) -> None:
    """As a product does that has a kernel of its own outside autograd. No tensor takes the place of another."""
    (W,) = well_conditioned_leaves(1)
    W, b = W.detach().requires_grad_(needs_gradient), draw(n, dtype=F64)
    small, large = torch.tensor(0.5, dtype=F64), torch.tensor(3.0, dtype=F64)

    def A(v: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return small * (W @ v) + large * v
        return v * large + (W @ v) * small

    x = ns.solve(A, b, rtol=1e-12)
    torch.testing.assert_close(x.detach(), torch.linalg.solve(0.5 * W.detach() + 3 * torch.eye(n, dtype=F64), b))


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_window_of_constants_that_has_moved_on_before_backward(needs_gradient: bool) -> None:
    """A loop has bound `t` to its last value when the backward pass runs, and what was `w[t + 1]` is another step's `w[t]`."""
    w = [1 + torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(t)) for t in range(5)]
    L = 2 * torch.eye(n, dtype=F64) - torch.eye(n, dtype=F64).roll(1, 0) - torch.eye(n, dtype=F64).roll(-1, 0)
    theta = (1 + draw(n, dtype=F64).abs()).requires_grad_(needs_gradient)
    u0 = draw(n, dtype=F64).requires_grad_()

    def march(solve: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        u = u0
        for t in range(3):
            matrix = torch.diag(w[t] + theta) + 0.1 * w[t + 1][:, None] * L
            u = solve(lambda v: v * w[t] + theta * v + 0.1 * w[t + 1] * (L @ v), u, matrix)  # noqa: B023 (late binding is the case)
        return torch.autograd.grad(u.sum(), (u0, theta) if needs_gradient else (u0,))

    ours = march(lambda A, b, _: ns.solve(A, b, rtol=1e-12))
    dense = march(lambda _, b, matrix: torch.linalg.solve(matrix, b))
    for mine, theirs in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
def test_a_sparse_operator_first_used_in_inference_mode_has_gradients_later(layout: torch.layout) -> None:
    W = well_conditioned_leaves(1)[0].detach().to_sparse(layout=layout).requires_grad_()
    operator, b = ns.aslinearoperator(W), draw(n, dtype=F64)
    with torch.inference_mode():
        x = ns.solve(operator, b, rtol=1e-12)
    (gradient,) = torch.autograd.grad(ns.solve(operator, b, rtol=1e-12).sum(), W)
    dense = W.detach().to_dense().requires_grad_()
    (expected,) = torch.autograd.grad(torch.linalg.solve(dense, b).sum(), dense)
    torch.testing.assert_close(gradient.to_dense(), expected * (W.detach().to_dense() != 0))
    torch.testing.assert_close(x.clone(), torch.linalg.solve(dense.detach(), b))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_sparse_operator_changed_in_place_before_backward_raises(layout: torch.layout, needs_gradient: bool) -> None:
    W = well_conditioned_leaves(1)[0].detach().to_sparse(layout=layout).requires_grad_(needs_gradient)
    b = draw(n, dtype=F64).requires_grad_()
    x = ns.solve(W, b)
    with torch.no_grad():
        W.mul_(1.5)
    with pytest.raises(RuntimeError, match=f"{IN_PLACE}|strides"):
        loss(x).backward()


def test_operator_changed_in_place_before_double_backward_raises() -> None:
    (W,) = well_conditioned_leaves(1)
    b = draw(n, dtype=F64).requires_grad_()
    (g,) = torch.autograd.grad(loss(ns.solve(lambda v: W @ v, b)), b, create_graph=True)
    with torch.no_grad():
        W.mul_(1.5)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        g.sum().backward()


def test_right_hand_side_may_change_after_the_solve() -> None:
    (W,) = well_conditioned_leaves(1)
    b = draw(n, dtype=F64)
    (reference,) = torch.autograd.grad(loss(dense_solution(W, b)), W)
    x = ns.solve(lambda v: W @ v, b, rtol=1e-13)
    b.zero_()
    assert relative_error(torch.autograd.grad(loss(x), W)[0], reference) <= 1e-7


class Counting(nn.Module):
    """A module that counts its calls and keeps its last input, as profilers and running statistics do."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(len(weight), dtype=weight.dtype))

    def forward(self, v: Tensor) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            self.last.copy_(v)
        return self.weight @ v


@pytest.mark.parametrize("method", ["gmres", "bicgstab"])
def test_buffers_that_the_operator_writes_itself_are_no_part_of_it(method: str) -> None:
    module = Counting(well_conditioned_leaves(1)[0].detach())
    b = draw(n, dtype=F64).requires_grad_()
    value = torch.autograd.grad(loss(ns.solve(module, b, method=method, rtol=1e-13)), [module.weight, b])
    reference = torch.autograd.grad(loss(dense_solution(module.weight, b)), [module.weight, b])
    assert int(module.calls) > 3
    for g, e in zip(value, reference, strict=True):
        assert relative_error(g, e) <= 1e-7


# -- scale and dtype -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_scaling_the_loss_scales_the_gradient(method: str, dtype: torch.dtype) -> None:
    form = FORM["dense"] if method == "direct" else FORM["closure"]
    W, b = (t.requires_grad_() for t in form.system(dtype))
    x = form.solve(method, W, b)
    plain = torch.autograd.grad(loss(x), [W, b], retain_graph=True)
    for exponent in (-12, 12) if dtype in WIDE else (-8, 8):
        scale = 10.0**exponent
        for g, e in zip(torch.autograd.grad(scale * loss(x), [W, b], retain_graph=True), plain, strict=True):
            assert relative_error(g / scale, e) <= 1e-6


@pytest.mark.parametrize("method", ITERATIVE)
def test_zero_cotangent_gives_a_zero_gradient(method: str) -> None:
    W, b = (t.requires_grad_() for t in FORM["closure"].system(F64))
    for g in torch.autograd.grad(0 * loss(FORM["closure"].solve(method, W, b)), [W, b]):
        assert not g.any()


def real_operators(W: Tensor) -> dict[str, Any]:
    d = W.diagonal()
    return {"closure": lambda v: d * v + 0.5 * v.roll(1), "dense": W, "csr": W.to_sparse_csr(), "coo": W.to_sparse_coo()}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("method", [None, "gmres", "bicgstab"])
def test_real_operator_acts_on_a_complex_right_hand_side(method: str | None, mode: Mode) -> None:
    W, b = well_conditioned_leaves(1)[0].detach(), draw(n, dtype=torch.complex128)
    value = mode(lambda W, b: ns.solve(W, b, method=method, rtol=1e-13), (W, b))
    reference = mode(lambda W, b: dense_solution(W.to(b.dtype), b), (W, b))
    for g, e in zip(value, reference, strict=True):
        assert g.dtype == e.dtype
        assert relative_error(g, e) <= TOLERANCE[mode.order]


@pytest.mark.parametrize("name", ["closure", "csr", "coo"])
def test_real_operator_of_every_kind_acts_on_a_complex_right_hand_side(name: str) -> None:
    (W,) = well_conditioned_leaves(1)
    b = draw(n, dtype=torch.complex128).requires_grad_()
    roll = torch.roll(EYE, 1, 0)
    dense = torch.diag(W.diagonal()) + 0.5 * roll if name == "closure" else W
    value = torch.autograd.grad(loss(ns.solve(real_operators(W)[name], b, rtol=1e-13)), [W, b])
    reference = torch.autograd.grad(loss(dense_solution(dense.to(b.dtype), b)), [W, b])
    for g, e in zip(value, reference, strict=True):
        assert g.dtype == e.dtype
        assert relative_error(g, e) <= 1e-7


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("method", [None, "gmres", "bicgstab"])
def test_gradient_to_a_real_right_hand_side_of_a_complex_tensor_is_real(method: str | None, mode: Mode) -> None:
    W, b = draw(n, n, dtype=torch.complex128) / 3 + 3 * EYE, draw(n, dtype=F64)
    value = mode(lambda W, b: ns.solve(W, b, method=method, rtol=1e-13), (W, b))
    reference = mode(lambda W, b: dense_solution(W, b.to(W.dtype)), (W, b))
    for g, e in zip(value, reference, strict=True):
        assert g.dtype == e.dtype
        assert relative_error(g, e) <= TOLERANCE[mode.order]


# -- sparse tensors ------------------------------------------------------------------------------------------------


def sparse_leaf(layout: torch.layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A sparse leaf and its pattern; one stored value is zero, and stays in the pattern."""
    mask = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 1], [1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    W = (draw(n, n, dtype=dtype) / 3 + 3 * EYE) * mask
    A = torch.where(mask, W, 0).to_sparse(layout=layout)
    A.values()[1] = 0
    return A.detach().requires_grad_(), mask


@pytest.mark.parametrize("method", ["gmres", "bicgstab"])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_leaf_gets_a_gradient_of_its_own_layout_and_pattern(
    layout: torch.layout, dtype: torch.dtype, method: str
) -> None:
    A, mask = sparse_leaf(layout, dtype)
    b = draw(n, dtype=dtype, seed=3).requires_grad_()
    dense = A.detach().to_dense().requires_grad_()
    g, g_b = torch.autograd.grad(loss(ns.solve(A, b, method=method, rtol=1e-13)), [A, b])
    e, e_b = torch.autograd.grad(loss(dense_solution(dense, b)), [dense, b])
    assert g.layout == layout
    assert g._nnz() == A._nnz() == int(mask.sum())
    if layout == torch.sparse_csr:
        assert torch.equal(g.crow_indices(), A.crow_indices())
        assert torch.equal(g.col_indices(), A.col_indices())
    else:
        assert torch.equal(g.coalesce().indices(), mask.nonzero().T)
    assert relative_error(g.to_dense(), e * mask) <= 1e-7
    assert relative_error(g_b, e_b) <= 1e-7


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_backward_fills_the_grad_of_a_sparse_leaf(layout: torch.layout) -> None:
    A, _ = sparse_leaf(layout, F64)
    b = draw(n, dtype=F64, seed=3)
    (g,) = torch.autograd.grad(loss(ns.solve(A, b)), A)
    for times in (1, 2):
        loss(ns.solve(A, b)).backward()
        assert A.grad.layout == layout
        assert relative_error(A.grad.to_dense(), times * g.to_dense()) <= 1e-12


def test_uncoalesced_values_get_their_gradients() -> None:
    indices = torch.tensor([[0, 0, 1, 2, 2, 2], [0, 0, 1, 2, 2, 0]])
    values = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.5, 0.5], dtype=F64, requires_grad=True)
    b = draw(3, dtype=F64)
    x = ns.solve(torch.sparse_coo_tensor(indices, values, (3, 3), check_invariants=True), b, rtol=1e-13)
    dense = torch.zeros(3, 3, dtype=F64).index_put(tuple(indices), values, accumulate=True)
    (g,), (e,) = (torch.autograd.grad(loss(y), values) for y in (x, dense_solution(dense, b)))
    assert relative_error(g, e) <= 1e-7


@pytest.mark.parametrize("form", [form for form in FORMS if form.reach == "values"], ids=lambda form: form.name)
def test_second_derivative_through_a_sparse_constructor_is_exact_or_raises(form: Form) -> None:
    # the constructors of sparse tensors drop the graph of the gradient, so that PyTorch alone would be wrong in silence
    W, b = (t.requires_grad_() for t in form.system(F64))
    direction = draw(*W.shape, dtype=F64, seed=5)

    def product(solve: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        g = torch.autograd.grad(loss(solve("gmres", W, b)), [W, b], create_graph=True)
        return torch.autograd.grad(inner(g, [direction, b]), [W, b])

    reference = product(form.reference)
    try:
        value = product(form.solve)
    except RuntimeError as error:
        assert "sparse" in str(error)  # noqa: PT017 - a value is allowed as well
    else:
        for g, e in zip(value, reference, strict=True):
            assert relative_error(g, e) <= 1e-6


# -- cost ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def factorisations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every factorisation of a matrix."""
    calls: list[int] = []
    for name in ("lu_factor_ex", "cholesky_ex", "lu_factor", "cholesky", "solve", "solve_ex", "inv", "inv_ex"):

        def counted(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return function(*args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, functools.partial(counted, getattr(torch.linalg, name)))
    return calls


@pytest.mark.parametrize("definite", [False, True])
def test_direct_path_factorises_once_for_all_passes(factorisations: list[int], definite: bool) -> None:
    W = matrix("definite" if definite else "general", draw(n, n, dtype=F64)).requires_grad_()
    b = draw(n, dtype=F64).requires_grad_()
    x = ns.solve(ns.aslinearoperator(W, positive_definite=definite), b)
    g = torch.autograd.grad(loss(x), [W, b], create_graph=True)
    h = torch.autograd.grad(sum(t.square().sum() for t in g), [W, b], create_graph=True)
    torch.autograd.grad(sum(t.sum() for t in h), [W, b])
    assert len(factorisations) == 1


ONCE = {
    "forward mode": lambda f, W, b: torch.func.jvp(f, (W, b), (W, b)),
    "hessian": lambda f, W, b: torch.func.hessian(lambda b: loss(f(W, b)))(b),
    "hessian in the matrix": lambda f, W, b: torch.func.hessian(lambda W: loss(f(W, b)))(W),
    "reverse over reverse": lambda f, W, b: torch.func.jacrev(torch.func.jacrev(lambda W: loss(f(W, b))))(W),
    "forward over forward": lambda f, W, b: torch.func.jacfwd(torch.func.jacfwd(lambda W: loss(f(W, b))))(W),
    "vmap over b": lambda f, W, b: torch.vmap(f, (None, 0))(W, torch.stack([b, 2 * b])),
    "vmap over both": lambda f, W, b: torch.vmap(f)(torch.stack([W, 2 * W]), torch.stack([b, b])),
    "vmap of grad": lambda f, W, b: torch.vmap(torch.func.grad(lambda b, W: loss(f(W, b))), (0, None))(torch.stack([b, b]), W),
    "vmap of hessian": lambda f, W, b: torch.vmap(torch.func.hessian(lambda W: loss(f(W, b))))(torch.stack([W, 2 * W])),
    "jacobian": lambda f, W, b: torch.func.jacrev(f, argnums=(0, 1))(W, b),
}


@pytest.mark.parametrize("name", ONCE)
def test_direct_path_factorises_once_in_every_transform(factorisations: list[int], name: str) -> None:
    W = well_conditioned_leaves(1)[0].detach()
    ONCE[name](ns.solve, W, draw(n, dtype=F64))
    assert len(factorisations) == 1


def saved_bytes(method: str, maxiter: int, **options: Any) -> tuple[int, int]:
    """What autograd keeps for the backward pass of a hard system, in bytes, and the iterations."""
    total = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal total
        total += t.numel() * t.element_size()
        return t

    d = torch.logspace(0, 8, 200, dtype=F64).requires_grad_()
    b = draw(200, dtype=F64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x, info = ns.solve_ex(lambda v: d * v, b, method=method, maxiter=maxiter, rtol=1e-14, on_failure="ignore", **options)
        del x
    return total, info.iterations


@pytest.mark.parametrize("method", ITERATIVE)
def test_bytes_saved_for_backward_do_not_depend_on_the_iterations(method: str) -> None:
    (few, five), (many, fifty) = saved_bytes(method, 5), saved_bytes(method, 50)
    assert (five, fifty) == (5, 50)
    assert few == many
    assert few <= 8 * 200 * 8  # the solution, the tensors of A, and what one recorded product saves
    assert (
        saved_bytes(method, 50, grad="unroll")[0] > 2 * saved_bytes(method, 5, grad="unroll")[0]
    )  # the measure can see growth


@pytest.mark.parametrize("grad_of", ["value", "gradient"])
def test_backward_keeps_nothing_more_after_more_iterations(grad_of: str) -> None:
    def saved(maxiter: int) -> int:
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        d = torch.logspace(0, 8, 200, dtype=F64).requires_grad_()
        x, _ = ns.solve_ex(lambda v: d * v, draw(200, dtype=F64), method="cg", maxiter=maxiter, rtol=1e-14, on_failure="ignore")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            torch.autograd.grad(x.sum(), d, create_graph=grad_of == "gradient")
        return total

    assert saved(5) == saved(50)


# -- nothing stays alive -------------------------------------------------------------------------------------------


def _forward(A: Any, W: Tensor, b: Tensor, **options: Any) -> list[Any]:
    x, info = ns.solve_ex(A, b, **options)
    return [x, info]


def _backward(A: Any, W: Tensor, b: Tensor, **options: Any) -> list[Any]:
    x, info = ns.solve_ex(A, b, **options)
    gradients = torch.autograd.grad(loss(x), [W, b])
    assert info.adjoint is not None
    return [x, info, info.adjoint, *gradients]


def _accumulated(A: Any, W: Tensor, b: Tensor, **options: Any) -> list[Any]:
    x, info = ns.solve_ex(A, b, **options)
    loss(x).backward()
    return [x, info, W.grad, b.grad]


def _double_backward(A: Any, W: Tensor, b: Tensor, **options: Any) -> list[Any]:
    x, info = ns.solve_ex(A, b, **options)
    gradients = torch.autograd.grad(loss(x), [W, b], create_graph=True)
    curvature = torch.autograd.grad(sum(g.square().sum() for g in gradients), [W, b])
    return [x, info, *gradients, *curvature]


def _unfinished_double_backward(A: Any, W: Tensor, b: Tensor, **options: Any) -> list[Any]:
    x, info = ns.solve_ex(A, b, **options)
    return [x, info, *torch.autograd.grad(loss(x), [W, b], create_graph=True)]


def _forward_mode(A: Any, W: Tensor, b: Tensor, **options: Any) -> list[Any]:
    with forward_ad.dual_level():
        x, info = ns.solve_ex(A, forward_ad.make_dual(b, b.detach().clone()), **options)
        tangent = forward_ad.unpack_dual(x).tangent
    return [x, info, tangent]


def _functional(A: Any, W: Tensor, b: Tensor, **options: Any) -> list[Any]:
    return [torch.func.grad(lambda b: loss(ns.solve(A, b, **options)))(b.detach())]


def _forward_failure(A: Any, W: Tensor, b: Tensor, **options: Any) -> list[Any]:
    try:
        ns.solve(A, b, **options | {"maxiter": 0})
    except ns.ConvergenceError as error:
        return [error.x, error.info]
    raise AssertionError("the solve must fail")


def _adjoint_failure(A: Any, W: Tensor, b: Tensor, **options: Any) -> list[Any]:
    x = ns.solve(A, b, adjoint=dict(maxiter=0), **options)
    try:
        loss(x).backward()
    except ns.ConvergenceError as error:
        return [x, error.x, error.info]
    raise AssertionError("the adjoint solve must fail")


def _lost_dependency(A: Any, W: Tensor, b: Tensor, **options: Any) -> list[Any]:
    with pytest.raises(RuntimeError, match="params="):
        ns.solve(lambda v: unseen(W, v), b)
    return []


HELD = {
    "closure": lambda P: lambda v: P @ v,
    "module": lambda P: Child(P, buffer=True),
    "operator": lambda P: ns.LinearOperator(lambda v: P @ v, adjoint=lambda y: P.mH @ y),
    "composite": lambda P: ns.LinearOperator(lambda v: P @ v) + 0.0 * ns.aslinearoperator(P),
    "dense": lambda P: P,
    "coo": lambda P: P.to_sparse_coo(),
}
ALL = tuple(HELD)
SCENARIOS = {
    _forward: ALL,
    _backward: ALL,
    _accumulated: ALL,
    _double_backward: ALL[:-1],  # sparse tensors have no second derivatives
    _unfinished_double_backward: ALL[:-1],
    _forward_mode: ALL,
    _functional: ALL,
    _forward_failure: ALL,
    _adjoint_failure: ALL,
    _lost_dependency: ("closure",),
}


@pytest.mark.parametrize(
    ("scenario", "form"),
    [pytest.param(f, form, id=f"{f.__name__.strip('_')}-{form}") for f, forms in SCENARIOS.items() for form in forms],
)
def test_nothing_stays_alive(scenario: Callable[..., list[Any]], form: str) -> None:
    def run() -> list[weakref.ref[Any]]:
        (W,) = well_conditioned_leaves(1)
        b = draw(n, dtype=F64).requires_grad_()
        P = 1.5 * W
        A = HELD[form](P)
        made = scenario(A, W, b, method="gmres")
        return [weakref.ref(t) for t in (W, P, b, A, *made) if t is not None]

    run()  # what torch imports at first use holds frames for a while
    gc.disable()  # reference counting alone must free everything: a cycle keeps an image in memory for long
    try:
        alive = [r() for r in run() if r() is not None]
        assert alive == []
    finally:
        gc.enable()


# -- false claims --------------------------------------------------------------------------------------------------


def mildly_nonsymmetric(dtype: torch.dtype) -> Tensor:
    """Positive definite but for a skew part of a thousandth, which a restarted Hermitian method overcomes."""
    skew = torch.full((n, n), 1e-3, dtype=dtype).triu(1)
    return matrix("definite", draw(n, n, dtype=dtype)) + skew - skew.mT


def claimed(A: Tensor, **claims: Any) -> ns.LinearOperator:
    return ns.LinearOperator(lambda v: A @ v, **claims)


FALSE = {
    "cg": lambda A: (lambda v: A @ v, {"method": "cg"}),
    "minres": lambda A: (lambda v: A @ v, {"method": "minres"}),
    "cg on a tensor": lambda A: (A, {"method": "cg"}),
    "hermitian": lambda A: (claimed(A, hermitian=True), {}),
    "positive definite": lambda A: (claimed(A, positive_definite=True), {}),
    "hermitian, by gmres": lambda A: (claimed(A, hermitian=True), {"method": "gmres"}),
    "hermitian, by bicgstab": lambda A: (claimed(A, hermitian=True), {"method": "bicgstab"}),
    "hermitian tensor": lambda A: (ns.aslinearoperator(A, hermitian=True), {"method": "gmres"}),
    "positive definite tensor": lambda A: (ns.aslinearoperator(A, positive_definite=True), {}),
    "positive definite sum": lambda A: (
        2 * claimed(A / 4, positive_definite=True) + claimed(A / 2, positive_definite=True),
        {},
    ),
    "adjoint that is the operator": lambda A: (claimed(A, adjoint=lambda y: A @ y), {}),
    "scaled adjoint": lambda A: (claimed(A, adjoint=lambda y: 1.001 * (A.mH @ y)), {"method": "bicgstab"}),
    "adjoint with a stray term": lambda A: (claimed(A, adjoint=lambda y: A.mH @ y + 1e-3 * y.roll(1)), {}),
}


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("claim", FALSE)
def test_false_claim_never_gives_a_wrong_gradient_in_silence(claim: str, dtype: torch.dtype) -> None:
    W = mildly_nonsymmetric(dtype).requires_grad_()
    b = draw(n, dtype=dtype, seed=1).requires_grad_()
    A, options = FALSE[claim](W)
    x, info = ns.solve_ex(A, b, on_failure="ignore", **options)
    assert info.converged
    assert relative_error(x, dense_solution(W, b)) <= 1e-6

    x = ns.solve(A, b, **options)
    with pytest.raises(ns.ConvergenceError, match="adjoint") as caught:
        loss(x).backward()
    assert caught.value.info.status == ns.Status.NOT_HERMITIAN
    assert W.grad is None
    assert b.grad is None


@pytest.mark.parametrize("claim", FALSE)
def test_false_claim_is_seen_under_every_policy(claim: str) -> None:
    W = mildly_nonsymmetric(F64).requires_grad_()
    b = draw(n, dtype=F64, seed=1)
    A, options = FALSE[claim](W)
    x, info = ns.solve_ex(A, b, **options)
    with pytest.warns(ns.ConvergenceWarning, match="adjoint"):
        loss(x).backward()
    assert not info.adjoint.converged
    assert info.adjoint.status == ns.Status.NOT_HERMITIAN


@pytest.mark.parametrize("claim", ["cg", "hermitian, by gmres", "positive definite tensor", "scaled adjoint"])
def test_false_claim_raises_inside_transforms(claim: str) -> None:
    W, b = mildly_nonsymmetric(F64), draw(n, dtype=F64, seed=1)

    def f(W: Tensor, b: Tensor) -> Tensor:
        A, options = FALSE[claim](W)
        return loss(ns.solve(A, b, **options))

    with pytest.raises(ns.ConvergenceError):
        torch.func.grad(f, argnums=(0, 1))(W, b)


@pytest.mark.parametrize("claim", FALSE)
def test_forward_mode_does_not_rest_on_a_claim(claim: str) -> None:
    W, b = mildly_nonsymmetric(F64), draw(n, dtype=F64, seed=1)
    d = draw(n, n, dtype=F64, seed=2)

    def f(W: Tensor) -> Tensor:
        A, options = FALSE[claim](W)
        return ns.solve(A, b, rtol=1e-11, **options)

    _, value = torch.func.jvp(f, (W,), (d,))
    _, reference = torch.func.jvp(lambda W: dense_solution(W, b), (W,), (d,))
    assert relative_error(value, reference) <= 1e-7


@pytest.mark.parametrize("kind", HERMITIAN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_true_claim_is_never_called_false(kind: str, dtype: torch.dtype) -> None:
    method = next(m for m in METHODS if KIND[m] == kind)
    for seed in range(5):
        W, b = (t.requires_grad_() for t in FORM["operator with claims"].system(dtype, seed))
        x = FORM["operator with claims"].solve(method, W, b, rtol=RTOL[dtype])
        assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(loss(x), [W, b]))


# -- compiled surroundings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_layer", [False, True])
def test_compiled_code_around_a_solve_keeps_its_value_and_its_gradients(as_layer: bool) -> None:
    (W,) = well_conditioned_leaves(1)
    b = draw(n, dtype=F64).requires_grad_()
    call = ns.LinearSolve(method="gmres", rtol=1e-13) if as_layer else functools.partial(ns.solve, method="gmres", rtol=1e-13)

    def step(b: Tensor) -> Tensor:
        y = torch.sin(b) * 2
        return loss(call(lambda v: W @ v, y) * 3)

    torch.compiler.reset()
    value = torch.compile(step, backend="aot_eager")(b)
    expected = step(b)
    assert relative_error(value, expected) <= 1e-12
    for got, wanted in zip(torch.autograd.grad(value, [W, b]), torch.autograd.grad(expected, [W, b]), strict=True):
        assert relative_error(got, wanted) <= 1e-9


# -- mixed precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["closure", "dense", "csr"])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_a_solve_and_its_gradients_keep_their_precision_under_autocast(form: str, backward_inside: bool) -> None:
    def run(autocast: bool) -> tuple[Tensor, ...]:
        W, b = (t.requires_grad_() for t in FORM[form].system(torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            x = FORM[form].solve("gmres", W, b)
            if backward_inside:
                return x, *torch.autograd.grad(loss(x), [W, b])
        return x, *torch.autograd.grad(loss(x), [W, b])

    for value, reference in zip(run(True), run(False), strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, reference) <= 1e-6


def test_forward_mode_keeps_its_precision_under_autocast() -> None:
    W, b = FORM["closure"].system(torch.float32)

    def change() -> Tensor:
        return torch.func.jvp(lambda W: ns.solve(lambda v: W @ v, b, rtol=1e-6), (3 * torch.eye(len(W)) + W / 4,), (W,))[1]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = change()
    assert relative_error(inside, change()) <= 1e-6
