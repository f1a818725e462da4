"""What enters a run of `A`: a mode that is told of every tensor of every operation, and may put another in its place.

A tensor is *made* inside by an operation of the run, or comes from *outside*. Runs nest where `A` solves a system itself:
the inner run then sees what the outer one has put in place, and a whole inner solve is one operation to the outer run.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils.hooks import BackwardHook
from torch.utils.weak import WeakIdKeyDictionary

from .graph import carries_derivative, is_wrapped, level_now, level_of, same_place, tracks

_functorch = torch._C._functorch

F = TypeVar("F", bound=Callable[..., Any])

PARAMS_REMEDY = "Pass the tensor through params=: solve(A, b, params=(tensor,)), with A called as A(v, tensor)."

HIDDEN_BY_TRANSFORM = (
    "A hands a captured tensor to a torch.func transform of its own, and the tensor would have to be replaced there because "
    "another transform runs outside. " + PARAMS_REMEDY
)

_PLAIN = (int, float, complex, str, type(None), torch.dtype, torch.device)
_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class Trace(TorchFunctionMode):
    """Follows one run of `A`: `enter` is told of every tensor that comes from outside, and says what takes its place."""

    def __init__(self, inside: Sequence[Tensor]) -> None:
        super().__init__()
        self.level = level_now()
        self.parent = running()
        self.asleep = False
        self.made = WeakIdKeyDictionary()
        self.stand_in = WeakIdKeyDictionary()  # of each outside tensor: itself, or what replaces it
        # the memory of what is made inside, and of what comes from outside, views of it included
        self.inside_memory: set[int] = set()
        self.outside_memory: set[int] = set()
        for tensor in inside:
            self.make(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.asleep:
            return func(*args, **kwargs)
        if func == _REQUIRES_GRAD and _asked_by_a_module_hook(sys._getframe(1)):
            return False
        with torch._C.DisableTorchFunction():  # what is asked of the tensors here is no operation of an outer run
            args, kwargs = self._replaced(args), self._replaced(kwargs)
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self.make_all(result)
        return result

    def _replaced(self, tree: Any) -> Any:
        """The tree with every tensor replaced; what most arguments are is told apart here, since pytree is slow."""
        if isinstance(tree, Tensor):
            return self.replace(tree)
        if type(tree) in (tuple, list):
            return type(tree)(map(self._replaced, tree))
        if type(tree) is dict:
            return {key: self._replaced(value) for key, value in tree.items()}
        return tree if isinstance(tree, _PLAIN) else pytree.tree_map_only(Tensor, self.replace, tree)

    def make_all(self, tree: Any) -> None:
        """Take note of the tensors of a tree, which are made inside."""
        for leaf in (tree,) if isinstance(tree, Tensor) else pytree.tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self.make(leaf)

    def make(self, tensor: Tensor) -> None:
        """Take note of a tensor that is made inside."""
        if tensor not in self.stand_in:
            self.made[tensor] = True
            self.inside_memory.add(_memory(tensor))

    def replace(self, tensor: Tensor) -> Tensor:
        """What takes the place of the tensor in this run."""
        if tensor in self.made:
            return tensor
        if tensor not in self.stand_in:
            outer = tensor if self.parent is None else self.parent.replace(tensor)
            replacement = self._enter(tensor) if outer is tensor else self.replace(outer)
            self.stand_in[tensor] = replacement
            if replacement is not tensor and replacement not in self.made:
                self.stand_in.setdefault(replacement, replacement)
        result: Tensor = self.stand_in[tensor]
        return result

    def _enter(self, tensor: Tensor) -> Tensor:
        base = tensor
        while level_of(base) > self.level and not self.known(base):
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


class Recording(Trace):
    """Notes the outside tensors in the order in which they enter, with their in-place versions."""

    def __init__(self, inside: Sequence[Tensor]) -> None:
        super().__init__(inside)
        self.outside: list[tuple[Tensor, int]] = []

    def enter(self, tensor: Tensor) -> Tensor:
        """Note the tensor and leave it in its place."""
        self.outside.append((tensor, version(tensor)))
        return tensor

    def enter_beneath(self, base: Tensor) -> None:
        """Note the tensor; raise where it would have to be replaced later."""
        core = base
        while _functorch.is_gradtrackingtensor(core) and not tracks(core):
            core = _functorch.get_unwrapped(core)  # a constant, lifted to the level of the transform outside
        if self.level > 0 and carries_derivative(core):
            raise RuntimeError(HIDDEN_BY_TRANSFORM)
        self.enter(base)

    def names(self) -> list[tuple[Tensor, Tensor]]:
        """Tensors that an outer run has replaced, by which `A` will call the recorded ones in other runs, and those."""
        if self.parent is None:
            return []
        return [(name, tensor) for name, tensor in self.stand_in.items() if name is not tensor]


class Replay(Trace):
    """Puts the given tensors in the places of the recorded ones.

    A tensor that recording has not met takes the place of the one in its position, and one that it has met stands for itself:
    `A` may read its constants in another order where it runs outside autograd. But where new tensors and met ones enter in a
    sequence that is otherwise the recorded one, variables were bound to other tensors, to a window of them that has moved on,
    say; then the run is `rebound`, and is to be repeated by positions alone.

    Args:
        inside: tensors that count as made inside.
        order: the recorded outside tensors in the order in which they entered.
        cached: what recording has made and `A` has kept.
        given: what to put in the place of a tensor.
        by_position: whether a tensor that recording has met is told by its position as well.
    """

    def __init__(
        self,
        inside: Sequence[Tensor],
        order: Sequence[Tensor | None],
        cached: WeakIdKeyDictionary,
        given: WeakIdKeyDictionary,
        by_position: bool = False,
    ) -> None:
        super().__init__(inside)
        self.order, self.cached, self.given, self.by_position = order, cached, given, by_position
        self.met = WeakIdKeyDictionary({t: True for t in order if t is not None})
        self.count = 0
        self.replaced = False
        self.new, self.moved, self.alike = False, False, True

    @property
    def rebound(self) -> bool:
        """Whether the variables of `A` were bound to other tensors, some of them such as recording has met elsewhere."""
        return not self.by_position and self.new and self.moved and self.alike and self.count == len(self.order)

    def known(self, tensor: Tensor) -> bool:
        """Whether there is one to take its place."""
        return tensor in self.given

    def enter(self, tensor: Tensor) -> Tensor:
        """The given tensor for a recorded one; for one that recording has not met, what is meant by the one in its position."""
        recorded: Tensor | None = tensor
        met, there = tensor in self.met, self.order[self.count] if self.count < len(self.order) else None
        alike = there is not None and (there.shape, there.dtype) == (tensor.shape, tensor.dtype)
        if tensor not in self.given and tensor not in self.cached:
            if alike and (self.by_position or not met):
                recorded = there
            self.new |= not met
            self.moved |= met and there is not tensor
        self.alike &= alike or there is None
        self.count += 1
        replacement: Tensor = self.given.get(recorded, recorded)
        self.replaced |= not same_place(replacement, tensor)
        return replacement if self.replaced else tensor

    def enter_beneath(self, base: Tensor) -> None:
        """Raise where the tensor would have to be replaced; outside transforms, the graph goes on into it."""
        self.count += 1
        if self.level > 0 and base in self.given and not same_place(self.given[base], base):
            raise RuntimeError(HIDDEN_BY_TRANSFORM)


def running() -> Trace | None:
    """The trace of the innermost run that is followed."""
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, Trace):
            return None if mode.asleep else mode
    return None


def as_one_operation(function: F) -> F:
    """Let a run that is followed see a call as one operation, and nothing of what goes on inside.

    The results of the function depend on the tensors among its arguments and on no others.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        trace = running()
        if trace is None:
            return function(*args)
        with torch._C.DisableTorchFunction():
            args = pytree.tree_map_only(Tensor, trace.replace, args)
        with _asleep(trace):
            result = function(*args)
        run: Trace | None = trace
        with torch._C.DisableTorchFunction():
            while run is not None:
                run.make_all(result)
                run = run.parent
        return result

    return cast(F, call)


@contextlib.contextmanager
def _asleep(trace: Trace) -> Iterator[None]:
    trace.asleep = True
    try:
        if trace.parent is None:
            yield
        else:
            with _asleep(trace.parent):
                yield
    finally:
        trace.asleep = False


def _asked_by_a_module_hook(frame: Any) -> bool:
    """Whether `requires_grad` is asked in order to hook a user's `register_full_backward_hook` into the run.

    It is told no: the backward passes through a run are steps of our algebra, and none of the passes that a hook is for. A hook
    that returns a gradient of its own would change the adjoint.
    """
    while frame is not None and frame.f_code.co_name == "__torch_function__":  # of a mode on top of this one
        frame = frame.f_back
    return frame is not None and frame.f_code is BackwardHook._apply_on_tensors.__code__


def version(tensor: Tensor) -> int:
    """The in-place version; constant for tensors that keep none."""
    return 0 if tensor.is_inference() else int(tensor._version)


def _memory(tensor: Tensor) -> int:
    """The address of what lies beneath all wrappers; 0 where there is none."""
    plain = tensor
    while is_wrapped(plain):
        plain = _functorch.get_unwrapped(plain)
    if plain.layout != torch.strided or plain.device.type == "meta" or _functorch.is_legacy_batchedtensor(plain):
        return 0
    return plain.untyped_storage().data_ptr()
