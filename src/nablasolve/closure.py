"""From a callable to a pure function and the tensors it depends on.

A user's `A` is any callable, and the tensors that it reads stand in closures, modules, bound methods and helpers.
Running it once under a `TorchFunctionMode` shows every *outside* tensor: one that enters an operation and was not made
inside. Those through which a derivative or a batch can come are the *recorded* tensors, and `Closure.apply(v, given)` is
a pure function of the vector and of one given tensor for each of them. Where `A` keeps what the first run has made, such as
a matrix that it computes at first use, a second run sees that one enter from outside.

It runs the callable again under the same mode, which puts the given tensor wherever the recorded one enters an operation.
An outside tensor that was not there when recording, because a loop has bound the closure's variable to the next tensor or
`torch.func.functional_call` has put the old parameter back, takes the given tensor of its position in the order of entry.
What no mode can see into, such as `torch.autograd.Function.apply` outside transforms, goes on depending on the recorded
tensors themselves. Each graph is searched for a lost dependency.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from .graph import Run, carries_derivative, has_tangent, moves
from .graph import is_differentiable as is_differentiable
from .graph import is_wrapped as is_wrapped
from .trace import HIDDEN_BY_TRANSFORM, PARAMS_REMEDY, Recording, Replay, version

_functorch = torch._C._functorch

F = TypeVar("F", bound=Callable[..., Any])


def transforms_active() -> bool:
    """Whether a `torch.func` transform (grad, vjp, jvp, vmap, ...) is running."""
    return bool(torch._C._are_functorch_transforms_active())


@contextlib.contextmanager
def transparent() -> Iterator[None]:
    """Hide nothing from a mode, and let a graph be used repeatedly.

    So `torch.compile`d callables run eagerly, and `torch.autocast` casts anew what it has cast before, unseen.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and importing it takes seconds
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


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


class _Seen(NamedTuple):
    """What one run of `A` has shown.

    Attributes:
        outside: the outside tensors in the order of entry, and their in-place versions; None for what an operation unseen by
            the mode has made.
        names: by what other tensors `A` calls some of them.
        made: what is made inside and still alive.
        lost: a word on a dependency that is not among these, or None.
        moving: whether the result has a tangent.
        run: which nodes of autograd's graph are of this run.
    """

    outside: list[tuple[TensorWeakRef | None, int]]
    names: list[tuple[Tensor, Tensor]]
    made: WeakIdKeyDictionary
    lost: str | None
    moving: bool
    run: Run

    def outlived(self, *inside: Tensor) -> bool:
        """Whether something has outlived the run, beside the tensors it was given, that has to be taken for an outside one."""
        return len(self.run.marks) > 0 or any(carries_derivative(t) for t in self.made if all(t is not u for u in inside))


def _follow(function: Callable[..., Tensor], v: Tensor, params: Sequence[Tensor]) -> _Seen:
    run = Run()
    with torch.enable_grad(), transparent(), Recording([v, *params]) as trace:
        result = function(v, *params)
    run.stop()
    # what an operation that no mode sees has made inside is no input, though it was not seen being made: the graph or its
    # death after the run gives it away
    inputs = [t for t, _ in trace.outside if carries_derivative(t) and not run.has_made(t)]
    opaque = [] if transforms_active() else [name for name, _ in trace.names()]
    lost = run.dependencies(result, (*params, *inputs, *opaque), trace.made, mark=True)[1]
    outside = [(None if run.has_made(t) else TensorWeakRef(t), n) for t, n in trace.outside]
    return _Seen(outside, trace.names(), trace.made, lost, moves(result), run)


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
        names: other tensors as which `A` knows some of the outside ones, and those: the index of a recorded one, else itself.
        runs: how often recording has run the callable.
    """

    function: Callable[..., Tensor]
    recorded: tuple[Tensor, ...] = ()
    declared: int = 0
    order: tuple[Tensor | None, ...] = ()
    versions: tuple[int, ...] = ()
    cached: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    names: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    runs: int = 0

    @property
    def dense(self) -> bool:
        """Whether `matrix` gives the operator as a dense matrix."""
        return False

    @classmethod
    def of_constants(cls, function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Closure:
        """The closure of a callable that is known to read these tensors, none of which can be asked for a derivative."""
        return cls(function, order=tensors, versions=tuple(version(t) for t in tensors))

    @classmethod
    def record(cls, function: Callable[..., Tensor], example: Tensor, params: Sequence[Tensor] = ()) -> Closure:
        """Run `function(v, *params)` once on a vector like `example` and record what it depends on.

        Raises:
            RuntimeError: if the result depends on a tensor that cannot be found.
        """
        v = example.detach().clone()  # of its own: A may read the memory of b, and v is made inside
        try:
            seen = _follow(function, v, params)
        except RuntimeError:
            if (batch := _with_the_batches(v)) is v:
                raise
            v = batch  # A may write a batch into what it has made of v, as it can in the loop, where v is one as well
            seen = _follow(function, v, params)
        runs = 1
        if seen.outlived(v, *params):
            seen, runs = _follow(function, v, params), 2
        if seen.lost is not None:
            raise RuntimeError(_lost(seen.lost))
        order = tuple(None if reference is None else reference() for reference, _ in seen.outside)
        recorded = (*params, *(t for t in order if t is not None and carries_derivative(t)))
        # a tensor that A itself writes to, such as a counter, is not part of what A is
        versions = tuple(-1 if t is None or version(t) != n else n for t, (_, n) in zip(order, seen.outside, strict=True))
        index = WeakIdKeyDictionary({t: i for i, t in enumerate(recorded)})
        names = WeakIdKeyDictionary({name: index.get(t, t) for name, t in seen.names})
        replay = seen.moving and transforms_active()
        closure = cls(function, recorded, len(params), order, versions, seen.made, names, runs + replay)
        # Forward mode keeps no graph to search. In a transform, a tangent that outlives those of all recorded tensors is a
        # lost one; plain dual numbers go through A as they are, and one of them must be there for the rule to be asked.
        if replay:
            with torch.no_grad():
                tangent_lost = moves(closure.apply(v, [t.detach() for t in recorded]))
        else:
            tangent_lost = seen.moving and not any(has_tangent(t) for t in recorded)
        if tangent_lost:
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
        if not (self.order or self.originals):
            return self.function(v, *params), False
        places = WeakIdKeyDictionary(zip(self.recorded, given, strict=True))
        places.update({name: given[meant] if isinstance(meant, int) else meant for name, meant in self.names.items()})
        for by_position in (False, True):
            run = Run()
            try:
                with transparent(), Replay([v, *params], self.order, self.cached, places, by_position) as trace:
                    result = self.function(v, *params)
            except RuntimeError as error:  # torch's own words for a wrapped tensor of another level inside a transform of A
                if "INTERNAL ASSERT FAILED" in str(error) and any(is_wrapped(t) for t in self.recorded):
                    raise RuntimeError(HIDDEN_BY_TRANSFORM) from error
                raise
            run.stop()
            if not trace.rebound:
                break
        if is_wrapped(result) and not any(is_wrapped(t) for t in (v, *given)):
            raise RuntimeError("A depends on a tensor of a torch.func transform that cannot be found. " + PARAMS_REMEDY)
        if trace.replaced and torch.is_grad_enabled():
            unseen = [] if transforms_active() else [t for t, _ in self.originals]
            lost = run.dependencies(result, (v, *given, *unseen), trace.made)[1]
            if lost is not None:
                raise RuntimeError(_lost(lost))
        return result, trace.replaced

    @property
    def originals(self) -> list[tuple[Tensor, int]]:
        """The tensors that `A` reads where nothing takes their place, with their indices; none if it was not recorded."""
        names = [(name, meant) for name, meant in self.names.items() if isinstance(meant, int)]
        return [*((t, i) for i, t in enumerate(self.recorded)), *names] if self.runs else []

    def bind(self, given: Sequence[Tensor]) -> Bound:
        """`v -> A v` for one choice of the given tensors."""
        return Bound(self, given)

    def check_constants(self) -> None:
        """Raise if a tensor that A reads was changed in place since recording.

        Raises:
            RuntimeError: naming shape and dtype of the tensor.
        """
        for tensor, recorded_version in zip(self.order, self.versions, strict=True):
            if tensor is not None and recorded_version >= 0 and version(tensor) != recorded_version:
                raise RuntimeError(
                    f"A tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype} that A depends on was modified by an "
                    "inplace operation between the forward solve and the backward pass, so that the adjoint of the operator "
                    "that was solved is lost. Change a copy instead."
                )

    def vmapped(self, in_dims: Sequence[int | None]) -> Closure:
        """The closure that acts on vectors and given tensors with one more, leading, batch dimension.

        `in_dims[i]` is 0 where `given[i]` has that dimension and None where it has not.
        """
        own = (self.function, self.recorded, self.declared, self.order, self.versions, self.cached, self.names, self.runs)
        return _Vmapped(*own, base=self, in_dims=tuple(in_dims))

    def matrix(self, given: Sequence[Tensor]) -> Tensor | None:
        """The dense matrix, of shape `(*batch, n, n)` with sizes 1 where it is shared; None for a function."""
        return None


class Bound:
    """`v -> A v` for one choice of the given tensors; where the first call replaces nothing, later ones cost nothing."""

    def __init__(self, closure: Closure, given: Sequence[Tensor]) -> None:
        self.closure, self.given = closure, given
        self._alone: Callable[[Tensor], Tensor] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """`A v`."""
        if self._alone is not None:
            return self._alone(v)
        result, replaced = self.closure._replay(v, self.given)
        if not replaced:
            function, params = self.closure.function, self.given[: self.closure.declared]
            self._alone = functools.partial(_with_params, function, params) if params else function
        return result

    def alone(self) -> Callable[[Tensor], Tensor] | None:
        """After the first call the function itself, if nothing has to be replaced; else None."""
        return self._alone


def _with_params(function: Callable[..., Tensor], params: Sequence[Tensor], v: Tensor) -> Tensor:
    return function(v, *params)


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
    columns = v.unsqueeze(-1)
    if torch.compiler.is_compiling() and matrix.ndim == columns.ndim == 3:
        # a plain product inductor takes apart into a sum for each row, which is slower than the library's
        return torch.baddbmm(v.new_zeros(()), matrix.expand(len(v), -1, -1), columns, beta=0).squeeze(-1)
    return (matrix @ columns).squeeze(-1)


def _with_the_batches(v: Tensor) -> Tensor:
    """`v` as a vector of the batch of each `vmap` that is running; itself where it is one already."""
    for interpreter in retrieve_all_functorch_interpreters():
        if interpreter.key() == _functorch.TransformType.Vmap and not _is_of_batch(v, interpreter.level()):
            with temporarily_clear_interpreter_stack():
                zeros = torch.zeros(cast(Any, interpreter).batch_size(), dtype=v.dtype, device=v.device)
            v = v + _functorch._add_batch_dim(zeros, 0, interpreter.level())
    return v


def _is_of_batch(tensor: Tensor, level: int) -> bool:
    while is_wrapped(tensor):
        if _functorch.is_batchedtensor(tensor) and _functorch.maybe_get_level(tensor) == level:
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def _lost(which: str) -> str:
    return (
        f"A depends on a tensor{which} that needs a gradient and that could not be found by recording the operations of A, so "
        "that its gradient would be lost. " + PARAMS_REMEDY
    )
