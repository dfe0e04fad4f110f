"""`make performance`: writes docs/performance.md and the README's figures from the committed results."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from benchmarks.cpu import report
from benchmarks.cpu.goals import TIMES_FASTER
from benchmarks.cpu.knees import knees
from benchmarks.cpu.notes import NOTES
from benchmarks.cpu.results import HOME, ROOT, load
from benchmarks.cpu.tables import Table, step_us, tables, timed
from benchmarks.markdown import between, number, table, time_text
from benchmarks.ops import FUSED
from benchmarks.peers import CHOLESKY

PUBLISHED = HOME / "amd-epyc-cpu"
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
BEGIN, END = "<!-- figures: written by `make performance` -->\n", "<!-- end of figures -->\n"
SHOWN = {"adam": "Adam (fused)", "mbf": "MBF (grafted)", "mbf-paper": "MBF (paper)", "muon": "Muon + AdamW"}


def main() -> None:
    results = load(PUBLISHED)
    report.write(PUBLISHED)
    PAGE.write_text(page(results))
    README.write_text(with_figures(README.read_text(), figures(results)))


def page(results: dict) -> str:
    here, found = results["environment"], tables(results["rows"])
    return rendered(
        "performance.md.jinja",
        folder=PUBLISHED.relative_to(ROOT),
        facts=report.facts(here),
        tables=found,
        missed=[
            f"{what} ({measured}, goal {goal})" for what, goal, measured, met in found["goals"].rows if met == "no"
        ],
        knees=knees(results["rows"], here["caches"]),
        notes=NOTES,
    )


def figures(results: dict) -> str:
    """The README's part."""
    here, rows = results["environment"], results["rows"]
    verdicts = [row[-1] for row in tables(rows)["goals"].rows]
    return rendered(
        "readme.md.jinja",
        machine=report.machine(here),
        here=here,
        busy=report.busy(here),
        met=verdicts.count("yes"),
        goals=len(verdicts),
        kernels=kernels(rows),
        steps=steps(rows),
    )


def kernels(rows: list[dict]) -> Table:
    fused = timed(rows, part="kernels", op=FUSED, dtype="float32")
    cost = {(row["by"], row["n"]): row["ns_per_block"] for row in fused}
    sizes = [n for n in (4, *TIMES_FASTER) if ("cpu", n) in cost]
    faster = [cost[CHOLESKY, n] / cost["cpu", n] for n in sizes]
    cells = [
        ("microseconds per 1000 blocks", *(number(cost["cpu", n]) for n in sizes)),
        ("times faster than `baddbmm_` + `cholesky_ex` + `cholesky_solve`", *(f"{times:.0f}" for times in faster)),
    ]
    return Table("", ("fused build + damp + factor + solve, n =", *map(str, sizes)), cells)


def steps(rows: list[dict]) -> Table:
    """A line per network: Adam's time, and the others' with their ratio to it."""
    cells = []
    for what in dict.fromkeys(row["what"] for row in timed(rows, part="steps")):
        found = {row["method"]: row for row in timed(rows, part="steps", what=what)}
        adam = step_us(found["adam"])
        times = (
            f"{time_text(step_us(found[name]))}, {number(step_us(found[name]) / adam)} x" if name in found else "-"
            for name in list(SHOWN)[1:]
        )
        cells.append((f"{what}, {found['adam']['parameters'] / 1e6:.3g} M", time_text(adam), *times))
    return Table("", ("optimizer step, parameters", *SHOWN.values()), cells)


def rendered(template: str, **values) -> str:
    engine = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    engine.globals["table"] = lambda found: table(found.columns, found.rows)
    return engine.from_string(Path(__file__).with_name(template).read_text()).render(**values)


def with_figures(readme: str, text: str) -> str:
    return between(readme, BEGIN, END, text)


if __name__ == "__main__":
    main()
