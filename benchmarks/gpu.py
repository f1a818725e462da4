"""The benchmark of a GPU, in one command: `python -m benchmarks.gpu`.

Conjugate gradients on W1, W2 and W4, from 10^4 to 10^8 unknowns: microseconds an iteration of each library, beside what the
bytes of the textbook method take at the bandwidth that a copy and a triad reach on the same device. `--device cpu` runs the
same code on tiny systems, whose times say nothing.

An iteration is the difference of two solves with set numbers of iterations, each timed on the host's clock from one
synchronisation of the whole device to the next: that holds for libraries with streams of their own as well. Every library gets
the same memory through DLPack. What it computes is held to the iterate of the hand-written loop after as many iterations,
and its last residual to that of the loop.
"""

# ruff: noqa: D102  (overriding methods, which the base class documents)
from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import inspect
import json
import math
import os
import statistics
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import scipy.fft
import torch
from torch import Tensor

from . import floor
from .adapters import JaxSciPy, Lineax, lacks_keyword
from .fence import OverTimeError, alarm, forget_compiled
from .measure import ROOT, failure, gist
from .posing import Request
from .report import number, table
from .workloads import Deconvolution, DenseBatch, Diffusion, Product, Workload

# Iterations. After 5 the iterates of all libraries still agree in float32: rounding makes those of CG differ more with each
# step. An iteration is timed by the difference of the others, multiples of what a library may run between two looks of the
# host.
CHECK, FEW, MANY = 5, 32, 96
SAMPLE = 0.05  # seconds: a sample that would be shorter repeats its call
CHUNK = 2**16  # systems of W4 that are made at a time, so that making them needs little memory
SIZES = {"cuda": (10**4, 10**5, 10**6, 10**7, 10**8), "cpu": (10**3,)}
STREAMED = {"cuda": 2**30, "cpu": 2**24}  # bytes of each vector of the copy and the triad: many times the cache of a GPU

# -- the systems, made on the device -------------------------------------------------------------------------------------


def diffusion(unknowns: int, random: torch.Generator) -> tuple[int, Tensor, Tensor]:
    """Size, theta and b of W1."""
    n = round(unknowns**0.5)
    theta, b = (torch.randn(n, n, generator=random, dtype=torch.float64, device=random.device) for _ in range(2))
    return n, theta.mul_(0.5).exp_(), b


def deconvolution(unknowns: int, random: torch.Generator) -> tuple[int, Tensor, Tensor]:
    """Size, theta and b of W2."""
    n = scipy.fft.next_fast_len(round((unknowns / 3) ** 0.5), real=True)  # a side with a large prime would measure the FFT
    support = Deconvolution.support
    t = torch.arange(support, device=random.device, dtype=torch.float32) - support // 2
    psf = torch.exp(-(t[:, None] ** 2 + t**2) / (2 * 1.5**2))
    psf *= torch.exp(0.1 * torch.randn(support, support, generator=random, device=random.device))
    return n, psf / psf.sum(), torch.randn(3, n, n, generator=random, device=random.device)


def dense_batch(unknowns: int, random: torch.Generator) -> tuple[int, Tensor, Tensor]:
    """Size, theta and b of W4."""
    side, options = DenseBatch.side, dict(dtype=torch.float64, device=random.device)
    count = max(1, unknowns // side)
    theta, one = torch.empty(count, side, side, **options), torch.eye(side, **options)
    for part in theta.split(CHUNK):
        G = torch.randn(part.shape, generator=random, **options)
        torch.baddbmm(one, G, G.mT, beta=0.1, alpha=1 / side, out=part)
    return count, theta, torch.randn(count, side, generator=random, **options)


PROBLEMS: Mapping[str, tuple[type[Workload], Callable[[int, torch.Generator], tuple[int, Tensor, Tensor]]]] = {
    "W1": (Diffusion, diffusion),
    "W2": (Deconvolution, deconvolution),
    "W4": (DenseBatch, dense_batch),
}


def problem(key: str, unknowns: int, device: torch.device) -> Workload:
    """A workload with its tensors on the device; the host, where the others are made, would take minutes for the largest."""
    kind, data = PROBLEMS[key]
    workload = kind.__new__(kind)
    workload.size, workload.theta, workload.b = data(unknowns, torch.Generator(device).manual_seed(unknowns))
    workload.precision, workload.cotangent = workload.b.dtype, workload.b
    return workload


def spectrum(workload: Deconvolution) -> Tensor:
    """That of the operator of W2, for libraries that take it as an array."""
    regular = torch.from_numpy(workload._differences()).to(workload.theta)
    return torch.fft.rfft2(workload.theta, s=(workload.size, workload.size)).abs().square() + regular


# -- the loops by hand ---------------------------------------------------------------------------------------------------

Step = Callable[..., Tensor]


def dot(a: Tensor, b: Tensor, batched: bool) -> Tensor:
    """The inner product, on the device; of each system of a batch, in a shape that broadcasts."""
    return torch.linalg.vecdot(a, b)[:, None] if batched else torch.vdot(a.reshape(-1), b.reshape(-1))


def step(A: Product, x: Tensor, r: Tensor, p: Tensor, rho: Tensor, batched: bool) -> Tensor:
    """One iteration of CG in place, whose scalars stay on the device; the next `rho`.

    That is returned and not written to `rho`: what torch.compile of torch 2.13 makes of a write to a 0-dimensional argument
    leaves it as it was, on the CPU, and says nothing.
    """
    q = A(p)
    alpha = rho / dot(p, q, batched)
    x.addcmul_(alpha, p)
    r.addcmul_(alpha, q, value=-1)
    after = dot(r, r, batched)
    torch.addcmul(r, after / rho, p, out=p)
    return after


# -- the libraries -------------------------------------------------------------------------------------------------------

Solve = Callable[[int], Any]  # the iterate after a number of iterations, which the host may return before it is computed


class Library(ABC):
    """One library.

    Attributes:
        name: in the table and on the command line.
        module: what has to be importable.
        of_torch: whether torch allocates its memory, so that its peak is known.
    """

    name: ClassVar[str]
    module: ClassVar[str] = "torch"
    of_torch: ClassVar[bool] = True

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here; None if it can."""
        try:
            importlib.import_module(self.module)
        except Exception as error:
            return "absent" if isinstance(error, ModuleNotFoundError) else f"import fails: {type(error).__name__}"
        return None

    def supports(self, workload: Workload) -> bool:
        """Whether it has what the workload needs."""
        return True

    @abstractmethod
    def solver(self, workload: Workload) -> Solve:
        """The workload in its hands."""

    def tensor(self, x: Any) -> Tensor:
        """What it has computed, for torch."""
        return x


class ByHand(Library):
    """The floor of the other benchmark: each iteration brings its scalars to the host."""

    name = "torch"

    def solver(self, workload: Workload) -> Solve:
        loop = floor.batched_cg if workload.batch_dims else floor.cg
        A = workload.operator(workload.theta)
        return lambda iterations: loop(A, workload.b, 0.0, iterations)


class ByHandOnDevice(Library):
    """No synchronisation with the host."""

    name = "torch-device"

    def step(self) -> Step:
        return step

    def buffers(self, b: Tensor, batched: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where CG begins."""
        return torch.zeros_like(b), b.clone(), b.clone(), dot(b, b, batched)

    def solver(self, workload: Workload) -> Solve:
        A, b, batched, one = workload.operator(workload.theta), workload.b, bool(workload.batch_dims), self.step()

        def solve(iterations: int) -> Tensor:
            x, r, p, rho = self.buffers(b, batched)
            for _ in range(iterations):
                rho = one(A, x, r, p, rho, batched)
            return x

        return solve


class ByHandCompiled(ByHandOnDevice):
    """The whole step compiled as one."""

    name = "torch-compiled"

    def step(self) -> Step:
        return torch.compile(step, dynamic=False)


class ByHandGraph(ByHandOnDevice):
    """One iteration recorded as a CUDA graph and replayed: no more launches than one an iteration."""

    name = "torch-graph"

    def missing(self, device: torch.device) -> str | None:
        return super().missing(device) or (None if device.type == "cuda" else "needs CUDA")

    def solver(self, workload: Workload) -> Solve:
        A, b, batched, one = workload.operator(workload.theta), workload.b, bool(workload.batch_dims), self.step()
        x, r, p, rho = self.buffers(b, batched)

        def begin() -> None:
            x.zero_()
            r.copy_(b)
            p.copy_(b)
            rho.copy_(dot(b, b, batched))

        def advance() -> None:
            rho.copy_(one(A, x, r, p, rho, batched))

        # handles, FFT plans and compiled code have to be there before a capture, and on another stream than the default one
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                advance()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            advance()

        def solve(iterations: int) -> Tensor:
            begin()
            for _ in range(iterations):
                graph.replay()
            return x

        return solve


class ByHandCompiledGraph(ByHandGraph, ByHandCompiled):
    """Both."""

    name = "torch-compiled-graph"


class Nablasolve(Library):
    """This library."""

    name = "nablasolve"
    module = "nablasolve"
    extra: ClassVar[Mapping[str, Any]] = {}

    def missing(self, device: torch.device) -> str | None:
        return super().missing(device) or next(filter(None, map(lacks_keyword, self.extra)), None)

    def solver(self, workload: Workload) -> Solve:
        import nablasolve as ns

        A = workload.matrix(workload.theta)
        A = workload.operator(workload.theta) if A is None else A

        def solve(iterations: int) -> Tensor:
            options: dict[str, Any] = dict(method="cg", rtol=0.0, maxiter=iterations, on_failure="ignore", grad="none")
            return ns.solve_ex(A, workload.b, **options, **self.extra)[0]

        return solve


class NablasolveCheckEvery(Nablasolve):
    """The host looks every 32 iterations."""

    name = "nablasolve-check_every"
    extra: ClassVar[Mapping[str, Any]] = {"check_every": 32}


class NablasolveCompiled(Nablasolve):
    """With `compile=True`."""

    name = "nablasolve-compiled"
    extra: ClassVar[Mapping[str, Any]] = {"compile": True}


class CuPy(Library):
    """`cupyx.scipy.sparse.linalg.cg` with a LinearOperator; its norm of the residual goes to the host each iteration."""

    name = "cupy"
    module = "cupyx.scipy.sparse.linalg"
    of_torch = False

    def missing(self, device: torch.device) -> str | None:
        return super().missing(device) or (None if device.type == "cuda" else "needs CUDA")

    def supports(self, workload: Workload) -> bool:
        return not workload.batch_dims  # it solves one system

    def product(self, workload: Workload, array: Callable[[Tensor], Any], xp: Any) -> Product:
        """The operator as one writes it with `xp`, CuPy or NumPy; of flat vectors."""
        shape = tuple(workload.b.shape)
        if isinstance(workload, Deconvolution):
            otf = array(spectrum(workload))
            return lambda v: xp.fft.irfft2(otf * xp.fft.rfft2(v.reshape(shape)), s=shape[1:]).reshape(-1)
        theta, shift = array(workload.theta), workload.shift
        down, right = (theta[1:] + theta[:-1]) / 2, (theta[:, 1:] + theta[:, :-1]) / 2
        flux_down, flux_right = xp.empty_like(down), xp.empty_like(right)

        def A(v: Any) -> Any:
            v = v.reshape(shape)
            out = shift * v
            xp.subtract(v[1:], v[:-1], out=flux_down)
            xp.multiply(down, flux_down, out=flux_down)
            xp.subtract(v[:, 1:], v[:, :-1], out=flux_right)
            xp.multiply(right, flux_right, out=flux_right)
            out[1:] += flux_down
            out[:-1] -= flux_down
            out[:, 1:] += flux_right
            out[:, :-1] -= flux_right
            return out.reshape(-1)

        return A

    def solver(self, workload: Workload) -> Solve:
        import cupy
        from cupyx.scipy.sparse.linalg import LinearOperator, cg

        b, n = cupy.from_dlpack(workload.b).reshape(-1), workload.b.numel()
        operator = LinearOperator((n, n), matvec=self.product(workload, cupy.from_dlpack, cupy), dtype=b.dtype)
        relative = "rtol" if "rtol" in inspect.signature(cg).parameters else "tol"  # it had SciPy's old name until version 14
        return lambda iterations: cg(operator, b, maxiter=iterations, atol=0.0, **{relative: 0.0})[0]

    def tensor(self, x: Any) -> Tensor:
        return torch.from_dlpack(x)


class Jax(Library):
    """`jax.scipy.sparse.linalg.cg`, compiled."""

    name = "jax.scipy"
    module = "jax"
    of_torch = False
    adapter: ClassVar[JaxSciPy] = JaxSciPy()

    def missing(self, device: torch.device) -> str | None:
        if reason := super().missing(device):
            return reason
        import jax

        backend = jax.default_backend()
        return None if (backend == "gpu") == (device.type == "cuda") else f"sees no {device.type}, only {backend}"

    def solver(self, workload: Workload) -> Solve:
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
        deconvolves = isinstance(workload, Deconvolution)
        held = spectrum(workload) if isinstance(workload, Deconvolution) else workload.theta
        synchronize(workload.b.device)
        # arguments and no constants of the program, which XLA would fold and copy
        arguments = tuple(jax.dlpack.from_dlpack(t.contiguous()) for t in (held, workload.b))

        def product(held: Any, v: Any) -> Any:
            if deconvolves:
                return jnp.fft.irfft2(held * jnp.fft.rfft2(v), s=v.shape[1:])
            return workload.jax_product(held, v)

        compiled: dict[int, Callable[..., Any]] = {}

        def solve(iterations: int) -> Any:
            if iterations not in compiled:
                one = self.adapter.solver(workload, Request(0.0, iterations))

                def solution(held: Any, b: Any) -> Any:
                    return one(lambda v: product(held, v), b)

                compiled[iterations] = jax.jit(jax.vmap(solution) if workload.batch_dims else solution)
            return compiled[iterations](*arguments).block_until_ready()

        return solve

    def tensor(self, x: Any) -> Tensor:
        return torch.from_dlpack(x)


class JaxLineax(Jax):
    """Lineax, compiled. Its CG takes a curvature below 100 n eps |r|^2 for zero: in float32, NaN for a large n."""

    name = "lineax"
    module = "lineax"
    adapter = Lineax()


LIBRARIES: Mapping[str, Library] = {
    library.name: library
    for library in (
        ByHand(), ByHandOnDevice(), ByHandGraph(), ByHandCompiled(), ByHandCompiledGraph(), Nablasolve(),
        NablasolveCheckEvery(), NablasolveCompiled(), CuPy(), Jax(), JaxLineax(),
    )
}  # fmt: skip

# -- the clocks ----------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for all that was asked of the device, by whatever library: its streams belong to one context."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what the pools of the libraries hold, so that the next one finds the memory free."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        if "cupy" in sys.modules:
            sys.modules["cupy"].get_default_memory_pool().free_all_blocks()


def bandwidth(device: torch.device, nbytes: int | None = None) -> dict[str, float]:
    """Bytes a second of a copy and of a triad `a = b + s c`, every operand counted once: the best of ten."""
    n = (nbytes or STREAMED[device.type]) // 8
    a, b, c = (torch.full((n,), value, dtype=torch.float64, device=device) for value in (0.0, 1.0, 2.0))
    kernels: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, lambda: a.copy_(b)),
        "triad": (3, lambda: torch.add(b, c, alpha=3.0, out=a)),
    }
    return {name: vectors * a.nbytes / best(kernel, device) for name, (vectors, kernel) in kernels.items()}


def best(kernel: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """The shortest of some runs of one kernel, in seconds, by the device's own clock where it has one."""
    kernel()
    if device.type != "cuda":
        return min(elapsed(kernel, device) for _ in range(times))
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(times)]
    for start, end in pairs:
        start.record()
        kernel()
        end.record()
    synchronize(device)
    return min(start.elapsed_time(end) for start, end in pairs) / 1e3


def elapsed(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds of a call, from an idle device to an idle device; the mean of some in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


@dataclass
class Row:
    """One library on one system. What was not measured is None; `status` is "ok" or says what is wrong.

    Attributes:
        microseconds: of an iteration, the median of the rounds.
        spread: of the rounds, largest less smallest relative to the median.
        share: what the textbook's bytes take at the bandwidth, relative to that.
        fixed: microseconds of a solve beside its iterations.
        first_call: seconds, compiling and set-up included.
        distance: from the iterate of the hand-written loop after a few iterations, relative.
        vectors: the most memory that was allocated at a time, in vectors, beside the tensors of the system.
    """

    workload: str
    unknowns: int
    library: str
    status: str = "ok"
    microseconds: float | None = None
    spread: float | None = None
    share: float | None = None
    fixed: float | None = None
    first_call: float | None = None
    distance: float | None = None
    vectors: float | None = None


@dataclass
class Results:
    """Everything that was measured."""

    device: str
    versions: dict[str, str]
    bandwidth: dict[str, float]
    rounds: int
    rows: list[Row] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)  # of each system: unknowns, bytes and µs an iteration

    @property
    def best_bandwidth(self) -> float:
        """Of the copy and the triad."""
        return max(self.bandwidth.values())

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1)


@dataclass
class Reference:
    """What the hand-written loop computes: the iterate after a few iterations, and the residual after many."""

    x: Tensor
    residual: float

    @classmethod
    def of(cls, workload: Workload) -> Reference:
        """Of a system."""
        solve = LIBRARIES["torch"].solver(workload)
        return cls(solve(CHECK), residual(workload, solve(MANY)))


def residual(workload: Workload, x: Tensor) -> float:
    """`|b - A x|` relative to `|b|`."""
    b = workload.b
    r = b - workload.operator(workload.theta)(x.reshape(b.shape))
    return float(torch.linalg.vector_norm(r) / torch.linalg.vector_norm(b))


def fill(row: Row, library: Library, workload: Workload, reference: Reference, floor_microseconds: float, rounds: int) -> None:
    """Measure one library on one system."""
    device, vector = workload.b.device, workload.b.nbytes
    if "torch._dynamo" in sys.modules:  # it runs eagerly, and says nothing, after it has compiled a function for eight sizes
        torch.compiler.reset()
    counts = library.of_torch and device.type == "cuda"
    if counts:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    solve = library.solver(workload)
    x = library.tensor(solve(CHECK)).reshape(reference.x.shape)
    synchronize(device)
    row.first_call = time.perf_counter() - start
    if counts:
        row.vectors = (torch.cuda.max_memory_allocated(device) - before) / vector
    row.distance = float(torch.linalg.vector_norm(x - reference.x) / torch.linalg.vector_norm(reference.x))
    eps = torch.finfo(workload.precision).eps
    # it compiles here, if it does so for each number of iterations, and fills its pools
    last = residual(workload, library.tensor(solve(MANY)))
    del x
    if not (row.distance <= eps**0.5 and last <= 10 * reference.residual + 100 * eps):
        row.status = "gives NaN" if math.isnan(row.distance) else "computes something else"
        return
    solve(FEW)
    repeats = {count: max(1, round(SAMPLE / elapsed(lambda c=count: solve(c), device))) for count in (FEW, MANY)}
    slopes, fixed = [], []
    for _ in range(rounds):
        few, many = (elapsed(lambda c=count: solve(c), device, repeats[count]) for count in (FEW, MANY))
        slopes.append(1e6 * (many - few) / (MANY - FEW))
        fixed.append(1e6 * few - FEW * slopes[-1])
    row.microseconds, row.fixed = statistics.median(slopes), statistics.median(fixed)
    row.spread = (max(slopes) - min(slopes)) / row.microseconds
    row.share = floor_microseconds / row.microseconds


def measure(
    keys: Sequence[str],
    sizes: Sequence[int],
    libraries: Sequence[Library],
    device: torch.device,
    rounds: int = 5,
    limit: float | None = None,
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Run everything that was asked for.

    Args:
        keys: of the workloads.
        sizes: unknowns, about.
        libraries: which.
        device: where.
        rounds: samples of each time.
        limit: seconds of a library on a system; None for no limit.
        say: is told what is being done.
        keep: is given what there is after each system, so that an interruption loses only the one that it interrupts.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    missing = {library.name: library.missing(device) for library in libraries}
    results = Results(name, versions(), bandwidth(device), rounds)
    release(device)
    for key in keys:
        for size in sizes:
            say(f"{key} with {size:.0e} unknowns")
            workload = reference = None
            try:
                workload = problem(key, size, device)
                reference = Reference.of(workload)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                say(gist(f"{type(error).__name__}: {error}"))
            if workload is None or reference is None:
                del workload, reference
                release(device)  # not before the error is gone, whose traceback holds what was allocated
                results.rows += [Row(key, size, library.name, "the system does not fit") for library in libraries]
                continue
            moved, unknowns = workload.iteration_bytes(), workload.b.numel()
            least = 1e6 * moved / results.best_bandwidth
            results.facts.append(
                {"workload": key, "title": workload.title, "unknowns": unknowns, "size": workload.size,
                 "dtype": str(workload.precision).removeprefix("torch."), "bytes an iteration": moved, "microseconds": least}
            )  # fmt: skip
            for library in libraries:
                row = Row(key, unknowns, library.name)
                results.rows.append(row)
                if missing[library.name] is not None:
                    row.status = str(missing[library.name])
                elif not library.supports(workload):
                    row.status = "has no such solver"
                else:
                    try:
                        with alarm(limit):
                            fill(row, library, workload, reference, least, rounds)
                    except OverTimeError as error:
                        row.status = str(error)
                    except Exception as error:  # what a library cannot do is a finding
                        row.status = failure(error)
                    release(device)
                say(f"  {row.library}: {number(row.microseconds, '.1f')} µs, {percent(row.share)}, {row.status}")
            del workload, reference
            release(device)
            keep(results)
    return results


def versions() -> dict[str, str]:
    """Of what can be imported here."""
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    found = {"torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    known = packages_distributions()
    for module in ("nablasolve", "cupy", "jax", "lineax"):
        try:
            found[module] = version(known[module][0])
        except (KeyError, PackageNotFoundError):
            if importlib.util.find_spec(module) is not None:
                found[module] = getattr(importlib.import_module(module), "__version__", "?")
    return found


# -- the page ------------------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """A share."""
    return "–" if value is None else f"{100 * value:.0f} %"


def markdown(results: Results) -> str:
    """A table for each workload, a column for each size; below it those of each system."""
    speeds = ", ".join(f"a {name} {speed / 1e9:.0f} GB/s" for name, speed in results.bandwidth.items())
    parts = [
        f"## Benchmark of a GPU\n\n{results.device}: {speeds}. Conjugate gradients, {results.rounds} rounds: medians of the "
        f"microseconds an iteration, and in brackets what the bytes of the textbook method take at the better of these speeds, "
        f"relative to that. Vectors that stay in the cache of the device may be above 100 %. "
        f"{', '.join(f'{name} {version}' for name, version in results.versions.items())}."
    ]
    for key in dict.fromkeys(facts["workload"] for facts in results.facts):
        systems = [facts for facts in results.facts if facts["workload"] == key]
        rows = {(row.library, row.unknowns): row for row in results.rows if row.workload == key}
        names = list(dict.fromkeys(library for library, _ in rows))
        title = f"### {key}: {systems[0]['title']}, {systems[0]['dtype']}"
        head = ["library", *(f"{facts['unknowns']:,}".replace(",", " ") for facts in systems)]
        least = ["bandwidth", *(f"{facts['microseconds']:.1f}" for facts in systems)]
        lines = [[name, *(cell(rows[name, facts["unknowns"]]) for facts in systems)] for name in names]
        parts.append(f"{title}\n\n{table(head, [least, *lines])}")
    for facts in results.facts:
        rows_here = [r for r in results.rows if (r.workload, r.unknowns) == (facts["workload"], facts["unknowns"])]
        title = (
            f"#### {facts['workload']}, {facts['unknowns']} unknowns: {facts['bytes an iteration'] / 1e6:.3g} MB an iteration"
        )
        parts.append(f"{title}\n\n{table(list(COLUMNS), [[show(r) for show in COLUMNS.values()] for r in rows_here])}")
    return "\n\n".join(parts) + "\n"


def cell(row: Row) -> str:
    """A row in a few characters."""
    return row.status if row.microseconds is None else f"{row.microseconds:.1f} ({percent(row.share)})"


COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "library": lambda r: r.library,
    "µs an iteration": lambda r: number(r.microseconds, ".1f"),
    "± half of the range": lambda r: percent(None if r.spread is None else r.spread / 2),
    "share": lambda r: percent(r.share),
    "beside, µs": lambda r: number(r.fixed, ".0f"),
    "first call s": lambda r: number(r.first_call, ".2g"),
    "vectors": lambda r: number(r.vectors, ".1f"),
    "distance": lambda r: number(r.distance, ".0e"),
    "status": lambda r: r.status,
}


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny systems, to check the program")
    parser.add_argument("--workloads", default=",".join(PROBLEMS))
    parser.add_argument("--sizes", help="unknowns, such as 1e4,1e6 (default: 1e4 to 1e8; with --device cpu 1e3)")
    parser.add_argument("--libraries", default=",".join(LIBRARIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of a library on a system, then it is over; 0: none")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="the folder to write to")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the page, and write it with the JSON."""
    chosen = options(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured (--device cpu checks the program on tiny systems)", file=sys.stderr)
        return 1
    warnings.simplefilter("ignore")  # what a library warns of is seen in its distance
    forget_compiled()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # JAX would take three quarters of the memory
    if chosen.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    if importlib.util.find_spec("nablasolve") is None:  # a clone that is not installed
        sys.path.insert(0, str(ROOT / "src"))
    keys, names = chosen.workloads.split(","), chosen.libraries.split(",")
    for what, asked, known in (("workload", keys, PROBLEMS), ("library", names, LIBRARIES)):
        for name in asked:
            if name not in known:
                print(f"unknown {what} {name!r}: known are {', '.join(known)}", file=sys.stderr)
                return 2
    sizes = SIZES[chosen.device] if chosen.sizes is None else [round(float(size)) for size in chosen.sizes.split(",")]
    chosen.out.mkdir(parents=True, exist_ok=True)

    def keep(results: Results) -> None:
        (chosen.out / "results.json").write_text(results.to_json(), encoding="utf-8")
        (chosen.out / "results.md").write_text(markdown(results), encoding="utf-8")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if chosen.device == "cpu":
        torch.set_num_threads(1)
    device = torch.device(chosen.device, torch.cuda.current_device()) if chosen.device == "cuda" else torch.device("cpu")
    libraries = [LIBRARIES[name] for name in names]
    with torch.no_grad():
        results = measure(keys, sizes, libraries, device, chosen.rounds, chosen.limit, say, keep)
    keep(results)
    print(markdown(results))
    print(f"{chosen.out}/results.md, results.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
