"""The two libraries of computational imaging: deepinv and ∇-Prox. Both are loaded without what they need for training alone."""

# ruff: noqa: D102  (overriding methods, which the base class documents)
from __future__ import annotations

import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .posing import Adapter, Posed, Request
from .workloads import Product, Workload


class NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An empty torchvision, which deepinv imports and its solvers do not use: its wheels replace torch."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)

        def attribute(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def load_deepinv() -> Any:
    """Its solvers, with an empty torchvision where there is none."""
    stub = NoTorchvision()
    absent = importlib.util.find_spec("torchvision") is None
    if absent:
        sys.meta_path.append(stub)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("deepinv")
            return importlib.import_module("deepinv.optim.linear")
    finally:
        if absent:
            sys.meta_path.remove(stub)


class DeepInverse(Adapter):
    """deepinv: `conjugate_gradient` and `bicgstab` for square systems, `least_squares_implicit_backward` for least squares."""

    name = "deepinv"
    module = "deepinv"
    note = (
        "the gradient of least squares is its `least_squares_implicit_backward`; of a square system it has none but that of "
        "the unrolled loop, whose memory grows with the iterations (the implicit one solves normal equations) and which, for "
        "CG, is another one where the matrix moves in directions that are not symmetric (W4, W5). The `eps` that it adds to "
        "inner products is set to 0: with its default, W6 misses the tolerance"
    )

    def missing(self) -> str | None:
        try:
            load_deepinv()
        except Exception as error:
            return "not installed" if isinstance(error, ModuleNotFoundError) else f"import fails: {type(error).__name__}"
        return None

    def supports(self, workload: Workload) -> bool:
        return workload.method in ("cg", "bicgstab", "cgls")

    def pose(self, workload: Workload, request: Request) -> Posed:
        return self.posed_least_squares(workload, request) if workload.least_squares else self.posed_square(workload, request)

    def posed_square(self, w: Workload, request: Request) -> Posed:
        linear = load_deepinv()
        method = linear.bicgstab if w.method == "bicgstab" else linear.conjugate_gradient
        batch = list(range(w.batch_dims))  # the dimensions that count systems

        options: dict[str, Any] = dict(max_iter=request.maxiter, tol=request.rtol, parallel_dim=batch)
        if w.method == "cg":
            options["eps"] = 0.0

        def solve(A: Product, b: Tensor) -> Tensor:
            return method(request.count(A), b, **options)

        @torch.no_grad()
        def forward(theta: Tensor, b: Tensor) -> Tensor:
            return solve(w.operator(theta), b)

        # with a guess the unrolled loop would have few steps, and a derivative that is far off
        def gradient(theta: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            theta, b = theta.detach().requires_grad_(), b.detach().requires_grad_()
            x = solve(w.recorded(theta), b)
            return x.detach(), *torch.autograd.grad(x, (theta, b), c)

        return Posed(forward, gradient, products=request.products)

    def posed_least_squares(self, w: Workload, request: Request) -> Posed:
        linear = load_deepinv()
        import deepinv

        class Physics(deepinv.physics.LinearPhysics):  # type: ignore[misc]
            def __init__(self, theta: Tensor) -> None:
                super().__init__()
                self.register_buffer("theta", theta)

            def A(self, x: Tensor, **_: Any) -> Tensor:
                return request.count(w.operator(self.theta))(x)

            def A_adjoint(self, y: Tensor, **_: Any) -> Tensor:
                return request.count(w.transposed(self.theta))(y)

        def solve(physics: Any, b: Tensor) -> Tensor:
            # its LSQR has no test of |A^T r|, so that it runs to the limit where the residual stays; CG is on normal equations
            options = dict(solver="CG", max_iter=request.maxiter, tol=request.rtol, parallel_dim=None, eps=0.0)
            return linear.least_squares_implicit_backward(physics, b, gamma=1 / w.damp**2, **options)

        @torch.no_grad()
        def forward(theta: Tensor, b: Tensor) -> Tensor:
            return solve(Physics(theta), b)

        def gradient(theta: Tensor, b: Tensor, c: Tensor) -> tuple[Any, ...]:
            theta, b = theta.detach().requires_grad_(), b.detach().requires_grad_()
            x = solve(Physics(theta), b)
            x.backward(c)  # it writes to .grad as a side effect, which torch.autograd.grad would not return
            return x.detach(), theta.grad, b.grad

        return Posed(forward, gradient, products=request.products)


def load_dprox() -> Any:
    """`dprox.linalg`, without what the whole of dprox imports: packages for training, an old NumPy and an old SciPy."""
    if "dprox" not in sys.modules:
        spec = importlib.util.find_spec("dprox")
        if spec is None:
            raise ModuleNotFoundError("dprox")
        bare = types.ModuleType("dprox")
        bare.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["dprox"] = bare
    return importlib.import_module("dprox.linalg")


class DifferentiableModule(torch.nn.Module):
    """A module that has what the `LinOp` of dprox has and its `linear_solve` asks for.

    Args:
        theta: becomes its parameter.
        make: `theta -> (v -> A(theta) v)`. Functions, which a deep copy leaves as they are.
        make_recorded: the same in a form that autograd can follow.
        make_transposed: that of the transpose.
    """

    def __init__(
        self,
        theta: Tensor,
        make: Callable[[Tensor], Product],
        make_recorded: Callable[[Tensor], Product],
        make_transposed: Callable[[Tensor], Product],
    ) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(theta)
        self.make, self.make_recorded, self.make_transposed = make, make_recorded, make_transposed
        self.made: dict[bool, Product] = {}

    def product(self, v: Tensor, transposed: bool) -> Tensor:
        """With A or its transpose; the closure is made once for all products that are not recorded."""
        if torch.is_grad_enabled():
            return self.make_recorded(self.theta)(v)
        if transposed not in self.made:
            self.made[transposed] = (self.make_transposed if transposed else self.make)(self.theta)
        return self.made[transposed](v)

    def forward(self, v: Tensor) -> Tensor:
        return self.product(v, False)

    def adjoint(self, v: Tensor) -> Tensor:
        """With the transpose."""
        return self.product(v, True)

    @property
    def T(self) -> DifferentiableModule:
        """The transpose."""
        other = self.clone()
        other.forward, other.adjoint = other.adjoint, other.forward
        return other

    def clone(self) -> DifferentiableModule:
        """A deep copy."""
        return copy.deepcopy(self)


class DProx(Adapter):
    """∇-Prox: `linear_solve`, its CG with the implicit gradient of `LinearSolve`."""

    name = "dprox"
    module = "dprox"
    at_most_n = True
    note = "∇-Prox: `dprox.linalg.linear_solve`, its CG with the implicit gradient"

    def missing(self) -> str | None:
        try:
            load_dprox()
        except Exception as error:
            return "not installed" if isinstance(error, ModuleNotFoundError) else f"import fails: {type(error).__name__}"
        return None

    def supports(self, workload: Workload) -> bool:
        return workload.method == "cg"  # its solvers are for Hermitian systems

    def pose(self, workload: Workload, request: Request) -> Posed:
        linalg = load_dprox()
        w, shape = workload, workload.b.shape
        config = linalg.LinearSolveConfig(rtol=request.rtol, max_iters=request.maxiter, solver_type="cg")
        # the first of several dimensions counts systems, whose stop is decided by a norm that is an SVD
        flat = shape if w.batch_dims else (w.b.numel(),)

        def shaped(make: Callable[[Tensor], Product]) -> Callable[[Tensor], Product]:
            def made(theta: Tensor) -> Product:
                product = request.count(make(theta))
                return lambda v: product(v.reshape(shape)).reshape(flat)

            return made

        forms = tuple(shaped(make) for make in (w.operator, w.recorded, w.transposed))

        @torch.no_grad()
        def forward(theta: Tensor, b: Tensor) -> Tensor:
            return linalg.linear_solve(DifferentiableModule(theta, *forms), b.reshape(flat), config).reshape(shape)

        def gradient(theta: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            A, b = DifferentiableModule(theta.detach(), *forms), b.detach().requires_grad_()
            x = linalg.linear_solve(A, b.reshape(flat), config).reshape(shape)
            return x.detach(), *torch.autograd.grad(x, (A.theta, b), c)

        return Posed(forward, gradient, products=request.products)
