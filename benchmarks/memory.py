"""A process that measures its own peak: `python -m benchmarks.memory KEY SIZE LIBRARY ITERATIONS UNROLLED` prints bytes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import ADAPTERS
from .fence import ceiling
from .posing import Posed, Request
from .workloads import WORKLOADS, Workload


def resident(field: str) -> float:
    """A figure of this process in bytes: `VmRSS`, what it holds now, or `VmHWM`, the most it has held."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss survives exec and so contains the peak of the parent process; these figures do not
        return next(float(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> float:
    """Give back what is free, let the peak begin anew where the system can do that, and return what it begins at."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return resident("VmHWM")
    return resident("VmRSS")


def unrolled(workload: Workload, library: str, iterations: int) -> Any:
    """Forward with backward by autograd through the loop."""
    theta, b = workload.theta.detach().requires_grad_(), workload.b.detach().requires_grad_()
    if library == "floor":
        from .floor import unrolled_cg

        x: Tensor = unrolled_cg(workload.operator(theta), b, iterations)
    else:
        import nablasolve as ns

        options: dict[str, Any] = dict(method="cg", rtol=0.0, maxiter=iterations, grad="unroll", on_failure="ignore")
        x, _ = ns.solve_ex(workload.operator(theta), b, **options)
    return torch.autograd.grad(x, (theta, b), workload.cotangent)


def tolerance(workload: Workload, iterations: int) -> float:
    """The relative residual after a number of iterations of the floor: a library that is asked for it takes about as many.

    A limit on the iterations would make the solve fail, and what a library does then is another matter.
    """
    x = ADAPTERS["floor"].pose(workload, Request(0.0, iterations)).forward(workload.theta, workload.b)
    return workload.true_residual(x)


def implicit(posed: Posed, workload: Workload) -> tuple[Any, ...]:
    """What the measured call is called with."""
    return tuple(posed.native(t) for t in (workload.theta, workload.b, workload.cotangent))


def main(key: str, size: int, library: str, iterations: int, unroll: bool) -> float:
    """The peak of forward with backward, beside the system and what the library loads and compiles."""
    torch.set_num_threads(1)
    kind, adapter = WORKLOADS[key], ADAPTERS[library]
    workload, tiny = kind(size), kind(kind.sizes["tiny"][0])
    request = Request(tolerance(workload, iterations) if iterations and not unroll else workload.rtol)
    if unroll:
        unrolled(tiny, library, min(iterations, 3))
        before = forget_peak()
        kept = unrolled(workload, library, iterations)
    else:
        posed = adapter.pose(workload, request)
        arrays = implicit(posed, workload)
        if posed.compiled is not None:
            gradient = posed.compiled(*arrays)[1]
        elif adapter.compiles:
            gradient = posed.gradient
            gradient(*arrays)  # compiles for these sizes; what that takes is given back or counted as held before
        else:
            gradient = posed.gradient
            # loads and sets up what the first use of an operation does
            small = adapter.pose(tiny, Request(0.1 if iterations else tiny.rtol))
            small.gradient(*implicit(small, tiny))
        before = forget_peak()
        kept = gradient(*arrays)
        if posed.compiled is not None:
            kept = [leaf.block_until_ready() for leaf in kept]
    del kept
    return resident("VmHWM") - before


if __name__ == "__main__":
    with ceiling():
        print(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5] == "1"))
