"""The clocks: interleaved rounds over all libraries in one process, and what their answers are held to."""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import ADAPTERS
from .posing import Adapter, Posed, Request
from .workloads import WORKLOADS, DenseSmall, DriftingDiffusion, StiffDiffusion, Workload

ROOT = Path(__file__).parents[1]
SHORTEST = 0.1  # seconds: a sample that would be shorter repeats its call
LONG = 10.0  # seconds: a call that takes longer is not compiling only
SLACK = 1.05  # a true residual above this times the tolerance is a miss; recursive residuals differ from true ones by rounding
GRADIENT_SLACK = 100.0  # the error of a gradient is that of two solutions, each magnified by the conditioning
REFERENCE_RTOL = 1e-12
NO_SOLVER, MISSES = "has no such solver", "misses the tolerance"
OVERHEAD_ITERATIONS = (100, 500)
MEMORY_ITERATIONS: Mapping[str, tuple[int, ...]] = {"tiny": (5, 10), "small": (50, 200, 800), "full": (50, 100, 200, 400, 800)}


@dataclass
class Sample:
    """Seconds of one call, one value a round: on the wall clock and of the processor."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the wall clock."""
        return statistics.median(self.wall)

    @property
    def spread(self) -> float:
        """Of the wall clock, largest less smallest relative to the median."""
        return (max(self.wall) - min(self.wall)) / self.median

    def ratio(self, other: Sample) -> float:
        """The median over the rounds of the ratio to another in the same round, on the wall clock."""
        return statistics.median(a / b for a, b in zip(self.wall, other.wall, strict=True))

    def cpu_ratio(self, other: Sample) -> float:
        """The same of the processor's seconds, which a busy machine disturbs less."""
        return statistics.median(a / b for a, b in zip(self.cpu, other.cpu, strict=True))


@dataclass
class Row:
    """One library on one workload. What was not measured is None; `status` is "ok" or says what is wrong."""

    workload: str
    size: int
    library: str
    version: str = ""
    status: str = "ok"
    rtol: float | None = None
    residual: float | None = None
    gradient_error: float | None = None
    rhs_gradient_error: float | None = None
    iterations: int | None = None
    products: int | None = None
    first_call: float | None = None
    forward: Sample | None = None
    gradient: Sample | None = None
    forward_ratio: float | None = None
    gradient_ratio: float | None = None
    forward_cpu_ratio: float | None = None
    gradient_cpu_ratio: float | None = None
    memory: float | None = None
    microseconds: float | None = None
    fixed_microseconds: float | None = None
    fixed_gradient_microseconds: float | None = None
    memory_by_iterations: dict[str, float] | None = None


@dataclass
class Machine:
    """Where it was measured."""

    processor: str
    threads: int
    bandwidth: float
    versions: dict[str, str]


@dataclass
class Results:
    """Everything that was measured."""

    machine: Machine
    rounds: int
    scale: str
    rows: list[Row]
    facts: list[dict[str, Any]]  # of each workload: unknowns, bytes an iteration, the check of the reference

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Results:
        """What `to_json` has written."""
        raw = json.loads(text)
        rows = []
        for row in raw["rows"]:
            samples = {k: Sample(**row[k]) for k in ("forward", "gradient") if row[k] is not None}
            rows.append(Row(**{**row, **samples}))
        return cls(Machine(**raw["machine"]), raw["rounds"], raw["scale"], rows, raw["facts"])


# -- the machine -------------------------------------------------------------------------------------------------------------


def bandwidth(mebibytes: int = 256) -> float:
    """Bytes a second of a large copy, read and written both counted: the best of five."""
    source = torch.ones(mebibytes * 2**20 // 8, dtype=torch.float64)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def machine(adapters: Sequence[Adapter], copied: int = 256) -> Machine:
    """What can be found out about this one."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    versions = {a.name: a.version() for a in adapters if a.missing() is None}
    return Machine((names or [platform.processor()])[0], torch.get_num_threads(), bandwidth(copied), versions)


# -- right or wrong ----------------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """The solution and gradients of a workload in float64, and how far finite differences are from them."""

    gradient: Tensor
    rhs_gradient: Tensor
    finite_differences: float

    @classmethod
    def of(cls, workload: Workload) -> Reference:
        """By the floor, at a tolerance far below that of the workload."""
        w = type(workload)(workload.size, torch.float64)
        # from the same rounded data
        w.theta, w.b, w.cotangent = (t.double() for t in (workload.theta, workload.b, workload.cotangent))
        posed = ADAPTERS["floor"].pose(w, Request(REFERENCE_RTOL))
        assert posed.gradient is not None
        _, gradient, rhs_gradient = posed.gradient(w.theta, w.b, w.cotangent)
        move, h = w.direction(), 1e-5
        plus, minus = ((posed.forward(w.theta + sign * h * move, w.b) * w.cotangent).sum().item() for sign in (1, -1))
        change = (gradient * move).sum().item()
        scale = gradient.norm().item() * move.norm().item()
        return cls(gradient, rhs_gradient, abs((plus - minus) / (2 * h) - change) / max(abs(change), 1e-3 * scale))


def distance(a: Tensor, reference: Tensor) -> float:
    """Relative, in the 2-norm."""
    return ((a.double().reshape(reference.shape) - reference).norm() / reference.norm()).item()


def natives(posed: Posed, workload: Workload) -> tuple[Any, Any, Any]:
    """The tensors of a workload as a library's arrays."""
    return posed.native(workload.theta), posed.native(workload.b), posed.native(workload.cotangent)


def tolerance(adapter: Adapter, workload: Workload) -> float:
    """The tolerance at which a library reaches the true residual that is asked of all.

    Only a stopping rule of its own, for least squares, has to be tried: what is reached is in proportion to the tolerance.
    """
    rtol = workload.rtol
    if not (workload.least_squares and adapter.own_rule):
        return rtol
    for _ in range(6):
        posed = adapter.pose(workload, Request(rtol))
        x = posed.tensor(posed.forward(*natives(posed, workload)[:2])).reshape(workload.cotangent.shape)
        reached = workload.true_residual(x) / workload.rtol
        if 0.3 <= reached <= 1:
            break
        rtol *= 0.7 / reached
    return rtol


def verify(row: Row, adapter: Adapter, workload: Workload, reference: Reference) -> Posed:
    """Fill a row with what the library's answers are worth, and return the workload in its hands, called once."""
    row.rtol = tolerance(adapter, workload)
    counting = adapter.pose(workload, Request(row.rtol, counts=True))
    theta, b, c = natives(counting, workload)
    start = time.perf_counter()
    if counting.gradient is None:
        x = counting.forward(theta, b)
    else:
        x, gradient, rhs_gradient = counting.gradient(theta, b, c)
        row.gradient_error = distance(counting.tensor(gradient), reference.gradient)
        if rhs_gradient is not None:
            row.rhs_gradient_error = distance(counting.tensor(rhs_gradient), reference.rhs_gradient)
    row.first_call = time.perf_counter() - start
    row.residual = workload.true_residual(counting.tensor(x).reshape(workload.cotangent.shape))
    row.iterations, row.products = counting.iterations(), counting.products()
    if not row.residual <= SLACK * workload.rtol:
        row.status = MISSES
    elif row.gradient_error is not None and not row.gradient_error <= GRADIENT_SLACK * workload.rtol:
        row.status = "wrong gradient"
    return adapter.pose(workload, Request(row.rtol))


# -- time --------------------------------------------------------------------------------------------------------------------


def timed(sample: Sample, call: Callable[[], object], number: int) -> None:
    """One sample: the mean of `number` calls in a row."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(number):
        call()
    sample.wall.append((time.perf_counter() - wall) / number)
    sample.cpu.append((time.process_time() - cpu) / number)


def repeats(call: Callable[[], object]) -> int:
    """How often to repeat a call so that a sample is long enough; it has been compiled when this returns."""
    for _ in range(2):  # the first call may compile
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        if took > LONG:
            break
    return max(1, round(SHORTEST / took))


def interleave(tasks: Sequence[tuple[Sample, Callable[[], object], int]], rounds: int) -> None:
    """Sample every task once a round, each round from another one on."""
    for k in range(rounds):
        first = k % max(1, len(tasks))
        gc.collect()
        gc.disable()  # what one library leaves behind is not collected in the time of another
        try:
            for sample, call, number in (*tasks[first:], *tasks[:first]):
                timed(sample, call, number)
        finally:
            gc.enable()


def ratios(rows: Sequence[Row]) -> None:
    """Fill in the ratios to the floor."""
    base = next((row for row in rows if row.library == "floor"), None)
    if base is None:
        return
    for row in rows:
        if row.forward is not None and base.forward is not None:
            row.forward_ratio, row.forward_cpu_ratio = row.forward.ratio(base.forward), row.forward.cpu_ratio(base.forward)
        if row.gradient is not None and base.gradient is not None:
            row.gradient_ratio, row.gradient_cpu_ratio = (
                row.gradient.ratio(base.gradient),
                row.gradient.cpu_ratio(base.gradient),
            )


def started(
    workload: Workload, adapters: Sequence[Adapter], differentiates: bool = False
) -> tuple[list[Row], list[tuple[Row, Adapter]]]:
    """A row for each library, and those that can run, with a gradient where that is needed."""
    rows, able = [], []
    for adapter in adapters:
        row = Row(workload.key, workload.size, adapter.name)
        missing = adapter.missing()
        if missing is not None:
            row.status = missing
        elif not adapter.supports(workload):
            row.status = NO_SOLVER
        elif differentiates and adapter.pose(workload, Request(workload.rtol)).gradient is None:
            row.status = "has no gradient"
        else:
            row.version = adapter.version()
            able.append((row, adapter))
        rows.append(row)
    return rows, able


def gist(text: str) -> str:
    """The line of an error message that says most: the last that names an error, of a traceback in it as well."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]*Error: ", line)), lines[0])[:110]


def failure(error: Exception) -> str:
    """An exception in a few words."""
    return f"fails: {gist(f'{type(error).__name__}: {error}')}"


def solves(workload: Workload, adapters: Sequence[Adapter], rounds: int, facts: dict[str, Any]) -> list[Row]:
    """Forward, and forward with backward, of W1 to W6."""
    reference = Reference.of(workload)
    facts["finite differences"] = reference.finite_differences
    rows, able = started(workload, adapters)
    tasks: list[tuple[Sample, Callable[[], object], int]] = []
    for row, adapter in able:
        try:
            posed = verify(row, adapter, workload, reference)
            if row.status != "ok":  # the time of a wrong answer says nothing
                continue
            theta, b, c = natives(posed, workload)
            row.forward = add_task(tasks, lambda f=posed.forward, a=(theta, b): f(*a))
            if posed.gradient is not None:
                row.gradient = add_task(tasks, lambda f=posed.gradient, a=(theta, b, c): f(*a))
        except Exception as error:  # what a library cannot do is a finding
            row.status, row.forward, row.gradient = failure(error), None, None
    interleave(tasks, rounds)
    ratios(rows)
    return rows


def add_task(tasks: list[tuple[Sample, Callable[[], object], int]], call: Callable[[], object]) -> Sample:
    """Run a call once, so that it is compiled, and queue it for the rounds."""
    sample = Sample()
    tasks.append((sample, call, repeats(call)))
    return sample


def overhead(workload: DenseSmall, adapters: Sequence[Adapter], rounds: int, facts: dict[str, Any]) -> list[Row]:
    """Microseconds an iteration, and what a solve costs beside its iterations (W8).

    An iteration is the difference of two runs with set numbers of iterations. What stands beside them is the time for the
    identity, which takes one iteration, less that one.
    """
    few, many = OVERHEAD_ITERATIONS
    easy = type(workload)(workload.size)
    easy.theta = torch.eye(workload.size, dtype=workload.precision)
    rows, able = started(workload, adapters)
    tasks: list[tuple[Sample, Callable[[], object], int]] = []
    groups = []
    for row, adapter in able:
        try:
            samples: list[Sample | None] = []
            for iterations in (few, many):
                posed = adapter.pose(workload, Request(0.0, iterations))
                theta, b, c = natives(posed, workload)
                samples.append(add_task(tasks, lambda f=posed.forward, a=(theta, b): f(*a)))
            posed = adapter.pose(easy, Request(easy.rtol))
            theta, b, c = natives(posed, easy)
            samples.append(add_task(tasks, lambda f=posed.forward, a=(theta, b): f(*a)))
            gradient = posed.gradient
            samples.append(None if gradient is None else add_task(tasks, lambda f=gradient, a=(theta, b, c): f(*a)))
            groups.append((row, *samples))
        except Exception as error:
            row.status = failure(error)
    interleave(tasks, rounds)
    for row, short, long, one, with_gradient in groups:
        slope = statistics.median((b - a) / (many - few) for a, b in zip(short.wall, long.wall, strict=True))
        row.microseconds, row.fixed_microseconds = 1e6 * slope, 1e6 * (one.median - slope)
        if with_gradient is not None:
            row.fixed_gradient_microseconds = 1e6 * (with_gradient.median - 2 * slope)
    base = next((row.microseconds for row in rows if row.library == "floor"), None)
    for row in rows:
        if base is not None and row.microseconds is not None:
            row.forward_ratio = row.microseconds / base
    return rows


def training(workload: DriftingDiffusion, adapters: Sequence[Adapter], rounds: int, facts: dict[str, Any]) -> list[Row]:
    """A loop of solves with gradients, each from the solution of the last where the library takes a guess (W9)."""
    drift = workload.drift()
    start, end = type(workload)(workload.size), type(workload)(workload.size)
    start.theta, end.theta = drift[0], drift[-1]
    reference = Reference.of(end)
    facts["finite differences"] = reference.finite_differences
    rows, able = started(workload, adapters, differentiates=True)
    tasks: list[tuple[Sample, Callable[[], object], int]] = []
    for row, adapter in able:
        try:
            posed = adapter.pose(workload, Request(workload.rtol))
            thetas = [posed.native(theta) for theta in drift]
            _, b, c = natives(posed, workload)
            zero = posed.native(torch.zeros_like(workload.b))

            def loop(posed: Posed = posed, thetas: list[Any] = thetas, b: Any = b, c: Any = c, zero: Any = zero) -> Any:
                x, last = zero, None
                for theta in thetas:
                    last = posed.gradient(theta, b, c) if posed.guessed is None else posed.guessed(theta, b, c, x)
                    x = last[0]
                return last

            first = posed.tensor(posed.gradient(thetas[0], b, c)[0]).reshape(workload.b.shape)
            if not start.true_residual(first) <= SLACK * workload.rtol:
                row.status, row.residual = MISSES, start.true_residual(first)
                continue
            began = time.perf_counter()
            x, gradient, rhs_gradient = loop()
            row.first_call, row.rtol = time.perf_counter() - began, workload.rtol
            row.residual = end.true_residual(posed.tensor(x).reshape(workload.b.shape))
            row.gradient_error = distance(posed.tensor(gradient), reference.gradient)
            row.rhs_gradient_error = distance(posed.tensor(rhs_gradient), reference.rhs_gradient)
            if not row.residual <= SLACK * workload.rtol:
                row.status = MISSES
                continue
            row.gradient = add_task(tasks, loop)
        except Exception as error:
            row.status = failure(error)
    interleave(tasks, rounds)
    ratios(rows)
    return rows


# -- memory ------------------------------------------------------------------------------------------------------------------


def peak_memory(key: str, size: int, library: str, iterations: int = 0, unrolled: bool = False) -> float:
    """Bytes that forward with backward needs beside the system, in a process of its own.

    Raises:
        RuntimeError: if that process fails.
    """
    command = [sys.executable, "-m", "benchmarks.memory", key, str(size), library, str(iterations), str(int(unrolled))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        raise RuntimeError(gist(done.stderr))
    return float(done.stdout.split()[-1])


def memory_of(rows: Sequence[Row]) -> None:
    """Fill in the peak memory of rows that have a gradient."""
    for row in rows:
        if row.gradient is not None:
            try:
                row.memory = peak_memory(row.workload, row.size, row.library)
            except RuntimeError as error:
                row.status = f"memory: {error}"


def memory_by_iterations(
    workload: StiffDiffusion, adapters: Sequence[Adapter], iterations: Sequence[int], facts: dict[str, Any]
) -> list[Row]:
    """Peak memory against the number of iterations, implicit and, of the two that can, unrolled (W7)."""
    rows, able = started(workload, adapters, differentiates=True)
    for row, _ in able:
        fill_memory(row, iterations, unrolled=False)
    for row, adapter in able:
        if adapter.name in ("floor", "nablasolve"):
            unrolled = Row(workload.key, workload.size, f"{adapter.name}, unrolled", row.version)
            fill_memory(unrolled, iterations, unrolled=True)
            rows.append(unrolled)
    return rows


def fill_memory(row: Row, iterations: Sequence[int], unrolled: bool) -> None:
    """The peak at each number of iterations."""
    library, row.memory_by_iterations = row.library.split(",")[0], {}
    try:
        for count in iterations:
            row.memory_by_iterations[str(count)] = peak_memory(row.workload, row.size, library, count, unrolled)
    except RuntimeError as error:
        row.status = f"fails: {error}"


# -- everything --------------------------------------------------------------------------------------------------------------


def chosen(names: Sequence[str] | None) -> list[type[Workload]]:
    """The workloads of some names, each the whole key or the part before its dash; all of them for None.

    Raises:
        ValueError: for an unknown name.
    """
    for name in names or ():
        if not any(name in (key, key.split("-")[0]) for key in WORKLOADS):
            raise ValueError(f"unknown workload {name!r}: known are {', '.join(WORKLOADS)}")
    return [w for key, w in WORKLOADS.items() if names is None or key in names or key.split("-")[0] in names]


def measure(
    workloads: Sequence[type[Workload]],
    adapters: Sequence[Adapter],
    scale: str,
    rounds: int,
    memory: bool = True,
    say: Callable[[str], None] = lambda text: None,
    copied: int = 256,
) -> Results:
    """Run everything that was asked for.

    Args:
        workloads: which.
        adapters: the libraries.
        scale: "tiny", "small" or "full".
        rounds: of the clocks.
        memory: whether to start processes that measure memory.
        say: is told what is being done.
        copied: MiB of the copy that measures the bandwidth.
    """
    results = Results(machine(adapters, copied), rounds, scale, [], [])
    for kind in workloads:
        for size in kind.sizes[scale]:
            workload = kind(size)
            say(f"{kind.key} at {size}")
            facts: dict[str, Any] = {
                "workload": kind.key,
                "size": size,
                "title": kind.title,
                "unknowns": workload.cotangent.numel(),
                "dtype": str(workload.precision).removeprefix("torch."),
                "rtol": kind.rtol,
                "bytes an iteration": workload.iteration_bytes(),
                "bytes a vector": workload.cotangent.nbytes,
            }
            if isinstance(workload, StiffDiffusion):
                rows = memory_by_iterations(workload, adapters, MEMORY_ITERATIONS[scale], facts) if memory else []
            elif isinstance(workload, DenseSmall):
                rows = overhead(workload, adapters, rounds, facts)
            elif isinstance(workload, DriftingDiffusion):
                rows = training(workload, adapters, rounds, facts)
            else:
                rows = solves(workload, adapters, rounds, facts)
                if memory:
                    memory_of(rows)
            results.rows += rows
            results.facts.append(facts)
    return results
