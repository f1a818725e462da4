"""The libraries: each class poses a workload to one of them, as its own documentation would have a user do it."""

# ruff: noqa: D102  (overriding methods, which the base class documents)
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from . import floor
from .imaging import DeepInverse, DProx
from .peers import CoLA, LinearOperatorLibrary, SparseGradUtils, XiTorch
from .posing import Adapter, Posed, Request
from .workloads import Product, Workload


class Floor(Adapter):
    """The hand-written loop, with its implicit derivative by hand."""

    name = "floor"
    module = "torch"

    def supports(self, workload: Workload) -> bool:
        return True

    def products(self, w: Workload, theta: Tensor) -> tuple[Product, Product]:
        """What the loop calls for A and for its transpose."""
        return w.operator(theta), w.transposed(theta)

    def pose(self, workload: Workload, request: Request) -> Posed:
        w, rtol, maxiter, steps = workload, request.rtol, request.maxiter, [0]

        def solve(A: Product, b: Tensor, x0: Tensor | None = None) -> Tensor:
            A = request.count(A)
            if w.batch_dims:
                return floor.batched_cg(A, b, rtol, maxiter)
            if w.method == "gmres":
                return floor.gmres(A, b, rtol, maxiter, w.restart)
            if w.method == "bicgstab":
                return floor.bicgstab(A, b, rtol, maxiter)
            return floor.cg(A, b, rtol, maxiter, x0)

        def least(theta: Tensor, b: Tensor) -> Tensor:
            A, AT = (request.count(f) for f in self.products(w, theta))
            return floor.cgls(A, AT, b, w.damp, rtol, maxiter)

        @torch.no_grad()
        def forward(theta: Tensor, b: Tensor) -> Tensor:
            if w.method == "direct":
                return torch.linalg.solve(theta, b)
            x = least(theta, b) if w.least_squares else solve(self.products(w, theta)[0], b)
            steps[0] = floor.iterations(w.method, request.counted)
            return x

        @torch.no_grad()
        def gradient(theta: Tensor, b: Tensor, c: Tensor, x0: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
            if w.method == "direct":
                LU, pivots = torch.linalg.lu_factor(theta)
                x = torch.linalg.lu_solve(LU, pivots, b[..., None])[..., 0]
                adjoint = torch.linalg.lu_solve(LU, pivots, c[..., None], adjoint=True)[..., 0]
                return x, -adjoint[..., None] * x[..., None, :], adjoint
            if w.least_squares:
                x, (A, AT) = least(theta, b), self.products(w, theta)
                steps[0] = floor.iterations(w.method, request.counted)
                s = solve(lambda v: AT(A(v)).add_(v, alpha=w.damp**2), c)
                Ax, As = A(x), A(s)
                return x, w.pullback(theta, b - Ax, s) - w.pullback(theta, As, x), As
            A, AT = self.products(w, theta)
            x = solve(A, b, x0)
            steps[0] = floor.iterations(w.method, request.counted)
            adjoint = solve(AT, c)
            return x, w.pullback(theta, adjoint, x).neg_(), adjoint

        return Posed(forward, gradient, guessed=gradient, products=request.products, iterations=lambda: steps[0] or None)


class FloorCompiled(Floor):
    """The hand-written loop with its product compiled by `torch.compile`."""

    name = "floor-compiled"
    compiles = True
    note = "the hand-written loop, eager, with a product that `torch.compile` has compiled"

    def supports(self, workload: Workload) -> bool:
        return workload.method != "direct"

    def products(self, w: Workload, theta: Tensor) -> tuple[Product, Product]:
        # every closure of the same code is served by what was compiled for the first
        return torch.compile(w.fused(theta)), torch.compile(w.fused_transposed(theta))


class Nablasolve(Adapter):
    """This library, as its README has it."""

    name = "nablasolve"
    module = "nablasolve"
    own_rule = True
    least_squares_method: ClassVar[str] = "cgls"
    extra: ClassVar[Mapping[str, Any]] = {}

    def supports(self, workload: Workload) -> bool:
        return True

    def matrix(self, w: Workload, theta: Tensor) -> Tensor | None:
        """The tensor that it is given for A, where it is given one."""
        return w.matrix(theta)

    def products(self, w: Workload, theta: Tensor) -> tuple[Product, Product | None]:
        """Else the product with A, and that with the transpose, which the floor has as well, where it is another one."""
        return w.operator(theta), None if w.hermitian else w.transposed(theta)

    def pose(self, workload: Workload, request: Request) -> Posed:
        import nablasolve as ns

        w, latest = workload, []
        method: Any = ns.GMRES(restart=w.restart) if w.method == "gmres" else w.method
        options: dict[str, Any] = dict(rtol=request.rtol, maxiter=request.maxiter)
        if w.method == "direct":
            options = dict(rtol=request.rtol)
        if w.least_squares:  # else as tight as it can be had, since it needs a pseudo-inverse
            options["adjoint"] = dict(rtol=request.rtol)
        options.update(self.extra)
        # a count that is set ends before any tolerance
        options["on_failure"] = "raise" if request.rtol else "ignore"

        def solve(theta: Tensor, A: Tensor | None, b: Tensor, **more: Any) -> Tensor:
            operator: Any = A
            if A is None:
                operator, transposed = self.products(w, theta)
                if not w.hermitian:
                    operator = ns.LinearOperator(operator, adjoint=transposed, domain=w.cotangent, codomain=w.b)
            if w.least_squares:
                x, info = ns.lstsq_ex(operator, b, damp=w.damp, method=self.least_squares_method, **options, **more)
            else:
                x, info = ns.solve_ex(operator, b, method=method, **options, **more)
            if request.rtol and not torch.as_tensor(info.converged).all():
                raise RuntimeError(repr(info))
            latest[:] = [info]
            return x

        def forward(theta: Tensor, b: Tensor) -> Tensor:
            return solve(theta, self.matrix(w, theta), b)

        def gradient(theta: Tensor, b: Tensor, c: Tensor, x0: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
            theta, b = theta.detach().requires_grad_(), b.detach().requires_grad_()
            more = {} if x0 is None else {"x0": x0}
            A = self.matrix(w, theta.detach())
            if A is None:
                x = solve(theta, None, b, **more)
                return x.detach(), *torch.autograd.grad(x, (theta, b), c)
            A = A.detach().requires_grad_()
            x = solve(theta, A, b, **more)
            g, gb = torch.autograd.grad(x, (A, b), c)
            return x.detach(), g.values() if g.layout == torch.sparse_csr else g, gb

        def iterations() -> int:
            return int(torch.as_tensor(latest[0].iterations).max())

        def products() -> int:
            records = [record for record in (latest[0], latest[0].adjoint) if record is not None]
            return sum(int(torch.as_tensor(r.matvecs + r.rmatvecs).max()) for r in records)

        return Posed(forward, gradient, guessed=gradient, products=products, iterations=iterations)


class NablasolveLSMR(Nablasolve):
    """This library with its own choice for least squares."""

    name = "nablasolve-lsmr"
    least_squares_method = "lsmr"

    def supports(self, workload: Workload) -> bool:
        return workload.least_squares


class NablasolveAutograd(Nablasolve):
    """This library with the product alone: it derives the adjoint."""

    name = "nablasolve-autograd"
    note = "given the product alone, of which it derives the adjoint; `nablasolve` has the transpose by hand, as the floor"

    def supports(self, workload: Workload) -> bool:
        return not workload.hermitian

    def products(self, w: Workload, theta: Tensor) -> tuple[Product, Product | None]:
        return w.operator(theta), None


def lacks_keyword(name: str) -> str | None:
    """Why this library cannot be asked for something by a keyword of `solve`; None if it can."""
    import nablasolve as ns

    known = (inspect.signature(f).parameters for f in (ns.solve_ex, ns.lstsq_ex))
    return None if all(name in parameters for parameters in known) else f"has no {name}= yet"


class NablasolveCompiled(Nablasolve):
    """This library with `compile=True`."""

    name = "nablasolve-compiled"
    compiles = True
    extra: ClassVar[Mapping[str, Any]] = {"compile": True}
    note = "`compile=True`"

    def missing(self) -> str | None:
        return super().missing() or lacks_keyword("compile")

    def supports(self, workload: Workload) -> bool:
        return workload.method != "direct"

    def matrix(self, w: Workload, theta: Tensor) -> Tensor | None:
        A = super().matrix(w, theta)
        return None if A is None or A.layout != torch.strided else A  # sparse products cannot be compiled

    def products(self, w: Workload, theta: Tensor) -> tuple[Product, Product | None]:
        return w.fused(theta), None if w.hermitian else w.fused_transposed(theta)


class SciPy(Adapter):
    """SciPy's solvers on NumPy arrays, with the implicit derivative by hand."""

    name = "scipy"
    module = "scipy"
    own_rule = True

    def supports(self, workload: Workload) -> bool:
        return workload.method == "direct" or workload.numpy_operator(workload.theta.numpy()) is not None

    def pose(self, workload: Workload, request: Request) -> Posed:
        import scipy.sparse.linalg as spl

        w, rtol, maxiter, steps = workload, request.rtol, request.maxiter, [0]

        def tick(_: Any) -> None:
            steps[0] += 1

        def solve(A: Product, b: np.ndarray, n: int, x0: np.ndarray | None = None) -> np.ndarray:
            operator = spl.LinearOperator((n, n), matvec=request.count(A), dtype=b.dtype)
            watched = dict(callback=tick) if request.counts else {}
            steps[0] = 0
            if w.method == "gmres":
                watched = {**watched, "callback_type": "pr_norm"} if watched else {}
                cycles = -(-maxiter // w.restart)
                x, _ = spl.gmres(operator, b.ravel(), rtol=rtol, restart=w.restart, maxiter=cycles, **watched)
            else:
                method = spl.bicgstab if w.method == "bicgstab" else spl.cg
                x, _ = method(operator, b.ravel(), x0=x0, rtol=rtol, maxiter=maxiter, **watched)
            return x

        def least(theta: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, Product, Product]:
            A, AT = w.numpy_operator(theta)
            operator = spl.LinearOperator(
                (b.size, w.cotangent.numel()), matvec=request.count(A), rmatvec=request.count(AT), dtype=b.dtype
            )
            x, _, steps[0], *_ = spl.lsmr(operator, b.ravel(), damp=w.damp, atol=rtol, btol=0.0, conlim=0.0, maxiter=maxiter)
            return x, A, AT

        def forward(theta: np.ndarray, b: np.ndarray) -> np.ndarray:
            if w.method == "direct":
                return np.linalg.solve(theta, b[..., None])[..., 0]
            if w.least_squares:
                return least(theta, b)[0]
            return solve(w.numpy_operator(theta)[0], b, b.size)

        def gradient(theta: np.ndarray, b: np.ndarray, c: np.ndarray, x0: np.ndarray | None = None) -> tuple[Any, Any, Any]:
            if w.method == "direct":
                x = np.linalg.solve(theta, b[..., None])[..., 0]
                adjoint = np.linalg.solve(theta.swapaxes(-1, -2), c[..., None])[..., 0]
                return x, -adjoint[..., None] * x[..., None, :], adjoint
            if w.least_squares:
                x, A, AT = least(theta, b)
                kept, steps[0] = steps[0], 0
                s = solve(lambda v: AT(A(v)) + w.damp**2 * v, c, c.size)
                steps[0] = kept
                Ax, As = A(x), A(s)
                return x, w.numpy_pullback(theta, b.ravel() - Ax, s) - w.numpy_pullback(theta, As, x), As
            A, AT = w.numpy_operator(theta)
            x = solve(A, b, b.size, None if x0 is None else x0.ravel())
            kept = steps[0]
            adjoint = solve(AT, c, c.size)
            steps[0] = kept
            return x, -w.numpy_pullback(theta, adjoint, x), adjoint

        return Posed(
            forward,
            gradient,
            native=lambda t: t.numpy(),
            tensor=torch.from_numpy,
            guessed=gradient,
            products=request.products,
            iterations=lambda: steps[0] or None,
        )


class JaxSciPy(Adapter):
    """`jax.scipy.sparse.linalg`, whose solvers differentiate by `custom_linear_solve`; everything compiled."""

    name = "jax.scipy"
    module = "jax"
    compiles = True

    def supports(self, workload: Workload) -> bool:
        return True

    def direct(self, theta: Any, b: Any) -> Any:
        """The solution of a batch of dense systems."""
        import jax.numpy as jnp

        return jnp.linalg.solve(theta, b[..., None])[..., 0]

    def solver(self, w: Workload, request: Request) -> Callable[..., Any]:
        """`(A, b, x0=None) -> x` of one system."""
        import jax.scipy.sparse.linalg as jsl

        def solve(A: Product, b: Any, x0: Any = None) -> Any:
            if w.method == "gmres":
                cycles = -(-request.maxiter // w.restart)
                return jsl.gmres(A, b, tol=request.rtol, restart=w.restart, maxiter=cycles)[0]
            method = jsl.bicgstab if w.method == "bicgstab" else jsl.cg
            return method(A, b, x0=x0, tol=request.rtol, maxiter=request.maxiter)[0]

        return solve

    def pose(self, workload: Workload, request: Request) -> Posed:
        import jax

        jax.config.update("jax_enable_x64", True)
        w, solve = workload, self.solver(workload, request)

        def solution(theta: Any, b: Any, x0: Any = None) -> Any:
            def A(v: Any) -> Any:
                return w.jax_product(theta, v)

            if not w.least_squares:
                return solve(A, b, x0)
            transpose = jax.linear_transpose(A, jax.ShapeDtypeStruct(w.cotangent.shape, b.dtype))

            def AT(y: Any) -> Any:
                return transpose(y)[0]

            return solve(lambda v: AT(A(v)) + w.damp**2 * v, AT(b))

        one = self.direct if w.method == "direct" else solution
        forward = jax.jit(jax.vmap(one) if w.batch_dims and one is solution else one)

        def with_pullback(theta: Any, b: Any, c: Any, x0: Any = None) -> tuple[Any, Any, Any]:
            function = forward if x0 is None else (lambda theta, b: solution(theta, b, x0))
            x, pull = jax.vjp(function, theta, b)
            return x, *pull(c)

        gradient = jax.jit(with_pullback)

        def compiled(theta: Any, b: Any, c: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
            return forward.lower(theta, b).compile(), gradient.lower(theta, b, c).compile()

        def blocking(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arrays: jax.block_until_ready(function(*arrays))

        return Posed(
            blocking(forward),
            blocking(gradient),
            native=lambda t: jax.device_put(t.numpy()),
            tensor=lambda a: torch.from_numpy(np.array(a)),
            guessed=blocking(gradient),
            compiled=compiled,
        )


TINY = 1e-30  # for Lineax, which divides by its tolerance


class Lineax(JaxSciPy):
    """Lineax, compiled. Its rule scales every entry by `atol + rtol |b|`: with `rtol=0` and the 2-norm it is the others'."""

    name = "lineax"
    module = "lineax"

    def direct(self, theta: Any, b: Any) -> Any:
        import jax
        import lineax as lx

        return jax.vmap(lambda A, b: lx.linear_solve(lx.MatrixLinearOperator(A), b, lx.LU()).value)(theta, b)

    def solver(self, w: Workload, request: Request) -> Callable[..., Any]:
        import jax
        import jax.numpy as jnp
        import lineax as lx

        def two_norm(tree: Any) -> Any:
            return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))

        # its absolute tolerance is a number, and the same one for the adjoint: the smallest right-hand side decides
        sides = (w.transposed(w.theta)(w.b), w.cotangent) if w.least_squares else (w.b, w.cotangent)
        size = min(float(t.double().flatten(w.batch_dims).norm(dim=-1).min()) for t in sides)

        atol = max(request.rtol, TINY) * size

        def solve(A: Product, b: Any, x0: Any = None) -> Any:  # it takes no guess where there are derivatives
            common = dict(rtol=0.0, atol=atol, norm=two_norm, max_steps=request.maxiter)
            if w.method == "gmres":
                solver = lx.GMRES(restart=w.restart, stagnation_iters=w.restart * 10, **common)
            else:
                solver = lx.BiCGStab(**common) if w.method == "bicgstab" else lx.CG(**common)
            tags = () if w.method in ("gmres", "bicgstab") else lx.positive_semidefinite_tag
            operator = lx.FunctionLinearOperator(A, jax.ShapeDtypeStruct(b.shape, b.dtype), tags)
            return lx.linear_solve(operator, b, solver, throw=False).value

        return solve


ADAPTERS: Mapping[str, Adapter] = {
    adapter.name: adapter
    for adapter in (
        Floor(), FloorCompiled(), Nablasolve(), NablasolveCompiled(), NablasolveAutograd(), NablasolveLSMR(), SciPy(),
        JaxSciPy(), Lineax(), DeepInverse(), DProx(), LinearOperatorLibrary(), XiTorch(), CoLA(), SparseGradUtils(),
    )
}  # fmt: skip
