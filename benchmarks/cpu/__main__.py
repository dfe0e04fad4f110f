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
from benchmarks.cpu.plan import PLANS  # noqa: E402

PARTS = (roofs, kernels, curves, steps, host, iterations)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--plan", choices=PLANS, default="full", help="how much is measured (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the folder of results (default: benchmarks/results/PROCESSOR-PLAN)")
    options = parser.parse_args(arguments)
    start, rows = time.monotonic(), []
    here = describe(os.environ.get("BENCH_COMMAND") or " ".join(["python -m benchmarks.cpu", *sys.argv[1:]]))
    folder = options.out or results.HOME / folder_name(here["processor"], options.plan)
    for part in PARTS:
        for row in part.rows(PLANS[options.plan]):
            rows.append(row)
            print(line(row), flush=True)
        minutes = (time.monotonic() - start) / 60
        results.save(folder, {"environment": here | {"plan": options.plan, "minutes": minutes}, "rows": rows})
    print(f"report: {report.write(folder)}")
    return 0


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
