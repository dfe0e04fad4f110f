"""The results as tables: (columns, rows of cells), for the report and for the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.cpu import goals
from benchmarks.markdown import number, time_text
from benchmarks.ops import FUSED, OPS


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(rows: list[dict]) -> dict[str, Table]:
    return {
        "goals": Table("Goals", ("what", "goal", "measured", "met"), list(goals.measured(rows))),
        "peers": peers(rows),
        "ops": ops(rows),
        "steps": steps(rows),
        "memory": memory(rows),
        "host": host(rows),
        "iterations": iterations(rows),
        "absent": absent(rows),
    }


def timed(rows: Iterable[dict], **facts) -> list[dict]:
    return [row for row in rows if "median_us" in row and facts.items() <= row.items()]


def peers(rows: list[dict]) -> Table:
    """The fused op and what stands in for it elsewhere, by n."""
    chosen = timed(rows, part="kernels", op=FUSED, dtype="float32")
    cost = {(row["by"], row["n"]): row["ns_per_block"] for row in chosen}
    sizes = sorted({row["n"] for row in chosen})
    cells = []
    for by in dict.fromkeys(row["by"] for row in chosen):
        name = {"cpu": "mbf_kernels", "reference": "mbf_kernels, reference backend"}.get(by, by)
        cells.append((name, *(number(cost.get((by, n))) for n in sizes)))
    return Table("Build, damp, factor, solve: ns per block", ("n =", *map(str, sizes)), cells)


def ops(rows: list[dict]) -> Table:
    columns = (
        "op",
        "n",
        "dtype",
        "layout",
        "blocks",
        "median",
        "p20",
        "p80",
        "ns/block",
        "GB/s",
        "x copy",
        "x slower: reference",
    )
    reference = {key(row): row for row in timed(rows, part="kernels", by="reference")}
    cells = []
    for row in sorted(timed(rows, part="kernels", by="cpu"), key=lambda row: list(OPS).index(row["op"])):
        other = reference.get(key(row))
        slower = number(other["median_us"] / row["median_us"]) if other else ""
        cells.append(
            (row["op"], str(row["n"]), row["dtype"], row["layout"], f"{row['count']:,}", *times(row),
             number(row["ns_per_block"]), number(row["gbps"]), number(row["times_copy"]), slower)
        )  # fmt: skip
    return Table("Ops, one by one", columns, cells)


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("op", "n", "dtype", "layout"))


def steps(rows: list[dict]) -> Table:
    """Where rare work comes every k-th step, the time is the mean over whole periods."""
    columns = (
        "tensors of",
        "optimizer",
        "step",
        "p20",
        "p80",
        "worst",
        "every",
        "MB moved",
        "GB/s",
        "x copy",
        "x Adam",
    )
    cells = []
    for row in timed(rows, part="steps"):
        (adam,) = timed(rows, part="steps", method="adam", what=row["what"]) or [None]
        rare = row["period"] > 1
        cells.append(
            (network(row), row["label"], time_text(step_us(row)), *times(row)[1:],
             time_text(row["worst_us"]) if rare else "", f"{row['period']} steps" if rare else "",
             number(row["bytes"] / 1e6), number(row["bytes"] / step_us(row) / 1e3), number(row["times_copy"]),
             number(step_us(row) / step_us(adam)) if adam else "")
        )  # fmt: skip
    return Table("Optimizer steps", columns, cells)


def step_us(row: dict) -> float:
    """What a step costs in the long run."""
    return row["mean_us"] if row["period"] > 1 else row["median_us"]


def network(row: dict) -> str:
    return f"{row['what']}, {row['parameters'] / 1e6:.3g} M"


def memory(rows: list[dict]) -> Table:
    cells = [
        (network(row), row["label"], number(row["steady_bytes_per_parameter"]), number(row["peak_bytes_per_parameter"]))
        for row in timed(rows, part="steps")
    ]
    columns = ("tensors of", "optimizer", "steady, bytes per parameter", "peak in a step")
    return Table("Memory of the optimizer, beside weights and gradients", columns, cells)


def host(rows: list[dict]) -> Table:
    cells = [
        (f"{row['tensors']} of {row['what']}", row["work"], row["label"], *times(row))
        for row in timed(rows, part="host")
    ]
    return Table("Python and dispatch", ("tensors", "work", "optimizer", "step", "p20", "p80"), cells)


def iterations(rows: list[dict]) -> Table:
    columns = (
        "network",
        "optimizer",
        "an iteration",
        "x Adam's",
        "ms more than Adam's",
        "most iterations",
        "with statistics",
        "and inverses",
        "bytes of state per parameter",
        "bytes per parameter and step",
    )
    cells = []
    for row in timed(rows, part="iterations"):
        (adam,) = timed(rows, part="iterations", method="adam", what=row["what"])
        kinds = [row[f"{kind}_us"] for kind in ("every", "statistics", "inverses")]
        cells.append(
            (f"{row['what']}, {row['parameters'] / 1e6:.3g} M, batch {row['batch']}", row["label"],
             time_text(row["median_us"]), number(row["median_us"] / adam["median_us"]),
             f"{(row['median_us'] - adam['median_us']) / 1e3:.2f}", *map(time_text, kinds),
             number(row["state_bytes_per_parameter"]), number(row["step_bytes_per_parameter"]))
        )  # fmt: skip
    return Table("Training iterations of the methods that look at layers", columns, cells)


def absent(rows: list[dict]) -> Table:
    """What was not measured, and why; one line for all the places with the same reason."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "absent" in row:
            places.setdefault((row["label"], row["absent"]), []).append(row["what"])
    cells = [(who, ", ".join(where), why) for (who, why), where in places.items()]
    return Table("Absent", ("who", "where", "why"), cells)


def times(row: dict) -> tuple[str, ...]:
    return tuple(time_text(row[f"{name}_us"]) for name in ("median", "p20", "p80"))
