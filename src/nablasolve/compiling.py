"""`compile=True`: a step of the loop compiled as one, the method's updates and reductions with the products in them.

The first two steps of a cycle run eagerly. They show what the user's functions return, how many products a step costs, and
whether they can stand alone, with nothing put in the place of their tensors; and they part the scalars that are one at the
start. From the third on `torch.compile` has the step, and the functions are arguments of it: so a new closure of the same
code, such as that of the next training step, with new tensors in it, finds what was compiled before. The adjoint is a
vector-Jacobian product inside the compiled step.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import types
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import certify
from .info import CompileWarning
from .methods.base import Correction
from .operands import Counted, Function, Operands, Rescaled

logger = logging.getLogger("nablasolve")

Step = Callable[..., Any]

# The attributes of a `Correction` that hold the user's functions.
FUNCTIONS = ("apply", "adjoint", "preconditioner", "left_preconditioner")


class Compiled:
    """A step `(method, state, *rest) -> result` of the loop, compiled once it has run eagerly twice.

    Of a method whose steps differ, as those of GMRES do, the products alone are compiled. Where that cannot be, a
    `CompileWarning` says why, and the solve goes on eagerly.

    Args:
        step: the step.
        operands: the functions of the problem, which count what is applied.
        rescaled: `A` as the method has it, or None.
    """

    def __init__(self, step: Step, operands: Operands, rescaled: Rescaled | None) -> None:
        self.step, self.rescaled = step, rescaled
        self.counted = [o for o in dict.fromkeys((operands.A, operands.adjoint, operands.M)) if o is not None]
        self.owners: dict[Any, Counted] = {operand: operand for operand in self.counted}
        if rescaled is not None:
            self.owners[rescaled] = operands.A
            if operands.adjoint is not None:
                self.owners[rescaled.adjoint] = operands.adjoint
        self.equation: Correction | None = None  # that of the latest step
        self.compiled: Step | None = None  # how it goes on
        self.warm = False  # whether that has run before
        self.products: list[int] = []  # what a step costs
        self.finished = False  # nothing is left to be compiled, or it cannot be

    def __call__(self, method: Any, state: Any, *rest: Any) -> Any:
        """One step."""
        known, self.equation = state.problem is self.equation, state.problem
        if known and self.compiled is not None:
            try:
                with contextlib.nullcontext() if self.warm else _unwarned():
                    result = self.compiled(method, state, *rest)
            except Exception as error:  # of the compiler, which comes before the step has changed anything
                vars(state.problem).update(self.functions)
                self._refuse(error)
            else:
                self.warm = True
                for operand, number in zip(self.counted, self.products, strict=True):
                    operand.count += number
                return result
        self.compiled = None
        before = [operand.count for operand in self.counted]
        result = self.step(method, state, *rest)
        if known and not (self.finished or method.direct):
            self.products = [operand.count - n for operand, n in zip(self.counted, before, strict=True)]
            self._prepare(method, state.problem)
        return result

    def _prepare(self, method: Any, equation: Correction) -> None:
        """Choose what is compiled for this equation from its next step on."""
        self.functions = {name: f for name in FUNCTIONS if (f := getattr(equation, name)) is not None}
        owners = [self.owners.get(function) for function in self.functions.values()]
        alone = [None if owner is None else owner.alone() for owner in owners]
        if self.rescaled is not None and not self.rescaled.ordinary:
            self._refuse("A is so large or so small that its products are scaled")
        elif equation.rhs.ndim == 0:  # torch 2.13 loses what compiled code writes into an argument without dimensions
            self._refuse("b has no dimensions")
        elif None in alone:
            self._refuse("others are put in the place of the tensors of A, by a torch.func transform or because it changed")
        elif not method.steady:
            self.finished = True
            for owner, function in zip(owners, alone, strict=True):
                if owner is not None and function is not None:
                    owner.function = self._product(function, equation.rhs)
        else:
            self.warm = False
            vars(equation).update(zip(self.functions, map(InMemory, alone), strict=True))
            self.compiled = _compiled(self.step, (method, *map(_code, alone), *_kind(equation.rhs)))

    def _product(self, function: Function, like: Tensor) -> Function:
        """The function compiled, itself from the first failure on."""
        compiled, failed = _compiled(_call, (_code(function), *_kind(like))), False
        warm = False

        def product(v: Tensor) -> Tensor:
            nonlocal failed, warm
            if not failed:
                try:
                    with contextlib.nullcontext() if warm else _unwarned():
                        result: Tensor = compiled(function, v)
                    warm = True
                    return result
                except Exception as error:
                    self._refuse(error)
                    failed = True
            return function(v)

        return product

    def _refuse(self, reason: Exception | str) -> None:
        """Go on eagerly, and say why."""
        self.compiled, self.finished = None, True
        if isinstance(reason, Exception):
            logger.debug("compile=True", exc_info=reason)
            reason = f"{type(reason).__name__}: {str(reason).strip().partition(chr(10))[0]}"
        warnings.warn(f"compile=True: the solve runs eagerly, since {reason}", CompileWarning, stacklevel=certify.outside())


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """While the compiler looks at a closure, torch warns of the `.grad` of each tensor in it that is no leaf."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        yield


def _call(function: Function, v: Tensor) -> Tensor:
    return function(v)


class InMemory:
    """`v -> A v` from memory and into memory, as views tell inductor.

    Else the updates that lead to `v` would be computed anew for each entry that the product reads, and a stencil reads five;
    and the product for each of the sums that its result goes into. (The vector is the method's own. The result may be a slice,
    of which torch 2.13 compiles `as_strided` wrongly; so it is that of a copy, which costs nothing where it is computed here.)
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, v: Tensor) -> Tensor:
        """The product."""
        return _in_memory(self.function(_in_memory(v)).clone(memory_format=torch.contiguous_format))


def _in_memory(v: Tensor) -> Tensor:
    return v.as_strided(v.shape, v.stride())


@functools.lru_cache(maxsize=128)
def _compiled(step: Step, key: Hashable) -> Step:
    """The step compiled, of its own for each key: torch bounds how often the code of *one* function is compiled."""
    code = step.__code__.replace(co_name=f"{step.__name__}_{abs(hash(key))}")
    own = types.FunctionType(code, step.__globals__, code.co_name, step.__defaults__, step.__closure__)
    compiled: Step = torch.compile(own, fullgraph=True)
    return compiled


def _code(function: Any) -> Hashable:
    """What two functions that are compiled alike have in common: their code, and that of the functions in them."""
    if isinstance(function, functools.partial):
        return (_code(function.func), *(_code(a) for a in function.args if callable(a)))
    function = getattr(function, "__func__", function)
    return (function.__code__ if hasattr(function, "__code__") else type(function),)


def _kind(v: Tensor) -> tuple[Hashable, ...]:
    return v.shape, v.dtype, v.device
