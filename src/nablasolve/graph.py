"""Where tensors stand in autograd's graphs: what they carry, and what a result depends on.

Each level of `torch.func` has a graph of its own, and plain autograd has the one beneath them all.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack, temporarily_pop_interpreter_stack
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

_functorch = torch._C._functorch

_MARK = "nablasolve"  # the key of a mark in the metadata of a node, which live and die with it


def is_wrapped(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a level of a `torch.func` transform."""
    return bool(_functorch.is_functorch_wrapped_tensor(tensor))


def is_differentiable(tensor: Tensor) -> bool:
    """Whether the dtype has derivatives."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def level_now() -> int:
    """The level of the innermost transform that is running; 0 outside all."""
    level = _functorch.maybe_current_level()
    return 0 if level is None else int(level)


def level_of(tensor: Tensor) -> int:
    """The level of the transform that the tensor belongs to; not positive for one of none."""
    return int(_functorch.maybe_get_level(tensor))


def unwrapped_to(tensor: Tensor, level: int) -> Tensor:
    """What lies beneath the wrappers above the level."""
    while level_of(tensor) > level:
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def carries_derivative(tensor: Tensor) -> bool:
    """Whether a gradient, a tangent or a batch can come through the tensor."""
    return is_wrapped(tensor) or tracks(tensor)


def tracks(tensor: Tensor) -> bool:
    """Whether the tensor itself has a gradient or a tangent."""
    return tensor.requires_grad or has_tangent(tensor)


def has_tangent(tensor: Any) -> bool:
    """Whether a derivative in forward mode goes through the tensor; only dense layouts hold one."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not is_differentiable(tensor):
        return False
    if _functorch.is_batchedtensor(tensor):  # vmap cannot unpack one
        return False
    with torch._C.DisableTorchFunction():  # no operation of a run that is followed, neither here nor below
        return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def moves(result: Any) -> bool:
    """Whether the result has a tangent at any level of `torch.func`, or of plain dual numbers beneath them."""
    return _at_some_level(result, has_tangent)


def tracks_anywhere(tensor: Tensor) -> bool:
    """Whether the tensor has a gradient or a tangent at any level of `torch.func`, or beneath them."""
    return _at_some_level(tensor, tracks)


def tracks_beneath(tensors: Iterable[Tensor]) -> bool:
    """Whether a tensor of the innermost transform has a gradient or a tangent outside of that transform."""
    level = level_now()
    if level <= 0:
        return False
    with temporarily_pop_interpreter_stack():
        return _at_some_level([unwrapped_to(t, level - 1) for t in tensors], tracks)


def _at_some_level(tree: Any, holds: Callable[[Tensor], bool]) -> bool:
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    with contextlib.ExitStack() as levels:
        levels.enter_context(torch._C.DisableTorchFunction())
        while True:
            if any(holds(leaf) for leaf in leaves):
                return True
            level = level_now()
            if level <= 0:
                return False
            levels.enter_context(temporarily_pop_interpreter_stack())
            leaves = [unwrapped_to(leaf, level - 1) for leaf in leaves]


def same_place(a: Tensor, b: Tensor) -> bool:
    """Whether a derivative with respect to `a` is one with respect to `b`: the same tensor, or the same place in the graph."""
    if a is b:
        return True
    if a.grad_fn is not None or b.grad_fn is not None:
        return a.grad_fn is b.grad_fn and a.output_nr == b.output_nr
    return a.requires_grad and b.requires_grad and _leaf(a) is _leaf(b)


def _leaf(tensor: Tensor) -> Tensor:
    """The leaf whose gradient accumulates what arrives at this one, which may be a copy that a hook on saved tensors made."""
    if is_wrapped(tensor):
        return tensor
    with temporarily_clear_interpreter_stack(), torch._C.DisableTorchFunction(), torch.enable_grad():
        user = tensor.view_as(tensor) if tensor.layout == torch.strided else tensor.clone()
    if user.grad_fn is None:
        return tensor
    leaf: Tensor = getattr(user.grad_fn.next_functions[0][0], "variable", tensor)
    return leaf


class _Mark:
    __slots__ = ("__weakref__",)


class Run:
    """Tells which nodes of autograd's graph one run of `A` has made, and what its result depends on beside them.

    Autograd counts the nodes of each thread, so that those of the run have consecutive numbers. Another thread may have made
    a node with one of these numbers, and `A` may keep one that it has made. Either outlives the run. Nodes are marked when
    they are taken for some of this run: where a mark outlives its result, another run, whose numbers are others, sees better.
    """

    def __init__(self) -> None:
        self.marks: weakref.WeakSet[_Mark] = weakref.WeakSet()
        self.first = torch._C._autograd._get_sequence_nr()
        self.end: int | None = None

    def stop(self) -> None:
        """What is made from here on is not of this run."""
        self.end = torch._C._autograd._get_sequence_nr()

    def has_made(self, tensor: Tensor) -> bool:
        """Whether an operation of the run has made the tensor."""
        return tensor.grad_fn is not None and self._has_made(tensor.grad_fn)

    def _has_made(self, node: Any) -> bool:
        number = node._sequence_nr()
        return bool(number >= self.first and (self.end is None or number < self.end))

    def _mark(self, node: Any) -> None:
        mark = _Mark()
        self.marks.add(mark)
        node.metadata[_MARK] = mark

    def dependencies(
        self, result: Any, known: Sequence[Tensor], made: WeakIdKeyDictionary | None = None, mark: bool = False
    ) -> tuple[set[int], str | None]:
        """Which of the known tensors the result depends on, and whether it depends on another one.

        The search follows each edge of the result's graph until it leaves the run.

        Args:
            result: what the run returned.
            known: tensors, made inside or outside, where the search is to stop.
            made: leaves that are no dependencies, since the run has made them.
            mark: whether to mark the nodes that are taken for some of the run.

        Returns:
            The indices in `known`; and a word on another dependency, its shape where that is known, or None.
        """
        found: set[int] = set()
        lost: str | None = None
        with torch._C.DisableTorchFunction():
            layers = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            known = list(known)
            while layers:
                level = max(level_of(t) for t in layers)
                known = [unwrapped_to(t, level) for t in known]
                which = self._search(layers, known, made, mark, found)
                lost = which if which or lost is None else lost
                layers = [_functorch.get_unwrapped(t) for t in layers if is_wrapped(t)]
        return found, lost

    def _search(
        self, start: Sequence[Tensor], known: Sequence[Tensor], made: WeakIdKeyDictionary | None, mark: bool, found: set[int]
    ) -> str | None:
        """The search in the graph of one level."""
        lost: str | None = None
        places = {(t.grad_fn, t.output_nr): i for i, t in enumerate(known) if t.grad_fn is not None}
        leaves = WeakIdKeyDictionary({t: i for i, t in enumerate(known) if t.requires_grad and t.grad_fn is None})
        stack: list[tuple[Any, int]] = [(t.grad_fn, t.output_nr) for t in start if t.grad_fn is not None]
        visited: set[tuple[Any, int]] = set()
        while stack:
            edge = stack.pop()
            node = edge[0]
            if node is None or edge in visited:
                continue
            visited.add(edge)
            leaf = getattr(node, "variable", None)
            if edge in places:
                found.add(places[edge])
            elif leaf is not None:
                if leaf in leaves:
                    found.add(leaves[leaf])
                elif made is None or leaf not in made:
                    lost = f" of shape {tuple(leaf.shape)}"
            elif not self._has_made(node):
                lost = "" if lost is None else lost
            else:
                if mark:
                    self._mark(node)
                stack.extend(node.next_functions)
        return lost
