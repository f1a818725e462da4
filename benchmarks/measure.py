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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import ADAPTERS
from .fence import OverTimeError, fence
from .posing import Adapter, Posed, Request
from .workloads import WORKLOADS, DenseSmall, DriftingDiffusion, StiffDiffusion, Workload

ROOT = Path(__file__).parents[1]
SHORTEST = 0.1  # seconds: a sample that would be shorter repeats its call
LONG = 10.0  # seconds: a call that takes longer is not compiling only
LIMIT = 300.0  # seconds of a library on a workload, all its calls together; and of each process that measures its memory
SLACK = 1.05  # a true residual above this times the tolerance is a miss; recursive residuals differ from true ones by rounding
GRADIENT_SLACK = 100.0  # the error of a gradient is that of two solutions, each magnified by the conditioning
REFERENCE_RTOL = 1e-12
NO_SOLVER, MISSES = "has no such solver", "misses the tolerance"
OVERHEAD_ITERATIONS = (1000, 2000)  # so many that the diagnosis of a solve that was stopped by its limit no longer grows
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

    # a slow library is sampled in the first rounds only

    def ratio(self, other: Sample) -> float:
        """The median over the rounds of the ratio to another in the same round, on the wall clock."""
        return statistics.median(a / b for a, b in zip(self.wall, other.wall, strict=False))

    def cpu_ratio(self, other: Sample) -> float:
        """The same of the processor's seconds, which a busy machine disturbs less."""
        return statistics.median(a / b for a, b in zip(self.cpu, other.cpu, strict=False))


@dataclass
class Row:
    """One library on one workload. What was not measured is None; `status` is "ok" or says what is wrong.

    `compiling` is what the first call took more than a later one, of a library that compiles. `over_bandwidth` is the time
    forward over what the floor's iterations take where nothing but the bandwidth of the memory limits them.
    """

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
    compiling: float | None = None
    over_bandwidth: float | None = None
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

    def joined(self, other: Results) -> Results:
        """These, with all rows of each workload that the other measured in their place.

        Raises:
            ValueError: if rounds, scale or threads differ.
        """
        if (self.rounds, self.scale, self.machine.threads) != (other.rounds, other.scale, other.machine.threads):
            raise ValueError("expected results of as many rounds and threads, and of one scale")
        keys = list(WORKLOADS)

        def merged(kept: list[Any], new: list[Any], key: Callable[[Any], tuple[str, int]]) -> list[Any]:
            kept = [entry for entry in kept if key(entry) not in measured]
            return sorted(
                [*kept, *(entry for entry in new if key(entry) in measured)], key=lambda e: (keys.index(key(e)[0]), key(e))
            )

        measured = {(row.workload, row.size) for row in other.rows}
        rows = merged(self.rows, other.rows, lambda row: (row.workload, row.size))
        facts = merged(self.facts, other.facts, lambda fact: (fact["workload"], fact["size"]))
        machine = replace(self.machine, versions=self.machine.versions | other.machine.versions)
        return replace(self, machine=machine, rows=rows, facts=facts)

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
    """Fill a row with what the library's answers are worth, and return the workload in its hands, called once.

    What is returned has a gradient only if that was right; the solution may be right without.
    """
    row.rtol = tolerance(adapter, workload)
    counting = adapter.pose(workload, Request(row.rtol, counts=True))
    theta, b, c = natives(counting, workload)
    usable = counting.gradient is not None
    start = time.perf_counter()
    if counting.gradient is None:
        x = counting.forward(theta, b)
    else:
        try:
            x, gradient, rhs_gradient = counting.gradient(theta, b, c)
        except Exception as error:
            row.status, usable = f"gradient {failure(error)}", False
            counting.products()
            x = counting.forward(theta, b)
        else:
            row.gradient_error = distance(counting.tensor(gradient), reference.gradient)
            if rhs_gradient is not None:
                row.rhs_gradient_error = distance(counting.tensor(rhs_gradient), reference.rhs_gradient)
    row.first_call = time.perf_counter() - start
    row.residual = workload.true_residual(counting.tensor(x).reshape(workload.cotangent.shape))
    row.iterations, row.products = counting.iterations(), counting.products()
    if not row.residual <= SLACK * workload.rtol:
        row.status = MISSES
    elif row.gradient_error is not None and not row.gradient_error <= GRADIENT_SLACK * workload.rtol:
        row.status, usable = "wrong gradient", False
    posed = adapter.pose(workload, Request(row.rtol))
    return posed if usable else replace(posed, gradient=None)


# -- time --------------------------------------------------------------------------------------------------------------------


def timed(sample: Sample, call: Callable[[], object], number: int) -> None:
    """One sample: the mean of `number` calls in a row."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(number):
        call()
    sample.wall.append((time.perf_counter() - wall) / number)
    sample.cpu.append((time.process_time() - cpu) / number)


@dataclass
class Task:
    """A call, `number` times in a row for a sample, one sample a round for some rounds."""

    sample: Sample
    call: Callable[[], object]
    number: int
    seconds: float  # of one sample
    rounds: int = 0


def prepared(call: Callable[[], object]) -> Task:
    """A call that has been compiled, and is repeated so often that a sample is long enough."""
    for _ in range(2):  # the first call may compile
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        if took > LONG:
            break
    number = max(1, round(SHORTEST / took))
    return Task(Sample(), call, number, number * took)


class Rounds:
    """The calls of all libraries, and what of its time each of them has left.

    Args:
        number: of rounds.
        limit: seconds of one library; None for no limit.
    """

    def __init__(self, number: int, limit: float | None) -> None:
        self.number, self.limit = number, limit
        self.tasks: list[Task] = []

    def set_up(self, row: Row, make: Callable[[], Sequence[Task]]) -> bool:
        """Queue the calls of one library, and say whether there are any: what it cannot do goes to the status of its row."""
        start = time.perf_counter()
        try:
            with fence(self.limit):
                tasks = make()
        except OverTimeError as error:
            row.status = str(error)
            return False
        except Exception as error:  # what a library cannot do is a finding
            row.status = failure(error)
            return False
        left = float("inf") if not self.limit else self.limit - (time.perf_counter() - start)
        a_round = sum(task.seconds for task in tasks)
        fit = self.number if a_round * self.number <= left else int(left / a_round)
        for task in tasks:
            task.rounds = min(self.number, max(1, fit))  # one in any case, so that it is bounded by about twice the limit
        self.tasks += tasks
        return bool(tasks)

    def run(self) -> None:
        """Sample every call once a round, each round from another one on."""
        for k in range(self.number):
            tasks = [task for task in self.tasks if task.rounds > k]
            first = k % max(1, len(tasks))
            gc.collect()
            gc.disable()  # what one library leaves behind is not collected in the time of another
            try:
                for task in (*tasks[first:], *tasks[:first]):
                    timed(task.sample, task.call, task.number)
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


def lacks_gradient(workload: Workload, adapter: Adapter, limit: float | None) -> str | None:
    """Why a library has no gradient for a workload; None if it has one."""
    try:
        with fence(limit):
            return "has no gradient" if adapter.pose(workload, Request(workload.rtol)).gradient is None else None
    except OverTimeError as error:
        return str(error)
    except Exception as error:
        return failure(error)


def started(
    workload: Workload, adapters: Sequence[Adapter], differentiates: bool = False, limit: float | None = None
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
        elif differentiates and (lacking := lacks_gradient(workload, adapter, limit)) is not None:
            row.status = lacking
        else:
            row.version = adapter.version()
            able.append((row, adapter))
        rows.append(row)
    return rows, able


def gist(text: str) -> str:
    """The line of an error message that says most: the last that names an error, of a traceback in it as well."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    if any(re.search(r"can't allocate memory|MemoryError|bad_alloc|out of memory", line, re.IGNORECASE) for line in lines):
        return "out of memory"
    return next((line for line in reversed(lines) if re.match(r"[\w.]*Error: ", line)), lines[0])[:110]


def failure(error: Exception) -> str:
    """An exception in a few words."""
    return f"fails: {gist(f'{type(error).__name__}: {error}')}"


def compile_times(rows: Sequence[tuple[Row, Adapter]], calls: float = 1.0) -> None:
    """Fill in what the first call took more than a later one, of the libraries that compile; it was as long as some calls."""
    for row, adapter in rows:
        later = row.gradient or row.forward
        if adapter.compiles and row.first_call is not None and later is not None:
            row.compiling = row.first_call - calls * later.median


def solves(
    workload: Workload, adapters: Sequence[Adapter], rounds: int, facts: dict[str, Any], limit: float | None = LIMIT
) -> list[Row]:
    """Forward, and forward with backward, of W1 to W6."""
    reference = Reference.of(workload)
    facts["finite differences"] = reference.finite_differences
    rows, able = started(workload, adapters)
    queue = Rounds(rounds, limit)
    for row, adapter in able:

        def make(row: Row = row, adapter: Adapter = adapter) -> list[Task]:
            posed = verify(row, adapter, workload, reference)
            if row.status == MISSES:  # the time of a wrong answer says nothing
                return []
            theta, b, c = natives(posed, workload)
            calls = [lambda: posed.forward(theta, b)]
            gradient = posed.gradient
            if gradient is not None:
                calls.append(lambda: gradient(theta, b, c))
            tasks = [prepared(call) for call in calls]
            row.forward, row.gradient = tasks[0].sample, tasks[1].sample if gradient is not None else None
            return tasks

        if not queue.set_up(row, make):
            row.forward = row.gradient = None
    queue.run()
    ratios(rows)
    compile_times(able)
    floor = next((row for row in rows if row.library == "floor"), None)
    if floor is not None and floor.iterations:
        facts["seconds at the bandwidth"] = floor.iterations * facts["bytes an iteration"] / facts["bandwidth"]
        for row in rows:
            if row.forward is not None:
                row.over_bandwidth = row.forward.median / facts["seconds at the bandwidth"]
    return rows


def overhead(
    workload: DenseSmall, adapters: Sequence[Adapter], rounds: int, facts: dict[str, Any], limit: float | None = LIMIT
) -> list[Row]:
    """Microseconds an iteration, and what a solve costs beside its iterations (W8).

    An iteration is the difference of two runs with set numbers of iterations. What stands beside them is the time for the
    identity, which takes one iteration, less that one.
    """
    easy = type(workload)(workload.size)
    easy.theta = torch.eye(workload.size, dtype=workload.precision)
    rows, able = started(workload, adapters)
    queue = Rounds(rounds, limit)
    groups = []
    for row, adapter in able:
        few, many = OVERHEAD_ITERATIONS
        if adapter.at_most_n and many > workload.size:
            few, many = workload.size // 5, workload.size

        def make(row: Row = row, adapter: Adapter = adapter, counts: tuple[int, int] = (few, many)) -> list[Task]:
            tasks = []
            for iterations in counts:
                posed = adapter.pose(workload, Request(0.0, iterations))
                theta, b, c = natives(posed, workload)
                if row.first_call is None:
                    start = time.perf_counter()
                    posed.forward(theta, b)
                    row.first_call = time.perf_counter() - start
                tasks.append(prepared(lambda f=posed.forward, a=(theta, b): f(*a)))
            posed = adapter.pose(easy, Request(easy.rtol))
            theta, b, c = natives(posed, easy)
            tasks.append(prepared(lambda f=posed.forward, a=(theta, b): f(*a)))
            if posed.gradient is not None:
                tasks.append(prepared(lambda f=posed.gradient, a=(theta, b, c): f(*a)))
            groups.append((row, adapter, counts[1] - counts[0], [task.sample for task in tasks]))
            return tasks

        queue.set_up(row, make)
    queue.run()
    for row, adapter, difference, (short, long, one, *with_gradient) in groups:
        slope = statistics.median((b - a) / difference for a, b in zip(short.wall, long.wall, strict=True))
        row.microseconds, row.fixed_microseconds = 1e6 * slope, 1e6 * (one.median - slope)
        if with_gradient:
            row.fixed_gradient_microseconds = 1e6 * (with_gradient[0].median - 2 * slope)
        if adapter.compiles and row.first_call is not None:
            row.compiling = row.first_call - short.median
    base = next((row.microseconds for row in rows if row.library == "floor"), None)
    for row in rows:
        if base is not None and row.microseconds is not None:
            row.forward_ratio = row.microseconds / base
    return rows


def training(
    workload: DriftingDiffusion, adapters: Sequence[Adapter], rounds: int, facts: dict[str, Any], limit: float | None = LIMIT
) -> list[Row]:
    """A loop of solves with gradients, each from the solution of the last where the library takes a guess (W9)."""
    drift = workload.drift()
    start, end = type(workload)(workload.size), type(workload)(workload.size)
    start.theta, end.theta = drift[0], drift[-1]
    reference = Reference.of(end)
    facts["finite differences"] = reference.finite_differences
    rows, able = started(workload, adapters, differentiates=True, limit=limit)
    queue = Rounds(rounds, limit)
    for row, adapter in able:

        def make(row: Row = row, adapter: Adapter = adapter) -> list[Task]:
            posed = adapter.pose(workload, Request(workload.rtol))
            assert posed.gradient is not None
            thetas = [posed.native(theta) for theta in drift]
            _, b, c = natives(posed, workload)
            zero = posed.native(torch.zeros_like(workload.b))

            def loop() -> Any:
                x, last = zero, None
                for theta in thetas:
                    last = posed.gradient(theta, b, c) if posed.guessed is None else posed.guessed(theta, b, c, x)
                    x = last[0]
                return last

            began = time.perf_counter()
            first = posed.tensor(posed.gradient(thetas[0], b, c)[0]).reshape(workload.b.shape)
            one = time.perf_counter() - began
            row.rtol, row.residual = workload.rtol, start.true_residual(first)
            if not row.residual <= SLACK * workload.rtol:
                row.status = MISSES
                return []
            began = time.perf_counter()
            x, gradient, rhs_gradient = loop()
            row.first_call = one + time.perf_counter() - began  # with a guess is another call, and compiled apart
            row.residual = end.true_residual(posed.tensor(x).reshape(workload.b.shape))
            row.gradient_error = distance(posed.tensor(gradient), reference.gradient)
            if rhs_gradient is not None:
                row.rhs_gradient_error = distance(posed.tensor(rhs_gradient), reference.rhs_gradient)
            if not row.residual <= SLACK * workload.rtol:
                row.status = MISSES
            elif not row.gradient_error <= GRADIENT_SLACK * workload.rtol:
                row.status = "wrong gradient"
            if row.status != "ok":
                return []
            task = prepared(loop)
            row.gradient = task.sample
            return [task]

        if not queue.set_up(row, make):
            row.gradient = None
    queue.run()
    ratios(rows)
    compile_times(able, calls=1 + 1 / len(drift))
    return rows


# -- memory ------------------------------------------------------------------------------------------------------------------


def peak_memory(
    key: str, size: int, library: str, iterations: int = 0, unrolled: bool = False, limit: float | None = LIMIT
) -> float:
    """Bytes that forward with backward needs beside the system, in a process of its own.

    Raises:
        RuntimeError: if that process fails, or takes longer than the limit.
    """
    command = [sys.executable, "-m", "benchmarks.memory", key, str(size), library, str(iterations), str(int(unrolled))]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False, timeout=limit or None
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"over {limit:g} s") from error
    if done.returncode:
        raise RuntimeError(gist(done.stderr) if done.returncode > 0 else f"ended by signal {-done.returncode}")
    return float(done.stdout.split()[-1])


def memory_of(rows: Sequence[Row], limit: float | None = LIMIT) -> None:
    """Fill in the peak memory of rows that have a gradient."""
    for row in rows:
        if row.gradient is not None:
            try:
                row.memory = peak_memory(row.workload, row.size, row.library, limit=limit)
            except RuntimeError as error:
                row.status = f"memory: {error}"


def memory_by_iterations(
    workload: StiffDiffusion, adapters: Sequence[Adapter], iterations: Sequence[int], limit: float | None = LIMIT
) -> list[Row]:
    """Peak memory against the number of iterations, implicit and, of the two that can, unrolled (W7)."""
    rows, able = started(workload, adapters, differentiates=True, limit=limit)
    for row, _ in able:
        fill_memory(row, iterations, False, limit)
    for row, adapter in able:
        if adapter.name in ("floor", "nablasolve"):
            unrolled = Row(workload.key, workload.size, f"{adapter.name}, unrolled", row.version)
            fill_memory(unrolled, iterations, True, limit)
            rows.append(unrolled)
    return rows


def fill_memory(row: Row, iterations: Sequence[int], unrolled: bool, limit: float | None = LIMIT) -> None:
    """The peak at each number of iterations."""
    library, row.memory_by_iterations = row.library.split(",")[0], {}
    try:
        for count in iterations:
            row.memory_by_iterations[str(count)] = peak_memory(row.workload, row.size, library, count, unrolled, limit)
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
    limit: float | None = LIMIT,
    keep: Callable[[Results], None] = lambda results: None,
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
        limit: seconds of a library on a workload, and of a process that measures memory; None for no limit.
        keep: is given what there is after each workload, so that an interruption loses only the one that it interrupts.
    """
    results = Results(machine(adapters, copied), rounds, scale, [], [])
    if any(a.compiles and a.module in ("torch", "nablasolve") and a.missing() is None for a in adapters):
        say("torch.compile for the first time")  # what that prepares once for a machine is no workload's
        torch.compile(lambda v: v + 1)(torch.ones(8))
    for kind in workloads:
        for size in kind.sizes[scale]:
            workload, began = kind(size), time.perf_counter()
            say(f"{kind.key} at {size}")
            if "torch._dynamo" in sys.modules:  # each workload pays for what it compiles
                torch.compiler.reset()
            facts: dict[str, Any] = {
                "workload": kind.key,
                "size": size,
                "title": kind.title,
                "unknowns": workload.cotangent.numel(),
                "dtype": str(workload.precision).removeprefix("torch."),
                "rtol": kind.rtol,
                "bytes an iteration": workload.iteration_bytes(),
                "bytes a vector": workload.cotangent.nbytes,
                "bandwidth": results.machine.bandwidth,
            }
            if isinstance(workload, StiffDiffusion):
                rows = memory_by_iterations(workload, adapters, MEMORY_ITERATIONS[scale], limit) if memory else []
            elif isinstance(workload, DenseSmall):
                rows = overhead(workload, adapters, rounds, facts, limit)
            elif isinstance(workload, DriftingDiffusion):
                rows = training(workload, adapters, rounds, facts, limit)
            else:
                rows = solves(workload, adapters, rounds, facts, limit)
                if memory:
                    memory_of(rows, limit)
            facts["seconds of the benchmark"] = time.perf_counter() - began
            results.rows += rows
            results.facts.append(facts)
            keep(results)
    return results
