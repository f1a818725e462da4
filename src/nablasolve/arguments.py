"""Arguments at the front door: what was expected, what came, and the nearest known name."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor

# what the same thing is called in different fields
SYNONYMS = (
    {"circular", "periodic", "wrap"},
    {"zero", "dirichlet", "constant"},
    {"symmetric", "neumann"},
    {"replicate", "nearest"},
)

F = TypeVar("F", bound=Callable[..., Any])


def names_options(function: F) -> F:
    """Make an unknown keyword of a function, or of a class, a TypeError that names the nearest known one."""
    if isinstance(function, type):
        function.__init__ = names_options(function.__init__)  # type: ignore[misc]
        return function
    parameters = inspect.signature(function).parameters
    known = [p.name for p in parameters.values() if p.kind == p.KEYWORD_ONLY or p.default is not p.empty]
    name_of_it = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in parameters:
                raise TypeError(f"{name_of_it}: unknown option {name!r}{nearest(name, known)}")
        return function(*args, **kwargs)

    return cast(F, checked)


def nearest(name: str, known: Sequence[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or the list of all."""
    synonym = next((k for group in SYNONYMS if name in group for k in known if k in group), None)
    if synonym is not None:
        return f"; did you mean {synonym!r}?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def check_tolerance(name: str, value: object) -> float:
    """A tolerance as a float.

    Raises:
        TypeError: if it is not a real number.
        ValueError: if it is negative or not finite.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a non-negative number, got {type(value).__name__}")
    if not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name}: expected a non-negative number, got {value!r}")
    return float(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """One of a few strings.

    Raises:
        ValueError: naming the nearest choice.
    """
    if not isinstance(value, str) or value not in choices:
        hint = nearest(value, choices) if isinstance(value, str) else ""
        hint = "" if hint.startswith("; known") else hint  # they are all named already
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}{hint}")
    return value


def check_maxiter(name: str, value: object, default: int) -> int:
    """An iteration limit; `default` for None.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is negative.
    """
    if value is None:
        return default
    number = check_integer(name, value)
    if number < 0:
        raise ValueError(f"{name}: expected at least 0, got {number}")
    return number


def check_integer(name: str, value: object) -> int:
    """An integer of any library as an int.

    Raises:
        TypeError: if it is none.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None


def check_result(name: str, v: Tensor, y: Any, like: Tensor | None = None) -> None:
    """Raise if `y`, which the user's function `name` returned for the vector `v`, is not a vector like it, or like `like`.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if its shape, dtype or device differ.
    """
    due, of = (v, "v") if like is None or like.shape == v.shape else (like, "b")
    if not isinstance(y, Tensor):
        raise TypeError(f"{name}: expected {name}(v) to be a Tensor like {of}, got {type(y).__name__}")
    if y.shape != due.shape:
        raise ValueError(f"{name}: expected {name}(v) to have the shape {tuple(due.shape)} of {of}, got {tuple(y.shape)}")
    if y.dtype != due.dtype:
        remedy = ""
        if y.is_complex() and not due.is_complex():
            remedy = f"; if the operator is complex, give b as {y.dtype}"
        raise ValueError(f"{name}: expected {name}(v) to have the dtype {due.dtype} of {of}, got {y.dtype}{remedy}")
    if y.device != due.device:
        raise ValueError(f"{name}: expected {name}(v) to be on the device {due.device} of {of}, got {y.device}")
