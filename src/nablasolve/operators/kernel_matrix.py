"""Matrices of a covariance function between points, applied in blocks of rows and never formed."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..arguments import check_integer
from ..closure import Closure, is_differentiable, matvec
from ..trace import as_one_operation
from .base import StructuredOperator, is_real
from .claims import Claims
from .curvature import Leaves, Linearised, shifted
from .spaces import any_batch

_functorch = torch._C._functorch

Kernel = Callable[[Tensor, Tensor], Tensor]


class KernelMatrix(StructuredOperator):
    """`v -> K v + noise * v`, with `K[i, j] = kernel(X[i], Y[j])`.

    `K` is evaluated in blocks of `block_size` rows, each of which is forgotten once it is applied: a product takes memory
    for one block, and keeps none of it for the derivative, whose pass evaluates the blocks again. Gradients reach the points,
    the noise, and every tensor that `kernel` reads, such as a length scale.

    Args:
        kernel: a covariance function on blocks of points: from tensors of shapes `(p, d)` and `(q, d)` to one of shape
            `(p, q)`, real or complex, with `kernel(b, a)` the adjoint of `kernel(a, b)`.
        X: the points of the rows, of shape `(n, d)`.
        Y: the points of the columns, of shape `(m, d)`; by default those of the rows, and `K` is Hermitian.
        noise: the variance (sigma squared, not sigma) of an independent noise at each point: a real number, a 0-d tensor, or
            one of shape `(n,)`. Only where `Y` is left out.
        block_size: how many rows are evaluated at a time: a block has `block_size * m` entries.
        checkpoint: evaluate the blocks again for the derivative. Without it every block is kept, and the derivative is faster.
        claims: `positive_semidefinite=True` where `kernel` is known to be a covariance function: with a positive number as
            noise the operator is then known to be definite. `positive_definite=True` where the operator with its noise is.

    Vectors have shape `(..., m)`, and the dtype of the kernel's values.

    Raises:
        TypeError: if `kernel` is not callable, `X` or `Y` is no tensor, `noise` is neither a real number nor a real tensor, or
            `checkpoint` is no bool.
        ValueError: if a tensor has a shape or dtype that does not fit, `block_size` is below 1, or there is noise between two
            sets of points.
    """

    def __init__(
        self,
        kernel: Kernel,
        X: Tensor,
        Y: Tensor | None = None,
        *,
        noise: Any = 0.0,
        block_size: int = 1024,
        checkpoint: bool = True,
        **claims: Any,
    ) -> None:
        if not callable(kernel):
            raise TypeError(f"kernel: expected a callable, got {type(kernel).__name__}")
        _check_points("X", X)
        if Y is not None:
            _check_points("Y", Y)
            if Y.shape[1] != X.shape[1]:
                raise ValueError(f"Y: expected points of shape (m, {X.shape[1]}) like X, got {tuple(Y.shape)}")
        if not isinstance(checkpoint, bool):
            raise TypeError(f"checkpoint: expected a bool, got {type(checkpoint).__name__}")
        if check_integer("block_size", block_size) < 1:
            raise ValueError(f"block_size: expected 1 at least, got {block_size}")
        _check_noise(noise, X, square=Y is None)
        with torch.no_grad():
            rows, columns = X[:2], (X if Y is None else Y)[:3]
            corner = kernel(rows, columns)
        if not isinstance(corner, Tensor):
            raise TypeError(f"kernel: expected values in a Tensor, got {type(corner).__name__}")
        if corner.shape != (len(rows), len(columns)):
            raise ValueError(
                f"kernel: expected values of shape ({len(rows)}, {len(columns)}) for points of shapes {tuple(rows.shape)} and "
                f"{tuple(columns.shape)}, got {tuple(corner.shape)}"
            )
        if not is_differentiable(corner):
            raise ValueError(f"kernel: expected values of a floating-point or complex dtype, got {corner.dtype}")
        codomain = any_batch(X.shape[:1], corner)
        known = Claims.named(claims) | Claims(hermitian=Y is None)
        super().__init__(codomain if Y is None else any_batch(Y.shape[:1], corner), codomain, shifted(known, noise))
        self.kernel, self.X, self.Y, self.noise = kernel, X, Y, noise
        self.block_size, self.checkpoint = block_size, checkpoint

    def apply(self, x: Tensor) -> Tensor:
        columns = self.X if self.Y is None else self.Y
        y = self._product(lambda K, v, rows, columns: matvec(K(rows, columns), v), x, self.X, columns)
        return y + self.noise * x if isinstance(self.noise, Tensor) or self.noise != 0 else y

    def apply_adjoint(self, y: Tensor) -> Tensor:
        if self.Y is None:
            return self.apply(y)
        return self._product(lambda K, v, columns, rows: matvec(K(rows, columns).mH, v), y, self.Y, self.X)

    def _product(
        self, block: Callable[[Kernel, Tensor, Tensor, Tensor], Tensor], v: Tensor, points: Tensor, whole: Tensor
    ) -> Tensor:
        """`block(kernel, v, some, whole)` for every `block_size` of the points, one after another."""
        # both enter before what the kernel reads, in either branch: the recording of the whole operator goes by that order
        blocks, whole = points.split(self.block_size), whole.view_as(whole)
        if not (self.checkpoint and torch.is_grad_enabled()):
            return torch.cat([block(self.kernel, v, some, whole) for some in blocks], dim=-1)
        kernel = Closure.record(self.kernel, points[:1], (whole[:1].detach(),))
        read = kernel.recorded[1:]

        def pure(v: Tensor, some: Tensor, whole: Tensor, *read: Tensor) -> Leaves:
            return (block(lambda a, b: kernel.apply(a, (b, *read)), v, some, whole),)

        return torch.cat([_recomputed(pure, v, some, whole, *read)[0] for some in blocks], dim=-1)

    def exact_diagonal(self) -> Tensor | None:
        if self.Y is not None:
            return None
        # a small block wastes little, since only its diagonal is wanted
        diagonal: Tensor = torch.cat([self.kernel(block, block).diagonal() for block in self.X.split(min(self.block_size, 32))])
        diagonal = diagonal + self.noise
        return diagonal

    def _label(self) -> str:
        return f"KernelMatrix({getattr(self.kernel, '__name__', type(self.kernel).__name__)})"


class _Recomputed(torch.autograd.Function):
    """`function(*inputs)`, a tuple of tensors, of which only the inputs are kept for a derivative.

    Unlike `torch.utils.checkpoint`, it works under every `torch.func` transform; the inputs are saved as autograd saves
    them, so that a change in place is noticed; and derivatives are made of this Function again, so that those of higher
    order keep no more.
    """

    @staticmethod
    def forward(function: Callable[..., Leaves], *inputs: Tensor) -> Leaves:
        return function(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Leaves) -> None:
        ctx.function, *tensors = inputs
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * (1 + ctx.count)
        # the pull-back of torch.func.vjp runs after its transform has ended, and its tensors are wrapped no more
        inputs = [_functorch.unwrap_if_dead(t) for t in ctx.saved_tensors]
        wanted = [i for i, t in enumerate(inputs) if ctx.needs_input_grad[1 + i] and is_differentiable(t)]
        if wanted:
            parts = _Recomputed.apply(_pulled_back(ctx.function, ctx.count, wanted), *inputs, *cotangents)
            for i, part in zip(wanted, parts, strict=True):
                grads[1 + i] = part
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Leaves:
        # a Function's jvp runs with forward gradients switched off, which would silence every nested derivative
        with forward_ad._set_fwd_grad_enabled(True), torch.enable_grad():
            saved = [forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
            zeros = [torch.zeros_like(t) for t in saved[ctx.count :]]
            moving = [i for i, t in enumerate(tangents) if t is not None]
            # u -> J^H u is linear, and its adjoint is the Jacobian
            back = _pulled_back(ctx.function, ctx.count, moving)
            push = _pulled_back(back, ctx.count + len(zeros), range(ctx.count, ctx.count + len(zeros)))
            result: Leaves = _Recomputed.apply(push, *saved[: ctx.count], *zeros, *(t for t in tangents if t is not None))
            return result

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Callable[..., Leaves], *tensors: Tensor) -> tuple[Leaves, tuple[int, ...]]:
        outputs = _Recomputed.apply(lambda *t: torch.vmap(function, in_dims=tuple(in_dims[1:]))(*t), *tensors)
        return outputs, (0,) * len(outputs)


@as_one_operation
def _recomputed(function: Callable[..., Leaves], *inputs: Tensor) -> Leaves:
    """`function(*inputs)`, which depends on no other tensor, kept as its inputs alone."""
    result: Leaves = _Recomputed.apply(function, *inputs)
    return result


def _pulled_back(function: Callable[..., Leaves], count: int, wanted: Sequence[int]) -> Callable[..., Leaves]:
    """`(inputs, cotangents) -> J^H cotangents`, with the Jacobian by the wanted of `count` inputs."""

    def back(*tensors: Tensor) -> Leaves:
        inputs, cotangents = tensors[:count], tensors[count:]

        def of_wanted(*values: Tensor) -> Leaves:
            given = list(inputs)
            for i, value in zip(wanted, values, strict=True):
                given[i] = value
            return function(*given)

        f = Linearised(of_wanted, [inputs[i] for i in wanted])
        with f.recording(cotangents):
            return f.back(cotangents)

    return back


# -- arguments -----------------------------------------------------------------------------------------------------


def _check_points(name: str, points: Any) -> None:
    if not isinstance(points, Tensor):
        raise TypeError(f"{name}: expected a Tensor of points, got {type(points).__name__}")
    if points.ndim != 2:
        raise ValueError(f"{name}: expected points of shape (n, d), got shape {tuple(points.shape)}")
    if not is_differentiable(points):
        raise ValueError(f"{name}: expected a floating-point or complex dtype, got {points.dtype}")


def _check_noise(noise: Any, X: Tensor, square: bool) -> None:
    if not isinstance(noise, Tensor | numbers.Real) or not is_real(noise):
        got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"noise: expected a real number or a real tensor, got {got}")
    if isinstance(noise, Tensor) and noise.ndim != 0 and noise.shape != X.shape[:1]:
        raise ValueError(f"noise: expected shape () or ({len(X)},), one variance a point, got {tuple(noise.shape)}")
    if not square and (isinstance(noise, Tensor) or noise != 0):
        raise ValueError("noise: there is none between two sets of points; leave out noise or Y")
