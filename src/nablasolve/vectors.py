"""Vectors: the kernels that methods are written in, batch dimensions, and the packing of pytrees.

A *vector* is one tensor of shape `(*batch, *vector)`: the first `batch_dims` dimensions count independent systems.
A *scalar* is one number a system. `HostSpace` (one system on the CPU) holds it as a Python number, which costs far
less than a 0-d tensor and is 64-bit for free. `TensorSpace` holds it as a tensor of the batch shape, on the device.
Methods are written once for both.
"""

from __future__ import annotations

import contextlib
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_functorch = torch._C._functorch

# The squares of a vector of this norm or more, in float64, lose nothing in underflow, and those of one below its inverse fit.
SAFE_NORM = 1e-140

# For how many vectors there is to be room on the heap.
ROOM = 8

Scalar = Any  # a Python number (HostSpace) or a tensor of the batch shape (TensorSpace)


def flatten(x: Tensor, batch_dims: int) -> Tensor:
    """The vector `x` with its own dimensions flattened into one, of shape `(*batch, n)`."""
    return x.reshape(*x.shape[:batch_dims], math.prod(x.shape[batch_dims:]))


def spread(a: Tensor, x: Tensor) -> Tensor:
    """A tensor of the batch shape, shaped to multiply the vector `x`."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def select(condition: Tensor, x: Tensor, other: Tensor | None = None) -> Tensor:
    """A new tensor: the systems of `x` where the condition holds, those of `other`, by default zero, elsewhere."""
    return torch.where(spread(condition, x), x, 0.0 if other is None else other).contiguous()


def times(a: Tensor, x: Tensor) -> Tensor:
    """`a x` with one float64 scalar a system, computed in float64 lest a narrow dtype overflow or underflow on the way."""
    return (x * spread(a, x)).to(x.dtype)


def divide(x: Tensor, by: Tensor) -> Tensor:
    """`x / by`, likewise."""
    return (x / spread(by, x)).to(x.dtype)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the real and imaginary parts of `dtype`."""
    return torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which inner products are summed: 32 bits at least."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@contextlib.contextmanager
def own_precision() -> Iterator[None]:
    """Switch `torch.autocast` off: a solve, and `A` in it, runs in the precision of its right-hand side.

    A product rounded to 16 bits would leave no residual below their roundoff, and an operator that its adjoint does not match.
    """
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class Space(ABC):
    """Inner products, updates and guarded scalars for the vectors of one problem.

    `in_place=False` (the unrolled mode) makes every update return a new tensor, so that autograd can follow it.
    """

    in_place: bool
    batch_dims: int

    # -- vectors -------------------------------------------------------------------------------------------------

    @abstractmethod
    def dot(self, x: Tensor, y: Tensor) -> Scalar:
        """`x^H y`, one scalar a system, accumulated in 32 bits at least."""

    @abstractmethod
    def norm(self, x: Tensor) -> Scalar:
        """The Euclidean norm, one real scalar a system."""

    @abstractmethod
    def axpy(self, a: Scalar, x: Tensor, y: Tensor) -> Tensor:
        """`y + a x`, written over `y` where updates are in place."""

    @abstractmethod
    def xpay(self, x: Tensor, a: Scalar, y: Tensor) -> Tensor:
        """`x + a y`, written over `y` where updates are in place."""

    @abstractmethod
    def scale(self, a: Scalar, x: Tensor) -> Tensor:
        """`a x`, a new tensor, zero where `a` is zero whatever `x` holds."""

    @abstractmethod
    def rescale(self, a: Scalar, x: Tensor) -> Tensor:
        """`a x`, written over `x` where updates are in place."""

    def real_dot(self, x: Tensor, y: Tensor) -> Scalar:
        """The real part of `x^H y`."""
        return self.dot(x, y).real

    def copy(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """A copy of `x` that the method owns, written to `out` where updates are in place."""
        if not self.in_place:
            return x
        return x.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(x)

    # -- scalars -------------------------------------------------------------------------------------------------

    @abstractmethod
    def ratio(self, numerator: Scalar, denominator: Scalar, where: Scalar = True) -> Scalar:
        """`numerator / denominator`; 0 where the denominator is zero or not finite, and where `where` is false."""

    @abstractmethod
    def where(self, condition: Scalar, a: Scalar, b: Scalar) -> Scalar:
        """`a` where the condition holds, else `b`."""

    @abstractmethod
    def sqrt(self, a: Scalar) -> Scalar:
        """The square root of a real scalar; 0 where it is negative."""

    @abstractmethod
    def maximum(self, a: Scalar, b: Scalar) -> Scalar:
        """The larger of two real scalars."""

    @abstractmethod
    def minimum(self, a: Scalar, b: Scalar) -> Scalar:
        """The smaller of two real scalars."""

    @abstractmethod
    def conj(self, a: Scalar) -> Scalar:
        """The complex conjugate."""

    @abstractmethod
    def nonfinite(self, a: Scalar) -> Scalar:
        """Whether a real scalar is NaN or infinite."""

    @abstractmethod
    def any(self, condition: Scalar) -> bool:
        """Whether the condition holds for any system: the one place where the host waits for the device."""

    @abstractmethod
    def may(self, condition: Scalar) -> bool:
        """Whether the condition may hold for any system, as a step asks it: true where to know would take waiting."""

    @abstractmethod
    def full(self, value: float, like: Tensor) -> Scalar:
        """The scalar `value` for every system of `like`."""

    @abstractmethod
    def unstack(self, coefficients: Tensor) -> list[Scalar]:
        """The scalars along the last dimension of a tensor of shape `(*batch, k)`."""

    @abstractmethod
    def stack(self, scalars: Sequence[Scalar], like: Tensor) -> Tensor:
        """The tensor of shape `(*batch, k)` of `k` scalars, in the dtype of `like`."""

    def rotation(self, a: Scalar, b: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """The Givens rotation `(c, s, rho)`: `c a + s b = rho`, `-conj(s) a + c b = 0`, with `c` and `b` real.

        `c = 1, s = 0` where both vanish.
        """
        magnitude = self.sqrt(self.abs2(a) + b * b)
        c = self.where(magnitude > 0, self.ratio(self.sqrt(self.abs2(a)), magnitude), 1.0)
        # the phase of a, 1 where a vanishes
        size = self.sqrt(self.abs2(a))
        phase = self.where(size > 0, self.ratio(a, size), 1.0)
        return c, self.ratio(phase * b, magnitude), phase * magnitude

    def givens(self, a: Scalar, b: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """The rotation of two real scalars: `(c, s, rho)` with `rho = sqrt(a^2 + b^2)`, `a = c rho` and `b = s rho`.

        `c = 1, s = 0` where both vanish.
        """
        rho = self.sqrt(a * a + b * b)
        return self.where(rho > 0, self.ratio(a, rho), 1.0), self.ratio(b, rho), rho

    def abs2(self, a: Scalar) -> Scalar:
        """The squared modulus."""
        return (a * self.conj(a)).real


class HostSpace(Space):
    """One system on the CPU: scalars are Python numbers."""

    in_place = True
    batch_dims = 0

    def __init__(self, like: Tensor) -> None:
        self.wide = accumulator_dtype(like.dtype)
        self.widen = self.wide != like.dtype

    def _flat(self, x: Tensor) -> Tensor:
        if self.widen:
            x = x.to(self.wide)
        return x if x.ndim == 1 else x.reshape(-1)

    def dot(self, x: Tensor, y: Tensor) -> Scalar:
        return torch.vdot(self._flat(x), self._flat(y)).item()

    def norm(self, x: Tensor) -> Scalar:
        return torch.linalg.vector_norm(x, dtype=self.wide if self.widen else None).item()

    def axpy(self, a: Scalar, x: Tensor, y: Tensor) -> Tensor:
        return y.add_(x, alpha=a)

    def xpay(self, x: Tensor, a: Scalar, y: Tensor) -> Tensor:
        return torch.add(x, y, alpha=a, out=y)

    def scale(self, a: Scalar, x: Tensor) -> Tensor:
        return x * a if a != 0 else torch.zeros_like(x, memory_format=torch.contiguous_format)

    def rescale(self, a: Scalar, x: Tensor) -> Tensor:
        return x.mul_(a)

    def ratio(self, numerator: Scalar, denominator: Scalar, where: Scalar = True) -> Scalar:
        # (the comparison below fails for NaN; the parts are looked at because the modulus of a finite number may overflow)
        size = max(abs(denominator.real), abs(denominator.imag))
        return numerator / denominator if where and 0 < size < math.inf else 0.0

    def where(self, condition: Scalar, a: Scalar, b: Scalar) -> Scalar:
        return a if condition else b

    def sqrt(self, a: Scalar) -> Scalar:
        return math.sqrt(a) if a > 0 else (0.0 if a <= 0 else a)  # NaN stays NaN

    def maximum(self, a: Scalar, b: Scalar) -> Scalar:
        return max(a, b)

    def minimum(self, a: Scalar, b: Scalar) -> Scalar:
        return min(a, b)

    def conj(self, a: Scalar) -> Scalar:
        return a.conjugate()

    def nonfinite(self, a: Scalar) -> Scalar:
        return not math.isfinite(a)

    def any(self, condition: Scalar) -> bool:
        return bool(condition)

    def may(self, condition: Scalar) -> bool:
        return bool(condition)

    def full(self, value: float, like: Tensor) -> Scalar:
        return value

    def unstack(self, coefficients: Tensor) -> list[Scalar]:
        return list(coefficients.tolist())

    def stack(self, scalars: Sequence[Scalar], like: Tensor) -> Tensor:
        return torch.tensor(list(scalars), dtype=like.dtype)


class TensorSpace(Space):
    """Many systems, another device, or an unrolled solve: scalars are tensors of the batch shape."""

    def __init__(self, batch_dims: int, in_place: bool = True) -> None:
        self.batch_dims = batch_dims
        self.in_place = in_place

    def _flat(self, x: Tensor) -> Tensor:
        return flatten(x, self.batch_dims).to(accumulator_dtype(x.dtype))

    def _spread(self, a: Scalar, x: Tensor) -> Scalar:
        """The scalar `a`, shaped to multiply the vector `x`."""
        if not isinstance(a, Tensor):
            return torch.full((), a, dtype=x.dtype, device=x.device)
        if torch.compiler.is_compiling():  # a view keeps it in memory: else inductor computes it anew for every few entries
            a = a.as_strided(a.shape, a.stride())
        return a.reshape(a.shape + (1,) * (x.ndim - self.batch_dims)).to(x.dtype)

    def dot(self, x: Tensor, y: Tensor) -> Scalar:
        return torch.linalg.vecdot(self._flat(x), self._flat(y))

    def norm(self, x: Tensor) -> Scalar:
        return torch.linalg.vector_norm(self._flat(x), dim=-1)

    def axpy(self, a: Scalar, x: Tensor, y: Tensor) -> Tensor:
        return y.addcmul_(self._spread(a, x), x) if self.in_place else y + self._spread(a, x) * x

    def xpay(self, x: Tensor, a: Scalar, y: Tensor) -> Tensor:
        return torch.addcmul(x, self._spread(a, y), y, out=y) if self.in_place else x + self._spread(a, y) * y

    def scale(self, a: Scalar, x: Tensor) -> Tensor:
        a = self._spread(a, x)
        return torch.where(a != 0, x * a, torch.zeros((), dtype=x.dtype, device=x.device))

    def rescale(self, a: Scalar, x: Tensor) -> Tensor:
        return x.mul_(self._spread(a, x)) if self.in_place else x * self._spread(a, x)

    def ratio(self, numerator: Scalar, denominator: Scalar, where: Scalar = True) -> Scalar:
        usable = where & (denominator != 0) & ~self.nonfinite(denominator)
        # the inner `where` keeps the derivative of the unused branch finite
        quotient = numerator / (denominator if self.in_place else torch.where(usable, denominator, 1.0))
        return torch.where(usable, quotient, 0.0)

    def where(self, condition: Scalar, a: Scalar, b: Scalar) -> Scalar:
        return torch.where(condition, a, b)

    def sqrt(self, a: Scalar) -> Scalar:
        if self.in_place:
            return a.clamp(min=0.0).sqrt()
        positive = ~(a <= 0)  # NaN stays NaN, and the derivative of the unused branch is finite
        return torch.where(positive, torch.where(positive, a, 1.0).sqrt(), 0.0)

    def maximum(self, a: Scalar, b: Scalar) -> Scalar:
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)

    def minimum(self, a: Scalar, b: Scalar) -> Scalar:
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)

    def conj(self, a: Scalar) -> Scalar:
        return a.conj()

    def nonfinite(self, a: Scalar) -> Scalar:
        return a - a != 0  # two passes; those of isfinite are four

    def any(self, condition: Scalar) -> bool:
        return any_true(condition)

    def may(self, condition: Scalar) -> bool:
        return torch.compiler.is_compiling() or condition.device.type != "cpu" or any_true(condition)

    def full(self, value: float, like: Tensor) -> Scalar:
        dtype = accumulator_dtype(real_dtype(like.dtype))
        shape = like.shape[: self.batch_dims]
        return torch.full(shape, value, dtype=torch.int64 if isinstance(value, int) else dtype, device=like.device)

    def unstack(self, coefficients: Tensor) -> list[Scalar]:
        return list(coefficients.unbind(-1))

    def stack(self, scalars: Sequence[Scalar], like: Tensor) -> Tensor:
        return torch.stack([s.to(like.dtype) for s in scalars], dim=-1)


class _Any(torch.autograd.Function):
    """Whether any element is true, over `torch.vmap`'s batches as well, so that a loop may stop on it."""

    @staticmethod
    def forward(condition: Tensor) -> Tensor:
        return condition.any()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, condition: Tensor) -> tuple[Tensor, None]:
        return _Any.apply(condition), None


def any_true(condition: Tensor | bool) -> bool:
    """Whether any element is true; a synchronisation of the host with the device."""
    if not isinstance(condition, Tensor):
        return bool(condition)
    if not _wrapped(condition):
        return bool(condition.any())
    if _functorch.is_legacy_batchedtensor(condition):  # the older vmap of is_grads_batched=True
        torch._C._vmapmode_increment_nesting()
        condition = torch._remove_batch_dim(condition, torch._C._vmapmode_decrement_nesting(), 0, 0)
    return bool(_Any.apply(condition))


def _wrapped(x: Tensor) -> bool:
    """Whether the tensor belongs to a level of `torch.func`, or of the older vmap."""
    return bool(_functorch.is_functorch_wrapped_tensor(x) or _functorch.is_legacy_batchedtensor(x))


def probe(like: Tensor) -> Tensor:
    """A vector with a part in every direction that nothing was chosen for; no draw, since the random state is the user's."""
    count = torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device)
    return (0.7 * count * count).cos().reshape(like.shape).to(like.dtype)


def headroom(like: Tensor) -> Tensor | None:
    """What leaves room on the heap for the vectors that products make and drop, for as long as it is kept.

    glibc gives what is free at the top of its heap back to the system, and takes it again page by page at the next product,
    which costs more than the arithmetic on vectors of some megabytes. So a few vectors are freed below one that stays; nobody
    touches it, and it takes no memory. Smaller and larger vectors do not lie there.
    """
    if like.device.type != "cpu" or not 2**17 <= like.numel() * like.element_size() <= 2**25:
        return None
    room = [like.new_empty(like.shape) for _ in range(ROOM)]
    top = like.new_empty(like.shape)
    del room
    return top


class Basis:
    """The orthonormal vectors of an Arnoldi or Lanczos process, kept side by side for fused products."""

    def __init__(self, space: Space, first: Tensor, capacity: int, a: Scalar = 1.0) -> None:
        self.space = space
        self.host = isinstance(space, HostSpace)
        self.shape = first.shape
        self.count, self.capacity = 0, capacity
        batch = first.shape[: space.batch_dims]
        self.width = math.prod(first.shape[space.batch_dims :])
        self._block = first.new_empty((*batch, capacity, self.width)) if space.in_place else None
        self._list: list[Tensor] = []
        self.append(first, a)

    def append(self, vector: Tensor, a: Scalar = 1.0) -> None:
        """Add `a` times a vector, zero where `a` is zero."""
        flat = flatten(vector, self.space.batch_dims)
        if self._block is None:
            self._list.append(self.space.scale(a, flat))
        elif self.host and a != 0:
            torch.mul(flat, a, out=self._block[self.count])
        else:
            self._block[..., self.count, :].copy_(self.space.scale(a, flat))
        self.count += 1

    def _vectors(self) -> Tensor:
        if self._block is None:
            return torch.stack(self._list, dim=self.space.batch_dims)
        return self._block[..., : self.count, :]

    def __getitem__(self, index: int) -> Tensor:
        flat = self._list[index] if self._block is None else self._block[..., index, :]
        return flat.reshape(self.shape)

    def project(self, w: Tensor) -> Tensor:
        """`V^H w`: the coefficients of `w`, of shape `(*batch, count)`."""
        flat = flatten(w, self.space.batch_dims)
        if self.host:
            return torch.mv(self._vectors(), flat.conj()).conj()  # V.conj() would be a copy
        return (self._vectors().conj() @ flat.unsqueeze(-1)).squeeze(-1)

    def subtract(self, w: Tensor, coefficients: Tensor) -> Tensor:
        """`w - V c`, written over `w` where updates are in place."""
        if self.host:
            w.view(-1).addmv_(self._vectors().T, coefficients, alpha=-1)
            return w
        part = self.combine(coefficients)
        return w.sub_(part) if self.space.in_place else w - part

    def combine(self, coefficients: Tensor) -> Tensor:
        """`V c` for coefficients of shape `(*batch, k)`, `k <= count`."""
        vectors = self._vectors()[..., : coefficients.shape[-1], :]
        return (coefficients.unsqueeze(-2) @ vectors).reshape(self.shape)


def precise_norm(x: Tensor, batch_dims: int) -> Tensor:
    """The norm of each system in float64, without overflow or underflow of the squares.

    The stopping rule and the scaling of the right-hand side rest on it, so that a right-hand side of size 1e-30 in
    float32, or 1e-200 in float64, is solved as well as one of size 1.
    """
    flat = flatten(x, batch_dims)
    if flat.shape[-1] == 0:
        return torch.zeros(flat.shape[:-1], dtype=torch.float64, device=x.device)
    if real_dtype(x.dtype) != torch.float64:  # squares of a narrower type fit in float64
        wide = torch.complex128 if x.dtype.is_complex else torch.float64
        narrow_norm: Tensor = torch.linalg.vector_norm(flat, dim=-1, dtype=wide)
        return narrow_norm
    if x.device.type == "cpu" and not _wrapped(x):
        plain: Tensor = torch.linalg.vector_norm(flat, dim=-1)
        if ((plain > SAFE_NORM) & (plain < 1 / SAFE_NORM)).all():  # to look costs nothing here
            return plain
    largest = torch.linalg.vector_norm(flat, ord=math.inf, dim=-1, keepdim=True)
    usable = (largest > 0) & torch.isfinite(largest)
    unit = flat / torch.where(usable, largest, 1.0)
    norm: Tensor = largest * torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    return torch.where(usable, norm, largest).squeeze(-1)


def largest_entry(x: Tensor, batch_dims: int) -> Tensor:
    """The largest modulus of an entry of each system in float64, 0 where there is no entry."""
    flat = flatten(x, batch_dims)
    if flat.shape[-1] == 0:
        return torch.zeros(flat.shape[:-1], dtype=torch.float64, device=x.device)
    largest: Tensor = torch.linalg.vector_norm(flat, ord=math.inf, dim=-1).double()
    return largest


@dataclass(frozen=True)
class Layout:
    """How the user's right-hand side, a tensor or a pytree of tensors, lies in one vector.

    A single tensor passes as it is. Several leaves are packed into one buffer of shape `(*batch, n)`, which is complex if one
    of them is; `real` says which of them are not.
    """

    spec: Any
    shapes: tuple[torch.Size, ...]
    batch_dims: int
    dtype: torch.dtype
    real: tuple[bool, ...] = ()

    @classmethod
    def of(cls, tree: Any, batch_dims: int) -> Layout:
        """The layout of `tree`, whose leaves are tensors."""
        leaves, spec = pytree.tree_flatten(tree)
        dtype = functools.reduce(torch.promote_types, (leaf.dtype for leaf in leaves))
        real = tuple(not leaf.is_complex() and dtype.is_complex for leaf in leaves)
        return cls(spec, tuple(leaf.shape for leaf in leaves), batch_dims, dtype, real)

    @property
    def single(self) -> bool:
        """Whether the vector is the user's own tensor."""
        return bool(self.spec.is_leaf())

    @property
    def vector_shape(self) -> tuple[int, ...]:
        """The shape of a vector without its batch dimensions."""
        if self.single:
            return tuple(self.shapes[0][self.batch_dims :])
        return (sum(math.prod(shape[self.batch_dims :]) for shape in self.shapes),)

    def zero(self, like: Tensor, batch_dims: int) -> Tensor:
        """The zero vector for the systems, of `batch_dims` batch dimensions, of another one, on its device."""
        return like.new_zeros((*like.shape[:batch_dims], *self.vector_shape), dtype=self.dtype)

    def leaves(self, tree: Any) -> list[Any] | None:
        """The leaves of a tree with this structure, dictionaries read by key; None for another structure."""
        if self.single:
            return [tree] if pytree.tree_structure(tree).is_leaf() else None
        try:
            leaves: list[Any] = self.spec.flatten_up_to(tree)
        except (ValueError, TypeError, KeyError):
            return None
        return leaves if all(pytree.tree_structure(leaf).is_leaf() for leaf in leaves) else None

    def pack(self, tree: Any) -> Tensor:
        """The vector of a tree that has this layout."""
        leaves = pytree.tree_leaves(tree)
        if self.single:
            return leaves[0]  # type: ignore[no-any-return]
        return torch.cat([flatten(leaf, self.batch_dims) for leaf in leaves], dim=-1)

    def unpack(self, vector: Tensor) -> Any:
        """The tree whose vector this is."""
        if self.single:
            return pytree.tree_unflatten([vector], self.spec)
        sizes = [math.prod(shape[self.batch_dims :]) for shape in self.shapes]
        parts = vector.split(sizes, dim=-1)
        # inside vmap and for broadcast batches the vector's own batch shape is the one that holds
        leaves = [
            (part.real if real else part).reshape((*vector.shape[:-1], *shape[self.batch_dims :]))
            for part, shape, real in zip(parts, self.shapes, self.real, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.spec)
