"""The command line: `python -m benchmarks --workloads W1,W8 --libraries floor,nablasolve --sizes small --rounds 3`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .fence import forget_compiled


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--workloads", help="such as W1,W3-gmres,W8 (default: all)")
    parser.add_argument("--libraries", help="such as floor,nablasolve (default: all)")
    parser.add_argument("--sizes", choices=("tiny", "small", "full"), default="full")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--limit", type=float, default=300.0, help="seconds of a library on a workload, then it is reported as over; 0: none"
    )
    parser.add_argument("--no-memory", action="store_true", help="start no processes that measure memory")
    parser.add_argument(
        "--join", type=Path, nargs="+", help="measure nothing: report these results.json as one, each workload from the last"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="the folder to write to")
    return parser.parse_args(arguments)


def restrict(threads: int) -> None:
    """Hold every library to some threads: by the variables that they read when they are loaded, and by the system."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    if threads == 1:
        os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false").strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    forget_compiled()
    if hasattr(os, "sched_setaffinity"):  # XLA makes one thread for each processor that it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write it with the JSON and the plot."""
    chosen = options(arguments)
    restrict(chosen.threads)
    import functools
    import logging
    import warnings

    import torch

    from . import measure, report
    from .adapters import ADAPTERS

    torch.set_num_threads(chosen.threads)
    logging.getLogger("jax").setLevel(logging.CRITICAL)  # a failure is reported in the table
    warnings.simplefilter("ignore")  # what a library warns of is seen in its residual
    names = list(ADAPTERS) if chosen.libraries is None else chosen.libraries.split(",")
    for name in names:
        if name not in ADAPTERS:
            print(f"unknown library {name!r}: known are {', '.join(ADAPTERS)}", file=sys.stderr)
            return 2
    try:
        workloads = measure.chosen(None if chosen.workloads is None else chosen.workloads.split(","))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def keep(results: measure.Results) -> None:
        (chosen.out / "results.json").write_text(results.to_json(), encoding="utf-8")
        (chosen.out / "results.md").write_text(report.markdown(results), encoding="utf-8")

    libraries = [ADAPTERS[name] for name in names]
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.join:
        read = (measure.Results.from_json(path.read_text(encoding="utf-8")) for path in chosen.join)
        results = functools.reduce(measure.Results.joined, read)
        keep(results)
    else:
        results = measure.measure(
            workloads, libraries, chosen.sizes, chosen.rounds, not chosen.no_memory, say, limit=chosen.limit, keep=keep
        )
    print(report.markdown(results))
    print(f"{chosen.out}/results.md, results.json" + (", plot.png" if report.plot(results, chosen.out / "plot.png") else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
