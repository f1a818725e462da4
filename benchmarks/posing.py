"""How a workload is posed to a library, whichever it is."""

from __future__ import annotations

import importlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .workloads import Product, Workload

MAXITER = 3_000  # of a library that stalls above the tolerance; the others need some hundreds


@dataclass
class Posed:
    """A workload in the hands of a library. Arrays are the library's own; `native` and `tensor` translate.

    Attributes:
        forward: `(theta, b) -> x`.
        gradient: `(theta, b, cotangent) -> (x, theta's gradient, b's gradient)`; None where the library has none.
        guessed: `gradient` with a guess of x as its last argument, where the library takes one.
        products: how many with A and its transpose the latest call made; None where they cannot be counted.
        iterations: what the library reports of the latest forward solve; None where it reports nothing.
        compiled: `forward` and `gradient` compiled ahead of time for given arrays, for libraries that compile.
    """

    forward: Callable[..., Any]
    gradient: Callable[..., tuple[Any, Any, Any]] | None
    native: Callable[[Tensor], Any] = lambda t: t
    tensor: Callable[[Any], Tensor] = lambda t: t
    guessed: Callable[..., tuple[Any, Any, Any]] | None = None
    products: Callable[[], int | None] = lambda: None
    iterations: Callable[[], int | None] = lambda: None
    compiled: Callable[..., tuple[Callable[..., Any], Callable[..., Any]]] | None = None


@dataclass
class Request:
    """What is asked of a library: the tolerance, or with `rtol=0` a number of iterations; and whether to count products."""

    rtol: float
    maxiter: int = MAXITER
    counts: bool = False
    counted: int = 0

    def count(self, product: Product) -> Product:
        """The product, counted where that was asked for."""
        if not self.counts:
            return product

        def counted(v: Any) -> Any:
            self.counted += 1
            return product(v)

        return counted

    def products(self) -> int | None:
        """How many were counted since the last time; None for none."""
        counted, self.counted = self.counted, 0
        return counted or None


class Adapter(ABC):
    """One library.

    Attributes:
        name: in the table and on the command line.
        module: what has to be importable.
        distribution: what pip calls it, where that is another name.
        own_rule: whether its stopping rule in least squares is another than that of the normal equations, so that its
            tolerance has to be found by trying.
        compiles: whether its first call compiles, so that what that takes is told apart.
        at_most_n: whether it ends after as many iterations as there are unknowns, whatever it is asked for.
        note: what a reader of its figures has to know.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    distribution: ClassVar[str | None] = None
    own_rule: ClassVar[bool] = False
    compiles: ClassVar[bool] = False
    at_most_n: ClassVar[bool] = False
    note: ClassVar[str] = ""

    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""
        try:
            importlib.import_module(self.module)
        except Exception as error:  # an installed library that cannot be imported is a finding, and no error of ours
            return "not installed" if isinstance(error, ModuleNotFoundError) else f"import fails: {type(error).__name__}"
        return None

    def version(self) -> str:
        """Of the distribution."""
        try:
            return importlib.metadata.version(self.distribution or self.module)
        except importlib.metadata.PackageNotFoundError:
            return "?"

    @abstractmethod
    def supports(self, workload: Workload) -> bool:
        """Whether the library has what the workload needs."""

    @abstractmethod
    def pose(self, workload: Workload, request: Request) -> Posed:
        """The workload in its hands."""
