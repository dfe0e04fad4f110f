"""`make bench`, or `python -m benchmarks.cpu`: measures, and writes the folder of results."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's and SciPy's: on small matrices threads wait for each other
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory here, and has nothing to say

from benchmarks.cpu import curves, host, iterations, kernels, report, results, roofs, steps  # noqa: E402
from benchmarks.cpu.environment import describe  # noqa: E402
from benchmarks.cpu.plan import PLANS, Plan  # noqa: E402

PARTS = {
    "roofs": roofs,
    "kernels": kernels,
    "curves": curves,
    "steps": steps,
    "host": host,
    "iterations": iterations,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--plan", choices=PLANS, default="full", help="how much is measured (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the folder of results (default: benchmarks/results/PROCESSOR-PLAN)")
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", help="measure these parts anew, in the folder of another run"
    )
    options = parser.parse_args(arguments)
    here = describe(os.environ.get("BENCH_COMMAND") or " ".join(["python -m benchmarks.cpu", *sys.argv[1:]]))
    folder = options.out or results.HOME / folder_name(here["processor"], options.plan)
    if options.only:
        measure_anew(options.only, PLANS[options.plan], folder, here)
    else:
        measure(PLANS[options.plan], folder, here)
    print(f"report: {report.write(folder)}")
    return 0


def measure(plan: Plan, folder: Path, here: dict) -> None:
    """All parts; the results are saved after each."""
    start, rows = time.monotonic(), []
    for part in PARTS:
        rows += printed(part, plan)
        minutes = (time.monotonic() - start) / 60
        results.save(folder, {"environment": here | {"plan": plan.name, "minutes": minutes}, "rows": rows})


def measure_anew(parts: list[str], plan: Plan, folder: Path, here: dict) -> None:
    """Some parts, which take the place of those in the folder and say when they were made."""
    found = results.load(folder)
    for part in parts:
        new = printed(part, plan)
        replaced = {row["part"] for row in new}
        found["rows"] = [row for row in found["rows"] if row["part"] not in replaced] + new
        when = {part: f"{here['made']}, {here['processor']}, torch {here['torch']}, commit {here['commit']}"}
        found["environment"]["anew"] = found["environment"].get("anew", {}) | when
        results.save(folder, found)


def printed(part: str, plan: Plan) -> list[dict]:
    rows = []
    for row in PARTS[part].rows(plan):
        rows.append(row)
        print(line(row), flush=True)
    return rows


def folder_name(processor: str, plan: str) -> str:
    words = [processor, "cpu", *([plan] if plan != "full" else [])]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def line(row: dict) -> str:
    facts = [
        row.get(name)
        for name in ("part", "what", "op", "n", "count", "dtype", "layout", "threads", "by", "label", "work")
    ]
    measured = f"{row['median_us']:12.1f} us" if "median_us" in row else f"absent: {row['absent']}"
    return f"{' '.join(str(fact) for fact in facts if fact is not None):95} {measured}"


if __name__ == "__main__":
    sys.exit(main())
