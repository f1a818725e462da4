"""From a callable to a pure function and the tensors it depends on.

A user's `A` is any callable, and the tensors that it reads stand in closures, modules, bound methods and helpers.
Running it once under a `TorchFunctionMode` shows every *outside* tensor: one that enters an operation and was not made
inside. Those through which a derivative or a batch can come are the *recorded* tensors, and `Closure.apply(v, given)` is
a pure function of the vector and of one given tensor for each of them.

It runs the callable again under the same mode, which puts the given tensor wherever the recorded one enters an operation.
An outside tensor that was not there when recording, because a loop has bound the closure's variable to the next tensor or
`torch.func.functional_call` has put the old parameter back, takes the given tensor of its position in the order of entry.
What no mode can see into, such as `torch.autograd.Function.apply` outside transforms, works as long as the given tensors
are the recorded ones; autograd then differentiates with respect to those. Each graph is searched for a lost dependency.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

_functorch = torch._C._functorch

F = TypeVar("F", bound=Callable[..., Any])

PARAMS_REMEDY = "Pass the tensor through params=: solve(A, b, params=(tensor,)), with A called as A(v, tensor)."

HIDDEN_BY_TRANSFORM = (
    "A hands a captured tensor to a torch.func transform of its own, and the tensor would have to be replaced there because "
    "another transform runs outside. " + PARAMS_REMEDY
)


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


def eager(function: F) -> F:
    """Make `torch.compile` break its graph at the function, whose loops stop on data, and run it as it is."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)

    # what torch.compiler.disable sets; to call it here would import the compiler, which takes seconds
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = "a solver loop stops on data"  # type: ignore[attr-defined]
    return cast(F, call)


class _Trace(TorchFunctionMode):
    """Follows one run of `A`: `enter` is told of every tensor that enters an operation, and says what takes its place."""

    def __init__(self, inside: Sequence[Tensor]) -> None:
        super().__init__()
        self.level = _level_now()
        self.made = WeakIdKeyDictionary()
        self.stand_in = WeakIdKeyDictionary()  # of each outside tensor: itself, or what replaces it
        # the memory of what is made inside, and of what comes from outside, views of it included
        self.inside_memory: set[int] = set()
        self.outside_memory: set[int] = set()
        for tensor in inside:
            self._make(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self._replace, (args, kwargs or {}))
        result = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf not in self.stand_in:
                self._make(leaf)
        return result

    def _make(self, tensor: Tensor) -> None:
        self.made[tensor] = True
        self.inside_memory.add(_memory(tensor))

    def _replace(self, tensor: Tensor) -> Tensor:
        if tensor in self.made:
            return tensor
        if tensor not in self.stand_in:
            self.stand_in[tensor] = self._enter(tensor)
        replacement: Tensor = self.stand_in[tensor]
        return replacement

    def _enter(self, tensor: Tensor) -> Tensor:
        base = tensor
        while _functorch.maybe_get_level(base) > self.level and not self.known(base):
            base = _functorch.get_unwrapped(base)  # A runs a transform of its own: look beneath its wrapper
            if base in self.made:
                return tensor
        memory = _memory(base)
        if base is tensor:
            self.outside_memory.add(memory)
            return self.enter(tensor)
        if base not in self.stand_in and (memory in self.outside_memory or memory not in self.inside_memory):
            self.stand_in[base] = base
            self.outside_memory.add(memory)
            self.enter_beneath(base)
        return tensor

    def known(self, tensor: Tensor) -> bool:
        """Whether the tensor is one of those to look out for."""
        return False

    def enter(self, tensor: Tensor) -> Tensor:
        """Take note of a new outside tensor; return what is to take its place."""
        raise NotImplementedError

    def enter_beneath(self, base: Tensor) -> None:
        """Take note of a new outside tensor that `A` has wrapped for a transform of its own."""
        raise NotImplementedError


class _Recording(_Trace):
    """Notes the outside tensors in the order in which they enter."""

    def __init__(self, inside: Sequence[Tensor]) -> None:
        super().__init__(inside)
        self.outside: list[tuple[Tensor, int]] = []

    def enter(self, tensor: Tensor) -> Tensor:
        self.outside.append((tensor, _version(tensor)))
        return tensor

    def enter_beneath(self, base: Tensor) -> None:
        core = base
        while _functorch.is_gradtrackingtensor(core) and not _tracks(core):
            core = _functorch.get_unwrapped(core)  # a constant, lifted to the level of the transform outside
        if self.level > 0 and _carries_derivative(core):
            raise RuntimeError(HIDDEN_BY_TRANSFORM)
        self.enter(base)


class _Replay(_Trace):
    """Puts the given tensors in the places of the recorded ones."""

    def __init__(self, inside: Sequence[Tensor], order: Sequence[Tensor | None], cached: Any, given: Any) -> None:
        super().__init__(inside)
        self.order, self.cached, self.given = order, cached, given
        self.count = 0
        self.replaced = False

    def known(self, tensor: Tensor) -> bool:
        return tensor in self.given

    def enter(self, tensor: Tensor) -> Tensor:
        recorded: Tensor | None = tensor
        if tensor not in self.given and tensor not in self.cached and self.count < len(self.order):
            recorded = self.order[self.count]
            if recorded is None or (recorded.shape, recorded.dtype) != (tensor.shape, tensor.dtype):
                recorded = tensor
        self.count += 1
        replacement: Tensor = self.given.get(recorded, recorded)
        self.replaced |= not _same_edge(replacement, tensor)
        return replacement if self.replaced else tensor

    def enter_beneath(self, base: Tensor) -> None:
        self.count += 1
        if base in self.given and not _same_edge(self.given[base], base):
            raise RuntimeError(HIDDEN_BY_TRANSFORM)


@dataclass(frozen=True, eq=False)
class Closure:
    """A callable `v -> A v` as a pure function of `v` and of the tensors it depends on.

    Attributes:
        function: the callable, `function(v, *declared)`.
        recorded: the tensors it depends on through which a derivative or a batch can come, the declared ones first.
        declared: how many of the recorded tensors are arguments of the callable.
        order: the outside tensors in the order of entry; None for what an operation unseen by the mode has made.
        versions: their in-place versions at recording; -1 for a tensor that `A` itself writes to, such as a counter.
        cached: tensors that the recorded run has made and that live on, because `A` keeps them.
        runs: how often recording has run the callable.
    """

    function: Callable[..., Tensor]
    recorded: tuple[Tensor, ...] = ()
    declared: int = 0
    order: tuple[Tensor | None, ...] = ()
    versions: tuple[int, ...] = ()
    cached: Any = ()
    runs: int = 0

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
        with torch.enable_grad(), transparent(), _Recording([v, *params]) as trace:
            result = function(v, *params)
        # what an operation that no mode sees has made inside is no input, though it was not seen being made: the graph or
        # its death after the run gives it away
        references = [(None if _made_since(t, first_inside) else TensorWeakRef(t), version) for t, version in trace.outside]
        inputs = [t for t, _ in trace.outside if _carries_derivative(t) and not _made_since(t, first_inside)]
        _check_nothing_is_lost(result, (*params, *inputs), trace.made, first_inside)
        moving = _moves(result)
        made = trace.made
        del result, trace, inputs
        order = tuple(None if reference is None else reference() for reference, _ in references)
        recorded = (*params, *(t for t in order if t is not None and _carries_derivative(t)))
        # a tensor that A itself writes to, such as a counter, is not part of what A is
        versions = tuple(-1 if t is None or _version(t) != n else n for t, (_, n) in zip(order, references, strict=True))
        replay = moving and transforms_active()
        closure = cls(function, recorded, len(params), order, versions, made, runs=2 if replay else 1)
        # Forward mode keeps no graph to search. In a transform, a tangent that outlives those of all recorded tensors is a
        # lost one; plain dual numbers go through A as they are, and one of them must be there for the rule to be asked.
        if replay:
            with torch.no_grad():
                lost = _moves(closure.apply(v, [t.detach() for t in recorded]))
        else:
            lost = moving and not any(_has_tangent(t) for t in recorded)
        if lost:
            raise RuntimeError(
                "A depends on a tensor with a tangent (forward mode) that could not be found by recording the operations of "
                "A, so that its part of the derivative would be lost. " + PARAMS_REMEDY
            )
        return closure

    def apply(self, v: Tensor, given: Sequence[Tensor]) -> Tensor:
        """`A v`, with `given[i]` in the place of `recorded[i]`."""
        return self._replay(v, given)[0]

    def _replay(self, v: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """`A v`, and whether any tensor was replaced on the way."""
        params = given[: self.declared]
        if not self.order:
            return self.function(v, *params), False
        places = WeakIdKeyDictionary(zip(self.recorded[self.declared :], given[self.declared :], strict=True))
        first_inside = torch._C._autograd._get_sequence_nr()
        try:
            with transparent(), _Replay([v, *params], self.order, self.cached, places) as trace:
                result = self.function(v, *params)
        except RuntimeError as error:  # torch's own words for a wrapped tensor of another level inside a transform of A
            if "INTERNAL ASSERT FAILED" in str(error) and any(is_wrapped(t) for t in self.recorded):
                raise RuntimeError(HIDDEN_BY_TRANSFORM) from error
            raise
        if trace.replaced:
            if is_wrapped(result) and not any(is_wrapped(t) for t in (v, *given)):
                raise RuntimeError("A depends on a tensor of a torch.func transform that cannot be found. " + PARAMS_REMEDY)
            if torch.is_grad_enabled():
                _check_nothing_is_lost(result, (v, *given), trace.made, first_inside)
        return result, trace.replaced

    def bind(self, given: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """`v -> A v` for one choice of the given tensors; where the first call replaces nothing, later ones cost nothing."""
        direct = False

        def bound(v: Tensor) -> Tensor:
            nonlocal direct
            if direct:
                return self.function(v, *params)
            result, replaced = self._replay(v, given)
            direct = not replaced
            return result

        params = given[: self.declared]
        return bound

    def check_constants(self) -> None:
        """Raise if a tensor that A reads was changed in place since recording.

        Raises:
            RuntimeError: naming shape and dtype of the tensor.
        """
        for tensor, version in zip(self.order, self.versions, strict=True):
            if tensor is not None and version >= 0 and _version(tensor) != version:
                raise RuntimeError(
                    f"A tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype} that A depends on was modified by an "
                    "inplace operation between the forward solve and the backward pass, so that the adjoint of the operator "
                    "that was solved is lost. Change a copy instead."
                )

    def vmapped(self, in_dims: Sequence[int | None]) -> Closure:
        """The closure that acts on vectors and given tensors with one more, leading, batch dimension.

        `in_dims[i]` is 0 where `given[i]` has that dimension and None where it has not.
        """
        own = (self.function, self.recorded, self.declared, self.order, self.versions, self.cached, self.runs)
        return _Vmapped(*own, base=self, in_dims=tuple(in_dims))

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

    def _replay(self, v: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, bool]:
        def one(v: Tensor, *given: Tensor) -> Tensor:
            return self.base.apply(v, given)

        return torch.vmap(one, in_dims=(0, *self.in_dims))(v, *given), True

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


def _unwrapped_to(tensor: Tensor, level: int) -> Tensor:
    while _functorch.maybe_get_level(tensor) > level:
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def _memory(tensor: Tensor) -> int:
    """The address of what lies beneath all wrappers; 0 where there is none."""
    plain = tensor
    while is_wrapped(plain):
        plain = _functorch.get_unwrapped(plain)
    return plain.untyped_storage().data_ptr() if plain.layout == torch.strided and plain.device.type != "meta" else 0


def _level_now() -> int:
    level = _functorch.maybe_current_level()
    return 0 if level is None else int(level)


def _version(tensor: Tensor) -> int:
    """The in-place version; constant for tensors that keep none."""
    if tensor.is_inference():
        return 0
    return int(tensor._version)


def _made_since(tensor: Tensor, first_inside: int) -> bool:
    """Whether an operation that is not older than `first_inside` has made the tensor."""
    return tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() >= first_inside


def _same_edge(a: Tensor, b: Tensor) -> bool:
    """Whether a derivative with respect to `a` is one with respect to `b`: the same tensor, or the same place in the graph."""
    return a is b or (a.grad_fn is not None and a.grad_fn is b.grad_fn and a.output_nr == b.output_nr)


def _carries_derivative(tensor: Tensor) -> bool:
    """Whether a gradient, a tangent or a batch can come through the tensor."""
    return is_wrapped(tensor) or _tracks(tensor)


def _tracks(tensor: Tensor) -> bool:
    """Whether the tensor itself has a gradient or a tangent."""
    return tensor.requires_grad or _has_tangent(tensor)


def _has_tangent(tensor: Any) -> bool:
    """Whether a derivative in forward mode goes through the tensor; only dense layouts hold one."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not is_differentiable(tensor):
        return False
    if _functorch.is_batchedtensor(tensor):  # vmap cannot unpack one
        return False
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def _moves(result: Any) -> bool:
    """Whether the result has a tangent at any level of `torch.func`, or of plain dual numbers beneath them."""
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    with contextlib.ExitStack() as levels:
        while True:
            if any(_has_tangent(leaf) for leaf in leaves):
                return True
            level = _level_now()
            if level <= 0:
                return False
            levels.enter_context(temporarily_pop_interpreter_stack())
            leaves = [_unwrapped_to(leaf, level - 1) for leaf in leaves]


def _check_nothing_is_lost(result: Any, inputs: Sequence[Tensor], made: WeakIdKeyDictionary, first_inside: int) -> None:
    """Raise unless every edge of the result's autograd graph that leaves the recorded run ends in a recorded tensor.

    Autograd numbers the nodes of a thread in the order in which they are made: a node with a number below
    `first_inside` is older than the run. Each level of `torch.func` has a graph of its own.
    """
    layers = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    known = list(inputs)
    while layers:
        level = max(_functorch.maybe_get_level(t) for t in layers)
        known = [_unwrapped_to(t, level) for t in known]
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
