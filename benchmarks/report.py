"""What was measured, as a page of Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .adapters import ADAPTERS
from .measure import NO_SOLVER, Results, Row, Sample

MIB = 2**20
SUMMARY = "Time relative to the hand-written loop, forward / with backward"
COLORS = (
    "#555555", "#8a8a8a", "#1f6fb4", "#12406a", "#4c86c6", "#8fbfe8", "#3b8f5a", "#d9661f", "#e8a33d", "#7d5ba6", "#b5547c",
    "#a8743a", "#2aa3a3", "#9a9a3c", "#c98fb0",
)  # fmt: skip


def number(value: float | None, form: str = ".2f") -> str:
    """A number, or a dash for none."""
    return "–" if value is None else f"{value:{form}}"


def mebibytes(value: float | None) -> str:
    """Bytes in MiB."""
    return number(None if value is None else value / MIB)


def ratio(wall: float | None, cpu: float | None) -> str:
    """A ratio of the wall clock and, in brackets, of the processor's seconds."""
    return "–" if wall is None else f"{wall:.2f} ({number(cpu)})"


def busy(results: Results) -> float:
    """How much longer the samples took on the wall clock than on the processor: 1 on a quiet machine with one thread."""
    samples = [s for row in results.rows for s in (row.forward, row.gradient) if s is not None]
    cpu = sum(sum(s.cpu) for s in samples)
    return sum(sum(s.wall) for s in samples) / cpu if cpu else 1.0


def seconds(sample: Sample | None) -> str:
    """The median of a sample with its spread."""
    if sample is None:
        return "–"
    return f"{sample.median:.3g}" + (f" ± {50 * sample.spread:.0f} %" if len(sample.wall) > 1 else " (once)")


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the first column to the left and the others to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def section(results: Results, facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """One workload at one size: its table, and below it the libraries that have nothing for it."""
    without = [row.library for row in rows if row.status == NO_SOLVER]
    page = tables(results, facts, [row for row in rows if row.status != NO_SOLVER])
    return page + (f"\n\nNo such solver: {', '.join(without)}." if without else "")


def tables(results: Results, facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """The table of one workload, of the kind that it needs."""
    unknowns = f"{facts['unknowns']:,}".replace(",", " ")
    moved, speed = facts["bytes an iteration"], results.machine.bandwidth
    text = [f"### {facts['workload']}, size {facts['size']}: {facts['title']}\n"]
    if any(row.memory_by_iterations for row in rows):
        counts = list(next(row for row in rows if row.memory_by_iterations).memory_by_iterations or {})
        text.append(
            f"{unknowns} unknowns, {facts['dtype']}; a vector is {facts['bytes a vector'] / MIB:.2f} MiB. "
            "Peak in MiB at about so many iterations:\n"
        )
        lines = [[r.library, *(mebibytes((r.memory_by_iterations or {}).get(k)) for k in counts), r.status] for r in rows]
        return "\n".join([*text, table(["library", *counts, "status"], lines)])
    if any(row.microseconds is not None for row in rows):
        text.append("An iteration, and what a solve costs beside its iterations, forward and with backward, in microseconds:\n")
        lines = [
            [
                r.library,
                number(r.microseconds),
                number(r.forward_ratio),
                number(r.fixed_microseconds, ".0f"),
                number(r.fixed_gradient_microseconds, ".0f"),
                number(r.compiling, ".2g"),
                r.status,
            ]
            for r in rows
        ]
        head = ["library", "µs an iteration", "× floor", "beside, forward", "beside, with backward", "compiling s", "status"]
        return "\n".join([*text, table(head, lines)])
    text.append(
        f"{unknowns} unknowns, {facts['dtype']}, true residual {facts['rtol']:.0e}. "
        f"An iteration of the textbook method moves {moved / MIB:.2f} MiB: {1e6 * moved / speed:.0f} µs at the bandwidth. "
        + (
            f"The bandwidth lets the {len_iterations(rows)} iterations of the floor take {limit:.3g} s forward. "
            if (limit := facts.get("seconds at the bandwidth"))
            else ""
        )
        + f"The reference gradient differs from central differences by {facts['finite differences']:.0e}.\n"
    )
    return "\n".join([*text, table(list(COLUMNS), [[show(r) for show in COLUMNS.values()] for r in rows])])


def len_iterations(rows: Sequence[Row]) -> int | None:
    """How many iterations the floor took."""
    return next((row.iterations for row in rows if row.library == "floor"), None)


def processor(sample: Sample | None) -> float | None:
    """The median of the processor's seconds."""
    return None if sample is None else sorted(sample.cpu)[len(sample.cpu) // 2]


COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "library": lambda r: r.library,
    "forward s": lambda r: seconds(r.forward),
    "× floor (CPU)": lambda r: ratio(r.forward_ratio, r.forward_cpu_ratio),
    "with backward s": lambda r: seconds(r.gradient),
    "× floor (CPU) ": lambda r: ratio(r.gradient_ratio, r.gradient_cpu_ratio),
    "CPU s": lambda r: number(processor(r.gradient), ".3g"),
    "× bandwidth": lambda r: number(r.over_bandwidth, ".1f"),
    "compiling s": lambda r: number(r.compiling, ".2g"),
    "iterations": lambda r: number(r.iterations, "d"),
    "products": lambda r: number(r.products, "d"),
    "residual": lambda r: number(r.residual, ".1e"),
    "error of θ's gradient": lambda r: number(r.gradient_error, ".0e"),
    "of b's": lambda r: number(r.rhs_gradient_error, ".0e"),
    "peak MiB": lambda r: mebibytes(r.memory),
    "status": lambda r: r.status,
}


def notes(results: Results) -> str:
    """What has to be known of single libraries."""
    names = dict.fromkeys(row.library for row in results.rows)
    known = [(name, ADAPTERS[name].note) for name in names if name in ADAPTERS and ADAPTERS[name].note]
    return "".join(["\n", *(f"\n- {name}: {note}." for name, note in known)]) if known else ""


def summary(results: Results) -> str:
    """One table: a line a library and a column a workload, the time relative to the floor forward / with backward.

    W7 is the peak memory in MiB at the smallest and the largest number of iterations, W8 the time of an iteration. A star marks
    a ratio of compiled code; in each column the smallest with backward, eager and compiled, are bold, the floors aside.
    """
    sizes = {(f["workload"], f["size"]): sum(g["workload"] == f["workload"] for g in results.facts) for f in results.facts}
    sizes = {key: many for key, many in sizes.items() if any((r.workload, r.size) == key for r in results.rows)}
    libraries = list(dict.fromkeys(row.library for row in results.rows if row.memory_by_iterations is None))
    rows = {(row.library, row.workload, row.size): row for row in results.rows}
    compiled = {name for name in libraries if name in ADAPTERS and ADAPTERS[name].compiles}
    lines = []
    for name in libraries:
        line = [name + "*" * (name in compiled)]
        for workload, size in sizes:
            row = rows.get((name, workload, size))
            rivals = [
                r.gradient_ratio
                for r in results.rows
                if (r.workload, r.size) == (workload, size) and (r.library in compiled) == (name in compiled)
                if not r.library.startswith("floor") and r.gradient_ratio is not None
            ]
            line.append("–" if row is None else cell(row, min(rivals, default=None)))
        if any(text != "–" for text in line[1:]):
            lines.append(line)
    head = ["library", *(f"{workload} {size}" if many > 1 else workload for (workload, size), many in sizes.items())]
    return table(head, lines)


def cell(row: Row, best: float | None) -> str:
    """What the summary has of a library on a workload."""
    if row.memory_by_iterations:
        peaks = [mebibytes(peak) for peak in row.memory_by_iterations.values()]
        return f"{peaks[0]}…{peaks[-1]} MiB"
    if row.forward_ratio is None and row.gradient_ratio is None:
        return "–" if row.status == NO_SOLVER else "fails" if row.status != "ok" else "–"
    if row.gradient_ratio is None:
        return number(row.forward_ratio)
    text = f"{number(row.forward_ratio)} / {number(row.gradient_ratio)}"
    return f"**{text}**" if row.gradient_ratio == best else text


def markdown(results: Results) -> str:
    """The whole page."""
    m = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in m.versions.items())
    parts = [
        f"## Benchmark, sizes: {results.scale}\n\n"
        f"{m.processor}, {m.threads} thread{'s' if m.threads > 1 else ''}; a large copy moves {m.bandwidth / 1e9:.1f} GB/s. "
        f"{results.rounds} interleaved rounds: medians, ± half of the range; ratios are medians of the ratios in each round. "
        f"CPU seconds are those of forward with backward. × bandwidth is the time forward over what the bytes of the floor's "
        f"iterations take at the bandwidth; a vector that stays in a cache may be below 1. Compiling is what the first call "
        f"took more than a later one, and no part of the times. Products are those with A and its transpose, forward and "
        f"backward. Peak memory is that of forward with backward, beside the system. All samples together took "
        f"{busy(results):.2f} times longer on the wall clock than on the processor. A ratio in brackets is that of the "
        f"processor's seconds.\n\n{versions}.{notes(results)}"
    ]
    parts.append("### " + SUMMARY + "\n\n" + summary(results))
    for facts in results.facts:
        rows = [r for r in results.rows if (r.workload, r.size) == (facts["workload"], facts["size"])]
        if rows:
            parts.append(section(results, facts, rows))
    return "\n\n".join(parts) + "\n"


def plot(results: Results, path: Path) -> bool:
    """Draw the ratios, one panel a workload, and say whether there was a matplotlib to draw them."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    groups = []
    for facts in results.facts:
        rows = [r for r in results.rows if (r.workload, r.size) == (facts["workload"], facts["size"])]
        if any(r.forward_ratio or r.gradient_ratio or r.memory_by_iterations for r in rows):
            groups.append((facts, rows))
    if not groups:
        return False
    libraries = list(dict.fromkeys(r.library.split(",")[0] for r in results.rows))
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(libraries)}
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    most = max(len([r for r in rows if drawable(r.forward_ratio) or drawable(r.gradient_ratio)]) for _, rows in groups)
    height = max(3.1, 1.0 + 0.3 * most)
    figure = Figure(figsize=(5.4 * columns, height * lines + 0.5), dpi=120, layout="constrained", facecolor="white")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(groups) :]:
        axes.axis("off")
    for axes, (facts, rows) in zip(panels, groups, strict=False):
        axes.set_title(f"{facts['workload']} ({facts['size']}): {facts['title']}", fontsize=8.5, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(color="#dddddd", linewidth=0.6, axis="both" if any(r.memory_by_iterations for r in rows) else "x")
        if any(r.memory_by_iterations for r in rows):
            draw_memory(axes, rows, color)
        else:
            draw_ratios(axes, rows, color)
    figure.suptitle("Time relative to a hand-written torch loop, 1 by definition: less is better", fontsize=12)
    figure.savefig(path)
    return True


def drawable(ratio: float | None) -> bool:
    """Whether a logarithmic axis has a place for it: the difference of two noisy times may be negative."""
    return ratio is not None and ratio > 0


def draw_ratios(axes: Any, rows: Sequence[Row], color: dict[str, str]) -> None:
    """Two bars a library: forward, paler, and forward with backward."""
    shown = [r for r in rows if drawable(r.forward_ratio) or drawable(r.gradient_ratio)]
    axes.set_xscale("log")
    if not shown:
        return
    for i, r in enumerate(shown):
        one = r.forward_ratio is None or r.gradient_ratio is None
        for ratio, offset, alpha in ((r.forward_ratio, -0.2, 0.5), (r.gradient_ratio, 0.2, 1.0)):
            offset = 0.0 if one else offset
            if drawable(ratio):
                axes.barh(i + offset, ratio - 1, height=0.38, left=1, color=color[r.library], alpha=alpha)
                place, side = (4, "left") if ratio >= 1 else (-4, "right")
                axes.annotate(
                    f"{ratio:.2f}",
                    (ratio, i + offset),
                    (place, 0),
                    textcoords="offset points",
                    va="center",
                    ha=side,
                    fontsize=7,
                )
    axes.axvline(1, color="#333333", linewidth=0.9)
    ratios = [x for r in shown for x in (r.forward_ratio, r.gradient_ratio) if drawable(x)]
    axes.set_xlim(min(0.5, 0.6 * min(ratios)), max(2.0, 1.7 * max(ratios)))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_yticks(range(len(shown)), [r.library + ("" if r.status == "ok" else " *") for r in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        "pale: forward; full: with backward" if any(r.gradient_ratio for r in shown) else "an iteration", fontsize=8
    )


def draw_memory(axes: Any, rows: Sequence[Row], color: dict[str, str]) -> None:
    """Peak memory against iterations, dashed where unrolled."""
    for r in rows:
        if r.memory_by_iterations:
            counts, peaks = zip(*((int(k), max(v, 1) / MIB) for k, v in r.memory_by_iterations.items()), strict=True)
            style = "--" if "unrolled" in r.library else "-"
            axes.loglog(counts, peaks, style, marker="o", markersize=4, color=color[r.library.split(",")[0]], label=r.library)
            axes.set_xticks(counts, [str(k) for k in counts])
    axes.minorticks_off()
    axes.set_xlabel("iterations", fontsize=8)
    axes.set_ylabel("peak MiB", fontsize=8)
    axes.legend(frameon=False, fontsize=7)
