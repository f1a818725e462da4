"""Dense references, and the tables of cases that the tests share.

A *system* is a matrix `A(W)` of one of three kinds, made from free parameters `W` so that a derivative with respect to `W`
stays within the kind, and a right-hand side `b`. A *form* is one of the ways in which `A` can be given to the library. A
*mode* is one of the ways in which PyTorch differentiates. Each reference is `inv(A(W)) @ b` in the same mode, because the
forward-mode second derivatives of `torch.linalg.solve` are wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import nablasolve as ns

N = 6
ITERATIVE = ("cg", "minres", "gmres", "bicgstab")
METHODS = (*ITERATIVE, "direct")
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
WIDE = (torch.float64, torch.complex128)
# What each method is for.
KIND = {"cg": "definite", "minres": "indefinite", "gmres": "general", "bicgstab": "general", "direct": "general"}
HERMITIAN = ("definite", "indefinite")
# Below what a test asks of the derivatives, and above what the dtype can reach.
RTOL = {torch.float32: 1e-6, torch.complex64: 1e-6, torch.float64: 1e-12, torch.complex128: 1e-12}
# For values, first and second derivatives of 64-bit solves.
TOLERANCE = (1e-9, 1e-7, 1e-6)


# -- systems and their dense solution ------------------------------------------------------------------------------


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Standard normal numbers from a generator of their own."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def matrix(kind: str, W: Tensor) -> Tensor:
    """A well-conditioned matrix (or a batch of them) for any `W` of that shape; Hermitian kinds are so by construction."""
    n = W.shape[-1]
    if kind == "definite":
        return W @ W.mH / n + torch.eye(n, dtype=W.dtype)
    if kind == "indefinite":
        signs = torch.ones(n, dtype=W.real.dtype)
        signs[1::2] = -1
        return (W + W.mH) / (2 * n) + torch.diag(2 * signs)
    return W / n**0.5 + 3 * torch.eye(n, dtype=W.dtype)


def dense_solution(A: Tensor, b: Tensor) -> Tensor:
    """`A^{-1} b` by an explicit inverse, which PyTorch differentiates rightly in every mode."""
    return (torch.linalg.inv(A) @ b.unsqueeze(-1)).squeeze(-1)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """`|value - reference| / |reference|`, or the absolute error where the reference vanishes."""
    value, reference = value.detach(), reference.detach()
    size = float(torch.linalg.vector_norm(reference))
    return float(torch.linalg.vector_norm(value - reference)) / (size or 1.0)


def tolerance(order: int, dtype: torch.dtype, A: Tensor) -> float:
    """What the error of a derivative of this order may be.

    In 32-bit arithmetic a solve leaves `cond(A) (rtol + n eps)`, a derivative of order `k` goes through `k + 1` solves, and
    a factor of 10 is left for cancellation in what is summed.
    """
    if dtype in WIDE:
        return TOLERANCE[order]
    condition = float(torch.linalg.cond(A).max())
    return 10 * (order + 1) * condition ** (order + 1) * (RTOL[dtype] + A.shape[-1] * torch.finfo(dtype).eps)


# -- forms of A ----------------------------------------------------------------------------------------------------


class Holder:
    """An object whose bound method is the operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def multiply(self, v: Tensor) -> Tensor:
        return self.matrix @ v


class Multiply(nn.Module):
    """A module that holds its matrix as a plain attribute, so that the matrix may be no leaf."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, v: Tensor) -> Tensor:
        return self.matrix @ v


class Parametrised(nn.Module):
    """A module that holds its matrix as a parameter."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, n, dtype=dtype))

    def forward(self, v: Tensor) -> Tensor:
        return self.weight @ v


class OldStyleProduct(torch.autograd.Function):
    """`matrix @ v` as a user writes it, with `forward(ctx, ...)`."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(matrix, v)
        ctx.save_for_forward(matrix, v)
        return matrix @ v

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        matrix, v = ctx.saved_tensors
        return torch.outer(cotangent, v.conj()), matrix.mH @ cotangent

    @staticmethod
    def jvp(ctx: Any, d_matrix: Tensor | None, d_v: Tensor | None) -> Tensor:
        matrix, v = ctx.saved_tensors
        change = torch.zeros_like(v)
        change = change if d_matrix is None else change + d_matrix @ v
        return change if d_v is None else change + matrix @ d_v


class NewStyleProduct(torch.autograd.Function):
    """`matrix @ v` as a user writes it, with `setup_context`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, v: Tensor) -> Tensor:
        return matrix @ v

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    backward = OldStyleProduct.backward
    jvp = OldStyleProduct.jvp


@functools.cache
def compiled_product(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A compiled `matrix @ v`. One for all cases, as compiling anew for each costs most of the time of a test."""
    return torch.compile(lambda matrix, v: matrix @ v, backend=backend, dynamic=True)  # type: ignore[no-any-return]


def pattern(kind: str, block: int = 1) -> Tensor:
    """A 0/1 pattern with rows of unequal lengths.

    For Hermitian kinds it is an equivalence relation, hence positive semidefinite, so that by Schur's product theorem the
    masked matrix stays positive definite where it was.
    """
    classes = torch.tensor([0, 1, 0, 2, 0, 1]) if block == 1 else torch.tensor([0, 1, 0])
    mask = classes[:, None] == classes
    if kind == "general":
        mask[0, 1] = mask[-1, 1] = True
    return mask.repeat_interleave(block, 0).repeat_interleave(block, 1)


def sparse(layout: torch.layout, A: Tensor, kind: str) -> Tensor:
    """The entries of `A` on the pattern as a sparse tensor, built from values that autograd can follow."""
    if layout == torch.sparse_coo:
        indices = pattern(kind).nonzero().T
        return torch.sparse_coo_tensor(indices, A[tuple(indices)], A.shape, check_invariants=True)
    if layout in (torch.sparse_csr, torch.sparse_csc):
        mask, entries = pattern(kind), A
    else:
        mask, entries = pattern(kind, 2)[::2, ::2], A.reshape(N // 2, 2, N // 2, 2).movedim(1, 2)
    by_rows = layout in (torch.sparse_csr, torch.sparse_bsr)
    outer, inner = mask.nonzero().T if by_rows else mask.T.nonzero().T
    values = entries[outer, inner] if by_rows else entries[inner, outer]
    pointers = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(outer, minlength=len(mask)).cumsum(0)])
    return torch.sparse_compressed_tensor(pointers, inner, values, A.shape, layout=layout, check_invariants=True)


def _linear(A: Tensor) -> ns.LinearOperator:
    return ns.LinearOperator(lambda v: A @ v)


def _with_adjoint(A: Tensor) -> ns.LinearOperator:
    return ns.LinearOperator(lambda v: A @ v, adjoint=lambda y: A.mH @ y)


def _claimed(A: Tensor, kind: str) -> ns.LinearOperator:
    return ns.LinearOperator(lambda v: A @ v, hermitian=kind in HERMITIAN, positive_definite=kind == "definite")


def _factor(A: Tensor) -> Tensor:
    """The inverse of a fixed unit triangular matrix, to be multiplied away again."""
    return torch.linalg.inv(_triangle(A))


def _triangle(A: Tensor) -> Tensor:
    return torch.eye(N, dtype=A.dtype) + torch.full((N, N), 0.25, dtype=A.dtype).triu(1)


def _gram(A: Tensor) -> ns.LinearOperator:
    """`A = B^H B + damp^2 I`, where `A - damp^2 I` is positive definite because `A >= I`."""
    B = torch.linalg.cholesky(A - 0.25 * torch.eye(N, dtype=A.dtype)).mH
    return _linear(B).gram(damp=0.5)


def _functional(A: Tensor) -> Callable[[Tensor], Tensor]:
    module = Parametrised(N, A.dtype)
    return lambda v: torch.func.functional_call(module, {"weight": A}, (v,))


def _split(b: Tensor) -> dict[str, Any]:
    return {"low": b[:2], "high": (b[2:3], b[3:].reshape(3, 1))}


def _join(x: dict[str, Any]) -> Tensor:
    return torch.cat([x["low"], x["high"][0], x["high"][1].reshape(-1)])


@dataclass(frozen=True)
class Form:
    """One way to give `A`.

    Attributes:
        build: `(dense matrix, kind) -> A`.
        pack, unpack: between the flat vector and the tree that `A` acts on.
        options: further keywords of `solve`, from the matrix.
        batch: batch dimensions of `b`.
        shared: whether all systems of the batch have one matrix.
        block: the side of the blocks of the pattern; 0 for a full matrix.
        methods: the methods that take this form.
        kinds: the kinds of matrix that it can hold.
        reach: how PyTorch itself can differentiate through the form: `"all"`; `"plain"`, without `torch.func`; or
            `"values"`, by one backward pass alone, as the constructors of sparse tensors have neither forward mode nor second
            derivatives (and those of compressed layouts no complex ones). The right-hand side knows no such limit.
    """

    name: str
    build: Callable[[Tensor, str], Any]
    pack: Callable[[Tensor], Any] = lambda b: b
    unpack: Callable[[Any], Tensor] = lambda x: x
    options: Callable[[Tensor], dict[str, Any]] = lambda A: {}
    batch: tuple[int, ...] = ()
    shared: bool = False
    block: int = 0
    methods: tuple[str, ...] = ITERATIVE
    kinds: tuple[str, ...] = ("definite", "indefinite", "general")
    reach: str = "all"

    def kind(self, method: str) -> str:
        """The kind of matrix on which to try a method."""
        return KIND[method] if KIND[method] in self.kinds else self.kinds[0]

    def dense(self, kind: str, W: Tensor) -> Tensor:
        """The dense matrix of the operator."""
        A = matrix(kind, W)
        return A * pattern(kind, self.block) if self.block else A

    def system(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
        """`W` and `b`."""
        matrices = () if self.shared else self.batch
        return draw(*matrices, N, N, dtype=dtype, seed=seed), draw(*self.batch, N, dtype=dtype, seed=seed + 1)

    def solver(self, method: str, W: Tensor, **options: Any) -> Callable[[Tensor], Tensor]:
        """The library's `b -> x`, flat, for one operator."""
        kind = self.kind(method)
        dense = matrix(kind, W)
        A = self.build(dense, kind)
        options = {"rtol": RTOL[W.dtype]} | self.options(dense) | options
        return lambda b: self.unpack(ns.solve(A, self.pack(b), method=method, **options))

    def solve(self, method: str, W: Tensor, b: Tensor, **options: Any) -> Tensor:
        """The library's solution, flat."""
        return self.solver(method, W, **options)(b)

    def reference(self, method: str, W: Tensor, b: Tensor) -> Tensor:
        """The dense solution, flat."""
        return dense_solution(self.dense(self.kind(method), W), b)


FORMS = (
    Form("closure", lambda A, kind: lambda v: A @ v),
    Form("bound method", lambda A, kind: Holder(A).multiply),
    Form("module", lambda A, kind: Multiply(A)),
    Form("functional module", lambda A, kind: _functional(A)),
    Form("batched closure", lambda A, kind: lambda v: v @ A.mT, batch=(2,), shared=True, options=lambda A: {"batch_dims": 1}),
    Form("dense", lambda A, kind: A, methods=METHODS),
    Form("dense batch", lambda A, kind: A, batch=(2,), methods=METHODS),
    Form("dense, many right-hand sides", lambda A, kind: A, batch=(2,), shared=True, methods=METHODS),
    Form("dense operator", lambda A, kind: ns.aslinearoperator(A), methods=METHODS),
    *(
        Form(
            str(layout).removeprefix("torch.sparse_"),
            functools.partial(sparse, layout),
            block=2 if layout in (torch.sparse_bsr, torch.sparse_bsc) else 1,
            reach="values",
        )
        for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    ),
    Form("operator", lambda A, kind: _linear(A)),
    Form("operator with adjoint", lambda A, kind: _with_adjoint(A)),
    Form("operator with claims", _claimed),
    Form("sum", lambda A, kind: _linear(2 * A) + _with_adjoint(-A)),
    Form("difference", lambda A, kind: _linear(2 * A) - A),
    Form("product", lambda A, kind: _with_adjoint(A @ _factor(A)) @ _with_adjoint(_triangle(A))),
    Form("product with a derived adjoint", lambda A, kind: _linear(A @ _factor(A)) @ _linear(_triangle(A))),
    Form("scaled by a number", lambda A, kind: -(_linear(-2 * A) / 2)),
    Form("scaled by a tensor", lambda A, kind: A[0, 0] * _with_adjoint(A / A[0, 0])),
    Form("adjoint", lambda A, kind: _linear(A.mH).H),
    Form("adjoint of one with adjoint", lambda A, kind: _with_adjoint(A.mH).H),
    Form("transpose", lambda A, kind: _linear(A.mT).T),
    Form("conjugate", lambda A, kind: _linear(A.conj()).conj()),
    Form("gram", lambda A, kind: _gram(A), kinds=("definite",)),
    Form("compiled, eager", lambda A, kind: lambda v: compiled_product("eager")(A, v)),
    Form("compiled, aot_eager", lambda A, kind: lambda v: compiled_product("aot_eager")(A, v)),
    Form("old-style function", lambda A, kind: lambda v: OldStyleProduct.apply(A, v), reach="plain"),
    Form("new-style function", lambda A, kind: lambda v: NewStyleProduct.apply(A, v)),
    Form("params", lambda A, kind: lambda v, A: A @ v, options=lambda A: {"params": (A,)}),
    Form("pytree", lambda A, kind: lambda v: _split(A @ _join(v)), pack=_split, unpack=_join),
)
FORM = {form.name: form for form in FORMS}


@dataclass(frozen=True)
class Case:
    """A form, a method and a dtype."""

    form: Form
    method: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.form.name}-{self.method}-{str(self.dtype).removeprefix('torch.')}"


def cases(dtypes: Sequence[torch.dtype], forms: Sequence[Form] = FORMS, every: bool = False) -> list[Case]:
    """The forms with each of their methods, each pair with one of the dtypes in turn, or with every one."""
    result = []
    for i, form in enumerate(forms):
        for j, method in enumerate(form.methods):
            chosen = dtypes if every else [dtypes[(i + j) % len(dtypes)]]
            result += [Case(form, method, dtype) for dtype in chosen]
    return result


# -- modes of differentiation --------------------------------------------------------------------------------------

Solution = Callable[..., Tensor]  # the parameters -> x


def loss(x: Tensor) -> Tensor:
    """A real loss with third derivatives, neither symmetric in the entries nor in real and imaginary part."""
    weights = torch.linspace(-1, 2, x.shape[-1], dtype=x.real.dtype)
    square = (x * x.conj()).real
    linear = (weights * x * (1 - 0.5j)).real if x.is_complex() else weights * x
    return (linear + weights.flip(-1) * square + 0.1 * square * square).sum()


def inner(g: Sequence[Tensor], d: Sequence[Tensor]) -> Tensor:
    """`Re<g, d>` over a tuple of tensors."""
    total = sum((a.conj() * b).real.sum() for a, b in zip(g, d, strict=True))
    assert isinstance(total, Tensor)
    return total


def _leaves(p: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in p]


def _grad(f: Solution, p: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(f(*p)), tuple(p), create_graph=create_graph)


def _func_grad(f: Solution) -> Callable[..., tuple[Tensor, ...]]:
    def gradient(*p: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.func.grad(lambda *p: loss(f(*p)), argnums=tuple(range(len(p))))(*p)
        return result

    return gradient


def _func_jvp(f: Callable[..., Any], d: Sequence[Tensor]) -> Callable[..., Any]:
    return lambda *p: torch.func.jvp(f, tuple(p), tuple(d))[1]


def _dual(p: Sequence[Tensor], d: Sequence[Tensor]) -> list[Tensor]:
    return [forward_ad.make_dual(t, u) for t, u in zip(p, d, strict=True)]


def _tangent(t: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(t).tangent
    return torch.zeros_like(t) if tangent is None else tangent


def backward(f: Solution, p: Sequence[Tensor], d: Sequence[Tensor], e: Sequence[Tensor]) -> Any:
    p = _leaves(p)
    loss(f(*p)).backward()
    return [t.grad for t in p]


def grad(f: Solution, p: Sequence[Tensor], d: Sequence[Tensor], e: Sequence[Tensor]) -> Any:
    return _grad(f, _leaves(p))


def func_grad(f: Solution, p: Sequence[Tensor], d: Sequence[Tensor], e: Sequence[Tensor]) -> Any:
    return _func_grad(f)(*p)


def dual_numbers(f: Solution, p: Sequence[Tensor], d: Sequence[Tensor], e: Sequence[Tensor]) -> Any:
    with forward_ad.dual_level():
        return _tangent(f(*_dual(p, d)))


def func_jvp(f: Solution, p: Sequence[Tensor], d: Sequence[Tensor], e: Sequence[Tensor]) -> Any:
    return _func_jvp(f, d)(*p)


def reverse_over_reverse(f: Solution, p: Sequence[Tensor], d: Sequence[Tensor], e: Sequence[Tensor]) -> Any:
    p = _leaves(p)
    return torch.autograd.grad(inner(_grad(f, p, create_graph=True), d), p)


def func_reverse_over_reverse(f: Solution, p: Sequence[Tensor], d: Sequence[Tensor], e: Sequence[Tensor]) -> Any:
    return torch.func.grad(lambda *p: inner(_func_grad(f)(*p), d), argnums=tuple(range(len(p))))(*p)


def forward_over_reverse(f: Solution, p: Sequence[Tensor], d: Sequence[Tensor], e: Sequence[Tensor]) -> Any:
    p = _leaves(p)
    with forward_ad.dual_level():
        return [_tangent(g) for g in _grad(f, _dual(p, d), create_graph=True)]


def func_forward_over_reverse(f: Solution, p: Sequence[Tensor], d: Sequence[Tensor], e: Sequence[Tensor]) -> Any:
    return _func_jvp(_func_grad(f), d)(*p)


def reverse_over_forward(f: Solution, p: Sequence[Tensor], d: Sequence[Tensor], e: Sequence[Tensor]) -> Any:
    p = _leaves(p)
    with forward_ad.dual_level():
        change = _tangent(loss(f(*_dual(p, d))))
        return torch.autograd.grad(change, p)


def func_reverse_over_forward(f: Solution, p: Sequence[Tensor], d: Sequence[Tensor], e: Sequence[Tensor]) -> Any:
    return torch.func.grad(_func_jvp(lambda *p: loss(f(*p)), d), argnums=tuple(range(len(p))))(*p)


def func_forward_over_forward(f: Solution, p: Sequence[Tensor], d: Sequence[Tensor], e: Sequence[Tensor]) -> Any:
    return _func_jvp(_func_jvp(f, d), e)(*p)


@dataclass(frozen=True)
class Mode:
    """One way to differentiate a solution: `run(f, p, d, e)` with parameters `p` and directions `d` and `e`."""

    run: Callable[[Solution, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Any]
    order: int
    func: bool = False
    forward: bool = False

    def __str__(self) -> str:
        return self.run.__name__

    def __call__(self, f: Solution, p: Sequence[Tensor], seed: int = 7) -> list[Tensor]:
        d, e = ([draw(*t.shape, dtype=t.dtype, seed=s + i) for i, t in enumerate(p)] for s in (seed, seed + 10))
        result = self.run(f, p, d, e)
        return [result] if isinstance(result, Tensor) else list(result)


FIRST_ORDER = (
    Mode(backward, 1),
    Mode(grad, 1),
    Mode(func_grad, 1, func=True),
    Mode(dual_numbers, 1, forward=True),
    Mode(func_jvp, 1, func=True, forward=True),
)
SECOND_ORDER = (
    Mode(reverse_over_reverse, 2),
    Mode(func_reverse_over_reverse, 2, func=True),
    Mode(forward_over_reverse, 2, forward=True),
    Mode(func_forward_over_reverse, 2, func=True, forward=True),
    Mode(reverse_over_forward, 2, forward=True),
    Mode(func_reverse_over_forward, 2, func=True, forward=True),
    Mode(func_forward_over_forward, 2, func=True, forward=True),
)
MODES = (*FIRST_ORDER, *SECOND_ORDER)


def allowed(mode: Mode, case: Case) -> bool:
    """Whether PyTorch can run the form in this mode at all."""
    return not (case.form.reach == "plain" and mode.func)


def reaches_matrix(mode: Mode, case: Case) -> bool:
    """Whether PyTorch can differentiate the form itself, and not the right-hand side alone, in this mode."""
    if case.form.reach != "values":
        return True
    real = case.form.name == "coo" or not case.dtype.is_complex
    return real and mode.order == 1 and not mode.func and not mode.forward


def differentiated(mode: Mode, case: Case) -> list[Tensor]:
    """The derivative of the library's solution in `W` and `b`, or in `b` alone."""
    W, b = case.form.system(case.dtype)
    if reaches_matrix(mode, case):
        return mode(lambda W, b: case.form.solve(case.method, W, b), (W, b))
    return mode(case.form.solver(case.method, W), (b,))


@functools.cache
def reference_derivative(mode: Mode, case: Case) -> list[Tensor]:
    """The same derivative of the dense solution."""
    W, b = case.form.system(case.dtype)
    if reaches_matrix(mode, case):
        return mode(lambda W, b: case.form.reference(case.method, W, b), (W, b))
    return mode(lambda b: case.form.reference(case.method, W, b), (b,))


def pairwise() -> list[tuple[Mode, Case]]:
    """Every pair of form and mode, of form and method, of method and mode, and of each of these with a 64-bit dtype."""
    result = []
    for i, form in enumerate(FORMS):
        for j, mode in enumerate(MODES):
            turn, method = divmod(i + j, len(form.methods))
            case = Case(form, form.methods[method], WIDE[(turn + i) % 2])
            if allowed(mode, case):
                result.append((mode, case))
    return result
