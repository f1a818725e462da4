"""Other libraries for torch: each adapter declares to its library what that asks to be declared."""

# ruff: noqa: D102  (overriding methods, which the base class documents)
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .posing import Adapter, Posed, Request
from .workloads import Workload


def square(workload: Workload) -> bool:
    """Whether it is one square system."""
    return workload.batch_dims == 0 and not workload.least_squares


class LinearOperatorLibrary(Adapter):
    """linear_operator, GPyTorch's: a subclass of its `LinearOperator`, whose arguments get the gradients."""

    name = "linear_operator"
    module = "linear_operator"
    distribution = "linear-operator"

    def supports(self, workload: Workload) -> bool:
        return square(workload) and workload.method == "cg" and workload.matrix(workload.theta) is None

    def pose(self, workload: Workload, request: Request) -> Posed:
        import linear_operator as lo

        shape, n = workload.b.shape, workload.b.numel()

        class Operator(lo.LinearOperator):
            def __init__(self, theta: Tensor) -> None:
                super().__init__(theta)
                self.theta, self.apply = theta, request.count(workload.operator(theta))

            def _matmul(self, rhs: Tensor) -> Tensor:
                columns = rhs.reshape(n, -1).unbind(-1)
                return torch.stack([self.apply(v.reshape(shape)).reshape(-1) for v in columns], -1).reshape(rhs.shape)

            def _size(self) -> torch.Size:
                return torch.Size((n, n))

            def _transpose_nonbatch(self) -> Operator:
                return self

        def forward(theta: Tensor, b: Tensor) -> Tensor:
            settings = lo.settings
            with (
                settings.cg_tolerance(request.rtol),
                settings.max_cg_iterations(request.maxiter),
                settings.max_cholesky_size(0),
                settings.max_preconditioner_size(0),
            ):
                return Operator(theta).solve(b.reshape(-1)).reshape(shape)

        def gradient(theta: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            theta, b = theta.detach().requires_grad_(), b.detach().requires_grad_()
            settings = lo.settings
            with (
                settings.cg_tolerance(request.rtol),
                settings.max_cg_iterations(request.maxiter),
                settings.max_cholesky_size(0),
                settings.max_preconditioner_size(0),
            ):
                x = Operator(theta).solve(b.reshape(-1)).reshape(shape)
                return x.detach(), *torch.autograd.grad(x, (theta, b), c)

        return Posed(torch.no_grad()(forward), gradient, products=request.products)


class XiTorch(Adapter):
    """xitorch: a subclass of its `LinearOperator` that names its parameters."""

    name = "xitorch"
    module = "xitorch"

    def supports(self, workload: Workload) -> bool:
        # its GMRES has no restart
        return square(workload) and workload.method in ("cg", "bicgstab") and workload.matrix(workload.theta) is None

    def pose(self, workload: Workload, request: Request) -> Posed:
        import xitorch
        import xitorch.linalg

        shape, n = workload.b.shape, workload.b.numel()
        options = dict(method=workload.method, rtol=request.rtol, atol=0.0, max_niter=request.maxiter, posdef=True)

        class Operator(xitorch.LinearOperator):
            def __init__(self, theta: Tensor) -> None:
                super().__init__((n, n), is_hermitian=workload.hermitian, dtype=theta.dtype, device=theta.device)
                self.theta = theta

            def _getparamnames(self, prefix: str = "") -> list[str]:
                return [prefix + "theta"]

            # the operator is made anew for each set of tensors that the library puts in the place of theta
            def _mv(self, v: Tensor) -> Tensor:
                return request.count(workload.operator(self.theta))(v.reshape(shape)).reshape(v.shape)

            def _rmv(self, v: Tensor) -> Tensor:
                return request.count(workload.transposed(self.theta))(v.reshape(shape)).reshape(v.shape)

        def solve(theta: Tensor, b: Tensor) -> Tensor:
            return xitorch.linalg.solve(Operator(theta), b.reshape(n, 1), bck_options=options, **options).reshape(shape)

        def gradient(theta: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            theta, b = theta.detach().requires_grad_(), b.detach().requires_grad_()
            x = solve(theta, b)
            return x.detach(), *torch.autograd.grad(x, (theta, b), c)

        return Posed(torch.no_grad()(solve), gradient, products=request.products)


class CoLA(Adapter):
    """CoLA: a subclass of its `LinearOperator`, whose tensors get a gradient."""

    name = "cola"
    module = "cola"
    distribution = "cola-ml"
    note = "the right-hand side gets no gradient (its `inv(A) @ b` returns None for it), the operator's tensor does"

    def supports(self, workload: Workload) -> bool:
        # its GMRES solves the adjoint with A instead of its transpose
        return square(workload) and workload.method == "cg" and workload.matrix(workload.theta) is None

    def pose(self, workload: Workload, request: Request) -> Posed:
        import cola

        shape, n = workload.b.shape, workload.b.numel()
        # it stops at tol (|b| + 1) for a b scaled to unit norm
        algorithm = cola.linalg.CG(tol=request.rtol / 2, max_iters=request.maxiter)

        class Operator(cola.ops.LinearOperator):  # type: ignore[misc]
            def __init__(self, theta: Tensor) -> None:
                super().__init__(theta.dtype, (n, n))
                self.theta = theta

            # an operator is rebuilt from its tensors without its __init__ being called
            def _matmat(self, V: Tensor) -> Tensor:
                product = request.count(workload.operator(self.theta))
                return torch.stack([product(v.reshape(shape)).reshape(-1) for v in V.unbind(-1)], -1)

        def solve(theta: Tensor, b: Tensor) -> Tensor:
            inverse = cola.linalg.inv(cola.PSD(Operator(theta)), algorithm)
            return (inverse @ b.reshape(-1)).reshape(shape)

        def gradient(theta: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, None]:
            theta = theta.detach().requires_grad_()
            x = solve(theta, b)
            return x.detach(), torch.autograd.grad(x, theta, c)[0], None

        return Posed(torch.no_grad()(solve), gradient, products=request.products)


class SparseGradUtils(Adapter):
    """torchsparsegradutils: a sparse matrix, with the gradient on its pattern."""

    name = "torchsparsegradutils"
    module = "torchsparsegradutils"

    def supports(self, workload: Workload) -> bool:
        matrix = workload.matrix(workload.theta)
        return workload.method == "cg" and matrix is not None and matrix.layout == torch.sparse_csr

    def pose(self, workload: Workload, request: Request) -> Posed:
        from torchsparsegradutils import sparse_generic_solve
        from torchsparsegradutils.utils import linear_cg
        from torchsparsegradutils.utils.linear_cg import LinearCGSettings

        settings = LinearCGSettings(max_cg_iterations=request.maxiter, cg_tolerance=request.rtol)

        def cg(A: Tensor, b: Tensor, **_: Any) -> Tensor:
            return linear_cg(A, b, settings=settings)

        def forward(theta: Tensor, b: Tensor) -> Tensor:
            matrix = workload.matrix(theta)
            return sparse_generic_solve(matrix, b, solve=cg, transpose_solve=cg)

        def gradient(theta: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            matrix, b = workload.matrix(theta), b.detach().requires_grad_()
            assert matrix is not None
            matrix = matrix.detach().requires_grad_()
            x = sparse_generic_solve(matrix, b, solve=cg, transpose_solve=cg)
            g, gb = torch.autograd.grad(x, (matrix, b), c)
            return x.detach(), g.values(), gb

        return Posed(torch.no_grad()(forward), gradient)
