"""`LinearSolve`: `solve` as an `nn.Module`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .arguments import nearest
from .choice import check_method_name
from .info import SolveInfo
from .solve import solve, solve_with_record

_OPTIONS = tuple(name for name, p in inspect.signature(solve).parameters.items() if p.kind == p.KEYWORD_ONLY)


class LinearSolve(nn.Module):
    """A layer that solves `A x = b`: `layer = LinearSolve(method="cg")`, then `x = layer(A, b)`.

    Args:
        options: the keyword arguments of `solve`, kept for every call. A preconditioner `M` that is an `nn.Module` becomes
            a submodule.

    Attributes:
        info: the `SolveInfo` of the latest call; None before the first.

    Raises:
        TypeError: for an unknown option.
        ValueError: for an unknown method.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.M = _known(options).pop("M", None)
        if isinstance(options.get("method"), str):
            check_method_name("method", options["method"])
        self.options = options
        self.info: SolveInfo | None = None

    def forward(self, A: Any, b: Any, **options: Any) -> Any:
        """`A^{-1} b`; options given here, such as `x0`, hold for this call.

        Raises:
            ConvergenceError: if a system does not reach its tolerance, under `on_failure="raise"`.
            TypeError, ValueError: as `solve`.
        """
        merged = {"M": self.M, **self.options, **_known(options)}
        on_failure = merged.pop("on_failure", "raise")
        x, self.info = solve_with_record(A, b, on_failure=on_failure, on_adjoint_failure=on_failure, **merged)
        return x

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _known(options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"LinearSolve: unknown option {name!r}{nearest(name, _OPTIONS)}")
    return options
