"""From a callable to a pure function and the tensors it depends on.

A user's `A` is any callable, and the tensors that it reads stand in closures, modules, bound methods and helpers.
Running it once under a `TorchFunctionMode` shows every tensor that enters an operation and was not made inside: the
*recorded* tensors. `Closure.apply(v, given)` is then a pure function of the vector and of one given tensor for each
recorded one.

Two ways to evaluate it, one for each of PyTorch's worlds:

* Outside `torch.func` transforms a given tensor *is* the recorded one (or shares its autograd edge), so the callable
  runs as it is, and autograd differentiates it with respect to the tensors themselves. User functions that no mode can
  see into (`torch.autograd.Function.apply`) are differentiated as well.
* Inside a transform a given tensor is the recorded one at another level. The same mode then puts the given tensor
  wherever the recorded one enters an operation.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

_functorch = torch._C._functorch

PARAMS_REMEDY = "Pass the tensor through params=: solve(A, b, params=(tensor,)), with A called as A(v, tensor)."


def transforms_active() -> bool:
    """Whether a `torch.func` transform (grad, vjp, jvp, vmap, ...) is running."""
    return bool(torch._C._are_functorch_transforms_active())


def is_wrapped(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a level of a `torch.func` transform."""
    return bool(_functorch.is_functorch_wrapped_tensor(tensor))


def is_differentiable(tensor: Tensor) -> bool:
    """Whether the dtype has derivatives."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


@contextlib.contextmanager
def transparent() -> Iterator[None]:
    """Let `torch.compile`d callables run eagerly, so that a mode sees them and their graph can be used repeatedly."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Recorder(TorchFunctionMode):
    """Collects the tensors that enter operations and were not made inside."""

    def __init__(self, made: Sequence[Tensor]) -> None:
        super().__init__()
        self.level = _level_now()
        self.made = WeakIdKeyDictionary()
        for tensor in made:
            self.made[tensor] = True
        self.recorded: list[tuple[Tensor, int]] = []
        self.seen = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._enter(leaf)
        result = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf not in self.seen:
                self.made[leaf] = True
        return result

    def _enter(self, tensor: Tensor) -> None:
        if tensor in self.made or tensor in self.seen:
            return
        self.seen[tensor] = True
        base = tensor
        while _functorch.maybe_get_level(base) > self.level:  # A runs a transform of its own: look beneath it
            base = _functorch.get_unwrapped(base)
        if base is not tensor:
            if base in self.made or base in self.seen:
                return
            self.seen[base] = True
            if self.level > 0 and _carries_derivative(base):
                raise RuntimeError(
                    "A hands a captured tensor to a torch.func transform of its own while another transform runs outside, "
                    "where the tensor cannot be replaced. " + PARAMS_REMEDY
                )
        self.recorded.append((base, _version(base)))


class _Substitution(TorchFunctionMode):
    """Puts a given tensor wherever a recorded one enters an operation."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.given = {id(old): new for old, new in pairs}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: self.given.get(id(t), t), (args, kwargs or {}))
        return func(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Closure:
    """A callable `v -> A v` as a pure function of `v` and of the tensors it depends on.

    Attributes:
        function: the callable, `function(v, *declared)`.
        recorded: the tensors it depends on through which a derivative or a batch can come, the declared ones first.
        constants: the other tensors it reads, with the version at which they were recorded.
        declared: how many of the recorded tensors are arguments of the callable.
    """

    function: Callable[..., Tensor]
    recorded: tuple[Tensor, ...] = ()
    constants: tuple[tuple[TensorWeakRef, int], ...] = ()
    declared: int = 0

    @property
    def dense(self) -> bool:
        """Whether `matrix` gives the operator as a dense matrix."""
        return False

    @classmethod
    def record(cls, function: Callable[..., Tensor], example: Tensor, params: Sequence[Tensor] = ()) -> Closure:
        """Run `function(v, *params)` once on a vector like `example` and record what it depends on.

        Raises:
            RuntimeError: if the result depends on a tensor that cannot be found.
        """
        v = example.detach()
        first_inside = torch._C._autograd._get_sequence_nr()
        with torch.enable_grad(), transparent(), _Recorder([v, *params]) as recorder:
            result = function(v, *params)
        # what an operation that no mode sees has made inside is no input, though it was not seen being made
        found = [(t, v) for t, v in recorder.recorded if t.grad_fn is None or t.grad_fn._sequence_nr() < first_inside]
        inputs = (*params, *(t for t, _ in found if _carries_derivative(t)))
        _check_nothing_is_lost(result, inputs, recorder.made, first_inside)
        # a tensor that A itself writes to, such as a counter, is not part of what A is
        constants = tuple(
            (TensorWeakRef(t), version) for t, version in found if not _carries_derivative(t) and _version(t) == version
        )
        return cls(function, inputs, constants, len(params))

    def apply(self, v: Tensor, given: Sequence[Tensor]) -> Tensor:
        """`A v`, with `given[i]` in the place of `recorded[i]`."""
        active = transforms_active()
        params, found = given[: self.declared], given[self.declared :]
        pairs = [
            (r, g)
            for r, g in zip(self.recorded[self.declared :], found, strict=True)
            if r is not g and (active or is_wrapped(r))
        ]
        if not pairs:
            return self.function(v, *params)
        with transparent(), _Substitution(pairs):
            result = self.function(v, *params)
        if not active and is_wrapped(result):
            raise RuntimeError("A depends on a tensor of a torch.func transform that cannot be found. " + PARAMS_REMEDY)
        return result

    def check_constants(self) -> None:
        """Raise if a tensor that A reads, but that needs no gradient itself, was changed in place since recording.

        Raises:
            RuntimeError: naming shape and dtype of the tensor.
        """
        for reference, version in self.constants:
            tensor = reference()
            if tensor is not None and _version(tensor) != version:
                raise RuntimeError(
                    f"A tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype} that A depends on was modified by an "
                    "inplace operation between the forward solve and the backward pass, so that the adjoint of the operator "
                    "that was solved is lost. Change a copy instead."
                )

    def vmapped(self, in_dims: Sequence[int | None]) -> Closure:
        """The closure that acts on vectors and given tensors with one more, leading, batch dimension.

        `in_dims[i]` is 0 where `given[i]` has that dimension and None where it has not.
        """
        return _Vmapped(self.function, self.recorded, self.constants, self.declared, base=self, in_dims=tuple(in_dims))

    def matrix(self, given: Sequence[Tensor]) -> Tensor | None:
        """The dense matrix, of shape `(*batch, n, n)` with sizes 1 where it is shared; None for a function."""
        return None


@dataclass(frozen=True, eq=False)
class _Vmapped(Closure):
    base: Closure = None  # type: ignore[assignment]
    in_dims: tuple[int | None, ...] = ()

    @property
    def dense(self) -> bool:
        return self.base.dense

    def apply(self, v: Tensor, given: Sequence[Tensor]) -> Tensor:
        def one(v: Tensor, *given: Tensor) -> Tensor:
            return self.base.apply(v, given)

        result: Tensor = torch.vmap(one, in_dims=(0, *self.in_dims))(v, *given)
        return result

    def matrix(self, given: Sequence[Tensor]) -> Tensor | None:
        if not self.dense:
            return None
        if all(dim is None for dim in self.in_dims):
            matrix = self.base.matrix(given)
            return None if matrix is None else matrix.unsqueeze(0)
        return torch.vmap(lambda *given: self.base.matrix(given), in_dims=self.in_dims)(*given)


@dataclass(frozen=True, eq=False)
class MatrixClosure(Closure):
    """A dense matrix: `recorded` is the tensor itself, `batch_dims` the number of batch dimensions of the vectors."""

    batch_dims: int = 0

    @property
    def dense(self) -> bool:
        return True

    @classmethod
    def of(cls, matrix: Tensor, batch_dims: int) -> MatrixClosure:
        """The closure of `v -> matrix @ v` for vectors of shape `(*batch, n)`."""
        return cls(lambda v, matrix: matvec(matrix, v), (matrix,), declared=1, batch_dims=batch_dims)

    def matrix(self, given: Sequence[Tensor]) -> Tensor | None:
        (matrix,) = given
        return matrix[(None,) * (self.batch_dims + 2 - matrix.ndim)]


def matvec(matrix: Tensor, v: Tensor) -> Tensor:
    """`matrix @ v` for vectors of shape `(*batch, n)`; real and complex mix as in mathematics."""
    if matrix.is_complex() and not v.is_complex():
        v = v.to(matrix.dtype)
    if v.is_complex() and not matrix.is_complex():
        return torch.view_as_complex((matrix @ torch.view_as_real(v.resolve_conj())).contiguous())
    if matrix.ndim == 2 and v.ndim > 1:
        return v @ matrix.mT
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)


def _level_now() -> int:
    level = _functorch.maybe_current_level()
    return 0 if level is None else int(level)


def _version(tensor: Tensor) -> int:
    """The in-place version; constant for tensors that keep none."""
    if tensor.is_inference():
        return 0
    return int(tensor._version)


def _carries_derivative(tensor: Tensor) -> bool:
    """Whether a gradient, a tangent or a batch can come through the tensor."""
    if tensor.requires_grad or is_wrapped(tensor):
        return True
    return is_differentiable(tensor) and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def _check_nothing_is_lost(result: Any, inputs: Sequence[Tensor], made: WeakIdKeyDictionary, first_inside: int) -> None:
    """Raise unless every edge of the result's autograd graph that leaves the recorded run ends in a recorded tensor.

    Autograd numbers the nodes of a thread in the order in which they are made: a node with a number below
    `first_inside` is older than the run. Each level of `torch.func` has a graph of its own.
    """
    layers = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    known = list(inputs)
    while layers:
        stack: list[tuple[Any, int]] = [(t.grad_fn, t.output_nr) for t in layers if t.grad_fn is not None]
        edges = {(t.grad_fn, t.output_nr) for t in known if t.grad_fn is not None}
        leaves = WeakIdKeyDictionary({t: True for t in known if t.requires_grad and t.grad_fn is None})
        visited: set[tuple[Any, int]] = set()
        while stack:
            edge = stack.pop()
            node = edge[0]
            if node is None or edge in visited or edge in edges:
                continue
            visited.add(edge)
            leaf = getattr(node, "variable", None)
            if leaf is not None and (leaf in leaves or leaf in made):
                continue
            if leaf is not None or node._sequence_nr() < first_inside:
                shape = "" if leaf is None else f" of shape {tuple(leaf.shape)}"
                raise RuntimeError(
                    f"A depends on a tensor{shape} that needs a gradient and that could not be found by recording the "
                    "operations of A, so that its gradient would be lost. " + PARAMS_REMEDY
                )
            stack.extend(node.next_functions)
        layers = [_functorch.get_unwrapped(t) for t in layers if is_wrapped(t)]
        known = [_functorch.get_unwrapped(t) if is_wrapped(t) else t for t in known]
