"""The part that tests: the whole suite, its counts by backend."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from benchmarks.gpu.results import Results

BACKENDS = ("cuda", "triton", "emulated", "cpu", "reference")
REQUIRED = ("cuda", "triton")  # must have run, and passed
STEPS = {  # disjoint, and all of it: what matters most comes first, and a run that is cut off keeps what was done
    "cuda": "cuda",
    "triton": "triton and not cuda",
    "rest": "not cuda and not triton",
}


def run(results: Results, seconds: float, rehearse: bool) -> dict:
    deadline = time.monotonic() + seconds
    record = {"done": False, "steps": results.part("test").get("steps", {})}
    for name, expression in STEPS.items():
        if record["steps"].get(name, {}).get("done"):
            continue
        left = deadline - time.monotonic()
        if left < 10:
            break
        report = results.folder / f"{name}.xml"
        status, text = results.run(command(report, expression, rehearse), left, {"OMP_NUM_THREADS": "1"})
        record["steps"][name] = step_record(report, status, text)
        report.unlink(missing_ok=True)
        results.save("test", record)
        print(
            f"{name}: {last_line(text)}", *map(failure_line, record["steps"][name]["failures"]), sep="\n  ", flush=True
        )
    record["done"] = set(record["steps"]) == set(STEPS) and all(step["done"] for step in record["steps"].values())
    record["counts"] = totals(step["counts"] for step in record["steps"].values())
    return record | {"problem": problem(record, () if rehearse else REQUIRED)}


def command(report: Path, expression: str, rehearse: bool) -> list[str]:
    tests = ["tests/test_blocks.py"] if rehearse else ["tests"]
    chosen = [sys.executable, "-m", "pytest", *tests, "-q", "-k", expression, f"--junitxml={report}"]
    chosen += ["--tb=short", "--maxfail=100", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and not rehearse:
        chosen += ["-n", str(min(os.cpu_count() or 1, 16))]
    if importlib.util.find_spec("pytest_timeout"):
        chosen += ["--timeout=150"]
    return chosen


def step_record(report: Path, status: int, text: str) -> dict:
    """`done` says that pytest came to its end, whatever the tests did (5: it found none)."""
    done = status in (0, 1, 5) and report.exists()
    counts, failures = parse(report) if report.exists() else ({}, [])
    return {
        "done": done, "status": status, "counts": counts, "failures": failures[:20], "summary": last_line(text),
    }  # fmt: skip


def parse(report: Path) -> tuple[dict[str, dict[str, int]], list[dict]]:
    """Of a JUnit file: {backend: {outcome: tests}}, tests without a backend under "no backend"; and what failed."""
    counts: dict[str, Counter] = {}
    failures = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag: child for child in case if child.tag in ("failure", "error", "skipped")}
        outcome = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
        counts.setdefault(backend_of(case.get("name", "")), Counter())[outcome] += 1
        if outcome in ("failure", "error"):
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"test": name, "message": (kinds[outcome].get("message") or "")[:300]})
    return {backend: dict(count) for backend, count in sorted(counts.items())}, failures


def backend_of(name: str) -> str:
    """test_fused[dtype0-cuda-9] -> cuda. The fixture's word counts, not what the test is called."""
    words = [word for parameters in re.findall(r"\[(.*)\]", name) for word in parameters.split("-")]
    return next((word for word in words if word in BACKENDS), "no backend")


def totals(all_counts) -> dict[str, dict[str, int]]:
    total: dict[str, Counter] = {}
    for counts in all_counts:
        for backend, count in counts.items():
            total.setdefault(backend, Counter()).update(count)
    return {backend: dict(count) for backend, count in sorted(total.items())}


def problem(record: dict, required: tuple[str, ...]) -> str | None:
    counts = record["counts"]
    failed = sum(count.get("failure", 0) + count.get("error", 0) for count in counts.values())
    problems = [f"{failed} tests failed"] if failed else []
    problems += [f"no {name} test passed" for name in required if not counts.get(name, {}).get("passed")]
    problems += [] if record["done"] else ["not all of the suite was run"]
    return ", ".join(problems) or None


def failure_line(failure: dict) -> str:
    return f"{failure['test']}: {' '.join(failure['message'].split())[:120]}"


def last_line(text: str) -> str:
    return next((line.strip("= ") for line in reversed(text.splitlines()) if line.strip()), "")
